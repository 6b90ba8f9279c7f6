package engine_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A kindWithOverrides is a kind of component that has a label. Of its flows n are admitted, and of those of a value with the override so
// many more as it says. No flow ends meanwhile, but those of circuit breakers: they fail.
type kindWithOverrides struct {
	name     string
	of       func(overrides map[string]policy.Override) policy.Component
	override policy.Override
	n, with  int
	id       string
	ends     bool
}

func kindsWithOverrides() []kindWithOverrides {
	at := policy.At("point")
	never := policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}}
	return []kindWithOverrides{
		{"rate", func(o map[string]policy.Override) policy.Component {
			return policy.RateLimiter{Selectors: at, Capacity: 2, Interval: time.Hour, LimitBy: "user_id", Overrides: o}
		}, policy.Override{Capacity: 5}, 2, 5, "rate_limiter.0", false},
		{"slots", func(o map[string]policy.Override) policy.Component {
			return policy.ConcurrencyLimiter{Selectors: at, Max: 2, MaxInflight: time.Hour, LimitBy: "user_id", Overrides: o}
		}, policy.Override{Max: 5}, 2, 5, "concurrency_limiter.0", false},
		{"quota", func(o map[string]policy.Override) policy.Component {
			return policy.QuotaScheduler{Selectors: at, Capacity: 2, Interval: time.Hour, LimitBy: "user_id", Scheduler: never, Overrides: o}
		}, policy.Override{Capacity: 5}, 2, 5, "quota_scheduler.0", false},
		{"places", func(o map[string]policy.Override) policy.Component {
			return policy.ConcurrencyScheduler{Selectors: at, Max: 2, MaxInflight: time.Hour, LimitBy: "user_id", Scheduler: never, Overrides: o}
		}, policy.Override{Max: 5}, 2, 5, "concurrency_scheduler.0", false},
		{"calendar", func(o map[string]policy.Override) policy.Component {
			return policy.CalendarQuota{Selectors: at, Amount: 2, Period: policy.PeriodMonth, LimitBy: "user_id", Overrides: o}
		}, policy.Override{Amount: 5}, 2, 5, "calendar_quota.0", false},
		{"breaker", func(o map[string]policy.Override) policy.Component {
			return policy.CircuitBreaker{Selectors: at, FailureCount: 2, Window: time.Hour, OpenDuration: time.Hour, LimitBy: "user_id", Overrides: o}
		}, policy.Override{FailureCount: 5}, 2, 5, "circuit_breaker.0", true},
	}
}

// admitted returns how many flows of the user are admitted until one is rejected.
func (k kindWithOverrides) admitted(t *testing.T, c *flowctl.Client, who string) (n int) {
	t.Helper()
	for ; n < 100; n++ {
		flow := c.Start(t.Context(), "point", user(who))
		if flow.Decision() != flowctl.Accepted {
			return n
		}
		if k.ends {
			flow.SetStatus(flowctl.StatusError)
			end(flow)
		}
	}
	return n
}

// Every kind with a label is among kindsWithOverrides.
func TestOverridesOfAllKinds(t *testing.T) {
	var tested []policy.Component
	for _, k := range kindsWithOverrides() {
		tested = append(tested, k.of(map[string]policy.Override{"acme": k.override}))
	}
	for _, d := range (policy.Policy{Name: "p", Components: tested}).Describe() {
		if d.With == nil {
			t.Errorf("%s has no overrides", d.Name)
		}
	}
	allkinds.Covered(t, "kindsWithOverrides", allkinds.Having("LimitBy"), tested...)
}

// A value with an override has its own numbers, over all agents, and others do not. Long values find theirs, and hidden ones too.
func TestOverrides(t *testing.T) {
	long := strings.Repeat("x", 300)
	all := func(o policy.Override) map[string]policy.Override {
		return map[string]policy.Override{"acme": o, long: o, "": o, strings.Repeat("y", 100_000): o}
	}
	for _, k := range kindsWithOverrides() {
		for _, kind := range sides.EnginesAndStored {
			t.Run(k.name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					side := sides.Setup{Policies: sides.Policies(k.of(all(k.override)))}.New(t, kind)
					for _, tt := range []struct {
						who  string
						want int
					}{{"acme", k.with}, {"ann", k.n}, {"acme ", k.n}, {long, k.with}, {long + "x", k.n}, {long[:256], k.n}} {
						if k.ends {
							continue // TestOverridesOfCircuitBreakers: served ones hear of ends later
						}
						if got := k.admitted(t, side.Client, tt.who); got != tt.want {
							t.Errorf("%.20s: %d flows were admitted want %d", tt.who, got, tt.want)
						}
					}
				})
			})
		}
	}
}

// What a key has is shown by its own numbers: by Peek, and in the answer, which headers are made from.
func TestOverridesAreShown(t *testing.T) {
	for _, k := range kindsWithOverrides() {
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, c := opened(t, k.of(map[string]policy.Override{"acme": k.override}))
				want := float64(k.with)
				if k.ends {
					want = 1 // place for a probe
				}
				check := func(when string, left float64) {
					t.Helper()
					if got, err := peekAt(e, "p", k.id, "acme"); err != nil || got.Capacity != want || got.Remaining != left {
						t.Errorf("%s: Peek = %+v, %v want %v of %v left", when, got, err, left, want)
					}
				}
				check("before any flow", want)
				flow := c.Start(t.Context(), "point", user("acme"))
				d := flow.CheckResponse().GetLimiterDecisions()[0]
				tokens := d.GetRateLimiterInfo().GetTokensInfo()
				for _, other := range []interface {
					GetRemaining() float64
					GetCurrent() float64
				}{d.GetConcurrencyLimiterInfo().GetTokensInfo(), d.GetQuotaSchedulerInfo().GetTokensInfo(), d.GetConcurrencySchedulerInfo().GetTokensInfo()} {
					if got := other.GetRemaining() + other.GetCurrent(); got != 0 && got != want {
						t.Errorf("the answer tells of %v want %v", got, want)
					}
				}
				if got := tokens.GetRemaining() + tokens.GetCurrent(); tokens != nil && got != want {
					t.Errorf("the answer tells of %v want %v", got, want)
				}
				if k.ends {
					return
				}
				check("after a flow", want-1)
				if err := resetAt(e, "p", k.id, "acme"); err != nil {
					t.Error(err)
				}
				check("after Reset", want)
				if got := e.Stats().Components[0].Usage.Capacity; got != float64(k.n) {
					t.Errorf("Stats have a capacity of %v want %v, which values without an override have", got, k.n)
				}
			})
		})
	}
}

// A value may have a circuit breaker that opens later, or closes sooner.
func TestOverridesOfCircuitBreakers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c := opened(t, policy.CircuitBreaker{
			Selectors: policy.At("point"), FailureCount: 2, Window: time.Hour, OpenDuration: time.Hour, LimitBy: "user_id",
			Overrides: map[string]policy.Override{
				"acme": {FailureCount: 5, OpenDuration: time.Minute},
				"bulk": {FailureRatio: 0.5, MinFlows: 10, FailureCount: 100},
			},
		})
		k := kindWithOverrides{ends: true}
		for who, want := range map[string]int{"ann": 2, "acme": 5, "bulk": 10} {
			if got := k.admitted(t, c, who); got != want {
				t.Errorf("%s: %d flows failed before the breaker opened want %d", who, got, want)
			}
		}
		<-time.After(time.Minute)
		for who, want := range map[string]bool{"ann": false, "acme": true} {
			if got := c.Start(t.Context(), "point", user(who)).ShouldRun(); got != want {
				t.Errorf("%s: a flow runs after a minute: %v want %v", who, got, want)
			}
		}
	})
}

// An override of 0 refuses, and one of a header with credentials is found by the code that stands for the value.
func TestOverridesThatRefuse(t *testing.T) {
	const header = "http.request.header.authorization"
	e, c := opened(t, policy.ConcurrencyLimiter{
		Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour, LimitBy: header,
		Overrides: map[string]policy.Override{"Bearer banned": {Max: math.SmallestNonzeroFloat64}},
	})
	for value, want := range map[string]bool{"Bearer banned": false, "Bearer ann": true} {
		flow := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{header: value}})
		if flow.ShouldRun() != want {
			t.Errorf("%v: ShouldRun = %v want %v", flow.Err(), flow.ShouldRun(), want)
		}
		if u, err := peekAt(e, "p", "concurrency_limiter.0", value); err != nil || (u.Capacity > 0) != want {
			t.Errorf("Peek = %+v, %v", u, err)
		}
	}
	if r, ok := errors.AsType[*flowctl.RejectedError](c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{header: "Bearer banned"}}).Err()); !ok || r.RetryAfter() != 0 {
		t.Errorf("the rejection says %v want no time to retry", r)
	}
}

// Values without a bucket of their own share one by the component's own numbers.
func TestOverridesBeyondTheCap(t *testing.T) {
	k := kindsWithOverrides()[0]
	_, c := reloadable(t, []policy.Component{k.of(map[string]policy.Override{"acme": k.override})}, engine.WithKeyCap(1),
		engine.WithOverrides(func(string, string) (policy.Override, bool) { return k.override, true }))
	if got := k.admitted(t, c, "ann"); got != k.with {
		t.Errorf("%d flows were admitted want %d", got, k.with)
	}
	if got := k.admitted(t, c, "acme"); got != k.n {
		t.Errorf("%d flows beyond the cap were admitted want %d", got, k.n)
	}
}

// books is what a host knows of customers.
type books struct {
	mu      sync.Mutex
	numbers map[string]policy.Override
	asked   []string
}

func (b *books) override(component, value string) (policy.Override, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, component+" "+value)
	o, ok := b.numbers[value]
	return o, ok
}

func (b *books) set(value string, o policy.Override) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.numbers[value] = o
}

// times is how often it was asked since it was asked for that.
func (b *books) times() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(b.asked)
	b.asked = nil
	return n
}

// The host is asked about a value when its key is made, and about all keys by Apply. A policy's own override comes first.
func TestWithOverrides(t *testing.T) {
	long := strings.Repeat("x", 300)
	for _, k := range kindsWithOverrides() {
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host := &books{numbers: map[string]policy.Override{"db": k.override, "acme": {MaxDebt: -5}, long: k.override}}
				limit := k.of(map[string]policy.Override{"acme": k.override})
				e, c := reloadable(t, []policy.Component{limit}, engine.WithOverrides(host.override))
				if u, err := peekAt(e, "test", k.id, "db"); err != nil || !k.ends && u.Capacity != float64(k.with) {
					t.Errorf("Peek before any flow = %+v, %v want a capacity of %d", u, err, k.with)
				}
				host.times()
				for _, tt := range []struct {
					who         string
					want, asked int
				}{{"db", k.with, 1}, {"ann", k.n, 1}, {"acme", k.with, 0}, {long, k.with, 1}, {"db", 0, 0}} {
					if got := k.admitted(t, c, tt.who); got != tt.want {
						t.Errorf("%.9s: %d flows were admitted want %d", tt.who, got, tt.want)
					}
					if got := host.times(); got != tt.asked {
						t.Errorf("%.9s: the host was asked %d times want %d", tt.who, got, tt.asked)
					}
				}
				if k.ends {
					return
				}
				host.set("ann", k.override)
				host.set("db", policy.Override{})
				apply(t, e, limit)
				if got := host.times(); got != 2 {
					t.Errorf("Apply asked %d times want 2: for db and ann", got)
				}
				for who, want := range map[string]engine.Usage{
					"db": {Capacity: float64(k.n)}, "ann": {Capacity: float64(k.with), Remaining: float64(k.with - k.n)},
					"acme": {Capacity: float64(k.with)}, long: {Capacity: float64(k.with)},
				} {
					got, err := peekAt(e, "test", k.id, who)
					if got.InFlight, want.InFlight = 0, 0; who == "db" && strings.HasPrefix(k.id, "concurrency") {
						want.Remaining = float64(k.n - k.with) // the slots stay
					}
					if err != nil || got != want {
						t.Errorf("%.9s: Peek = %+v, %v want %+v", who, got, err, want)
					}
				}
				if got := e.Stats().Components[0].InvalidOverrides; got != 0 {
					t.Errorf("%d invalid overrides want none", got)
				}
			})
		})
	}
}

// What the host says wrong is not used, counted, and logged once a minute, without the value.
func TestWithOverridesThatAreInvalid(t *testing.T) {
	for _, k := range kindsWithOverrides() {
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var text syncBuilder
				wrong := policy.Override{Capacity: -1, Max: -1, Amount: -1}
				e, c := reloadable(t, []policy.Component{k.of(nil)}, engine.WithLogger(slog.New(slog.NewTextHandler(&text, nil))),
					engine.WithOverrides(func(string, string) (policy.Override, bool) { return wrong, true }))
				if got := k.admitted(t, c, "secret-customer"); got != k.n {
					t.Errorf("%d flows were admitted want %d", got, k.n)
				}
				apply(t, e, k.of(nil))
				if got := e.Stats().Components[0].InvalidOverrides; got != 2 {
					t.Errorf("%d invalid overrides want 2: of a new key, and of Apply", got)
				}
				<-time.After(3*time.Minute + time.Second)
				synctest.Wait()
				log := text.String()
				if strings.Count(log, "WithOverrides") != 1 || !strings.Contains(log, "times=2") || strings.Contains(log, "secret-customer") {
					t.Errorf("log = %q want one line", log)
				}
			})
		})
	}
}

// syncBuilder is a log.
type syncBuilder struct {
	mu sync.Mutex
	strings.Builder
}

func (b *syncBuilder) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Builder.Write(p)
}

func (b *syncBuilder) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Builder.String()
}

// A host that panics does not keep keys from moving to the next numbers.
func TestWithOverridesThatPanics(t *testing.T) {
	var panics atomic.Bool
	k := kindsWithOverrides()[0]
	e, c := reloadable(t, []policy.Component{k.of(nil)}, engine.WithOverrides(func(string, string) (policy.Override, bool) {
		if panics.Load() {
			panic("the books are closed")
		}
		return policy.Override{}, false
	}))
	k.admitted(t, c, "ann")
	panics.Store(true)
	for _, capacity := range []float64{3, 4, 5} {
		func() {
			defer func() {
				if recover() == nil {
					t.Error("Apply did not panic")
				}
			}()
			apply(t, e, policy.RateLimiter{Selectors: policy.At("point"), Capacity: capacity, Interval: time.Hour, LimitBy: "user_id"})
		}()
		if got, err := peekAt(e, "test", k.id, "ann"); err != nil || got != (engine.Usage{Capacity: capacity, Remaining: capacity - 2}) {
			t.Errorf("Peek = %+v, %v want a capacity of %v", got, err, capacity)
		}
	}
}

// Flows come while numbers change, from the policies and from the host, keys are forgotten and made again, and no slot is lost.
func TestOverridesConcurrently(t *testing.T) {
	var turn atomic.Int64
	host := func(_, value string) (policy.Override, bool) {
		n := turn.Add(1)
		return policy.Override{Max: float64(1 + n%4), MaxInflight: time.Duration(1+n%97) * time.Hour}, value != "user-0"
	}
	limit := func(i int) []policy.Component {
		overrides := map[string]policy.Override{"user-1": {Max: float64(1 + i%3)}}
		return []policy.Component{
			policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: float64(1 + i%2), MaxInflight: time.Hour, LimitBy: "user_id", Overrides: overrides},
			policy.ConcurrencyScheduler{
				Selectors: policy.At("point"), Max: float64(1 + i%2), MaxInflight: time.Hour, LimitBy: "user_id", Overrides: overrides,
				Scheduler: policy.Scheduler{MaxQueue: 1 + i%5},
			},
		}
	}
	e, c := reloadable(t, limit(0), engine.WithOverrides(host), engine.WithKeyCap(8))
	ctx, cancel := context.WithCancel(context.Background())
	var flows sync.WaitGroup
	var ran atomic.Int64
	for i := range 8 {
		flows.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				flow := start(t, c, user(fmt.Sprint("user-", (i+n)%12)))
				if flow.ShouldRun() {
					ran.Add(1)
				}
				if got := end(flow); got.Held != got.Returned {
					t.Errorf("End = %+v want all given back", got)
				}
			}
		})
	}
	for ran.Load() < 100 {
		<-time.After(time.Millisecond)
	}
	for i := range race.Pick(50, 200) {
		apply(t, e, limit(i)...)
	}
	cancel()
	flows.Wait()
	for _, id := range []string{"concurrency_limiter.0", "concurrency_scheduler.0"} {
		for i := range 12 {
			if got, err := peekAt(e, "test", id, fmt.Sprint("user-", i)); err != nil || got.InFlight != 0 || got.Remaining != got.Capacity || got.Waiting != 0 {
				t.Errorf("%s: Peek = %+v, %v want all free", id, got, err)
			}
		}
	}
}

// Whatever numbers follow each other, a key gets no more during any of them than their capacity and rate allow, and over all no more than
// the first capacity, what later ones had more than those before, and the rates allow.
func TestAppliesKeepTheLimit(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		type numbers struct{ capacity, fill float64 }
		draw := func() numbers {
			return numbers{float64(rapid.IntRange(0, 20).Draw(rt, "capacity")), float64(rapid.IntRange(0, 10).Draw(rt, "fill"))}
		}
		step := rapid.Bool().Draw(rt, "step")
		inOverride := rapid.Bool().Draw(rt, "override")
		first := draw()
		var admitted, granted, inForce, since, fills float64
		synctest.Test(t, func(t *testing.T) {
			limit := func(n numbers) policy.Component {
				l := policy.RateLimiter{Selectors: policy.At("point"), Capacity: n.capacity, Fill: n.fill, Interval: time.Second, StepFill: step, LimitBy: "user_id"}
				if inOverride {
					o := policy.Override{Capacity: n.capacity, Fill: n.fill}
					for _, f := range []*float64{&o.Capacity, &o.Fill} {
						if *f == 0 {
							*f = math.SmallestNonzeroFloat64
						}
					}
					l.Capacity, l.Fill, l.Overrides = 7, 7, map[string]policy.Override{"u": o}
				}
				return l
			}
			e, c := reloadable(t, []policy.Component{limit(first)})
			now := first
			granted = now.capacity
			for range rapid.IntRange(1, 60).Draw(rt, "steps") {
				switch rapid.IntRange(0, 3).Draw(rt, "what") {
				case 0:
					wait := time.Duration(rapid.IntRange(0, 3000).Draw(rt, "wait")) * time.Millisecond
					<-time.After(wait)
					granted += now.fill * wait.Seconds()
					since += now.fill * wait.Seconds()
				case 1:
					next := draw()
					apply(t, e, limit(next))
					granted += max(next.capacity-now.capacity, 0)
					now, inForce, since = next, 0, 0
					fills = max(fills, next.fill)
				default:
					if c.Start(t.Context(), "point", user("u")).ShouldRun() {
						admitted++
						inForce++
					}
				}
				slack := 1e-6
				if step {
					slack += max(fills, first.fill) // a step that began before
				}
				if inForce > now.capacity+since+slack || admitted > granted+slack {
					rt.Fatalf("%v admitted by %+v, which have brought %v; %v of %v in all", inForce, now, since, admitted, granted)
				}
			}
		})
	})
}

// When numbers change, every kind keeps what its keys have used, whether they are its own or those of an override.
func TestApplyCarries(t *testing.T) {
	for _, k := range kindsWithOverrides() {
		t.Run(k.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, c := reloadable(t, []policy.Component{k.of(nil)})
				with := k.of(map[string]policy.Override{"ann": k.override})
				if got := k.admitted(t, c, "ann"); got != k.n {
					t.Errorf("%d flows were admitted want %d", got, k.n)
				}
				more := k.with - k.n
				if k.ends {
					more = 0 // it is open
				}
				for i, tt := range []struct {
					limit policy.Component
					want  int
				}{{with, more}, {with, 0}, {k.of(nil), 0}, {k.of(map[string]policy.Override{"bob": k.override}), 0}} {
					apply(t, e, tt.limit)
					if got := k.admitted(t, c, "ann"); got != tt.want {
						t.Errorf("%d flows were admitted after change %d want %d", got, i, tt.want)
					}
				}
				if got := k.admitted(t, c, "bob"); got != k.with {
					t.Errorf("%d flows of bob were admitted want %d", got, k.with)
				}
				if got := e.Stats().Components[0]; got.Keys != 2 || got.Accepted != uint64(k.n+more+k.with) {
					t.Errorf("Stats = %d keys, %d accepted want 2, %d: they go on", got.Keys, got.Accepted, k.n+more+k.with)
				}
			})
		})
	}
}

// A debt is paid at the new rate, and a larger bucket pays some of it.
func TestApplyCarriesDebt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := func(capacity, fill float64) policy.Component {
			return limiter(func(l *policy.RateLimiter) { l.Capacity, l.Fill, l.TokensLabel = capacity, fill, "cost" })[0]
		}
		e, c := reloadable(t, []policy.Component{limit(4, 0)})
		flow := start(t, c, flowctl.Params{})
		flow.Settle("cost", 7)
		end(flow)
		peek(t, e, "rate_limiter.0", engine.Usage{Capacity: 4, Remaining: -3})
		apply(t, e, limit(2, 1))
		peek(t, e, "rate_limiter.0", engine.Usage{Capacity: 2, Remaining: -3})
		<-time.After(2 * time.Second)
		peek(t, e, "rate_limiter.0", engine.Usage{Capacity: 2, Remaining: -1})
		apply(t, e, limit(5, 1))
		peek(t, e, "rate_limiter.0", engine.Usage{Capacity: 5, Remaining: 2})
	})
}

// A flow that waits is served when its turn comes by the new numbers, and one that would cost more than there ever is is rejected.
func TestApplyServesByTheNewNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		queue := func(capacity, fill float64) policy.Component {
			return quota(func(q *policy.QuotaScheduler) {
				q.Capacity, q.Fill, q.Interval, q.LimitBy = capacity, fill, time.Minute, "user_id"
				q.Scheduler = policy.Scheduler{TokensLabel: "tokens", MaxQueue: 3}
			})
		}
		e, c := reloadable(t, []policy.Component{queue(8, 1)})
		ask := func(tokens string) *flowctl.Flow {
			return c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "u", "tokens": tokens}, CheckTimeout: time.Hour})
		}
		ask("8")
		begin := time.Now()
		var flows sync.WaitGroup
		wait := func(tokens string, decision flowctl.Decision, at time.Duration) {
			flows.Go(func() {
				if flow := ask(tokens); flow.Decision() != decision || (time.Since(begin)-at).Abs() > time.Millisecond {
					t.Errorf("%s tokens: %v after %v want %v after %v", tokens, flow.Decision(), time.Since(begin), decision, at)
				}
			})
			synctest.Wait()
		}
		wait("2", flowctl.Accepted, 2*time.Minute) // a token has come in the first minute, and 7 of 4 are used then
		wait("7", flowctl.Rejected, 2*time.Minute) // when its turn would come
		wait("2", flowctl.Accepted, 3*time.Minute)
		if got := ask("1"); got.Decision() != flowctl.Rejected {
			t.Errorf("a flow beyond the room is %v", got.Decision())
		}
		<-time.After(time.Minute)
		apply(t, e, queue(4, 2)) // which owes nothing
		if got, err := peekAt(e, "test", "quota_scheduler.0", "u"); err != nil || got.Waiting != 3 {
			t.Errorf("Peek = %+v, %v want three that wait", got, err)
		}
		flows.Wait()
	})
}
