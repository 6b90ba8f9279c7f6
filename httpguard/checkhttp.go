package httpguard

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"go.opentelemetry.io/otel/baggage"
	"golang.org/x/net/http/httpguts"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/labels"
)

// WithCheckHTTP asks a remote agent by CheckHTTP instead of Check, for agents whose policies classify requests. The
// agent gets the request's method, path, host, scheme, protocol, size and addresses, and the headers of [WithHeaders].
// The middleware does what the agent answers. Headers that the agent adds to an accepted request are set in the
// handler's request. A rejected request is answered with the agent's status, headers and body, unless [WithOnReject]
// sets the body. In a client's dry run nothing of that is done.
//
// CheckHTTP cannot look up a result cache or global cache: a flow with a cache key in its Params is Invalid. An
// embedded engine is asked as always, because it makes the same labels of a request by itself.
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
		// Labels that the agent sets are also for the flows within the handler.
		if bag, _ := baggage.Parse(w.request.Header.Get("Baggage")); bag.Len() > 0 {
			w.request = *w.request.WithContext(baggage.ContextWithBaggage(w.request.Context(), bag))
		}
	}
}

// refuse answers a request that does not run, unless [WithOnReject] is set: as the agent wants it, or else with a
// [Problem].
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

// setHeaders leaves out headers that are for one connection, those about the body, which may be another one, and what no
// HTTP header can be.
func setHeaders(h http.Header, from map[string]string) {
	for name, value := range from {
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			continue
		}
		switch name = http.CanonicalHeaderKey(name); name {
		case "Connection", "Content-Encoding", "Content-Length", "Content-Range", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
		default:
			h.Set(name, value)
		}
	}
}
