package wfq

import "container/heap"

// A share is the waiters with the same claim, or those of a workload, or all of them. It exists as long as there are any.
type share[T any] struct {
	claim  Claim
	parent *share[T] // nil for the root
	weight float64

	start   float64 // what it has been served up to, by the parent's clock
	finish  float64 // start plus what its first waiter costs, by its weight
	backlog float64 // what all its waiters cost
	index   int     // in the parent's heap

	smallest, largest float64 // costs of its waiters since it last had none

	clock float64
	below byFinish[T] // the shares of a workload, and the workloads of the root

	first, last *Waiter[T] // of a share that has none below

	size  int       // how many wait
	place int       // in the parent's crowd
	crowd bySize[T] // the same shares as below
}

// head returns the share's first waiter; nil when there is none.
func (s *share[T]) head() *Waiter[T] {
	for len(s.below) > 0 {
		s = s.below[0]
	}
	return s.first
}

// lateClock is when a clock is set back: a float that shows more does not move by what flows of a high priority cost.
const lateClock = 1e9

// rebase sets back a clock that shows too much, and the shares that go by it.
func (s *share[T]) rebase() {
	if s.clock < lateClock {
		return
	}
	for _, o := range s.below {
		o.start -= s.clock
		o.finish = o.start + o.head().Cost/o.weight // computed from the start, as in a preview
	}
	s.clock = 0
	heap.Init(&s.below) // finishes that differed may be equal now
}

// grow changes how many wait in the share.
func (s *share[T]) grow(by int) {
	s.size += by
	switch {
	case s.size == 0:
		heap.Remove(&s.parent.crowd, s.place)
	case s.place < 0:
		heap.Push(&s.parent.crowd, s)
	default:
		heap.Fix(&s.parent.crowd, s.place)
	}
}

// bySize is a [heap.Interface] of shares, the largest first, and of equals the one with the newest waiter.
type bySize[T any] []*share[T]

func (h bySize[T]) Len() int { return len(h) }

func (h bySize[T]) Less(i, j int) bool {
	a, b := h[i], h[j]
	if a.size != b.size || a.last == nil || b.last == nil {
		return a.size > b.size
	}
	return a.last.number > b.last.number
}

func (h bySize[T]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

// Push is for the heap's own use, as Pop is.
func (h *bySize[T]) Push(x any) {
	s := x.(*share[T])
	s.place = len(*h)
	*h = append(*h, s)
}

func (h *bySize[T]) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}

// byFinish is a [heap.Interface] of shares by finish, and of equals by which came first.
type byFinish[T any] []*share[T]

func (h byFinish[T]) Len() int { return len(h) }

func (h byFinish[T]) Less(i, j int) bool {
	if h[i].finish != h[j].finish {
		return h[i].finish < h[j].finish
	}
	return h[i].head().number < h[j].head().number
}

func (h byFinish[T]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push is for the heap's own use, as Pop is.
func (h *byFinish[T]) Push(x any) {
	s := x.(*share[T])
	s.index = len(*h)
	*h = append(*h, s)
}

func (h *byFinish[T]) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}
