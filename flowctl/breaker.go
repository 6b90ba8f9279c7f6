package flowctl

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// AgentBreaker says when a remote agent counts as dead. While the agent counts as dead, flows are Unreachable at once, without
// waiting for their timeout. Only probes still ask the agent.
//
// A check counts as a failure if the agent was unavailable or did not answer in time, and if nothing at all came from the agent
// meanwhile. Anything that comes resets the count, even a rejection, an error, an answer that is too late, or a sign of life on
// the connection. An overloaded agent must not be taken for a dead one, because that would let everything in. So the breaker is
// for processes, machines and networks that are gone or frozen. While an agent's server lives, each flow takes at most its check
// timeout.
//
// A new connection counts as a sign of the agent when it has brought an answer, or has lasted for a second. Anything that a
// shorter connection brings does not count: a proxy that accepts connections and ends them is no agent.
//
// A flow with a Params.MaxWait may wait for longer than an agent may be silent. While it waits, the client asks the
// agent for signs of life. If none comes, the flow counts as a failure, whose time begins with the silence.
//
// On a connection of [WithConn], only answers that come in time are seen. So an agent whose answers are all too late
// opens the breaker there. Set Failures to a negative number if that is worse than waiting for a dead agent.
//
// Other calls do not wait for a dead agent either. While the breaker is open, ends of flows that hold slots and changes of caches
// fail at once, with [ErrUnreachable]. An agent of Headgate gets such slots back by the client's session, as soon as it can be
// reached. Any other agent takes them back by itself after their max_inflight_duration. This includes slots of flows that end
// after the agent has come back, but before the next probe. If a probe is overdue because no flow starts, these calls are made.
type AgentBreaker struct {
	// Failures is how many failures in a row open the breaker. Zero means 5; a negative number keeps the breaker closed
	// for good.
	Failures int

	// Span is the least time between the first and the last of these failures. Zero means two check timeouts of the
	// client, or 400 ms if it has none.
	Span time.Duration

	// Probe is how often one flow is let through to find out whether the agent is back. Zero means 1 s.
	Probe time.Duration
}

const (
	defaultBreakerFailures = 5
	defaultBreakerProbe    = time.Second
)

var (
	errBreakerOpen = errors.New("it did not answer lately, and is asked again once in a while")
	errEndsLater   = fmt.Errorf("%w: %w", ownError("the slots come back when the agent answers again"), errBreakerOpen)
	errNotEnded    = fmt.Errorf("%w: %w", ownError("the agent is left to take the slots back"), errBreakerOpen)
)

// A breaker is an AgentBreaker at work. The zero value lets everything through.
type breaker struct {
	AgentBreaker
	epoch time.Time // times below are nanoseconds since then

	open  atomic.Bool
	probe atomic.Int64 // when the next probe may go

	mu    sync.Mutex
	count atomic.Int64  // failures in a row; written under mu
	first int64         // when the first of them was
	seen  atomic.Uint64 // what had come from the agent by the last failure; written under mu
}

func newBreaker(settings AgentBreaker, checkTimeout time.Duration) *breaker {
	g := &breaker{AgentBreaker: settings, epoch: time.Now()}
	if g.Failures == 0 {
		g.Failures = defaultBreakerFailures
	}
	if g.Span == 0 {
		g.Span = 2 * checkTimeout
	}
	if g.Probe == 0 {
		g.Probe = defaultBreakerProbe
	}
	return g
}

// admit reports whether a check may go to the agent. While the breaker is open, only probes may.
func (g *breaker) admit(now time.Time) bool {
	if !g.open.Load() {
		return true
	}
	t, next := int64(now.Sub(g.epoch)), g.probe.Load()
	return t >= next && g.probe.CompareAndSwap(next, t+int64(g.Probe))
}

// spares reports whether a call other than a check is left out, because the agent counts as dead. If a probe is
// overdue, the call is made, because nothing is known of the agent any more. The call does not count as a probe, and
// its failure does not count against the agent.
func (g *breaker) spares(now time.Time) bool {
	return g.open.Load() && int64(now.Sub(g.epoch)) < g.probe.Load()
}

// answered notes that something came from the agent. It reports whether that closed the breaker.
func (g *breaker) answered() bool {
	if g.count.Load() == 0 { // and so it is closed
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.count.Store(0)
	return g.open.Swap(false)
}

// outdated reports whether something has come from the agent since the last failure, such as an answer that came too
// late for its check.
func (g *breaker) outdated(received uint64) bool {
	return g.count.Load() != 0 && g.seen.Load() != received
}

// failed counts a failure. The agent has been silent since then, and received is how much had come from it by now. It
// reports whether that opened the breaker.
func (g *breaker) failed(now, since time.Time, received uint64) bool {
	if g.Failures < 0 {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen.Store(received)
	t := int64(now.Sub(g.epoch))
	if g.count.Load() == 0 {
		g.first = int64(since.Sub(g.epoch))
	}
	if g.count.Add(1) < int64(g.Failures) || t-g.first < int64(g.Span) || g.open.Load() {
		return false
	}
	g.probe.Store(t + int64(g.Probe))
	g.open.Store(true)
	return true
}
