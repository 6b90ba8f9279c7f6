// Package grpcguard puts flow control around gRPC: interceptors for servers and clients, unary and streams, that make
// each call a flow.
//
//	server := grpc.NewServer(
//		grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "orders")),
//		grpc.ChainStreamInterceptor(grpcguard.StreamServerInterceptor(client, "orders")))
//
// A call whose flow does not run is neither served nor sent. It fails with the flow's own error: errors.Is and
// errors.As find flowctl.ErrRejected and the rest in it. To gRPC the error is a status:
//
//   - ResourceExhausted, Unavailable, PermissionDenied and so on for a rejection, by the policy or the reason, never
//     OK. It has a RetryInfo if it is known when a retry can succeed.
//   - Unavailable if no agent answered.
//   - Internal if the flow is Invalid.
//   - Canceled or DeadlineExceeded if the call's context ended first.
//
// The status has the error's text, which names no policy and no label.
//
// Interceptors do not recover panics, and are safe for concurrent use. A nil client switches flow control off.
//
// # Labels
//
// The flow of a call has the labels rpc.service, such as shop.v1.Orders, and rpc.method, such as Get. It also has a
// label for each key that [WithMetadata] lists, if the metadata has the key. The sender of the call controls them.
// Labels that decide what a caller may do must come from [WithParams], or from labels.With in the call's context. What
// a peer sends never replaces these. The baggage of a call is put into the context of its handler, unless the
// application has already done so. It becomes labels only for clients with flowctl.WithBaggage.
//
// # Statuses
//
// A flow's status is Error if the handler or the call panicked, or failed with an error for which [IsFailure] is true.
// Params.IsFailure overrides that, see [WithParams], and flow.SetStatus overrides both.
//
// # Skipped calls
//
// Calls of the health and the reflection service are never flows, unless [WithoutDefaultSkips] says otherwise. More are
// skipped by [WithSkip] and [WithSkipMethods].
package grpcguard

import (
	"context"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/labels"
)

// A Call is what an interceptor knows of a call before it begins.
type Call struct {
	FullMethod string // /package.Service/Method
	Request    any    // the message of a unary call; nil for a stream, whose messages are still to come
}

// guard is what the interceptors have in common, with the settings of their options.
type guard struct{ adaptor.RPC[Call] }

func newGuard(client headgate.Starter, controlPoint string, opts []Option) *guard {
	g := &guard{adaptor.NewRPC[Call](client, controlPoint, IsFailure)}
	for _, o := range opts {
		if o != nil {
			o.apply(g)
		}
	}
	g.Ready(func(call Call) string { return call.FullMethod })
	return g
}

// incoming is the context of a call that a server got.
func (g *guard) incoming(ctx context.Context, fullMethod string) context.Context {
	md := make(metadata.MD, len(g.Metadata))
	for _, key := range g.Metadata {
		// Not by FromIncomingContext, which copies all that was sent.
		if values := metadata.ValueFromIncomingContext(ctx, key); len(values) > 0 {
			md[key] = values
		}
	}
	return g.Incoming(ctx, fullMethod, metadata.ValueFromIncomingContext(ctx, "baggage"), labels.FromMetadata(md, g.Metadata...))
}

// outgoing is the context of a call that a client makes.
func (g *guard) outgoing(ctx context.Context, fullMethod string) context.Context {
	var md metadata.MD
	if len(g.Metadata) > 0 {
		md, _ = metadata.FromOutgoingContext(ctx)
	}
	return g.Outgoing(ctx, fullMethod, labels.FromMetadata(md, g.Metadata...))
}

// IsFailure reports whether an error makes a flow's status Error, by default. It is true for an error that is no gRPC
// status, for the codes Unknown, DeadlineExceeded, Unimplemented, Internal, Unavailable and DataLoss, and for codes
// that gRPC does not have. It is false for all other codes, which are the caller's fault or tell the caller about a
// state, and for the errors of a canceled context.
func IsFailure(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	return adaptor.IsFailureCode(s.Code())
}
