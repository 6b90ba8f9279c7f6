package engine

import (
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A queue is the flows that wait for one key, and what its scheduler keeps beside them. The lock of the key's entry guards
// it.
type queue struct {
	*wfq.Queue[pending]
	alarm alarm
	rests uint64 // the number by which the scheduler has noted that no flow waits; 0 while one does

	changes   uint64 // of what the source has, other than by serving
	forecasts map[forecastKey]outlook
	madeAt    uint64 // the version that the forecasts are of
}

// A pending flow is one that waits.
type pending struct {
	demand
	slot  uint64        // of one that has been served,
	left  float64       // and what was left then
	ready chan struct{} // closed when it has been served, or evicted
}

type waiter = wfq.Waiter[pending]

// version grows with all that decides when which flow is served.
func (q *queue) version() uint64 { return q.Version() + q.changes }

// evict has a waiter leave, whose room goes to another flow.
func (q *queue) evict(w *waiter) {
	q.Evict(w)
	close(w.Flow.ready)
}

// makeRoom has the newest flow of the largest share leave for one of the claim, and reports whether any has.
func (q *queue) makeRoom(c wfq.Claim) bool {
	if q == nil {
		return false
	}
	w := q.Evictable(c)
	if w == nil {
		return false
	}
	q.evict(w)
	return true
}

// fillServed tells the decision what a waiter that has been served was given.
func fillServed(d *agentapi.LimiterDecision, w *waiter) {
	fill(d, source.Taken{Slot: w.Flow.slot, Left: w.Flow.left})
	d.Consumed = w.Flow.tokens
}

// An alarm rings when the first waiter of a queue is due though nobody gives anything back.
type alarm struct {
	due   int64 // when that is; 0 when not known
	rings int64 // when the timer fires; 0 when it does not
	timer *time.Timer
	ring  func()
}

// set has the timer fire when the first waiter is due. The time now is that of the clock, not of what was decided last.
func (a *alarm) set(now func() int64) {
	switch {
	case a.due == a.rings:
		return
	case a.due == 0:
		a.timer.Stop()
	case a.timer == nil:
		a.timer = time.AfterFunc(time.Duration(a.due-now()), a.ring)
	default:
		a.timer.Reset(time.Duration(a.due - now()))
	}
	a.rings = a.due
}
