// Package httpguard puts flow control around HTTP. [Middleware] makes each request that comes in a flow, and a
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
// The flow of a request has the labels of labels.FromRequest: http.method, http.target and so on, and the headers that
// [WithHeaders] lists. The sender of the request controls them. Labels that decide what a caller may do must come from
// [WithParams], or from labels.With in the request's context. What a peer sends never replaces these. Members of the
// baggage header become labels only for clients with flowctl.WithBaggage.
//
// # Control points
//
// A control point is the name that limits are set for. It is fixed, or [WithControlPoint] finds it in the request. The
// pattern that a router matched is a good control point. The path is not, because peers can make up paths. A control
// point has 1 to 255 bytes.
package httpguard

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/labels"
)

// A StatusError is the error of a flow whose response says that the request failed. If Params.IsFailure is set, it gets
// a StatusError for every status from 400 on. Otherwise only statuses that are failures by default have one.
type StatusError struct {
	StatusCode int
}

// Error names the status. It may be called on a nil pointer.
func (e *StatusError) Error() string {
	if e == nil {
		return "<nil>"
	}
	return strings.TrimSpace(fmt.Sprintf("headgate: HTTP status %d %s", e.StatusCode, http.StatusText(e.StatusCode)))
}

// guard is what a Middleware and a Transport have in common, with the settings of their options.
type guard struct {
	adaptor.Guard[*http.Request]
	headers []string
	costs   costHeaders
	label   func(context.Context, *http.Request) context.Context

	// isFailure reports whether a status is a failure by default.
	isFailure func(status int) bool

	onReject  func(http.ResponseWriter, *http.Request, *flowctl.Flow) // of a Middleware
	rateLimit bool                                                    // of a Middleware
	checkHTTP bool                                                    // of a Middleware

	// These are a Transport's.
	maxPause    time.Duration
	maxWait     time.Duration // negative: until the request's deadline
	retries     bool
	retryPolicy headgate.RetryPolicy
}

func newGuard(client headgate.Starter, controlPoint string, isFailure func(int) bool) *guard {
	return &guard{
		Guard:     adaptor.New[*http.Request](client, controlPoint),
		isFailure: isFailure,
		onReject:  refuse,
		maxPause:  defaultMaxPause,
	}
}

// ready is called after the options.
func (g *guard) ready() { g.label = labels.RequestLabeler(g.headers...) }

// start starts the flow of a request. ctx is the request's context, or derives from it.
func (g *guard) start(ctx context.Context, controlPoint string, r *http.Request) started {
	params := g.ParamsOf(ctx, r)
	if g.checkHTTP && params.HTTP == nil {
		params.HTTP = g.describe(r)
	}
	return started{
		Flow:      g.Client.Start(g.label(ctx, r), controlPoint, params),
		judged:    params.IsFailure != nil,
		isFailure: g.isFailure,
	}
}

// A started flow knows which statuses are failures.
type started struct {
	*flowctl.Flow
	judged    bool // by Params.IsFailure
	isFailure func(status int) bool
}

// failure returns the error of a flow whose response has the status; nil for none.
func (s started) failure(status int) error {
	if s.judged && status >= http.StatusBadRequest || s.isFailure(status) {
		return &StatusError{status}
	}
	return nil
}
