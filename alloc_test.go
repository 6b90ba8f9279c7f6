package headgate_test

import (
	"context"
	"testing"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// keyedClient asks an engine with one rate limiter that never runs out, keyed by a label.
func keyedClient(tb testing.TB) *flowctl.Client {
	tb.Helper()
	return engineClient(tb, policy.RateLimiter{
		Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id",
	})
}

// components are some that let every flow in at once.
func components() map[string]policy.Component {
	s := policy.Scheduler{WorkloadLabel: "user_id", FairnessLabel: "user_id", Workloads: []policy.Workload{{
		Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}},
	}}}
	return map[string]policy.Component{
		"quota scheduler": policy.QuotaScheduler{
			Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id", Scheduler: s,
		},
		"concurrency limiter": policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 100, MaxInflight: time.Minute, LimitBy: "user_id"},
		"concurrency scheduler": policy.ConcurrencyScheduler{
			Selectors: policy.At(point), Max: 100, MaxInflight: time.Minute, LimitBy: "user_id", Scheduler: s,
		},
		"load scheduler": policy.LoadScheduler{Selectors: policy.At(point), Scheduler: s, LoadMultiplier: policy.Constant(1)},
		"AIMD load scheduler": policy.AIMDLoadScheduler{
			Selectors: policy.At(point), Scheduler: s, WorkloadLatencyTokens: true, Setpoint: policy.Constant(100),
			Signal: policy.MeanLatency{Selectors: policy.At(point), Over: time.Minute},
		},
		"sampler": policy.Sampler{Selectors: policy.At(point), AcceptPercentage: 100, SessionLabel: "user_id"},
		"load ramp": policy.LoadRamp{
			Selectors: policy.At(point), Steps: []policy.RampStep{{Target: 100}}, Start: true, SessionLabel: "user_id",
		},
		"calendar quota": policy.CalendarQuota{
			Selectors: policy.At(point), Amount: 1e12, Period: policy.PeriodHour, TimeZone: "Europe/Berlin", LimitBy: "user_id",
		},
		"circuit breaker": policy.CircuitBreaker{
			Selectors: policy.At(point), FailureRatio: 0.5, MinFlows: 10, SlowAfter: time.Minute, Window: 10 * time.Second,
			OpenDuration: 5 * time.Second, LimitBy: "user_id",
		},
	}
}

// engineClient is a client of an engine with the components; with none it accepts every flow.
func engineClient(tb testing.TB, c ...policy.Component) *flowctl.Client {
	tb.Helper()
	return engineClientWith(tb, nil, c...)
}

// engineClientWith is engineClient with an option of the client's, unless that is nil.
func engineClientWith(tb testing.TB, option flowctl.Option, c ...policy.Component) *flowctl.Client {
	tb.Helper()
	var policies []policy.Policy
	if len(c) > 0 {
		policies = []policy.Policy{{Name: "test", Components: c}}
	}
	e, err := engine.New(policies)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = e.Close() })
	var opts []flowctl.Option
	if option != nil {
		opts = append(opts, option)
	}
	client, err := flowctl.New(e, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	return client
}

var userParams = flowctl.Params{Labels: map[string]string{"user_id": "u"}}

func work(context.Context) (int, error) { return 42, nil }

// calls are the ways to guard a function, each with one flow to a call.
func calls(client *flowctl.Client) map[string]func(context.Context) error {
	guard := headgate.Guard(client, point, userParams, work, nil)
	retrying := headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{}), point, userParams, work, nil)
	guardFunc := headgate.GuardFunc(client, point,
		func(_ context.Context, p flowctl.Params) flowctl.Params { return p },
		func(ctx context.Context, _ flowctl.Params) (int, error) { return work(ctx) }, nil)
	return map[string]func(context.Context) error{
		"Guard": func(ctx context.Context) error {
			_, err := guard(ctx)
			return err
		},
		"Retrying": func(ctx context.Context) error {
			_, err := retrying(ctx)
			return err
		},
		"GuardFunc": func(ctx context.Context) error {
			_, err := guardFunc(ctx, userParams)
			return err
		},
		"Do": func(ctx context.Context) error {
			return headgate.Do(ctx, client, point, userParams, func(ctx context.Context, _ *flowctl.Flow) error {
				_, err := work(ctx)
				return err
			})
		},
	}
}

// A guarded call on the engine allocates its flow, and nothing else, where a keyed rate limiter or another component has
// room for it.
func TestAllocations(t *testing.T) {
	ctx := t.Context()
	clients := map[string]*flowctl.Client{"rate limiter": keyedClient(t)}
	tested := []policy.Component{policy.RateLimiter{}}
	for kind, c := range components() {
		clients[kind] = engineClient(t, c)
		tested = append(tested, c)
	}
	allkinds.Covered(t, "components", allkinds.Any, tested...)
	for kind, client := range clients {
		for name, call := range calls(client) {
			if got := testing.AllocsPerRun(1000, func() {
				if err := call(ctx); err != nil {
					t.Error(err)
				}
			}); got != 1 {
				t.Errorf("%s, %s: %v allocations a call want 1", kind, name, got)
			}
		}
	}
	hook := flowctl.WithOnDecision(func(_ context.Context, f *flowctl.Flow) { _ = f.Decision() })
	for name, call := range calls(engineClientWith(t, hook)) {
		if got := testing.AllocsPerRun(1000, func() { _ = call(ctx) }); got != 1 {
			t.Errorf("%s with a hook: %v allocations a call want 1", name, got)
		}
	}
	for name, call := range calls(nil) {
		if got := testing.AllocsPerRun(1000, func() { _ = call(ctx) }); got != 1 {
			t.Errorf("%s with a nil client: %v allocations a call want 1", name, got)
		}
	}
}

// What a flow's parameters ask for beyond labels costs a second object at the most, and the lookup of a cache one more
// for what it finds.
func TestAllocationsByParams(t *testing.T) {
	client := keyedClient(t)
	for name, row := range map[string]struct {
		params func(*flowctl.Params)
		want   float64
	}{
		"IsFailure":      {func(p *flowctl.Params) { p.IsFailure = func(error) bool { return false } }, 1},
		"CheckTimeout":   {func(p *flowctl.Params) { p.CheckTimeout = time.Minute }, 1},
		"MaxWait":        {func(p *flowctl.Params) { p.MaxWait = time.Minute }, 1},
		"NoWait":         {func(p *flowctl.Params) { p.MaxWait = flowctl.NoWait }, 1},
		"no MaxWait":     {func(p *flowctl.Params) { p.MaxWait = -1 }, 1},
		"FailClosed":     {func(p *flowctl.Params) { p.OnUnreachable = flowctl.FailClosed }, 1},
		"ResultCacheKey": {func(p *flowctl.Params) { p.ResultCacheKey = "missing" }, 3},
	} {
		params := userParams
		row.params(&params)
		guard := headgate.Guard(client, point, params, work, nil)
		if got := testing.AllocsPerRun(1000, func() {
			if _, err := guard(t.Context()); err != nil {
				t.Error(err)
			}
		}); got != row.want {
			t.Errorf("%s: %v allocations a call want %v", name, got, row.want)
		}
	}
}

// A settled flow allocates one object more, at its first Settle.
func TestAllocationsOfSettle(t *testing.T) {
	s := policy.Scheduler{TokensLabel: "tokens", WorkloadLabel: "user_id", FairnessLabel: "user_id"}
	for kind, c := range map[string]policy.Component{
		"rate limiter": policy.RateLimiter{
			Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id", TokensLabel: "tokens",
		},
		"quota scheduler": policy.QuotaScheduler{
			Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id", Scheduler: s,
		},
		"calendar quota": policy.CalendarQuota{
			Selectors: policy.At(point), Amount: 1e12, Period: policy.PeriodHour, LimitBy: "user_id", TokensLabel: "tokens",
		},
		"load scheduler": policy.LoadScheduler{Selectors: policy.At(point), Scheduler: s, LoadMultiplier: policy.Constant(1)},
		"sampler":        policy.Sampler{Selectors: policy.At(point), AcceptPercentage: 100},
	} {
		client := engineClient(t, c)
		for _, tokens := range []float64{0, 1, 2} {
			if got := testing.AllocsPerRun(1000, func() {
				flow := client.Start(t.Context(), point, userParams)
				flow.Settle("tokens", 100)
				flow.Settle("tokens", tokens)
				if r, err := flow.End(t.Context()); err != nil || !r.Settled {
					t.Error(r, err)
				}
			}); got != 2 {
				t.Errorf("%s, %v tokens: %v allocations a flow want 2", kind, tokens, got)
			}
		}
	}
}

// one is a codec that allocates nothing.
type one struct{}

func (one) Encode(int) ([]byte, error) { return []byte{1}, nil }
func (one) Decode([]byte) (int, error) { return 1, nil }

// A hit costs what a flow with a lookup does, and the run that others may share.
func TestAllocationsOfAHit(t *testing.T) {
	client := keyedClient(t)
	params := userParams
	params.ResultCacheKey = point
	if err := headgate.Do(t.Context(), client, point, params, func(ctx context.Context, flow *flowctl.Flow) error {
		return flow.SetResultCache(ctx, []byte{1}, time.Hour)
	}); err != nil {
		t.Fatal(err)
	}
	for name, onReject := range map[string]fallback.Func[int]{"keeps nothing": nil, "keeps the last result": fallback.Value(1)} {
		cached := headgate.Cached(client, point, params, func(context.Context) (int, error) { return 0, errWork },
			onReject, headgate.CachePolicy[int]{Codec: one{}})
		if got := testing.AllocsPerRun(1000, func() {
			if _, err := cached(t.Context()); err != nil {
				t.Error(err)
			}
		}); got != 5 {
			t.Errorf("%s: %v allocations a call want 5", name, got)
		}
	}
}

func BenchmarkEngine(b *testing.B) {
	client := keyedClient(b)
	for name, call := range calls(client) {
		b.Run(name, func(b *testing.B) {
			ctx := b.Context()
			b.ReportAllocs()
			for b.Loop() {
				_ = call(ctx)
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			ctx := b.Context()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					_ = call(ctx)
				}
			})
		})
	}
}

func BenchmarkSettle(b *testing.B) {
	client := engineClient(b, policy.RateLimiter{
		Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "user_id", TokensLabel: "tokens",
	})
	for _, name := range []string{"kept", "settled"} {
		b.Run(name, func(b *testing.B) {
			ctx := b.Context()
			b.ReportAllocs()
			for b.Loop() {
				flow := client.Start(ctx, point, userParams)
				if name == "settled" {
					flow.Settle("tokens", 2)
				}
				_, _ = flow.End(ctx)
			}
		})
	}
}

func BenchmarkComponent(b *testing.B) {
	for kind, c := range components() {
		b.Run(kind, func(b *testing.B) {
			call, ctx := calls(engineClient(b, c))["Guard"], b.Context()
			b.ReportAllocs()
			for b.Loop() {
				_ = call(ctx)
			}
		})
	}
}

func BenchmarkRemote(b *testing.B) {
	client := flowtest.NewAgent(b).Client()
	for name, call := range calls(client) {
		b.Run(name, func(b *testing.B) {
			ctx := b.Context()
			b.ReportAllocs()
			for b.Loop() {
				_ = call(ctx)
			}
		})
	}
}
