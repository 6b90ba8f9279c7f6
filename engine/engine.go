// Package engine is the agent that Headgate embeds in the process: it decides about flows by the policies that it was
// given, without a server and without a network.
//
//	e, err := engine.New([]policy.Policy{{
//		Name: "per-user",
//		Components: []policy.Component{policy.RateLimiter{
//			Selectors: policy.At("checkout"), Capacity: 10, Fill: 10, Interval: 30 * time.Second, LimitBy: "user_id",
//		}},
//	}})
//
// Hand it to flowctl.New to ask it. One engine can serve any number of clients; limits hold for all of them together.
//
// # How it decides
//
// A flow meets the components whose selectors pick it, in stages: first load ramps and samplers in ramp mode, then other
// samplers, then rate limiters and concurrency limiters, then concurrency schedulers, then, unless its result is in the
// cache, quota schedulers and load schedulers; within a stage in the order of the policies. It is accepted when none of
// them drops it. A flow that is not accepted takes nothing: what components gave it goes back. Where several of a stage
// drop it, the longest wait counts, then the order. Flows that no component picks are accepted, except in ramp mode:
// there a flow needs at least one ramp that picks it, and none that drops it.
//
// Limiters answer at once. Schedulers have flows wait for tokens, in a queue for each value of their label, by weighted
// fair queueing (see [policy.Scheduler]): what becomes free goes at once to the one whose turn it is then. A flow waits
// until its deadline, less a margin, or the queue timeout of its workload. One that cannot be served in time, as far as
// is known, is rejected when it comes. While it waits it keeps what earlier components gave it, slots of concurrency
// limiters included.
//
// Load schedulers let in a share of what comes. A goroutine of the engine sets the share every 10 seconds, by signals
// that the host provides (see [WithSignal]) or by how long flows have taken, which the engine measures itself as they
// end, where a policy asks for it. An engine that package agent serves hears of that from its clients' telemetry.
//
// The decisions are those of an Aperture agent, but for these, where the engine is meant to do better:
//
//   - A rejection refunds every component, and several drops have one deterministic outcome.
//   - A limit of 0 refuses. A flow that costs more than a bucket can hold is rejected without a time to retry.
//     Concurrency limiters and schedulers give an estimate of that time.
//   - A token count or a priority that is negative or not a finite number is ignored.
//   - A small flow is not refused because a large one was. Who waits is served in order of virtual finish times at the
//     moment when tokens come. Queues have a bound.
//   - Ramps let flows in ramp mode pass, and end on their last target.
//   - A load scheduler lets in a flow that wants more than a second's worth of tokens when its bucket is full. Flows
//     whose result the cache had are not measured.
//   - Every component has a dry run.
//   - Agent groups are ignored, and the service that a selector names is the one that the client says it is.
package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// An Engine decides about flows in the process. Make one with [New] or [Load]; close it when its clients are done. It
// is safe for concurrent use.
type Engine struct {
	keyCap       int
	cacheEntries int
	cacheBytes   int64
	logger       *slog.Logger

	epoch   time.Time
	secret  [32]byte                  // that hides credentials in the names of buckets
	signals map[string]func() float64 // of the host, by name

	rules    atomic.Pointer[rules] // in force
	unlisted controlPoint          // stands for the control points that no policy names: nothing acts there

	mu      sync.RWMutex             // guards the next two
	holders map[identity][]component // those whose flows hold slots, which others may end; the lists are never changed
	retired []retired

	results *cache
	globals *cache

	instruments instruments

	checkTimeout atomic.Int64 // the shortest of a client, in nanoseconds; 0 while none is known

	applying             sync.Mutex // held by Apply, and by Close as it begins
	sweeping, controlled bool       // the goroutines run; guarded by applying

	closed  atomic.Bool
	full    chan struct{} // a component has no room for a key
	done    chan struct{}
	running sync.WaitGroup // the sweeper and the controller
}

var (
	_ agentapi.Agent    = (*Engine)(nil)
	_ agentapi.Reverter = (*Engine)(nil)
)

// New builds an engine that enforces the policies; none is fine, then it accepts every flow and serves the caches. It
// keeps nothing of the policies' maps and slices. The error joins all that is wrong with them.
func New(policies []policy.Policy, opts ...Option) (*Engine, error) {
	e := &Engine{
		keyCap:       DefaultKeyCap,
		cacheEntries: DefaultCacheEntries,
		cacheBytes:   DefaultCacheBytes,
		logger:       slog.New(slog.DiscardHandler),
		epoch:        time.Now(),
		holders:      make(map[identity][]component),
		signals:      make(map[string]func() float64),
		full:         make(chan struct{}, 1),
		done:         make(chan struct{}),
		unlisted:     controlPoint{counts: new(counts)},
	}
	_, _ = rand.Read(e.secret[:]) // it does not fail
	var errs []error
	for _, o := range opts {
		if o != nil {
			errs = append(errs, o.apply(e))
		}
	}
	e.rules.Store(new(rules))
	next, err := e.compile(policies)
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, fmt.Errorf("headgate: engine: %w", err)
	}
	e.results = newCache(e.cacheEntries, e.cacheBytes)
	e.globals = newCache(e.cacheEntries, e.cacheBytes)
	e.install(next)
	return e, nil
}

// Load is [New] with the policies of a file, or of all .yaml and .yml files of a directory; see [policy.Load].
func Load(path string, opts ...Option) (*Engine, error) {
	policies, err := policy.Load(path)
	if err != nil {
		return nil, err
	}
	return New(policies, opts...)
}

// Close stops the engine's goroutines. Flows that wait in a queue are rejected, so that none of them runs because of a
// shutdown. Flows that start from now on are Unreachable: they run, unless they fail closed. Flows in flight still give
// back what they hold. A second Close does nothing. The error is always nil.
func (e *Engine) Close() error {
	e.applying.Lock() // no goroutine begins after it
	again := e.closed.Swap(true)
	e.applying.Unlock() // a signal that is read just now may call Apply
	if !again {
		close(e.done)
		e.running.Wait()
		e.instruments.close()
		e.results.close()
		e.globals.close()
	}
	return nil
}

// ServiceWarnings lists the selectors that name a service, which no flow has that is asked about over the wire: first
// those of components that no other selector picks a flow for. Package agent calls it.
func (e *Engine) ServiceWarnings() []string {
	var never, warnings []string
	points := e.rules.Load().controlPoints
	for _, at := range slices.Sorted(maps.Keys(points)) {
		for _, placements := range points[at].stages {
			for _, m := range placements {
				acts := slices.ContainsFunc(m.selectors, func(s selector) bool { return s.service == "" })
				for _, s := range m.selectors {
					if s.service == "" {
						continue
					}
					warning := fmt.Sprintf("policy %q: component %q: control point %q: the selector picks nothing: "+
						"flows from the network have no service, and it wants %q", m.id.Policy, m.id.ID, at, s.service)
					if acts {
						warnings = append(warnings, warning)
					} else {
						never = append(never, warning+", as all its selectors there do")
					}
				}
			}
		}
	}
	return append(never, warnings...)
}

// lookup fills the cache part of the verdict.
func (e *Engine) lookup(p *controlPoint, req *agentapi.Request, v *agentapi.Verdict) {
	x, asked := v.More(), req.Lookup()
	if asked.Result != "" {
		x.Result = e.results.lookup(cacheKey{req.ControlPoint, asked.Result}, asked.Room)
		p.looked(&x.Result)
	}
	for _, key := range asked.Global {
		if key == "" {
			continue
		}
		if x.Global == nil {
			x.Global = make(map[string]agentapi.CacheAnswer, len(asked.Global))
		}
		x.Global[key] = e.globals.lookup(cacheKey{key: key}, asked.Room)
	}
}

// End gives back the slots that a flow holds, and measures how long its work took. Clients of package flowctl call it.
func (e *Engine) End(_ context.Context, req *agentapi.Request, v *agentapi.Verdict, failed bool) (agentapi.Returns, error) {
	if sinks := e.rules.Load().sinks[req.ControlPoint]; len(sinks) > 0 && !failed {
		e.measure(sinks, req, v)
	}
	var r agentapi.Returns
	for i := range v.Len() {
		d := v.At(i)
		if d.Slot() == 0 {
			continue
		}
		c, ok := d.Component.Limiter.(component)
		if !ok {
			continue
		}
		r.Held++
		if c.giveBack(e.now(), d, false) {
			r.Returned++
		}
	}
	return r, nil
}

// measure measures the flow, which has run and ended well just now. What the cache spared its work says nothing.
func (e *Engine) measure(sinks []latencySink, req *agentapi.Request, v *agentapi.Verdict) {
	var waited time.Duration
	if v.Details != nil {
		if v.Details.Result.Hit {
			return
		}
		waited = v.Details.Waited
	}
	now := e.now()
	e.recordLatency(sinks, &req.Labels, now, time.Duration(e.epoch.UnixNano()+now-v.Start)-waited)
}

// Measures reports whether a policy wants to know how long flows of the control point take; for "", whether any does of
// any flows. Package agent calls it.
func (e *Engine) Measures(controlPoint string) bool {
	if controlPoint == "" {
		return len(e.rules.Load().sinks) > 0
	}
	return len(e.rules.Load().sinks[controlPoint]) > 0
}

// Observe measures a flow that has run and ended well, by what its client reports. Package agent calls it, which keeps no
// flows.
func (e *Engine) Observe(controlPoint string, labels map[string]string, latency time.Duration) {
	e.recordLatency(e.rules.Load().sinks[controlPoint], &agentapi.Labels{Params: labels}, e.now(), latency)
}

// Revert takes back all that Check gave a flow, tokens and slots, instead of End: the flow does not run. Clients of package
// flowctl call it, and package agent for flows whose client has gone.
func (e *Engine) Revert(req *agentapi.Request, v *agentapi.Verdict) {
	if !v.Rejected() || req.DryRun() { // any other rejected flow holds nothing
		undo(v, e.now())
	}
}

// EndSlot gives back a slot by the names that it has over the wire. Package agent calls it, which keeps no flows. It
// reports whether the engine knows the limiter, and whether the slot was still taken.
func (e *Engine) EndSlot(policyName, hash, component, label string, slot uint64) (known, returned bool) {
	e.mu.RLock()
	holders := e.holders[identity{policyName, hash, component}]
	e.mu.RUnlock()
	for _, h := range holders {
		d := agentapi.LimiterDecision{Scope: agentapi.ScopeDefault}
		d.Hold(slot)
		if key := h.identity().LabelKey; key != "" {
			value, ok := strings.CutPrefix(label, key+":")
			if !ok {
				continue
			}
			d.Scope, d.Label = agentapi.ScopeLabel, value
		}
		if h.giveBack(e.now(), &d, false) {
			return true, true
		}
	}
	return len(holders) > 0, false
}

// Lookup finds a value in a cache. If room is not nil, it takes room for the value's bytes in the answer or reports that
// there is none, which is a miss, and the value must not be changed. Package agent calls it; flows look up with their
// check.
func (e *Engine) Lookup(key agentapi.CacheKey, room func(size int) bool) agentapi.CacheAnswer {
	switch c, k := e.cache(key); {
	case e.closed.Load():
		return agentapi.CacheAnswer{Err: agentapi.ErrClosed}
	case key.Key == "":
		return agentapi.CacheAnswer{Err: errNoCacheKey}
	case key.Global:
		return c.lookup(k, room)
	default:
		a := c.lookup(k, room)
		e.controlPoint(key.ControlPoint).looked(&a)
		return a
	}
}

// looked counts a lookup in the result cache.
func (p *controlPoint) looked(a *agentapi.CacheAnswer) {
	what := cacheMisses
	if a.Hit {
		what = cacheHits
	}
	count(p.counts, a, what)
}

// Store puts a value into a cache. Clients of package flowctl call it.
func (e *Engine) Store(_ context.Context, key agentapi.CacheKey, value []byte, ttl time.Duration) error {
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	c, k := e.cache(key)
	return c.store(k, value, ttl)
}

// Delete removes a value from a cache. Clients of package flowctl call it.
func (e *Engine) Delete(_ context.Context, key agentapi.CacheKey) error {
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	c, k := e.cache(key)
	return c.remove(k)
}

func (e *Engine) cache(key agentapi.CacheKey) (*cache, cacheKey) {
	if key.Global {
		return e.globals, cacheKey{key: key.Key}
	}
	return e.results, cacheKey{key.ControlPoint, key.Key}
}

// Ready reports whether the engine is open, by an error if it is not. Clients of package flowctl call it.
func (e *Engine) Ready(context.Context) error {
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	return nil
}

// now is the time that limiters keep: nanoseconds since the engine was made, by the monotonic clock.
func (e *Engine) now() int64 { return int64(time.Since(e.epoch)) }

// sweepEvery is how often idle keys are looked for, and how often a limiter with too many keys is logged at most.
const sweepEvery = time.Minute

// sweep forgets keys until the engine is closed: idle ones every minute, and, when a limiter is full, those that nobody
// will miss, every second at most.
func (e *Engine) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-e.done:
			return
		case <-e.full:
			for _, p := range e.rules.Load().installed {
				p.sweep(e.now(), true)
			}
			pause := time.NewTimer(keys.FullSweepEvery)
			select {
			case <-e.done:
				pause.Stop()
				return
			case <-pause.C:
			}
		case <-tick.C:
			for _, p := range e.rules.Load().installed {
				p.sweep(e.now(), false)
				if n := p.overflow(); n > p.reported {
					e.logger.Warn("headgate: a limiter has more keys than its cap; unknown ones share a bucket",
						"policy", p.identity().Policy, "component", p.identity().ID, "decisions", n-p.reported)
					p.reported = n
				}
			}
			e.sweepRetired()
		}
	}
}
