package engine

import (
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// Stats are what an engine has decided since it was made, and what there is now. Counters count up for as long as the
// policies in force have the same component, or name the control point: see [Engine.Apply]. In JSON, an unlimited
// number is null.
type Stats struct {
	// ControlPoints are those that a policy names, in alphabetical order. The first has no name: it stands for all
	// control points that no policy names.
	ControlPoints []ControlPointStats

	// Components are those of the policies, in their order.
	Components []ComponentStats

	ResultCache, GlobalCache CacheStats

	// Reloads is what [Engine.Watch] has done.
	Reloads ReloadStats

	// Store is about the store that engines share.
	Store StoreStats
}

// ControlPointStats count what the engine was asked at a control point.
type ControlPointStats struct {
	ControlPoint string

	Accepted uint64

	// Unpicked counts those of the accepted flows that no component limited, because no selector picks them.
	Unpicked uint64

	// The flows that were rejected, by the reason.
	RateLimited, NoTokens, NotSampled, NoMatchingRamp uint64

	// Canceled counts the flows whose callers' contexts ended while they waited.
	Canceled uint64

	// CacheHits and CacheMisses count the lookups in the result cache.
	CacheHits, CacheMisses uint64
}

// ComponentStats are those of one component. They count its own decisions, not those of other components about the same
// flows.
type ComponentStats struct {
	Policy, PolicyHash, ID string

	// Kind is what policy files call such a component: rate_limiter, concurrency_limiter, quota_scheduler,
	// concurrency_scheduler, load_scheduler, aimd_load_scheduler, sampler, load_ramp, calendar_quota or circuit_breaker.
	Kind string

	// LabelKey is the label whose values the component keeps apart; "" if it has none.
	LabelKey string

	// Selectors are those of the component, in the order of its policy.
	Selectors []SelectorStats

	// DryRun means that the component drops no flow.
	DryRun bool

	// DeniedStatus is the HTTP status that the policy gives to flows that the component drops; 0 if it says none.
	DeniedStatus int

	// Accepted counts the flows that the component let pass, and Dropped those that it did not.
	Accepted, Dropped uint64

	// These count some of the accepted flows. DryRunDrops: those that the component would have dropped without its dry
	// run. Unlimited: those without the component's label, or let pass by PassThrough. Refunded: those that gave back
	// what they had got, because another component dropped them or their caller left.
	DryRunDrops, Unlimited, Refunded uint64

	// Settled counts the flows whose charge was corrected by their real cost, see Settle of flowctl's Flow. Unsettled
	// counts the flows whose charge was not corrected, because their values share the bucket beyond the cap, or because the store did
	// not answer.
	// ForgivenTokens are the tokens that flows cost and no bucket was charged with: the part beyond MaxDebt, and what
	// Unsettled flows cost beyond their charge.
	Settled, Unsettled uint64
	ForgivenTokens     float64

	// LabelTooLong counts the flows that were dropped, or would have been without a dry run, because a label's value is
	// too long to match a regular expression, or for the component to go by. They are in Dropped or DryRunDrops too.
	LabelTooLong uint64

	// Keys is how many values of its label the component distinguishes. Overflows counts the decisions by the bucket that values
	// beyond the cap share (see [WithKeyCap]). Both are 0 without a label.
	Keys      int
	Overflows uint64

	// InvalidOverrides counts the overrides of the function of [WithOverrides] that have a number which the component cannot
	// have.
	InvalidOverrides uint64

	// Shared reports whether the state is in the store that engines share; see [WithStore]. If so, Usage is what the engine
	// learned last, without the number of flows that hold slots. [Component.Peek] asks the store.
	Shared bool

	// LocalDecisions counts the flows that the engine decided about by itself, because the store did not answer. Unreturned
	// counts the decisions whose tokens or slots did not go back for that reason: the tokens remain taken, and the slots come
	// back later.
	LocalDecisions, Unreturned uint64

	// NumbersDiffer counts the answers of the store that say that another engine uses other numbers: two versions of the policy are
	// in force. A component with an [policy.Escalation] does not count them, because each engine has its own load.
	NumbersDiffer uint64

	// Usage is set for a component without a label. For a component with a label, only two fields are set. Capacity is that of
	// each value without an override. Waiting counts the flows in all queues.
	Usage Usage

	// Opened is how often a circuit breaker has opened. Open is the number of its label's values for which it is open or
	// half-open. Without a label it is 1 if it is open or half-open for all flows. An open breaker becomes half-open when a flow
	// comes.
	Opened uint64
	Open   int

	// AcceptPercentage is what a sampler or ramp accepts now.
	AcceptPercentage float64

	// LoadMultiplier is the share of its load that a load scheduler lets in; +Inf while that is everything.
	LoadMultiplier float64

	// Workloads are a scheduler's, in the order of its policy. The default workload is the last. If a label names a flow's
	// workload, the flow counts in the workload that it matches without the label.
	Workloads []WorkloadStats
}

// SelectorStats say which flows a selector picks, and whether it has picked any.
type SelectorStats struct {
	// ControlPoint is the selector's. Service is "" for all services.
	ControlPoint, Service string

	// Labels is the selector's matcher as text; see [policy.LabelMatcher]. It is "" if all labels match.
	Labels string

	// Picked reports whether the selector has picked a flow. The first of a component's selectors that matches a flow
	// picks it.
	Picked bool

	// Missed is how many flows the control point has accepted while the component is in force. It is 0 once the
	// selector has picked a flow.
	Missed uint64
}

// WorkloadStats are those of one workload of a scheduler; see [ComponentStats].
type WorkloadStats struct {
	// Name is the workload's name: "default" for the default one, and its index in the policy if it has none.
	Name string

	Accepted, Dropped, DryRunDrops, Unlimited uint64

	// These count some of the dropped flows. QueueFull counts flows that found no room, or that made room for others.
	// QueueTooLong counts flows that would have had to wait longer than they could. TimedOut counts flows that waited in the
	// queue as long as they could. Closed counts flows that waited when the engine was closed.
	QueueFull, QueueTooLong, TimedOut, Closed uint64

	// AcceptedTokens are the tokens that accepted flows asked for, and RejectedTokens those of the dropped ones.
	AcceptedTokens, RejectedTokens float64

	// Waits counts the flows that have waited in the queue, whatever the decision was. Waited is the sum of their waits.
	Waits  uint64
	Waited time.Duration
}

// CacheStats are those of one cache.
type CacheStats struct {
	Hits, Misses uint64 // lookups
	Stores       uint64 // values that were stored
	Deletes      uint64 // entries that were deleted, or were not there
	Refused      uint64 // values that were not stored: without a key, larger than the cache, or because a store failed

	// Entries is about how many entries there are. It is 0 where they are in a store (see [WithStore]), which does not count them.
	Entries int
}

// Stats returns what the engine has decided, and what is in use now. Counters continue to count while Stats reads them. So sums
// may differ by the flows that are being decided about.
func (e *Engine) Stats() Stats { return e.stats(e.rules.Load()) }

// stats are those of the rules and their components, in their order.
func (e *Engine) stats(r *rules) Stats {
	now := e.now()
	s := Stats{
		ControlPoints: make([]ControlPointStats, 0, 1+len(r.controlPoints)),
		Components:    make([]ComponentStats, 0, len(r.installed)),
		ResultCache:   e.results.stats(),
		GlobalCache:   e.globals.stats(),
		Reloads:       e.reloads.read(),
		Store:         e.store.stats(),
	}
	s.ControlPoints = append(s.ControlPoints, e.unlisted.stats(""))
	for _, at := range slices.Sorted(maps.Keys(r.controlPoints)) {
		s.ControlPoints = append(s.ControlPoints, r.controlPoints[at].stats(at))
	}
	selectors := 0
	for _, p := range r.installed {
		selectors += len(p.acts)
	}
	slab := make([]SelectorStats, 0, selectors) // one, because a file may have 100,000 components
	for _, p := range r.installed {
		of := p.stats(now)
		of.Kind = p.name
		from := len(slab)
		for _, at := range p.acts {
			slab = append(slab, SelectorStats{at.controlPoint, at.service, at.labels, at.picked.Load(), r.missed(at)})
		}
		of.Selectors = slab[from:len(slab):len(slab)]
		s.Components = append(s.Components, of)
	}
	return s
}

func (p *controlPoint) stats(controlPoint string) ControlPointStats {
	flows := func(why agentapi.Reason) uint64 { return p.counts.sum(decided(why)) }
	return ControlPointStats{
		ControlPoint:   controlPoint,
		Accepted:       flows(agentapi.ReasonNone),
		Unpicked:       p.unpickedFlows(),
		RateLimited:    flows(agentapi.ReasonRateLimited),
		NoTokens:       flows(agentapi.ReasonNoTokens),
		NotSampled:     flows(agentapi.ReasonNotSampled),
		NoMatchingRamp: flows(agentapi.ReasonNoMatchingRamp),
		Canceled:       p.counts.sum(flowsCanceled),
		CacheHits:      p.counts.sum(cacheHits),
		CacheMisses:    p.counts.sum(cacheMisses),
	}
}

// statsOf returns the stats that all components have.
func statsOf(c *agentapi.Component, n *counts) ComponentStats {
	return ComponentStats{
		Policy:      c.Policy,
		PolicyHash:  c.Hash,
		ID:          c.ID,
		LabelKey:    c.LabelKey,
		DryRun:      c.DryRun,
		Accepted:    n.sum(decisionsAccepted),
		Dropped:     n.sum(decisionsDropped),
		DryRunDrops: n.sum(decisionsDry),
		Unlimited:   n.sum(decisionsFree),
		Refunded:    n.sum(decisionsRefunded),

		DeniedStatus: c.DeniedStatus,
		LabelTooLong: n.sum(decisionsLong),
	}
}

// stats returns those of a component with buckets. The function usage returns what a bucket has.
func (k *keyed[S, R]) stats(usage func(value string, now int64) Usage, now int64) ComponentStats {
	s := statsOf(&k.component, k.counts)
	if k.settlements != nil {
		s.Settled = k.settlements.sum(settlementsTaken)
		s.Unsettled = k.settlements.sum(settlementsMissed)
		s.ForgivenTokens = k.settlements.sumFloat(tokensForgiven)
	}
	if k.table == nil {
		s.Usage = usage("", now)
		return s
	}
	s.Usage.Capacity = k.component.Capacity
	s.Keys = k.table.Len()
	s.Overflows = k.table.Spilled()
	s.InvalidOverrides = k.invalid.Load()
	return s
}

func (l *limiter[S]) stats(now int64) ComponentStats {
	all := l.keyed.stats(l.usage, now)
	all.Accepted += l.admitted()
	return all
}

func (s *scheduler[S]) stats(now int64) ComponentStats {
	all := s.keyed.stats(s.usage, now)
	all.Usage.Waiting = s.room.Used()
	for of := range s.workloads.all {
		w := of.stats()
		all.Accepted += w.Accepted
		all.Dropped += w.Dropped
		all.DryRunDrops += w.DryRunDrops
		all.Unlimited += w.Unlimited
		all.LabelTooLong += of.counts.sum(decisionsLong)
		all.Workloads = append(all.Workloads, w)
	}
	if s.meter != nil {
		e := s.single
		e.Lock()
		all.LoadMultiplier = s.meter.letIn(&e.State.tokens)
		e.Unlock()
	}
	return all
}

func (w *workload) stats() WorkloadStats {
	return WorkloadStats{
		Name:           w.label,
		Accepted:       w.counts.sum(decisionsAccepted),
		Dropped:        w.counts.sum(decisionsDropped),
		DryRunDrops:    w.counts.sum(decisionsDry),
		Unlimited:      w.counts.sum(decisionsFree),
		QueueFull:      w.drops[agentapi.CauseQueueFull].Load(),
		QueueTooLong:   w.drops[agentapi.CauseLongQueue].Load(),
		TimedOut:       w.drops[agentapi.CauseTimeout].Load(),
		Closed:         w.drops[agentapi.CauseClosed].Load(),
		AcceptedTokens: w.counts.sumFloat(tokensAccepted),
		RejectedTokens: w.counts.sumFloat(tokensRejected),
		Waits:          w.waits.count.Load(),
		Waited:         time.Duration(w.waits.total.Load()),
	}
}

// waits are how often and how long flows have waited.
type waits struct {
	count atomic.Uint64
	total atomic.Int64 // nanoseconds
}

func (w *waits) add(ns int64) {
	w.count.Add(1)
	w.total.Add(ns)
}
