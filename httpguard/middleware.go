package httpguard

import (
	"net/http"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
)

// Middleware returns a function that wraps handlers so that each request is a flow. It fits net/http, chi and gorilla as
// it is, and other routers by an adaptor; docs/http.md shows how. A nil client is flow control switched off.
//
// A request whose flow runs goes to the handler, with the flow in its context: flowctl.FromContext finds it. The flow
// ends when the handler returns or panics, which is also the end of a stream, and of a connection that the handler
// hijacked: whoever keeps that one beyond the handler does so without a flow. The body of the request is the handler's
// alone, and so is the body of the response.
//
// A flow's status is Error after a panic, http.ErrAbortHandler included, after a failed hijack, and when the response's
// status is 500 or more; Params.IsFailure may judge otherwise, see [WithParams], and the handler may call
// flow.SetStatus. A client that leaves is no failure, nor is a status that the handler gives after the client has left.
// Nothing is recovered.
//
// A request whose flow does not run is answered by [WithOnReject]: by default with the status of the policy or of the
// reason, 429, 503 or 403; with 503 when nobody answered and the flow fails closed; with 500 when the flow is Invalid,
// which means that the control point or the labels of the Params cannot be. If the request's context ends before the agent
// answers, the status is 503 when a deadline of the service's own has passed, and 408 when the client has left, which does not
// read it.
//
// When the handler has returned, the caller's request has what the handler's has: the pattern and the path values that a mux
// found, for middleware that logs them, and parsed forms. It keeps its context.
//
// The ResponseWriter that the handler gets supports what the one below it does. Type assertions find an http.Flusher,
// http.Hijacker and http.Pusher where there is one, and an http.ResponseController finds all else. An io.ReaderFrom, an
// io.StringWriter and an http.CloseNotifier are found always; the first two write as the ResponseWriter below does, so
// that files are sent by the kernel where they can be.
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
	resp := &response{ResponseWriter: w, flow: flow, request: *r.WithContext(flow.Context())}
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
		flow.SetError(resp.err)
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
	if !w.decided { // an answer that is none would read as 200
		w.WriteHeader(w.flow.HTTPStatus())
	}
}
