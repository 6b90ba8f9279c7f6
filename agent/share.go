package agent

import (
	"container/heap"
	"time"
)

// A queue is calls in the order in which they came. A call can leave from any place.
type queue struct {
	first, last *place
	size        int
}

// A place is a call's in a queue.
type place struct {
	call           *call
	before, behind *place
	queue          *queue // nil for none
}

func (q *queue) push(p *place) {
	p.queue, p.before = q, q.last
	if q.last == nil {
		q.first = p
	} else {
		q.last.behind = p
	}
	q.last = p
	q.size++
}

// leave takes the call out of its queue, if it is in one.
func (p *place) leave() {
	q := p.queue
	if q == nil {
		return
	}
	if p.before == nil {
		q.first = p.behind
	} else {
		p.before.behind = p.behind
	}
	if p.behind == nil {
		q.last = p.before
	} else {
		p.behind.before = p.before
	}
	q.size--
	p.before, p.behind, p.queue = nil, nil, nil
}

// shares are calls by connection. They know which connection has the most, at a cost that hardly depends on how many
// calls and connections there are.
type shares struct {
	by    map[any]*share
	order byMost
	size  int
	spare *share // the last that ended, for the next
}

// A share is the calls of one connection.
type share struct {
	connection any
	size       int
	calls      queue
	index      int

	lost    int // of the calls
	refused int // calls, from since
	since   time.Time
}

// of returns what the connection has.
func (s *shares) of(connection any) int {
	if own := s.by[connection]; own != nil {
		return own.size
	}
	return 0
}

func (s *shares) add(p *place, size int) {
	connection := p.call.connection
	own := s.by[connection]
	if own == nil {
		if own, s.spare = s.spare, nil; own == nil {
			own = new(share)
		}
		own.connection = connection
		if s.by == nil {
			s.by = make(map[any]*share)
		}
		s.by[connection] = own
		heap.Push(&s.order, own)
	}
	own.calls.push(p)
	own.size += size
	s.size += size
	heap.Fix(&s.order, own.index)
}

// remove removes the call if it is one of these. The size is as it was added.
func (s *shares) remove(p *place, size int) {
	own := s.by[p.call.connection]
	if own == nil || p.queue != &own.calls {
		return
	}
	p.leave()
	own.size -= size
	s.size -= size
	if own.calls.size > 0 {
		heap.Fix(&s.order, own.index)
		return
	}
	heap.Remove(&s.order, own.index)
	delete(s.by, own.connection)
	*own = share{}
	s.spare = own
}

// most returns the share of the connection with the most; nil if there are no calls.
func (s *shares) most() *share {
	if len(s.order) == 0 {
		return nil
	}
	return s.order[0]
}

// byMost is a heap. The connection with the most is the first, and of several that with the oldest call.
type byMost []*share

func (h byMost) Len() int { return len(h) }

func (h byMost) Less(i, j int) bool {
	if h[i].size != h[j].size || h[i].calls.first == nil || h[j].calls.first == nil {
		return h[i].size > h[j].size
	}
	return h[i].calls.first.call.begin.Before(h[j].calls.first.call.begin)
}

func (h byMost) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *byMost) Push(one any) {
	own, _ := one.(*share)
	own.index = len(*h)
	*h = append(*h, own)
}

func (h *byMost) Pop() any {
	last := len(*h) - 1
	own := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return own
}
