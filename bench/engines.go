package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/adaptivelimiter"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	"github.com/sony/gobreaker/v2"
	"golang.org/x/time/rate"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/policy"
)

// The control points, each with what its name says.
const (
	nothing     = "nothing"     // no policy
	rateLimited = "rate"        // a rate limiter, keyed by user; also of an engine with a store, which it does not share there
	oneKey      = "one-key"     // the same, for the rows with label maps in turn
	manyKeys    = "many-keys"   // the same
	exception   = "exception"   // a rate limiter, keyed by user, with an override for the user
	exceptions  = "exceptions"  // the same, with overrides for others too
	indebted    = "indebted"    // a rate limiter, keyed by user, whose flows cost more than they took
	concurrency = "concurrency" // a concurrency limiter
	settled     = "settled"     // a rate limiter, keyed by user, whose flows are settled
	quota       = "quota"       // a quota scheduler, keyed by user
	slots       = "slots"       // a concurrency scheduler
	sampled     = "sampled"     // a sampler, which goes by the user
	breaker     = "breaker"     // a circuit breaker, keyed by user
)

// manyOverrides is how many overrides the limiter with many of them has.
const manyOverrides = 10_000

// policies never reject: what is measured is a call that is let through.
func policies(keys int) []policy.Policy {
	limit := func(at, by string) policy.RateLimiter {
		return policy.RateLimiter{Selectors: policy.At(at), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: by}
	}
	overriding := func(at string, many int) policy.RateLimiter {
		l := limit(at, "user_id")
		l.Overrides = map[string]policy.Override{"u": {Capacity: 2e12, Fill: 2e12}}
		for i := range many - 1 {
			l.Overrides["user-"+strconv.Itoa(i)] = policy.Override{Capacity: float64(1 + i)}
		}
		return l
	}
	return []policy.Policy{
		{Name: "exception", Components: []policy.Component{overriding(exception, 1)}},
		{Name: "exceptions", Components: []policy.Component{overriding(exceptions, manyOverrides)}},
		{Name: "indebted", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At(indebted), Capacity: 10, Fill: 1e-6, Interval: time.Second, LimitBy: "user_id", TokensLabel: "tokens",
		}}},
		{Name: "per-user", Components: []policy.Component{limit(rateLimited, "user_id")}},
		{Name: "per-tenant", Components: []policy.Component{limit(oneKey, "tenant")}},
		{Name: fmt.Sprintf("%d-users", keys), Components: []policy.Component{limit(manyKeys, "user_id")}},
		{Name: "user-costs", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At(settled), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id", TokensLabel: "tokens",
		}}},
		{Name: "at-once", Components: []policy.Component{policy.ConcurrencyLimiter{
			Selectors: policy.At(concurrency), Max: 1e6, MaxInflight: time.Minute,
		}}},
		{Name: "user-quota", Components: []policy.Component{policy.QuotaScheduler{
			Selectors: policy.At(quota), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id",
		}}},
		{Name: "slots", Components: []policy.Component{policy.ConcurrencyScheduler{
			Selectors: policy.At(slots), Max: 1e6, MaxInflight: time.Minute,
		}}},
		{Name: "sampled", Components: []policy.Component{policy.Sampler{
			Selectors: policy.At(sampled), AcceptPercentage: 100, SessionLabel: "user_id",
		}}},
		{Name: "breaker", Components: []policy.Component{policy.CircuitBreaker{
			Selectors: policy.At(breaker), FailureRatio: 0.5, MinFlows: 20, Window: 10 * time.Second, OpenDuration: 10 * time.Second, LimitBy: "user_id",
		}}},
	}
}

// oneLabel is what most rows have.
func oneLabel() map[string]string { return map[string]string{"user_id": "u"} }

func work() (int, error) { return 42, nil }

func workContext(context.Context) (int, error) { return work() }

func workFlow(context.Context, *flowctl.Flow) error { _, err := work(); return err }

// engines are the rows that need no network.
type engines struct {
	ctx    context.Context //nolint:containedctx // the run's
	engine *engine.Engine
	client *flowctl.Client
	beside *engine.Engine // has a store
	local  *flowctl.Client
	users  []map[string]string // of different users of one tenant

	bytesPerKey, bytesPerDebt float64
}

func openEngines(ctx context.Context, keys int) (*engines, error) {
	limits, err := engine.New(policies(keys), engine.WithKeyCap(2*keys))
	if err != nil {
		return nil, err
	}
	client, err := flowctl.New(limits)
	if err != nil {
		return nil, firstError(err, limits.Close())
	}
	e := &engines{ctx: ctx, engine: limits, client: client}
	if e.beside, err = engine.New([]policy.Policy{{Name: "per-user", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At(rateLimited), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id", Local: true,
	}}}}, engine.WithStore(sharedtest.New().Instance())); err != nil {
		return nil, firstError(err, limits.Close())
	}
	if e.local, err = flowctl.New(e.beside); err != nil {
		return nil, firstError(err, e.close())
	}
	return e, nil
}

// fill makes the many users, and gives each a key in their limiter, and one in debt in another.
func (e *engines) fill(keys int) error {
	e.users = make([]map[string]string, keys)
	text := 0
	for i := range e.users {
		id := "user-" + strconv.Itoa(i)
		e.users[i] = map[string]string{"user_id": id, "tenant": "t"}
		text += len(id)
	}
	before := heap()
	for _, labels := range e.users {
		if err := headgate.Do(e.ctx, e.client, manyKeys, flowctl.Params{Labels: labels}, workFlow); err != nil {
			return err
		}
	}
	between := heap()
	owe := func(_ context.Context, flow *flowctl.Flow) error {
		flow.Settle("tokens", 15)
		return nil
	}
	for _, labels := range e.users {
		if err := headgate.Do(e.ctx, e.client, indebted, flowctl.Params{Labels: labels}, owe); err != nil {
			return err
		}
	}
	e.bytesPerKey = (between - before - float64(text)) / float64(keys)
	e.bytesPerDebt = (heap() - between - float64(text)) / float64(keys)
	return nil
}

// heap is the bytes in use.
func heap() float64 {
	runtime.GC()
	runtime.GC() // what the first has found to be unused
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

func (e *engines) close() error { return firstError(e.engine.Close(), e.beside.Close()) }

const (
	keyedLimiter = "Guard, one keyed rate limiter"
	ownKeys      = "Guard, one keyed rate limiter, a key for each caller"
	doKeyed      = "Do, one keyed rate limiter"
	oneOverride  = "Guard, one keyed rate limiter, 1 override"
	floor        = "floor: clock read, allocation of a flow, mutex"
	queueing     = "failsafe-go bulkhead with queueing"
)

func (e *engines) rows() []*benchtable.Row {
	pass := []benchtable.Target{benchtable.AtMost(benchtable.InTime, keyedLimiter, 2), benchtable.AtMost(benchtable.InAllocs, "", 2)} // of a scheduler where no flow waits
	return []*benchtable.Row{
		{Name: "Guard, no policy", Call: e.guard(nothing)},
		{Name: "Do, no policy", Call: e.do(nothing)},
		{Name: keyedLimiter, Call: e.guard(rateLimited), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, "failsafe-go rate limiter", 1.0/3),
			benchtable.AtMost(benchtable.InTime, "gobreaker", 2),
			benchtable.AtMost(benchtable.InTime, floor, 2.2),
			benchtable.AtMost(benchtable.InAllocs, "", 1),
		}},
		{Name: ownKeys, Call: e.guardOwn(rateLimited), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InScaling, ""),
			benchtable.AtMost(benchtable.InScaling, floor, 1),
			benchtable.Beside(benchtable.InParallel, keyedLimiter),
		}},
		{Name: oneOverride, Call: e.guard(exception), Targets: []benchtable.Target{benchtable.Beside(benchtable.InTime, keyedLimiter)}},
		{Name: fmt.Sprintf("Guard, one keyed rate limiter, %d overrides", manyOverrides), Call: e.guard(exceptions), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, oneOverride, 1.05),
		}},
		{Name: "Guard, one keyed rate limiter, local beside a store", Call: e.guardLocal, Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, keyedLimiter, 1.25),
			benchtable.AtMost(benchtable.MoreAllocs, keyedLimiter, 0),
		}},
		{Name: floor, Call: leastWork, Targets: []benchtable.Target{benchtable.Beside(benchtable.InScaling, "")}},
		{Name: doKeyed, Call: e.do(rateLimited), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InTime, "failsafe-go rate limiter"),
			benchtable.Beside(benchtable.InTime, "gobreaker"),
		}},
		{Name: "Do, one keyed rate limiter, settled", Call: e.settle, Targets: []benchtable.Target{ // no more than one more keyed check
			benchtable.AtMost(benchtable.InTime, doKeyed, 2),
			benchtable.AtMost(benchtable.MoreAllocs, doKeyed, 1),
		}},
		{Name: "Guard, one concurrency limiter", Call: e.guard(concurrency), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InTime, "failsafe-go bulkhead"),
		}},
		{Name: "Do, one concurrency limiter", Call: e.do(concurrency), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InTime, "failsafe-go bulkhead"),
		}},
		{Name: "Guard, one keyed quota scheduler", Call: e.guard(quota), Targets: pass},
		{Name: "Guard, one concurrency scheduler", Call: e.guard(slots), Targets: append(pass, benchtable.Beside(benchtable.InTime, queueing))},
		{Name: "Guard, one keyed circuit breaker", Call: e.guard(breaker), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, keyedLimiter, 1.2),
			benchtable.AtMost(benchtable.InAllocs, "", 1),
			benchtable.Beside(benchtable.InTime, "gobreaker"),
			benchtable.Beside(benchtable.InTime, "failsafe-go circuit breaker"),
			benchtable.Beside(benchtable.InParallel, keyedLimiter),
		}},
		{Name: "Guard, one sampler", Call: e.guard(sampled), Targets: []benchtable.Target{benchtable.Beside(benchtable.InTime, keyedLimiter)}},
		{Name: "Cached, a hit", Call: e.cached},
		{Name: "failsafe-go rate limiter", Call: func() func() error {
			limited := failsafe.With[int](ratelimiter.NewBurstyBuilder[int](1<<30, time.Second).Build())
			return func() error { _, err := limited.Get(work); return err }
		}},
		{Name: "failsafe-go bulkhead", Call: func() func() error {
			limited := failsafe.With[int](bulkhead.New[int](1_000_000))
			return func() error { _, err := limited.Get(work); return err }
		}},
		{Name: queueing, Call: func() func() error {
			limited := failsafe.With[int](bulkhead.NewBuilder[int](1_000_000).WithMaxWaitTime(time.Minute).Build())
			return func() error { _, err := limited.Get(work); return err }
		}},
		{Name: "failsafe-go circuit breaker", Call: func() func() error {
			guarded := failsafe.With[int](circuitbreaker.NewBuilder[int]().WithFailureRateThreshold(0.5, 20, 10*time.Second).WithDelay(10 * time.Second).Build())
			return func() error { _, err := guarded.Get(work); return err }
		}},
		{Name: "failsafe-go adaptive limiter", Call: func() func() error {
			limited := failsafe.With[int](adaptivelimiter.NewWithDefaults[int]())
			return func() error { _, err := limited.Get(work); return err }
		}},
		{Name: "gobreaker", Call: func() func() error {
			breaker := gobreaker.NewCircuitBreaker[int](gobreaker.Settings{})
			return func() error { _, err := breaker.Execute(work); return err }
		}},
		{Name: "x/time/rate, Allow and the call", Call: func() func() error {
			limiter := rate.NewLimiter(1e9, 1e9)
			return func() error {
				if !limiter.Allow() {
					return flowctl.ErrRejected
				}
				_, err := work()
				return err
			}
		}},
	}
}

// userRows are those that need many users, whose labels make for a large heap.
func (e *engines) userRows() []*benchtable.Row {
	const one = "Do, label maps in turn, one key"
	return []*benchtable.Row{
		{Name: one, Call: e.rotate(oneKey)},
		{Name: fmt.Sprintf("Do, label maps in turn, %d keys", len(e.users)), Call: e.rotate(manyKeys), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, one, 2.5),
		}},
	}
}

func (e *engines) guard(controlPoint string) func() func() error {
	guarded := headgate.Guard(e.client, controlPoint, flowctl.Params{Labels: oneLabel()}, workContext, nil)
	return func() func() error {
		return func() error { _, err := guarded(e.ctx); return err }
	}
}

// guardLocal asks the engine that has a store.
func (e *engines) guardLocal() func() error {
	guarded := headgate.Guard(e.local, rateLimited, flowctl.Params{Labels: oneLabel()}, workContext, nil)
	return func() error { _, err := guarded(e.ctx); return err }
}

// guardOwn gives each caller a key of its own.
func (e *engines) guardOwn(controlPoint string) func() func() error {
	var callers atomic.Int64
	return func() func() error {
		labels := map[string]string{"user_id": "caller-" + strconv.FormatInt(callers.Add(1), 10)}
		guarded := headgate.Guard(e.client, controlPoint, flowctl.Params{Labels: labels}, workContext, nil)
		return func() error { _, err := guarded(e.ctx); return err }
	}
}

// leastWork is what a flow cannot do without: it reads the monotonic clock once, has memory of its own, and takes an
// uncontended mutex.
func leastWork() func() error {
	var state struct {
		mu   sync.Mutex
		last time.Duration
		flow *flowctl.Flow // on the heap
	}
	begin := time.Now()
	return func() error {
		now := time.Since(begin)
		state.flow = new(flowctl.Flow)
		state.mu.Lock()
		state.last = now
		state.mu.Unlock()
		_, err := work()
		return err
	}
}

// cached finds its result in the cache, each time but the first.
func (e *engines) cached() func() error {
	report := headgate.Cached(e.client, nothing, flowctl.Params{ResultCacheKey: "report"}, workContext, nil, headgate.CachePolicy[int]{TTL: time.Hour})
	return func() error { _, err := report(e.ctx); return err }
}

func (e *engines) do(controlPoint string) func() func() error {
	params := flowctl.Params{Labels: oneLabel()}
	return func() func() error {
		return func() error { return headgate.Do(e.ctx, e.client, controlPoint, params, workFlow) }
	}
}

// settle runs flows that cost more than they took.
func (e *engines) settle() func() error {
	params := flowctl.Params{Labels: oneLabel()}
	work := func(_ context.Context, flow *flowctl.Flow) error {
		flow.Settle("tokens", 2)
		_, err := work()
		return err
	}
	return func() error { return headgate.Do(e.ctx, e.client, settled, params, work) }
}

// rotate calls for one user after the other, and starts anywhere.
func (e *engines) rotate(controlPoint string) func() func() error {
	return func() func() error {
		next := rand.IntN(len(e.users))
		return func() error {
			next = (next + 1) % len(e.users)
			return headgate.Do(e.ctx, e.client, controlPoint, flowctl.Params{Labels: e.users[next]}, workFlow)
		}
	}
}
