package engine

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// Slots of the store that flows in this process hold are kept by the lease of the store's instance. When the lease has run out, the store
// may give them to others. The instance counts on the lease for two thirds of it. So flows know before that.
var _ agentapi.Leaser = (*agent)(nil)

// Leases reports whether there is a store.
func (a *agent) Leases() bool { return a.store != nil }

// Leased counts the slots that the store has given the flow.
func (a *agent) Leased(v *agentapi.Verdict) (slots int) {
	for i := range v.Len() {
		if byLease(v.At(i)) {
			slots++
		}
	}
	return slots
}

// byLease reports whether the store has given a flow a slot for a decision.
func byLease(d *agentapi.LimiterDecision) bool {
	if !d.Component.Slots || d.Slot() == 0 || d.Local || d.Untaken || d.DryRun {
		return false
	}
	_, ok := d.Component.Settler.(returner)
	return ok
}

// Watch does what agentapi.Leaser says.
func (a *agent) Watch(v *agentapi.Verdict, over func(lost bool)) {
	e := a.engine()
	began := e.epoch.Add(time.Duration(v.Start - e.epoch.UnixNano()))
	e.tellLost(e.store.watched.join(e.store.Kept, v, over, began, e.judgeLease))
}

// limited counts the slots that the store has given the flow for components that are in force, and not in dry run.
func (e *Engine) limited(v *agentapi.Verdict) (slots int) {
	r := e.rules.Load()
	for i := range v.Len() {
		d := v.At(i)
		if !byLease(d) {
			continue
		}
		if in := r.byName[componentName{d.Component.Policy, d.Component.ID}]; in != nil && !in.identity().DryRun {
			slots++
		}
	}
	return slots
}

// unwatch has the flow's slots not be watched any more. It returns what to call when they have been returned; nil for nothing.
func (a *agent) unwatch(v *agentapi.Verdict) (over func(lost bool)) {
	if a.store == nil || a.Leased(v) == 0 { // most flows
		return nil
	}
	return a.store.watched.leave(v)
}

// judgeLease looks at the lease while flows hold slots by it.
func (e *Engine) judgeLease() { e.tellLost(e.store.watched.look(e.store.Kept)) }

// tellLost counts slots that are lost, and tells their flows. It logs that once a minute.
func (e *Engine) tellLost(flows []lostFlow) {
	if len(flows) == 0 {
		return
	}
	slots := 0
	for _, one := range flows {
		slots += one.slots
		if one.over != nil {
			one.over(true)
		}
	}
	l := &e.store.watched
	if more, due := l.log.due(e.now(), l.lost.Add(uint64(slots))); due {
		e.logger.Warn("headgate: the store has not renewed the lease of this process in time: it may give slots of flows that run to others",
			"slots", more)
	}
}

// A watched is the flows in this process that hold slots of the store.
type watched struct {
	limited func(v *agentapi.Verdict) int // counts the slots of a flow that are lost with the lease

	lost atomic.Uint64 // slots
	log  minutely      // about them

	mu     sync.Mutex
	flows  map[*agentapi.Verdict]func(lost bool)
	kept   time.Time   // until when the lease was counted on when it was last looked at; zero if that is not known
	gap    time.Time   // when it was last found to have run out
	timer  *time.Timer // looks at the lease while there are flows; nil before the first
	closed bool
}

// A lostFlow is a flow that has lost slots. Over may be nil.
type lostFlow struct {
	slots int
	over  func(lost bool)
}

// The lease is looked at so often: at a quarter of what is left of it, and when it runs out.
const (
	looksAtMost  = time.Second
	looksAtLeast = 10 * time.Millisecond
)

// join adds a flow whose check began then. It returns the flows whose slots are lost. Look is called later to find others.
func (l *watched) join(kept func() time.Time, v *agentapi.Verdict, over func(lost bool), began time.Time, look func()) (lost []lostFlow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	known := len(l.flows) > 0 && now.Before(l.kept)
	if !known {
		lost = l.judge(now, kept())
	}
	if began.Before(l.gap) || passed(l.kept, now) { // the process may have stood still during the check
		if slots := l.limited(v); slots > 0 {
			return append(lost, lostFlow{slots, over})
		}
	}
	if l.flows == nil {
		l.flows = make(map[*agentapi.Verdict]func(lost bool))
	}
	l.flows[v] = over
	if l.timer == nil {
		l.timer = time.AfterFunc(looksAtMost, look)
	}
	if !known || len(l.flows) == 1 {
		l.arm(now)
	}
	return lost
}

// leave removes a flow, and returns what is to be called.
func (l *watched) leave(v *agentapi.Verdict) (over func(lost bool)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	over, ok := l.flows[v]
	if !ok {
		return nil
	}
	delete(l.flows, v)
	if len(l.flows) == 0 {
		l.arm(time.Time{})
	}
	return over
}

// look looks at the lease, and returns the flows whose slots are lost.
func (l *watched) look(kept func() time.Time) (lost []lostFlow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.flows) == 0 || l.closed {
		return nil
	}
	now := time.Now()
	lost = l.judge(now, kept())
	l.arm(now)
	return lost
}

// judge returns the flows whose slots are lost, now that the lease is counted on until then, as far as is known. A lease that was not looked at
// before it would have run out counts as run out, even if it lasts now: the process may have stood still, and the slots may have gone to
// others meanwhile. Flows that no slot limits any more, as in a dry run, lose none.
func (l *watched) judge(now, kept time.Time) (lost []lostFlow) {
	ranOut := len(l.flows) > 0 && l.gap.Before(l.kept) && passed(l.kept, now) || passed(kept, now)
	l.kept = kept
	if !ranOut {
		return nil
	}
	l.gap = now
	for v, over := range l.flows {
		if slots := l.limited(v); slots > 0 {
			lost = append(lost, lostFlow{slots, over})
			delete(l.flows, v)
		}
	}
	return lost
}

// passed reports whether a time that is known has passed.
func passed(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// arm sets the timer. The caller holds the mutex.
func (l *watched) arm(now time.Time) {
	switch {
	case l.timer == nil:
	case len(l.flows) == 0 || l.closed:
		l.timer.Stop()
	case l.kept.IsZero(), passed(l.kept, now): // there are flows left that no slot limits
		l.timer.Reset(looksAtMost)
	default:
		left := l.kept.Sub(now)
		l.timer.Reset(min(left, max(left/4, looksAtLeast), looksAtMost))
	}
}

// close has slots not be judged any more.
func (l *watched) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.arm(time.Time{})
}
