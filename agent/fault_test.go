package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// process is an agent that can be killed, at an address of this machine.
type process struct {
	engine *engine.Engine
	server *grpc.Server
	served chan error
}

// startProcess starts an agent that takes no slot back by itself, so that none that is lost goes unseen.
func startProcess(t *testing.T, address string) (*process, string) {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "slots", Components: []policy.Component{policy.ConcurrencyLimiter{
		Selectors: policy.At("point"), Max: math.MaxInt32, MaxInflight: 24 * time.Hour, LimitBy: "user_id",
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{engine: e, server: grpc.NewServer(agent.ServerOptions()...), served: make(chan error, 1)}
	agent.Register(p.server, e)
	go func() { p.served <- p.server.Serve(l) }()
	return p, l.Addr().String()
}

func (p *process) kill(t *testing.T) {
	p.server.Stop()
	if err := <-p.served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		t.Error(err)
	}
	_ = p.engine.Close()
}

// inFlight is how many flows hold a slot of the one user.
func (p *process) inFlight(t *testing.T) float64 {
	var v agentapi.Verdict
	req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user_id": "u"}}}
	if err := p.engine.Agent().Check(t.Context(), req, &v); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = p.engine.Agent().End(t.Context(), req, &v, agentapi.Outcome{Ended: agentapi.EndedOK}) }()
	return v.At(0).Component.Capacity - v.At(0).Remaining
}

// dialProcess makes a client whose flows wait longer than a slow machine may take. A check that times out may hold a
// slot that nothing gives back.
func dialProcess(t *testing.T, address string, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	client, err := flowctl.Dial(address, append([]flowctl.Option{
		flowctl.WithInsecure(), flowctl.WithCheckTimeout(time.Minute), flowctl.WithEndTimeout(time.Minute),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// decisions are those about the flows of a load, one by one, for a test that waits for some.
type decisions chan flowctl.Decision

// tell does not block if nothing receives.
func (d decisions) tell(decision flowctl.Decision) {
	select {
	case d <- decision:
	default:
	}
}

// await waits for n flows that are decided so, while the load lasts, which ctx bounds.
func (d decisions) await(ctx context.Context, t *testing.T, n int, want flowctl.Decision) {
	t.Helper()
	for n > 0 {
		select {
		case got := <-d:
			if got == want {
				n--
			}
		case <-ctx.Done():
			t.Fatalf("the load ended before %d more flows were %v", n, want)
		}
	}
}

// An agent that is killed and comes back under load: flows go on all the while, the breaker opens and closes, and neither
// slots nor goroutines are left behind, at which TestMain looks.
func TestProcessAgentRestarts(t *testing.T) {
	p, address := startProcess(t, "127.0.0.1:0")
	var log lockedBuffer
	client := dialProcess(t, address, flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
		flowctl.WithAgentBreaker(flowctl.AgentBreaker{Span: 100 * time.Millisecond, Probe: 50 * time.Millisecond}))
	if err := client.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}

	decided := make(decisions)
	guarded := headgate.GuardFunc(client, "point",
		func(context.Context, *flowctl.Decision) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"user_id": "u"}}
		},
		func(ctx context.Context, _ *flowctl.Decision) (bool, error) {
			flow, _ := flowctl.FromContext(ctx)
			decided.tell(flow.Decision())
			return true, nil
		}, nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var load sync.WaitGroup
	for range 16 {
		load.Go(func() {
			for ctx.Err() == nil {
				if ran, err := guarded(t.Context(), nil); !ran || err != nil {
					t.Errorf("a flow did not run: %v", err)
					stop()
				}
				runtime.Gosched()
			}
		})
	}
	for range 2 {
		decided.await(ctx, t, 100, flowctl.Accepted)
		p.kill(t)
		decided.await(ctx, t, 1000, flowctl.Unreachable)
		p, _ = startProcess(t, address)
	}
	decided.await(ctx, t, 100, flowctl.Accepted)
	stop()
	load.Wait()
	if err := client.Close(t.Context()); err != nil {
		t.Logf("telemetry: %v", err) // that of the time without an agent is lost, as it may be
	}
	if got := p.inFlight(t); got != 0 {
		t.Errorf("%v slots are held when all flows have ended", got)
	}
	p.kill(t)
	if text := log.String(); !strings.Contains(text, "does not answer") || !strings.Contains(text, "answers again") {
		t.Errorf("the breaker did not open and close:\n%s", text)
	}
}

// lockedBuffer is a buffer that several may write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Whatever a client sends, it gets an answer that makes sense, unless it names no control point; and when its flow has
// ended it holds nothing.
func FuzzCheck(f *testing.F) {
	for _, m := range []*checkv1.CheckRequest{
		{},
		{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}, ExpectEnd: true},
		{ControlPoint: "point", RampMode: true, CacheLookupRequest: &checkv1.CacheLookupRequest{ResultCacheKey: "r", GlobalCacheKeys: []string{"g", ""}}},
		{ControlPoint: "rate", Labels: map[string]string{"cost": "1e300"}},
		{ControlPoint: "point", MaxWait: &durationpb.Duration{Seconds: math.MaxInt64, Nanos: -1}},
		{ControlPoint: "rate", Labels: map[string]string{"cost": "-0", "user_id": ""}},
		{ControlPoint: strings.Repeat("p", 256), Labels: map[string]string{strings.Repeat("k", 256): strings.Repeat("v", 4097)}},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	e, err := engine.New(append(slots(1), policy.Policy{Name: "rate", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("rate"), Capacity: 10, Fill: 10, Interval: time.Second, LimitBy: "user_id", TokensLabel: "cost",
	}}}))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = e.Close() })
	var service checkv1.FlowControlServiceServer
	agent.Register(registrar(func(impl any) {
		if s, ok := impl.(checkv1.FlowControlServiceServer); ok {
			service = s
		}
	}), e)
	f.Fuzz(func(t *testing.T, data []byte) {
		req := new(checkv1.CheckRequest)
		if proto.Unmarshal(data, req) != nil {
			return
		}
		m, err := service.Check(t.Context(), req)
		if err != nil {
			if req.GetControlPoint() != "" || status.Code(err) != codes.InvalidArgument {
				t.Fatalf("Check() = %v", err)
			}
			return
		}
		checkAnswer(t, req, m)
		endAll(t, service, req.GetControlPoint(), m)
	})
}

// told reports whether an answer tells all of the request.
func told(m *checkv1.CheckRequest) bool {
	ok := len(m.GetControlPoint()) <= 4096 && len(m.GetLabels()) <= 64
	for key, value := range m.GetLabels() {
		ok = ok && key != "" && len(key) <= 255 && len(value) <= 4096
	}
	return ok
}

// checkAnswer holds an answer of FuzzCheck's engine against its request.
func checkAnswer(t *testing.T, req *checkv1.CheckRequest, m *checkv1.CheckResponse) {
	t.Helper()
	if _, err := proto.Marshal(m); err != nil {
		t.Fatalf("the answer cannot be sent: %v", err)
	}
	if m.GetExpectEnd() != req.GetExpectEnd() || len(m.GetFlowLabelKeys()) > 66 ||
		told(req) && (m.GetControlPoint() != req.GetControlPoint() || len(m.GetFlowLabelKeys()) != len(req.GetLabels())) {
		t.Errorf("the answer is to another request: %v", m)
	}
	rejected := m.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_REJECTED
	switch {
	case rejected != (m.GetRejectReason() != checkv1.CheckResponse_REJECT_REASON_NONE), m.GetWaitTime().AsDuration() < 0:
		t.Errorf("the answer contradicts itself: %v", m)
	case rejected && len(wire.Held(m)) > 0:
		t.Errorf("a rejected flow holds slots: %v", m)
	case req.GetRampMode() != (m.GetRejectReason() == checkv1.CheckResponse_REJECT_REASON_NO_MATCHING_RAMP):
		t.Errorf("in ramp mode: %v, answer %v", req.GetRampMode(), m)
	case rejected && !req.GetRampMode() && req.GetControlPoint() != "rate": // at "point" the slot is free: all flows before have ended
		t.Errorf("rejected for nothing: %v", m)
	}
	for _, d := range m.GetLimiterDecisions() {
		tokens := d.GetRateLimiterInfo().GetTokensInfo()
		if d.GetConcurrencyLimiterInfo() != nil {
			tokens = d.GetConcurrencyLimiterInfo().GetTokensInfo()
		}
		if left := tokens.GetRemaining(); !(left >= 0 && left <= 10) || math.IsNaN(tokens.GetConsumed()) || tokens.GetConsumed() < 0 {
			t.Errorf("tokens = %v", tokens)
		}
	}
}

// endAll gives back all that a check gave, and wants it taken.
func endAll(t *testing.T, service checkv1.FlowControlServiceServer, controlPoint string, m *checkv1.CheckResponse) {
	t.Helper()
	end := &checkv1.FlowEndRequest{ControlPoint: controlPoint}
	for _, d := range m.GetLimiterDecisions() {
		if info := d.GetConcurrencyLimiterInfo(); info.GetRequestId() != "" && !d.GetDropped() {
			end.InflightRequests = append(end.InflightRequests, &checkv1.InflightRequestRef{
				PolicyName: d.GetPolicyName(), PolicyHash: d.GetPolicyHash(), ComponentId: d.GetComponentId(),
				Label: info.GetLabel(), RequestId: info.GetRequestId(),
			})
		}
	}
	ended, err := service.FlowEnd(t.Context(), end)
	if err != nil {
		t.Fatalf("FlowEnd() = %v", err)
	}
	for _, s := range ended.GetTokenReturnStatuses() {
		if !s.GetReturned() {
			t.Fatalf("a slot did not come back: %v", s)
		}
	}
}

// waiting answers when its time is up.
type waiting struct {
	checkv1.UnimplementedFlowControlServiceServer
	wait time.Duration
}

func (w waiting) Check(ctx context.Context, _ *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	timer := time.NewTimer(w.wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return new(checkv1.CheckResponse), nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// A gRPC server as it comes ends connections that ping too often, and every check that waits on them: the client's own
// keepalive must not.
func TestLongWaitOnADefaultServer(t *testing.T) {
	for _, tt := range []struct {
		name string
		wait time.Duration
		opts []flowctl.Option
		want flowctl.Decision
	}{
		{"120 s", 120 * time.Second, nil, flowctl.Accepted},
		{"20 min", 20 * time.Minute, nil, flowctl.Accepted},
		{
			"120 s with another keepalive", 120 * time.Second,
			[]flowctl.Option{flowctl.WithKeepalive(keepalive.ClientParameters{Time: 10 * time.Second})},
			flowctl.Unreachable,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := bufconn.Listen(1 << 16)
				server := grpc.NewServer(grpc.WaitForHandlers(true))
				checkv1.RegisterFlowControlServiceServer(server, waiting{wait: tt.wait})
				served := make(chan error, 1)
				go func() { served <- server.Serve(l) }()
				defer func() {
					server.Stop()
					if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
						t.Error(err)
					}
				}()
				client, err := flowctl.Dial("passthrough:///localhost", append(tt.opts,
					flowctl.WithInsecure(), flowctl.WithoutTelemetry(), flowctl.WithCheckTimeout(time.Hour),
					flowctl.WithDialOptions(grpc.WithContextDialer(
						func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })))...)
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close(t.Context())
				begin := time.Now()
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				if took := time.Since(begin); flow.Decision() != tt.want || tt.want == flowctl.Accepted && took != tt.wait {
					t.Errorf("%v after %v, %v want %v", flow, took, flow.Err(), tt.want)
				}
			})
		})
	}
}

// Clients outlive their engine: flows in flight give back what they hold, and others go on without it, as with an agent
// that is down.
func TestEngineClosesFirst(t *testing.T) {
	overEngines(t, slots(1), func(t *testing.T, e *engine.Engine, client *flowctl.Client) {
		params := flowctl.Params{Labels: map[string]string{"user_id": "u"}, ResultCacheKey: "k"}
		flow := client.Start(t.Context(), "point", params)
		if flow.Decision() != flowctl.Accepted {
			t.Fatalf("%v, %v", flow, flow.Err())
		}
		_ = e.Close()
		if got, err := flow.End(t.Context()); err != nil || got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
			t.Errorf("End() = %+v, %v want the slot back", got, err)
		}
		if err := flow.SetResultCache(t.Context(), []byte("v"), 0); err == nil {
			t.Error("SetResultCache() gave no error")
		}
		open := client.Start(t.Context(), "point", params)
		if open.Decision() != flowctl.Unreachable || !errors.Is(open.Err(), flowctl.ErrUnreachable) || !open.ShouldRun() {
			t.Errorf("%v, %v want unreachable, and to run", open, open.Err())
		}
		params.OnUnreachable = flowctl.FailClosed
		if closed := client.Start(t.Context(), "point", params); closed.ShouldRun() {
			t.Errorf("%v runs, although it fails closed", closed)
		}
		if got, err := open.End(t.Context()); err != nil || got != (flowctl.EndResponse{}) {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
}

// Engines close at any time, whatever flows are about. Run with the race detector.
func TestEngineClosesUnderLoad(t *testing.T) {
	overEngines(t, slots(4), func(t *testing.T, e *engine.Engine, client *flowctl.Client) {
		var load sync.WaitGroup
		begun := make(chan struct{}, 8)
		for range cap(begun) {
			load.Go(func() {
				for n := 0; ; n++ {
					flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "u"}, ResultCacheKey: "k"})
					_ = flow.SetResultCache(t.Context(), []byte("v"), 0)
					got, err := flow.End(t.Context())
					if err != nil || got.Returned != got.Held || (got.Held == 1) != (flow.Decision() == flowctl.Accepted) {
						t.Errorf("End() of %v = %+v, %v", flow, got, err)
					}
					if flow.Decision() == flowctl.Unreachable {
						return
					}
					if n == 10 {
						begun <- struct{}{}
					}
				}
			})
		}
		for range cap(begun) {
			<-begun
		}
		_ = e.Close()
		load.Wait()
	})
}

// What a flow of our client's may have just so gets to the limiters and back.
func TestLimits(t *testing.T) {
	const sesame = "sesame"
	value := func(n int) string { return sesame + strings.Repeat("v", n-len(sesame)) }
	many := func(n int) map[string]string {
		m := make(map[string]string, n)
		for i := range n {
			m[fmt.Sprint(i)] = sesame
		}
		return m
	}
	t.Run("all at once", func(t *testing.T) {
		point, key := strings.Repeat("p", 255), strings.Repeat("k", 255)
		overEngines(t, []policy.Policy{{Name: "slots", Components: []policy.Component{policy.ConcurrencyLimiter{
			Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour, LimitBy: key,
		}}}}, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
			start := func(value string) *flowctl.Flow {
				params := flowctl.Params{Labels: many(63), ResultCacheKey: strings.Repeat("r", 255)}
				params.Labels[key] = value
				return client.Start(t.Context(), point, params)
			}
			a, b := value(4096), value(4095)+"w"
			first, second, other := start(a), start(a), start(b)
			if first.Decision() != flowctl.Accepted || second.Decision() != flowctl.Rejected || other.Decision() != flowctl.Accepted {
				t.Fatalf("%v, %v, %v, %v want one flow of each value", first, first.Err(), second.Err(), other.Err())
			}
			if err := first.SetResultCache(t.Context(), []byte("v"), 0); err != nil {
				t.Errorf("SetResultCache() = %v", err)
			}
			if got, err := first.End(t.Context()); err != nil || got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
				t.Errorf("End() = %+v, %v", got, err)
			}
			again := start(a)
			if v, hit, err := again.ResultCache(); !again.ShouldRun() || !hit || string(v) != "v" || err != nil {
				t.Errorf("%v, ResultCache() = %q, %v, %v", again, v, hit, err)
			}
		})
	})
}

// S1: what one flow was started with overwrote what another in flight had, and its end freed the wrong slot.
func TestS1FlowsInFlightKeepTheirLabels(t *testing.T) {
	overEngines(t, slots(1), func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
		start := func(user string) *flowctl.Flow {
			return client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": user}})
		}
		alice, bob := start("alice"), start("bob")
		if !alice.ShouldRun() || !bob.ShouldRun() {
			t.Fatalf("%v, %v want one flow each", alice.Err(), bob.Err())
		}
		if got, err := alice.End(t.Context()); err != nil || got.Returned != 1 {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if start("bob").ShouldRun() || !start("alice").ShouldRun() {
			t.Error("the end of alice's flow freed bob's slot")
		}
		if got := bob.CheckResponse().GetTelemetryFlowLabels()["user_id"]; got != "bob" {
			t.Errorf("bob's flow is of %q", got)
		}
	})
}

// A18: what a peer sends replaced the labels that the application had set, so that it could be of any tier.
func TestA18PeersDoNotReplaceLabels(t *testing.T) {
	noFree := []policy.Policy{{Name: "no-free", Components: []policy.Component{policy.RateLimiter{
		Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{"user_tier": "free"}}}},
		Interval:  time.Second,
	}}}}
	overEngines(t, noFree, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
		spoofed := labels.WithTransport(t.Context(), map[string]string{"user_tier": "platinum"})
		for name, flow := range map[string]*flowctl.Flow{
			"Params":      client.Start(spoofed, "point", flowctl.Params{Labels: map[string]string{"user_tier": "free"}}),
			"labels.With": client.Start(labels.With(spoofed, "user_tier", "free"), "point", flowctl.Params{}),
			"either order": client.Start(labels.WithTransport(labels.With(t.Context(), "user_tier", "free"), map[string]string{"user_tier": "platinum"}),
				"point", flowctl.Params{}),
		} {
			if flow.Decision() != flowctl.Rejected {
				t.Errorf("%s: %v want rejected, as free", name, flow)
			}
		}
		if flow := client.Start(spoofed, "point", flowctl.Params{}); flow.Decision() != flowctl.Accepted {
			t.Errorf("%v want accepted: nothing else says what the tier is", flow)
		}
	})
}
