// Package httpguard puts flow control around HTTP: [Middleware] makes each request that comes in a flow, and a
// [Transport] each request that goes out.
//
//	mux.Handle("GET /orders/{id}", httpguard.Middleware(client, "orders")(orders))
//
//	payments := &http.Client{Transport: httpguard.NewTransport(client, "payments", nil)}
//
// Neither reads or keeps a body. Both are safe for concurrent use.
//
// # Labels
//
// The flow of a request has the labels of labels.FromRequest: http.method, http.target and so on, and of the headers that
// [WithHeaders] lists. Whoever sends the request decides what they are. Labels that decide what a caller is allowed come
// from [WithParams] or from labels.With in the request's context: nothing that is sent overrides these. Members of the
// baggage header are labels for clients with flowctl.WithBaggage only.
//
// # Control points
//
// A control point is the name that limits are set for. It is fixed, or [WithControlPoint] finds it in the request; the
// pattern that a router matched is a good one, and the path of a request is not, for peers make up paths. It has 1 to 255
// bytes.
package httpguard

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/labels"
)

// A StatusError is the error of a flow whose response says that the request failed. It is what Params.IsFailure gets to
// judge by: every status from 400 on, where Params have such a function, and else those that are failures by default.
type StatusError struct {
	StatusCode int
}

// Error names the status.
func (e *StatusError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("headgate: HTTP status %d %s", e.StatusCode, http.StatusText(e.StatusCode)))
}

// guard is what a Middleware and a Transport have in common, and what their options come to.
type guard struct {
	client       headgate.Starter
	controlPoint string
	pointOf      func(*http.Request) string
	params       func(*http.Request) flowctl.Params
	skips        []func(*http.Request) bool
	headers      []string
	label        func(context.Context, *http.Request) context.Context

	// isFailure says which statuses are failures by default.
	isFailure func(status int) bool

	onReject  func(http.ResponseWriter, *http.Request, *flowctl.Flow) // of a Middleware
	rateLimit bool                                                    // of a Middleware
	checkHTTP bool                                                    // of a Middleware
	maxPause  time.Duration                                           // of a Transport
}

func newGuard(client headgate.Starter, controlPoint string, isFailure func(int) bool) *guard {
	if client == nil {
		client = (*flowctl.Client)(nil)
	}
	return &guard{
		client:       client,
		controlPoint: controlPoint,
		isFailure:    isFailure,
		onReject:     refuse,
		maxPause:     defaultMaxPause,
	}
}

// ready is called after the options.
func (g *guard) ready() { g.label = labels.RequestLabeler(g.headers...) }

func (g *guard) skip(r *http.Request) bool {
	for _, skip := range g.skips {
		if skip(r) {
			return true
		}
	}
	return false
}

// at is the control point of a request.
func (g *guard) at(r *http.Request) string {
	if g.pointOf != nil {
		if point := g.pointOf(r); point != "" {
			return point
		}
	}
	return g.controlPoint
}

// start starts the flow of a request. ctx is the request's, and may know more.
func (g *guard) start(ctx context.Context, controlPoint string, r *http.Request) started {
	var params flowctl.Params
	if g.params != nil {
		params = g.params(r)
	}
	if g.checkHTTP && params.HTTP == nil {
		params.HTTP = g.describe(r)
	}
	return started{
		Flow:      g.client.Start(g.label(ctx, r), controlPoint, params),
		judged:    params.IsFailure != nil,
		isFailure: g.isFailure,
	}
}

// A started flow knows which statuses are failures.
type started struct {
	*flowctl.Flow
	judged    bool // by the Params
	isFailure func(status int) bool
}

// failure is what the flow should know of a response's status; nil where that is nothing.
func (s started) failure(status int) error {
	if s.judged && status >= http.StatusBadRequest || s.isFailure(status) {
		return &StatusError{status}
	}
	return nil
}

// end drops the error: the client has logged it, and it is none of the request's.
func end(ctx context.Context, flow *flowctl.Flow) { _, _ = flow.End(ctx) }

// endUnused ends a flow that was let in, and whose request is not sent after all.
func endUnused(ctx context.Context, flow *flowctl.Flow) {
	if info, ok := flowinfo.From(flow.Context()); ok {
		info.EndUnused(ctx)
	}
}

// withBaggage gives ctx the baggage that the request brought, unless the application has seen to that.
func withBaggage(ctx context.Context, r *http.Request) context.Context {
	sent := r.Header["Baggage"]
	if len(sent) == 0 || baggage.FromContext(ctx).Len() > 0 {
		return ctx
	}
	bag, _ := baggage.Parse(strings.Join(sent, ",")) // which keeps the good members of a bad header
	if bag.Len() == 0 {
		return ctx
	}
	return baggage.ContextWithBaggage(ctx, bag)
}
