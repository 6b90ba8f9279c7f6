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
	s, err := newScheduler(e, c, p.MaxIdle, &p.Scheduler, &slots.Rule{Limit: p.Max, MaxInflight: min(int64(p.MaxInflight), source.Century), Leases: &e.leases})
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
