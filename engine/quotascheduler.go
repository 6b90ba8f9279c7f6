package engine

import (
	"cmp"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newQuotaScheduler(e *Engine, in *installed, p policy.QuotaScheduler, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.Scheduler.DeniedStatus, p.Capacity, p.DryRun
	woken := func() {}
	of := quotaNumbers(in.escalate(e, p.When, func() { woken() }))
	other := func(p policy.QuotaScheduler) *numbers[source.Source[bucket.State]] {
		p.When = atMost(p.When, p.Capacity, p.Fill)
		return of(p)
	}
	mode := bucketMode{p.LimitBy, p.StepFill, p.DelayInitialFill}
	if e.shares(p.Local) {
		s, err := newSharedScheduler(e, in, limits[drawnState[bucket.State]]{
			component: c, maxIdle: p.MaxIdle, mode: mode, overrides: p.Overrides,
			own: drawNumbers(e, p.OnOutage, of, bucketBudget)(p), with: withNumbers(in, drawNumbers(e, p.OnOutage, other, bucketBudget)),
		}, &p.Scheduler, p.OnOutage, p.PassThrough)
		if err != nil {
			return nil, err
		}
		woken = s.wake
		return s, nil
	}
	s, err := newScheduler(e, limits[bucket.State]{
		component: c, maxIdle: p.MaxIdle, mode: mode, own: of(p), overrides: p.Overrides, with: withNumbers(in, other),
	}, &p.Scheduler)
	if err != nil {
		return nil, err
	}
	s.passThrough = p.PassThrough
	woken = s.wake
	return s, nil
}

func quotaNumbers(changes *bucket.Changes) func(p policy.QuotaScheduler) *numbers[source.Source[bucket.State]] {
	of := rateNumbers(changes)
	return func(p policy.QuotaScheduler) *numbers[source.Source[bucket.State]] {
		return of(policy.RateLimiter{
			Capacity: p.Capacity, Fill: p.Fill, Interval: p.Interval, StepFill: p.StepFill, DelayInitialFill: p.DelayInitialFill,
			MaxDebt: p.MaxDebt, When: p.When,
		})
	}
}

func warnQuotaScheduler(w *warnings, of string, p policy.QuotaScheduler) {
	if p.PassThrough {
		return
	}
	w.bucket(of, p.Capacity, p.Fill, p.Interval)
	if w.shared && p.Share == policy.ShareLeased {
		w.exact = append(w.exact, of+": a quota scheduler does not lease tokens: it asks the store for the flows that wait, as with share: exact")
	}
	w.scheduler(of, &p.Scheduler, p.DryRun)
	costs := func(of string, capacity float64) {
		workloadsOf(of, &p.Scheduler, func(of string, work policy.WorkloadParameters) {
			w.cost(of, capacity, newWorkload("", work).tokens, p.Scheduler.TokensLabel)
		})
	}
	costs(of, p.Capacity)
	overridden(of, p.Overrides, func(of string, o policy.Override) {
		capacity := replaced(p.Capacity, o.Capacity)
		w.bucket(of, capacity, replaced(p.Fill, o.Fill), cmp.Or(o.Interval, p.Interval))
		costs(of, capacity)
	})
	if p.When.Load != "" {
		costs(of+": When", p.When.Capacity)
	}
}
