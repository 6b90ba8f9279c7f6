package labels

import (
	"cmp"
	"net/http"
	"strconv"
	"strings"
)

// FromRequest returns the labels of an HTTP request, incoming or outgoing, for [WithTransport]. What the request does
// not tell is left out, and all values are within the limits.
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
// Headers may be listed in any case. Host is none of them; http.host has it. Those that carry credentials never become labels; see the package documentation.
func FromRequest(r *http.Request, headers ...string) map[string]string {
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

	for _, header := range headers {
		if values := r.Header.Values(header); len(values) > 0 && !denied(header) {
			name := strings.ReplaceAll(strings.ToLower(header), "-", "_")
			m[headerPrefix+name] = strings.Join(values, ",")
		}
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
	return strconv.FormatInt(r.ContentLength, 10)
}
