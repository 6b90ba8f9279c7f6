package engine

import (
	"cmp"
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/breaker"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// probeTimeout is the ProbeTimeout of zero.
const probeTimeout = time.Minute

// A circuitBreaker rejects flows for a while after others have failed. It has nothing to give, except the places of probes.
//
// Most flows come to a closed circuit. They take no lock when they come, because all that they need to know is that it is
// closed. When they end they are counted under the lock of their key.
type circuitBreaker struct {
	keyed[breaker.State, *breaker.Rule]
	slow  time.Duration // how long a flow may take; 0 for any time
	plain bool          // flows that end well need not be counted
	*circuits
}

// circuits are what circuit breakers keep of all keys, when another one follows too.
type circuits struct {
	opened   atomic.Uint64 // how often a circuit has opened
	unclosed atomic.Int64  // how many circuits are not closed

	// floor is the last change of any forgotten circuit. Flows admitted before it do not count when their key comes back.
	floor atomic.Int64
}

func newCircuitBreaker(e *Engine, in *installed, p policy.CircuitBreaker, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	own := breakerNumbers(p)
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, cmp.Or(p.DeniedStatus, http.StatusServiceUnavailable), own.capacity, p.DryRun
	all := new(circuits)
	b := &circuitBreaker{
		slow:     p.SlowAfter,
		plain:    e.overrides == nil && len(p.Overrides) == 0 && p.FailureRatio == 0 && p.MinFlows <= p.FailureCount,
		circuits: all,
	}
	var err error
	b.keyed, err = newKeyed(e, config[breaker.State, *breaker.Rule]{
		component: c, maxIdle: p.MaxIdle, mode: breakerMode{p.LimitBy}, own: own, with: withNumbers(in, breakerNumbers), overrides: p.Overrides,
		ruling: ruling[breaker.State, *breaker.Rule]{
			fresh:   func(_ *breaker.Rule, s *breaker.State, _ int64) { *s = breaker.State{} },
			idle:    all.forget,
			inherit: (*breaker.Rule).Inherit,
		},
	})
	if err != nil {
		return nil, err
	}
	b.passThrough = p.PassThrough
	b.component.Settler = b
	return b, nil
}

// breakerMode is what must not change if circuits are to be kept.
type breakerMode struct{ label string }

// breakerNumbers returns the numbers of a circuit breaker. Its capacity is that for probes.
func breakerNumbers(p policy.CircuitBreaker) *numbers[*breaker.Rule] {
	probes := cmp.Or(p.Probes, 1)
	return &numbers[*breaker.Rule]{capacity: float64(probes), rule: &breaker.Rule{
		Ratio: p.FailureRatio, Count: uint64(p.FailureCount), Least: uint64(p.MinFlows),
		Step:   breaker.StepOf(min(int64(p.Window), source.Century)),
		Open:   min(int64(p.OpenDuration), source.Century),
		Probes: probes, Successes: cmp.Or(p.Successes, probes),
		Timeout: min(int64(cmp.Or(p.ProbeTimeout, probeTimeout)), source.Century),
	}}
}

// follow has the breaker follow one of the same label. Circuits stay open or closed.
func (b *circuitBreaker) follow(other component) bool {
	before, ok := other.(*circuitBreaker)
	if !ok || before.mode != b.mode {
		return false
	}
	b.followed(&before.keyed)
	b.circuits = before.circuits
	return true
}

func (b *circuitBreaker) takeOver() { b.change(nil) }

func (b *circuitBreaker) askAgain() { b.reconsider(nil) }

// oldest reports nothing: flows hold no slots of a breaker.
func (*circuitBreaker) oldest(int64) (since int64, ok bool) { return 0, false }

// forget reports whether the state's key may be forgotten, and notes what must not be forgotten with it.
func (c *circuits) forget(rule *breaker.Rule, s *breaker.State, now int64) bool {
	if !rule.Idle(s, now) {
		return false
	}
	for floor := s.Floor(); ; {
		if old := c.floor.Load(); floor <= old || c.floor.CompareAndSwap(old, floor) {
			break
		}
	}
	if s.Phase() != breaker.Closed {
		c.close(s, now)
	}
	return true
}

// close closes the circuit. Flows that are under way do not count any more.
func (c *circuits) close(s *breaker.State, now int64) {
	if s.Phase() != breaker.Closed {
		c.unclosed.Add(-1)
	}
	s.Close(now)
}

// ask decides at once: no flow waits for a circuit to close.
func (b *circuitBreaker) ask(_ context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (int64, error) { //nolint:unparam // it is a decider
	now := a.now
	if !b.scope(&req.Labels, d) {
		b.counts.decision(d)
		return now, nil
	}
	if ticket, ok := b.pass(d, now); ok {
		d.Hold(uint64(ticket))
		d.Remaining = b.component.Capacity
		b.counts.decision(d)
		return now, nil
	}
	e := b.lock(&req.Labels, d, now)
	n := b.of(e)
	got := n.rule.Admit(&e.State, now)
	e.Unlock()
	d.Capacity = n.capacity
	d.Remaining = float64(got.Free)
	if got.Ticket == 0 {
		b.rejected(e, d, now)
		b.drop(d, agentapi.CauseCircuitOpen, got.Wait)
	} else {
		d.Hold(uint64(got.Ticket))
		if got.Ticket.Probe() {
			d.Consumed = 1
		}
	}
	b.counts.decision(d)
	return now, nil
}

// pass admits a flow without a lock if its circuit is closed. The circuit of an unknown key is closed. If the table has no
// room for the key, pass admits nothing, because the spill's circuit decides.
func (b *circuitBreaker) pass(d *agentapi.LimiterDecision, now int64) (breaker.Ticket, bool) {
	if b.table == nil {
		return b.single.State.Pass(now)
	}
	if e := b.table.Find(d.Label); e != nil {
		return e.State.Pass(now)
	}
	if b.table.Full() {
		return 0, false
	}
	return (*breaker.State)(nil).Pass(now)
}

func (b *circuitBreaker) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	if b.scope(&req.Labels, d) {
		b.drop(d, cause, 0)
	}
	b.counts.decision(d)
}

// Settle learns how the flow ended. It reports whether a probe gave its place back.
func (b *circuitBreaker) Settle(_ context.Context, d *agentapi.LimiterDecision, o agentapi.Outcome) bool {
	ticket := breaker.Ticket(d.Slot())
	if ticket == 0 {
		return false
	}
	if !ticket.Probe() && (!o.Ended.Told() || o.Ended == agentapi.EndedOK && b.plain && b.slow == 0) {
		return false // nothing of it is counted
	}
	now := b.engine.now()
	e := b.held(d, o.Labels, now)
	back, change := b.of(e).rule.End(&e.State, now, ticket, b.outcome(now, ticket, o), b.floor.Load())
	e.Unlock()
	switch change {
	case breaker.Opened:
		b.opened.Add(1)
		b.unclosed.Add(1)
	case breaker.Reopened:
		b.opened.Add(1)
	case breaker.Recovered:
		b.unclosed.Add(-1)
	case breaker.None:
	}
	if back && o.Ended == agentapi.EndedUnused {
		count(b.counts, d, decisionsRefunded)
	}
	return back
}

// held returns the entry that decided, locked. It makes a forgotten key again. Otherwise flows that take longer than their
// key is remembered would not count.
func (b *circuitBreaker) held(d *agentapi.LimiterDecision, labels *agentapi.Labels, now int64) *keys.Entry[breaker.State] {
	if d.Spilled {
		e := b.table.Spill()
		e.Lock()
		return e
	}
	return b.lock(labels, d, now)
}

// outcome is what the flow's end says about what it did.
func (b *circuitBreaker) outcome(now int64, t breaker.Ticket, o agentapi.Outcome) breaker.Outcome {
	switch {
	case o.Ended == agentapi.EndedFailed:
		return breaker.Failure
	case o.Ended != agentapi.EndedOK:
		return breaker.Nothing
	case b.slow > 0 && cmp.Or(o.Took, time.Duration(now-t.Begin())-o.Waited) > b.slow:
		return breaker.Failure
	default:
		return breaker.Success
	}
}

func (b *circuitBreaker) stats(now int64) ComponentStats {
	all := b.keyed.stats(b.usage, now)
	all.Opened = b.opened.Load()
	all.Open = int(b.unclosed.Load())
	return all
}

func (b *circuitBreaker) peek(_ context.Context, value string, now int64) (Usage, error) { //nolint:unparam // it is an inspected
	return b.usage(value, now), nil
}

func (b *circuitBreaker) usage(value string, now int64) Usage {
	e, n := b.met(value, now)
	defer e.Unlock()
	phase, probes, free := n.rule.Usage(&e.State, now)
	return Usage{Capacity: n.capacity, Remaining: float64(free), InFlight: probes, State: phase.String()}
}

func (b *circuitBreaker) reset(_ context.Context, value string, now int64) error {
	e, _ := b.met(value, now)
	defer e.Unlock()
	b.close(&e.State, now)
	return nil
}

func warnCircuitBreaker(w *warnings, of string, p policy.CircuitBreaker) {
	if p.PassThrough {
		return
	}
	look := func(of string, ratio float64, count, least int) {
		if least <= 1 && (ratio > 0 || count == 1) {
			w.impossible = append(w.impossible, of+": a single flow that fails opens the breaker: say by MinFlows how many must have ended")
		}
	}
	look(of, p.FailureRatio, p.FailureCount, p.MinFlows)
	overridden(of, p.Overrides, func(of string, o policy.Override) {
		look(of, replaced(p.FailureRatio, o.FailureRatio), cmp.Or(o.FailureCount, p.FailureCount), cmp.Or(o.MinFlows, p.MinFlows))
	})
}

// observeBreaker shows a circuit breaker.
func observeBreaker(o *observation) {
	s := o.component
	o.decided(o.decisions[o.kind.counter], s.Accepted, s.Dropped)
	o.to.ObserveInt64(o.opened, int64(s.Opened), o.own)
	o.to.ObserveInt64(o.open, int64(s.Open), o.own)
	o.buckets()
}
