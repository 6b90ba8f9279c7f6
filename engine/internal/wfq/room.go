package wfq

import (
	"sync"
	"sync/atomic"
)

// A Room bounds how many flows wait in one queue, or in several that share it. Of several it finds the longest when there
// is no room. All that it does takes constant time. It is safe for concurrent use: its lock is taken while those of queues
// are held, and none is taken under it.
type Room struct {
	size   atomic.Int64
	free   atomic.Int64
	shared bool

	mu    sync.Mutex
	ofLen []*member // the queues of each length, a list; the last is not nil
}

// A member is a queue in a shared room.
type member struct {
	turnOut       func(leave int) bool
	shown         int // the queue's length, as the room knows it
	before, after *member
}

// NewRoom makes room for so many flows. Shared means that several queues share it; then their lengths are compared.
func NewRoom(size int64, shared bool) *Room {
	r := &Room{shared: shared}
	r.size.Store(size)
	r.free.Store(size)
	return r
}

// Resize makes it room for so many flows. Flows that wait keep theirs. It is not called twice at once.
func (r *Room) Resize(size int64) { r.free.Add(size - r.size.Swap(size)) }

// Take takes the room of one flow, and reports whether there was any.
func (r *Room) Take() bool {
	if r.free.Add(-1) < 0 {
		r.free.Add(1)
		return false
	}
	return true
}

// Full reports whether there is no room.
func (r *Room) Full() bool { return r.free.Load() <= 0 }

// Return returns the room of one flow.
func (r *Room) Return() { r.free.Add(1) }

// Used returns how much of the room is taken.
func (r *Room) Used() int { return int(min(r.size.Load()-r.free.Load(), r.size.Load())) } // a flow that finds none takes it for a moment

// Longest returns the function turnOut of the longest queue; nil if no more flows than that wait in it. Of equals it is
// the queue that came to that length last. The caller holds no queue's lock when it calls the function.
func (r *Room) Longest(than int) (turnOut func(leave int) bool) {
	if !r.shared {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.ofLen) - 1; n > than {
		return r.ofLen[n].turnOut
	}
	return nil
}

// show notes how many flows wait in the queue now, which differs by one from before.
func (r *Room) show(m *member, length int) {
	if !r.shared {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.shown > 0 {
		if m.before == nil {
			r.ofLen[m.shown] = m.after
		} else {
			m.before.after = m.after
		}
		if m.after != nil {
			m.after.before = m.before
		}
	}
	m.shown, m.before, m.after = length, nil, nil
	if length > 0 {
		for len(r.ofLen) <= length {
			r.ofLen = append(r.ofLen, nil)
		}
		if m.after = r.ofLen[length]; m.after != nil {
			m.after.before = m
		}
		r.ofLen[length] = m
	}
	for n := len(r.ofLen); n > 0 && r.ofLen[n-1] == nil; n-- {
		r.ofLen = r.ofLen[:n-1]
	}
}
