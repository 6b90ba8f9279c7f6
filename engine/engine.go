// Package engine is the agent that runs inside a program's own process. It decides about flows by policies, and needs no server
// and no network.
//
//	e, err := engine.New([]policy.Policy{{
//		Name: "per-user",
//		Components: []policy.Component{policy.RateLimiter{
//			Selectors: policy.At("checkout"), Capacity: 10, Fill: 10, Interval: 30 * time.Second, LimitBy: "user_id",
//		}},
//	}})
//
// Pass it to flowctl.New. One engine can serve any number of clients. Limits hold for all of them together.
//
// # How it decides
//
// A flow meets the components whose selectors pick it, in stages: first load ramps and samplers in ramp mode, then other
// samplers, then rate limiters, calendar quotas, concurrency limiters and circuit breakers, then concurrency schedulers, then
// quota schedulers and load schedulers. A flow whose result is in the cache skips the last stage. Within a stage, components come
// in the order of the policies. The flow is accepted if none of them drops it. If a component drops it, everything that other
// components gave it goes back. If several components of a stage drop it, the one with the longest wait counts, and among equal
// ones the first. A flow that no component picks is accepted. A flow in ramp mode is an exception: it is accepted only if at
// least one ramp picks it, and no ramp drops it.
//
// If engines share a store (see [WithStore]), the flow meets the limiters in memory first. Then it asks all shared limiters
// together.
//
// Limiters answer at once. A scheduler lets flows wait for tokens, in a queue for each value of its label. The queue uses
// weighted fair queueing (see [policy.Scheduler]): tokens that become free go at once to the flow whose turn it is. A flow waits
// until its deadline, less a margin, or until the queue timeout of its workload. A flow that certainly cannot be served in time
// is rejected when it comes. While a flow waits, it keeps what earlier components gave it, including slots of concurrency
// limiters.
//
// Load schedulers let in a share of the load. A goroutine of the engine sets the share every 10 seconds, by signals
// that the host provides (see [WithSignal]) or by the latency of flows. The engine measures latencies as flows end, if
// a policy asks for it. If package agent serves the engine, latencies come from its clients' telemetry.
//
// The engine decides as an Aperture agent does, with these exceptions:
//
//   - A rejection refunds every component, and several drops have one deterministic outcome.
//   - A limit of 0 rejects all flows. A flow that costs more than a bucket can hold is rejected without a time to retry.
//     Concurrency limiters and schedulers give an estimate of that time.
//   - A token count or a priority that is negative or not a finite number is ignored.
//   - A small flow is not rejected because a large one was. When tokens come, waiting flows are served in the order of their
//     virtual finish times at that moment. Queues have a bound.
//   - Ramps let flows in ramp mode pass, and end on their last target.
//   - A load scheduler lets in a flow that wants more than a second's worth of tokens when its bucket is full. Flows
//     whose result the cache had are not measured.
//   - Every component has a dry run.
//   - Agent groups are ignored. The service that a selector names is the one that the client gives for itself.
package engine

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/slots"
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
	secret  keys.Secret               // that hides credentials in the names of buckets
	hold    slots.Hold                // of flows that want slots
	signals map[string]func() float64 // of the host, by name

	overrides func(component, value string) (policy.Override, bool) // of the host; nil for none
	store     *store                                                // nil for none
	leased    leased

	rules    atomic.Pointer[rules] // in force
	unlisted controlPoint          // stands for the control points that no policy names: nothing acts there

	mu      sync.RWMutex             // guards the next two
	holders map[identity][]component // components with slots, for EndSlot; lists are replaced, not changed
	retired []retired

	leases slots.Leases // of the sessions of clients across the network

	results, globals cache

	// memory has the caches if they are in memory, because a lookup there is one of the shortest things that flows do.
	memory struct{ results, globals *memoryCache }

	instruments instruments
	reloads     reloads

	checkTimeout  atomic.Int64          // the shortest of all clients, in nanoseconds; 0 while none is known
	checkTimeouts map[time.Duration]int // how many clients have it; guarded by applying

	applying sync.Mutex // held by Apply, and by Close as it begins

	sweeping, controlled, following bool // the goroutines run; guarded by applying

	closed  atomic.Bool
	full    chan struct{} // receives when a component has no room for a key
	ramped  chan struct{} // receives when a ramp of the store may be new
	done    chan struct{}
	running sync.WaitGroup // the sweeper, the controller, and what follows ramps
}

// New builds an engine that enforces the policies. Without policies it serves the caches, and accepts every flow that
// is not in ramp mode. It keeps none of the policies' maps and slices. The error joins every problem of the policies
// and options.
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
		ramped:       make(chan struct{}, 1),
		done:         make(chan struct{}),
		leased:       leased{limit: DefaultLeasedKeys, begun: make(chan struct{}, 1)},
		unlisted:     controlPoint{counts: new(counts)},
	}
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // it does not fail
	e.secret.Set(secret)
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
	e.newCaches()
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
// back what they hold. Tokens that the engine has drawn ahead from a store go back. A second Close does nothing. The error is always
// nil.
func (e *Engine) Close() error {
	e.applying.Lock() // no goroutine begins after it
	again := e.closed.Swap(true)
	e.applying.Unlock() // a signal that is read just now may call Apply
	if !again {
		if e.store != nil {
			e.store.watched.close()
		}
		close(e.done)
		e.running.Wait()
		e.store.end()
		e.instruments.close()
		e.results.close()
		e.globals.close()
	}
	return nil
}

// now is the time that limiters keep: nanoseconds since the engine was made, by the monotonic clock.
func (e *Engine) now() int64 { return int64(time.Since(e.epoch)) }

// sweepEvery is how often idle keys are looked for, and how often a limiter with too many keys is logged at most.
const sweepEvery = time.Minute

// sweep forgets keys until the engine is closed: idle ones every minute and, when a limiter is full, all whose state is
// as good as new, at most every second.
func (e *Engine) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-e.done:
			return
		case <-e.full:
			for _, p := range e.rules.Load().installed {
				if p.keeper != nil {
					p.keeper.sweep(e.now(), true)
				}
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
				if p.keeper == nil {
					continue
				}
				p.keeper.sweep(e.now(), false)
				if n := p.keeper.overflow(); n > p.reported.Load() {
					e.logger.Warn("headgate: a limiter has more keys than its cap; unknown ones share a bucket",
						"policy", p.identity().Policy, "component", p.identity().ID, "decisions", n-p.reported.Load())
					p.reported.Store(n)
				}
				if d, ok := p.component.(interface{ differing() (n uint64) }); ok {
					if n := d.differing(); n > 0 {
						e.logger.Warn("headgate: another engine has other numbers for a component: two versions of a policy are in force",
							"policy", p.identity().Policy, "component", p.identity().ID, "answers", n)
					}
				}
				if a, ok := p.component.(asker); ok {
					if n, last := a.invalidOverrides(); n > p.reportedInvalid.Load() {
						e.logger.Warn("headgate: WithOverrides: the function returned numbers that a component cannot have; its own count instead",
							"policy", p.identity().Policy, "component", p.identity().ID, "times", n-p.reportedInvalid.Load(), "error", last)
						p.reportedInvalid.Store(n)
					}
				}
			}
			e.sweepRetired()
		}
	}
}
