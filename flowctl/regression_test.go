package flowctl_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Bugs of other libraries for flow control, each by its own name, that this one must not have.

// withoutAgent runs f in a bubble with a client of each kind of agent, none of which answers.
func withoutAgent(t *testing.T, f func(t *testing.T, client *flowctl.Client), opts ...flowctl.Option) {
	t.Helper()
	sides.Setup{Options: opts}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		side.Silence()
		f(t, side.Client)
	})
}

// A1: flows in ramp mode panicked when the agent was down.
func TestA1RampModeWithoutAnAgent(t *testing.T) {
	withoutAgent(t, func(t *testing.T, client *flowctl.Client) {
		flow := client.Start(t.Context(), "point", flowctl.Params{RampMode: true})
		if flow.Decision() != flowctl.Unreachable || flow.ShouldRun() {
			t.Errorf("%v, ShouldRun() = %v want unreachable, and not to run", flow, flow.ShouldRun())
		}
		if flow.HTTPStatus() != http.StatusServiceUnavailable || flow.RejectReason() != flowctl.ReasonNone {
			t.Errorf("HTTPStatus() = %d, RejectReason() = %v", flow.HTTPStatus(), flow.RejectReason())
		}
	})
}

// A2: asking a flow for its HTTP status panicked when the agent was down.
func TestA2StatusWithoutAnAgent(t *testing.T) {
	withoutAgent(t, func(t *testing.T, client *flowctl.Client) {
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		if !flow.ShouldRun() || flow.HTTPStatus() != http.StatusOK || flow.RetryAfter() != 0 || flow.CheckResponse() != nil {
			t.Errorf("ShouldRun() = %v, HTTPStatus() = %d, RetryAfter() = %v, CheckResponse() = %v",
				flow.ShouldRun(), flow.HTTPStatus(), flow.RetryAfter(), flow.CheckResponse())
		}
	})
}

// A3: a flow that ran without an agent could not be ended, and was never seen in a trace.
func TestA3FlowsWithoutAnAgentEnd(t *testing.T) {
	p, counts := new(tracers), new(metertest.Provider)
	withoutAgent(t, func(t *testing.T, client *flowctl.Client) {
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		flow.SetError(errors.New("work"))
		if got, err := flow.End(t.Context()); err != nil || got != (flowctl.EndResponse{}) {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
			t.Errorf("second End() = %v want ErrEnded", err)
		}
		if s := p.spans[len(p.spans)-1]; s.ended != 1 || s.status != otelcodes.Error {
			t.Errorf("the flow's span ended %d times with %v want once, as a failure", s.ended, s.status)
		}
	}, flowctl.WithTracerProvider(p), flowctl.WithMeterProvider(counts))
	got := counts.Read(t.Context())
	if n := got["flowcontrol_decisions_total control_point=point decision_type=unreachable"]; n != 3 {
		t.Errorf("%v flows without an agent were counted want 3: %v", n, got)
	}
}

// A4: a flow whose telemetry could not be encoded was not ended at the agent, and its slot was lost.
func TestA4SlotsComeBackWithoutTelemetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Response: &checkv1.CheckResponse{
			LimiterDecisions:    []*checkv1.LimiterDecision{held("root.0", "slot", false)},
			TelemetryFlowLabels: map[string]string{"large": strings.Repeat("v", 4<<20)}, // more than a batch of telemetry holds
		}})
		client := agent.Client(flowctl.WithCheckTimeout(time.Minute))
		flow := client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "r"}) // whose answer may be large
		if got, err := flow.End(t.Context()); err != nil || got.Held != 1 {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if got := len(agent.Ends()); got != 1 {
			t.Errorf("%d calls ended the flow want one", got)
		}
		_ = client.Close(t.Context())
		if got := len(agent.Spans()); got != 0 {
			t.Fatalf("%d records were sent: the test needs one that cannot be", got)
		}
	})
}

// A5: an API key replaced all that the caller's context had for the agent, and telemetry went without the key.
func TestA5CallersMetadataStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client(flowctl.WithAPIKey("sesame"))
		ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-1-2-3", "authorization", "bearer")
		_, _ = client.Start(ctx, "point", flowctl.Params{}).End(ctx)
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		md := agent.Checks()[0].Metadata
		for key, want := range map[string]string{"x-api-key": "sesame", "traceparent": "00-1-2-3", "authorization": "bearer"} {
			if got := md.Get(key); len(got) != 1 || got[0] != want {
				t.Errorf("metadata %s = %q want %q", key, got, want)
			}
		}
		if got := agent.Spans()[0].Metadata.Get("x-api-key"); len(got) != 1 || got[0] != "sesame" {
			t.Errorf("telemetry came with the key %q", got)
		}
	})
}

// A6: with an API key, the application's own interceptors were dropped.
func TestA6InterceptorsStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Slots: 1})
		var seen [2]atomic.Int64
		count := func(n *atomic.Int64) grpc.UnaryClientInterceptor {
			return func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				n.Add(1)
				return invoke(ctx, method, req, reply, conn, opts...)
			}
		}
		client := agent.Client(flowctl.WithAPIKey("sesame"), flowctl.WithDialOptions(
			grpc.WithUnaryInterceptor(count(&seen[0])), grpc.WithChainUnaryInterceptor(count(&seen[1]))))
		_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i := range seen {
			if got := seen[i].Load(); got != 3 { // check, end, export
				t.Errorf("interceptor %d saw %d calls want 3", i, got)
			}
		}
		if got := agent.Checks()[0].Metadata.Get("x-api-key"); len(got) != 1 {
			t.Errorf("the check came with the keys %q", got)
		}
	})
}

// A7: options were appended to the caller's slice.
func TestA7DialOptionsAreCopied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		shared := make([]grpc.DialOption, 1, 8)
		shared[0] = grpc.WithUserAgent("one")
		a := agent.Client(flowctl.WithDialOptions(shared...))
		b := agent.Client(flowctl.WithDialOptions(shared...), flowctl.WithDialOptions(grpc.WithUserAgent("two")))
		for _, o := range shared[:cap(shared)][1:] {
			if o != nil {
				t.Error("the caller's array was written to")
			}
		}
		a.Start(t.Context(), "a", flowctl.Params{})
		b.Start(t.Context(), "b", flowctl.Params{})
		for i, want := range []string{"one", "two"} {
			if got := agent.Checks()[i].Metadata.Get("user-agent"); !strings.HasPrefix(got[0], want) {
				t.Errorf("user agent = %q want %q", got, want)
			}
		}
	})
}

// A8: the program's global tracer provider was replaced, so that all its spans went to the agent.
func TestA8GlobalsStay(t *testing.T) {
	tracers, meters, propagator, logger := otel.GetTracerProvider(), otel.GetMeterProvider(), otel.GetTextMapPropagator(), slog.Default()
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		_ = client.Close(t.Context())
	})
	if otel.GetTracerProvider() != tracers || otel.GetMeterProvider() != meters || otel.GetTextMapPropagator() != propagator || slog.Default() != logger {
		t.Error("something global was replaced")
	}
}

// A9: clients that were closed lost the telemetry that waited, and left goroutines and connections behind.
func TestA9CloseLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		synctest.Wait()
		before := goleak.IgnoreCurrent()
		for range 50 {
			client := agent.Client()
			_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
			if err := client.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		agent.Drop() // its own ends of the connections
		synctest.Wait()
		if err := goleak.Find(before); err != nil {
			t.Error(err)
		}
		if got := len(agent.Spans()); got != 50 {
			t.Errorf("%d spans want 50", got)
		}
	})
}

// A10: the work's time was taken from before the check, and so had the time in the agent's queues in it.
func TestA10WorkStartsAfterTheCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Delay: 300 * time.Millisecond})
		client := agent.Client(flowctl.WithCheckTimeout(time.Second))
		begin := time.Now()
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		<-time.After(50 * time.Millisecond)
		_, _ = flow.End(t.Context())
		_ = client.Close(t.Context())
		s := agent.Spans()[0]
		if check, work := s.WorkloadStart.Sub(begin), s.End.Sub(s.WorkloadStart); check != 300*time.Millisecond || work != 50*time.Millisecond {
			t.Errorf("the work started after %v and took %v want 300ms, 50ms", check, work)
		}
	})
}

// A11: flows of traces that the application does not sample were hidden from the agent, whose policies feed on them;
// and neither the check nor the work was a child of the flow's span.
func TestA11UnsampledParent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent, p := flowtest.NewAgent(t), new(tracers)
		var check trace.Span
		client := agent.Client(flowctl.WithTracerProvider(p), flowctl.WithDialOptions(grpc.WithUnaryInterceptor(
			func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if method == checkv1.FlowControlService_Check_FullMethodName {
					check = trace.SpanFromContext(ctx)
				}
				return invoke(ctx, method, req, reply, conn, opts...)
			})))
		unsampled := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, Remote: true,
		}))
		flow := client.Start(unsampled, "point", flowctl.Params{})
		if len(p.spans) != 1 || check != p.spans[0] || trace.SpanFromContext(flow.Context()) != p.spans[0] {
			t.Errorf("%d spans; the check's is %v, the work's %v want the flow's", len(p.spans), check, trace.SpanFromContext(flow.Context()))
		}
		_, _ = flow.End(unsampled)
		_ = client.Close(t.Context())
		if got := len(agent.Spans()); got != 1 {
			t.Errorf("the agent heard of %d flows want 1", got)
		}
	})
}

// A20: references without content were sent, in a call for each flow that holds nothing.
func TestA20NoCallWithoutSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rateLimited := &checkv1.LimiterDecision{
			PolicyName: "p", ComponentId: "root.9",
			Details: &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{Label: "user:u"}},
		}
		agent := flowtest.NewAgent(t)
		agent.Answer(
			flowtest.Answer{Response: &checkv1.CheckResponse{LimiterDecisions: []*checkv1.LimiterDecision{rateLimited, rateLimited}}},
			flowtest.Answer{Response: &checkv1.CheckResponse{LimiterDecisions: []*checkv1.LimiterDecision{rateLimited, held("root.0", "slot", false)}}},
		)
		client := agent.Client()
		for want := range 2 {
			if got, err := client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context()); err != nil || got.Held != want {
				t.Errorf("End() = %+v, %v want %d held", got, err, want)
			}
			if got := len(agent.Ends()); got != want {
				t.Errorf("%d calls ended flows want %d", got, want)
			}
		}
		if refs := agent.Ends()[0].GetInflightRequests(); len(refs) != 1 || refs[0].GetRequestId() != "slot" {
			t.Errorf("references = %v want the slot's", refs)
		}
	})
}

// A21: an answer without parts made a flow panic.
func TestA21EmptyAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := answers(t, nil)
		flow := client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "r", GlobalCacheKeys: []string{"g"}})
		if !flow.ShouldRun() || flow.HTTPStatus() != http.StatusOK || flow.Err() != nil || flow.RetryAfter() != 0 || flow.CheckResponse() == nil {
			t.Errorf("%v, ShouldRun() = %v, HTTPStatus() = %d, RetryAfter() = %v", flow, flow.ShouldRun(), flow.HTTPStatus(), flow.RetryAfter())
		}
		if _, hit, err := flow.ResultCache(); hit || err != nil {
			t.Errorf("ResultCache() = %v, %v want a miss", hit, err)
		}
		if _, hit, err := flow.GlobalCache("g"); hit || err != nil {
			t.Errorf("GlobalCache() = %v, %v want a miss", hit, err)
		}
		if _, err := flow.End(t.Context()); err != nil {
			t.Errorf("End() = %v", err)
		}
	})
}

// A22: concurrent calls of End raced, and could end a flow twice.
func TestA22ConcurrentEnd(t *testing.T) {
	limit := policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 5, MaxInflight: time.Hour}
	setup := sides.Setup{Policies: sides.Policies(limit), Answers: []flowtest.Answer{{Slots: 1}}}
	setup.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
		var wg sync.WaitGroup
		var first, held, returned atomic.Int64
		for range 1000 {
			wg.Go(func() {
				flow.SetStatus(flowctl.StatusError)
				flow.SetError(nil)
				got, err := flow.End(t.Context())
				if err == nil {
					first.Add(1)
				} else if !errors.Is(err, flowctl.ErrEnded) {
					t.Errorf("End() = %v", err)
				}
				held.Add(int64(got.Held))
				returned.Add(int64(got.Returned))
			})
		}
		wg.Wait()
		calls, slots := side.Returned()
		if first.Load() != 1 || held.Load() != 1 || returned.Load() != 1 || calls != 1 || slots != 1 {
			t.Errorf("%d calls of End counted, for %d slots and %d that came back; %d reached the agent, with %d slots, want one of each",
				first.Load(), held.Load(), returned.Load(), calls, slots)
		}
	})
}

// A26: what became of a cache entry was told by the wrong type, and an agent that said nothing had succeeded.
func TestA26CacheCallsWithoutAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		flow := answers(t, nil).Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "sesame"})
		ctx := t.Context()
		for _, tt := range []struct {
			name, op string
			call     func() error
		}{
			{"SetResultCache", "cache store", func() error { return flow.SetResultCache(ctx, []byte("v"), 0) }},
			{"SetGlobalCache", "cache store", func() error { return flow.SetGlobalCache(ctx, "sesame", []byte("v"), 0) }},
			{"DeleteResultCache", "cache delete", func() error { return flow.DeleteResultCache(ctx) }},
			{"DeleteGlobalCache", "cache delete", func() error { return flow.DeleteGlobalCache(ctx, "sesame") }},
		} {
			err := tt.call()
			if err == nil || !strings.HasPrefix(err.Error(), "headgate: "+tt.op+` "point": `) || strings.Contains(err.Error(), "sesame") {
				t.Errorf("%s() = %v want an error of the %s, without the key", tt.name, err, tt.op)
			}
		}
	})
}

// A28: a client that could not be made left its connection open.
func TestA28FailedDialLeavesNothing(t *testing.T) {
	agent := flowtest.NewAgent(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	broken := errors.New("broken")
	t.Setenv("APERTURE_AGENT_ADDRESS", "localhost:1")
	t.Setenv("APERTURE_AGENT_INSECURE", "true")
	opts := []flowctl.Option{flowctl.WithDialOptions(agent.Dialer()), flowctl.WithMeterProvider(&metertest.Provider{Err: broken})}
	if _, err := flowctl.Dial("localhost:1", append(opts, flowctl.WithInsecure())...); !errors.Is(err, broken) {
		t.Errorf("Dial() = %v want the provider's error", err)
	}
	if _, err := flowctl.DialEnv(opts...); !errors.Is(err, broken) {
		t.Errorf("DialEnv() = %v want the provider's error", err)
	}
}

// C2: what a service's callers were told gave away its limiter, down to pointers.
func TestC2StatusesGiveNothingAway(t *testing.T) {
	secrets := []string{"the-policy", "the-component", "user_id", "sesame", "10.0.0.1"}
	rejectedBy := held("the-component", "", true)
	rejectedBy.PolicyName = "the-policy"
	for name, answer := range map[string]flowtest.Answer{
		"rejected": {Response: &checkv1.CheckResponse{
			DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED, RejectReason: checkv1.CheckResponse_REJECT_REASON_RATE_LIMITED,
			LimiterDecisions: []*checkv1.LimiterDecision{rejectedBy},
		}},
		"unreachable": {Fail: status.Error(codes.Unavailable, "dial 10.0.0.1: refused")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(answer)
				flow := agent.Client().Start(t.Context(), "point", flowctl.Params{
					Labels: map[string]string{"user_id": "sesame"}, OnUnreachable: flowctl.FailClosed,
				})
				s := status.Convert(flow.Err())
				if s.Code() == codes.OK || s.Code() == codes.Unknown {
					t.Fatalf("status = %v: the test needs the flow's own", s)
				}
				for _, secret := range secrets {
					if strings.Contains(s.Message(), secret) {
						t.Errorf("status %v shows %q", s, secret)
					}
				}
				if strings.Contains(flow.Err().Error(), "sesame") || strings.Contains(flow.Err().Error(), "0x") {
					t.Errorf("error %q shows a label or a pointer", flow.Err())
				}
			})
		})
	}
	t.Run("invalid", func(t *testing.T) {
		flow := noPolicies(t).Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "sesame\xff"}})
		if text := status.Convert(flow.Err()).Message(); strings.Contains(text, "sesame") || strings.Contains(text, "user_id") {
			t.Errorf("status message %q says what is invalid", text)
		}
	})
}

// F4: each call left a goroutine behind that waited for contexts which outlive it.
func TestF4FlowsLeaveNoGoroutines(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ctx, cancel := context.WithCancel(t.Context()) // as long-lived as a server's
		defer cancel()
		client.Start(ctx, "point", flowctl.Params{}).EndWith(nil)
		synctest.Wait()
		before := runtime.NumGoroutine()
		for range race.Pick(300, 1000) {
			flow := client.Start(ctx, "point", flowctl.Params{})
			// What the work derives must not cost a goroutine either, although the flow's context is of a type of its
			// own.
			work, done := context.WithTimeout(flow.Context(), time.Hour)
			defer done()
			_, stop := context.WithCancel(work)
			defer stop()
			_, _ = flow.End(ctx)
		}
		synctest.Wait()
		if after := runtime.NumGoroutine(); after > before+100 { // the process has others, which come and go
			t.Errorf("%d goroutines after hundreds of flows want %d", after, before)
		}
	})
}

// callback is a log handler that starts a flow for each line.
type callback struct {
	slog.Handler
	start func()
}

func (c *callback) Handle(ctx context.Context, r slog.Record) error {
	c.start()
	return c.Handler.Handle(ctx, r)
}

// G2: what the application has called back ran under a lock, so that it could not call in turn.
func TestG2CallbacksMayCallBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		var client *flowctl.Client
		var log bytes.Buffer
		params := flowctl.Params{}
		again := func() {
			flow := client.Start(t.Context(), "again", params)
			_, _, _ = flow.ShouldRun(), flow.Err(), flow.CheckResponse()
			_, _ = flow.End(t.Context())
			client.Start(t.Context(), "", params).EndWith(nil) // logs itself
		}
		client = agent.Client(flowctl.WithLogger(slog.New(&callback{slog.NewTextHandler(&log, nil), again})))

		client.Start(t.Context(), "", flowctl.Params{}).EndWith(nil) // invalid
		agent.Answer(flowtest.Answer{Slots: 1})
		agent.AnswerEnds(flowtest.Answer{Fail: status.Error(codes.Internal, "broken")}, flowtest.Answer{})
		client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil) // not ended
		agent.Answer(flowtest.Answer{Fail: status.Error(codes.Unauthenticated, "who are you?")}, flowtest.Answer{})
		client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil) // refused
		agent.AnswerSpans(flowtest.Answer{Fail: status.Error(codes.Internal, "broken")}, flowtest.Answer{})
		<-time.After(2 * time.Second) // telemetry is lost
		agent.Freeze()
		for range 10 {
			client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil) // the breaker opens
		}
		agent.Thaw()
		<-time.After(2 * time.Second)
		client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil) // and closes

		// What Params bring is called without a lock as well.
		var flow *flowctl.Flow
		params.IsFailure = func(error) bool {
			flow.SetStatus(flowctl.StatusOK)
			_, _ = flow.End(t.Context())
			again()
			return true
		}
		flow = client.Start(t.Context(), "point", params)
		flow.SetError(errors.New("work"))
		for _, want := range []string{"cannot be asked", "may not have been given back", "refuses to decide", "telemetry", "does not answer", "answers again"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("%q was not logged, so nothing was called back:\n%s", want, &log)
			}
		}
	})
}
