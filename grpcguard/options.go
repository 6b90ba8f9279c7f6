package grpcguard

import (
	"context"
	"strings"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
)

// An Option configures an interceptor. If an option is repeated, the last one counts, unless its comment says
// otherwise. Nil options do nothing.
type Option interface{ apply(*guard) }

type option func(*guard)

func (o option) apply(g *guard) { o(g) }

// WithControlPoint makes fn find the control point of each call. If fn returns "", the call has the fixed one. To limit
// single methods, return the method:
//
//	grpcguard.WithControlPoint(func(_ context.Context, call grpcguard.Call) string { return call.FullMethod })
//
// By default all calls have the fixed one. fn must be safe for concurrent use; nil means the default. If a server has a
// handler for unknown services, do not do this, because its peers can make up methods.
func WithControlPoint(fn func(ctx context.Context, call Call) string) Option {
	return option(func(g *guard) { g.PointOf = fn })
}

// WithParams makes fn return the Params of each call's flow: labels that say whose it is, how long it may wait, and
// whether it runs if no agent answers. Its Labels override all labels of the call, and must not change until the flow
// has ended. A label value that is too long or not UTF-8 makes the flow Invalid, so repair values of the call by
// labels.Repair. If IsFailure is set, it overrides [IsFailure]. It gets the error of the handler or of the call, and
// never io.EOF.
//
// ctx has the labels of the call and, on a server, its metadata. By default flows have the zero Params. fn must be safe
// for concurrent use; nil means the default.
func WithParams(fn func(ctx context.Context, call Call) flowctl.Params) Option {
	return option(func(g *guard) { g.Params = fn })
}

// WithMetadata makes metadata with these keys labels, as labels.FromMetadata does: what a server was sent, or what a
// client is about to send. By default none is. Repeated use adds more. Keys that end in -bin, or that carry credentials,
// never become labels.
func WithMetadata(keys ...string) Option {
	lower := make([]string, len(keys))
	for i, key := range keys {
		lower[i] = strings.ToLower(key)
	}
	return option(func(g *guard) { g.Metadata = append(g.Metadata, lower...) })
}

// WithSkip passes calls on without a flow if fn returns true. It adds to [WithSkipMethods] and to what is skipped by
// default: one match is enough. Repeated use adds more. fn must be safe for concurrent use; nil skips nothing.
func WithSkip(fn func(ctx context.Context, call Call) bool) Option {
	return option(func(g *guard) { g.AddSkip(fn) })
}

// WithSkipMethods is [WithSkip] for calls of these full methods, such as "/shop.v1.Orders/Get". A name that ends in "*"
// stands for all methods that begin with what is before it: "/shop.v1.Orders/*". The first "/" may be left out. The "*"
// matches only names: a proxy's peer can make up a call of "/shop.v1.Orders/../Payments/Get", which is not skipped.
func WithSkipMethods(methods ...string) Option {
	listed := adaptor.MatchMethods(methods...)
	return WithSkip(func(_ context.Context, call Call) bool { return listed(call.FullMethod) })
}

// WithoutDefaultSkips makes calls of the health and the reflection service flows like all others.
func WithoutDefaultSkips() Option {
	return option(func(g *guard) { g.NoDefaultSkips = true })
}
