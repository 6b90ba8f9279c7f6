package grpcguard_test

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/internal/testing/adaptortest"
)

func TestPeers(t *testing.T) {
	incoming := func(ctx context.Context, baggage []string) context.Context {
		return metadata.NewIncomingContext(ctx, metadata.MD{"baggage": baggage, "x-tenant": {"acme"}})
	}
	check := func(handled bool, err error) bool {
		if want := map[bool]codes.Code{true: codes.OK, false: codes.ResourceExhausted}[handled]; status.Code(err) != want {
			t.Errorf("error %v want %v", err, want)
		}
		return handled
	}
	const method, label = "/shop.v1.Orders/Get", "x-tenant"
	t.Run("unary", adaptortest.Server{Tenant: label, Serve: func(ctx context.Context, client *flowctl.Client, baggage []string) (handled bool) {
		intercept := grpcguard.UnaryServerInterceptor(client, adaptortest.ControlPoint, grpcguard.WithMetadata("X-Tenant"))
		_, err := intercept(incoming(ctx, baggage), nil, &grpc.UnaryServerInfo{FullMethod: method},
			func(context.Context, any) (any, error) { handled = true; return nil, nil })
		return check(handled, err)
	}}.Test)
	t.Run("stream", adaptortest.Server{Tenant: label, Serve: func(ctx context.Context, client *flowctl.Client, baggage []string) (handled bool) {
		intercept := grpcguard.StreamServerInterceptor(client, adaptortest.ControlPoint, grpcguard.WithMetadata("X-Tenant"))
		err := intercept(nil, contextStream{ctx: incoming(ctx, baggage)}, &grpc.StreamServerInfo{FullMethod: method},
			func(any, grpc.ServerStream) error { handled = true; return nil })
		return check(handled, err)
	}}.Test)
}

// contextStream is a stream of which only the context matters.
type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s contextStream) Context() context.Context { return s.ctx }
