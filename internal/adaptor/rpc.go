package adaptor

import (
	"context"
	"maps"

	"google.golang.org/grpc/codes"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/labels"
)

// An RPC is a [Guard] of remote procedures. The flow of a call has the labels of its procedure, see [Methods], and those
// of its metadata. By default, calls of the health and the reflection service are skipped. An RPC is made by [NewRPC] and
// set up before its first call; [RPC.Ready] ends that. C is what an adaptor knows of a call.
type RPC[C any] struct {
	Guard[C]

	// Metadata are the names of the metadata that becomes labels. The adaptor looks it up.
	Metadata []string

	// NoDefaultSkips makes calls of the health and the reflection service flows like all others.
	NoDefaultSkips bool

	methods Methods
}

// NewRPC makes an RPC whose calls have a fixed control point. A nil client switches flow control off. The function
// isFailure is [Guard.IsFailure].
func NewRPC[C any](client headgate.Starter, controlPoint string, isFailure func(error) bool) RPC[C] {
	guard := New[C](client, controlPoint)
	guard.IsFailure = isFailure
	return RPC[C]{Guard: guard}
}

// Ready is called after the adaptor's options. The function fullMethod returns the procedure of a call, as
// /package.Service/Method.
func (g *RPC[C]) Ready(fullMethod func(C) string) {
	if g.NoDefaultSkips {
		return
	}
	skipped := MatchMethods("/grpc.health.v1.Health/*",
		"/grpc.reflection.v1.ServerReflection/*", "/grpc.reflection.v1alpha.ServerReflection/*")
	g.AddSkip(func(_ context.Context, call C) bool { return skipped(fullMethod(call)) })
}

// Incoming returns the context of a call that a server received, with the call's labels and baggage. The values of the
// baggage header are in baggage. The labels of the listed metadata are in sent, which Incoming may change and keep.
func (g *RPC[C]) Incoming(ctx context.Context, fullMethod string, baggage []string, sent map[string]string) context.Context {
	return g.Outgoing(WithBaggage(ctx, baggage), fullMethod, sent)
}

// Outgoing returns the context of a call that a client makes, with the call's labels. The labels of the listed metadata
// are in sent, which Outgoing may change and keep.
func (g *RPC[C]) Outgoing(ctx context.Context, fullMethod string, sent map[string]string) context.Context {
	shared := g.methods.Labels(fullMethod)
	if len(sent) == 0 {
		return labels.WithTransport(ctx, shared)
	}
	maps.Copy(sent, shared) // metadata with these names must not replace them
	return labels.WithTransport(ctx, sent)
}

// IsFailureCode reports whether the code of a call's error makes the flow's status Error, by default. It is false for
// the codes that are the caller's fault or tell the caller about a state. It is true for all others, and for codes that
// gRPC does not have. Connect has the same codes.
func IsFailureCode(code codes.Code) bool {
	switch code {
	case codes.OK, codes.Canceled, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.ResourceExhausted, codes.FailedPrecondition, codes.Aborted, codes.OutOfRange, codes.Unauthenticated:
		return false
	default:
		return true
	}
}
