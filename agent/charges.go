package agent

import (
	"context"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// The bounds of what is remembered of flows that can be settled. A session forgets its oldest flows first.
const (
	maxCharges       = 1 << 16   // flows of one session
	maxChargesBytes  = 16 << 20  // of one session
	maxCharged       = 128 << 20 // bytes, over all sessions
	ownCharged       = 16 << 10  // bytes of one session, even if others leave no room
	chargeSize       = 128       // bytes that a flow takes, besides its decisions and labels
	decisionSize     = 128
	maxChargedLabels = 4 << 10 // bytes of labels; those of a flow with more are not kept, and its share in a queue is not charged
)

// charges are the flows of a session that can be settled, by the ids that their answers gave. A flow that was settled is
// remembered too, so that a settlement that comes again is taken, and counts once. The zero value is ready.
type charges struct {
	mu    sync.Mutex
	by    map[uint64]*charge
	order []*charge // a ring, once it is full
	first int       // the oldest in the ring
	count int
	bytes int
	over  bool // the session has run out
}

// A charge is what a flow took that can be corrected, and what waits for its outcome.
type charge struct {
	id        uint64
	size      int
	decisions []agentapi.LimiterDecision
	labels    *agentapi.Labels // nil if no scheduler wants them

	began   int64      // when the check did, in Unix nanoseconds
	awaited []*awaited // what goes by how the flow ends
}

// charge remembers what of the verdict can be settled, with what of it awaits an outcome. It returns the id of that; 0 if nothing can
// be settled. Of a flow in a client's dry run, only outcomes are awaited. If there is no room, or the session has run out, it returns an id all the same, so that the client learns that its
// settlement was not taken.
func (s *sessions) charge(one *session, req *agentapi.Request, v *agentapi.Verdict, awaits []*awaited) uint64 {
	if v.Rejected() && !req.DryRun() {
		return 0
	}
	var c *charge
	if len(awaits) > 0 {
		c = &charge{size: chargeSize + decisionSize*len(awaits), awaited: awaits}
	}
	for i := range v.Len() {
		d := v.At(i)
		if req.DryRun() || d.Dropped || d.DryRun || d.Component.TokensLabel == "" || d.Scope == agentapi.ScopeNone {
			continue
		}
		if c == nil {
			c = &charge{size: chargeSize}
		}
		kept := *d
		kept.Label = strings.Clone(d.Label) // of a request, which may be large
		c.decisions = append(c.decisions, kept)
		c.size += decisionSize + len(d.Label)
		if d.Component.Workload != nil && c.labels == nil {
			c.labels = &agentapi.Labels{Params: req.Labels.Merged()}
		}
	}
	if c == nil {
		return 0
	}
	c.began = v.Start
	if c.labels != nil {
		size := 0
		for key, value := range c.labels.Params {
			size += 32 + len(key) + len(value)
		}
		if size > maxChargedLabels {
			c.labels = nil
		} else {
			c.size += size
		}
	}
	own := &one.charges
	own.mu.Lock()
	defer own.mu.Unlock()
	for c.id == 0 || own.by[c.id] != nil {
		c.id = rand.Uint64()
	}
	if own.over {
		return c.id
	}
	if own.by == nil {
		own.by = make(map[uint64]*charge)
	}
	before := own.bytes
	full := func() bool {
		return own.count >= maxCharges || own.bytes+c.size > maxChargesBytes ||
			own.bytes+c.size > ownCharged && s.charged.Load()+int64(own.bytes-before+c.size) > maxCharged
	}
	for own.count > 0 && full() {
		own.forget()
	}
	if !full() { // with nothing that could be forgotten, one flow may be too large alone
		own.remember(c)
	}
	s.charged.Add(int64(own.bytes - before))
	return c.id
}

// remember adds the charge, for which there is room.
func (own *charges) remember(c *charge) {
	if own.count == len(own.order) { // it grows up to maxCharges
		grown := make([]*charge, min(max(2*own.count, 16), maxCharges))
		n := copy(grown, own.order[own.first:])
		copy(grown[n:], own.order[:own.first])
		own.order, own.first = grown, 0
	}
	own.order[(own.first+own.count)%len(own.order)] = c
	own.count++
	own.by[c.id] = c
	own.bytes += c.size
}

// forget forgets the oldest charge.
func (own *charges) forget() {
	c := own.order[own.first]
	own.order[own.first] = nil
	own.first = (own.first + 1) % len(own.order)
	own.count--
	own.bytes -= c.size
	delete(own.by, c.id)
}

// drop forgets all, and returns how many bytes they took.
func (own *charges) drop() int64 {
	own.mu.Lock()
	defer own.mu.Unlock()
	n := own.bytes
	own.by, own.order, own.first, own.count, own.bytes, own.over = nil, nil, 0, 0, 0, true
	return int64(n)
}

// settle tells how a flow ended, as far as the settlement says so, and adds to all what is to be corrected of what it took. It reports
// whether the settlement is taken, now or earlier.
func (one *session) settle(ctx context.Context, m *sessionv1.Settlement, awaited *outcomes, all []agentapi.Settling) ([]agentapi.Settling, bool) {
	var costs agentapi.Costs
	for _, cost := range m.GetCosts() {
		if !(cost.GetTokens() >= 0 && cost.GetTokens() <= math.MaxFloat64) || cost.GetLabel() == "" {
			return all, false
		}
		costs.Say(cost.GetLabel(), cost.GetTokens())
	}
	if took := m.GetOutcome().GetTook(); took != nil && (!took.IsValid() || took.AsDuration() < 0) {
		return all, false
	}
	ended, said := endedOf(m.GetOutcome())
	c, ok := one.charges.take(m.GetId(), len(m.GetCosts()) > 0, said)
	o := agentapi.Outcome{Ended: agentapi.EndedOK, Costs: costs.Close(), Labels: c.labels}
	for i := range c.decisions {
		all = append(all, agentapi.Settling{By: c.decisions[i].Component.Settler, Decision: &c.decisions[i], Outcome: o})
	}
	o = agentapi.Outcome{Ended: ended}
	if ended == agentapi.EndedOK { // as by a span: no longer than since the check, and no time is a nanosecond
		o.Took = max(min(m.GetOutcome().GetTook().AsDuration(), time.Since(time.Unix(0, c.began))), 1)
	}
	awaited.end(ctx, c.awaited, o)
	return all, ok
}

// endedOf returns how the flow ended, by what its session says. It reports false if that says nothing.
func endedOf(m *sessionv1.Outcome) (agentapi.Ended, bool) {
	switch m.GetStatus() {
	case sessionv1.Outcome_STATUS_OK:
		return agentapi.EndedOK, true
	case sessionv1.Outcome_STATUS_ERROR:
		return agentapi.EndedFailed, true
	case sessionv1.Outcome_STATUS_UNKNOWN:
		return agentapi.EndedUnknown, true
	case sessionv1.Outcome_STATUS_UNSPECIFIED:
	}
	return agentapi.EndedUnknown, false
}

// take returns what is to be corrected of a flow if there are costs, and what goes by how it ended if that is said, each once. It
// is ok if the flow is remembered.
func (own *charges) take(id uint64, costs, ended bool) (taken charge, ok bool) {
	own.mu.Lock()
	defer own.mu.Unlock()
	c := own.by[id]
	if c == nil {
		return charge{}, false
	}
	taken.began = c.began
	if costs {
		taken.decisions, taken.labels = c.decisions, c.labels
		c.decisions, c.labels = nil, nil
	}
	if ended {
		taken.awaited, c.awaited = c.awaited, nil
	}
	return taken, true
}
