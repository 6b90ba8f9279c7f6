package grpcguard

import (
	"context"
	"errors"
	"io"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
)

// UnaryClientInterceptor returns an interceptor that makes each unary call of a client a flow at the control point. The
// flow begins before anything is sent, and ends when the reply is there. What is sent does not change. If an
// interceptor that retries comes before this one, each attempt is a flow. If it comes after, all attempts are one flow.
func UnaryClientInterceptor(client headgate.Starter, controlPoint string, opts ...Option) grpc.UnaryClientInterceptor {
	g := newGuard(client, controlPoint, opts)
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		call := Call{method, req}
		if g.Skip(ctx, call) {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		ctx = g.outgoing(ctx, method)
		return headgate.Do(ctx, g.Client, g.ControlPoint(ctx, call), g.ParamsOf(ctx, call), func(ctx context.Context, _ *flowctl.Flow) error {
			return invoker(ctx, method, req, reply, cc, opts...)
		})
	}
}

// StreamClientInterceptor returns an interceptor that makes each stream of a client one flow at the control point. The
// flow begins before anything is sent, and ends with the stream: when RecvMsg returns io.EOF, another error or the only
// response, when SendMsg or Header fails for good, when the stream's context ends, or when the connection is closed.
// gRPC requires one of these too. Otherwise the stream leaks, and the flow with it.
func StreamClientInterceptor(client headgate.Starter, controlPoint string, opts ...Option) grpc.StreamClientInterceptor {
	g := newGuard(client, controlPoint, opts)
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		call := Call{FullMethod: method}
		if g.Skip(ctx, call) {
			return streamer(ctx, desc, cc, method, opts...)
		}
		ctx = g.outgoing(ctx, method)
		flow := g.Client.Start(ctx, g.ControlPoint(ctx, call), g.ParamsOf(ctx, call))
		if !flow.ShouldRun() {
			adaptor.End(ctx, flow)
			return nil, flow.Err()
		}
		s := &clientStream{flow: adaptor.NewEnder(flow.Context(), flow), single: !desc.ServerStreams}
		s.flow.EndAfter(ctx, func(err error) error { return status.FromContextError(err).Err() })
		streamed := false
		defer func() {
			if !streamed {
				s.flow.Fail()
			}
		}()
		// If nothing reads, only OnFinish reports that the connection was closed. In other cases it does not mean that
		// the stream has ended: an interceptor after this one may be about to try again.
		opts = append(slices.Clip(opts), grpc.OnFinish(func(err error) {
			if cc.GetState() == connectivity.Shutdown {
				s.flow.EndStream(err)
			}
		}))
		var err error
		s.ClientStream, err = streamer(flow.Context(), desc, cc, method, opts...)
		streamed = true
		if err != nil {
			s.flow.EndStream(err)
			return nil, err
		}
		return s, nil
	}
}

// clientStream ends its flow when it has ended itself.
type clientStream struct {
	grpc.ClientStream
	flow   adaptor.Ender
	single bool // has one response
}

func (s *clientStream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	s.failed(err)
	return md, err
}

func (s *clientStream) SendMsg(m any) error {
	err := s.ClientStream.SendMsg(m)
	s.failed(err)
	return err
}

// failed ends the flow, except on io.EOF: RecvMsg then returns how the stream ended.
func (s *clientStream) failed(err error) {
	if err != nil && !errors.Is(err, io.EOF) {
		s.flow.EndStream(err)
	}
}

func (s *clientStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil || s.single {
		s.flow.EndStream(err)
	}
	return err
}
