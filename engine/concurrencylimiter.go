package engine

import (
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newConcurrencyLimiter(e *Engine, in *installed, p policy.ConcurrencyLimiter, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.DeniedStatus, p.Max, p.DryRun
	if e.shares(p.Local) {
		of := sharedNumbers(slotNumbers(e), slotsBudget)
		return newSharedLimiter(e, in, sharedLimits[slots.State]{
			component: c, maxIdle: p.MaxIdle, mode: slotsMode{p.LimitBy}, own: of(p), with: withNumbers(in, of), overrides: p.Overrides,
		}, sharing{outage: p.OnOutage, tokensLabel: p.TokensLabel, passThrough: p.PassThrough})
	}
	l, err := newLimiter(e, limits[slots.State]{
		component: c, maxIdle: p.MaxIdle, mode: slotsMode{p.LimitBy},
		own: slotNumbers(e)(p), with: withNumbers(in, slotNumbers(e)), overrides: p.Overrides,
	})
	if err != nil {
		return nil, err
	}
	l.tokensLabel, l.passThrough = p.TokensLabel, p.PassThrough
	return l, nil
}

// slotsMode is what must not change if slots are to be kept.
type slotsMode struct{ label string }

func slotNumbers(e *Engine) func(policy.ConcurrencyLimiter) *numbers[source.Source[slots.State]] {
	return func(p policy.ConcurrencyLimiter) *numbers[source.Source[slots.State]] {
		return numbersOf(p.Max, &slots.Rule{Limit: p.Max, MaxInflight: min(int64(p.MaxInflight), source.Century), Hold: &e.hold, Leases: &e.leases})
	}
}
