package engine

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// A limiter admits a flow at once or not at all.
type limiter[S any] struct {
	keyed[S]
	source      source.Source[S]
	tokensLabel string
	beyond      atomic.Uint64 // flows that entries have admitted, and have no room to show
}

func newRateLimiter(e *Engine, p policy.RateLimiter, c agentapi.Component) component {
	l := newLimiter(e, c, p.MaxIdle, &bucket.Rule{
		Capacity: p.Capacity,
		Fill:     p.Fill,
		Interval: float64(p.Interval),
		Step:     p.StepFill,
		Delay:    p.DelayInitialFill,
	})
	l.tokensLabel, l.passThrough, l.component.DryRun = p.TokensLabel, p.PassThrough, p.DryRun
	return l
}

func newConcurrencyLimiter(e *Engine, p policy.ConcurrencyLimiter, c agentapi.Component) component {
	l := newLimiter(e, c, p.MaxIdle, &slots.Rule{Limit: p.Max, MaxInflight: min(int64(p.MaxInflight), source.Century)})
	l.tokensLabel, l.passThrough, l.component.DryRun = p.TokensLabel, p.PassThrough, p.DryRun
	return l
}

func newLimiter[S any](e *Engine, c agentapi.Component, maxIdle time.Duration, s source.Source[S]) *limiter[S] {
	l := &limiter[S]{keyed: newKeyed(e, c, maxIdle, s.Fresh, s.Idle), source: s}
	l.component.Limiter = l
	return l
}

func (l *limiter[S]) decide(req *agentapi.Request, now int64, d *agentapi.LimiterDecision) {
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel, 1)
	if !l.scope(&req.Labels, d) {
		l.counts.decision(d)
		return
	}
	e := l.lock(d, now)
	got := l.source.Take(&e.State, now, d.Consumed)
	if got.OK {
		l.admit(e)
		e.Unlock()
		fill(d, got)
		return
	}
	_, likely := l.source.Forecast(&e.State, now, source.Ahead{}, d.Consumed)
	e.Unlock()
	d.Remaining = got.Left
	l.drop(d, agentapi.CauseNone, likely)
	l.counts.decision(d)
}

// admit counts a flow at the entry, which is locked and at hand: a counter that all keys share would cost more than the
// rest.
func (l *limiter[S]) admit(e *keys.Entry[S]) {
	if e.Count++; e.Count == math.MaxUint32 {
		l.beyond.Add(uint64(e.Count))
		e.Count = 0
	}
}

// admitted is how many flows the entries have admitted.
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

func (l *limiter[S]) giveBack(now int64, d *agentapi.LimiterDecision, unused bool) bool {
	return l.returned(d, unused, func(e *keys.Entry[S]) bool {
		return l.source.GiveBack(&e.State, now, d.Consumed, d.Slot(), unused)
	})
}

// fill tells the decision what the flow was given.
func fill(d *agentapi.LimiterDecision, got source.Taken) {
	d.Hold(got.Slot)
	d.Remaining = got.Left
}
