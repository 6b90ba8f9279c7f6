package engine

import (
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newConcurrencyScheduler(e *Engine, in *installed, p policy.ConcurrencyScheduler, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.Scheduler.DeniedStatus, p.Max, p.DryRun
	own := func(p policy.ConcurrencyScheduler) *numbers[source.Source[slots.State]] {
		return slotNumbers(e)(policy.ConcurrencyLimiter{Max: p.Max, MaxInflight: p.MaxInflight})
	}
	if e.shares(p.Local) {
		of := drawNumbers(e, p.OnOutage, own, slotsBudget)
		s, err := newSharedScheduler(e, in, limits[drawnState[slots.State]]{
			component: c, maxIdle: p.MaxIdle, mode: slotsMode{p.LimitBy}, own: of(p), with: withNumbers(in, of), overrides: p.Overrides,
		}, &p.Scheduler, p.OnOutage, p.PassThrough)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	s, err := newScheduler(e, limits[slots.State]{
		component: c, maxIdle: p.MaxIdle, mode: slotsMode{p.LimitBy},
		own: own(p), with: withNumbers(in, own), overrides: p.Overrides,
	}, &p.Scheduler)
	if err != nil {
		return nil, err
	}
	s.passThrough = p.PassThrough
	return s, nil
}

func warnConcurrencyScheduler(w *warnings, of string, p policy.ConcurrencyScheduler) {
	if !p.PassThrough {
		w.scheduler(of, &p.Scheduler, p.DryRun)
	}
}
