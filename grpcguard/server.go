package grpcguard

import (
	"context"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
)

// UnaryServerInterceptor returns an interceptor that makes each unary call that a server gets a flow at the control
// point. The handler gets the flow's context. Its reply and error are returned unchanged. The flow ends when the
// handler returns or panics.
func UnaryServerInterceptor(client headgate.Starter, controlPoint string, opts ...Option) grpc.UnaryServerInterceptor {
	g := newGuard(client, controlPoint, opts)
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		call := Call{info.FullMethod, req}
		if g.Skip(ctx, call) {
			return handler(ctx, req)
		}
		ctx = g.incoming(ctx, call.FullMethod)
		err = headgate.Do(ctx, g.Client, g.ControlPoint(ctx, call), g.ParamsOf(ctx, call), func(ctx context.Context, _ *flowctl.Flow) (err error) {
			resp, err = handler(ctx, req)
			return err
		})
		return resp, err
	}
}

// StreamServerInterceptor returns an interceptor that makes each stream that a server gets one flow at the control
// point, for its whole life: from before the handler is called until it has returned or panicked. The stream's context
// has the flow.
func StreamServerInterceptor(client headgate.Starter, controlPoint string, opts ...Option) grpc.StreamServerInterceptor {
	g := newGuard(client, controlPoint, opts)
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		call := Call{FullMethod: info.FullMethod}
		ctx := stream.Context()
		if g.Skip(ctx, call) {
			return handler(srv, stream)
		}
		ctx = g.incoming(ctx, call.FullMethod)
		return headgate.Do(ctx, g.Client, g.ControlPoint(ctx, call), g.ParamsOf(ctx, call), func(ctx context.Context, _ *flowctl.Flow) error {
			return handler(srv, &serverStream{stream, ctx})
		})
	}
}

// serverStream is a stream with the context of its flow.
type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *serverStream) Context() context.Context { return s.ctx }
