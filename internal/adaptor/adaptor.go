// Package adaptor is what all adaptors have in common: which calls become flows, how the flows start, and
// how they end. docs/contributing/adaptors.md says how to add an adaptor.
package adaptor

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
)

// A Guard says which calls become flows, and how the flows start. C is what an adaptor knows of a call. A Guard is made by
// [New] and set up before its first call. Its methods are safe for concurrent use if its functions are.
type Guard[C any] struct {
	Client headgate.Starter // never nil

	// PointOf finds the control point of a call. Where it is nil or returns "", the fixed one stays.
	PointOf func(context.Context, C) string

	// Params say how the flow of a call is started; nil stands for the zero Params.
	Params func(context.Context, C) flowctl.Params

	// IsFailure is the Params.IsFailure of flows whose Params have none; nil leaves it out.
	IsFailure func(error) bool

	controlPoint string
	skips        []func(context.Context, C) bool
}

// New makes a guard whose calls have a fixed control point. A nil client switches flow control off.
func New[C any](client headgate.Starter, controlPoint string) Guard[C] {
	if client == nil {
		client = (*flowctl.Client)(nil)
	}
	return Guard[C]{Client: client, controlPoint: controlPoint}
}

// AddSkip passes calls on without a flow for which fn returns true. A nil fn does nothing.
func (g *Guard[C]) AddSkip(fn func(context.Context, C) bool) {
	if fn != nil {
		g.skips = append(g.skips, fn)
	}
}

// Skip reports whether a call is passed on without a flow.
func (g *Guard[C]) Skip(ctx context.Context, call C) bool {
	for _, skip := range g.skips {
		if skip(ctx, call) {
			return true
		}
	}
	return false
}

// ControlPoint is where the flow of a call starts.
func (g *Guard[C]) ControlPoint(ctx context.Context, call C) string {
	if g.PointOf != nil {
		if point := g.PointOf(ctx, call); point != "" {
			return point
		}
	}
	return g.controlPoint
}

// ParamsOf are the parameters of a call's flow.
func (g *Guard[C]) ParamsOf(ctx context.Context, call C) flowctl.Params {
	var params flowctl.Params
	if g.Params != nil {
		params = g.Params(ctx, call)
	}
	if params.IsFailure == nil {
		params.IsFailure = g.IsFailure
	}
	return params
}

// WithBaggage puts the baggage of a call's headers into ctx, unless the application has already done so. Package labels
// also finds what exceeds the bounds of OpenTelemetry.
func WithBaggage(ctx context.Context, headers []string) context.Context {
	if len(headers) == 0 {
		return ctx
	}
	header := strings.Join(headers, ",")
	if len(headers) > 1 || w3cbaggage.Exceeds(header) {
		ctx = w3cbaggage.With(ctx, header)
	}
	if baggage.FromContext(ctx).Len() > 0 {
		return ctx
	}
	bag, _ := baggage.Parse(header) // which keeps the good members of a bad header
	if bag.Len() == 0 {
		return ctx
	}
	return baggage.ContextWithBaggage(ctx, bag)
}

// End ends a flow. It drops the error: the client has logged it, and it is not the call's.
func End(ctx context.Context, flow *flowctl.Flow) { _, _ = flow.End(ctx) }

// EndUnused ends an accepted flow whose call is not made after all, and gives back what the flow got.
func EndUnused(ctx context.Context, flow *flowctl.Flow) {
	if info, ok := flowinfo.From(flow.Context()); ok {
		info.EndUnused(ctx)
	}
}
