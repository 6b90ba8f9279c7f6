package breaker

import "math"

// steps is how many steps of time a window has: those that are over and make up its length, and the one that is under way.
const steps = 6

// A window counts the flows that ended lately, and those of them that failed, by steps of time. Few keys have so many flows
// that a counter of 16 bits overflows. These get a [wide] window, so that a key without one takes little memory.
type window struct {
	newest int64 // the number of the step that is under way
	counts [steps]tally
}

// place returns where the tally of a step is. Steps of before the epoch have numbers below 0.
func place(step int64) int64 { return (step%steps + steps) % steps }

// A tally is of one step: the step numbered n has the one at n modulo steps.
type tally struct{ flows, failed uint16 }

// A wide window takes over from a window, for a key with many flows.
type wide [steps]struct{ flows, failed uint64 }

func (w *window) clear() { w.counts = [steps]tally{} }

// add counts a flow in the step, and returns what there is in the window. A step that is over is not begun again: a flow that
// comes late counts in the newest step.
func (s *State) add(step int64, failed bool) (flows, failures uint64) {
	w := &s.window
	c := s.circuit.Load()
	if c == nil || c.wide == nil {
		if step > w.newest {
			w.advance(step, func(i int64) { w.counts[i] = tally{} })
		}
		t := &w.counts[place(w.newest)]
		if t.flows < math.MaxUint16 {
			t.flows++
			if failed {
				t.failed++
			}
			return w.sum()
		}
		c = s.widen(c)
	}
	if step > w.newest {
		w.advance(step, func(i int64) { c.wide[i].flows, c.wide[i].failed = 0, 0 })
	}
	t := &c.wide[place(w.newest)]
	t.flows++
	if failed {
		t.failed++
	}
	return c.wide.sum()
}

// widen gives a closed circuit a wide window.
func (s *State) widen(c *circuit) *circuit {
	if c == nil {
		c = new(circuit)
	}
	c.wide = new(wide)
	for i, t := range s.window.counts {
		c.wide[i].flows, c.wide[i].failed = uint64(t.flows), uint64(t.failed)
	}
	s.window.clear()
	s.circuit.Store(c)
	return c
}

// advance begins a later step. It clears the places of that step, and of the steps in between.
func (w *window) advance(step int64, clearAt func(i int64)) {
	for n := max(w.newest+1, step-steps+1); n <= step; n++ {
		clearAt(place(n))
	}
	w.newest = step
}

func (w *window) sum() (flows, failed uint64) {
	for _, t := range &w.counts {
		flows += uint64(t.flows)
		failed += uint64(t.failed)
	}
	return flows, failed
}

func (w *wide) sum() (flows, failed uint64) {
	for i := range w {
		flows += w[i].flows
		failed += w[i].failed
	}
	return flows, failed
}

// empty reports whether nothing counts any more in the step.
func (w *window) empty(step int64) bool { return step-w.newest >= steps }
