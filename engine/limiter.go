package engine

import (
	"context"
	"math"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A limiter admits a flow at once or not at all.
type limiter[S any] struct {
	keyed[S, source.Source[S]]
	tokensLabel string
}

// A limits is how a limiter, or a scheduler, is configured whose keys have states of type S.
type limits[S any] = config[S, source.Source[S]]

func newLimiter[S any](e *Engine, c limits[S]) (*limiter[S], error) {
	c.ruling = sourceRuling[S]()
	k, err := newKeyed(e, c)
	if err != nil {
		return nil, err
	}
	l := &limiter[S]{keyed: k}
	l.component.Settler = l
	return l, nil
}

// sourceRuling is how sources go about the states of a limiter.
func sourceRuling[S any]() ruling[S, source.Source[S]] {
	return ruling[S, source.Source[S]]{
		fresh:   func(from source.Source[S], state *S, now int64) { from.Fresh(state, now) },
		idle:    func(from source.Source[S], state *S, now int64) bool { return from.Idle(state, now) },
		inherit: inherit[S],
	}
}

// inherit has a state go by other numbers.
func inherit[S any](from source.Source[S], state *S, before source.Source[S], now int64) {
	if h, ok := from.(source.Heir[S]); ok {
		h.Inherit(state, before, now)
	}
}

// numbersOf returns those of a source.
func numbersOf[S any](capacity float64, from source.Source[S]) *numbers[source.Source[S]] {
	return &numbers[source.Source[S]]{rule: from, capacity: capacity}
}

// follow has the limiter follow one of the same label and mode.
func (l *limiter[S]) follow(other component) bool {
	before, ok := other.(*limiter[S])
	if !ok || l.mode == nil || before.mode != l.mode {
		return false
	}
	l.followed(&before.keyed)
	return true
}

func (l *limiter[S]) takeOver() { l.change(nil) }

func (l *limiter[S]) askAgain() { l.reconsider(nil) }

func (l *limiter[S]) oldest(now int64) (since int64, ok bool) {
	l.each(func(e *keys.Entry[S]) { older(l.of(e).rule, &e.State, now, &since, &ok) })
	return since, ok
}

// older sets since to when the slot was taken that the state has held the longest, if that is earlier.
func older[S any](from source.Source[S], state *S, now int64, since *int64, ok *bool) {
	h, holds := from.(interface {
		Oldest(state *S, now int64) (since int64, ok bool)
	})
	if !holds {
		return
	}
	if at, held := h.Oldest(state, now); held && (!*ok || at < *since) {
		*since, *ok = at, true
	}
}

// costsBy sets the label that says how many tokens a flow takes.
func (l *limiter[S]) costsBy(label string) {
	l.tokensLabel = label
	_, can := l.terms.Load().own.rule.(source.Settler[S])
	l.settles(label, can)
}

// ask decides at once: no flow waits for a limiter.
func (l *limiter[S]) ask(_ context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (int64, error) {
	now := a.now
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel)
	if !l.scope(&req.Labels, d) {
		l.counts.decision(d)
		return now, nil
	}
	e := l.lock(&req.Labels, d, now)
	n := l.of(e)
	d.Capacity = n.capacity
	got := n.rule.Take(&e.State, now, d.Consumed)
	if got.OK {
		if got.Slot != 0 {
			bind(n.rule, &e.State, got.Slot, req.Session())
		}
		l.admit(e)
		e.Unlock()
		fill(d, got)
		return now, nil
	}
	_, likely := n.rule.Forecast(&e.State, now, source.Ahead{}, d.Consumed)
	e.Unlock()
	l.rejected(e, d, now)
	d.Remaining = got.Left
	l.drop(d, agentapi.CauseNone, likely)
	l.heldOff(d, now)
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
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel)
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
		return l.of(e).rule.GiveBack(&e.State, now, d.Consumed, d.Slot(), unused)
	})
}

// fill notes in the decision what the flow was given.
func fill(d *agentapi.LimiterDecision, got source.Taken) {
	d.Hold(got.Slot)
	d.Remaining = got.Left
}
