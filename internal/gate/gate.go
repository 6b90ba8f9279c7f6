// Package gate keeps calls from waiting for a server that is gone or frozen.
package gate

import (
	"sync"
	"sync/atomic"
	"time"
)

// A Gate opens when a server is silent. While it is open, callers fail at once instead of waiting. It is safe for concurrent use.
//
// Any answer closes it, an error too: a server that answers is not gone. The owner of the gate asks the server once in a while,
// apart from its callers, and says when it has answered.
type Gate struct {
	failures int64
	span     time.Duration

	open  atomic.Bool
	count atomic.Int64 // failures in a row; written under mu

	mu    sync.Mutex
	first time.Time // since when the server was silent at the first of them
}

// New returns a closed gate, which opens after so many failures in a row, if the server was silent for the span.
func New(failures int, span time.Duration) *Gate {
	return &Gate{failures: int64(failures), span: span}
}

// Open reports whether callers fail at once.
func (g *Gate) Open() bool { return g.open.Load() }

// Answered notes that something came from the server. It reports whether that closed the gate.
func (g *Gate) Answered() bool {
	if g.count.Load() == 0 { // and so it is closed
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.count.Store(0)
	return g.open.Swap(false)
}

// Failed counts a call that got no answer, and during which the server was silent. It reports whether that opened the gate.
func (g *Gate) Failed(since, now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.count.Load() == 0 {
		g.first = since
	}
	if g.count.Add(1) < g.failures || now.Sub(g.first) < g.span {
		return false
	}
	return !g.open.Swap(true)
}
