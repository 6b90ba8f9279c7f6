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
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Flows that an agent is being asked about when that is shut down, on the client's side or the engine's, are rejected in
// every form. They neither run nor are retried. A flow that starts later is Unreachable.
func TestClosingRejectsWhatWaits(t *testing.T) {
	work := func(ran *atomic.Int32) func(context.Context) (int, error) {
		return func(context.Context) (int, error) { return int(ran.Add(1)), nil }
	}
	waits := flowctl.Params{CheckTimeout: time.Hour, ResultCacheKey: "key"}
	retrying := func(client headgate.Starter) headgate.Starter {
		return headgate.Retrying(client, headgate.RetryPolicy{Attempts: -1, Budget: -1})
	}
	for _, tt := range []struct {
		name string
		call func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error
	}{
		{"Guard", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Guard(client, point, waits, work(ran), nil)(ctx)
			return err
		}},
		{"Do", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			return headgate.Do(ctx, client, point, waits, func(context.Context, *flowctl.Flow) error {
				ran.Add(1)
				return nil
			})
		}},
		{"Cached", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Cached(client, point, waits, work(ran), nil, headgate.CachePolicy[int]{})(ctx)
			return err
		}},
		{"Retrying", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Guard(retrying(client), point, waits, work(ran), nil)(ctx)
			return err
		}},
		{"Cached and Retrying", func(ctx context.Context, client *flowctl.Client, ran *atomic.Int32) error {
			_, err := headgate.Cached(retrying(client), point, waits, work(ran), nil, headgate.CachePolicy[int]{})(ctx)
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{
				Policies: sides.Policies(policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: 24 * time.Hour}),
				Answers:  []flowtest.Answer{{}},
			}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				holder := side.Client.Start(t.Context(), point, waits)
				if side.Script != nil {
					side.Answer(flowtest.Answer{Hang: true})
				}
				began := time.Now()
				var ran atomic.Int32
				errs := make([]error, 3)
				var calls sync.WaitGroup
				for i := range errs {
					calls.Go(func() { errs[i] = tt.call(t.Context(), side.Client, &ran) })
				}
				synctest.Wait() // they are in the queue
				if side.Kind == sides.Embedded {
					_ = side.Engine.Close()
				} else if err := side.Client.Close(t.Context()); err != nil {
					t.Errorf("Close() = %v", err)
				}
				calls.Wait()
				for _, err := range errs {
					rejected, ok := errors.AsType[*flowctl.RejectedError](err)
					if !ok || rejected.Cause() != flowctl.CauseClosed || rejected.Reason != flowctl.ReasonNoTokens || rejected.HTTPStatus != 503 || rejected.RetryAfter() != 0 {
						t.Errorf("a call that waited returned %v want a rejection by closing", err)
					}
				}
				if n, waited := ran.Load(), time.Since(began); n != 0 || waited != 0 {
					t.Errorf("%d calls ran, after %s", n, waited)
				}
				if err := tt.call(t.Context(), side.Client, &ran); err != nil || ran.Load() != 1 {
					t.Errorf("a call after that returned %v want that of one that runs", err)
				}
				_, _ = holder.End(t.Context())
			})
		})
	}
}

// A call that waits for its retry returns at once, rejected, when its client is closed, or its engine.
func TestClosingEndsWaitsForRetries(t *testing.T) {
	for _, on := range []flowctl.UnreachablePolicy{flowctl.FailOpen, flowctl.FailClosed} {
		for _, closesEngine := range []bool{false, true} {
			kinds := sides.All
			if closesEngine {
				kinds = []sides.Kind{sides.Embedded} // of another process's nobody hears
			}
			sides.Setup{
				Answers: []flowtest.Answer{{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Hour}},
			}.InBubbles(t, kinds, func(t *testing.T, side *sides.Side) {
				starts := headgate.Retrying(side.Client, headgate.RetryPolicy{})
				flows := make(chan *flowctl.Flow, 1)
				began := time.Now()
				go func() { flows <- starts.Start(t.Context(), point, flowctl.Params{OnUnreachable: on}) }()
				synctest.Wait()
				if closesEngine {
					_ = side.Engine.Close()
				} else {
					_ = side.Client.Close(t.Context())
				}
				flow := <-flows
				if waited := time.Since(began); waited != 0 || flow.Decision() != flowctl.Rejected || flow.ShouldRun() {
					t.Errorf("the flow is %s after %s want rejected at once", flow.Decision(), waited)
				}
				if got := side.Asked(); got != 1 {
					t.Errorf("%d checks want one", got)
				}
			})
		}
	}
}

// A call that was rejected stays so if its agent is gone when it tries again, whether the agent was shut down or has
// crashed.
func TestClosingKeepsRejections(t *testing.T) {
	const calls = 10
	sides.Setup{
		Policies: sides.Policies(policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: 2 * time.Second}),
	}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		if _, err := headgate.Guard(side.Client, point, flowctl.Params{}, work, nil)(t.Context()); err != nil {
			t.Fatal(err)
		}
		if side.Script != nil {
			side.Answer(rejected(2 * time.Second))
		}
		var ran atomic.Int32
		fn := func(context.Context) (int, error) { return int(ran.Add(1)), nil }
		patient := headgate.Retrying(side.Client, headgate.RetryPolicy{Attempts: -1, Budget: -1})
		guarded := headgate.Guard(patient, point, flowctl.Params{}, fn, nil)
		cached := headgate.Cached(patient, point, flowctl.Params{}, fn, nil, headgate.CachePolicy[int]{})
		var waiting sync.WaitGroup
		for _, call := range []func(context.Context) (int, error){guarded, cached} {
			for range calls {
				waiting.Go(func() {
					if _, err := call(t.Context()); !errors.Is(err, flowctl.ErrRejected) {
						t.Errorf("a call that had been rejected returned %v want the rejection", err)
					}
				})
			}
		}
		synctest.Wait() // they wait for their retries
		side.Silence()
		waiting.Wait()
		if n := ran.Load(); n != 0 {
			t.Errorf("%d calls ran that had been rejected", n)
		}
		if _, err := guarded(t.Context()); err != nil || ran.Load() != 1 {
			t.Errorf("a call after that returned %v want that of one that runs", err)
		}
	})
}

// If the call that began a run leaves while its flow waits, and the client or the engine is closed about that time, the
// calls that wait for the run are rejected as waiting flows are.
func TestClosingRejectsCallsThatShareRuns(t *testing.T) {
	const left = time.Second // when the first calls leave
	for _, tt := range []struct {
		name         string
		closesEngine bool
		kinds        []sides.Kind
	}{
		{"client", false, sides.All},
		{"engine", true, sides.Engines},
	} {
		for _, on := range []flowctl.UnreachablePolicy{flowctl.FailOpen, flowctl.FailClosed} {
			for _, retries := range []bool{false, true} {
				for _, gap := range []time.Duration{-time.Millisecond, 0, 5 * time.Millisecond, 50 * time.Millisecond, time.Second} {
					t.Run(fmt.Sprintf("%s/%d/retries=%v/%v", tt.name, on, retries, gap), func(t *testing.T) {
						sides.Setup{
							Policies: sides.Policies(policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: 24 * time.Hour}),
							Answers:  []flowtest.Answer{{}},
						}.InBubbles(t, tt.kinds, func(t *testing.T, side *sides.Side) {
							holder := side.Client.Start(t.Context(), point, flowctl.Params{})
							if side.Script != nil {
								side.Answer(flowtest.Answer{Hang: true})
							}
							var starts headgate.Starter = side.Client
							if retries {
								starts = headgate.Retrying(starts, headgate.RetryPolicy{})
							}
							var ran atomic.Int32
							call := headgate.CachedFunc(starts, point, func(_ context.Context, key string) flowctl.Params {
								return flowctl.Params{ResultCacheKey: key, CheckTimeout: time.Hour, OnUnreachable: on}
							}, func(context.Context, string) (int32, error) { return ran.Add(1), nil }, nil, headgate.CachePolicy[int32]{})
							first, leave := context.WithCancel(t.Context())
							time.AfterFunc(left, leave)
							time.AfterFunc(left+gap, func() {
								if tt.closesEngine {
									_ = side.Engine.Close()
								} else if err := side.Client.Close(t.Context()); err != nil {
									t.Errorf("Close() = %v", err)
								}
							})
							var waiting sync.WaitGroup
							for _, key := range []string{"a", "b", "c"} {
								waiting.Go(func() { _, _ = call(first, key) })
								synctest.Wait() // its flow is in the queue
								for range 3 {
									waiting.Go(func() {
										_, err := call(t.Context(), key)
										if on == flowctl.FailClosed && errors.Is(err, flowctl.ErrUnreachable) && side.Kind == sides.Served && tt.closesEngine {
											return // the client does not know that the engine was closed
										}
										if rejected, ok := errors.AsType[*flowctl.RejectedError](err); !ok || rejected.Cause() != flowctl.CauseClosed {
											t.Errorf("a call that waited returned %v want a rejection by closing", err)
										}
									})
								}
							}
							<-time.After(left + 2*time.Second)
							_ = side.Client.Close(t.Context()) // an embedded agent goes on with what waits when its client closes
							if side.Engine != nil {
								_ = side.Engine.Close()
							}
							waiting.Wait()
							if n := ran.Load(); n != 0 {
								t.Errorf("%d calls ran", n)
							}
							if _, err := call(t.Context(), "d"); (err == nil) != (on == flowctl.FailOpen) || err != nil && !errors.Is(err, flowctl.ErrUnreachable) {
								t.Errorf("a call after that returned %v want that of one that no agent answers", err)
							}
							_, _ = holder.End(t.Context())
						})
					})
				}
			}
		}
	}
}

// A call that shares the run of a call that a limit has rejected does not run because the agent is gone when it asks
// anew. If no limit has rejected anything, it fails open.
func TestSharedRunsKeepRejections(t *testing.T) {
	late := func(cause flowctl.RejectCause) []flowtest.Answer {
		return []flowtest.Answer{{Reason: flowctl.ReasonNoTokens, Cause: cause, Delay: time.Second + abandoned/2}, silent}
	}
	scripted := []sides.Kind{sides.Scripted}
	for _, tt := range []struct {
		name     string
		kinds    []sides.Kind
		answers  []flowtest.Answer
		deadline bool // the first call has one, 5 s away; else it is canceled after a second
		retries  bool
		on       flowctl.UnreachablePolicy
		checks   int
		want     error
	}{
		{
			name: "the first call had too little time", kinds: sides.All,
			answers: []flowtest.Answer{{Reason: flowctl.ReasonNoTokens}, silent}, deadline: true, checks: 2, want: flowctl.ErrRejected,
		},
		{
			name: "the first call leaves while it waits for its retry", kinds: sides.All,
			answers: []flowtest.Answer{rejected(time.Hour), silent}, retries: true, checks: 2, want: flowctl.ErrRejected,
		},
		{
			name: "the second call fails closed", kinds: sides.All,
			answers: []flowtest.Answer{rejected(time.Hour), silent}, retries: true, on: flowctl.FailClosed, checks: 2, want: flowctl.ErrUnreachable,
		},
		{
			name: "the agent is back", kinds: sides.All,
			answers: []flowtest.Answer{rejected(time.Hour), accepted}, retries: true, checks: 2,
		},
		{
			name: "the first call is rejected after it has left", kinds: scripted,
			answers: late(flowctl.CauseTimeout), checks: 2, want: flowctl.ErrRejected,
		},
		{
			name: "the first call had no time at all", kinds: scripted,
			answers: late(flowctl.CauseLate), checks: 2,
		},
		{
			name: "the agent hangs", kinds: scripted,
			answers: []flowtest.Answer{{Hang: true}, silent}, checks: 2,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Answers: tt.answers}.InBubbles(t, tt.kinds, func(t *testing.T, side *sides.Side) {
				var starts headgate.Starter = side.Client
				if tt.deadline {
					starts = &lateStarter{Client: side.Client} // so that the second call comes in time
				}
				if tt.retries {
					starts = headgate.Retrying(starts, headgate.RetryPolicy{})
				}
				call := func(ctx context.Context, on flowctl.UnreachablePolicy) error {
					_, err := headgate.Cached(starts, point, flowctl.Params{CheckTimeout: -1, OnUnreachable: on}, work, nil, headgate.CachePolicy[int]{TTL: -1})(ctx)
					return err
				}
				first, leave := context.WithTimeout(t.Context(), 5*time.Second)
				defer leave()
				if !tt.deadline {
					canceled, cancel := context.WithCancel(t.Context())
					time.AfterFunc(time.Second, cancel)
					first = canceled
				}
				var waiting sync.WaitGroup
				waiting.Go(func() {
					if err := call(first, flowctl.FailOpen); err == nil {
						t.Error("the first call ran")
					}
				})
				synctest.Wait()
				waiting.Go(func() {
					if err := call(t.Context(), tt.on); !errors.Is(err, tt.want) {
						t.Errorf("a call that shares the run returned %v want %v", err, tt.want)
					}
				})
				waiting.Wait()
				if got := side.Asked(); got != tt.checks {
					t.Errorf("%d checks want %d", got, tt.checks)
				}
			})
		})
	}
}

// abandoned is how long a check goes on after its caller has left.
const abandoned = 200 * time.Millisecond

// A call that comes after the close, and joins the run of a call that was held back, is Unreachable and runs.
func TestClosingLetsNewCallsFailOpen(t *testing.T) {
	sides.Setup{
		Policies: sides.Policies(policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: 24 * time.Hour}),
		Answers:  []flowtest.Answer{{}},
	}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		holder := side.Client.Start(t.Context(), point, flowctl.Params{})
		if side.Script != nil {
			side.Answer(flowtest.Answer{Hang: true})
		}
		var ran atomic.Int32
		call := headgate.Cached(&lateStarter{Client: side.Client}, point, flowctl.Params{CheckTimeout: -1},
			func(context.Context) (int32, error) { return ran.Add(1), nil }, nil, headgate.CachePolicy[int32]{TTL: -1})
		first, leave := context.WithCancel(t.Context())
		var waiting sync.WaitGroup
		waiting.Go(func() { _, _ = call(first) })
		synctest.Wait()
		waiting.Go(func() {
			if _, err := call(t.Context()); !errors.Is(err, flowctl.ErrRejected) {
				t.Errorf("the call that waited returned %v want a rejection", err)
			}
		})
		synctest.Wait()
		leave()
		_ = side.Client.Close(t.Context())
		<-time.After(late + late/2) // the call that waited has asked anew, and does not know the decision yet
		waiting.Go(func() {
			if _, err := call(t.Context()); err != nil {
				t.Errorf("a new call returned %v want that of one that runs", err)
			}
		})
		waiting.Wait()
		if n := ran.Load(); n != 1 {
			t.Errorf("%d calls ran want the new one", n)
		}
		_, _ = holder.End(t.Context())
	})
}
