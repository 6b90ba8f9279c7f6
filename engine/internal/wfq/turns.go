package wfq

import (
	"cmp"
	"slices"
)

// Turns are the waiters of a workload that are served first, in their order.
type Turns[T any] struct {
	Claim   Claim // of the workload; it has no fairness value
	Waiters []*Waiter[T]
	More    bool // there are others
}

// Turns returns those of each workload, up to so many waiters of each. The workload that is served next is first.
func (q *Queue[T]) Turns(most int) []Turns[T] {
	workloads := slices.Clone(q.root.below)
	slices.SortFunc(workloads, func(a, b *share[T]) int {
		if c := cmp.Compare(a.finish, b.finish); c != 0 {
			return c
		}
		return cmp.Compare(a.head().number, b.head().number)
	})
	all := make([]Turns[T], 0, len(workloads))
	for _, w := range workloads {
		claim := w.claim
		claim.whole = false
		all = append(all, Turns[T]{claim, w.turns(most), w.size > most})
	}
	return all
}

// A turn is a waiter that may be the next, and when its share finishes with it.
type turn[T any] struct {
	of     *share[T]
	waiter *Waiter[T]
	finish float64
	first  bool // of its share
}

// turns plays what the workload's shares do, without a change. The shares are a heap, so those that come after a share in it
// come after it in time: they are looked at only when it has had its turn.
func (s *share[T]) turns(most int) []*Waiter[T] {
	next := []turn[T]{{s.below[0], s.below[0].first, s.below[0].finish, true}}
	var all []*Waiter[T]
	for len(next) > 0 && len(all) < most {
		best := 0
		for i := range next {
			a, b := &next[i], &next[best]
			if a.finish < b.finish || a.finish == b.finish && a.waiter.number < b.waiter.number {
				best = i
			}
		}
		t := next[best]
		all = append(all, t.waiter)
		if after := t.waiter.next; after != nil {
			next[best] = turn[T]{t.of, after, t.finish + after.Cost, false}
		} else {
			next = slices.Delete(next, best, best+1)
		}
		if t.first {
			for i := 2*t.of.index + 1; i <= 2*t.of.index+2 && i < len(s.below); i++ {
				o := s.below[i]
				next = append(next, turn[T]{o, o.first, o.finish, true})
			}
		}
	}
	return all
}

// Waits reports whether a waiter that was pushed is in the queue still.
func (w *Waiter[T]) Waits() bool { return w.share != nil }
