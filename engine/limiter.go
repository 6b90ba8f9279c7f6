package engine

import (
	"context"
	"math"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A limiter admits a flow at once or not at all.
type limiter[S any] struct {
	keyed[S]
	source      source.Source[S]
	settler     source.Settler[S] // the source; nil where it is none
	binder      binder[S]         // the source, if it is one
	tokensLabel string
	beyond      atomic.Uint64 // flows that entries admitted beyond what their counts hold
}

func newLimiter[S any](e *Engine, c agentapi.Component, maxIdle time.Duration, s source.Source[S]) *limiter[S] {
	l := &limiter[S]{keyed: newKeyed(e, c, maxIdle, s.Fresh, s.Idle), source: s}
	l.settler, _ = s.(source.Settler[S])
	l.binder, _ = s.(binder[S])
	l.component.Settler = l
	return l
}

// costsBy sets the label that says how many tokens a flow takes.
func (l *limiter[S]) costsBy(label string) {
	l.tokensLabel = label
	l.settles(label, l.settler != nil)
}

// ask decides at once: no flow waits for a limiter.
func (l *limiter[S]) ask(_ context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (int64, error) {
	now := a.now
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel, 1)
	if !l.scope(&req.Labels, d) {
		l.counts.decision(d)
		return now, nil
	}
	e := l.lock(d, now)
	got := l.source.Take(&e.State, now, d.Consumed)
	if got.OK {
		if l.binder != nil {
			bind(l.binder, &e.State, got.Slot, req.Session())
		}
		l.admit(e)
		e.Unlock()
		fill(d, got)
		return now, nil
	}
	_, likely := l.source.Forecast(&e.State, now, source.Ahead{}, d.Consumed)
	e.Unlock()
	l.rejected(e, d, now)
	d.Remaining = got.Left
	l.drop(d, agentapi.CauseNone, likely)
	l.counts.decision(d)
	return now, nil
}

// admit counts a flow in its entry, which is locked and at hand: a counter that all keys share would cost more than the
// rest of a decision.
func (l *limiter[S]) admit(e *keys.Entry[S]) {
	if e.Count++; e.Count == math.MaxUint32 {
		l.beyond.Add(uint64(e.Count))
		e.Count = 0
	}
}

// admitted returns how many flows the entries have admitted.
func (l *limiter[S]) admitted() uint64 {
	for {
		beyond, n := l.beyond.Load(), uint64(0)
		if l.table == nil {
			n = l.single.Counted()
		} else {
			n = l.table.Counted()
		}
		if beyond == l.beyond.Load() {
			return beyond + n
		}
	}
}

func (l *limiter[S]) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel, 1)
	if l.scope(&req.Labels, d) {
		l.drop(d, cause, 0)
	}
	l.counts.decision(d)
}

// Settle gives back what was not used, and slots, and corrects what the flow took by what it cost.
func (l *limiter[S]) Settle(_ context.Context, d *agentapi.LimiterDecision, o agentapi.Outcome) bool {
	unused := o.Ended == agentapi.EndedUnused
	if o.Costs != nil {
		l.correct(d, o)
	}
	return (unused || l.component.Slots && d.Slot() != 0) && l.giveBack(l.engine.now(), d, unused)
}

// giveBack returns to the entry what the decision gave the flow. It reports whether there was anything to return.
func (l *limiter[S]) giveBack(now int64, d *agentapi.LimiterDecision, unused bool) bool {
	return l.returned(d, unused, func(e *keys.Entry[S]) bool {
		return l.source.GiveBack(&e.State, now, d.Consumed, d.Slot(), unused)
	})
}

// fill notes in the decision what the flow was given.
func fill(d *agentapi.LimiterDecision, got source.Taken) {
	d.Hold(got.Slot)
	d.Remaining = got.Left
}
