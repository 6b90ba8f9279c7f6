// Package breaker is the circuit of circuit breakers: closed, open or half-open, by how flows end.
//
// Times are nanoseconds since an epoch of the caller's, by a monotonic clock.
package breaker

import (
	"slices"
	"sync/atomic"
)

// A Rule is what the circuits of one component have in common. It does not change.
type Rule struct {
	Ratio     float64 // the share of flows that opens a circuit when it fails; 0 for none
	Count     uint64  // the number of them that does; 0 for none
	Least     uint64  // how many flows must have ended before it opens
	Step      int64   // of the window: see [StepOf]
	Open      int64   // how long a circuit is open
	Probes    int     // how many flows a half-open circuit lets through at a time
	Successes int     // how many of them must end well before it closes
	Timeout   int64   // when a probe without an outcome loses its place
}

// A Phase is what a circuit does with flows.
type Phase uint8

// The phases.
const (
	Closed   Phase = iota // all pass
	Open                  // none passes
	HalfOpen              // a few pass, as probes
)

// String returns the phase as the field calls it.
func (p Phase) String() string {
	switch p {
	case Closed:
		return "closed"
	case Open:
		return "open"
	default:
		return "half-open"
	}
}

// An Outcome is what the end of a flow says.
type Outcome uint8

// The outcomes.
const (
	Nothing Outcome = iota // the flow did not run, or how that went is not known
	Success
	Failure
)

// A State is the circuit of one key. The caller guards it, except in [State.Pass]. The zero value is closed.
type State struct {
	circuit atomic.Pointer[circuit] // nil: closed since the key was made
	window  window
}

// A circuit is a circuit since its phase changed the last time: the next change makes another one. What it counts in the
// window goes with the change.
type circuit struct {
	phase Phase
	since int64 // flows of this phase begin then or later

	// The rest is guarded as the state is.
	until     int64   // when an open circuit lets probes through; later when a flow came to it the last time
	successes int     // of probes
	places    []int64 // when the probes began that are under way, in order
	wide      *wide   // the window, where its own counters are too small
}

// A Ticket says when a flow was admitted, and whether as a probe. Zero is that of no flow.
type Ticket uint64

// probe marks the tickets of probes.
const probe Ticket = 1 << 63

// begun is the ticket of a flow that was admitted at a time.
func begun(at int64) Ticket { return Ticket(at + 1) }

// Begin returns when the flow was admitted.
func (t Ticket) Begin() int64 { return int64(t&^probe) - 1 }

// Probe reports whether the flow is a probe.
func (t Ticket) Probe() bool { return t&probe != 0 }

// Pass admits a flow if the circuit is closed. It needs no guard, because it reads only what does not change. The state may
// be nil: then no flow of the key has ended yet. A circuit that closes again admits flows from the next nanosecond on, so a
// ticket may be a nanosecond later than now.
func (s *State) Pass(now int64) (t Ticket, ok bool) {
	var c *circuit
	if s != nil {
		c = s.circuit.Load()
	}
	switch {
	case c == nil:
		return begun(now), true
	case c.phase == Closed:
		return begun(max(now, c.since)), true
	default:
		return 0, false
	}
}

// An Admission is the answer to a flow.
type Admission struct {
	Ticket Ticket // 0: the flow is rejected
	Wait   int64  // until a flow may pass, if this one is rejected
	Free   int    // places for probes
}

// Admit admits a flow, or not. It begins the half-open phase when its time has come.
func (r *Rule) Admit(s *State, now int64) Admission {
	if t, ok := s.Pass(now); ok {
		return Admission{Ticket: t, Free: r.Probes}
	}
	c := s.circuit.Load()
	if c.phase == Open {
		if now < c.until {
			return Admission{Wait: c.until - now}
		}
		c = s.change(HalfOpen, now)
	}
	c.until = max(c.until, now)
	r.reclaim(c, now)
	free := r.free(c)
	if free == 0 {
		return Admission{Wait: r.wait(c, now)}
	}
	begin := max(now, c.since)
	at, _ := slices.BinarySearch(c.places, begin) // most come in order
	c.places = slices.Insert(c.places, at, begin)
	return Admission{Ticket: begun(begin) | probe, Free: free - 1}
}

// free returns how many more probes a half-open circuit lets through: no more than it has places, and no more in all than the
// larger of Probes and Successes.
func (r *Rule) free(c *circuit) int {
	under := len(c.places)
	return max(min(r.Probes-under, max(r.Probes, r.Successes)-c.successes-under), 0)
}

// wait is how long until the first place is taken back, but no longer than an open circuit would reject: the probe may end at
// any time.
func (r *Rule) wait(c *circuit, now int64) int64 {
	return max(min(c.places[0]+r.Timeout-now, r.Open), 1)
}

// reclaim takes back the places of probes whose time is over.
func (r *Rule) reclaim(c *circuit, now int64) {
	n := 0
	for n < len(c.places) && now-c.places[n] >= r.Timeout {
		n++
	}
	c.places = slices.Delete(c.places, 0, n)
}

// A Change says what an outcome did.
type Change uint8

// The changes.
const (
	None Change = iota
	Opened
	Reopened // it was half-open
	Recovered
)

// End takes the outcome of the flow with the ticket. It counts if the flow was admitted in the present phase, and not before
// the time floor. Back reports whether a probe gave its place back. End is called once for each ticket.
func (r *Rule) End(s *State, now int64, t Ticket, o Outcome, floor int64) (back bool, change Change) {
	c := s.circuit.Load()
	if c != nil {
		floor = max(floor, c.since)
	}
	if t.Begin() < floor {
		return false, None
	}
	switch {
	case c == nil || c.phase == Closed:
		if !t.Probe() && o != Nothing && r.count(s, now, o) {
			s.change(Open, now).until = now + r.Open
			return false, Opened
		}
	case c.phase == HalfOpen && t.Probe():
		return r.endProbe(s, c, now, t, o)
	}
	return false, None
}

// endProbe is End for a probe of the half-open phase. It may have lost its place.
func (r *Rule) endProbe(s *State, c *circuit, now int64, t Ticket, o Outcome) (back bool, change Change) {
	c.until = max(c.until, now)
	r.reclaim(c, now)
	if at, ok := slices.BinarySearch(c.places, t.Begin()); ok {
		c.places = slices.Delete(c.places, at, at+1)
		back = true
	}
	switch o {
	case Failure:
		s.change(Open, now).until = now + r.Open
		return back, Reopened
	case Success:
		if c.successes++; c.successes >= r.Successes {
			s.change(Closed, now)
			return back, Recovered
		}
	case Nothing:
	}
	return back, None
}

// change begins a phase, with nothing counted. Flows that were admitted in a closed phase begin before the next one, also if
// that closes in the same moment. Probes need no such gap: an open phase lies between two half-open ones.
func (s *State) change(to Phase, now int64) *circuit {
	since := now
	if c := s.circuit.Load(); c != nil { // of two flows the one with the later time may come first
		since = max(since, c.since)
	}
	if to == Closed {
		since++
	}
	c := &circuit{phase: to, since: since, until: now}
	s.window.clear()
	s.circuit.Store(c)
	return c
}

// count counts a flow that has ended, and reports whether the circuit is to open.
func (r *Rule) count(s *State, now int64, o Outcome) bool {
	flows, failed := s.add(now/r.Step, o == Failure)
	return failed > 0 && flows >= r.Least && (r.Count > 0 && failed >= r.Count || r.Ratio > 0 && float64(failed)/float64(flows) >= r.Ratio)
}

// Inherit makes the state one of this rule, which follows the rule before. The circuit stays as it is, for as long as it was to be.
// Steps of another length count nothing of what was counted.
func (r *Rule) Inherit(s *State, before *Rule, now int64) {
	if r.Step == before.Step {
		return
	}
	if c := s.circuit.Load(); c != nil {
		c.wide = nil
	}
	s.window = window{newest: now / r.Step}
}

// Close closes the circuit. Flows that are under way do not count any more.
func (s *State) Close(now int64) { s.change(Closed, now) }

// Usage says what the circuit does at a time, with how many probes under way, and how many places are free for more.
func (r *Rule) Usage(s *State, now int64) (p Phase, probes, free int) {
	c := s.circuit.Load()
	switch {
	case c == nil || c.phase == Closed:
		return Closed, 0, r.Probes
	case c.phase == Open && now < c.until:
		return Open, 0, 0
	case c.phase == Open: // the next flow makes it half-open
		return HalfOpen, 0, r.Probes
	default:
		r.reclaim(c, now)
		return HalfOpen, len(c.places), r.free(c)
	}
}

// Idle reports whether the circuit is closed, and nothing counts any more. One that is not closed is idle too when no flow
// has come for as long as a flow counts, after one could have passed: what it knows is older than what a closed one
// knows.
func (r *Rule) Idle(s *State, now int64) bool {
	c := s.circuit.Load()
	if c == nil || c.phase == Closed {
		return s.window.empty(now / r.Step)
	}
	r.reclaim(c, now)
	return len(c.places) == 0 && now-c.until >= r.Step*(steps-1)
}

// Floor returns the time from which admitted flows would count if the circuit closed now; 0 if it has never changed.
func (s *State) Floor() int64 {
	c := s.circuit.Load()
	switch {
	case c == nil:
		return 0
	case c.phase == Closed:
		return c.since
	default:
		return c.since + 1
	}
}

// Phase returns the phase that began last. An open circuit remains open until a flow comes.
func (s *State) Phase() Phase {
	if c := s.circuit.Load(); c != nil {
		return c.phase
	}
	return Closed
}

// StepOf returns the step of a window in which flows count for so many nanoseconds.
func StepOf(window int64) int64 { return (window + steps - 2) / (steps - 1) }
