package sides

import (
	"context"
	"encoding/base64"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A recorder is a local agent that logs what it is asked.
type recorder struct {
	agentapi.Local
	agentapi.Leaser
	log *log
}

func (r *recorder) Agent() agentapi.Local { return r }

func (r *recorder) Check(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) error {
	answer := r.log.asked(Check{req.ControlPoint, req.Labels.Merged()})
	switch {
	case answer.Fail != nil:
		return answer.Fail
	case answer.Reason != flowctl.ReasonNone:
		v.Reject(agentapi.Rejection{Reason: agentapi.Reason(answer.Reason), RetryAfter: answer.RetryAfter})
		return nil
	}
	err := r.Local.Check(ctx, req, v)
	if err == nil {
		r.log.took(held(v))
	}
	return err
}

// Revert takes the place of End.
func (r *recorder) Revert(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) {
	slots := held(v)
	r.Local.Revert(ctx, req, v)
	r.log.took(-slots)
}

// held is how many slots a flow got.
func held(v *agentapi.Verdict) (slots int) {
	if v.Rejected() {
		return 0
	}
	for i := range v.Len() {
		if d := v.At(i); d.Component.Slots && d.Slot() != 0 {
			slots++
		}
	}
	return slots
}

func (r *recorder) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, o agentapi.Outcome) (agentapi.Returns, error) {
	end := End{req.ControlPoint, flowctl.StatusOK}
	if o.Failed() {
		end.Status = flowctl.StatusError
	}
	returns, err := r.Local.End(ctx, req, v, o)
	r.log.ended(end)
	r.log.gave(returns.Returned)
	return returns, err
}

// serve is a server of the engine that logs what comes.
func serve(e *engine.Engine, l *log) *grpc.Server {
	server := grpc.NewServer(append(agent.ServerOptions(), grpc.ChainUnaryInterceptor(l.intercept))...)
	agent.Register(server, e)
	return server
}

func (l *log) intercept(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	switch m := req.(type) {
	case *checkv1.CheckRequest:
		if response, err := scripted(m.GetControlPoint(), l.asked(Check{m.GetControlPoint(), m.GetLabels()})); response != nil || err != nil {
			return response, err
		}
		response, err := handle(ctx, req)
		if answer, ok := response.(*checkv1.CheckResponse); ok && err == nil {
			l.took(slotsOf(answer))
		}
		return response, err
	case *checkhttpv1.CheckHTTPRequest:
		l.asked(Check{ControlPoint: m.GetControlPoint()})
		response, err := handle(ctx, req)
		if answer, ok := response.(*checkhttpv1.CheckHTTPResponse); ok && err == nil {
			l.took(slotsOf(answer.GetCheckResponse()))
		}
		return response, err
	case *checkv1.FlowEndRequest:
		response, err := handle(ctx, req)
		slots := 0
		for _, one := range response.(*checkv1.FlowEndResponse).GetTokenReturnStatuses() {
			if one.GetReturned() {
				slots++
			}
		}
		l.gave(slots)
		return response, err
	}
	response, err := handle(ctx, req)
	if data, ok := req.(proto.Message); ok && err == nil && response != nil {
		l.export(data)
	}
	return response, err
}

// scripted is what the answer makes of a check; nothing where the engine is to decide.
func scripted(controlPoint string, answer flowtest.Answer) (*checkv1.CheckResponse, error) {
	if answer.Fail != nil || answer.Reason == flowctl.ReasonNone {
		return nil, answer.Fail
	}
	m := &checkv1.CheckResponse{
		Start: timestamppb.Now(), End: timestamppb.Now(),
		ControlPoint: controlPoint,
		DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED,
		RejectReason: checkv1.CheckResponse_RejectReason(answer.Reason),
	}
	if answer.RetryAfter != 0 {
		m.WaitTime = durationpb.New(answer.RetryAfter)
	}
	return m, nil
}

// slotsOf is how many slots a flow got.
func slotsOf(answer *checkv1.CheckResponse) (slots int) {
	if answer.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		return 0
	}
	for _, d := range answer.GetLimiterDecisions() {
		if d.GetConcurrencyLimiterInfo().GetRequestId() != "" || d.GetConcurrencySchedulerInfo().GetRequestId() != "" {
			slots++
		}
	}
	return slots
}

// export reads how flows ended from what the client reports. The engine keeps none of that.
func (l *log) export(data proto.Message) {
	wire, err := proto.Marshal(data)
	traces := new(tracev1.TracesData)
	if errors.Join(err, proto.Unmarshal(wire, traces)) != nil {
		return // another service's
	}
	for _, resource := range traces.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				l.ended(endOf(span))
			}
		}
	}
}

// endOf reads how a flow was ended from its record.
func endOf(span *tracev1.Span) (e End) {
	for _, kv := range span.GetAttributes() {
		switch text := kv.GetValue().GetStringValue(); kv.GetKey() {
		case "aperture.flow.status":
			e.Status = flowctl.StatusError
			if text == "OK" {
				e.Status = flowctl.StatusOK
			}
		case "aperture.check_response":
			wire, err := base64.StdEncoding.DecodeString(text)
			m := new(checkv1.CheckResponse)
			if errors.Join(err, proto.Unmarshal(wire, m)) == nil {
				e.ControlPoint = m.GetControlPoint()
			}
		}
	}
	return e
}

// WithoutSessions makes a server of package agent one that knows no sessions, as agents other than Headgate's.
func WithoutSessions() grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
		if info.FullMethod == sessionv1.SessionService_Session_FullMethodName {
			return status.Error(codes.Unimplemented, "unknown service headgate.session.v1.SessionService")
		}
		return handle(server, stream)
	})
}

// Serve runs the server in memory until the test ends, and returns the option that dials it.
func Serve(t testing.TB, server *grpc.Server) grpc.DialOption {
	t.Helper()
	return serveBy(t, server, new(network))
}

// A network carries the messages of a server and its clients.
type network struct {
	travel time.Duration // how long they take to arrive
	cut    atomic.Bool   // it carries nothing that clients say
}

// serveBy is Serve of a server that is reached by the network.
func serveBy(t testing.TB, server *grpc.Server, by *network) grpc.DialOption {
	t.Helper()
	listener := bufconn.Listen(1 << 16) // a connection makes two buffers of that size, which the race detector clears
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun
			t.Error(err)
		}
	})
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := listener.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		if by.travel > 0 {
			conn = &far{Conn: conn, travel: by.travel, closed: make(chan struct{})}
		}
		return cable{conn, by}, nil
	})
}

// cable is a connection by a network.
type cable struct {
	net.Conn
	network *network
}

func (c cable) Write(b []byte) (int, error) {
	if c.network.cut.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// far is a connection to a peer that is far away.
type far struct {
	net.Conn
	travel time.Duration
	close  sync.Once
	closed chan struct{}
}

func (f *far) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	select {
	case <-time.After(f.travel):
		return n, err
	case <-f.closed:
		return 0, net.ErrClosed
	}
}

func (f *far) Close() error {
	f.close.Do(func() { close(f.closed) })
	return f.Conn.Close()
}

// Dial runs the server in memory, and makes a client of it. Both are closed when the test ends.
func Dial(t testing.TB, server *grpc.Server, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	return dial(t, server, new(network), opts...)
}

func dial(t testing.TB, server *grpc.Server, by *network, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	client, err := flowctl.Dial("passthrough:///localhost",
		append([]flowctl.Option{flowctl.WithInsecure(), flowctl.WithDialOptions(serveBy(t, server, by))}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) }) // the context has ended by then
	return client
}
