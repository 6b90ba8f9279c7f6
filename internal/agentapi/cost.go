package agentapi

import (
	"iter"
	"math"
	"sync/atomic"
)

// Costs are what a flow has really cost, by label. The zero value says nothing. It is safe for concurrent use.
type Costs struct{ newest atomic.Pointer[Cost] }

// A Cost is what a flow has cost by one label, and by the labels of the costs after it. A nil Cost is none. It does not change
// once [Costs.Close] has returned it.
type Cost struct {
	label  string
	said   atomic.Uint64 // a float64, or sealed
	tokens float64       // what was said when the costs were closed
	next   *Cost
}

// sealed is what the costs of a flow that has ended say. It is the bits of no finite number.
const sealed = math.MaxUint64

// Say sets what the flow has cost by the label, a finite number from 0 up. Of several calls the last one before Close
// counts. It allocates once for each label.
func (c *Costs) Say(label string, tokens float64) {
	bits := math.Float64bits(max(tokens, 0)) // without the sign of a zero
	var own *Cost
	for {
		newest := c.newest.Load()
		if of := newest.find(label); of != nil {
			of.say(bits)
			return
		}
		if own == nil {
			own = &Cost{label: label}
			own.said.Store(bits)
		}
		own.next = newest
		if c.newest.CompareAndSwap(newest, own) {
			return
		}
	}
}

// say changes the cost, unless the costs are closed.
func (c *Cost) say(bits uint64) {
	for {
		old := c.said.Load()
		if old == sealed || c.said.CompareAndSwap(old, bits) {
			return
		}
	}
}

// Close returns what was said; nil if nothing was. What is said from now on has no effect on it. It is called once.
func (c *Costs) Close() *Cost {
	all := c.newest.Load()
	for of := all; of != nil; of = of.next {
		of.tokens = math.Float64frombits(of.said.Swap(sealed))
	}
	return all
}

// By returns the tokens that the flow has cost by the label; ok is false if nothing was said about it. It is for costs that
// are closed.
func (c *Cost) By(label string) (tokens float64, ok bool) {
	if of := c.find(label); of != nil {
		return of.tokens, true
	}
	return 0, false
}

// All yields each label with the tokens that the flow has cost by it. It is for costs that are closed.
func (c *Cost) All() iter.Seq2[string, float64] {
	return func(yield func(string, float64) bool) {
		for of := c; of != nil; of = of.next {
			if !yield(of.label, of.tokens) {
				return
			}
		}
	}
}

func (c *Cost) find(label string) *Cost {
	for ; c != nil; c = c.next {
		if c.label == label {
			return c
		}
	}
	return nil
}
