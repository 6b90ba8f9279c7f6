package engine

import "sync"

// A crowd knows how many flows wait in each queue of a scheduler that has a queue for each key. It finds the longest one
// when there is no room. All that it does takes constant time. Its lock is taken while that of a queue's entry is held, and
// no lock is taken under it.
type crowd struct {
	mu    sync.Mutex
	ofLen []*queue // the queues of each length, a list; the last is not nil
}

// show notes how many wait in the queue now, which differs by one from before. A nil crowd notes nothing.
func (c *crowd) show(q *queue) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if q.shown > 0 {
		if q.before == nil {
			c.ofLen[q.shown] = q.after
		} else {
			q.before.after = q.after
		}
		if q.after != nil {
			q.after.before = q.before
		}
	}
	q.shown, q.before, q.after = q.len, nil, nil
	if q.len > 0 {
		for len(c.ofLen) <= q.len {
			c.ofLen = append(c.ofLen, nil)
		}
		if q.after = c.ofLen[q.len]; q.after != nil {
			q.after.before = q
		}
		c.ofLen[q.len] = q
	}
	for n := len(c.ofLen); n > 0 && c.ofLen[n-1] == nil; n-- {
		c.ofLen = c.ofLen[:n-1]
	}
}

// longest returns a queue in which more flows wait than that; nil when there is none. Of equals it is the one that has come
// to that length last.
func (c *crowd) longest(than int) *queue {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.ofLen) - 1; n > than {
		return c.ofLen[n]
	}
	return nil
}
