package grpcguard

import (
	"context"
	"strings"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
)

// An Option configures an interceptor. Of several of a kind the last one counts, unless its comment says otherwise. Nil
// options do nothing.
type Option interface{ apply(*guard) }

type option func(*guard)

func (o option) apply(g *guard) { o(g) }

// WithControlPoint has fn find the control point of each call. Where it finds none, and returns "", the fixed one stays.
// Where a service has limits for each of its methods, that is the method:
//
//	grpcguard.WithControlPoint(func(_ context.Context, call grpcguard.Call) string { return call.FullMethod })
//
// By default all calls have the fixed one. fn must be safe for concurrent use; nil changes nothing. A server with a
// handler for unknown services should not do this: its peers can make up methods.
func WithControlPoint(fn func(ctx context.Context, call Call) string) Option {
	return option(func(g *guard) { g.PointOf = fn })
}

// WithParams has fn say how the flow of each call is started: by labels that say whose it is, by how long it may wait,
// by whether it runs when nobody answers. Its Labels override all that the call says of itself, and must not change
// until the flow has ended; a value of the call among them that is too long, or no UTF-8, makes the flow Invalid, so
// have it repaired by labels.Repair. Its IsFailure overrides [IsFailure], where it is set; it gets the error of the
// handler or of the call, and never io.EOF.
//
// ctx has the labels of the call and, on a server, its metadata. By default flows have the zero Params. fn must be safe
// for concurrent use; nil means the default.
func WithParams(fn func(ctx context.Context, call Call) flowctl.Params) Option {
	return option(func(g *guard) { g.Params = fn })
}

// WithMetadata makes metadata with these keys labels, as labels.FromMetadata does: what a server was sent, or what a
// client is about to send. By default none is. Repeated use adds more.
func WithMetadata(keys ...string) Option {
	lower := make([]string, len(keys))
	for i, key := range keys {
		lower[i] = strings.ToLower(key)
	}
	return option(func(g *guard) { g.keys = append(g.keys, lower...) })
}

// WithSkip passes calls on without a flow, for which fn says so. It goes together with [WithSkipMethods] and what is
// skipped by default: one that says so is enough. Repeated use adds more. fn must be safe for concurrent use; nil skips
// nothing.
func WithSkip(fn func(ctx context.Context, call Call) bool) Option {
	return option(func(g *guard) { g.AddSkip(fn) })
}

// WithSkipMethods is [WithSkip] for calls whose full method is one of these, or, for one that ends in "*", begins with
// what is before that: "/shop.v1.Orders/Get", "/shop.v1.Orders/*". The first "/" may be left out. What a "*" stands for is
// never more than names: a call of "/shop.v1.Orders/../Payments/Get", which a proxy's peer can make up, is not skipped.
func WithSkipMethods(methods ...string) Option {
	listed := adaptor.MatchMethods(methods...)
	return WithSkip(func(_ context.Context, call Call) bool { return listed(call.FullMethod) })
}

// WithoutDefaultSkips makes calls of the health and the reflection service flows like all others.
func WithoutDefaultSkips() Option {
	return option(func(g *guard) { g.noDefaults = true })
}
