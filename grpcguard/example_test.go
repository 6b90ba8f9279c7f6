package grpcguard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// newClient is for the examples: a client of an engine with one limiter, and a function that closes the engine. A
// program makes both once, when it starts.
func newClient(limiter policy.Component) (client *flowctl.Client, done func()) {
	limits, err := engine.New([]policy.Policy{{Name: "example", Components: []policy.Component{limiter}}})
	if err != nil {
		panic(err)
	}
	client, err = flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	return client, func() { _ = limits.Close() }
}

// dial serves in memory, and connects to that.
func dial(server *grpc.Server, opts ...grpc.DialOption) (conn *grpc.ClientConn, done func()) {
	testgrpc.RegisterTestServiceServer(server, new(service))
	listener := bufconn.Listen(1 << 20)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	conn, err := grpc.NewClient("passthrough:///localhost", opts...)
	if err != nil {
		panic(err)
	}
	return conn, func() {
		_ = conn.Close()
		server.GracefulStop()
		<-served
	}
}

// call makes a unary call.
func call(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := testgrpc.NewTestServiceClient(conn).UnaryCall(ctx, new(testgrpc.SimpleRequest))
	return err
}

// A server whose calls are all flows at one control point. Health checks are not.
func ExampleUnaryServerInterceptor() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute,
	})
	defer done()

	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "orders")),
		grpc.ChainStreamInterceptor(grpcguard.StreamServerInterceptor(client, "orders")))

	conn, stop := dial(server)
	defer stop()
	ctx := context.Background()
	fmt.Println(call(ctx, conn))

	err := call(ctx, conn)
	fmt.Println(status.Code(err))
	for _, detail := range status.Convert(err).Details() {
		if retry, ok := detail.(*errdetails.RetryInfo); ok {
			fmt.Println("retry after", retry.GetRetryDelay().AsDuration().Round(time.Second))
		}
	}
	// Output:
	// <nil>
	// ResourceExhausted
	// retry after 1m0s
}

// One stream at a time: a stream holds its slot for as long as it lives.
func ExampleStreamServerInterceptor() {
	client, done := newClient(policy.ConcurrencyLimiter{
		Selectors: policy.At("watch"), Max: 1, MaxInflight: time.Hour,
	})
	defer done()

	server := grpc.NewServer(
		grpc.ChainStreamInterceptor(grpcguard.StreamServerInterceptor(client, "watch")))

	conn, stop := dial(server)
	defer stop()
	watch := func() (grpc.ClientStream, error) {
		stream, err := testgrpc.NewTestServiceClient(conn).FullDuplexCall(context.Background())
		if err != nil {
			return nil, err
		}
		if err := stream.Send(new(testgrpc.StreamingOutputCallRequest)); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		_, err = stream.Recv()
		return stream, err
	}
	first, err := watch()
	fmt.Println("first:", err)
	_, err = watch()
	fmt.Println("second:", status.Code(err))

	_ = first.CloseSend()
	_ = first.RecvMsg(new(testgrpc.StreamingOutputCallResponse)) // to its end
	_, err = watch()
	fmt.Println("third:", err)
	// Output:
	// first: <nil>
	// second: ResourceExhausted
	// third: <nil>
}

// The quota of a third party's API: calls beyond it are not sent.
func ExampleUnaryClientInterceptor() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("geocoder"), Capacity: 1, Fill: 1, Interval: time.Hour,
	})
	defer done()

	quota := []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(grpcguard.UnaryClientInterceptor(client, "geocoder")),
		grpc.WithChainStreamInterceptor(grpcguard.StreamClientInterceptor(client, "geocoder")),
	}

	conn, stop := dial(grpc.NewServer(), quota...)
	defer stop()
	ctx := context.Background()
	fmt.Println(call(ctx, conn))

	err := call(ctx, conn)
	if errors.Is(err, flowctl.ErrRejected) {
		fmt.Println("not sent:", status.Code(err))
	}
	// Output:
	// <nil>
	// not sent: ResourceExhausted
}

type userKey struct{}

// A limit for each user of each method. The interceptor that authenticates comes first, and says who the user is.
func ExampleWithParams() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "user_id",
	})
	defer done()

	authenticate := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		token := metadata.ValueFromIncomingContext(ctx, "authorization")
		if len(token) != 1 {
			return nil, status.Error(codes.Unauthenticated, "who are you?")
		}
		return handler(context.WithValue(ctx, userKey{}, "user of "+token[0]), req)
	}

	byUser := grpcguard.WithParams(func(ctx context.Context, call grpcguard.Call) flowctl.Params {
		user, _ := ctx.Value(userKey{}).(string)
		return flowctl.Params{
			Labels:        map[string]string{"user_id": user},
			OnUnreachable: flowctl.FailClosed,
		}
	})
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(authenticate, grpcguard.UnaryServerInterceptor(client, "orders", byUser)))

	conn, stop := dial(server)
	defer stop()
	for _, token := range []string{"a", "a", "b"} {
		ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", token)
		fmt.Println(token, status.Code(call(ctx, conn)))
	}
	// Output:
	// a OK
	// a ResourceExhausted
	// b OK
}

// An interceptor before the guard can also label all that happens within the call.
func ExampleWithParams_context() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "user_id",
	})
	defer done()

	label := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		return handler(labels.With(ctx, "user_id", "42"), req)
	}
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(label, grpcguard.UnaryServerInterceptor(client, "orders")))

	conn, stop := dial(server)
	defer stop()
	for range 2 {
		fmt.Println(status.Code(call(context.Background(), conn)))
	}
	// Output:
	// OK
	// ResourceExhausted
}

// A function can change what makes a flow's status Error, on top of the default or instead of it.
func ExampleIsFailure() {
	params := flowctl.Params{
		IsFailure: func(err error) bool {
			return grpcguard.IsFailure(err) || status.Code(err) == codes.ResourceExhausted
		},
	}
	for _, code := range []codes.Code{codes.NotFound, codes.Internal, codes.ResourceExhausted} {
		err := status.Error(code, "")
		fmt.Println(code, grpcguard.IsFailure(err), params.IsFailure(err))
	}
	// Output:
	// NotFound false false
	// Internal true true
	// ResourceExhausted false true
}

// Limits for single methods.
func ExampleWithControlPoint() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("/grpc.testing.TestService/UnaryCall"), Interval: time.Minute, // no capacity
	})
	defer done()

	byMethod := grpcguard.WithControlPoint(func(_ context.Context, call grpcguard.Call) string { return call.FullMethod })
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "other", byMethod)))

	conn, stop := dial(server)
	defer stop()
	fmt.Println(status.Convert(call(context.Background(), conn)).Message())
	// Output:
	// headgate: start "/grpc.testing.TestService/UnaryCall": rejected: rate limited
}

// A label from metadata that the client sends. It can separate tenants that you trust, but must not decide what they
// may do.
func ExampleWithMetadata() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "x-tenant",
	})
	defer done()

	server := grpc.NewServer(grpc.ChainUnaryInterceptor(
		grpcguard.UnaryServerInterceptor(client, "orders", grpcguard.WithMetadata("x-tenant"))))

	conn, stop := dial(server)
	defer stop()
	for _, tenant := range []string{"acme", "acme", "other"} {
		ctx := metadata.AppendToOutgoingContext(context.Background(), "x-tenant", tenant)
		fmt.Println(tenant, status.Code(call(ctx, conn)))
	}
	// Output:
	// acme OK
	// acme ResourceExhausted
	// other OK
}

func ExampleWithSkipMethods() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("orders"), Interval: time.Minute}) // no capacity
	defer done()

	server := grpc.NewServer(grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "orders",
		grpcguard.WithSkipMethods("/grpc.testing.TestService/UnaryCall", "/grpc.channelz.v1.Channelz/*"))))

	conn, stop := dial(server)
	defer stop()
	fmt.Println(call(context.Background(), conn))
	// Output:
	// <nil>
}
