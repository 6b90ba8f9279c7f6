package grpcguard

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
)

// UnaryClientInterceptor returns an interceptor that makes each unary call of a client a flow at the control point:
// before anything is sent, until the reply is there. What is sent is left as it is. Interceptors that retry go before
// this one to make each attempt a flow, and after it to count all attempts as one.
func UnaryClientInterceptor(client headgate.Starter, controlPoint string, opts ...Option) grpc.UnaryClientInterceptor {
	g := newGuard(client, controlPoint, opts)
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		call := Call{method, req}
		if g.Skip(ctx, call) {
			return invoker(ctx, method, req, reply, cc, opts...)
		}
		ctx = g.outgoing(ctx, method)
		point, params := g.at(ctx, call)
		return headgate.Do(ctx, g.Client, point, params, func(ctx context.Context, _ *flowctl.Flow) error {
			return invoker(ctx, method, req, reply, cc, opts...)
		})
	}
}

// StreamClientInterceptor returns an interceptor that makes each stream of a client one flow at the control point, from
// before anything is sent until the stream has ended: when RecvMsg gave io.EOF, another error or the only response, when
// SendMsg or Header failed for good, when the stream's context has ended, or when the connection was closed. As gRPC
// says, one of these must happen, or else the stream leaks, and the flow with it.
func StreamClientInterceptor(client headgate.Starter, controlPoint string, opts ...Option) grpc.StreamClientInterceptor {
	g := newGuard(client, controlPoint, opts)
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		call := Call{FullMethod: method}
		if g.Skip(ctx, call) {
			return streamer(ctx, desc, cc, method, opts...)
		}
		ctx = g.outgoing(ctx, method)
		point, params := g.at(ctx, call)
		flow := g.Client.Start(ctx, point, params)
		if !flow.ShouldRun() {
			_, _ = flow.End(ctx)
			return nil, flow.Err()
		}
		s := &clientStream{flow: flow, single: !desc.ServerStreams}
		s.forget = context.AfterFunc(ctx, func() { s.finish(status.FromContextError(ctx.Err()).Err()) })
		streamed := false
		defer func() {
			if !streamed {
				flow.SetStatus(flowctl.StatusError)
				s.end(nil)
			}
		}()
		// Nothing else tells that the connection was closed, unless somebody reads. That gRPC has finished with the
		// stream does not mean that in general: an interceptor after this one may be about to try again.
		opts = append(slices.Clip(opts), grpc.OnFinish(func(err error) {
			if cc.GetState() == connectivity.Shutdown {
				s.end(err)
			}
		}))
		var err error
		s.ClientStream, err = streamer(flow.Context(), desc, cc, method, opts...)
		streamed = true
		if err != nil {
			s.end(err)
			return nil, err
		}
		return s, nil
	}
}

// clientStream ends its flow when it has ended itself.
type clientStream struct {
	grpc.ClientStream
	flow   *flowctl.Flow
	single bool        // has one response
	forget func() bool // stops to wait for the context
	ended  atomic.Bool
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

// failed ends the flow unless RecvMsg has still to tell how the stream ended.
func (s *clientStream) failed(err error) {
	if err != nil && !errors.Is(err, io.EOF) {
		s.end(err)
	}
}

func (s *clientStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil || s.single {
		s.end(err)
	}
	return err
}

// end ends the flow, once, whoever is first to know.
func (s *clientStream) end(err error) {
	s.forget()
	s.finish(err)
}

func (s *clientStream) finish(err error) {
	if s.ended.Swap(true) {
		return
	}
	defer func() { _, _ = s.flow.End(s.flow.Context()) }() // also when IsFailure panics
	if errors.Is(err, io.EOF) {
		err = nil
	}
	s.flow.SetError(err)
}
