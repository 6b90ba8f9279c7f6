package agent

import "sync"

// few is how many checks need no more than the margin. The first few of a burst learn by a channel that more have come.
const few = 3

// A crowd counts the checks that are under way. The zero value is ready. It is safe for concurrent use.
type crowd struct {
	mu      sync.Mutex
	size    int
	crowded chan struct{} // closed when the crowd grows beyond few; nil while no check has it
}

// enter adds a check. It returns how many are under way, and a channel that is closed when they are more than few; nil
// if they already are.
func (c *crowd) enter() (size int, crowded <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size++
	if c.size > few {
		if c.crowded != nil {
			close(c.crowded)
			c.crowded = nil
		}
		return c.size, nil
	}
	if c.crowded == nil {
		c.crowded = make(chan struct{})
	}
	return c.size, c.crowded
}

// leave removes a check.
func (c *crowd) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size--
}

// none reports whether no check is under way.
func (c *crowd) none() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size == 0
}
