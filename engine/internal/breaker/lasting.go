package breaker

import (
	"encoding/binary"
	"math"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/statefile"
)

// Append writes the circuit as it is at the time now, and nothing if it is as good as a new one. A circuit that is not closed
// has written until when it rejects flows. Probes that are under way are not written: the next flow is a probe again. A closed
// one has its window written: the length of a step, when the newest one began, and for each of them, the oldest first, how many
// flows have ended and failed. Times are relative to now.
func (r *Rule) Append(b []byte, s *State, now int64) []byte {
	if r.Idle(s, now) {
		return b
	}
	c := s.circuit.Load()
	switch {
	case c != nil && c.phase == Open:
		return binary.AppendVarint(append(b, byte(Open)), max(c.until-now, 0))
	case c != nil && c.phase == HalfOpen:
		return binary.AppendVarint(append(b, byte(Open)), 0)
	}
	var counts wide
	for i := range counts {
		counts[i].flows, counts[i].failed = s.at(s.window.newest - steps + 1 + int64(i))
	}
	if counts == (wide{}) {
		return b
	}
	b = binary.AppendUvarint(append(b, byte(Closed)), uint64(r.Step))
	b = binary.AppendVarint(b, s.window.newest*r.Step-now)
	for _, t := range counts {
		b = binary.AppendUvarint(binary.AppendUvarint(b, t.flows), t.failed)
	}
	return b
}

// at returns what is counted in a step of the window.
func (s *State) at(step int64) (flows, failed uint64) {
	if c := s.circuit.Load(); c != nil && c.wide != nil {
		t := c.wide[place(step)]
		return t.flows, t.failed
	}
	t := s.window.counts[place(step)]
	return uint64(t.flows), uint64(t.failed)
}

// Restore takes what Append has written, unless the state has been used. It does not open a circuit for longer than the rule
// says. Opened reports whether it has opened it. OK is false if nothing could be taken from what was written, as from a window
// of another length.
func (r *Rule) Restore(s *State, written []byte, at source.Restoring) (opened, ok bool) {
	c := statefile.NewCursor(written)
	if phase := Phase(c.Byte()); phase == Open {
		left := c.Varint()
		if !c.Done() {
			return false, false
		}
		if !s.unused() {
			return false, true
		}
		s.change(Open, at.Now).until = min(max(at.At(left), at.Now), at.Now+r.Open)
		return true, true
	} else if phase != Closed {
		return false, false
	}
	step, newest := c.Uvarint(), at.At(c.Varint())
	var counts wide
	for i := range counts {
		counts[i].flows = min(c.Uvarint(), math.MaxUint32) // so that a sum fits
		counts[i].failed = min(c.Uvarint(), counts[i].flows)
	}
	if !c.Done() || step != uint64(r.Step) {
		return false, false
	}
	if last := min(int64(math.Floor(float64(newest)/float64(r.Step))), at.Now/r.Step); s.unused() && at.Now/r.Step-last < steps {
		s.fill(last, &counts)
	}
	return false, true
}

// unused reports whether the state is that of a new key.
func (s *State) unused() bool {
	flows, _ := s.window.sum()
	return s.circuit.Load() == nil && flows == 0
}

// fill sets the counts of the steps up to newest, the oldest first.
func (s *State) fill(newest int64, counts *wide) {
	s.window.newest = newest
	for _, t := range counts {
		if t.flows > math.MaxUint16 {
			s.widen(nil)
			break
		}
	}
	c := s.circuit.Load()
	for i, t := range counts {
		at := place(newest - steps + 1 + int64(i))
		if c != nil {
			c.wide[at] = t
		} else {
			s.window.counts[at] = tally{uint16(t.flows), uint16(t.failed)}
		}
	}
}
