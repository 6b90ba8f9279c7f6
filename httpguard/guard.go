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

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
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
	adaptor.Guard[*http.Request]
	headers []string
	label   func(context.Context, *http.Request) context.Context

	// isFailure says which statuses are failures by default.
	isFailure func(status int) bool

	onReject  func(http.ResponseWriter, *http.Request, *flowctl.Flow) // of a Middleware
	rateLimit bool                                                    // of a Middleware
	checkHTTP bool                                                    // of a Middleware
	maxPause  time.Duration                                           // of a Transport
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

// start starts the flow of a request. ctx is the request's, and may know more.
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
