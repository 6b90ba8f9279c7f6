package agent

import (
	"strings"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of what is remembered of checks, in case their clients give them up. A session forgets its oldest checks first.
const (
	grantLasts = 2 * wire.SessionLasts // by then a client has the answer, has given the check up, or counts its slots as lost
	maxGrants  = 1 << 14               // checks of one session
	grantSize  = 192                   // bytes that a check with one slot takes, besides the value of its label
	slotSize   = 48                    // bytes that each further slot takes, besides the value of its label
)

// grants are the checks of a session whose flows have got slots lately, and those that the client has given up. Their keys are the
// numbers that the client gave them. If an answer does not reach its client, no end comes for its slots, and they would last as long as the
// session. The zero value is ready.
type grants struct {
	mu    sync.Mutex
	by    map[uint64]int // the index in the ring
	ring  []grant
	first int // the oldest in the ring
	count int
	bytes int
	over  bool // the session has run out
}

// A grant is a check whose flow has got slots, or none if the client has given it up.
type grant struct {
	number uint64
	at     time.Time
	size   int
	slot   grantedSlot
	more   []grantedSlot
}

// A grantedSlot is what ends a slot.
type grantedSlot struct {
	component *agentapi.Component
	label     string
	id        uint64
	scope     agentapi.Scope
	spilled   bool
}

// end is what ends the slot. As over the wire, its decision has no component: that does not say where the slot was granted.
//
// A probe ends without a result: the flow may have run, and nothing is known of that.
func (s *grantedSlot) end() agentapi.Settling {
	d := &agentapi.LimiterDecision{Label: s.label, Scope: s.scope, Spilled: s.spilled}
	d.Hold(s.id)
	ended := agentapi.EndedOK
	if s.component.Outcomes {
		ended = agentapi.EndedUnknown
	}
	return agentapi.Settling{By: s.component.Settler, Decision: d, Outcome: agentapi.Outcome{Ended: ended}}
}

// grant remembers the slots, and the places of probes, that the verdict has for a check of that number. It reports false if the client has given the check
// up. A check without a number cannot be given up.
func (s *sessions) grant(one *session, number uint64, v *agentapi.Verdict) bool {
	if number == 0 {
		return true
	}
	g := grant{number: number, at: time.Now()}
	for i := range v.Len() {
		d := v.At(i)
		probe := d.Component.Outcomes && d.Consumed > 0 // of other flows, a circuit breaker keeps nothing
		if d.Slot() == 0 || !d.Component.Slots && !probe {
			continue
		}
		slot := grantedSlot{d.Component, strings.Clone(d.Label), d.Slot(), d.Scope, d.Spilled} // the label is of a request, which may be large
		if g.slot.component == nil {
			g.slot, g.size = slot, grantSize+len(slot.label)
		} else {
			g.more = append(g.more, slot)
			g.size += slotSize + len(slot.label)
		}
	}
	if g.slot.component == nil {
		return true
	}
	own := &one.grants
	own.mu.Lock()
	defer own.mu.Unlock()
	if i, ok := own.by[number]; ok && own.ring[i].slot.component == nil {
		return false
	}
	s.remember(own, g)
	return true
}

// giveUp notes that the client has given up a check: it gets no slots from now on. It adds to all what ends those that it has.
func (s *sessions) giveUp(one *session, number uint64, all []agentapi.Settling) []agentapi.Settling {
	own := &one.grants
	own.mu.Lock()
	var ended grant
	if i, ok := own.by[number]; ok {
		ended = own.ring[i]
		own.ring[i].slot, own.ring[i].more = grantedSlot{}, nil
	} else {
		s.remember(own, grant{number: number, at: time.Now(), size: grantSize})
	}
	own.mu.Unlock()
	if ended.slot.component != nil {
		all = append(all, ended.slot.end())
	}
	for i := range ended.more {
		all = append(all, ended.more[i].end())
	}
	return all
}

// remember adds the grant if there is room, or can be. The caller holds own's mutex.
func (s *sessions) remember(own *grants, g grant) {
	if own.over {
		return
	}
	before := own.bytes
	full := func() bool {
		return own.count >= maxGrants || own.bytes+g.size > maxChargesBytes ||
			own.bytes+g.size > ownCharged && s.charged.Load()+int64(own.bytes-before+g.size) > maxCharged
	}
	for own.count > 0 && (g.at.Sub(own.ring[own.first].at) >= grantLasts || full()) {
		own.forget()
	}
	if !full() {
		own.add(g)
	}
	s.charged.Add(int64(own.bytes - before))
}

// add adds the grant, for which there is room.
func (own *grants) add(g grant) {
	if own.by == nil {
		own.by = make(map[uint64]int)
	}
	if own.count == len(own.ring) { // it grows up to maxGrants
		grown := make([]grant, min(max(2*own.count, 16), maxGrants))
		n := copy(grown, own.ring[own.first:])
		copy(grown[n:], own.ring[:own.first])
		own.ring, own.first = grown, 0
		for i := range own.count {
			own.by[own.ring[i].number] = i
		}
	}
	i := (own.first + own.count) % len(own.ring)
	own.ring[i] = g
	own.by[g.number] = i
	own.count++
	own.bytes += g.size
}

// forget forgets the oldest grant. A number that a client has used again is that of a newer one.
func (own *grants) forget() {
	g := &own.ring[own.first]
	if own.by[g.number] == own.first {
		delete(own.by, g.number)
	}
	own.count--
	own.bytes -= g.size
	*g = grant{}
	own.first = (own.first + 1) % len(own.ring)
}

// drop forgets all, and returns how many bytes they took.
func (own *grants) drop() int64 {
	own.mu.Lock()
	defer own.mu.Unlock()
	n := own.bytes
	own.by, own.ring, own.first, own.count, own.bytes, own.over = nil, nil, 0, 0, 0, true
	return int64(n)
}
