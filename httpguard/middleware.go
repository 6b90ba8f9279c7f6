package httpguard

import (
	"net/http"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
)

// Middleware returns a function that wraps handlers so that each request is a flow. It fits net/http, chi and gorilla
// as it is, and other routers by an adaptor; docs/http.md shows how. A nil client switches flow control off.
//
// If the flow runs, the handler gets the request with the flow in its context, for flowctl.FromContext. The flow ends
// when the handler returns or panics. A stream ends then too. A hijacked connection that outlives the handler has no
// flow. The middleware does not touch the bodies of the request and the response.
//
// A flow's status is Error after a panic, http.ErrAbortHandler included, after a failed hijack, and if the response's
// status is 500 or more. Params.IsFailure can decide otherwise, see [WithParams], and the handler can call
// flow.SetStatus. A client that disconnects is no failure, nor is a status that the handler sets after that. Panics are
// not recovered.
//
// If the flow does not run, [WithOnReject] answers the request. By default the status is
//
//   - the policy's, or 429, 503 or 403 by the reason, if the flow is rejected,
//   - 503 if no agent answered and the flow fails closed,
//   - 500 if the flow is Invalid, because the control point or the labels of the Params are invalid,
//   - 503 if a deadline of the service's own passed before the agent answered,
//   - 408 if the client disconnected before the agent answered; no client reads it.
//
// When the handler has returned, the caller's request gets what the handler's request has: parsed forms, and the
// pattern and path values that a mux found, for middleware that logs them. It keeps its context.
//
// The handler's ResponseWriter supports what the one below it supports. Type assertions find http.Flusher,
// http.Hijacker and http.Pusher if the one below has them, and an http.ResponseController finds the rest.
// io.ReaderFrom, io.StringWriter and http.CloseNotifier are always found. The first two write as the ResponseWriter
// below does, so that the kernel can still send files.
func Middleware(client headgate.Starter, controlPoint string, opts ...MiddlewareOption) func(http.Handler) http.Handler {
	g := newGuard(client, controlPoint, func(status int) bool { return status >= http.StatusInternalServerError })
	for _, o := range opts {
		if o != nil {
			o.applyToMiddleware(g)
		}
	}
	g.ready()
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if g.Skip(r.Context(), r) {
				next.ServeHTTP(w, r)
				return
			}
			g.serve(w, r, next)
		})
	}
}

// serve answers a request with a flow.
func (g *guard) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	flow := g.start(adaptor.WithBaggage(r.Context(), r.Header["Baggage"]), g.ControlPoint(r.Context(), r), r)
	// The response and the request are one object, which saves an allocation.
	resp := &response{ResponseWriter: w, flow: flow, ctx: requestContext{flow.Context()}}
	resp.request = *r.WithContext(&resp.ctx)
	returned := false
	defer func() {
		if !returned {
			flow.SetStatus(flowctl.StatusError)
		}
		resp.handBack(r)
		adaptor.End(r.Context(), flow.Flow)
	}()
	if g.rateLimit {
		setRateLimit(w.Header(), flow.Flow)
	}
	if flow.ShouldRun() {
		if g.checkHTTP {
			resp.obey()
		}
		next.ServeHTTP(resp.visible(), &resp.request)
		g.costs.settleWritten(flow.Flow, w.Header())
		if !resp.failed {
			flow.SetError(nil)
		}
	} else {
		adaptor.End(r.Context(), flow.Flow)
		g.reject(resp)
	}
	returned = true
}

// reject answers a request whose flow did not run.
func (g *guard) reject(w *response) {
	if answer, ok := w.flow.HTTPAnswer(); ok && w.flow.Decision() == flowctl.Rejected {
		setHeaders(w.Header(), answer.Header)
	}
	setRetryAfter(w.Header(), w.flow.RetryAfter())
	g.onReject(w.visible(), &w.request, w.flow.Flow)
	if !w.decided { // without an answer the status would be 200
		w.WriteHeader(w.flow.HTTPStatus())
	}
}
