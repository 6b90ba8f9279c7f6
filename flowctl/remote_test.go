package flowctl_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

func TestCheckRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		client.Start(t.Context(), "point", flowctl.Params{
			Labels: map[string]string{"user_id": "u"}, RampMode: true, ResultCacheKey: "r", GlobalCacheKeys: []string{"g"},
			CheckTimeout: time.Minute,
		})
		client.Start(t.Context(), "plain", flowctl.Params{CheckTimeout: -1})
		want := []*checkv1.CheckRequest{
			{
				ControlPoint: "point", Labels: map[string]string{"user_id": "u"}, RampMode: true, ExpectEnd: true,
				CacheLookupRequest: &checkv1.CacheLookupRequest{ControlPoint: "point", ResultCacheKey: "r", GlobalCacheKeys: []string{"g"}},
			},
			{ControlPoint: "plain", ExpectEnd: true}, // without keys there is nothing to look up
		}
		checks := agent.Checks()
		var got []*checkv1.CheckRequest
		for _, c := range checks {
			got = append(got, c.Request)
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("requests (-want +got):\n%s", diff)
		}
		if got := checks[0].Timeout; got <= 0 || got > time.Minute {
			t.Errorf("the agent was given %v want up to a minute", got)
		}
		if got := checks[1].Timeout; got != 0 {
			t.Errorf("the agent was given %v want no limit", got)
		}
	})
}

// A flow's record, as agents read it.
func TestTelemetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Delay: 300 * time.Millisecond})
		client := agent.Client(flowctl.WithCheckTimeout(time.Second))
		start := time.Now()
		flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "u"}})
		<-time.After(50 * time.Millisecond)
		flow.SetError(errors.New("failed"))
		_, _ = flow.End(t.Context())
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		spans := agent.Spans()
		if len(spans) != 1 {
			t.Fatalf("%d spans want 1", len(spans))
		}
		s := spans[0]
		if s.Proto.GetName() != "Aperture Check" || s.Status != flowctl.StatusError {
			t.Errorf("name %q, status %v", s.Proto.GetName(), s.Status)
		}
		if !s.Start.Equal(start) || s.WorkloadStart.Sub(s.Start) != 300*time.Millisecond || s.End.Sub(s.WorkloadStart) != 50*time.Millisecond {
			t.Errorf("times = %v, +%v, +%v want %v, +300ms, +50ms", s.Start, s.WorkloadStart.Sub(s.Start), s.End.Sub(s.WorkloadStart), start)
		}
		attrs := make(map[string]string)
		for _, kv := range s.Proto.GetAttributes() {
			attrs[kv.GetKey()] = fmt.Sprintf("%T", kv.GetValue().GetValue())
		}
		const text, number = "*v1.AnyValue_StringValue", "*v1.AnyValue_IntValue"
		want := map[string]string{
			"aperture.source": text, "aperture.flow.status": text, "aperture.check_response": text,
			"aperture.flow_start_timestamp": number, "aperture.workload_start_timestamp": number, "aperture.flow_end_timestamp": number,
		}
		if diff := cmp.Diff(want, attrs); diff != "" {
			t.Errorf("attributes (-want +got):\n%s", diff)
		}
		if got := s.Proto.GetAttributes()[0].GetValue().GetStringValue(); got != "sdk" {
			t.Errorf("aperture.source = %q", got)
		}
		if diff := cmp.Diff(flow.CheckResponse(), s.Response, protocmp.Transform()); diff != "" {
			t.Errorf("check response (-flow +span):\n%s", diff)
		}
		if len(s.Proto.GetTraceId()) != 16 || len(s.Proto.GetSpanId()) != 8 {
			t.Error("the span has no ids")
		}
	})
}

func TestTelemetrySends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		for range 3 {
			_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		}
		<-time.After(1100 * time.Millisecond)
		synctest.Wait()
		if got := len(agent.Spans()); got != 3 {
			t.Errorf("%d spans after a second want 3", got)
		}
		for range 1000 { // more than wakes the exporter before its time
			_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		}
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := len(agent.Spans()); got != 1003 {
			t.Errorf("%d spans after Close want 1003", got)
		}
	})
}

// A flow that no agent answered has no record, and without telemetry none has.
func TestTelemetryNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")}, flowtest.Answer{})
		client, quiet := agent.Client(), agent.Client(flowctl.WithoutTelemetry())
		_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		_, _ = quiet.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		if err := errors.Join(client.Close(t.Context()), quiet.Close(t.Context())); err != nil {
			t.Fatal(err)
		}
		if got := agent.Spans(); len(got) != 0 {
			t.Errorf("%d spans want none", len(got))
		}
	})
}

// A24: a cached value of a mebibyte went into the flow's record.
func TestA24TelemetryWithoutCachedValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.SetResult("point", "r", make([]byte, 1<<20))
		agent.SetGlobal("g", make([]byte, 1<<20))
		client := agent.Client()
		flow := client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "r", GlobalCacheKeys: []string{"g", "none"}})
		if v, ok, _ := flow.ResultCache(); !ok || len(v) != 1<<20 {
			t.Errorf("ResultCache() = %d bytes, %v", len(v), ok)
		}
		_, _ = flow.End(t.Context())
		_ = client.Close(t.Context())
		want := &checkv1.CacheLookupResponse{
			ResultCacheResponse: &checkv1.KeyLookupResponse{},
			GlobalCacheResponses: map[string]*checkv1.KeyLookupResponse{
				"g": {}, "none": {LookupStatus: checkv1.CacheLookupStatus_MISS},
			},
		}
		if diff := cmp.Diff(want, agent.Spans()[0].Response.GetCacheLookupResponse(), protocmp.Transform()); diff != "" {
			t.Errorf("cache part (-want +got):\n%s", diff)
		}
	})
}

func logTo(w *bytes.Buffer) flowctl.Option {
	return flowctl.WithLogger(slog.New(slog.NewTextHandler(w, nil)))
}

// An agent that takes no telemetry costs flows nothing, and the log one line a minute.
func TestHangingExport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.AnswerSpans(flowtest.Answer{Hang: true})
		var log bytes.Buffer
		client := agent.Client(logTo(&log))
		begin := time.Now()
		large := many("k", 64)
		for k := range large {
			large[k] = strings.Repeat("v", 4096)
		}
		for range 80 { // 20 MiB, which is more than is kept
			_, _ = client.Start(t.Context(), "point", flowctl.Params{Labels: large}).End(t.Context())
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("flows waited %v for telemetry", took)
		}
		<-time.After(30 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin = time.Now()
		_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		if err := client.Close(ctx); err == nil {
			t.Error("Close() does not say that telemetry was lost")
		}
		if took := time.Since(begin); took > time.Second {
			t.Errorf("Close() took %v want up to its context's second", took)
		}
		if got := strings.Count(log.String(), "telemetry of flows was dropped"); got != 1 {
			t.Errorf("drops were logged %d times in half a minute want once:\n%s", got, log.String())
		}
	})
}

// A12: ending a flow waited without a limit for an agent that hangs in it, and not at all when the caller had gone.
func TestA12EndHasItsOwnTimeLimit(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts []flowctl.Option
		want time.Duration
	}{
		{name: "default", want: time.Second},
		{name: "the client's", opts: []flowctl.Option{flowctl.WithEndTimeout(time.Minute)}, want: time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(flowtest.Answer{Slots: 1})
				agent.AnswerEnds(flowtest.Answer{Hang: true}, flowtest.Answer{})
				var log bytes.Buffer
				client := agent.Client(append(tt.opts, logTo(&log))...)
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				begin := time.Now()
				if got, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrUnreachable) || got != (flowctl.EndResponse{Held: 1}) {
					t.Errorf("End() of a hanging agent = %+v, %v want ErrUnreachable, and nothing returned", got, err)
				}
				if took := time.Since(begin); took != tt.want {
					t.Errorf("End() took %v want %v", took, tt.want)
				}
				if !strings.Contains(log.String(), "slots may not have been given back") {
					t.Errorf("log:\n%s", &log)
				}
				ctx, cancel := context.WithCancel(t.Context())
				flow = client.Start(ctx, "point", flowctl.Params{})
				cancel()
				if got, err := flow.End(ctx); err != nil || got.Returned != 1 {
					t.Errorf("End() after the caller had gone = %+v, %v", got, err)
				}
				// That the caller has gone is not why an agent does not answer.
				agent.Answer(flowtest.Answer{Slots: 1})
				agent.AnswerEnds(flowtest.Answer{Hang: true})
				flow = client.Start(t.Context(), "point", flowctl.Params{})
				if _, err := flow.End(ctx); !errors.Is(err, flowctl.ErrUnreachable) || errors.Is(err, context.Canceled) {
					t.Errorf("End() of a hanging agent after the caller had gone = %v want ErrUnreachable, and not Canceled", err)
				}
			})
		})
	}
}

// A hung agent costs the first flows their timeout; then the breaker opens, and one flow a second asks.
func TestAgentBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		var log bytes.Buffer
		client := agent.Client(logTo(&log))
		client.Start(t.Context(), "point", flowctl.Params{})
		synctest.Wait() // for what else the agent has to send, which would be a sign of life
		agent.Freeze()
		begin := time.Now()
		start := func() time.Duration {
			before := time.Now()
			if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable || !flow.ShouldRun() {
				t.Fatalf("%v, ShouldRun() = %v", flow.Decision(), flow.ShouldRun())
			}
			return time.Since(before)
		}
		for i := range 5 {
			if took := start(); took != 200*time.Millisecond {
				t.Errorf("flow %d took %v want its timeout", i, took)
			}
		}
		for range 100 {
			if took := start(); took != 0 {
				t.Fatalf("a flow took %v while the breaker was open", took)
			}
		}
		if got := len(agent.Checks()); got != 6 {
			t.Errorf("%d checks want 6", got)
		}
		<-time.After(1001 * time.Millisecond)
		if took := start(); took != 200*time.Millisecond {
			t.Errorf("the probe took %v", took)
		}
		if took := start(); took != 0 {
			t.Errorf("a flow after the probe took %v", took)
		}
		agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited})
		agent.Thaw()
		<-time.After(time.Second)
		for range 2 {
			if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Rejected {
				t.Errorf("%v after the agent was back want rejected", flow.Decision())
			}
		}
		if took := time.Since(begin); took > 4*time.Second {
			t.Errorf("all took %v", took)
		}
		if s := log.String(); strings.Count(s, "does not answer") != 1 || strings.Count(s, "answers again") != 1 {
			t.Errorf("log:\n%s", s)
		}
	})
}

// opened is a client whose breaker is open, for its agent is frozen, and flows of before that hold a slot each.
func opened(t *testing.T, agent *flowtest.Agent, flows int, opts ...flowctl.Option) (*flowctl.Client, []*flowctl.Flow, *bytes.Buffer) {
	t.Helper()
	log := new(bytes.Buffer)
	agent.Answer(flowtest.Answer{Slots: 1})
	client := agent.Client(append(opts, logTo(log), flowctl.WithoutTelemetry())...)
	held := make([]*flowctl.Flow, flows)
	for i := range held {
		if held[i] = client.Start(t.Context(), "point", flowctl.Params{}); held[i].Decision() != flowctl.Accepted {
			t.Fatalf("%v, %v want accepted", held[i], held[i].Err())
		}
	}
	agent.Freeze()
	for !strings.Contains(log.String(), "does not answer") {
		client.Start(t.Context(), "point", flowctl.Params{})
	}
	return client, held, log
}

// A frozen agent cost each flow that ended with a slot a second, although the breaker was open.
func TestAgentBreakerSparesEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		_, flows, log := opened(t, agent, 10)
		begin := time.Now()
		for _, flow := range flows {
			got, err := flow.End(t.Context())
			if !errors.Is(err, flowctl.ErrUnreachable) || got != (flowctl.EndResponse{Held: 1}) || !strings.Contains(err.Error(), "left to take the slots back") {
				t.Errorf("End() = %+v, %v want ErrUnreachable, and what becomes of the slot", got, err)
			}
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("the ends took %v", took)
		}
		if got := len(agent.Ends()); got != 0 {
			t.Errorf("the agent was told of %d ends", got)
		}
		if strings.Count(log.String(), "slots may not have been given back") != 1 {
			t.Errorf("log: want one line of the ends\n%s", log)
		}
	})
}

// An end is no probe: while the breaker is open it is tried only when a probe is overdue, and leaves the turn to the next
// flow.
func TestEndsAreNoProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client, flows, _ := opened(t, agent, 3, flowctl.WithEndTimeout(500*time.Millisecond)) // less than between two probes
		end := func(want time.Duration) {
			t.Helper()
			begin := time.Now()
			if _, err := flows[0].End(t.Context()); !errors.Is(err, flowctl.ErrUnreachable) {
				t.Errorf("End() = %v want ErrUnreachable", err)
			}
			if took := time.Since(begin); took != want {
				t.Errorf("End() took %v want %v", took, want)
			}
			flows = flows[1:]
		}
		start := func(want time.Duration) {
			t.Helper()
			begin := time.Now()
			if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable || time.Since(begin) != want {
				t.Errorf("%v in %v want unreachable in %v", flow, time.Since(begin), want)
			}
		}
		end(0)
		<-time.After(time.Minute)
		end(500 * time.Millisecond)
		start(200 * time.Millisecond)
		start(0)
		end(0)
	})
}

// Where no flow starts, nobody probes: flows that end get their slots back all the same, and close the breaker.
func TestEndsFindTheAgentBack(t *testing.T) {
	for _, tt := range []struct {
		name   string
		outage time.Duration
		back   func(agent *flowtest.Agent)
	}{
		{"it says what it could not", 10 * time.Millisecond, (*flowtest.Agent).Thaw},
		{"it says nothing", time.Minute, func(agent *flowtest.Agent) {
			agent.Drop()
			agent.Thaw()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				client, flows, log := opened(t, agent, 2)
				<-time.After(tt.outage)
				tt.back(agent)
				synctest.Wait()
				for _, flow := range flows {
					if got, err := flow.End(t.Context()); err != nil || got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
						t.Errorf("End() = %+v, %v want the slot back", got, err)
					}
				}
				if strings.Count(log.String(), "answers again") != 1 {
					t.Errorf("log:\n%s", log)
				}
				if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Accepted {
					t.Errorf("%v, %v want accepted", flow, flow.Err())
				}
			})
		})
	}
}

// Flows that go on without a decision do not do so in silence, however alive the agent is: the log says it once a minute.
func TestUndecidedFlowsAreLogged(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer flowtest.Answer
		want   string // in the log
	}{
		{"stuck", flowtest.Answer{Hang: true}, "DeadlineExceeded"},
		{"late", flowtest.Answer{Delay: time.Second}, "DeadlineExceeded"},
		{"closed", flowtest.Answer{Fail: status.Error(codes.Unavailable, "engine: closed")}, "engine: closed"},
		{"broken", flowtest.Answer{Fail: status.Error(codes.Internal, "garbled")}, "garbled"},
		{"over the limit", flowtest.Answer{Response: &checkv1.CheckResponse{ControlPoint: strings.Repeat("p", 1<<20)}}, "ResourceExhausted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const message = "the agent did not decide about a flow"
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.answer)
				var log bytes.Buffer
				client := agent.Client(logTo(&log))
				start := func() {
					flow := client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: 500 * time.Millisecond})
					if flow.Decision() != flowctl.Unreachable {
						t.Errorf("%v want unreachable", flow)
					}
				}
				for range 10 {
					start()
				}
				if s := log.String(); strings.Count(s, message) != 1 || !strings.Contains(s, tt.want) {
					t.Errorf("log of 10 flows: want it once, with %q\n%s", tt.want, s)
				}
				<-time.After(time.Minute)
				start()
				if s := log.String(); strings.Count(s, message) != 2 || !strings.Contains(s, "unlogged_before=9") {
					t.Errorf("log of a minute later:\n%s", s)
				}
				if err := client.Close(t.Context()); err != nil {
					t.Error(err)
				}
				<-time.After(time.Minute)
				start()
				if s := log.String(); strings.Count(s, message) != 2 {
					t.Errorf("a flow after Close was logged:\n%s", s)
				}
			})
		})
	}
}

// A decision is nothing to log, and neither is a caller who has gone.
func TestDecidedFlowsAreNotLogged(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer flowtest.Answer
		within time.Duration // the caller's; 0: for ever
		want   flowctl.Decision
	}{
		{"accepted", flowtest.Answer{}, 0, flowctl.Accepted},
		{"rejected", flowtest.Answer{Reason: flowctl.ReasonRateLimited}, 0, flowctl.Rejected},
		{"canceled", flowtest.Answer{Hang: true}, 100 * time.Millisecond, flowctl.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.answer)
				var log bytes.Buffer
				client := agent.Client(logTo(&log))
				ctx := t.Context()
				if tt.within > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.within)
					defer cancel()
				}
				if flow := client.Start(ctx, "point", flowctl.Params{}); flow.Decision() != tt.want {
					t.Errorf("%v want %v", flow, tt.want)
				}
				if log.Len() > 0 {
					t.Errorf("log:\n%s", &log)
				}
			})
		})
	}
}

// An agent that is back is asked again within the time of a probe, and not when gRPC has waited long enough to dial.
func TestAgentBreakerProbesDial(t *testing.T) {
	for _, outage := range []time.Duration{10 * time.Second, time.Minute, 10 * time.Minute} {
		t.Run(outage.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				back := time.Now().Add(outage)
				client := agent.Client(flowctl.WithoutTelemetry(), flowctl.WithDialOptions(
					grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
						if time.Now().Before(back) {
							return nil, errors.New("refused")
						}
						return agent.DialContext(ctx)
					})))
				for client.Start(t.Context(), "point", flowctl.Params{}).Decision() != flowctl.Accepted {
					<-time.After(100 * time.Millisecond)
				}
				if late := time.Since(back); late > 3*time.Second {
					t.Errorf("the agent was found %v after it was back", late)
				}
			})
		})
	}
}

// What the breaker must not take for a dead agent.
func TestAgentBreakerStaysClosed(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answer  flowtest.Answer
		breaker flowctl.AgentBreaker
		each    func(t *testing.T, client *flowctl.Client)
	}{
		// A gRPC server gives up at the client's deadline too, and says so: that it lives is all there is to see.
		{name: "answers come late, but come", answer: flowtest.Answer{Delay: 250 * time.Millisecond}},
		{name: "the agent's work hangs, its server does not", answer: flowtest.Answer{Hang: true}},
		{name: "the agent refuses", answer: flowtest.Answer{Fail: status.Error(codes.Unauthenticated, "who are you?")}},
		{name: "the agent says that it is unavailable", answer: flowtest.Answer{Fail: status.Error(codes.Unavailable, "overloaded")}},
		{name: "switched off", answer: flowtest.Answer{Hang: true}, breaker: flowctl.AgentBreaker{Failures: -1}},
		{
			name: "callers give up", answer: flowtest.Answer{Hang: true},
			each: func(t *testing.T, client *flowctl.Client) {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				if flow := client.Start(ctx, "point", flowctl.Params{}); flow.Decision() != flowctl.Canceled {
					t.Errorf("%v want canceled", flow.Decision())
				}
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.answer)
				client := agent.Client(flowctl.WithAgentBreaker(tt.breaker))
				each := tt.each
				if each == nil {
					each = func(t *testing.T, client *flowctl.Client) { client.Start(t.Context(), "point", flowctl.Params{}) }
				}
				for range 50 {
					each(t, client)
				}
				if got := len(agent.Checks()); got != 50 {
					t.Errorf("the agent was asked %d times want 50", got)
				}
			})
		})
	}
}

// With many flows in flight the timeouts come in bursts: five of one burst are no proof.
func TestAgentBreakerSpan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		if err := client.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // for what else the agent has to send, which would be a sign of life
		agent.Freeze()
		burst := func() {
			var wg sync.WaitGroup
			for range 64 {
				wg.Go(func() { client.Start(t.Context(), "point", flowctl.Params{}) })
			}
			wg.Wait()
		}
		burst()
		burst()
		if got := len(agent.Checks()); got != 128 {
			t.Errorf("%d checks want 128: one span is not two", got)
		}
		burst()
		burst()
		if got := len(agent.Checks()); got != 192 {
			t.Errorf("%d checks want 192: the third burst opens the breaker", got)
		}
	})
}

// On a connection that is not ours an answer is an answer, too.
func TestAgentBreakerStaysClosedWithConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Fail: status.Error(codes.Unavailable, "overloaded"), Delay: 100 * time.Millisecond})
		conn, err := grpc.NewClient("passthrough:///localhost", agent.Dialer(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		client, err := flowctl.Dial("", flowctl.WithConn(conn))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close(t.Context())
		for range 20 {
			client.Start(t.Context(), "point", flowctl.Params{})
		}
		if got := len(agent.Checks()); got != 20 {
			t.Errorf("the agent was asked %d times want 20", got)
		}
		agent.Freeze()
		for range 20 {
			client.Start(t.Context(), "point", flowctl.Params{})
		}
		if got := len(agent.Checks()); got != 25 {
			t.Errorf("the agent was asked %d times want 25: five are enough when it is frozen", got)
		}
	})
}

func TestWithConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		conn, err := grpc.NewClient("passthrough:///localhost", agent.Dialer(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		client, err := flowctl.Dial("", flowctl.WithConn(conn))
		if err != nil {
			t.Fatal(err)
		}
		if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Accepted {
			t.Errorf("%v: %v", flow.Decision(), flow.Err())
		}
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		again, err := flowctl.Dial("", flowctl.WithConn(conn)) // Close left it open
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = again.Close(t.Context()) }()
		if flow := again.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Accepted {
			t.Errorf("%v: %v", flow.Decision(), flow.Err())
		}
		if _, err := flowctl.Dial("localhost:1", flowctl.WithConn(conn)); err == nil {
			t.Error("Dial() with an address and a connection = nil")
		}
		// A key must not travel over a connection of which nobody knows that it is secure.
		careless, err := flowctl.Dial("", flowctl.WithConn(conn), flowctl.WithAPIKey("sesame"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = careless.Close(t.Context()) }()
		if flow := careless.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable {
			t.Errorf("%v want unreachable", flow.Decision())
		}
		for _, check := range agent.Checks() {
			if got := check.Metadata.Get("x-api-key"); len(got) != 0 {
				t.Errorf("the key travelled: %q", got)
			}
		}
	})
}

func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		if err := client.Ready(t.Context()); err != nil {
			t.Errorf("Ready() = %v", err)
		}
		_ = client.Close(t.Context())
		if err := client.Ready(t.Context()); !errors.Is(err, flowctl.ErrClosed) {
			t.Errorf("Ready() of a closed client = %v want ErrClosed", err)
		}
	})
	for _, tt := range []struct {
		name string
		at   time.Duration // when Ready is called
	}{{"called in an outage", 10*time.Minute - 500*time.Millisecond}, {"called after an outage", 10*time.Minute + time.Millisecond}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				begin := time.Now()
				back := begin.Add(10 * time.Minute)
				client := agent.Client(flowctl.WithoutTelemetry(), flowctl.WithDialOptions(
					grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
						if time.Now().Before(back) {
							return nil, errors.New("refused")
						}
						return agent.DialContext(ctx)
					})))
				<-time.After(tt.at)
				if err := client.Ready(t.Context()); err != nil {
					t.Errorf("Ready() = %v", err)
				}
				if late := time.Since(back); late > 1500*time.Millisecond {
					t.Errorf("Ready() returned %v after the agent was back", late)
				}
			})
		})
	}
	stranger, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer() // serves, but no agent
	go func() { _ = server.Serve(stranger) }()
	defer server.Stop()
	lost, err := flowctl.Dial(stranger.Addr().String(), flowctl.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	defer lost.Close(t.Context())
	if err := lost.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "does not speak the protocol") {
		t.Errorf("Ready() of a server that is no agent = %v", err)
	}
	embedded := noPolicies(t)
	if err := embedded.Ready(t.Context()); err != nil {
		t.Errorf("Ready() of an engine = %v", err)
	}
}

// Close says so when the last telemetry was lost while it was under way.
func TestCloseReportsLostTelemetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.AnswerSpans(flowtest.Answer{Hang: true})
		client := agent.Client()
		_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		<-time.After(2 * time.Second) // it is being sent
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := client.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Close() = %v want its context's error", err)
		}
	})
}

// What was lost before Close, it does not tell: the log has.
func TestCloseForgivesLostTelemetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.AnswerSpans(flowtest.Answer{Fail: status.Error(codes.Unavailable, "not now")}, flowtest.Answer{})
		var log bytes.Buffer
		client := agent.Client(logTo(&log))
		_, _ = client.Start(t.Context(), "point", flowctl.Params{}).End(t.Context())
		<-time.After(time.Hour)
		synctest.Wait() // only then is the exporter's log ours to read
		if !strings.Contains(log.String(), "telemetry of flows was dropped") {
			t.Errorf("log:\n%s", &log)
		}
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
}

func TestClose(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		for range 2 {
			if err := client.Close(t.Context()); err != nil {
				t.Errorf("Close() = %v", err)
			}
		}
		late := client.Start(t.Context(), "point", flowctl.Params{OnUnreachable: flowctl.FailClosed})
		if late.ShouldRun() || !errors.Is(late.Err(), flowctl.ErrClosed) || !errors.Is(late.Err(), flowctl.ErrUnreachable) {
			t.Errorf("a flow after Close: %v", late.Err())
		}
		if _, err := flow.End(t.Context()); err != nil {
			t.Errorf("End() after Close = %v", err)
		}
	})
}

func TestDialErrors(t *testing.T) {
	for _, tt := range []struct {
		name    string
		address string
		opts    []flowctl.Option
		want    string
	}{
		{name: "empty address", want: "address is empty"},
		{name: "no port", address: "agent.example", want: "not host:port"},
		{name: "bad port", address: "agent.example:70000", want: "no port from 1 to 65535"},
		{name: "a URL", address: "https://user:sesame@agent.example:443", want: "the address is a URL"},
		{name: "an unknown scheme", address: "grpc://agent.example:443", want: "scheme that gRPC does not know"},
		{name: "a URL with options", address: "https://agent.example:443", opts: []flowctl.Option{flowctl.WithDialOptions(grpc.WithUserAgent("x"))}, want: "the address is a URL"},
		{name: "a URL's host", address: "user@agent:80", want: "host that cannot be one"},
		{
			name: "key in plaintext", address: "agent.example:80", want: "would travel in plaintext",
			opts: []flowctl.Option{flowctl.WithInsecure(), flowctl.WithAPIKey("sesame")},
		},
		{
			name: "key with credentials that are none", address: "agent.example:80", want: "would travel in plaintext",
			opts: []flowctl.Option{flowctl.WithTransportCredentials(insecure.NewCredentials()), flowctl.WithAPIKey("sesame")},
		},
		{
			name: "credentials among the dial options", address: "a:1", want: "WithDialOptions: there are transport credentials among them",
			opts: []flowctl.Option{flowctl.WithInsecure(), flowctl.WithDialOptions(
				grpc.WithUserAgent("x"), grpc.WithTransportCredentials(insecure.NewCredentials()))},
		},
		{
			name: "a bundle of credentials among the dial options", address: "a:1", want: "WithDialOptions: there are transport credentials among them",
			opts: []flowctl.Option{flowctl.WithDialOptions(grpc.WithCredentialsBundle(insecure.NewBundle()))},
		},
		{name: "empty key", address: "a:1", opts: []flowctl.Option{flowctl.WithAPIKey("")}, want: "WithAPIKey: the key is empty"},
		{name: "key with a newline", address: "a:1", opts: []flowctl.Option{flowctl.WithAPIKey("sesame\n")}, want: "WithAPIKey: the key has a character at 6"},
		{name: "contradiction", address: "a:1", opts: []flowctl.Option{flowctl.WithInsecure(), flowctl.WithTLSConfig(&tls.Config{})}, want: "WithInsecure contradicts"},
		{name: "no TLS configuration", address: "a:1", opts: []flowctl.Option{flowctl.WithTLSConfig(nil)}, want: "WithTLSConfig: no configuration"},
		{name: "no credentials", address: "a:1", opts: []flowctl.Option{flowctl.WithTransportCredentials(nil)}, want: "WithTransportCredentials: no credentials"},
		{name: "no connection", opts: []flowctl.Option{flowctl.WithConn(nil)}, want: "WithConn: no connection"},
		{
			name: "a connection, and how to set up one", want: "WithConn brings the connection",
			opts: []flowctl.Option{flowctl.WithConn(new(grpc.ClientConn)), flowctl.WithInsecure()},
		},
		{name: "end timeout", address: "a:1", opts: []flowctl.Option{flowctl.WithEndTimeout(0)}, want: "WithEndTimeout: not positive"},
		{name: "breaker", address: "a:1", opts: []flowctl.Option{flowctl.WithAgentBreaker(flowctl.AgentBreaker{Probe: -1})}, want: "WithAgentBreaker: a time is negative"},
		{name: "labels", address: "a:1", opts: []flowctl.Option{flowctl.WithLabels(map[string]string{"": "sesame"})}, want: "WithLabels: "},
		{
			name: "too many labels", address: "a:1", want: "WithLabels: 65 labels are more than 64",
			opts: []flowctl.Option{flowctl.WithLabels(many("a", 60)), flowctl.WithLabels(many("b", 5))},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := flowctl.Dial(tt.address, tt.opts...)
			if err == nil || !strings.HasPrefix(err.Error(), "headgate: dial: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Dial() = %v want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "sesame") {
				t.Errorf("error %q says too much", err)
			}
		})
	}
}

// An API key travels in plaintext to this machine alone.
func TestPlaintextKey(t *testing.T) {
	for address, ok := range map[string]bool{
		"localhost:80": true, "127.0.0.1:80": true, "127.9.9.9:80": true, "[::1]:80": true,
		"unix:/run/agent.sock": true, "unix-abstract:agent": true,
		"dns:///localhost:80": true, "passthrough:///127.0.0.1:80": true,
		"agent.example:80": false, "10.0.0.1:80": false, "localhost.evil.example:80": false,
		"dns:///agent.example:80": false, "dns://localhost/agent.example:80": false, "[::2]:80": false,
	} {
		client, err := flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithAPIKey("k"))
		if (err == nil) != ok {
			t.Errorf("Dial(%q) = %v want ok: %v", address, err, ok)
		}
		_ = client.Close(t.Context())
		client, err = flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithAPIKey("k"), flowctl.WithInsecureAPIKey())
		if err != nil {
			t.Errorf("Dial(%q) with WithInsecureAPIKey = %v", address, err)
		}
		_ = client.Close(t.Context())
	}
}

func TestNewErrors(t *testing.T) {
	if _, err := flowctl.New(nil); err == nil {
		t.Error("New(nil) = nil")
	}
	if _, err := flowctl.New((*engine.Engine)(nil)); err == nil {
		t.Error("New() of a nil engine = nil")
	}
	agent := noPoliciesEngine(t)
	for name, opt := range map[string]flowctl.Option{
		"WithInsecure":     flowctl.WithInsecure(),
		"WithAPIKey":       flowctl.WithAPIKey("k"),
		"WithAgentBreaker": flowctl.WithAgentBreaker(flowctl.AgentBreaker{}),
		"WithoutTelemetry": flowctl.WithoutTelemetry(),
		"WithEndTimeout":   flowctl.WithEndTimeout(time.Second),
	} {
		if _, err := flowctl.New(agent, opt); err == nil || !strings.Contains(err.Error(), name+": there is no connection") {
			t.Errorf("New() with %s = %v", name, err)
		}
	}
	if _, err := flowctl.New(agent, nil); err != nil {
		t.Errorf("New() with a nil option = %v", err)
	}
}

func TestDialEnv(t *testing.T) {
	const address, key, plain, skip = "APERTURE_AGENT_ADDRESS", "APERTURE_API_KEY", "APERTURE_AGENT_INSECURE", "APERTURE_AGENT_SKIP_VERIFY"
	for _, tt := range []struct {
		name string
		env  map[string]string
		opts []flowctl.Option
		want string // in the error; none when empty
	}{
		{name: "nothing", want: address + " is not set"},
		{name: "no address", env: map[string]string{key: "k"}, want: address + " is not set"},
		{name: "bad address", env: map[string]string{address: "sesame"}, want: address + ": the address is not host:port"},
		{name: "address", env: map[string]string{address: "agent.example:443"}},
		{name: "all", env: map[string]string{address: "localhost:80", key: "k", plain: "TRUE", skip: "0"}},
		{name: "skip verify", env: map[string]string{address: "agent.example:443", key: "k", skip: "true"}},
		{name: "bad bool", env: map[string]string{address: "a:1", plain: "sesame"}, want: plain + " is neither true nor false"},
		{name: "another bad bool", env: map[string]string{address: "a:1", skip: "sesame"}, want: skip + " is neither true nor false"},
		{name: "bad key", env: map[string]string{address: "a:1", key: "sesame\x00"}, want: key + ": the key has a character"},
		{name: "key in plaintext", env: map[string]string{address: "agent.example:80", key: "k", plain: "1"}, want: plain + ": the API key would travel in plaintext"},
		{name: "key for plaintext", env: map[string]string{address: "agent.example:80", key: "k"}, opts: []flowctl.Option{flowctl.WithInsecure()}, want: key + ": the API key would travel in plaintext"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, name := range []string{address, key, plain, skip} {
				t.Setenv(name, strings.ReplaceAll(tt.env[name], "\x00", "\x01"))
			}
			client, err := flowctl.DialEnv(tt.opts...)
			_ = client.Close(t.Context())
			if tt.want == "" && err != nil {
				t.Errorf("DialEnv() = %v", err)
			}
			if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "sesame")) {
				t.Errorf("DialEnv() = %v want %q", err, tt.want)
			}
		})
	}
}

// Options go before the environment.
func TestDialEnvOptions(t *testing.T) {
	agent := flowtest.NewAgent(t)
	t.Setenv("APERTURE_AGENT_ADDRESS", "localhost:1")
	t.Setenv("APERTURE_API_KEY", "from-env")
	t.Setenv("APERTURE_AGENT_INSECURE", "true")
	client, err := flowctl.DialEnv(flowctl.WithDialOptions(agent.Dialer()), flowctl.WithAPIKey("from-option"), flowctl.WithCheckTimeout(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close(t.Context()) }()
	client.Start(t.Context(), "point", flowctl.Params{})
	if got := agent.Checks()[0].Metadata.Get("x-api-key"); len(got) != 1 || got[0] != "from-option" {
		t.Errorf("key = %q", got)
	}
}
