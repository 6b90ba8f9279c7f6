package agent_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/policy"
)

// process is an agent that can be killed, at an address of this machine.
type process struct {
	engine *engine.Engine
	server *grpc.Server
	served chan error
}

// maxInflight is when a process takes back what a client was given and never heard of: its check had timed out.
const maxInflight = 5 * time.Second

func startProcess(t *testing.T, address string) (*process, string) {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "slots", Components: []policy.Component{policy.ConcurrencyLimiter{
		Selectors: policy.At("point"), Max: math.MaxInt32, MaxInflight: maxInflight, LimitBy: "user_id",
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
	var v seam.Verdict
	req := &seam.Request{ControlPoint: "point", Labels: seam.Labels{Params: map[string]string{"user_id": "u"}}}
	if err := p.engine.Check(t.Context(), req, &v); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = p.engine.End(t.Context(), req, &v, false) }()
	return v.At(0).Component.Capacity - v.At(0).Remaining
}

// An agent that is killed and comes back under load: flows go on all the while, the gate opens and closes, and neither
// slots nor goroutines are left behind.
func TestAgentRestartsUnderLoad(t *testing.T) {
	before := runtime.NumGoroutine()
	p, address := startProcess(t, "127.0.0.1:0")
	var log lockedBuffer
	client, err := flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithCheckTimeout(50*time.Millisecond),
		flowctl.WithGate(flowctl.Gate{Probe: 50 * time.Millisecond}), flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}

	var accepted, unreachable atomic.Int64
	guarded := headgate.GuardFunc(client, "point",
		func(context.Context, *flowctl.Decision) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"user_id": "u"}}
		},
		func(ctx context.Context, _ *flowctl.Decision) (bool, error) {
			if flow, _ := flowctl.FromContext(ctx); flow.Decision() == flowctl.Unreachable {
				unreachable.Add(1)
			} else {
				accepted.Add(1)
			}
			return true, nil
		}, nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var load sync.WaitGroup
	for range 16 {
		load.Go(func() {
			for ctx.Err() == nil {
				// Rejected is a check that came too late for the agent to let it in.
				if ran, err := guarded(t.Context(), nil); !ran && !errors.Is(err, flowctl.ErrRejected) {
					t.Errorf("a flow did not run: %v", err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	until := func(what string, done func() bool) {
		t.Helper()
		deadline := time.Now().Add(20 * time.Second)
		for !done() {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not within 20 s", what)
			}
			<-time.After(5 * time.Millisecond)
		}
	}
	for range 2 {
		seen := accepted.Load()
		until("flows are accepted", func() bool { return accepted.Load() > seen+100 })
		seen = unreachable.Load()
		p.kill(t)
		until("flows go on without the agent", func() bool { return unreachable.Load() > seen+1000 })
		p, _ = startProcess(t, address)
	}
	seen := accepted.Load()
	until("flows are accepted again", func() bool { return accepted.Load() > seen+100 })
	stop()
	load.Wait()
	if err := client.Close(t.Context()); err != nil {
		t.Logf("telemetry: %v", err) // that of the time without an agent is lost, as it may be
	}
	until("all slots are free", func() bool { return p.inFlight(t) == 0 })
	p.kill(t)
	if text := log.String(); !strings.Contains(text, "does not answer") || !strings.Contains(text, "answers again") {
		t.Errorf("the gate did not open and close:\n%s", text)
	}
	until("goroutines end", func() bool { return runtime.NumGoroutine() <= before })
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

// Whatever a client sends, it gets an answer or an error that is its own fault, and holds nothing when it has ended.
func FuzzCheck(f *testing.F) {
	for _, m := range []*checkv1.CheckRequest{
		{},
		{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}, ExpectEnd: true},
		{ControlPoint: "point", RampMode: true, CacheLookupRequest: &checkv1.CacheLookupRequest{ResultCacheKey: "r", GlobalCacheKeys: []string{"g", ""}}},
		{ControlPoint: "rate", Labels: map[string]string{"cost": "1e300"}},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	e, err := engine.New(append(slots(2), policy.Policy{Name: "rate", Components: []policy.Component{policy.RateLimiter{
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
			if code := status.Code(err); code != codes.InvalidArgument {
				t.Fatalf("Check() = %v", err)
			}
			return
		}
		if _, err := proto.Marshal(m); err != nil {
			t.Fatalf("the answer cannot be sent: %v", err)
		}
		end := &checkv1.FlowEndRequest{ControlPoint: req.GetControlPoint()}
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
	})
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
		opts []flowctl.Option
		want flowctl.Decision
	}{
		{"the client's keepalive", nil, flowctl.Accepted},
		{"another", []flowctl.Option{flowctl.WithKeepalive(keepalive.ClientParameters{Time: 10 * time.Second})}, flowctl.Unreachable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := bufconn.Listen(1 << 20)
				server := grpc.NewServer(grpc.WaitForHandlers(true))
				checkv1.RegisterFlowControlServiceServer(server, waiting{wait: 20 * time.Minute})
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
				if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != tt.want {
					t.Errorf("%v, %v want %v", flow, flow.Err(), tt.want)
				}
			})
		})
	}
}
