// Package wfq is a weighted fair queue: it holds the flows that wait for one thing, and says which of them is served next.
// It knows nothing of what they wait for.
package wfq

import (
	"container/heap"
	"maps"
	"math"
	"slices"
)

// A Queue holds waiters and says which of them goes first: self-clocked fair queueing (Golestani, "A self-clocked fair
// queueing scheme for broadband applications", INFOCOM 1994), at two levels (as in Bennett and Zhang, "Hierarchical
// packet fair queueing algorithms", SIGCOMM 1996). Workloads are served in proportion to their priorities; within a
// workload the fairness values share alike; within one value, first come is first served.
//
// Each level has a clock of its own, which shows the finish of the share that it served last. A share that begins to wait
// starts at the clock, and finishes when it has had what its first waiter costs, at the speed of its weight; the smallest
// finish is served first. So a share that is idle saves nothing up, and need not be remembered: when its last waiter
// leaves, its finish lies behind the clock.
//
// T is what the caller keeps with each waiter. A Queue is not safe for concurrent use. Serving a waiter and removing it
// cost the logarithm of the number of shares.
type Queue[T any] struct {
	root      share[T]
	shares    map[Claim]*share[T]
	length    int
	room      *Room
	inRoom    member
	count     uint64 // waiters since the queue was last empty, for the order of equals
	deadlines int    // how many waiters have a deadline
	version   uint64
}

// A Claim names the share of a queue that a flow waits in. Flows of one workload with two priorities are two workloads.
type Claim struct {
	Workload string
	Priority float64 // the workload's weight, from MinPriority to MaxPriority
	Fairness string

	whole bool // of a workload: all its fairness values
}

// The bounds of priorities. A queue's clock advances by costs divided by priorities. A float that has come far by one
// priority no longer moves by the others.
const (
	MinPriority = 1e-6
	MaxPriority = 1e6
)

// NoDeadline is the deadline of a waiter that does not give up.
const NoDeadline int64 = math.MaxInt64

// A Waiter is a flow that waits.
type Waiter[T any] struct {
	Flow     T
	Cost     float64 // what it counts for; its share is charged with it when it is served
	Deadline int64   // when it gives up; NoDeadline where it does not
	Placed   bool    // it has taken room, which the queue returns when it leaves

	served     bool
	evicted    bool
	number     uint64
	share      *share[T]
	prev, next *Waiter[T]
}

// Served reports whether the waiter has been popped.
func (w *Waiter[T]) Served() bool { return w.served }

// Evicted reports whether another flow has got the waiter's room.
func (w *Waiter[T]) Evicted() bool { return w.evicted }

// Claim returns the claim of a waiter that is in a queue.
func (w *Waiter[T]) Claim() Claim { return w.share.claim }

// New makes an empty queue. The function turnOut is for [Room.Longest] to return: it locks the queue, has its newest
// waiter evicted if more than leave wait, and reports whether one was. A room that is not shared needs none.
func New[T any](room *Room, turnOut func(leave int) bool) *Queue[T] {
	return &Queue[T]{shares: make(map[Claim]*share[T]), room: room, inRoom: member{turnOut: turnOut}}
}

// Len returns the number of waiters.
func (q *Queue[T]) Len() int { return q.length }

// HasDeadlines reports whether any waiter has a deadline.
func (q *Queue[T]) HasDeadlines() bool { return q.deadlines > 0 }

// Version returns a number that grows whenever a waiter comes, leaves or costs something else.
func (q *Queue[T]) Version() uint64 { return q.version }

// First returns the waiter that is served next; nil when there is none.
func (q *Queue[T]) First() *Waiter[T] { return q.root.head() }

// Push adds the waiter.
func (q *Queue[T]) Push(w *Waiter[T], c Claim) {
	if q.length == 0 {
		q.root.smallest, q.root.largest = w.Cost, w.Cost
	}
	q.root.smallest, q.root.largest = min(q.root.smallest, w.Cost), max(q.root.largest, w.Cost)
	q.count++
	q.changed(1, w)
	w.number = q.count
	workload := q.share(c.ofWorkload(), &q.root, c.Priority)
	s := q.share(c, workload, 1)
	if s.last == nil {
		s.first = w
	} else {
		s.last.next, w.prev = w, s.last
	}
	s.last, w.share = w, s
	for ; s.parent != nil; s = s.parent {
		s.grow(1)
		if s.backlog == 0 {
			s.smallest, s.largest = w.Cost, w.Cost
		}
		s.backlog += w.Cost
		s.smallest, s.largest = min(s.smallest, w.Cost), max(s.largest, w.Cost)
	}
	q.settle(w.share)
}

// Pop removes the first waiter as served: its shares are charged.
func (q *Queue[T]) Pop() { q.Serve(q.First()) }

// Serve removes a waiter as served, also if it is not the first: its shares are charged.
func (q *Queue[T]) Serve(w *Waiter[T]) {
	at := w.share
	for s := at; s.parent != nil; s = s.parent {
		s.start += w.Cost / s.weight // its finish, if the waiter is the first
		s.parent.clock = max(s.parent.clock, s.start)
	}
	for s := at.parent; s != nil; s = s.parent {
		s.rebase()
	}
	w.served = true
	q.Remove(w)
}

// Charge charges the shares of a claim that have waiting flows as if they had been served that much more: one of their flows
// has cost more than it counted for. The workload and its fairness value are charged apart. A share that does not wait has no state, and is
// not charged.
func (q *Queue[T]) Charge(c Claim, workload, fairness float64) {
	at := q.shares[c.ofWorkload()]
	if at == nil {
		return
	}
	at.start += workload / at.weight
	if own := q.shares[c]; own != nil {
		own.start += fairness / own.weight
		at = own
	}
	q.version++
	q.settle(at)
}

// Remove removes a waiter, and returns its room. Nothing is charged for it.
func (q *Queue[T]) Remove(w *Waiter[T]) {
	if w.Placed {
		q.room.Return()
	}
	s := w.share
	if w.prev == nil {
		s.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		s.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.prev, w.next, w.share = nil, nil, nil
	for at := s; at.parent != nil; at = at.parent {
		at.backlog -= w.Cost
		at.grow(-1)
	}
	q.changed(-1, w)
	q.settle(s)
}

// Evict removes a waiter, whose room goes to another flow.
func (q *Queue[T]) Evict(w *Waiter[T]) {
	w.Placed, w.evicted = false, true
	q.Remove(w)
}

// Evictable returns the waiter that gives up its room for one of the claim when there is none: the newest of the largest
// share of the largest workload. It is nil where the share of the claim would be the largest itself, or as large.
func (q *Queue[T]) Evictable(c Claim) *Waiter[T] {
	if len(q.root.crowd) == 0 {
		return nil
	}
	size := func(c Claim) int {
		if s := q.shares[c]; s != nil {
			return s.size
		}
		return 0
	}
	if size(c.ofWorkload())+1 < q.root.crowd[0].size {
		return q.Newest()
	}
	own := q.shares[c.ofWorkload()]
	if own == nil || own.crowd[0].size <= size(c)+1 {
		return nil
	}
	return own.crowd[0].last
}

// Newest returns the newest waiter of the largest share of the largest workload; there must be one.
func (q *Queue[T]) Newest() *Waiter[T] { return q.root.crowd[0].crowd[0].last }

// Reprice sets the cost of every waiter to what the function returns. What was charged before stays.
func (q *Queue[T]) Reprice(cost func(*Waiter[T]) float64) {
	q.version++
	all := append(slices.Collect(maps.Values(q.shares)), &q.root)
	for _, s := range all {
		s.backlog, s.smallest, s.largest = 0, math.Inf(1), 0
	}
	for _, s := range all {
		for w := s.first; w != nil; w = w.next {
			w.Cost = cost(w)
			for at := s; at != nil; at = at.parent {
				at.backlog += w.Cost
				at.smallest, at.largest = min(at.smallest, w.Cost), max(at.largest, w.Cost)
			}
		}
	}
	q.root.backlog = 0 // the root's is not used
	for _, below := range []bool{true, false} {
		for _, s := range all {
			if s.parent == nil || s.claim.whole == below {
				continue
			}
			heap.Init(&s.below)
			s.finish = s.start + s.head().Cost/s.weight
		}
	}
	heap.Init(&q.root.below)
}

// changed notes that the waiter has come, or has gone.
func (q *Queue[T]) changed(by int, w *Waiter[T]) {
	q.length += by
	q.room.show(&q.inRoom, q.length)
	q.version++
	if w.Deadline < NoDeadline {
		q.deadlines += by
	}
}

// settle puts a share whose waiters have changed, and those above it, into their places.
func (q *Queue[T]) settle(s *share[T]) {
	for ; s.parent != nil; s = s.parent {
		first := s.head()
		if first == nil {
			heap.Remove(&s.parent.below, s.index)
			delete(q.shares, s.claim)
			continue
		}
		s.finish = s.start + first.Cost/s.weight
		if s.index < 0 {
			heap.Push(&s.parent.below, s)
		} else {
			heap.Fix(&s.parent.below, s.index)
		}
	}
	if q.length == 0 {
		q.root.clock = 0
		if q.count > 1000 { // do not keep the memory of so many for a few
			q.root.below, q.root.crowd, q.shares = nil, nil, make(map[Claim]*share[T])
		}
		q.count = 0
	}
}

// share finds the share of the claim, or begins it.
func (q *Queue[T]) share(c Claim, parent *share[T], weight float64) *share[T] {
	s := q.shares[c]
	if s == nil {
		s = &share[T]{claim: c, parent: parent, weight: weight, start: parent.clock, index: -1, place: -1}
		q.shares[c] = s
	}
	return s
}

func (c Claim) ofWorkload() Claim {
	return Claim{Workload: c.Workload, Priority: c.Priority, whole: true}
}
