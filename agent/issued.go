package agent

import (
	"sync"
	"time"
)

// maxIssued is how many answers an agent remembers until their flows are reported. It forgets the oldest first.
const maxIssued = 1 << 17

// issued holds the answers to checks whose flows may be measured, by the times of the checks. A peer can forge spans.
// So an answer counts for one span, and for a latency no longer than the time since the answer. Then a forged span says
// no more than a flow of the peer's own could.
type issued struct {
	mu    sync.Mutex
	times map[int64]struct{} // in Unix nanoseconds; see starts
	order []int64            // a ring, once it is full
	next  int
}

func (i *issued) add(start time.Time) {
	at := start.UnixNano()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.times == nil {
		i.times = make(map[int64]struct{})
	}
	if len(i.order) < maxIssued {
		i.order = append(i.order, at)
	} else {
		delete(i.times, i.order[i.next])
		i.order[i.next] = at
		i.next = (i.next + 1) % maxIssued
	}
	i.times[at] = struct{}{}
}

// take reports whether an answer to a check of that time is remembered, and forgets it.
func (i *issued) take(start time.Time) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	at := start.UnixNano()
	_, ok := i.times[at]
	delete(i.times, at)
	return ok
}
