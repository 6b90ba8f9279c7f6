package engine

import (
	"container/heap"
	"maps"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A queue holds the flows that wait for the tokens of one key, and says which of them goes first: self-clocked fair
// queueing (Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994), at two levels
// (as in Bennett and Zhang, "Hierarchical packet fair queueing algorithms", SIGCOMM 1996). Workloads share the tokens in
// proportion to their priorities; within a workload the values of the fairness label share alike; within one value,
// first come is first served.
//
// Each level has a clock of its own, which shows the finish of whom it served last. A share that begins to wait starts
// at the clock, and finishes when it has had what its first waiter wants, at the speed of its weight; the smallest
// finish is served first. So a share that is idle saves nothing up, and needs not be remembered: when its last waiter
// leaves, its finish lies behind the clock.
type queue struct {
	root        queueShare
	queueShares map[claim]*queueShare
	len         int
	room        *atomic.Int64 // for more waiters, here and in the scheduler's other queues
	count       uint64        // of all that have waited since nobody did, for the order of equals

	due   int64       // when the first waiter may be served though nobody gives anything back; 0 when not known
	alarm *time.Timer // rings then
	rings int64       // when the alarm does; 0 when it does not
	ring  func()      // what it does then

	crowd         *crowd               // of the queues that share the room; nil for the only one
	shown         int                  // len, as the crowd knows it,
	before, after *queue               // and its neighbours of the same length there; guarded by the crowd
	turnOut       func(least int) bool // has the newest flow of the largest share leave its room, if more than least wait

	mortal     int    // the waiters that give up at a time which is known
	version    uint64 // of all that decides when which flow is served
	outlooks   map[outlookKey]outlook
	outlooksOf uint64 // the version that they are of
}

// A claim says for whom a flow waits. Flows of one workload with two priorities are two workloads.
type claim struct {
	workload string
	priority float64
	fairness string
	whole    bool // the workload's, of all fairness values
}

// A queueShare is those who wait with the same claim. It exists as long as there are any.
type queueShare struct {
	claim  claim
	parent *queueShare // nil for the root
	weight float64

	start   float64 // what it has been served up to, by the parent's clock
	finish  float64 // start, and what its first waiter wants
	backlog float64 // what all its waiters want
	index   int     // in the parent's heap

	smallest, largest float64 // costs of those who have waited since nobody did

	clock float64
	below queueShareHeap // the shares of a workload, and the workloads of the root

	first, last *waiter // of a share that has none below

	size  int       // how many wait
	place int       // in the parent's crowd
	crowd crowdHeap // the same shares as below, by size
}

// A waiter is a flow that waits. All but its ready channel is guarded by the lock of the queue's entry.
type waiter struct {
	tokens     float64       // that it is to have,
	cost       float64       // and what they count for here
	price      *latencyCost  // of the tokens, where it changes; nil where it does not
	ready      chan struct{} // closed when the waiter has been served
	served     bool
	placed     bool    // it takes room
	evicted    bool    // another flow has its place
	until      int64   // when it gives up; immortal where it does not
	slot       uint64  // of one that has been served,
	left       float64 // and what was left then
	number     uint64
	queueShare *queueShare
	prev, next *waiter
}

// fill fills the decision about a waiter that has been served.
func (w *waiter) fill(d *agentapi.LimiterDecision) {
	fill(d, source.Taken{Slot: w.slot, Left: w.left})
	d.Consumed = w.tokens
}

func newQueue(room *atomic.Int64, ring func()) *queue {
	return &queue{queueShares: make(map[claim]*queueShare), room: room, ring: ring}
}

// setAlarm has the alarm ring when the first waiter is due. The time now is that of the clock, not of what was decided
// last.
func (q *queue) setAlarm(now func() int64) {
	switch {
	case q.due == q.rings:
		return
	case q.due == 0:
		q.alarm.Stop()
	case q.alarm == nil:
		q.alarm = time.AfterFunc(time.Duration(q.due-now()), q.ring)
	default:
		q.alarm.Reset(time.Duration(q.due - now()))
	}
	q.rings = q.due
}

// reprice counts those who wait for what they cost now.
func (q *queue) reprice(cost func(tokens float64) float64) {
	q.version++
	all := append(slices.Collect(maps.Values(q.queueShares)), &q.root)
	for _, s := range all {
		s.backlog, s.smallest, s.largest = 0, math.Inf(1), 0
	}
	for _, s := range all {
		for w := s.first; w != nil; w = w.next {
			if w.price != nil {
				w.tokens = w.price.tokens()
				w.cost = cost(w.tokens)
			}
			for at := s; at != nil; at = at.parent {
				at.backlog += w.cost
				at.smallest, at.largest = min(at.smallest, w.cost), max(at.largest, w.cost)
			}
		}
	}
	q.root.backlog = 0 // nobody asks for it
	for _, below := range []bool{true, false} {
		for _, s := range all {
			if s.parent == nil || s.claim.whole == below {
				continue
			}
			heap.Init(&s.below)
			s.finish = s.start + s.head().cost/s.weight
		}
	}
	heap.Init(&q.root.below)
}

// first is who is served next; nil when nobody waits.
func (q *queue) first() *waiter { return q.root.head() }

// push adds the waiter, for whom room has been taken.
func (q *queue) push(w *waiter, c claim) {
	if q.len == 0 {
		q.root.smallest, q.root.largest = w.cost, w.cost
	}
	q.root.smallest, q.root.largest = min(q.root.smallest, w.cost), max(q.root.largest, w.cost)
	q.count++
	q.len++
	q.crowd.show(q)
	q.version++
	if w.until < immortal {
		q.mortal++
	}
	w.number = q.count
	workload := q.queueShare(c.ofWorkload(), &q.root, c.priority)
	s := q.queueShare(c, workload, 1)
	if s.last == nil {
		s.first = w
	} else {
		s.last.next, w.prev = w, s.last
	}
	s.last, w.queueShare = w, s
	for ; s.parent != nil; s = s.parent {
		s.grow(1)
		if s.backlog == 0 {
			s.smallest, s.largest = w.cost, w.cost
		}
		s.backlog += w.cost
		s.smallest, s.largest = min(s.smallest, w.cost), max(s.largest, w.cost)
	}
	q.settle(w.queueShare)
}

// pop takes the first waiter out, which has been served: its shares are charged.
func (q *queue) pop() {
	w := q.first()
	at := w.queueShare
	for s := at; s.parent != nil; s = s.parent {
		s.start = s.finish
		s.parent.clock = max(s.parent.clock, s.finish)
	}
	q.remove(w)
	for s := at.parent; s != nil; s = s.parent {
		s.rebase()
	}
}

// lateClock is when a clock is set back: a float that shows more does not move by what flows of a high priority cost.
const lateClock = 1e9

// rebase sets a clock back that shows too much, and all that go by it.
func (s *queueShare) rebase() {
	if s.clock < lateClock {
		return
	}
	for _, o := range s.below {
		o.start -= s.clock
		o.finish -= s.clock
	}
	s.clock = 0
	heap.Init(&s.below) // for some who were apart may be equal now
}

// remove takes a waiter out, which nothing is charged for. Every waiter leaves by it, and leaves room.
func (q *queue) remove(w *waiter) {
	if w.placed {
		q.room.Add(1)
	}
	s := w.queueShare
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
	w.prev, w.next, w.queueShare = nil, nil, nil
	for at := s; at.parent != nil; at = at.parent {
		at.backlog -= w.cost
		at.grow(-1)
	}
	q.len--
	q.crowd.show(q)
	q.version++
	if w.until < immortal {
		q.mortal--
	}
	q.settle(s)
}

// settle puts a share whose waiters have changed, and those above it, into their places.
func (q *queue) settle(s *queueShare) {
	for ; s.parent != nil; s = s.parent {
		first := s.head()
		if first == nil {
			heap.Remove(&s.parent.below, s.index)
			delete(q.queueShares, s.claim)
			continue
		}
		s.finish = s.start + first.cost/s.weight
		if s.index < 0 {
			heap.Push(&s.parent.below, s)
		} else {
			heap.Fix(&s.parent.below, s.index)
		}
	}
	if q.len == 0 {
		q.root.clock = 0
		if q.count > 1000 { // what so many took is not kept for a few
			q.root.below, q.root.crowd, q.queueShares = nil, nil, make(map[claim]*queueShare)
		}
		q.count = 0
	}
}

// queueShare finds the share of the claim, or begins it.
func (q *queue) queueShare(c claim, parent *queueShare, weight float64) *queueShare {
	s := q.queueShares[c]
	if s == nil {
		s = &queueShare{claim: c, parent: parent, weight: weight, start: parent.clock, index: -1, place: -1}
		q.queueShares[c] = s
	}
	return s
}

func (c claim) ofWorkload() claim {
	return claim{workload: c.workload, priority: c.priority, whole: true}
}

// head is the share's first waiter; nil when there is none.
func (s *queueShare) head() *waiter {
	for len(s.below) > 0 {
		s = s.below[0]
	}
	return s.first
}

// ahead is what the flows cost that go before one of that cost which would wait from now on. It is exact where all want
// the same. Where a great many share it does not look at all of them, and says too little.
func (q *queue) ahead(c claim, cost float64) source.Ahead {
	all := source.Ahead{Least: cost, Likely: cost} // the flow itself, too
	begin := q.root.clock
	workload := q.queueShares[c.ofWorkload()]
	if workload != nil {
		own, fairBegin := q.queueShares[c], workload.clock
		if own != nil {
			fairBegin = own.start
			all = source.Ahead{Least: cost + own.backlog, Likely: cost + own.backlog}
		}
		others := workload.others(own, source.Ahead{Least: fairBegin + all.Least, Likely: fairBegin + all.Likely})
		all = source.Ahead{Least: all.Least + others.Least, Likely: all.Likely + others.Likely}
		begin = workload.start
	}
	others := q.root.others(workload, source.Ahead{Least: begin + all.Least/c.priority, Likely: begin + all.Likely/c.priority})
	all = source.Ahead{Least: all.Least + others.Least - cost, Likely: all.Likely + others.Likely - cost}
	if q.len > 0 && (q.root.smallest != cost || q.root.largest != cost) {
		all.Largest = max(cost, q.root.largest)
	}
	return all
}

// mostOthers bounds what a look at those who share may cost a flow.
const mostOthers = 128

// others is how many tokens go to the shares below, but for one, until the clock shows that.
func (s *queueShare) others(but *queueShare, clock source.Ahead) (sum source.Ahead) {
	for _, o := range s.below[:min(len(s.below), mostOthers)] {
		if o == but || o.finish > clock.Likely {
			continue
		}
		least, likely := o.served(clock.Likely)
		if clock.Least < clock.Likely { // as rarely
			if least = 0; o.finish <= clock.Least {
				least, _ = o.served(clock.Least)
			}
		}
		sum.Least += least
		sum.Likely += likely
	}
	return sum
}

// served is how many tokens go to the share until the clock shows that, which is not before its finish. What each waiter
// wants it only knows of the first: the one that comes too late may want as much as any.
func (s *queueShare) served(clock float64) (least, likely float64) {
	tokens, first := (clock-s.start)*s.weight, s.head().cost
	if s.smallest == s.largest {
		tokens = first * math.Floor(tokens/first+1e-9)
		least = tokens
	} else {
		least = tokens - s.largest
	}
	return min(max(least, first), s.backlog), min(max(tokens, first), s.backlog)
}

// grow changes how many wait in the share.
func (s *queueShare) grow(by int) {
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

// evictable is the waiter that gives up its place for one of the claim when there is no room: the newest of the largest
// share of the largest workload. It is nil where the share of the claim would be the largest itself, or as large.
func (q *queue) evictable(c claim) *waiter {
	if len(q.root.crowd) == 0 {
		return nil
	}
	size := func(c claim) int {
		if s := q.queueShares[c]; s != nil {
			return s.size
		}
		return 0
	}
	if size(c.ofWorkload())+1 < q.root.crowd[0].size {
		return q.newest()
	}
	own := q.queueShares[c.ofWorkload()]
	if own == nil || own.crowd[0].size <= size(c)+1 {
		return nil
	}
	return own.crowd[0].last
}

// newest is the newest waiter of the largest share of the largest workload; there must be one.
func (q *queue) newest() *waiter { return q.root.crowd[0].crowd[0].last }

// evict has a waiter leave without its room, which goes to another flow.
func (q *queue) evict(w *waiter) {
	w.placed, w.evicted = false, true
	q.remove(w)
	close(w.ready)
}

// crowdHeap is a [heap.Interface] of shares, the largest first, and of equals the one with the newest waiter.
type crowdHeap []*queueShare

func (h crowdHeap) Len() int { return len(h) }

func (h crowdHeap) Less(i, j int) bool {
	a, b := h[i], h[j]
	if a.size != b.size || a.last == nil || b.last == nil {
		return a.size > b.size
	}
	return a.last.number > b.last.number
}

func (h crowdHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

// Push is for the heap's own use, as Pop is.
func (h *crowdHeap) Push(x any) {
	s := x.(*queueShare)
	s.place = len(*h)
	*h = append(*h, s)
}

func (h *crowdHeap) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}

// queueShareHeap is a [heap.Interface] of shares by finish, and of equals by who came first.
type queueShareHeap []*queueShare

func (h queueShareHeap) Len() int { return len(h) }

func (h queueShareHeap) Less(i, j int) bool {
	if h[i].finish != h[j].finish {
		return h[i].finish < h[j].finish
	}
	return h[i].head().number < h[j].head().number
}

func (h queueShareHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push is for the heap's own use, as Pop is.
func (h *queueShareHeap) Push(x any) {
	s := x.(*queueShare)
	s.index = len(*h)
	*h = append(*h, s)
}

func (h *queueShareHeap) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return s
}
