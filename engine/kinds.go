package engine

import (
	"fmt"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/components"
	"github.com/headgate-go/headgate/policy"
)

// kinds has a row for each kind of component, in the order of package policy's table. Nothing else in this package
// distinguishes kinds.
var kinds = [...]row{ //nolint:gochecknoglobals // a table, never written to
	&kindOf[policy.RateLimiter]{
		kind: kind{
			stage: stageLimit, info: agentapi.InfoRateLimiter, observe: observeLimiter,
			counter: counterName{"rate_limiter_counter_total", "Flows that met a rate limiter."},
		},
		build: newRateLimiter, warn: warnRateLimiter,
	},
	&kindOf[policy.ConcurrencyLimiter]{
		kind: kind{
			stage: stageLimit, info: agentapi.InfoConcurrencyLimiter, slots: true, observe: observeLimiter,
			counter: counterName{"concurrency_limiter_counter_total", "Flows that met a concurrency limiter."},
		},
		build: newConcurrencyLimiter,
	},
	&kindOf[policy.QuotaScheduler]{
		kind:  kind{stage: stageLoad, info: agentapi.InfoQuotaScheduler, observe: observeScheduler},
		build: newQuotaScheduler, warn: warnQuotaScheduler,
	},
	&kindOf[policy.ConcurrencyScheduler]{
		kind:  kind{stage: stageConcurrency, info: agentapi.InfoConcurrencyScheduler, slots: true, observe: observeScheduler},
		build: newConcurrencyScheduler, warn: warnConcurrencyScheduler,
	},
	&kindOf[policy.LoadScheduler]{
		kind:  kind{stage: stageLoad, info: agentapi.InfoLoadScheduler, observe: observeLoad},
		build: newLoadScheduler, warn: warnLoadScheduler,
	},
	&kindOf[policy.AIMDLoadScheduler]{
		kind:  kind{stage: stageLoad, info: agentapi.InfoLoadScheduler, observe: observeLoad},
		build: newAIMDLoadScheduler, warn: warnAIMDLoadScheduler,
	},
	&kindOf[policy.Sampler]{
		kind: kind{
			stage: stageSample, info: agentapi.InfoSampler, observe: observeSampler,
			counter: counterName{"sampler_counter_total", "Flows that met a sampler or a load ramp."},
		},
		build: newSampler,
	},
	&kindOf[policy.LoadRamp]{
		kind: kind{
			stage: stageRamp, info: agentapi.InfoSampler, observe: observeSampler,
			counter: counterName{"sampler_counter_total", "Flows that met a sampler or a load ramp."},
		},
		build: newLoadRamp,
	},
	&kindOf[policy.CalendarQuota]{
		kind: kind{
			stage: stageLimit, info: agentapi.InfoRateLimiter, observe: observeLimiter,
			counter: counterName{"calendar_quota_counter_total", "Flows that met a calendar quota."},
		},
		build: newCalendarQuota, warn: warnCalendarQuota,
	},
	&kindOf[policy.CircuitBreaker]{
		kind: kind{
			stage: stageLimit, info: agentapi.InfoRateLimiter, reason: agentapi.ReasonNoTokens, outcomes: true, observe: observeBreaker,
			counter: counterName{"circuit_breaker_counter_total", "Flows that met a circuit breaker."},
		},
		build: newCircuitBreaker, warn: warnCircuitBreaker,
	},
}

// This does not compile while a row is missing: the table would be shorter than package policy's.
var _ [policy.Kinds]row = kinds

// A kind is what the engine knows of all components of a kind.
type kind struct {
	stage    stage           // a component may have another; see installed
	info     agentapi.Info   // how the protocol reports decisions
	reason   agentapi.Reason // of its rejections; none if it is that of the stage
	slots    bool            // flows hold slots until they end
	outcomes bool            // it decides by how flows end
	observe  func(*observation)
	counter  counterName // of the metric that counts decisions; none for schedulers, which count them by workload
}

// A kindOf is a row of the table: the kind of component that a P of package policy describes.
type kindOf[P policy.Component] struct {
	kind

	// build makes a component of a P. The identity c has the policy, hash, ID, and what the kind says, already. In the
	// installed, build notes on which flows the component acts, and where it differs from others of its kind.
	build func(e *Engine, in *installed, p P, c agentapi.Component) (component, error)

	// warn notes what an operator is unlikely to want; nil where there is nothing to look for.
	warn func(w *warnings, of string, p P)
}

// A row is a kindOf of any P.
type row interface {
	about() *kind
	install(e *Engine, c policy.Component, d components.Description, id agentapi.Component) (*installed, error)
	look(w *warnings, of string, c policy.Component)
}

func (k *kindOf[P]) about() *kind { return &k.kind }

// install builds the component.
func (k *kindOf[P]) install(e *Engine, c policy.Component, d components.Description, id agentapi.Component) (*installed, error) {
	p, ok := components.Value[P](c)
	if !ok {
		return nil, fmt.Errorf("the engine cannot run a %T", c)
	}
	in := &installed{kind: &k.kind, named: identity{id.Policy, id.Hash, d.ID}, name: d.Name, stage: k.stage, override: d.With}
	id.ID, id.Info, id.Slots, id.Outcomes, id.Reason = d.ID, k.info, k.slots, k.outcomes, k.reason
	var err error
	if in.component, err = k.build(e, in, p, id); err != nil {
		return nil, err
	}
	in.keeper, _ = in.component.(keeper)
	in.retiree, _ = in.component.(retiree)
	return in, nil
}

// look finds what to warn about in the component.
func (k *kindOf[P]) look(w *warnings, of string, c policy.Component) {
	if p, ok := components.Value[P](c); ok && k.warn != nil {
		k.warn(w, of, p)
	}
}
