package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// overEngines runs f in a bubble over engines that have the components, if any.
func overEngines(t *testing.T, components []policy.Component, f func(t *testing.T, client *flowctl.Client, e *engine.Engine)) {
	t.Helper()
	sides.Setup{Policies: sides.Policies(components...)}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) { f(t, side.Client, side.Engine) })
}

// lateStarter is a Starter that has a client's runs, and whose flows are decided a while before anybody sees that.
type lateStarter struct {
	*flowctl.Client
	flows atomic.Int64
}

const late = 100 * time.Millisecond

func (s *lateStarter) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	s.flows.Add(1)
	flow := s.Client.Start(ctx, controlPoint, params)
	<-time.After(late)
	return flow
}

// Callers that share a run take what one flow takes, from limits of every kind.
func TestCachedBurst(t *testing.T) {
	at := policy.At("model")
	tests := map[string]policy.Component{
		"rate limiter":          policy.RateLimiter{ID: "calls", Selectors: at, Capacity: 10, Fill: 10, Interval: time.Minute},
		"concurrency limiter":   policy.ConcurrencyLimiter{ID: "calls", Selectors: at, Max: 1, MaxInflight: time.Minute},
		"quota scheduler":       policy.QuotaScheduler{ID: "calls", Selectors: at, Capacity: 10, Fill: 10, Interval: time.Minute},
		"concurrency scheduler": policy.ConcurrencyScheduler{ID: "calls", Selectors: at, Max: 1, MaxInflight: time.Minute},
	}
	for name, component := range tests {
		t.Run(name, func(t *testing.T) {
			overEngines(t, []policy.Component{component}, func(t *testing.T, client *flowctl.Client, e *engine.Engine) {
				var runs atomic.Int64
				ask := headgate.Cached(client, "model", flowctl.Params{ResultCacheKey: "the same prompt"},
					func(context.Context) (string, error) {
						runs.Add(1)
						<-time.After(300 * time.Millisecond)
						return "answer", nil
					}, nil, headgate.CachePolicy[string]{TTL: time.Hour})
				var wg sync.WaitGroup
				for range 50 {
					wg.Go(func() {
						if got, err := ask(t.Context()); got != "answer" || err != nil {
							t.Errorf("ask() = %q, %v", got, err)
						}
					})
				}
				wg.Wait()
				if runs.Load() != 1 {
					t.Errorf("%d runs want 1", runs.Load())
				}
				if _, keeps := component.(policy.RateLimiter); keeps {
					calls, err := e.Component("test", "calls")
					if err != nil {
						t.Fatal(err)
					}
					if usage, err := calls.Peek(t.Context(), ""); err != nil || usage.Remaining < 9 || usage.Remaining > 9.1 {
						t.Errorf("%v tokens are left, %v want 9", usage.Remaining, err)
					}
				}
			})
		})
	}
}

// busy is a scheduler whose one slot is taken when release has not been called yet.
func busy(t *testing.T, client *flowctl.Client) (release func()) {
	t.Helper()
	flow := client.Start(t.Context(), "report", flowctl.Params{})
	if flow.Decision() != flowctl.Accepted {
		t.Fatal(flow.Err())
	}
	return func() { _, _ = flow.End(context.WithoutCancel(t.Context())) }
}

var oneReport = []policy.Component{policy.ConcurrencyScheduler{Selectors: policy.At("report"), Max: 1, MaxInflight: time.Hour}}

// Callers that come while the flow of their run waits in a queue share what is decided about it, and each calls its own
// fallback. That the callers have deadlines, each another, changes nothing: the check timeout ended the wait.
func TestCachedSharesARejection(t *testing.T) {
	overEngines(t, oneReport, func(t *testing.T, client *flowctl.Client, _ *engine.Engine) {
		defer busy(t, client)()
		starts := &starter{client: client}
		var fellBack atomic.Int64
		report := headgate.Cached(starts, "report", flowctl.Params{CheckTimeout: time.Second},
			func(context.Context) (int64, error) { return 0, errors.New("ran") },
			func(_ context.Context, err error) (int64, error) {
				if !errors.Is(err, flowctl.ErrRejected) {
					t.Errorf("onReject got %v want the rejection", err)
				}
				allEnded(t, starts)
				return fellBack.Add(1), nil
			}, headgate.CachePolicy[int64]{})
		var wg sync.WaitGroup
		for i := range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute*time.Duration(i+1))
			defer cancel()
			wg.Go(func() {
				if got, err := report(ctx); got == 0 || err != nil {
					t.Errorf("report() = %d, %v want a fallback", got, err)
				}
			})
		}
		wg.Wait()
		if len(starts.flows) != 1 || fellBack.Load() != 10 {
			t.Errorf("%d flows, %d fallbacks want 1, 10", len(starts.flows), fellBack.Load())
		}
	})
}

// When the caller whose flow waits in a queue goes, one of the others asks anew.
func TestCachedLeaderGoesFromTheQueue(t *testing.T) {
	tests := map[string]func(context.Context) (context.Context, context.CancelFunc){
		"canceled": func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(200*time.Millisecond, cancel)
			return ctx, cancel
		},
		"its time is up": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 200*time.Millisecond)
		},
	}
	for name, end := range tests {
		t.Run(name, func(t *testing.T) {
			overEngines(t, oneReport, func(t *testing.T, client *flowctl.Client, _ *engine.Engine) {
				release := busy(t, client)
				starts := &starter{client: client}
				runs := 0
				report := headgate.Cached(starts, "report", flowctl.Params{CheckTimeout: -1},
					func(context.Context) (int, error) { runs++; return 42, nil },
					nil, headgate.CachePolicy[int]{})
				ctx, cancel := end(t.Context())
				defer cancel()
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := report(ctx); err == nil {
						t.Error("the first caller got a result")
					}
				})
				synctest.Wait() // its flow waits
				for range 9 {
					wg.Go(func() {
						if got, err := report(t.Context()); got != 42 || err != nil {
							t.Errorf("report() = %d, %v want 42", got, err)
						}
					})
				}
				<-time.After(500 * time.Millisecond)
				release()
				wg.Wait()
				if len(starts.flows) != 2 || runs != 1 {
					t.Errorf("%d flows, %d runs want 2, 1", len(starts.flows), runs)
				}
			})
		})
	}
}

// What was decided about the call that began the run is not always about those that wait for it.
func TestCachedAsksAnew(t *testing.T) {
	queue := []policy.Component{policy.QuotaScheduler{Selectors: policy.At("report"), Capacity: 1, Fill: 1, Interval: 10 * time.Second}}
	bucket := []policy.Component{policy.RateLimiter{Selectors: policy.At("report"), Capacity: 1, Fill: 1, Interval: 10 * time.Second}}
	tests := []struct {
		name          string
		components    []policy.Component
		leader, other flowctl.Params
		leads, waits  time.Duration // deadlines; 0 is none
		retries       bool
		close         bool // the engine
		want          error
		leaderGets    error
		flows         int64
	}{
		{
			name: "the queue is too long for the first call", components: queue, leads: 5 * time.Second,
			leader: flowctl.Params{CheckTimeout: -1}, other: flowctl.Params{CheckTimeout: -1},
			leaderGets: flowctl.ErrRejected, flows: 2,
		},
		{
			name: "the queue is too long for both", components: queue, leads: 5 * time.Second, waits: 4 * time.Second,
			leader: flowctl.Params{CheckTimeout: -1}, other: flowctl.Params{CheckTimeout: -1},
			leaderGets: flowctl.ErrRejected, want: flowctl.ErrRejected, flows: 1,
		},
		{
			name: "the queue is too long for the check timeout", components: queue, leads: 5 * time.Second,
			leader: flowctl.Params{CheckTimeout: time.Second}, other: flowctl.Params{CheckTimeout: time.Second},
			leaderGets: flowctl.ErrRejected, want: flowctl.ErrRejected, flows: 1,
		},
		{
			name: "a rate limit", components: bucket, leads: 5 * time.Second,
			leaderGets: flowctl.ErrRejected, want: flowctl.ErrRejected, flows: 1,
		},
		{
			name: "a retry comes too late for the first call", components: bucket, leads: 5 * time.Second, retries: true,
			leaderGets: flowctl.ErrRejected, flows: 3,
		},
		{
			name: "a retry comes too late for both", components: bucket, leads: 5 * time.Second, waits: 4 * time.Second, retries: true,
			leaderGets: flowctl.ErrRejected, want: flowctl.ErrRejected, flows: 1,
		},
		{
			name: "the first call has a wrong label", leader: flowctl.Params{Labels: map[string]string{"": "x"}},
			leaderGets: flowctl.ErrInvalid, flows: 2,
		},
		{
			name: "the first call fails closed", close: true, leader: flowctl.Params{OnUnreachable: flowctl.FailClosed},
			leaderGets: flowctl.ErrUnreachable, flows: 2,
		},
		{
			name: "both fail closed", close: true,
			leader: flowctl.Params{OnUnreachable: flowctl.FailClosed}, other: flowctl.Params{OnUnreachable: flowctl.FailClosed},
			leaderGets: flowctl.ErrUnreachable, want: flowctl.ErrUnreachable, flows: 1,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			overEngines(t, tt.components, func(t *testing.T, client *flowctl.Client, e *engine.Engine) {
				headgate.Guard(client, "report", flowctl.Params{}, work, nil)(t.Context()) //nolint:errcheck // it takes what there is
				if tt.close {
					_ = e.Close()
				}
				starts := &lateStarter{Client: client}
				var using headgate.Starter = starts
				if tt.retries {
					using = headgate.Retrying(starts, headgate.RetryPolicy{Jitter: -1})
				}
				call := func(params flowctl.Params, deadline time.Duration) error {
					ctx := t.Context()
					if deadline > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, deadline)
						defer cancel()
					}
					// A function for each call: they share runs all the same.
					_, err := headgate.Cached(using, "report", params, work, nil, headgate.CachePolicy[int]{})(ctx)
					return err
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					if err := call(tt.leader, tt.leads); !errors.Is(err, tt.leaderGets) {
						t.Errorf("the first call = %v want %v", err, tt.leaderGets)
					}
				})
				synctest.Wait()
				wg.Go(func() {
					if err := call(tt.other, tt.waits); !errors.Is(err, tt.want) {
						t.Errorf("the second call = %v want %v", err, tt.want)
					}
				})
				wg.Wait()
				if got := starts.flows.Load(); got != tt.flows {
					t.Errorf("%d flows want %d", got, tt.flows)
				}
			})
		})
	}
}

// A first call that panics before the run has begun to work, or calls Goexit, takes nobody with it.
func TestCachedLeaderPanics(t *testing.T) {
	for name, end := range map[string]func(){"panic": func() { panic(errWork) }, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			overAll(t, func(t *testing.T, client *flowctl.Client) {
				store := headgate.Cached(client, "report", flowctl.Params{}, work, nil, headgate.CachePolicy[int]{})
				_, _ = store(t.Context())
				synctest.Wait() // until it is stored
				starts := &starter{client: client}
				cached := headgate.Cached(starts, "report", flowctl.Params{}, work, nil, headgate.CachePolicy[int]{Codec: failing{end}})
				var first, second result
				var wg sync.WaitGroup
				wg.Go(func() {
					done := make(chan struct{})
					go func() {
						defer close(done)
						observe(&first, func() (int, error) { return cached(t.Context()) })
					}()
					<-done
				})
				synctest.Wait()
				wg.Go(func() { observe(&second, func() (int, error) { return cached(t.Context()) }) })
				wg.Wait()
				if first.exited != (name == "Goexit") || first.panicked != (name == "panic") {
					t.Errorf("the first call got %+v", first)
				}
				if second.err == nil || !strings.Contains(second.err.Error(), "did not return") {
					t.Errorf("the second call got %+v want an error", second)
				}
				allEnded(t, starts)
				if len(starts.flows) != 1 {
					t.Errorf("%d flows want 1", len(starts.flows))
				}
			})
		})
	}
}

// failing is a codec that takes a second to decode, and does not come back.
type failing struct{ end func() }

func (failing) Encode(n int) ([]byte, error) { return fmt.Append(nil, n), nil }

func (f failing) Decode([]byte) (int, error) {
	<-time.After(time.Second)
	f.end()
	return 0, nil
}

// Calls of a client that retries share runs with calls that do not.
func TestCachedSharesThroughRetrying(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		run := func(context.Context) (int64, error) {
			<-time.After(time.Second)
			return runs.Add(1), nil
		}
		var wg sync.WaitGroup
		for _, using := range []headgate.Starter{
			client, headgate.Retrying(client, headgate.RetryPolicy{}), &lateStarter{Client: client},
			headgate.Retrying(headgate.Retrying(client, headgate.RetryPolicy{}), headgate.RetryPolicy{}),
		} {
			wg.Go(func() {
				if got, err := headgate.Cached(using, "report", flowctl.Params{}, run, nil, headgate.CachePolicy[int64]{})(t.Context()); got != 1 || err != nil {
					t.Errorf("cached() = %d, %v want the first run's", got, err)
				}
			})
		}
		wg.Wait()
	})
}

// A run that finds another one under way for an inner key has one of its own, which all its calls share, and which is
// stored.
func TestCachedOncePerOuterRun(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var runs atomic.Int64
		part := headgate.Cached(client, "part", flowctl.Params{}, func(context.Context) (int64, error) {
			<-time.After(time.Second)
			return runs.Add(1), nil
		}, nil, headgate.CachePolicy[int64]{})
		all := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (int64, error) {
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					if _, err := part(ctx); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			return runs.Load(), nil
		}, nil, headgate.CachePolicy[int64]{})
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = part(t.Context()) })
		synctest.Wait()
		if _, err := all(t.Context()); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if runs.Load() != 2 {
			t.Errorf("%d runs want 2: one outside, and one for ten calls inside", runs.Load())
		}
		synctest.Wait() // until it is stored
		if _, err := part(t.Context()); err != nil || runs.Load() != 2 {
			t.Errorf("%d runs, %v want the result that was stored", runs.Load(), err)
		}
	})
}

// What a run of its own made is stored, though the other one's is not.
func TestCachedInnerRunIsStored(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		foreign, cancel := context.WithCancel(t.Context())
		part := func(fn func(context.Context) (string, error)) func(context.Context) (string, error) {
			return headgate.Cached(client, "part", flowctl.Params{}, fn, nil, headgate.CachePolicy[string]{})
		}
		hangs := part(func(ctx context.Context) (string, error) {
			<-ctx.Done()
			return "", ctx.Err()
		})
		works := part(func(context.Context) (string, error) { return "made inside", nil })
		go func() { _, _ = hangs(foreign) }()
		synctest.Wait()
		all := headgate.Cached(client, "report", flowctl.Params{}, works, nil, headgate.CachePolicy[string]{})
		if got, err := all(t.Context()); got != "made inside" || err != nil {
			t.Errorf("all() = %q, %v", got, err)
		}
		cancel()
		synctest.Wait()
		if got, err := hangs(t.Context()); got != "made inside" || err != nil {
			t.Errorf("the next call = %q, %v want what was stored", got, err)
		}
	})
}

// Functions that call each other at random, with two clients and without one, never wait for each other.
func TestCachedNestedAtRandom(t *testing.T) {
	type depth struct{}
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			clients := []*flowctl.Client{engineClient(t), engineClient(t), nil}
			random := rand.New(rand.NewPCG(seed, 0))
			var mu sync.Mutex
			draw := func(n int) int {
				mu.Lock()
				defer mu.Unlock()
				return random.IntN(n)
			}
			const keys = 4
			functions := make([]func(context.Context) (int, error), keys*len(clients))
			for i := range functions {
				functions[i] = headgate.Cached(clients[i%len(clients)], "any", flowctl.Params{ResultCacheKey: fmt.Sprint(i)},
					func(ctx context.Context) (int, error) {
						deep, _ := ctx.Value(depth{}).(int)
						<-time.After(time.Duration(draw(10)) * time.Millisecond)
						if deep == 4 {
							return i, nil
						}
						ctx = context.WithValue(ctx, depth{}, deep+1)
						var wg sync.WaitGroup
						for range draw(3) {
							wg.Go(func() { _, _ = functions[draw(len(functions))](ctx) })
						}
						wg.Wait()
						return i, nil
					}, nil, headgate.CachePolicy[int]{TTL: time.Millisecond})
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					i := draw(len(functions))
					if got, err := functions[i](ctx); got != i || err != nil {
						t.Errorf("seed %d: function %d = %d, %v", seed, i, got, err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// A call that gives up tells net and net/http of a deadline.
func TestCachedTimeout(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		hangs := headgate.Cached(client, "report", flowctl.Params{}, func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}, fallback.Value(-1), headgate.CachePolicy[int]{})
		for name, cause := range map[string]error{
			"no cause": nil, "a cause": errGone, "a cause that is a deadline": fmt.Errorf("slow: %w", context.DeadlineExceeded),
		} {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
			_, err := hangs(ctx)
			cancel()
			var timeout net.Error
			if !errors.As(err, &timeout) || !timeout.Timeout() || !errors.Is(err, context.DeadlineExceeded) || cause != nil && !errors.Is(err, cause) {
				t.Errorf("%s: %v want an error that says that it is a timeout", name, err)
			}
			if top, ok := err.(interface{ Timeout() bool }); !ok || !top.Timeout() {
				t.Errorf("%s: %T does not say that it is a timeout", name, err)
			}
			ctx, stop := context.WithCancelCause(t.Context())
			time.AfterFunc(time.Second, func() { stop(cause) })
			_, err = hangs(ctx)
			if top, ok := err.(interface{ Timeout() bool }); !ok || top.Timeout() != errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s, canceled: Timeout() of %v is not what the error wraps", name, err)
			}
		}
	})
}
