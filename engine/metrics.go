package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/version"
)

const scope = "github.com/headgate-go/headgate/engine"

// Instrument reports the engine's [Stats] as metrics of the provider, until the engine is closed; docs/operating.md
// lists them. No metric holds the value of a label. Another call with a provider that is equal by == does nothing.
// Clients of package flowctl call Instrument with their provider. An engine that package agent serves has no client in
// its process, so its host calls it.
func (e *Engine) Instrument(provider metric.MeterProvider) error {
	if provider == nil {
		return errors.New("headgate: engine: instrument: the provider is nil")
	}
	i := &e.instruments
	i.mu.Lock()
	defer i.mu.Unlock()
	same := func(p metric.MeterProvider) bool { return reflect.ValueOf(p).Comparable() && p == provider }
	if e.closed.Load() || slices.ContainsFunc(i.providers, same) {
		return nil
	}
	meter := provider.Meter(scope, metric.WithInstrumentationVersion(version.Version))
	m, err := newMetrics(meter)
	if err != nil {
		return fmt.Errorf("headgate: engine: instrument: %w", err)
	}
	registration, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		r := e.rules.Load()
		m.observe(i.named(o), r, e.stats(r))
		return nil
	}, m.all...)
	if err != nil {
		return fmt.Errorf("headgate: engine: instrument: %w", err)
	}
	i.providers = append(i.providers, provider)
	i.registrations = append(i.registrations, registration)
	var waits []metric.Float64Histogram
	if old := i.waits.Load(); old != nil {
		waits = slices.Clone(*old)
	}
	waits = append(waits, m.waits)
	i.waits.Store(&waits)
	return nil
}

// instruments are the providers that an engine reports to. The zero value has none.
type instruments struct {
	name  string // of the engine; "" for none
	waits atomic.Pointer[[]metric.Float64Histogram]

	mu            sync.Mutex
	providers     []metric.MeterProvider
	registrations []metric.Registration
}

// waited records how long a flow has waited.
func (i *instruments) waited(ctx context.Context, c *agentapi.Component, of *workload, ns int64) {
	waits := i.waits.Load()
	if waits == nil {
		return
	}
	set := metric.WithAttributes(append(append(names(c.Policy, c.Hash, c.ID), attribute.String("workload_index", of.label)), i.attributes()...)...)
	for _, w := range *waits {
		w.Record(ctx, float64(ns)/float64(time.Millisecond), set)
	}
}

// attributes are those of all the engine's metrics.
func (i *instruments) attributes() []attribute.KeyValue {
	if i.name == "" {
		return nil
	}
	return []attribute.KeyValue{attribute.String("engine", i.name)}
}

// A namedObserver adds the engine's name to all that is observed.
type namedObserver struct {
	metric.Observer
	name metric.MeasurementOption
}

func (i *instruments) named(o metric.Observer) metric.Observer {
	if i.name == "" {
		return o
	}
	return namedObserver{o, metric.WithAttributes(i.attributes()...)}
}

func (o namedObserver) ObserveInt64(of metric.Int64Observable, n int64, opts ...metric.ObserveOption) {
	o.Observer.ObserveInt64(of, n, append(opts, o.name)...)
}

func (o namedObserver) ObserveFloat64(of metric.Float64Observable, n float64, opts ...metric.ObserveOption) {
	o.Observer.ObserveFloat64(of, n, append(opts, o.name)...)
}

// close unregisters from the providers. A collection that is under way is still answered.
func (i *instruments) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, r := range i.registrations {
		_ = r.Unregister() // fails where the provider is gone already
	}
	i.registrations = nil
}

// metrics are the instruments of one meter.
type metrics struct {
	waits metric.Float64Histogram

	decisions map[counterName]counter // of the kinds that have one

	requests, unpicked, rejectReasons, workloads, rejections counter
	dryDrops, unlimited, refunds, overflows                  counter
	settlements                                              counter
	opened                                                   counter
	local, unreturned, differing                             counter
	storeFailures, storeUnanswered, lostSlots                counter

	incomingTokens, acceptedTokens, rejectedTokens, forgivenTokens metric.Float64ObservableCounter

	queued, keys, cacheEntries, open, reloaded, storeUp, storeInstances metric.Int64ObservableGauge

	capacity, available, fillRate, multiplier, percentage metric.Float64ObservableGauge

	cacheHits, cacheMisses, cacheOperations, reloads counter

	all []metric.Observable
}

type counter = metric.Int64ObservableCounter

// A counterName names a counter and says what it counts.
type counterName struct{ name, what string }

func newMetrics(meter metric.Meter) (*metrics, error) {
	m := &metrics{decisions: make(map[counterName]counter)}
	var errs []error
	add := func(o metric.Observable, err error) {
		m.all = append(m.all, o)
		errs = append(errs, err)
	}
	for _, c := range []struct {
		to         *counter
		name, what string
	}{
		{&m.requests, "flowcontrol_requests_total", "Flows that the engine was asked about, by what it decided."},
		{&m.unpicked, "flowcontrol_unpicked_flows_total", "Accepted flows that no component's selector picked."},
		{&m.rejectReasons, "flowcontrol_reject_reasons_total", "Flows that the engine rejected, by the reason."},
		{&m.workloads, "workload_requests_total", "Flows that met a scheduler, by workload."},
		{&m.rejections, "workload_rejections_total", "Flows that did not wait in a scheduler, or did in vain, by the cause."},
		{&m.dryDrops, "flowcontrol_dry_run_drops_total", "Flows that components would have dropped without a dry run."},
		{&m.unlimited, "limiter_unlimited_total", "Flows that a limiter or scheduler had nothing to limit by."},
		{&m.refunds, "limiter_refunds_total", "Flows that gave back what a limiter or scheduler had given them, and did not run."},
		{&m.settlements, "limiter_settlements_total", "Flows that a limiter or scheduler corrected by what they cost, or could not."},
		{&m.overflows, "limiter_overflows_total", "Decisions by the bucket that values beyond the cap share."},
		{&m.opened, "circuit_breaker_opened_total", "How often a circuit breaker has opened."},
		{&m.local, "limiter_local_decisions_total", "Flows that a limiter decided about without the store that engines share."},
		{&m.unreturned, "limiter_unreturned_total", "What flows did not give back, because the store did not answer."},
		{&m.differing, "limiter_numbers_differ_total", "Answers of the store that say that another engine uses other numbers."},
		{&m.storeFailures, "store_failures_total", "Calls that the store did not answer, or answered with an error."},
		{&m.storeUnanswered, "store_unanswered_flows_total", "Flows that were decided about without the store."},
		{&m.lostSlots, "flowcontrol_lost_slots_total", "Slots of flows in flight that may be given to others, because they were not renewed in time."},
		{&m.cacheHits, "cache_lookup_hits_total", "Lookups that found a value."},
		{&m.cacheMisses, "cache_lookup_misses_total", "Lookups that found none."},
		{&m.cacheOperations, "cache_operation_results_total", "Changes of the caches."},
		{&m.reloads, "policy_reloads_total", "Changes of the watched policy files, by what became of them."},
	} {
		var err error
		*c.to, err = meter.Int64ObservableCounter(c.name, metric.WithDescription(c.what))
		add(*c.to, err)
	}
	for _, k := range kinds {
		c := k.about().counter
		if _, made := m.decisions[c]; made || c.name == "" {
			continue
		}
		made, err := meter.Int64ObservableCounter(c.name, metric.WithDescription(c.what))
		m.decisions[c] = made
		add(made, err)
	}
	for _, c := range []struct {
		to         *metric.Float64ObservableCounter
		name, what string
	}{
		{&m.incomingTokens, "incoming_tokens_total", "Tokens that flows came for, by workload."},
		{&m.acceptedTokens, "accepted_tokens_total", "Tokens of flows that were accepted."},
		{&m.rejectedTokens, "rejected_tokens_total", "Tokens of flows that were rejected."},
		{&m.forgivenTokens, "limiter_forgiven_tokens_total", "Tokens that flows cost beyond what a limiter or scheduler lets them owe."},
	} {
		var err error
		*c.to, err = meter.Float64ObservableCounter(c.name, metric.WithDescription(c.what))
		add(*c.to, err)
	}
	for _, g := range []struct {
		to         *metric.Int64ObservableGauge
		name, what string
	}{
		{&m.queued, "requests_in_queue", "Flows that wait in a scheduler."},
		{&m.keys, "limiter_keys", "Values of its label that a limiter keeps apart."},
		{&m.cacheEntries, "cache_entries", "Entries of a cache."},
		{&m.open, "circuit_breaker_open", "Values of its label for which a circuit breaker is open or half-open."},
		{&m.storeUp, "store_up", "1 if the store that engines share has answered lately, otherwise 0."},
		{&m.storeInstances, "store_instances", "How many have used the store lately."},
		{&m.reloaded, "policy_last_reload_successful", "1 if what is in the watched policy files is in force, otherwise 0."},
	} {
		var err error
		*g.to, err = meter.Int64ObservableGauge(g.name, metric.WithDescription(g.what))
		add(*g.to, err)
	}
	for _, g := range []struct {
		to         *metric.Float64ObservableGauge
		name, what string
	}{
		{&m.capacity, "token_bucket_capacity", "Tokens or slots that there are at the most."},
		{&m.available, "token_bucket_available_tokens", "Tokens or slots that are free."},
		{&m.fillRate, "token_bucket_fill_rate", "Tokens that a load scheduler lets in each second."},
		{&m.multiplier, "token_bucket_lm_ratio", "The share of its load that a load scheduler lets in."},
		{&m.percentage, "sampler_accept_percentage", "The share of flows that a sampler or load ramp accepts."},
	} {
		var err error
		*g.to, err = meter.Float64ObservableGauge(g.name, metric.WithDescription(g.what))
		add(*g.to, err)
	}
	var err error
	m.waits, err = meter.Float64Histogram("request_in_queue_duration_ms",
		metric.WithDescription("How long flows have waited in a scheduler, in milliseconds, of those that did."))
	return m, errors.Join(append(errs, err)...)
}

// names are the attributes of a component.
func names(policyName, hash, id string) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.String("policy_name", policyName), attribute.String("policy_hash", hash), attribute.String("component_id", id),
	}
}

// observe shows the stats, which are those of the rules.
func (m *metrics) observe(o metric.Observer, r *rules, s Stats) {
	for i := range s.ControlPoints {
		m.observePoint(o, &s.ControlPoints[i])
	}
	for i := range s.Components {
		m.observeComponent(o, r.installed[i].kind, &s.Components[i])
	}
	m.observeReloads(o, &s.Reloads)
	m.observeStore(o, &s.Store)
	m.observeCache(o, "result", &s.ResultCache)
	m.observeCache(o, "global", &s.GlobalCache)
	o.ObserveInt64(m.cacheHits, int64(s.GlobalCache.Hits), metric.WithAttributes(attribute.String("type", "global")))
	o.ObserveInt64(m.cacheMisses, int64(s.GlobalCache.Misses), metric.WithAttributes(attribute.String("type", "global")))
}

// observeStore shows nothing where there is none.
func (m *metrics) observeStore(o metric.Observer, s *StoreStats) {
	if !s.Shared {
		return
	}
	up := int64(1)
	if s.Down {
		up = 0
	}
	o.ObserveInt64(m.storeUp, up)
	o.ObserveInt64(m.storeInstances, int64(s.Instances))
	o.ObserveInt64(m.storeFailures, int64(s.Failures))
	o.ObserveInt64(m.storeUnanswered, int64(s.Unanswered))
	o.ObserveInt64(m.lostSlots, int64(s.LostSlots))
}

// observeReloads shows nothing where no file is watched.
func (m *metrics) observeReloads(o metric.Observer, s *ReloadStats) {
	if s.Applied+s.Failed == 0 {
		return
	}
	o.ObserveInt64(m.reloads, int64(s.Applied), metric.WithAttributes(attribute.String("status", "success")))
	o.ObserveInt64(m.reloads, int64(s.Failed), metric.WithAttributes(attribute.String("status", "error")))
	good := int64(1)
	if s.Error != "" {
		good = 0
	}
	o.ObserveInt64(m.reloaded, good)
}

func (m *metrics) observePoint(o metric.Observer, s *ControlPointStats) {
	point := attribute.String("control_point", s.ControlPoint)
	for _, d := range []struct {
		n             uint64
		decision, why string
	}{
		{s.Accepted, "accepted", ""},
		{s.RateLimited, "rejected", "rate limited"},
		{s.NoTokens, "rejected", "no tokens"},
		{s.NotSampled, "rejected", "not sampled"},
		{s.NoMatchingRamp, "rejected", "no matching ramp"},
		{s.Canceled, "canceled", ""},
	} {
		attrs := []attribute.KeyValue{point, attribute.String("decision_type", d.decision)}
		if d.why != "" {
			why := attribute.String("reject_reason", d.why)
			attrs = append(attrs, why)
			o.ObserveInt64(m.rejectReasons, int64(d.n), metric.WithAttributes(point, why))
		}
		o.ObserveInt64(m.requests, int64(d.n), metric.WithAttributes(attrs...))
	}
	o.ObserveInt64(m.unpicked, int64(s.Unpicked), metric.WithAttributes(point))
	lookup := metric.WithAttributes(attribute.String("type", "result"), point)
	o.ObserveInt64(m.cacheHits, int64(s.CacheHits), lookup)
	o.ObserveInt64(m.cacheMisses, int64(s.CacheMisses), lookup)
}

// An observation shows the stats of one component.
type observation struct {
	*metrics
	to        metric.Observer
	kind      *kind
	component *ComponentStats
	named     []attribute.KeyValue
	own       metric.MeasurementOption // the attributes of named
}

func (m *metrics) observeComponent(o metric.Observer, k *kind, s *ComponentStats) {
	named := names(s.Policy, s.PolicyHash, s.ID)
	one := &observation{metrics: m, to: o, kind: k, component: s, named: named, own: metric.WithAttributes(named...)}
	o.ObserveInt64(m.dryDrops, int64(s.DryRunDrops), one.own)
	k.observe(one)
}

// decided shows how many flows passed and how many were dropped.
func (o *observation) decided(c counter, accepted, dropped uint64, more ...attribute.KeyValue) {
	for _, d := range []struct {
		n        uint64
		decision string
		dropped  bool
	}{{accepted, "accepted", false}, {dropped, "rejected", true}} {
		o.to.ObserveInt64(c, int64(d.n), metric.WithAttributes(append(slices.Concat(o.named, more),
			attribute.String("decision_type", d.decision), attribute.Bool("limiter_dropped", d.dropped))...))
	}
}

// observeSampler shows a sampler or a load ramp.
func observeSampler(o *observation) {
	o.decided(o.decisions[o.kind.counter], o.component.Accepted, o.component.Dropped)
	o.to.ObserveFloat64(o.percentage, o.component.AcceptPercentage, o.own)
}

// observeLimiter shows a component that decides at once, by buckets or slots.
func observeLimiter(o *observation) {
	o.decided(o.decisions[o.kind.counter], o.component.Accepted, o.component.Dropped)
	o.buckets()
}

// observeScheduler shows a component that has a queue.
func observeScheduler(o *observation) {
	for _, w := range o.component.Workloads {
		index := attribute.String("workload_index", w.Name)
		o.decided(o.workloads, w.Accepted, w.Dropped, index)
		one := metric.WithAttributes(append(slices.Clone(o.named), index)...)
		o.to.ObserveFloat64(o.incomingTokens, w.AcceptedTokens+w.RejectedTokens, one)
		o.to.ObserveFloat64(o.acceptedTokens, w.AcceptedTokens, one)
		o.to.ObserveFloat64(o.rejectedTokens, w.RejectedTokens, one)
		for _, c := range []struct {
			cause agentapi.Cause
			n     uint64
		}{{agentapi.CauseQueueFull, w.QueueFull}, {agentapi.CauseLongQueue, w.QueueTooLong}, {agentapi.CauseTimeout, w.TimedOut}, {agentapi.CauseClosed, w.Closed}} {
			o.to.ObserveInt64(o.rejections, int64(c.n), metric.WithAttributes(append(slices.Clone(o.named), index,
				attribute.String("cause", c.cause.String()))...))
		}
	}
	o.to.ObserveInt64(o.queued, int64(o.component.Usage.Waiting), o.own)
	o.buckets()
}

// observeLoad shows a scheduler whose tokens come at a share of its load.
func observeLoad(o *observation) {
	observeScheduler(o)
	if math.IsInf(o.component.Usage.Capacity, 1) {
		return
	}
	o.to.ObserveFloat64(o.fillRate, o.component.Usage.Capacity, o.own)
	o.to.ObserveFloat64(o.multiplier, o.component.LoadMultiplier, o.own)
}

// buckets shows the keys, or the tokens or slots.
func (o *observation) buckets() {
	s := o.component
	o.to.ObserveInt64(o.unlimited, int64(s.Unlimited), o.own)
	o.to.ObserveInt64(o.refunds, int64(s.Refunded), o.own)
	for _, n := range []struct {
		settled bool
		n       uint64
	}{{true, s.Settled}, {false, s.Unsettled}} {
		o.to.ObserveInt64(o.settlements, int64(n.n), metric.WithAttributes(append(slices.Clone(o.named), attribute.Bool("settled", n.settled))...))
	}
	o.to.ObserveFloat64(o.forgivenTokens, s.ForgivenTokens, o.own)
	if s.Shared {
		o.to.ObserveInt64(o.local, int64(s.LocalDecisions), o.own)
		o.to.ObserveInt64(o.unreturned, int64(s.Unreturned), o.own)
		o.to.ObserveInt64(o.differing, int64(s.NumbersDiffer), o.own)
	}
	if s.LabelKey != "" {
		o.to.ObserveInt64(o.keys, int64(s.Keys), o.own)
		o.to.ObserveInt64(o.overflows, int64(s.Overflows), o.own)
		return
	}
	if o.kind.outcomes || math.IsInf(s.Usage.Capacity, 1) { // a circuit breaker has no tokens, nor has a load scheduler that lets everything in
		return
	}
	o.to.ObserveFloat64(o.capacity, s.Usage.Capacity, o.own)
	o.to.ObserveFloat64(o.available, s.Usage.Remaining, o.own)
}

func (m *metrics) observeCache(o metric.Observer, kind string, s *CacheStats) {
	of := attribute.String("type", kind)
	o.ObserveInt64(m.cacheEntries, int64(s.Entries), metric.WithAttributes(of))
	for _, op := range []struct {
		n            uint64
		name, status string
	}{{s.Stores, "upsert", "success"}, {s.Refused, "upsert", "error"}, {s.Deletes, "delete", "success"}} {
		o.ObserveInt64(m.cacheOperations, int64(op.n),
			metric.WithAttributes(of, attribute.String("operation_type", op.name), attribute.String("status", op.status)))
	}
}
