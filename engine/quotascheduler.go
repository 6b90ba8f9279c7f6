package engine

import (
	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newQuotaScheduler(e *Engine, in *installed, p policy.QuotaScheduler, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.Scheduler.DeniedStatus, p.Capacity, p.DryRun
	var s *scheduler[bucket.State]
	changes := in.escalate(e, p.When, func() { s.wake() })
	s, err := newScheduler(e, c, p.MaxIdle, &p.Scheduler, escalated(&bucket.Rule{
		Capacity: p.Capacity,
		Fill:     p.Fill,
		Interval: float64(p.Interval),
		Step:     p.StepFill,
		Delay:    p.DelayInitialFill,
		MaxDebt:  p.MaxDebt,
	}, p.When, changes))
	if err != nil {
		return nil, err
	}
	s.passThrough = p.PassThrough
	return s, nil
}

func warnQuotaScheduler(w *warnings, of string, p policy.QuotaScheduler) {
	if p.PassThrough {
		return
	}
	w.bucket(of, p.Capacity, p.Fill, p.Interval)
	w.scheduler(of, &p.Scheduler, p.DryRun)
	workloadsOf(of, &p.Scheduler, func(of string, work policy.WorkloadParameters) {
		w.cost(of, p.Capacity, newWorkload("", work).tokens, p.Scheduler.TokensLabel)
	})
}
