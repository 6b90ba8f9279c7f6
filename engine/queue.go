package engine

import (
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A queue is the flows that wait for one key, and what the scheduler keeps with them. The lock of the key's entry
// guards it.
type queue struct {
	*wfq.Queue[pending]
	alarm alarm
	rests uint64 // its number in scheduler.rested; 0 while a flow waits

	changes   uint64 // how often the source's state changed, other than by serving
	forecasts map[forecastKey]outlook
	madeAt    uint64 // the version that the forecasts are of
}

// A pending flow is one that waits.
type pending struct {
	demand
	session [16]byte
	slot    uint64        // that it got when it was served
	left    float64       // tokens left when it was served
	ready   chan struct{} // closed when it has been served, evicted or dismissed

	dismissed bool // it is out of the queue, to be decided about anew
	once      bool // it does not wait: the store decides about it at once
	local     bool // this process has decided, because the store did not answer

	// What was decided about a flow that is out of the queue and was not served.
	decided bool
	cause   agentapi.Cause
	wait    int64
}

type waiter = wfq.Waiter[pending]

// version grows with every change that may affect which flow is served when.
func (q *queue) version() uint64 { return q.Version() + q.changes }

// evict removes a waiter, whose room goes to another flow.
func (q *queue) evict(w *waiter) {
	q.Evict(w)
	close(w.Flow.ready)
}

// dismiss sends a waiter away, to be decided about anew.
func (q *queue) dismiss(w *waiter) {
	q.Remove(w)
	w.Flow.dismissed = true
	if w.Flow.ready != nil {
		close(w.Flow.ready)
	}
}

// decide has a waiter be dropped.
func (q *queue) decide(w *waiter, cause agentapi.Cause, wait int64) {
	q.Remove(w)
	w.Flow.decided, w.Flow.cause, w.Flow.wait = true, cause, wait
	close(w.Flow.ready)
}

// evictable returns the newest flow of the largest share, which makes room for one of the claim; nil where none does.
func (q *queue) evictable(c wfq.Claim) *waiter {
	if q == nil {
		return nil
	}
	return q.Evictable(c)
}

// fillServed notes in the decision what a served waiter was given.
func fillServed(d *agentapi.LimiterDecision, w *waiter) {
	fill(d, source.Taken{Slot: w.Flow.slot, Left: w.Flow.left})
	d.Consumed, d.Local = w.Flow.tokens, w.Flow.local
}

// An alarm rings when the first waiter of a queue is due although nothing was given back.
type alarm struct {
	due   int64 // when that is; 0 when not known
	rings int64 // when the timer fires; 0 when it does not
	timer *time.Timer
	ring  func()
}

// set has the timer fire when the first waiter is due. The time now is that of the clock, not of the last decision.
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
