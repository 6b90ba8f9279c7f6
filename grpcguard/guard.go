// Package grpcguard puts flow control around gRPC: interceptors for servers and clients, unary and streams, that make
// each call a flow.
//
//	server := grpc.NewServer(
//		grpc.ChainUnaryInterceptor(grpcguard.UnaryServerInterceptor(client, "orders")),
//		grpc.ChainStreamInterceptor(grpcguard.StreamServerInterceptor(client, "orders")))
//
// A call whose flow does not run is neither served nor sent. Its error is the flow's own: errors.Is and errors.As find
// flowctl.ErrRejected and the rest in it, and to gRPC it is a status. That of a rejection is ResourceExhausted,
// Unavailable, PermissionDenied and so on by the policy or the reason, never OK, with a RetryInfo where it is known when
// a retry can succeed; a flow that nobody answered is Unavailable, one that is Invalid is Internal, and one whose context
// ended first is Canceled or DeadlineExceeded. The status has the error's text, which names no policy and no label.
//
// Interceptors recover nothing, and are safe for concurrent use. A nil client is flow control switched off.
//
// # Labels
//
// The flow of a call has the labels rpc.service, such as shop.v1.Orders, and rpc.method, such as Get, and one for each
// key that [WithMetadata] lists and the metadata has. Whoever sends the call decides what they are. Labels that decide
// what a caller is allowed come from [WithParams] or from labels.With in the call's context: nothing that is sent
// overrides these. What came with a call as baggage is put into the context of its handler, unless the application has
// done so; it becomes labels for clients with flowctl.WithBaggage only.
//
// # Statuses
//
// A flow's status is Error when the handler or the call panicked, and when it failed with a code by which [IsFailure] is
// true; Params.IsFailure overrides that, see [WithParams], and flow.SetStatus both.
//
// # Skipped calls
//
// Calls of the health and the reflection service are never flows, unless [WithoutDefaultSkips] says otherwise. More are
// skipped by [WithSkip] and [WithSkipMethods].
package grpcguard

import (
	"context"
	"maps"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/labels"
)

// A Call is what an interceptor knows of a call before it begins.
type Call struct {
	FullMethod string // /package.Service/Method
	Request    any    // the message of a unary call; nil for a stream, whose messages are still to come
}

// guard is what the interceptors have in common, and what their options come to.
type guard struct {
	adaptor.Guard[Call]
	keys       []string // of metadata
	noDefaults bool
	methods    adaptor.Methods
}

func newGuard(client headgate.Starter, controlPoint string, opts []Option) *guard {
	g := &guard{Guard: adaptor.New[Call](client, controlPoint)}
	for _, o := range opts {
		if o != nil {
			o.apply(g)
		}
	}
	if !g.noDefaults {
		WithSkipMethods("/grpc.health.v1.Health/*",
			"/grpc.reflection.v1.ServerReflection/*", "/grpc.reflection.v1alpha.ServerReflection/*").apply(g)
	}
	return g
}

// incoming is the context of a call that a server got.
func (g *guard) incoming(ctx context.Context, fullMethod string) context.Context {
	md := make(metadata.MD, len(g.keys))
	for _, key := range g.keys {
		// Not by FromIncomingContext, which copies all that was sent.
		if values := metadata.ValueFromIncomingContext(ctx, key); len(values) > 0 {
			md[key] = values
		}
	}
	return labels.WithTransport(adaptor.WithBaggage(ctx, metadata.ValueFromIncomingContext(ctx, "baggage")), g.labels(fullMethod, md))
}

// outgoing is the context of a call that a client makes.
func (g *guard) outgoing(ctx context.Context, fullMethod string) context.Context {
	var md metadata.MD
	if len(g.keys) > 0 {
		md, _ = metadata.FromOutgoingContext(ctx)
	}
	return labels.WithTransport(ctx, g.labels(fullMethod, md))
}

// labels are those of a call's method and metadata.
func (g *guard) labels(fullMethod string, md metadata.MD) map[string]string {
	shared := g.methods.Labels(fullMethod)
	if len(md) == 0 {
		return shared
	}
	own := labels.FromMetadata(md, g.keys...)
	if own == nil {
		return shared
	}
	maps.Copy(own, shared) // metadata may have been given such names, but does not know better
	return own
}

// at gives the control point and the parameters of a call's flow. ctx is what it starts with.
func (g *guard) at(ctx context.Context, call Call) (controlPoint string, params flowctl.Params) {
	controlPoint, params = g.ControlPoint(ctx, call), g.ParamsOf(ctx, call)
	if params.IsFailure == nil {
		params.IsFailure = IsFailure
	}
	return controlPoint, params
}

// IsFailure is the default for what makes a flow's status Error: an error that is no gRPC status, or one with the code
// Unknown, DeadlineExceeded, Unimplemented, Internal, Unavailable or DataLoss, or a code that gRPC does not have. All
// other codes are the caller's doing, or tell it about the state of things, and so do the errors of a context that was
// canceled.
func IsFailure(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	switch s.Code() {
	case codes.OK, codes.Canceled, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.ResourceExhausted, codes.FailedPrecondition, codes.Aborted, codes.OutOfRange, codes.Unauthenticated:
		return false
	default:
		return true
	}
}
