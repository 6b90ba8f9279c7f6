package labels

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// FromRequest returns the labels of an HTTP request, incoming or outgoing, for [WithTransport]. A label that the
// request has no value for is left out. All values are within the limits.
//
//	http.method                  GET when it is empty
//	http.target                  the path as sent, still escaped, without the query, where secrets travel
//	http.host                    the host and port that the request is for
//	http.scheme                  http or https; of an incoming request by its connection alone
//	http.flavor                  1.0, 1.1, 2.0 or 3.0
//	http.request_content_length  bytes of the body; left out when unknown
//	http.request.header.<name>   of each listed header that is present; the name in lower case with "_" for "-",
//	                             repeated values joined with ","
//
// If a request has several headers of one label, such as X-User and X_User, one counts: that with "-" in all places, which a
// proxy can set, or else the first by name. Headers may be listed in any case and order. The Host header is not among them: http.host has it. Neither is the
// Baggage header: its members become labels by flowctl.WithBaggage. Headers that carry credentials never become labels; see the package
// documentation.
func FromRequest(r *http.Request, headers ...string) map[string]string {
	return fromRequest(r, listed(headers))
}

// RequestLabeler returns a function for middleware, which puts the labels of a request into a context. It does what
// [WithTransport] and [FromRequest] do, with less work. It drops labels of another request from ctx: those that begin
// with "http.". The function is safe for concurrent use.
func RequestLabeler(headers ...string) func(ctx context.Context, r *http.Request) context.Context {
	list := listed(headers)
	return func(ctx context.Context, r *http.Request) context.Context {
		m := fromRequest(r, list)
		next := layersOf(ctx)
		for key, value := range next.transport {
			if _, ok := m[key]; !ok && !strings.HasPrefix(key, httpPrefix) {
				m[key] = value
			}
		}
		next.transport = repair(m)
		return newLabelled(ctx, next)
	}
}

// A header is one that becomes a label.
type header struct{ name, key string }

// listed returns the headers to look for, without those that carry credentials. Of several headers of one label, the last that a
// request has counts. So the list is in descending order: "_" is before "-" in it.
func listed(names []string) []header {
	list := make([]header, 0, len(names))
	for _, name := range names {
		if canonical := http.CanonicalHeaderKey(name); !IsCredential(name) && canonical != "Baggage" {
			key := headerPrefix + strings.ReplaceAll(strings.ToLower(name), "-", "_")
			list = append(list, header{canonical, key})
		}
	}
	slices.SortFunc(list, func(a, b header) int { return strings.Compare(b.name, a.name) }) // canonical names first differ in "-" or "_"
	return list
}

func fromRequest(r *http.Request, headers []header) map[string]string {
	m := make(map[string]string, 6+len(headers))
	set := func(key, value string) {
		if value != "" {
			m[key] = value
		}
	}
	set("http.method", cmp.Or(r.Method, http.MethodGet))
	set("http.target", target(r))
	set("http.host", host(r))
	set("http.scheme", scheme(r))
	set("http.flavor", strings.TrimPrefix(r.Proto, "HTTP/"))
	set("http.request_content_length", contentLength(r))

	for _, h := range headers {
		addField(m, h.key, r.Header[h.name])
	}
	return repair(m)
}

// outgoing tells requests that will be sent from those that a server received: only the latter have a RequestURI.
func outgoing(r *http.Request) bool { return r.RequestURI == "" }

func target(r *http.Request) string {
	// Handlers such as http.StripPrefix rewrite the URL, but not RequestURI.
	if strings.HasPrefix(r.RequestURI, "/") {
		path, _, _ := strings.Cut(r.RequestURI, "?")
		return path
	}
	if r.URL == nil {
		return ""
	}
	return cmp.Or(r.URL.EscapedPath(), "/")
}

func host(r *http.Request) string {
	if r.Host == "" && r.URL != nil {
		return r.URL.Host
	}
	return r.Host
}

func scheme(r *http.Request) string {
	switch {
	case r.TLS != nil:
		return "https"
	case !outgoing(r):
		// Not the URL's, which is what the peer claims when it sends an absolute one.
		return "http"
	case r.URL != nil:
		return r.URL.Scheme
	}
	return ""
}

func contentLength(r *http.Request) string {
	// An outgoing request says 0 for "unknown" too, when it has a body.
	unknown := r.ContentLength < 0 ||
		r.ContentLength == 0 && outgoing(r) && r.Body != nil && r.Body != http.NoBody
	if unknown {
		return ""
	}
	// Usually the header has the digits, and they need not be made again.
	if sent := r.Header.Get("Content-Length"); sent != "" && sent[0] >= '1' && sent[0] <= '9' {
		if n, err := strconv.ParseInt(sent, 10, 64); err == nil && n == r.ContentLength {
			return sent
		}
	}
	return strconv.FormatInt(r.ContentLength, 10)
}
