package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A limit has nothing for most flows.
type limit struct {
	name   string
	of     func(dryRun bool) policy.Component // nil: it is in force without a component
	ramp   bool                               // for flows in ramp mode
	learns bool                               // it lets the flows of the first minute in
	slots  bool                               // flows hold slots of it
	reason flowctl.RejectReason
}

var dryRunLimits = []limit{
	{name: "rate limiter", reason: flowctl.ReasonRateLimited, of: func(dry bool) policy.Component {
		return policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Interval: time.Hour, DryRun: dry}
	}},
	{name: "concurrency limiter", slots: true, reason: flowctl.ReasonRateLimited, of: func(dry bool) policy.Component {
		return policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour, DryRun: dry}
	}},
	{name: "quota scheduler", reason: flowctl.ReasonNoTokens, of: func(dry bool) policy.Component {
		return policy.QuotaScheduler{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Second, DryRun: dry}
	}},
	{name: "concurrency scheduler", slots: true, reason: flowctl.ReasonNoTokens, of: func(dry bool) policy.Component {
		return policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour, DryRun: dry}
	}},
	{name: "load scheduler", reason: flowctl.ReasonNoTokens, learns: true, of: func(dry bool) policy.Component {
		return policy.LoadScheduler{Selectors: policy.At(point), LoadMultiplier: policy.Constant(0), DryRun: dry}
	}},
	{name: "AIMD load scheduler", reason: flowctl.ReasonNoTokens, learns: true, of: func(dry bool) policy.Component {
		return policy.AIMDLoadScheduler{Selectors: policy.At(point), Signal: policy.Constant(2), Setpoint: policy.Constant(1), DryRun: dry}
	}},
	{name: "sampler", reason: flowctl.ReasonNotSampled, of: func(dry bool) policy.Component {
		return policy.Sampler{Selectors: policy.At(point), DryRun: dry}
	}},
	{name: "ramp", reason: flowctl.ReasonNoMatchingRamp, ramp: true, of: func(dry bool) policy.Component {
		return policy.LoadRamp{Selectors: policy.At(point), Steps: []policy.RampStep{{Target: 0}}, Start: true, DryRun: dry}
	}},
	{name: "no ramp", reason: flowctl.ReasonNoMatchingRamp, ramp: true},
}

// policies are those with the limit.
func (l limit) policies(dry bool) []policy.Policy {
	if l.of == nil {
		return nil
	}
	return []policy.Policy{{Name: "limits", Components: []policy.Component{l.of(dry)}}}
}

// learn starts the flows that the limit learns from.
func (l limit) learn(t *testing.T, client *flowctl.Client) {
	if !l.learns {
		return
	}
	for range 60 {
		_, _ = client.Start(t.Context(), point, flowctl.Params{CheckTimeout: 20 * time.Millisecond}).End(t.Context())
		<-time.After(time.Second)
	}
}

// A switchedOff is a way to have no limit in force.
type switchedOff struct {
	name      string
	off       bool // without a client
	component bool // the component is in dry run
	opts      []flowctl.Option
}

var switchesOff = []switchedOff{
	{name: "nil client", off: true},
	{name: "client's dry run", opts: []flowctl.Option{flowctl.WithDryRun()}},
	{name: "component's dry run", component: true},
}

// side is an agent of the kind that has the limit, and a client of it. A scripted one is as all agents that know nothing of
// dry runs.
func (l limit) side(t *testing.T, kind sides.Kind, s switchedOff) *sides.Side {
	t.Helper()
	side := sides.Setup{Policies: l.policies(s.component), Options: s.opts}.New(t, kind)
	if side.Script != nil && !s.component {
		side.Script.AnswerAt(point, flowtest.Answer{Reason: l.reason, RetryAfter: time.Minute, Slots: 1})
	}
	return side
}

var errFellBack = errors.New("the fallback was called")

// guarded are the ways in which a program has its work guarded. Each gives a function that does the work once.
var guarded = []struct {
	name string
	by   func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error
}{
	{"Start", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		return func(ctx context.Context) (err error) {
			flow := client.Start(ctx, point, params)
			defer flow.EndWith(&err)
			if !flow.ShouldRun() {
				return flow.Err()
			}
			work()
			return nil
		}
	}},
	{"Do", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		return func(ctx context.Context) error {
			return headgate.Do(ctx, client, point, params, func(context.Context, *flowctl.Flow) error { work(); return nil })
		}
	}},
	{"Guard", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		return onlyError(headgate.Guard(client, point, params, worker(work), fellBack))
	}},
	{"GuardFunc", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		f := headgate.GuardFunc(client, point, func(context.Context, int) flowctl.Params { return params },
			func(context.Context, int) (int, error) { work(); return 0, nil },
			func(context.Context, int, error) (int, error) { return 0, errFellBack })
		return func(ctx context.Context) error { _, err := f(ctx, 1); return err }
	}},
	{"Retrying", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		return onlyError(headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{Attempts: -1, Budget: -1}), point, params, worker(work), fellBack))
	}},
	{"Cached", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		calls := 0
		var mu sync.Mutex
		return func(ctx context.Context) error {
			mu.Lock()
			calls++
			params := params
			params.ResultCacheKey = "call " + strconv.Itoa(calls)
			mu.Unlock()
			return onlyError(headgate.Cached(client, point, params, worker(work), fellBack, headgate.CachePolicy[int]{TTL: time.Hour}))(ctx)
		}
	}},
	{"unary server", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		intercept := grpcguard.UnaryServerInterceptor(client, point, callParams(params))
		return func(ctx context.Context) error {
			_, err := intercept(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/shop/Get"},
				func(context.Context, any) (any, error) { work(); return nil, nil })
			return err
		}
	}},
	{"stream server", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		intercept := grpcguard.StreamServerInterceptor(client, point, callParams(params))
		return func(ctx context.Context) error {
			return intercept(nil, dryRunStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: "/shop/Watch"},
				func(any, grpc.ServerStream) error { work(); return nil })
		}
	}},
	{"unary client", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		intercept := grpcguard.UnaryClientInterceptor(client, point, callParams(params))
		return func(ctx context.Context) error {
			return intercept(ctx, "/shop/Get", nil, nil, nil,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					work()
					return nil
				})
		}
	}},
	{"stream client", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		intercept := grpcguard.StreamClientInterceptor(client, point, callParams(params))
		return func(ctx context.Context) error {
			ran := errors.New("the stream ends as it begins")
			_, err := intercept(ctx, &grpc.StreamDesc{}, nil, "/shop/Watch",
				func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
					work()
					return nil, ran
				})
			if errors.Is(err, ran) {
				return nil
			}
			return err
		}
	}},
	{"middleware", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		handler := httpguard.Middleware(client, point, httpguard.WithRateLimitHeaders(),
			httpguard.WithParams(func(*http.Request) flowctl.Params { return params }))(http.HandlerFunc(
			func(http.ResponseWriter, *http.Request) { work() }))
		return func(ctx context.Context) error {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", http.NoBody).WithContext(ctx))
			if w.Code != http.StatusOK || w.Header().Get("RateLimit") != "" || w.Header().Get("Retry-After") != "" {
				return fmt.Errorf("answered %d with %v", w.Code, w.Header())
			}
			return nil
		}
	}},
	{"transport", func(client headgate.Starter, params flowctl.Params, work func()) func(context.Context) error {
		transport := httpguard.NewTransport(client, point, roundTrips(func(r *http.Request) (*http.Response, error) {
			work()
			return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: r}, nil
		}), httpguard.WithParams(func(*http.Request) flowctl.Params { return params }))
		return func(ctx context.Context) error {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://api.example/", http.NoBody)
			if err != nil {
				return err
			}
			resp, err := transport.RoundTrip(r)
			if err != nil {
				return err
			}
			return resp.Body.Close()
		}
	}},
}

type roundTrips func(*http.Request) (*http.Response, error)

func (f roundTrips) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func worker(work func()) func(context.Context) (int, error) {
	return func(context.Context) (int, error) { work(); return 0, nil }
}

func fellBack(context.Context, error) (int, error) { return 0, errFellBack }

func onlyError(f func(context.Context) (int, error)) func(context.Context) error {
	return func(ctx context.Context) error { _, err := f(ctx); return err }
}

func callParams(params flowctl.Params) grpcguard.Option {
	return grpcguard.WithParams(func(context.Context, grpcguard.Call) flowctl.Params { return params })
}

// dryRunStream is a stream of which only the context matters.
type dryRunStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s dryRunStream) Context() context.Context { return s.ctx }

// overDryRuns runs f in a bubble for each limit that is not in force, by each way to have it so, at each agent.
func overDryRuns(t *testing.T, f func(t *testing.T, client *flowctl.Client, params flowctl.Params, s switchedOff)) {
	for _, s := range switchesOff {
		for _, kind := range sides.AllAndStored {
			for _, l := range dryRunLimits {
				if s.off && kind != sides.Embedded || s.component && l.of == nil {
					continue // there is no agent, or no component
				}
				t.Run(s.name+"/"+string(kind)+"/"+l.name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						params := flowctl.Params{RampMode: l.ramp, CheckTimeout: time.Minute}
						if s.off {
							f(t, nil, params, s)
							return
						}
						client := l.side(t, kind, s).Client
						l.learn(t, client)
						f(t, client, params, s)
					})
				})
			}
		}
	}
}

// Where no limit is in force, nothing happens: work runs at once, all of it at the same time, and no fallback is called.
func TestDryRun(t *testing.T) {
	const calls = 5
	overDryRuns(t, func(t *testing.T, client *flowctl.Client, params flowctl.Params, _ switchedOff) {
		for _, g := range guarded {
			var working sync.WaitGroup
			working.Add(calls)
			all := make(chan struct{})
			go func() { working.Wait(); close(all) }()
			call := g.by(client, params, func() {
				working.Done()
				select {
				case <-all:
				case <-time.After(time.Hour):
				}
			})
			begin := time.Now()
			var done sync.WaitGroup
			for range calls {
				done.Go(func() {
					if err := call(t.Context()); err != nil {
						working.Done()
						t.Errorf("%s: %v", g.name, err)
					}
				})
			}
			done.Wait()
			if took := time.Since(begin); took != 0 {
				t.Errorf("%s: %d calls took %v want no time", g.name, calls, took)
			}
		}
	})
}

// The limits that TestDryRun has out of force do reject and hold up flows when they are in force.
func TestDryRunLimitsInForce(t *testing.T) {
	for _, kind := range sides.AllAndStored {
		for _, l := range dryRunLimits {
			t.Run(string(kind)+"/"+l.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					params := flowctl.Params{RampMode: l.ramp, CheckTimeout: time.Minute}
					client := l.side(t, kind, switchedOff{}).Client
					l.learn(t, client)
					begin, rejected := time.Now(), 0
					for range 5 {
						flow := client.Start(t.Context(), point, params)
						if !flow.ShouldRun() {
							rejected++
						}
						defer func() { _, _ = flow.End(t.Context()) }()
					}
					if rejected == 0 && time.Since(begin) == 0 {
						t.Error("five flows were accepted at once")
					}
				})
			})
		}
	}
}

// Where no limit is in force no slot is lost: work goes on, and nothing is counted or logged. It is lost where the limit is in force.
func TestDryRunLosesNoSlots(t *testing.T) {
	inForce := switchedOff{name: "in force"}
	for _, s := range append(slices.Clip(switchesOff[1:]), inForce) {
		for _, kind := range sides.AllAndStored {
			for _, l := range dryRunLimits {
				if !l.slots {
					continue
				}
				t.Run(s.name+"/"+string(kind)+"/"+l.name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						var log strings.Builder
						logger := slog.New(slog.NewTextHandler(&log, nil))
						meter := new(metertest.Provider)
						side := sides.Setup{
							Policies:      l.policies(s.component),
							EngineOptions: []engine.Option{engine.WithLogger(logger)},
							Options: append(slices.Clip(s.opts), flowctl.WithCancelOnLostSlot(),
								flowctl.WithMeterProvider(meter), flowctl.WithLogger(logger)),
						}.New(t, kind)
						if kind != sides.Scripted {
							<-time.After(time.Minute) // a session has begun
						}
						canceled := false
						_ = headgate.Do(t.Context(), side.Client, point, flowctl.Params{}, func(ctx context.Context, _ *flowctl.Flow) error {
							side.Cut()
							<-time.After(5 * time.Minute) // no slot lasts that long then
							canceled = errors.Is(context.Cause(ctx), flowctl.ErrSlotLost)
							return ctx.Err()
						})
						synctest.Wait()
						want := s.name == inForce.name && (kind == sides.Served || kind == sides.Stored)
						lost := meter.Read(t.Context())["flowcontrol_lost_slots_total"] > 0
						if logged := strings.Contains(log.String(), "slots of flows"); canceled != want || lost != want || logged != want {
							t.Errorf("canceled: %v, counted: %v, logged: %v want %v\n%s", canceled, lost, logged, want, log.String())
						}
					})
				})
			}
		}
	}
}

// Without a limit in force caches hit as without limits. A nil client has no cache.
func TestDryRunCaches(t *testing.T) {
	const calls = 5 // the first misses
	overDryRuns(t, func(t *testing.T, client *flowctl.Client, params flowctl.Params, s switchedOff) {
		runs := 0
		report := headgate.Cached(client, point, params,
			func(context.Context) (string, error) { runs++; return "report", nil },
			func(context.Context, error) (string, error) { return "", errFellBack }, headgate.CachePolicy[string]{TTL: time.Hour})
		begin := time.Now()
		for range calls {
			if got, err := report(t.Context()); got != "report" || err != nil {
				t.Fatalf("report() = %q, %v", got, err)
			}
			synctest.Wait() // a run stores its value after its call has returned
		}
		want := 1
		if s.off {
			want = calls
		}
		if took := time.Since(begin); runs != want || took != 0 {
			t.Errorf("the function ran %d times for %d calls in %v want %d, in no time", runs, calls, took, want)
		}
		if s.off {
			return
		}
		params.ResultCacheKey, params.GlobalCacheKeys = "own", []string{"shared"}
		for _, want := range []bool{false, true} {
			err := headgate.Do(t.Context(), client, point, params, func(ctx context.Context, flow *flowctl.Flow) error {
				result, hit, err := flow.ResultCache()
				if hit != want || err != nil || hit && string(result) != "mine" {
					t.Errorf("ResultCache() = %q, %v, %v want a hit: %v", result, hit, err, want)
				}
				global, hit, err := flow.GlobalCache("shared")
				if hit != want || err != nil || hit && string(global) != "ours" {
					t.Errorf("GlobalCache() = %q, %v, %v want a hit: %v", global, hit, err, want)
				}
				return errors.Join(flow.SetResultCache(ctx, []byte("mine"), 0), flow.SetGlobalCache(ctx, "shared", []byte("ours"), 0))
			})
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// A dry run tells in its logs and metrics what would have become of a flow that runs.
func TestDryRunTells(t *testing.T) {
	overDryRuns(t, func(t *testing.T, client *flowctl.Client, params flowctl.Params, s switchedOff) {
		var last *flowctl.Flow
		for range 3 {
			last = client.Start(t.Context(), point, params)
			defer func() { _, _ = last.End(t.Context()) }()
		}
		want := flowctl.Accepted
		if s.opts != nil {
			want = flowctl.Rejected
		}
		if last.Decision() != want || errors.Is(last.Err(), flowctl.ErrRejected) != (want == flowctl.Rejected) {
			t.Errorf("the third flow is %v with %v want %v", last.Decision(), last.Err(), want)
		}
		if last.HTTPStatus() != 200 {
			t.Errorf("HTTPStatus() = %d want 200, for it runs", last.HTTPStatus())
		}
	})
}

// Flows that no agent decides about run too, and wait for no more than the check timeout, of an agent that hangs.
func TestDryRunWithoutAnAnswer(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name     string
		ctx      context.Context
		params   flowctl.Params
		answer   flowtest.Answer
		decision flowctl.Decision
		takes    time.Duration
	}{
		{"invalid", t.Context(), flowctl.Params{Labels: map[string]string{"": "x"}}, flowtest.Answer{Hang: true}, flowctl.Invalid, 0},
		{"canceled", canceled, flowctl.Params{}, flowtest.Answer{Hang: true}, flowctl.Canceled, 0},
		{"ramp mode", t.Context(), flowctl.Params{RampMode: true}, flowtest.Answer{Fail: errors.New("broken")}, flowctl.Unreachable, 0},
		{
			"fails closed", t.Context(),
			flowctl.Params{OnUnreachable: flowctl.FailClosed},
			flowtest.Answer{Fail: errors.New("broken")},
			flowctl.Unreachable, 0,
		},
		{"hangs", t.Context(), flowctl.Params{CheckTimeout: 50 * time.Millisecond}, flowtest.Answer{Hang: true}, flowctl.Unreachable, 50 * time.Millisecond},
		{"hangs, no timeout", t.Context(), flowctl.Params{CheckTimeout: -1}, flowtest.Answer{Hang: true}, flowctl.Unreachable, 200 * time.Millisecond},
		{
			"has a queue, no timeout", t.Context(),
			flowctl.Params{CheckTimeout: -1},
			flowtest.Answer{Delay: time.Hour},
			flowctl.Unreachable, 200 * time.Millisecond,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				client := agent.Client(flowctl.WithDryRun())
				if err := client.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				agent.Answer(tt.answer)
				for _, client := range []*flowctl.Client{client, nil} {
					begin := time.Now()
					flow := client.Start(tt.ctx, point, tt.params)
					want, takes := tt.decision, tt.takes
					if client == nil {
						want, takes = flowctl.Accepted, 0
					}
					if took := time.Since(begin); !flow.ShouldRun() || flow.Decision() != want || took != takes {
						t.Errorf("%v after %v, runs: %v want %v after %v, and to run", flow, took, flow.ShouldRun(), want, takes)
					}
					if flow.HTTPStatus() != 200 {
						t.Errorf("HTTPStatus() = %d want 200", flow.HTTPStatus())
					}
					_, _ = flow.End(t.Context())
				}
			})
		})
	}
}

// In a dry run, a call whose context ends while it waits for an agent gives what its function gives, as without flow control. So does
// one that shares the wait of another call.
func TestDryRunCallsThatEndMeanwhile(t *testing.T) {
	type call = func(context.Context) (int, error)
	for name, makes := range map[string]func(client headgate.Starter, fn call) call{
		"Guard": func(client headgate.Starter, fn call) call {
			return headgate.Guard(client, point, flowctl.Params{}, fn, nil)
		},
		"Cached": func(client headgate.Starter, fn call) call {
			return headgate.Cached(client, point, flowctl.Params{}, fn, nil, headgate.CachePolicy[int]{})
		},
		"Cached and Retrying": func(client headgate.Starter, fn call) call {
			return headgate.Cached(headgate.Retrying(client, headgate.RetryPolicy{}), point, flowctl.Params{}, fn, nil, headgate.CachePolicy[int]{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				client := agent.Client(flowctl.WithDryRun(), flowctl.WithCheckTimeout(150*time.Millisecond))
				if err := client.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				agent.Answer(flowtest.Answer{Hang: true})
				guarded := makes(client, func(context.Context) (int, error) { return 7, nil })
				const ms = time.Millisecond
				var wg sync.WaitGroup
				for _, most := range []time.Duration{20 * ms, 10 * ms, 30 * ms, 500 * ms} { // the first one begins the run
					wg.Go(func() {
						ctx, cancel := context.WithTimeout(t.Context(), most)
						defer cancel()
						if v, err := guarded(ctx); v != 7 || err != nil {
							t.Errorf("after %v: %v, %v want 7", most, v, err)
						}
					})
					synctest.Wait()
				}
				wg.Wait()
			})
		})
	}
}
