package grpcguard_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/policy"
)

// TestAllocations gates what an interceptor allocates beyond the bare handler or call, on an engine with one keyed rate
// limiter.
func TestAllocations(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "per-tenant", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "tenant",
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}

	const method = "/shop.v1.Orders/Get"
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(":authority", "shop", "content-type", "application/grpc",
		"user-agent", "grpc-go/1.85.0", "tenant", "acme", "grpc-accept-encoding", "gzip"))
	handler := func(context.Context, any) (any, error) { return nil, nil }
	invoker := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil }
	serves := func(client *flowctl.Client, opts ...grpcguard.Option) func() {
		intercept := grpcguard.UnaryServerInterceptor(client, point, opts...)
		info := &grpc.UnaryServerInfo{FullMethod: method}
		return func() {
			if _, err := intercept(ctx, nil, info, handler); err != nil {
				t.Error(err)
			}
		}
	}
	out := grpcguard.UnaryClientInterceptor(client, point)
	calls := func() {
		if err := out(ctx, method, nil, nil, nil, invoker); err != nil {
			t.Error(err)
		}
	}
	streams := grpcguard.StreamClientInterceptor(client, point)
	desc, stream := new(grpc.StreamDesc), fakeStream{} // with one response
	streamer := func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
		return &stream, nil
	}
	streamed := func() {
		s, err := streams(ctx, desc, nil, method, streamer)
		if err == nil {
			err = s.RecvMsg(nil)
		}
		if err != nil {
			t.Error(err)
		}
	}
	fixed := flowctl.Params{Labels: map[string]string{"tenant": "acme"}}

	tests := []struct {
		name string
		call func()
		want float64
	}{
		// The flow, its context's labels and the layers of labels below it.
		{"server", serves(client), 3},
		// And a map of labels, in two parts, and a copy of what was sent.
		{"server with metadata", serves(client, grpcguard.WithMetadata("Tenant")), 6},
		{"server with params", serves(client, grpcguard.WithParams(
			func(context.Context, grpcguard.Call) flowctl.Params { return fixed })), 3},
		{"server that skips", serves(client, grpcguard.WithSkipMethods("/shop.v1.*")), 0},
		{"server without flow control", serves(nil), 2},
		{"client", calls, 3},
		// And the stream, its option with a function, and the wait for its context.
		{"client's stream", streamed, 9},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := testing.AllocsPerRun(1000, tt.call); got != tt.want {
				t.Errorf("%v allocations a call want %v", got, tt.want)
			}
		})
	}
}
