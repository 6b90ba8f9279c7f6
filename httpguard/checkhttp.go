package httpguard

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/labels"
)

// WithCheckHTTP has a remote agent asked by CheckHTTP instead of Check, for agents whose policies classify requests: it
// gets the request's method, path, host, scheme, protocol, size and addresses, and the headers of [WithHeaders]. What it
// answers is done: the headers that it adds to an accepted request are set in the one that the handler gets, and a
// rejected request is answered with its status, headers and body. Its body gives way to [WithOnReject].
// In a client's dry run nothing of that is done.
//
// A result cache or global cache cannot be looked up this way: the flow of Params with a cache key is Invalid. An
// embedded engine, which makes the same labels of a request by itself, is asked as always.
func WithCheckHTTP() MiddlewareOption {
	return middlewareOption(func(g *guard) { g.checkHTTP = true })
}

// describe is the request as a remote agent gets it.
func (g *guard) describe(r *http.Request) *flowctl.HTTPRequest {
	known := labels.FromRequest(r)
	h := &flowctl.HTTPRequest{
		Method:   known["http.method"],
		Path:     known["http.target"],
		Host:     known["http.host"],
		Scheme:   known["http.scheme"],
		Protocol: r.Proto,
		Size:     r.ContentLength,
		Headers:  make(map[string]string, len(g.headers)+1),
	}
	for _, name := range g.headers {
		if values := r.Header.Values(name); len(values) > 0 {
			h.Headers[strings.ToLower(name)] = strings.Join(values, ",")
		}
	}
	if sent := r.Header["Baggage"]; len(sent) > 0 {
		h.Headers["baggage"] = strings.Join(sent, ",") // the client decides whether that counts
	}
	h.Source, _ = netip.ParseAddrPort(r.RemoteAddr)
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		h.Destination, _ = netip.ParseAddrPort(local.String())
	}
	return h
}

// obey sets the headers that the agent wants the handler to see, in the handler's request alone. A dry run adds nothing.
func (w *response) obey() {
	if info, ok := flowinfo.From(w.flow.Context()); ok && info.DryRun() {
		return
	}
	if answer, ok := w.flow.HTTPAnswer(); ok && w.flow.Decision() == flowctl.Accepted && len(answer.Header) > 0 {
		w.request.Header, w.obeyed = w.request.Header.Clone(), true
		setHeaders(w.request.Header, answer.Header)
		// The agent's word on labels is for the flows within the handler too.
		if bag, _ := baggage.Parse(w.request.Header.Get("Baggage")); bag.Len() > 0 {
			w.request = *w.request.WithContext(baggage.ContextWithBaggage(w.request.Context(), bag))
		}
	}
}

// refuse is how a request is answered that does not run, unless [WithOnReject] says: as the agent wants it, or else with
// a [Problem].
func refuse(w http.ResponseWriter, r *http.Request, flow *flowctl.Flow) {
	answer, _ := flow.HTTPAnswer()
	if answer.Body == "" || flow.Decision() != flowctl.Rejected {
		Problem(w, r, flow)
		return
	}
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "text/plain; charset=utf-8")
	}
	w.WriteHeader(flow.HTTPStatus())
	_, _ = io.WriteString(w, answer.Body) // a caller that has left does not get it
}

// setHeaders leaves out those that are for one connection, or about a body that may be another.
func setHeaders(h http.Header, from map[string]string) {
	for name, value := range from {
		switch name = http.CanonicalHeaderKey(name); name {
		case "Connection", "Content-Encoding", "Content-Length", "Content-Range", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
		default:
			h.Set(name, value)
		}
	}
}
