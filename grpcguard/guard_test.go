package grpcguard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const point = "orders"

type set = map[string]string

// An agentSide is one kind of agent. It gives each flow a slot and, where it is to say no, a minute to wait.
type agentSide struct {
	name  string
	start func(t testing.TB, rejects bool) *side
}

var agentSides = []agentSide{sideOf(sides.Embedded), sideOf(sides.Served), sideOf(sides.Scripted)}

func sideOf(kind sides.Kind) agentSide {
	return agentSide{string(kind), func(t testing.TB, rejects bool) *side { return newSide(t, kind, rejects) }}
}

// A side keeps the flows that its client starts.
type side struct {
	*sides.Side
	starts *starter
}

// ended is how a flow was ended, as the agent saw it.
type ended struct {
	ControlPoint string
	Status       flowctl.Status
}

// starter keeps the flows that a client starts.
type starter struct {
	*flowctl.Client
	mu    sync.Mutex
	flows []*flowctl.Flow
}

func (s *starter) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	flow := s.Client.Start(ctx, controlPoint, params)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows = append(s.flows, flow)
	return flow
}

// all gives the flows so far.
func (s *starter) all() []*flowctl.Flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.flows)
}

// patient options make no test depend on how fast the machine is.
func patient() []flowctl.Option {
	return []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), flowctl.WithBaggage("tier")}
}

// newSide makes a side of the kind.
func newSide(t testing.TB, kind sides.Kind, rejects bool) *side {
	t.Helper()
	components := []policy.Component{policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 1000, MaxInflight: time.Hour}}
	answer := flowtest.Answer{Slots: 1}
	if rejects {
		components = append(components, policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Minute})
		answer.Reason, answer.RetryAfter = flowctl.ReasonRateLimited, time.Minute
	}
	opts := patient()
	if kind != sides.Embedded {
		opts = append(opts, flowctl.WithEndTimeout(time.Minute))
	}
	s := sides.Setup{Policies: sides.Policies(components...), Options: opts}.New(t, kind)
	switch {
	case s.Script != nil:
		s.Answer(answer)
	case rejects: // the first was let in
		req, v := agentapi.Request{ControlPoint: point}, agentapi.Verdict{}
		err := s.Agent.Check(t.Context(), &req, &v)
		if _, endErr := s.Agent.End(t.Context(), &req, &v, agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil || endErr != nil || v.Rejected() {
			t.Fatal(err, endErr, v.Rejected())
		}
	}
	return &side{s, &starter{Client: s.Client}}
}

func embeddedSide(t testing.TB, rejects bool) *side { return newSide(t, sides.Embedded, rejects) }

// labels are those of each check.
func (s *side) labels() (all []set) {
	for _, c := range s.Checks() {
		all = append(all, c.Labels)
	}
	return all
}

// ends closes the client.
func (s *side) ends() (all []ended) {
	for _, end := range s.Ends() {
		all = append(all, ended(end))
	}
	return all
}

func (s *side) held() int { return s.Held() }

// wantEnds checks how flows ended, that all ended, and that no slot is held any more.
func (s *side) wantEnds(t *testing.T, want ...ended) {
	t.Helper()
	if got := s.held(); got != 0 {
		t.Errorf("%d slots are held", got)
	}
	for _, flow := range s.starts.all() {
		if _, err := flow.End(t.Context()); !errors.Is(err, flowctl.ErrEnded) {
			t.Errorf("%v was not ended", flow)
		}
	}
	if got := s.ends(); !slices.Equal(got, want) {
		t.Errorf("the agent saw the ends %v want %v", got, want)
	}
	if calls, _ := s.Returned(); s.Script != nil && calls != len(want) {
		t.Errorf("%d calls ended flows want %d", calls, len(want))
	}
}

// A network is how clients reach servers.
type network struct {
	name   string
	listen func(t testing.TB) (net.Listener, grpc.DialOption)
}

func loopback(t testing.TB) (net.Listener, grpc.DialOption) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	})
}

func memory(testing.TB) (net.Listener, grpc.DialOption) {
	l := bufconn.Listen(1 << 16)
	return l, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })
}

var networks = []network{{"tcp", loopback}, {"memory", memory}}

// serve serves over one network, and dials it. Stop ends both, handlers too; it is called when the test ends.
func serve(t testing.TB, listen func(testing.TB) (net.Listener, grpc.DialOption), register func(*grpc.Server),
	options []grpc.ServerOption, dial ...grpc.DialOption,
) (conn *grpc.ClientConn, stop func()) {
	t.Helper()
	listener, dialer := listen(t)
	server := grpc.NewServer(append([]grpc.ServerOption{grpc.WaitForHandlers(true)}, options...)...)
	register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///localhost",
		append([]grpc.DialOption{dialer, grpc.WithTransportCredentials(insecure.NewCredentials())}, dial...)...)
	if err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return conn, stop
}

// service echoes what it gets, and does what the test says before it is done.
type service struct {
	testgrpc.UnimplementedTestServiceServer
	calls atomic.Int64
	do    func(ctx context.Context) error // nil: nothing
}

func (s *service) register(server *grpc.Server) { testgrpc.RegisterTestServiceServer(server, s) }

func (s *service) work(ctx context.Context) error {
	s.calls.Add(1)
	if s.do == nil {
		return nil
	}
	return s.do(ctx)
}

func (s *service) UnaryCall(ctx context.Context, req *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	if err := s.work(ctx); err != nil {
		return nil, err
	}
	return &testgrpc.SimpleResponse{Payload: req.GetPayload()}, nil
}

// StreamingOutputCall sends a response for each that is asked for.
func (s *service) StreamingOutputCall(req *testgrpc.StreamingOutputCallRequest, stream grpc.ServerStreamingServer[testgrpc.StreamingOutputCallResponse]) error {
	for range req.GetResponseParameters() {
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{Payload: req.GetPayload()}); err != nil {
			return err
		}
	}
	return s.work(stream.Context())
}

// StreamingInputCall counts what it gets.
func (s *service) StreamingInputCall(stream grpc.ClientStreamingServer[testgrpc.StreamingInputCallRequest, testgrpc.StreamingInputCallResponse]) error {
	size := int32(0)
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		size += int32(len(req.GetPayload().GetBody()))
	}
	if err := s.work(stream.Context()); err != nil {
		return err
	}
	return stream.SendAndClose(&testgrpc.StreamingInputCallResponse{AggregatedPayloadSize: size})
}

// FullDuplexCall echoes.
func (s *service) FullDuplexCall(stream grpc.BidiStreamingServer[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse]) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return s.work(stream.Context())
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&testgrpc.StreamingOutputCallResponse{Payload: req.GetPayload()}); err != nil {
			return err
		}
	}
}

// A method is one of the service's, and how to call it to its end.
type method struct {
	name   string
	stream bool
	call   func(ctx context.Context, client testgrpc.TestServiceClient) error
}

var payload = &testgrpc.Payload{Body: []byte("12345")}

var testMethods = []method{
	{"UnaryCall", false, func(ctx context.Context, client testgrpc.TestServiceClient) error {
		resp, err := client.UnaryCall(ctx, &testgrpc.SimpleRequest{Payload: payload})
		if err == nil && string(resp.GetPayload().GetBody()) != "12345" {
			return fmt.Errorf("reply %v", resp)
		}
		return err
	}},
	{"StreamingOutputCall", true, func(ctx context.Context, client testgrpc.TestServiceClient) error {
		stream, err := client.StreamingOutputCall(ctx, &testgrpc.StreamingOutputCallRequest{
			Payload: payload, ResponseParameters: make([]*testgrpc.ResponseParameters, 3),
		})
		if err != nil {
			return err
		}
		return drain(stream.Recv, 3)
	}},
	{"StreamingInputCall", true, func(ctx context.Context, client testgrpc.TestServiceClient) error {
		stream, err := client.StreamingInputCall(ctx)
		if err != nil {
			return err
		}
		for range 3 {
			if err := stream.Send(&testgrpc.StreamingInputCallRequest{Payload: payload}); err != nil {
				break // the response says why
			}
		}
		resp, err := stream.CloseAndRecv()
		if err == nil && resp.GetAggregatedPayloadSize() != 15 {
			return fmt.Errorf("reply %v", resp)
		}
		return err
	}},
	{"FullDuplexCall", true, func(ctx context.Context, client testgrpc.TestServiceClient) error {
		stream, err := client.FullDuplexCall(ctx)
		if err != nil {
			return err
		}
		for range 3 {
			if err := stream.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload}); err != nil {
				break
			}
		}
		_ = stream.CloseSend()
		return drain(stream.Recv, 3)
	}},
}

// drain reads a stream to its end.
func drain(recv func() (*testgrpc.StreamingOutputCallResponse, error), want int) error {
	for n := 0; ; n++ {
		_, err := recv()
		if errors.Is(err, io.EOF) {
			if n != want {
				return fmt.Errorf("%d responses want %d", n, want)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// wantCode checks how a call ended for its client.
func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("error = %v want %v", err, want)
	}
}
