package flowctl_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

// goesOnWithout checks that a client of an address where nobody answers starts flows that run, unless they are told not
// to, that the breaker opens, and that nothing takes for ever.
func goesOnWithout(t *testing.T, address string) {
	t.Helper()
	var log lockedBuffer
	client, err := flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithCheckTimeout(50*time.Millisecond),
		flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	// A flow that outlasts this is Canceled, and not Unreachable.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for !strings.Contains(log.String(), "the agent does not answer") {
		flow := client.Start(ctx, "point", flowctl.Params{})
		if flow.Decision() != flowctl.Unreachable || !flow.ShouldRun() {
			t.Fatalf("%v, %v want unreachable, and to run", flow, flow.Err())
		}
		if got, err := flow.End(ctx); err != nil || got != (flowctl.EndResponse{}) {
			t.Errorf("End() = %+v, %v", got, err)
		}
	}
	for name, params := range map[string]flowctl.Params{"fail closed": {OnUnreachable: flowctl.FailClosed}, "ramp": {RampMode: true}} {
		if flow := client.Start(ctx, "point", params); flow.Decision() != flowctl.Unreachable || flow.ShouldRun() {
			t.Errorf("%s: %v, ShouldRun() = %v want unreachable, and not to run", name, flow, flow.ShouldRun())
		}
	}
	short, cancelShort := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancelShort()
	if err := client.Ready(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ready() = %v want its context's error", err)
	}
	if err := client.Close(ctx); err != nil {
		t.Errorf("Close() = %v", err)
	}
}

// Nobody listens.
func TestRefusedPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	goesOnWithout(t, l.Addr().String())
}

// Somebody listens, takes connections and all that is sent, and never says a word.
func TestBlackHole(t *testing.T) {
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var swallowing sync.WaitGroup
	swallowing.Go(func() {
		for {
			conn, err := hole.Accept()
			if err != nil {
				return
			}
			swallowing.Go(func() {
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			})
		}
	})
	defer swallowing.Wait()
	defer hole.Close()
	goesOnWithout(t, hole.Addr().String())
}

// The kernel takes connections for a process that does not: it hangs, or is stopped.
func TestBlackHoleOfAStoppedProcess(t *testing.T) {
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	goesOnWithout(t, hole.Addr().String())
}

// A13: without a deadline of the caller's, an agent that hangs in a check held its flow for ever. It costs each flow its
// check timeout, and no more.
func TestA13CheckHasATimeLimit(t *testing.T) {
	for _, tt := range []struct {
		name   string
		opts   []flowctl.Option
		params flowctl.Params
		want   time.Duration
	}{
		{name: "default", want: 200 * time.Millisecond},
		{name: "the client's", opts: []flowctl.Option{flowctl.WithCheckTimeout(time.Second)}, want: time.Second},
		{name: "the flow's", params: flowctl.Params{CheckTimeout: 30 * time.Second}, want: 30 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(flowtest.Answer{Hang: true})
				client := agent.Client(tt.opts...)
				for range 10 { // it lives, so it is asked each time
					begin := time.Now()
					flow := client.Start(t.Context(), "point", tt.params)
					if took := time.Since(begin); took != tt.want {
						t.Errorf("Start() took %v want %v", took, tt.want)
					}
					if flow.Decision() != flowctl.Unreachable || !flow.ShouldRun() {
						t.Errorf("%v, ShouldRun() = %v want unreachable, and to run", flow, flow.ShouldRun())
					}
				}
				if got := len(agent.Checks()); got != 10 {
					t.Errorf("the agent was asked %d times want 10", got)
				}
			})
		})
	}
}

// farConn is a connection over which everything comes late.
type farConn struct {
	net.Conn
	delay  time.Duration
	chunks chan chunk
	rest   []byte
}

type chunk struct {
	data []byte
	due  time.Time
	err  error
}

// far is a dialer of the agent's by way of the moon.
func far(agent *flowtest.Agent, delay time.Duration) grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		near, err := agent.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		c := &farConn{Conn: near, delay: delay, chunks: make(chan chunk, 1024)}
		go c.receive()
		return c, nil
	})
}

func (c *farConn) receive() {
	for {
		data := make([]byte, 32<<10)
		n, err := c.Conn.Read(data)
		c.chunks <- chunk{data[:n], time.Now().Add(c.delay), err}
		if err != nil {
			return
		}
	}
}

func (c *farConn) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		next := <-c.chunks
		if next.err != nil {
			return 0, next.err
		}
		<-time.After(time.Until(next.due))
		c.rest = next.data
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// A saturated agent's answers come after their flows have gone on without, but they come: such an agent is not dead, and
// goes on being asked, however seldom that is.
func TestSaturatedAgent(t *testing.T) {
	for _, pause := range []time.Duration{0, 10 * time.Millisecond, time.Second, time.Minute} {
		t.Run(pause.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				var log bytes.Buffer
				client := agent.Client(logTo(&log), flowctl.WithoutTelemetry(), flowctl.WithDialOptions(far(agent, 250*time.Millisecond)))
				if err := client.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				for range 50 {
					if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable {
						t.Fatalf("%v want unreachable", flow)
					}
					<-time.After(pause)
				}
				if got := len(agent.Checks()); got != 50 || strings.Contains(log.String(), "does not answer") {
					t.Errorf("the agent was asked %d times want 50; log:\n%s", got, &log)
				}
			})
		})
	}
}

// An agent that was silent, and whose answers come late from then on, is back.
func TestSaturatedAgentAfterAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		var log bytes.Buffer
		client := agent.Client(logTo(&log), flowctl.WithoutTelemetry(), flowctl.WithDialOptions(far(agent, 250*time.Millisecond)))
		if err := client.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // for what else the agent has to send, which would be a sign of life
		agent.Freeze()
		for !strings.Contains(log.String(), "does not answer") {
			client.Start(t.Context(), "point", flowctl.Params{})
		}
		agent.Thaw()
		<-time.After(time.Second)
		asked := len(agent.Checks())
		for range 50 {
			client.Start(t.Context(), "point", flowctl.Params{})
		}
		if got := len(agent.Checks()) - asked; got != 50 || !strings.Contains(log.String(), "answers again") {
			t.Errorf("the agent was asked %d times want 50; log:\n%s", got, &log)
		}
	})
}

// inMemory serves until the test ends, and gives the dialer that leads there.
func inMemory(t *testing.T, server *grpc.Server) flowctl.Option {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun
			t.Error(err)
		}
	})
	return flowctl.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
}

// An agent that wants another key does not decide. Flows go on as they do without an agent, but not in silence, and the
// agent does not count as dead.
func TestWrongAPIKey(t *testing.T) {
	const key, wrong = "open-sesame", "open-barley"
	for _, tt := range []struct {
		name  string
		code  codes.Code
		opts  []flowctl.Option
		right bool
	}{
		{name: "right", code: codes.Unauthenticated, opts: []flowctl.Option{flowctl.WithAPIKey(key)}, right: true},
		{name: "wrong", code: codes.Unauthenticated, opts: []flowctl.Option{flowctl.WithAPIKey(wrong)}},
		{name: "not enough", code: codes.PermissionDenied, opts: []flowctl.Option{flowctl.WithAPIKey(wrong)}},
		{name: "none", code: codes.Unauthenticated},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				asked := 0
				server := grpc.NewServer(grpc.WaitForHandlers(true), grpc.UnaryInterceptor(
					func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
						if info.FullMethod == checkv1.FlowControlService_Check_FullMethodName {
							asked++
						}
						if md, _ := metadata.FromIncomingContext(ctx); strings.Join(md.Get("x-api-key"), ",") != key {
							return nil, status.Error(tt.code, "not with this key")
						}
						return handle(ctx, req)
					}))
				checkv1.RegisterFlowControlServiceServer(server, new(acceptAll))
				var log bytes.Buffer
				client, err := flowctl.Dial("passthrough:///localhost", append(tt.opts,
					flowctl.WithInsecure(), flowctl.WithoutTelemetry(), logTo(&log), inMemory(t, server))...)
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close(t.Context())

				ready := client.Ready(t.Context())
				for range 200 {
					flow := client.Start(t.Context(), "point", flowctl.Params{})
					var unreachable *flowctl.UnreachableError
					switch {
					case tt.right:
						if flow.Decision() != flowctl.Accepted {
							t.Fatalf("%v, %v want accepted", flow, flow.Err())
						}
					case !errors.As(flow.Err(), &unreachable) || status.Code(unreachable.Cause()) != tt.code || !flow.ShouldRun():
						t.Fatalf("%v, %v want unreachable by %v, and to run", flow, flow.Err(), tt.code)
					case strings.Contains(flow.Err().Error(), wrong):
						t.Fatalf("error %q shows the key", flow.Err())
					}
					<-time.After(time.Second)
				}
				if asked != 200 {
					t.Errorf("the agent was asked %d times want 200", asked)
				}
				if tt.right {
					if ready != nil || log.Len() > 0 {
						t.Errorf("Ready() = %v, log:\n%s", ready, &log)
					}
					return
				}
				if ready == nil || !strings.Contains(ready.Error(), "refuses the API key") {
					t.Errorf("Ready() = %v want it to say so", ready)
				}
				if got := strings.Count(log.String(), "refuses to decide"); got != 4 || strings.Contains(log.String(), wrong) {
					t.Errorf("logged %d times in 200 s want 4, without the key:\n%s", got, &log)
				}
				closed := client.Start(t.Context(), "point", flowctl.Params{OnUnreachable: flowctl.FailClosed})
				if closed.ShouldRun() || closed.HTTPStatus() != http.StatusServiceUnavailable {
					t.Errorf("fail closed: ShouldRun() = %v, HTTPStatus() = %d", closed.ShouldRun(), closed.HTTPStatus())
				}
			})
		})
	}
}

// wire is a codec of bytes, for a server that answers what it likes.
type wire struct{}

var _ encoding.CodecV2 = wire{}

func (wire) Marshal(v any) (mem.BufferSlice, error) {
	data, _ := v.([]byte)
	return mem.BufferSlice{mem.SliceBuffer(data)}, nil
}

func (wire) Unmarshal(mem.BufferSlice, any) error { return nil } // whatever it was asked

func (wire) Name() string { return protocodec.Name }

// answers dials a server that answers calls with these bytes, by method, and with none where there is no entry.
func answers(t *testing.T, byMethod map[string][]byte) *flowctl.Client {
	t.Helper()
	server := grpc.NewServer(grpc.WaitForHandlers(true), grpc.ForceServerCodecV2(wire{}), grpc.UnknownServiceHandler(
		func(_ any, stream grpc.ServerStream) error {
			method, _ := grpc.MethodFromServerStream(stream)
			if err := stream.RecvMsg(nil); err != nil {
				return err
			}
			return stream.SendMsg(byMethod[method])
		}))
	client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithCheckTimeout(10*time.Second), inMemory(t, server))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	return client
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Whatever an agent answers, there is a decision, and nothing that a flow can be asked panics.
func TestMalformedAnswers(t *testing.T) {
	rejected := func(change func(*checkv1.CheckResponse)) []byte {
		m := &checkv1.CheckResponse{
			DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED, RejectReason: checkv1.CheckResponse_REJECT_REASON_RATE_LIMITED,
		}
		change(m)
		return marshal(t, m)
	}
	good := marshal(t, &checkv1.CheckResponse{ControlPoint: "point", LimiterDecisions: []*checkv1.LimiterDecision{held("root.0", "slot", false)}})
	for _, tt := range []struct {
		name   string
		answer []byte
		want   flowctl.Decision
		reason flowctl.RejectReason
		status int // of a rejection
		wait   time.Duration
	}{
		{name: "no message", answer: []byte("<html>503 Service Unavailable</html>"), want: flowctl.Unreachable},
		{name: "half a message", answer: good[:len(good)-1], want: flowctl.Unreachable},
		{name: "invalid UTF-8", answer: bytes.Replace(good, []byte("point"), []byte("po\xffnt"), 1), want: flowctl.Unreachable},
		{name: "too large", answer: marshal(t, &checkv1.CheckResponse{ControlPoint: strings.Repeat("p", 16<<20)}), want: flowctl.Unreachable},
		{name: "unknown fields", answer: append([]byte("\xfa\x07\x03abc"), good...), want: flowctl.Accepted},
		{
			name: "unknown enums", want: flowctl.Rejected, status: 403,
			answer: marshal(t, &checkv1.CheckResponse{DecisionType: 7, RejectReason: 257, DeniedResponseStatusCode: 7, LimiterDecisions: []*checkv1.LimiterDecision{{
				Reason: 9, DeniedResponseStatusCode: -9, Dropped: true,
			}}}),
		},
		{
			name: "negative enums", want: flowctl.Rejected, status: 403,
			answer: marshal(t, &checkv1.CheckResponse{DecisionType: -1, RejectReason: -3, DeniedResponseStatusCode: -429}),
		},
		{
			name: "an enum that others grow by", want: flowctl.Rejected, reason: 200, status: 403,
			answer: rejected(func(m *checkv1.CheckResponse) { m.RejectReason = 200 }),
		},
		{
			name: "status 0", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) { m.DeniedResponseStatusCode = 0 }),
		},
		{
			name: "status of success", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) { m.DeniedResponseStatusCode = 200 }),
		},
		{
			name: "status beyond all", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) { m.DeniedResponseStatusCode = 1<<16 + 503 }),
		},
		{
			name: "negative wait", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) { m.WaitTime = durationpb.New(-time.Hour) }),
		},
		{
			name: "wait of 49 years", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429, wait: 49 * 365 * 24 * time.Hour,
			answer: rejected(func(m *checkv1.CheckResponse) { m.WaitTime = durationpb.New(49 * 365 * 24 * time.Hour) }),
		},
		{
			name: "wait of 50 years", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) { m.WaitTime = durationpb.New(50 * 365 * 24 * time.Hour) }),
		},
		{
			name: "huge wait", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) { m.WaitTime = &durationpb.Duration{Seconds: math.MaxInt64} }),
		},
		{
			name: "hugely negative wait", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) {
				m.WaitTime = &durationpb.Duration{Seconds: math.MinInt64, Nanos: math.MinInt32}
			}),
		},
		{
			name: "wait of contradictions", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429, wait: 3 * time.Second,
			answer: rejected(func(m *checkv1.CheckResponse) { m.WaitTime = &durationpb.Duration{Seconds: 5, Nanos: -2e9} }),
		},
		{
			name: "nil parts", want: flowctl.Rejected, reason: flowctl.ReasonRateLimited, status: 429,
			answer: rejected(func(m *checkv1.CheckResponse) {
				m.LimiterDecisions = []*checkv1.LimiterDecision{
					{},
					{Dropped: true},
					{Dropped: true, WaitTime: &durationpb.Duration{Seconds: math.MaxInt64}, Details: &checkv1.LimiterDecision_RateLimiterInfo_{}},
					{Details: &checkv1.LimiterDecision_LoadSchedulerInfo{}},
					{Details: &checkv1.LimiterDecision_SamplerInfo_{}},
					{Details: &checkv1.LimiterDecision_QuotaSchedulerInfo_{}},
					{Details: &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{}},
					{Details: &checkv1.LimiterDecision_ConcurrencySchedulerInfo_{}},
				}
				m.ClassifierInfos = []*checkv1.ClassifierInfo{{}}
				m.FluxMeterInfos = []*checkv1.FluxMeterInfo{{}}
				m.CacheLookupResponse = &checkv1.CacheLookupResponse{}
			}),
		},
		{
			name: "caches of nonsense", want: flowctl.Accepted,
			answer: marshal(t, &checkv1.CheckResponse{CacheLookupResponse: &checkv1.CacheLookupResponse{
				ResultCacheResponse:  &checkv1.KeyLookupResponse{Value: []byte("v"), LookupStatus: 9},
				GlobalCacheResponses: map[string]*checkv1.KeyLookupResponse{"g": {Value: []byte("v"), OperationStatus: 9}, "unasked": {Value: []byte("v")}},
			}}),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := answers(t, map[string][]byte{checkv1.FlowControlService_Check_FullMethodName: tt.answer})
				flow := client.Start(t.Context(), "point", flowctl.Params{ResultCacheKey: "r", GlobalCacheKeys: []string{"g"}})
				if flow.Decision() != tt.want || flow.RejectReason() != tt.reason || flow.RetryAfter() != tt.wait {
					t.Errorf("%v, %v, RetryAfter() = %v want %v, %v, %v", flow, flow.RejectReason(), flow.RetryAfter(), tt.want, tt.reason, tt.wait)
				}
				wantStatus := http.StatusOK
				if tt.want == flowctl.Rejected {
					wantStatus = tt.status
				}
				if got := flow.HTTPStatus(); got != wantStatus {
					t.Errorf("HTTPStatus() = %d want %d", got, wantStatus)
				}
				if (flow.Err() == nil) != (tt.want == flowctl.Accepted) {
					t.Errorf("Err() = %v", flow.Err())
				}
				if s := status.Convert(flow.Err()); flow.Err() != nil && (s.Code() == codes.OK || s.Code() == codes.Unknown || (len(s.Details()) == 1) != (tt.wait > 0)) {
					t.Errorf("status = %v, %v", s, s.Details())
				}
				if got := flow.CheckResponse(); (got != nil) != flow.Success() {
					t.Errorf("CheckResponse() = %v", got)
				}
				for name, look := range map[string]func() ([]byte, bool, error){
					"ResultCache": flow.ResultCache, "GlobalCache": func() ([]byte, bool, error) { return flow.GlobalCache("g") },
				} {
					if v, hit, _ := look(); hit || len(v) > 0 && name == "GlobalCache" {
						t.Errorf("%s() = %q, %v want no hit", name, v, hit)
					}
				}
				if _, hit, err := flow.GlobalCache("unasked"); hit || (err != nil) != (tt.want != flowctl.Accepted) {
					t.Errorf("GlobalCache() of what was not asked for = %v, %v", hit, err)
				}
				if got, err := flow.End(t.Context()); err != nil || got.Returned > got.Held {
					t.Errorf("End() = %+v, %v", got, err)
				}
				if err := client.Close(t.Context()); err != nil { // telemetry takes the answer as it came
					t.Errorf("Close() = %v", err)
				}
			})
		})
	}
}

// Nor does what an agent answers to an end.
func TestMalformedAnswersToEnds(t *testing.T) {
	returned := &checkv1.TokenReturnStatus{Returned: true}
	for _, tt := range []struct {
		name   string
		answer []byte
		want   flowctl.EndResponse
		err    bool
	}{
		{name: "nothing", want: flowctl.EndResponse{Held: 1}},
		{name: "no message", answer: []byte("<html>"), want: flowctl.EndResponse{Held: 1}, err: true},
		{name: "empty parts", answer: marshal(t, &checkv1.FlowEndResponse{TokenReturnStatuses: []*checkv1.TokenReturnStatus{{}}}), want: flowctl.EndResponse{Held: 1}},
		{
			name: "more than there was", want: flowctl.EndResponse{Held: 1, Returned: 1},
			answer: marshal(t, &checkv1.FlowEndResponse{TokenReturnStatuses: []*checkv1.TokenReturnStatus{returned, returned, returned}}),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := answers(t, map[string][]byte{
					checkv1.FlowControlService_Check_FullMethodName:   marshal(t, &checkv1.CheckResponse{LimiterDecisions: []*checkv1.LimiterDecision{held("root.0", "slot", false)}}),
					checkv1.FlowControlService_FlowEnd_FullMethodName: tt.answer,
				})
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				if got, err := flow.End(t.Context()); got != tt.want || (err != nil) != tt.err {
					t.Errorf("End() = %+v, %v want %+v, an error: %v", got, err, tt.want, tt.err)
				}
				if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
					t.Errorf("second End() = %v want ErrEnded", err)
				}
			})
		})
	}
}

// Flows that wait, flows that run and flows that end when their client closes: each is decided about and ends.
func TestCloseDuringFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Slots: 1})
		agent.AnswerAt("slow", flowtest.Answer{Hang: true})
		client := agent.Client(flowctl.WithCheckTimeout(-1))
		const n = 20
		running := make([]*flowctl.Flow, n)
		for i := range running {
			if running[i] = client.Start(t.Context(), "point", flowctl.Params{}); !running[i].ShouldRun() {
				t.Fatal(running[i].Err())
			}
		}
		waited := make(chan *flowctl.Flow, n)
		for range n {
			go func() {
				waited <- client.Start(t.Context(), "slow", flowctl.Params{OnUnreachable: flowctl.FailClosed})
			}()
		}
		synctest.Wait() // they wait for the agent
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		for range n {
			flow := <-waited
			rejected, _ := errors.AsType[*flowctl.RejectedError](flow.Err())
			if flow.Decision() != flowctl.Rejected || rejected == nil || rejected.Cause() != flowctl.CauseClosed || flow.ShouldRun() {
				t.Errorf("a flow that waited: %v, %v want rejected, closed", flow, flow.Err())
			}
			if _, err := flow.End(t.Context()); err != nil {
				t.Errorf("End() of a flow that waited = %v", err)
			}
		}
		for _, flow := range running {
			// There is no connection left to give the slot back over, and End says so at once.
			if got, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrClosed) || got != (flowctl.EndResponse{Held: 1}) {
				t.Errorf("End() of a flow that ran = %+v, %v want ErrClosed", got, err)
			}
			if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
				t.Errorf("second End() = %v want ErrEnded", err)
			}
		}
	})
}

// Clients close at any time, whatever their flows are about. Run with the race detector.
func TestCloseUnderLoad(t *testing.T) {
	for name, client := range map[string]*flowctl.Client{"remote": flowtest.NewAgent(t).Client(flowctl.WithCheckTimeout(time.Minute)), "embedded": noPolicies(t)} {
		t.Run(name, func(t *testing.T) {
			var load sync.WaitGroup
			begun := make(chan struct{}, 8)
			for range cap(begun) {
				load.Go(func() {
					for n := 0; ; n++ {
						flow := client.Start(t.Context(), "point", flowctl.Params{})
						_, ended := flow.End(t.Context())
						switch {
						case ended == nil && flow.Decision() == flowctl.Rejected && flow.RejectReason() == flowctl.ReasonNoTokens:
							continue // it was being asked about
						case ended != nil, !flow.ShouldRun():
							t.Errorf("%v, ShouldRun() = %v, End() = %v", flow, flow.ShouldRun(), ended)
							return
						case errors.Is(flow.Err(), flowctl.ErrClosed):
							return
						case flow.Decision() != flowctl.Accepted:
							t.Errorf("%v, %v want accepted or closed", flow, flow.Err())
							return
						}
						if n == 10 {
							begun <- struct{}{}
						}
						runtime.Gosched()
					}
				})
			}
			for range cap(begun) {
				<-begun
			}
			var closing sync.WaitGroup
			for range 4 {
				closing.Go(func() {
					if err := client.Close(t.Context()); err != nil {
						t.Errorf("Close() = %v", err)
					}
				})
			}
			closing.Wait()
			load.Wait()
		})
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
