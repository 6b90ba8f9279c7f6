package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// byArg has the argument for a key, and as the label that limits go by.
func byArg(_ context.Context, arg string) flowctl.Params {
	return flowctl.Params{ResultCacheKey: arg, Labels: map[string]string{"user_id": arg}}
}

// Each key has runs and results of its own.
func TestCachedFuncByKey(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var mu sync.Mutex
		runs := make(map[string]int)
		report := headgate.CachedFunc(client, "report", byArg, func(_ context.Context, month string) (string, error) {
			mu.Lock()
			runs[month]++
			mu.Unlock()
			<-time.After(time.Second)
			return "report for " + month, nil
		}, nil, headgate.CachePolicy[string]{TTL: time.Hour})
		for range 2 {
			var wg sync.WaitGroup
			for _, month := range []string{"April", "May"} {
				for range 10 {
					wg.Go(func() {
						if got, err := report(t.Context(), month); got != "report for "+month || err != nil {
							t.Errorf("report(%s) = %q, %v", month, got, err)
						}
					})
				}
			}
			wg.Wait()
			synctest.Wait() // until they are stored
		}
		if runs["April"] != 1 || runs["May"] != 1 {
			t.Errorf("runs %v want one of each", runs)
		}
	})
}

// A function of each kind shares runs and results under one key.
func TestCachedFuncSharesWithCached(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		run := func(context.Context) (int64, error) {
			<-time.After(time.Second)
			return runs.Add(1), nil
		}
		byFunc := headgate.CachedFunc(client, "report", byArg, func(ctx context.Context, _ string) (int64, error) { return run(ctx) },
			nil, headgate.CachePolicy[int64]{})
		cached := headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: "May"}, run, nil, headgate.CachePolicy[int64]{})
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = byFunc(t.Context(), "May") })
		wg.Go(func() { _, _ = cached(t.Context()) })
		wg.Wait()
		synctest.Wait() // until it is stored
		if got, err := byFunc(t.Context(), "May"); got != 1 || err != nil {
			t.Errorf("byFunc() = %d, %v want the first run's", got, err)
		}
	})
}

// A call without a key is one of GuardFunc: a flow and a run of its own, of which nothing is kept.
func TestCachedFuncWithoutAKey(t *testing.T) {
	for name, params := range map[string]func(context.Context, string) flowctl.Params{
		"no params": nil, "no key": func(context.Context, string) flowctl.Params { return flowctl.Params{} },
	} {
		t.Run(name, func(t *testing.T) {
			overAll(t, func(t *testing.T, client *flowctl.Client) {
				starts := &starter{client: client}
				var runs atomic.Int64
				report := headgate.CachedFunc(starts, "report", params, func(_ context.Context, arg string) (string, error) {
					<-time.After(time.Second)
					runs.Add(1)
					return arg, nil
				}, nil, headgate.CachePolicy[string]{})
				for range 2 {
					var wg sync.WaitGroup
					for i := range 5 {
						wg.Go(func() {
							if got, err := report(t.Context(), fmt.Sprint(i)); got != fmt.Sprint(i) || err != nil {
								t.Errorf("report(%d) = %q, %v", i, got, err)
							}
						})
					}
					wg.Wait()
				}
				if runs.Load() != 10 || len(starts.flows) != 10 {
					t.Errorf("%d runs, %d flows want 10", runs.Load(), len(starts.flows))
				}
			})
		})
	}
}

// The last results are kept by key, and those that were found or made longest ago go first.
func TestCachedFuncLastGood(t *testing.T) {
	tests := []struct {
		name     string
		lastGood int
		calls    []string
		kept     []string
		gone     []string
	}{
		{name: "none", lastGood: -1, calls: []string{"a"}, gone: []string{"a", ""}},
		{name: "one", lastGood: 1, calls: []string{"a", "b"}, kept: []string{"b"}, gone: []string{"a"}},
		{name: "two", lastGood: 2, calls: []string{"a", "b", "c"}, kept: []string{"b", "c"}, gone: []string{"a"}},
		{name: "found again", lastGood: 2, calls: []string{"a", "b", "a", "c"}, kept: []string{"a", "c"}, gone: []string{"b"}},
		{name: "many by default", calls: months(256), kept: months(256), gone: []string{"another"}},
		{name: "not any number by default", calls: months(257), kept: months(257)[1:], gone: months(1)},
		{name: "without a key", calls: []string{""}, gone: []string{""}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New(nil)
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				client, err := flowctl.New(e)
				if err != nil {
					t.Fatal(err)
				}
				report := headgate.CachedFunc(client, "report", byArg, func(_ context.Context, month string) (string, error) {
					return "report for " + month, nil
				}, fallback.For[string](fallback.Stale[string](time.Hour)), headgate.CachePolicy[string]{TTL: time.Hour, LastGood: tt.lastGood})
				for _, month := range tt.calls {
					if _, err := report(t.Context(), month); err != nil {
						t.Fatal(err)
					}
					<-time.After(time.Millisecond)
				}
				if err := e.Apply([]policy.Policy{{Name: "closed", Components: []policy.Component{policy.RateLimiter{
					Selectors: policy.At("report"), Interval: time.Hour, // no capacity
				}}}}); err != nil {
					t.Fatal(err)
				}
				// What a context further out has is another function's.
				ctx := fallback.WithLast(t.Context(), "another's", time.Now().Add(time.Hour))
				for _, month := range tt.kept {
					if got, err := report(ctx, month); got != "report for "+month || err != nil {
						t.Errorf("report(%s) = %q, %v want the last result", month, got, err)
					}
				}
				for _, month := range tt.gone {
					if got, err := report(ctx, month); got != "" || !errors.Is(err, flowctl.ErrRejected) {
						t.Errorf("report(%s) = %q, %v want the rejection", month, got, err)
					}
				}
			})
		})
	}
}

func months(n int) []string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprint("month ", i))
	}
	return names
}

// A LastGood that is negative has Cached keep nothing too.
func TestCachedKeepsNothing(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		cached := headgate.Cached(side.Client, "report", flowctl.Params{}, work, fallback.Stale[int](time.Hour), headgate.CachePolicy[int]{LastGood: -1})
		_, _ = cached(t.Context())
		synctest.Wait()
		side.Answer(rejected(0))
		if got, err := cached(t.Context()); got != 0 || !errors.Is(err, flowctl.ErrRejected) {
			t.Errorf("cached() = %d, %v want the rejection", got, err)
		}
	})
}

// Each call's fallback gets the call's own argument, also where the calls share a rejection.
func TestCachedFuncFallbacks(t *testing.T) {
	overEngines(t, oneReport, func(t *testing.T, client *flowctl.Client, _ *engine.Engine) {
		defer busy(t, client)()
		type query struct{ key, user string }
		report := headgate.CachedFunc(client, "report",
			func(_ context.Context, q query) flowctl.Params {
				return flowctl.Params{ResultCacheKey: q.key, CheckTimeout: time.Second}
			},
			func(context.Context, query) (string, error) { return "", errors.New("ran") },
			func(_ context.Context, q query, err error) (string, error) { return "nothing for " + q.user, nil },
			headgate.CachePolicy[string]{})
		var wg sync.WaitGroup
		for i := range 10 {
			user := fmt.Sprint("user ", i)
			wg.Go(func() {
				if got, err := report(t.Context(), query{"the same", user}); got != "nothing for "+user || err != nil {
					t.Errorf("report() = %q, %v", got, err)
				}
			})
		}
		wg.Wait()
	})
}

// Many keys, rejections and runs at the same time.
func TestCachedFuncConcurrently(t *testing.T) {
	half := []policy.Component{policy.RateLimiter{Selectors: policy.At("report"), Capacity: 100, Fill: 100, Interval: time.Second}}
	overEngines(t, half, func(t *testing.T, client *flowctl.Client, _ *engine.Engine) {
		report := headgate.CachedFunc(client, "report", byArg, func(_ context.Context, month string) (string, error) {
			return month, nil
		}, func(ctx context.Context, month string, err error) (string, error) {
			if got, err := fallback.Stale[string](time.Second)(ctx, err); err == nil {
				return got, nil
			}
			return month, nil
		}, headgate.CachePolicy[string]{TTL: 10 * time.Millisecond, LastGood: 3})
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				month := fmt.Sprint(i % 7)
				for range 20 {
					if got, err := report(t.Context(), month); got != month || err != nil {
						t.Errorf("report(%s) = %q, %v", month, got, err)
					}
					<-time.After(20 * time.Millisecond)
				}
			})
		}
		wg.Wait()
	})
}

// A flow that could wait no longer decides for calls that may wait no longer than it, and not for others, whether MaxWait or
// a check timeout says how long they may.
func TestCachedFuncMayWaitLonger(t *testing.T) {
	const second = time.Second
	type params = flowctl.Params
	at := policy.At("report")
	queues := map[string]policy.Component{ // which let the next flow in after 3 s
		"slots":  policy.ConcurrencyScheduler{Selectors: at, Max: 1, MaxInflight: time.Hour},
		"tokens": policy.QuotaScheduler{Selectors: at, Capacity: 1, Fill: 1, Interval: 3 * second},
	}
	for _, tt := range []struct {
		name         string
		timeout      time.Duration // the client's
		first, other params        // of a call, and of one that joins its run
		runs         bool          // the other call
	}{
		{name: "the same MaxWait", first: params{MaxWait: second}, other: params{MaxWait: second}},
		{name: "not at all", first: params{MaxWait: second}, other: params{MaxWait: flowctl.NoWait}},
		{name: "for the check timeout", first: params{MaxWait: second}},
		{name: "a longer MaxWait", first: params{MaxWait: second}, other: params{MaxWait: time.Minute}, runs: true},
		{name: "without limit", first: params{MaxWait: second}, other: params{MaxWait: -1}, runs: true},
		{name: "MaxWait, not the check timeout", first: params{MaxWait: second}, other: params{MaxWait: second, CheckTimeout: time.Minute}},
		{name: "a longer check timeout than MaxWait", first: params{MaxWait: second}, other: params{CheckTimeout: time.Minute}, runs: true},
		{name: "no check timeout", first: params{MaxWait: second}, other: params{CheckTimeout: -1}, runs: true},
		{name: "the client's check timeout is longer", timeout: 5 * second, first: params{CheckTimeout: second}, runs: true},
		{name: "the client has no check timeout", timeout: -1, first: params{CheckTimeout: second}, runs: true},
		{name: "the same check timeout"},
		{name: "the same check timeout, said once", other: params{CheckTimeout: 200 * time.Millisecond}},
		{name: "a shorter check timeout", other: params{CheckTimeout: 100 * time.Millisecond}},
		{name: "a longer check timeout", other: params{CheckTimeout: 5 * second}, runs: true},
		{name: "MaxWait is longer than the check timeout", other: params{MaxWait: time.Minute}, runs: true},
		{name: "MaxWait is no limit", other: params{MaxWait: -1}, runs: true},
		{name: "the first does not wait", first: params{MaxWait: flowctl.NoWait}, other: params{CheckTimeout: 5 * second}, runs: true},
	} {
		for queue, component := range queues {
			t.Run(tt.name+", "+queue, func(t *testing.T) {
				setup := sides.Setup{Policies: sides.Policies(component)}
				if tt.timeout != 0 {
					setup.Options = append(setup.Options, flowctl.WithCheckTimeout(tt.timeout))
				}
				setup.InBubbles(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
					report := headgate.CachedFunc(&lateStarter{Client: side.Client}, "report",
						func(_ context.Context, p params) params {
							p.ResultCacheKey = "May"
							return p
						},
						func(context.Context, params) (int, error) { return 1, nil }, nil, headgate.CachePolicy[int]{})
					holder := side.Client.Start(t.Context(), "report", params{})
					time.AfterFunc(3*second, func() { _, _ = holder.End(t.Context()) })
					var calls sync.WaitGroup
					calls.Go(func() {
						if _, err := report(t.Context(), tt.first); !errors.Is(err, flowctl.ErrRejected) {
							t.Errorf("the first call: %v", err)
						}
					})
					<-time.After(late / 2)
					_, err := report(t.Context(), tt.other)
					if tt.runs != (err == nil) || err != nil && !errors.Is(err, flowctl.ErrRejected) {
						t.Errorf("the other call: %v", err)
					}
					calls.Wait()
					<-time.After(4 * second) // until the holder has ended
				})
			})
		}
	}
}

// A call that may wait longer asks anew after a rejection that its patience can change, and after no other.
func TestCachedFuncMayWaitLongerByCause(t *testing.T) {
	byPatience := map[flowctl.RejectCause]bool{
		flowctl.CauseNone: true, flowctl.CauseLate: true, flowctl.CauseQueueTooLong: true, flowctl.CauseTimeout: true,
	}
	for cause := range flowctl.RejectCause(agentapi.Causes) {
		for _, reason := range []flowctl.RejectReason{flowctl.ReasonNoTokens, flowctl.ReasonRateLimited} {
			t.Run(fmt.Sprintf("%v, %v", reason, cause), func(t *testing.T) {
				setup := sides.Setup{Answers: []flowtest.Answer{{Reason: reason, Cause: cause}, accepted}}
				setup.InBubbles(t, []sides.Kind{sides.Scripted}, func(t *testing.T, side *sides.Side) {
					report := headgate.CachedFunc(&lateStarter{Client: side.Client}, "report",
						func(_ context.Context, timeout time.Duration) flowctl.Params {
							return flowctl.Params{ResultCacheKey: "May", CheckTimeout: timeout}
						},
						func(context.Context, time.Duration) (int, error) { return 1, nil }, nil, headgate.CachePolicy[int]{})
					var calls sync.WaitGroup
					calls.Go(func() {
						if _, err := report(t.Context(), time.Second); !errors.Is(err, flowctl.ErrRejected) {
							t.Errorf("the first call: %v", err)
						}
					})
					<-time.After(late / 2)
					runs := byPatience[cause] && (cause != flowctl.CauseNone || reason == flowctl.ReasonNoTokens)
					if _, err := report(t.Context(), time.Minute); runs != (err == nil) || err != nil && !errors.Is(err, flowctl.ErrRejected) {
						t.Errorf("the second call: %v", err)
					}
					calls.Wait()
				})
			})
		}
	}
}
