package engine_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// circuitBreaker makes one that three failures in ten minutes open for half a minute. Two probes close it.
func circuitBreaker(change func(*policy.CircuitBreaker)) policy.CircuitBreaker {
	b := policy.CircuitBreaker{
		Selectors: policy.At("point"), FailureCount: 3, MinFlows: 3, Window: 10 * time.Minute, OpenDuration: 30 * time.Second,
		Probes: 2, ProbeTimeout: time.Minute,
	}
	if change != nil {
		change(&b)
	}
	return b
}

// told is how long a served engine waits until it has heard how flows have ended.
const told = 3 * time.Second

var errUpstream = errors.New("the upstream fails")

// call runs a guarded function, as the word says, and waits until the agent knows how it went.
func call(t *testing.T, side *sides.Side, word string, labels map[string]string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	params := flowctl.Params{Labels: labels, CheckTimeout: time.Minute}
	work := func(context.Context) (int, error) { return 0, nil }
	switch word {
	case "ok", "rejected":
	case "error":
		work = func(context.Context) (int, error) { return 0, errUpstream }
	case "panic":
		work = func(context.Context) (int, error) { panic("the upstream") }
	case "goexit":
		work = func(context.Context) (int, error) { runtime.Goexit(); return 0, nil }
	case "canceled":
		work = func(ctx context.Context) (int, error) { cancel(); return 0, ctx.Err() }
	case "canceled, and an error of its own":
		work = func(context.Context) (int, error) { cancel(); return 0, errUpstream }
	case "canceled, and a failure":
		params.IsFailure = func(error) bool { return true }
		work = func(ctx context.Context) (int, error) { cancel(); return 0, ctx.Err() }
	case "canceled, and no failure":
		params.IsFailure = func(error) bool { return false }
		work = func(context.Context) (int, error) { cancel(); return 0, errUpstream }
	case "canceled, and a panic":
		work = func(context.Context) (int, error) { cancel(); panic("the upstream") }
	case "canceled, and a status":
		work = func(ctx context.Context) (int, error) {
			cancel()
			flow, _ := flowctl.FromContext(ctx)
			flow.SetStatus(flowctl.StatusError)
			return 0, nil
		}
	case "canceled, and ok":
		work = func(context.Context) (int, error) { cancel(); return 0, nil }
	case "an error, then canceled":
		work = func(ctx context.Context) (int, error) {
			flow, _ := flowctl.FromContext(ctx)
			flow.SetError(errUpstream)
			cancel()
			return 0, errUpstream
		}
	case "a status, then canceled":
		work = func(ctx context.Context) (int, error) {
			flow, _ := flowctl.FromContext(ctx)
			flow.SetStatus(flowctl.StatusError)
			cancel()
			return 0, errUpstream
		}
	case "the caller's deadline":
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, time.Second)
		defer stop()
		work = func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, errUpstream }
	case "no failure":
		params.IsFailure = func(error) bool { return false }
		work = func(context.Context) (int, error) { return 0, errUpstream }
	case "deadline":
		work = func(ctx context.Context) (int, error) {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			<-ctx.Done()
			return 0, ctx.Err()
		}
	case "4s", "6s":
		took, err := time.ParseDuration(word)
		if err != nil {
			t.Fatal(err)
		}
		work = func(context.Context) (int, error) { <-time.After(took); return 0, nil }
	case "status":
		work = func(ctx context.Context) (int, error) {
			flow, _ := flowctl.FromContext(ctx)
			flow.SetStatus(flowctl.StatusError)
			return 0, nil
		}
	default:
		t.Fatalf("no flow is %q", word)
	}
	if word == "rejected" {
		params.Labels = map[string]string{"upstream": labels["upstream"], "reject": "yes"}
	}
	done := make(chan struct{})
	go func() { // a Goexit ends it
		defer close(done)
		defer func() { _ = recover() }()
		_, _ = headgate.Guard(side.Client, "point", params, work, nil)(ctx)
	}()
	<-done
	<-time.After(told)
}

// state is what the breaker of an upstream does.
func state(t *testing.T, side *sides.Side, upstream string) engine.Usage {
	t.Helper()
	u, err := peekAt(side.Engine, "test", "circuit_breaker.0", upstream)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// rejecting rejects the flows that have the label for it.
var rejecting = policy.RateLimiter{
	Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{"reject": "yes"}}}}, Interval: time.Hour,
}

// What three flows do to a breaker that is closed.
func TestCircuitBreakerOpens(t *testing.T) {
	upstream := func(b *policy.CircuitBreaker) { b.LimitBy = "upstream" }
	slow := func(b *policy.CircuitBreaker) { b.LimitBy, b.SlowAfter = "upstream", 5*time.Second }
	ratio := func(b *policy.CircuitBreaker) {
		b.LimitBy, b.FailureCount, b.FailureRatio = "upstream", 0, 0.5
	}
	for _, tt := range []struct {
		name   string
		change func(*policy.CircuitBreaker)
		flows  []string
		label  string
		opens  bool
	}{
		{"errors", upstream, []string{"error", "error", "error"}, "upstream=a", true},
		{"errors of all flows", nil, []string{"error", "error", "error"}, "", true},
		{"too few errors", upstream, []string{"error", "ok", "error"}, "upstream=a", false},
		{"errors of another upstream", upstream, []string{"error", "error", "error"}, "upstream=b", false},
		{"errors without the label", upstream, []string{"error", "error", "error"}, "", false},
		{"panics", upstream, []string{"panic", "panic", "panic"}, "upstream=a", true},
		{"Goexit", upstream, []string{"goexit", "goexit", "goexit"}, "upstream=a", true},
		{"statuses", upstream, []string{"status", "status", "status"}, "upstream=a", true},
		{"deadlines", upstream, []string{"deadline", "deadline", "deadline"}, "upstream=a", true},
		{"errors that are no failures", upstream, []string{"no failure", "no failure", "no failure"}, "upstream=a", false},
		{"cancellations", upstream, []string{"canceled", "canceled", "canceled"}, "upstream=a", false},
		{"errors of canceled flows", upstream, []string{"canceled, and an error of its own", "error", "error"}, "upstream=a", false},
		{"errors of canceled flows that are failures", upstream, []string{"canceled, and a failure", "error", "error"}, "upstream=a", false},
		{"panics of canceled flows", upstream, []string{"canceled, and a panic", "error", "error"}, "upstream=a", false},
		{"statuses of canceled flows", upstream, []string{"canceled, and a status", "error", "error"}, "upstream=a", false},
		{"errors of flows that are canceled then", upstream, []string{"an error, then canceled", "error", "error"}, "upstream=a", true},
		{"statuses of flows that are canceled then", upstream, []string{"a status, then canceled", "error", "error"}, "upstream=a", true},
		{"the caller's deadline", upstream, []string{"the caller's deadline", "error", "error"}, "upstream=a", true},
		{"canceled flows that went well", ratio, []string{"canceled, and ok", "error", "error"}, "upstream=a", false},
		{"canceled flows whose error is no failure", ratio, []string{"canceled, and no failure", "error", "error"}, "upstream=a", false},
		{"rejections", upstream, []string{"rejected", "rejected", "rejected"}, "upstream=a", false},
		{"slow flows", slow, []string{"6s", "6s", "6s"}, "upstream=a", true},
		{"flows that are not slow", slow, []string{"6s", "6s", "4s"}, "upstream=a", false},
		{"slow flows and errors", slow, []string{"6s", "error", "6s"}, "upstream=a", true},
		{"slow flows without a bound", upstream, []string{"6s", "6s", "6s"}, "upstream=a", false},
		{"a share", ratio, []string{"error", "ok", "error"}, "upstream=a", true},
		{"less than the share", ratio, []string{"error", "ok", "ok"}, "upstream=a", false},
		{"a share of too few", ratio, []string{"error", "error"}, "upstream=a", false},
		{"cancellations beside a share", ratio, []string{"canceled", "error", "error"}, "upstream=a", false},
		{"rejections beside a share", ratio, []string{"rejected", "error", "error"}, "upstream=a", false},
		{"a dry run", func(b *policy.CircuitBreaker) { b.LimitBy, b.DryRun = "upstream", true }, []string{"error", "error", "error"}, "upstream=a", true},
		{"pass through", func(b *policy.CircuitBreaker) { b.LimitBy, b.PassThrough = "upstream", true }, []string{"error", "error", "error"}, "upstream=a", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			breaker := circuitBreaker(tt.change)
			sides.Setup{Policies: sides.Policies(breaker, rejecting)}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				for _, flow := range tt.flows {
					call(t, side, flow, labelled(tt.label))
				}
				value := ""
				if breaker.LimitBy != "" {
					value = "a"
				}
				want := engine.Usage{Capacity: 2, Remaining: 2, State: "closed"}
				if tt.opens {
					want = engine.Usage{Capacity: 2, State: "open"}
				}
				if got := state(t, side, value); got != want {
					t.Errorf("Peek = %+v want %+v", got, want)
				}
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"upstream": "a"}})
				defer end(flow)
				if want := !tt.opens || breaker.DryRun; flow.ShouldRun() != want {
					t.Errorf("the next flow: %v want it to run: %v", flow, want)
				}
				s := side.Engine.Stats().Components[0]
				if got, want := [...]uint64{s.Opened, uint64(s.Open)}, b2u(tt.opens || tt.label == "upstream=b"); got != [...]uint64{want, want} {
					t.Errorf("opened, is open = %v want %d each", got, want)
				}
				if got := s.Dropped + s.DryRunDrops; got != b2u(tt.opens) || s.Dropped > 0 && breaker.DryRun {
					t.Errorf("Stats = %+v want %d drops", s, b2u(tt.opens))
				}
			})
		})
	}
}

// What probes do to a breaker that is half-open.
func TestCircuitBreakerProbes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		flows []string
		want  engine.Usage
	}{
		{"none", nil, engine.Usage{Capacity: 2, Remaining: 2, State: "half-open"}},
		{"one of two successes", []string{"ok"}, engine.Usage{Capacity: 2, Remaining: 1, State: "half-open"}},
		{"successes", []string{"ok", "ok"}, engine.Usage{Capacity: 2, Remaining: 2, State: "closed"}},
		{"an error", []string{"error"}, engine.Usage{Capacity: 2, State: "open"}},
		{"a success and an error", []string{"ok", "error"}, engine.Usage{Capacity: 2, State: "open"}},
		{"a panic", []string{"panic"}, engine.Usage{Capacity: 2, State: "open"}},
		{"Goexit", []string{"goexit"}, engine.Usage{Capacity: 2, State: "open"}},
		{"cancellations", []string{"canceled", "canceled", "canceled", "canceled"}, engine.Usage{Capacity: 2, Remaining: 2, State: "half-open"}},
		{"rejections", []string{"rejected", "rejected", "rejected", "rejected"}, engine.Usage{Capacity: 2, Remaining: 2, State: "half-open"}},
		{"all but a success", []string{"canceled", "rejected", "ok", "canceled", "ok"}, engine.Usage{Capacity: 2, Remaining: 2, State: "closed"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			setup := sides.Setup{Policies: sides.Policies(circuitBreaker(func(b *policy.CircuitBreaker) { b.LimitBy = "upstream" }), rejecting)}
			setup.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				labels := map[string]string{"upstream": "a"}
				for range 3 {
					call(t, side, "error", labels)
				}
				<-time.After(30 * time.Second)
				for _, flow := range tt.flows {
					call(t, side, flow, labels)
				}
				if got := state(t, side, "a"); got != tt.want {
					t.Errorf("Peek = %+v want %+v", got, tt.want)
				}
			})
		})
	}
}

// An open breaker rejects with a reason and a cause, and says to the nanosecond when it lets flows through again: two of them, and
// others when these have ended, or after ProbeTimeout.
func TestCircuitBreakerRejections(t *testing.T) {
	sides.Setup{Policies: sides.Policies(circuitBreaker(nil))}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		rejected := func() time.Duration {
			t.Helper()
			flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
			defer end(flow)
			r, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
			if !ok || r.Reason != flowctl.ReasonNoTokens || r.Cause() != flowctl.CauseCircuitOpen || r.HTTPStatus != 503 ||
				r.Component() != "circuit_breaker.0" || r.RetryAfter() <= 0 {
				t.Fatalf("%v: %v want it rejected by the breaker", flow, flow.Err())
			}
			return r.RetryAfter()
		}
		admitted := func() *flowctl.Flow {
			t.Helper()
			flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
			if flow.Decision() != flowctl.Accepted {
				t.Fatalf("%v: %v want it accepted", flow, flow.Err())
			}
			return flow
		}
		for range 3 {
			call(t, side, "error", nil)
		}
		retry := rejected()
		if retry > 30*time.Second || retry < 30*time.Second-told {
			t.Errorf("retry after %v want up to 30 s", retry)
		}
		<-time.After(retry - 1)
		if got := rejected(); got != 1 {
			t.Errorf("retry after %v want 1ns", got)
		}
		<-time.After(1)
		first, second := admitted(), admitted()
		if got := rejected(); got != 30*time.Second {
			t.Errorf("retry after %v while probes are under way want OpenDuration", got)
		}
		<-time.After(50 * time.Second)
		if got := rejected(); got != 10*time.Second {
			t.Errorf("retry after %v want the rest of ProbeTimeout", got)
		}
		<-time.After(10 * time.Second) // both have lost their places
		third := admitted()
		end(first)
		end(third)
		<-time.After(told)
		if got := state(t, side, ""); got.State != "closed" {
			t.Errorf("Peek = %+v after two successes, one of which was late, want it closed", got)
		}
		end(second)
	})
}

// Flows that a breaker admitted do not count after its state has changed, whatever the states are. This also holds for
// flows of the same moment.
func TestCircuitBreakerForgetsWhatWasBefore(t *testing.T) {
	sides.Setup{Policies: sides.Policies(circuitBreaker(nil))}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		fail := func(flows []*flowctl.Flow) {
			for _, flow := range flows {
				flow.SetStatus(flowctl.StatusError)
				end(flow)
			}
			<-time.After(told)
		}
		want := func(phase string) {
			t.Helper()
			if got := state(t, side, ""); got.State != phase {
				t.Errorf("the breaker is %s want %s", got.State, phase)
			}
		}
		begin := func(n int) (flows []*flowctl.Flow) {
			for range n {
				flows = append(flows, side.Client.Start(t.Context(), "point", flowctl.Params{}))
			}
			return flows
		}
		closed := begin(9)
		fail(closed[:3])
		want("open")
		fail(closed[3:6])
		<-time.After(30 * time.Second)
		probes := begin(2)
		fail(closed[6:7])
		want("half-open")
		end(probes[0])
		end(probes[1])
		<-time.After(told)
		want("closed")
		fail(closed[7:])
		fail(begin(2))
		want("closed")
		fail(begin(1))
		want("open")
	})
}

// A flow that waits in a queue is not slow for that.
func TestCircuitBreakerIgnoresWaits(t *testing.T) {
	components := []policy.Component{
		circuitBreaker(func(b *policy.CircuitBreaker) { b.FailureCount, b.MinFlows, b.SlowAfter = 1, 0, 5*time.Second }),
		policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
	}
	sides.Setup{Policies: sides.Policies(components...)}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		var flows sync.WaitGroup
		for range 5 { // the last of them waits for 16 s
			flows.Go(func() { call(t, side, "4s", nil) })
		}
		flows.Wait()
		if got := state(t, side, ""); got.State != "closed" {
			t.Errorf("Peek = %+v want it closed", got)
		}
		call(t, side, "6s", nil)
		if got := state(t, side, ""); got.State != "open" {
			t.Errorf("Peek = %+v want it open", got)
		}
	})
}

// A flow whose result the cache has says nothing of the work: it closes no breaker.
func TestCircuitBreakerIgnoresHits(t *testing.T) {
	setup := sides.Setup{Policies: sides.Policies(circuitBreaker(func(b *policy.CircuitBreaker) { b.Probes = 1 }))}
	setup.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		side.StoreResult("point", "key", []byte("value"), time.Hour)
		for range 3 {
			call(t, side, "error", nil)
		}
		<-time.After(30 * time.Second)
		for range 3 {
			flow := side.Client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "key"})
			if _, ok, _ := flow.ResultCache(); !ok {
				t.Errorf("%v: %v want a hit", flow, flow.Err())
			}
			end(flow)
			<-time.After(told)
		}
		if got := state(t, side, ""); got.State != "half-open" {
			t.Errorf("Peek = %+v want it half-open", got)
		}
		call(t, side, "ok", nil)
		if got := state(t, side, ""); got.State != "closed" {
			t.Errorf("Peek = %+v want it closed", got)
		}
	})
}

// A served breaker hears by the session of a client without telemetry how its flows end. Flows that do not end take the places of
// probes for no longer than ProbeTimeout.
func TestCircuitBreakerWithoutTelemetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		setup := sides.Setup{Policies: sides.Policies(circuitBreaker(nil))}
		speaks := setup.New(t, sides.Served)
		setup.Options = []flowctl.Option{flowctl.WithoutTelemetry()}
		silent := setup.New(t, sides.Served)
		for range 9 {
			call(t, silent, "error", nil)
			call(t, speaks, "error", nil)
		}
		if got := [...]string{state(t, silent, "").State, state(t, speaks, "").State}; got != [...]string{"open", "open"} {
			t.Errorf("without telemetry and with it the breakers are %v want both open", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		side := sides.Setup{Policies: sides.Policies(circuitBreaker(nil)), Options: []flowctl.Option{flowctl.WithoutTelemetry()}}.New(t, sides.Served)
		here, err := flowctl.New(side.Engine)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			flow := here.Start(t.Context(), "point", flowctl.Params{})
			flow.SetStatus(flowctl.StatusError)
			end(flow)
		}
		<-time.After(30 * time.Second)
		for range 2 {
			flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
			if flow.Decision() != flowctl.Accepted {
				t.Errorf("%v: %v want it accepted", flow, flow.Err())
			}
			defer func() {
				if got := end(flow); got != (flowctl.EndResponse{}) {
					t.Errorf("End = %+v want no slot", got)
				}
			}()
		}
		for _, want := range []engine.Usage{{Capacity: 2, InFlight: 2, State: "half-open"}, {Capacity: 2, Remaining: 2, State: "half-open"}} {
			if got := state(t, side, ""); got != want {
				t.Errorf("Peek = %+v want %+v", got, want)
			}
			<-time.After(time.Minute)
		}
	})
}

// A flow that is dropped beside others by a breaker and by a rate limiter has the reason of the one with the longer wait.
func TestCircuitBreakerBesideAnother(t *testing.T) {
	for _, tt := range []struct {
		interval time.Duration
		want     flowctl.RejectReason
		cause    flowctl.RejectCause
	}{
		{time.Second, flowctl.ReasonNoTokens, flowctl.CauseCircuitOpen},
		{time.Hour, flowctl.ReasonRateLimited, flowctl.CauseNone},
	} {
		t.Run(tt.interval.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, client := opened(t, circuitBreaker(nil), policy.RateLimiter{Selectors: policy.At("point"), Capacity: 3, Fill: 3, Interval: tt.interval, StepFill: true})
				for range 3 {
					flow := client.Start(t.Context(), "point", flowctl.Params{})
					flow.SetStatus(flowctl.StatusError)
					end(flow)
				}
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				defer end(flow)
				r, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
				if !ok || r.Reason != tt.want || r.Cause() != tt.cause {
					t.Errorf("%v want %v, %v", flow.Err(), tt.want, tt.cause)
				}
				if got := e.Stats().ControlPoints[1]; got.RateLimited+got.NoTokens != 1 || got.NoTokens != b2u(tt.want == flowctl.ReasonNoTokens) {
					t.Errorf("Stats = %+v want one flow rejected with %v", got, tt.want)
				}
			})
		})
	}
}

// What a program is called back with, IsFailure, may use the breaker: no lock is held.
func TestCircuitBreakerCallsBackWithoutLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := opened(t, circuitBreaker(func(b *policy.CircuitBreaker) { b.FailureCount, b.MinFlows = 1, 0 }))
		asked := 0
		guarded := headgate.Guard(client, "point", flowctl.Params{IsFailure: func(error) bool {
			asked++
			if _, err := peekAt(e, "p", "circuit_breaker.0", ""); err != nil {
				t.Error(err)
			}
			_ = e.Stats()
			end(client.Start(t.Context(), "point", flowctl.Params{}))
			return true
		}}, func(context.Context) (int, error) { return 0, errUpstream }, nil)
		for range 3 {
			_, _ = guarded(t.Context())
		}
		if got := e.Stats().Components[0]; asked != 1 || got.Opened != 1 || got.Dropped != 2 {
			t.Errorf("IsFailure was called %d times, Stats = %+v want it called once, and two flows dropped", asked, got)
		}
	})
}

// Many flows at once: no more of a half-open breaker's flows run than it has probes, and in the end all places are free. Flows that
// fail have it change its state meanwhile; then the probes of before may still run.
func TestCircuitBreakerProbesAtOnce(t *testing.T) {
	const probes = 3
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprintf("fails=%v", fails), func(t *testing.T) {
			e, client := opened(t, circuitBreaker(func(b *policy.CircuitBreaker) {
				b.FailureCount, b.MinFlows, b.OpenDuration, b.Probes, b.Successes = 1, 0, time.Nanosecond, probes, 1<<30
			}))
			flow := client.Start(t.Context(), "point", flowctl.Params{})
			flow.SetStatus(flowctl.StatusError)
			end(flow)
			var under, most, ran atomic.Int64
			var callers sync.WaitGroup
			for i := range 8 {
				callers.Go(func() {
					random := rand.New(rand.NewPCG(uint64(i), 3))
					for range race.Pick(2000, 10_000) {
						ctx, cancel := context.WithCancel(context.Background())
						_, _ = headgate.Guard(client, "point", flowctl.Params{}, func(context.Context) (int, error) {
							ran.Add(1)
							n := under.Add(1)
							defer under.Add(-1)
							for old := most.Load(); n > old; old = most.Load() {
								if most.CompareAndSwap(old, n) {
									break
								}
							}
							runtime.Gosched()
							switch dice := random.IntN(10); {
							case dice == 0 && fails:
								return 0, errUpstream
							case dice == 1:
								cancel()
								return 0, ctx.Err()
							}
							return 0, nil
						}, nil)(ctx)
						cancel()
					}
				})
			}
			callers.Wait()
			got := e.Stats().Components[0]
			if most.Load() > probes && !fails || ran.Load() == 0 || got.Opened > 1 != fails || got.Open != 1 || got.Usage.InFlight != 0 {
				t.Errorf("%d of %d probes ran at once want at most %d; Stats = %+v", most.Load(), ran.Load(), probes, got)
			}
		})
	}
}

// A breaker that is unused is forgotten, also one that is open and that no flow comes to any more.
func TestCircuitBreakersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := opened(t, circuitBreaker(func(b *policy.CircuitBreaker) { b.LimitBy, b.MaxIdle = "upstream", time.Hour }))
		begin := func(upstream string) *flowctl.Flow {
			return client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"upstream": upstream}})
		}
		fail := func(flow *flowctl.Flow) {
			flow.SetStatus(flowctl.StatusError)
			end(flow)
		}
		late := begin("down")
		end(begin("up"))
		for range 3 {
			fail(begin("down"))
		}
		if got := e.Stats().Components[0]; got.Keys != 1 || got.Open != 1 || got.Opened != 1 {
			t.Errorf("Stats = %+v want a key, whose breaker is open: successes need none", got)
		}
		<-time.After(50 * time.Minute)
		if got := e.Stats().Components[0]; got.Keys != 1 || got.Open != 1 {
			t.Errorf("after 50 minutes Stats = %+v want the same", got)
		}
		<-time.After(12 * time.Minute)
		if got := e.Stats().Components[0]; got.Keys != 0 || got.Open != 0 || got.Opened != 1 {
			t.Errorf("after an hour Stats = %+v want no key, and no breaker open", got)
		}
		fail(late) // it began before the breaker opened
		fail(begin("down"))
		fail(begin("down"))
		if got := e.Stats().Components[0]; got.Keys != 1 || got.Open != 0 {
			t.Errorf("Stats = %+v want the breaker closed: a flow of before does not count", got)
		}
		fail(begin("down"))
		if got := e.Stats().Components[0]; got.Open != 1 {
			t.Errorf("Stats = %+v want the breaker open", got)
		}
	})
}

// Values beyond the cap share a breaker.
func TestCircuitBreakerBeyondTheCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := reloadable(t, []policy.Component{circuitBreaker(func(b *policy.CircuitBreaker) {
			b.LimitBy, b.FailureCount, b.FailureRatio = "upstream", 0, 0.5
		})}, engine.WithKeyCap(1))
		run := func(upstream string, status flowctl.Status) flowctl.Decision {
			flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"upstream": upstream}})
			flow.SetStatus(status)
			end(flow)
			return flow.Decision()
		}
		run("known", flowctl.StatusOK)
		for i := range 3 {
			run(fmt.Sprint("made up ", i), flowctl.StatusError)
		}
		if got := run("made up 4", flowctl.StatusOK); got != flowctl.Rejected {
			t.Errorf("another value beyond the cap: %v want rejected", got)
		}
		if got := run("known", flowctl.StatusOK); got != flowctl.Accepted {
			t.Errorf("a value within the cap: %v want accepted", got)
		}
		<-time.After(30 * time.Second)
		run("made up 5", flowctl.StatusOK)
		run("made up 6", flowctl.StatusOK)
		if got := e.Stats().Components[0]; got.Keys != 1 || got.Overflows == 0 || got.Open != 0 || got.Opened != 1 {
			t.Errorf("Stats = %+v want the breaker of the others closed again", got)
		}
	})
}

// A change of policies keeps a breaker that is the same. Flows of one that is gone end without effect on the new one.
func TestCircuitBreakerOverApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaker := circuitBreaker(nil)
		e, client := reloadable(t, []policy.Component{breaker})
		apply := func(c ...policy.Component) {
			t.Helper()
			if err := e.Apply([]policy.Policy{{Name: "test", Components: c}}); err != nil {
				t.Fatal(err)
			}
		}
		var flows []*flowctl.Flow
		for range 9 {
			flows = append(flows, client.Start(t.Context(), "point", flowctl.Params{}))
		}
		fail := func(flows []*flowctl.Flow) {
			for _, flow := range flows {
				flow.SetStatus(flowctl.StatusError)
				end(flow)
			}
		}
		want := func(state string) {
			t.Helper()
			if got := e.Stats().Components[0].Usage.State; got != state {
				t.Errorf("the breaker is %s want %s", got, state)
			}
		}
		fail(flows[:2])
		apply(breaker, policy.Sampler{Selectors: policy.At("other"), AcceptPercentage: 1})
		fail(flows[2:3])
		want("open")
		breaker.OpenDuration = time.Second
		apply(breaker)
		fail(flows[3:])
		want("open")
		breaker.LimitBy = "upstream"
		apply(breaker)
		want("")
		breaker.LimitBy = ""
		apply(breaker)
		want("closed")
	})
}

// What a circuit breaker shows as metrics.
func TestCircuitBreakerMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider := new(metertest.Provider)
		e, client := opened(t, circuitBreaker(func(b *policy.CircuitBreaker) { b.LimitBy = "upstream" }))
		if err := e.Instrument(provider); err != nil {
			t.Fatal(err)
		}
		for _, upstream := range []string{"a", "a", "a", "a", "b"} {
			flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"upstream": upstream}})
			flow.SetStatus(flowctl.StatusError)
			end(flow)
		}
		want := map[string]float64{
			"circuit_breaker_counter_total decision_type=accepted limiter_dropped=false": 4,
			"circuit_breaker_counter_total decision_type=rejected limiter_dropped=true":  1,
			"circuit_breaker_opened_total": 1,
			"circuit_breaker_open":         1,
			"limiter_keys":                 2,
		}
		for key, n := range provider.Read(t.Context()) {
			var kept []string
			for part := range strings.FieldsSeq(key) {
				if !strings.HasPrefix(part, "policy_") && !strings.HasPrefix(part, "component_id") {
					kept = append(kept, part)
				}
			}
			name := strings.Join(kept, " ")
			if wanted, ok := want[name]; ok {
				if n != wanted {
					t.Errorf("%s = %v want %v", name, n, wanted)
				}
				delete(want, name)
			}
		}
		for name := range want {
			t.Errorf("%s is missing", name)
		}
	})
}
