package httpguard_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path"
	"regexp"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

// What a peer sends, byte for byte, as the target of a request: a path that another reader may take for another one is
// never skipped.
func TestDirtyPathsAreNotSkipped(t *testing.T) {
	requests := map[string]bool{ // whether it has a flow
		"GET /static/app.css":                   false,
		"GET /static/":                          false,
		"GET /static/a/b/":                      false,
		"GET /static/.well-known/x":             false,
		"GET /static/a..b/...c":                 false,
		"GET /static/app.css?../orders":         false,
		"GET /static/app.css?a=%2e%2e%2f;b":     false,
		"GET /static/%61pp.css":                 false,
		"GET /static/a(1)!.css":                 false,
		"GET /static/a%20b.css":                 false,
		"GET /static/%C3%BCber.css":             false,
		"GET http://a/static/app.css":           false,
		"GET /static/../orders":                 true,
		"GET /static/a/../../orders":            true,
		"GET /static/..":                        true,
		"GET /static/./app.css":                 true,
		"GET /static/.":                         true,
		"GET /static//app.css":                  true,
		"GET //static/app.css":                  true,
		"GET /static//":                         true,
		"GET /static/%2e%2e/orders":             true,
		"GET /static/%2E%2e/orders":             true,
		"GET /static/.%2e/orders":               true,
		"GET /static/app%2ecss":                 true,
		"GET /static/..%2forders":               true,
		"GET /static/a%2Fb":                     true,
		"GET /static%2fapp.css":                 true,
		"GET /static/%252e%252e%252forders":     true,
		"GET /static/..%255corders":             true,
		"GET /static/..\\orders":                true,
		"GET /static/a\\b":                      true,
		"GET /static/a%5cb":                     true,
		"GET /static/a%5C..%5Corders":           true,
		"GET /static/..;/orders":                true,
		"GET /static/..;a=b/orders":             true,
		"GET /static/a;v=1":                     true,
		"GET /static/a%3bv":                     true,
		"GET /static/a%00.css":                  true,
		"GET /static/a%0a.css":                  true,
		"GET /static/.%09./orders":              true,
		"GET /static/a%7f":                      true,
		"GET /static/a%3f.css":                  true,
		"GET /static/a%23.css":                  true,
		"GET /static/a.":                        true,
		"GET /static/a./b":                      true,
		"GET /static/.../orders":                true,
		"GET /static/..%20/orders":              true,
		"GET /static/a%20":                      true,
		"GET /static/%c0%ae%c0%ae/orders":       true,
		"GET /static/..%c0%aforders":            true,
		"GET /static/%ef%bc%8e%ef%bc%8e/orders": true, // full-width dots
		"GET /static/..%ef%bc%8forders":         true, // and a slash
		"GET /static/%e2%80%a5/orders":          true, // two dots in one
		"GET /static/%ef%b8%b0/orders":          true, // the same, for vertical text
		"GET /static/%e2%92%88":                 true, // a number with a dot
		"GET /static/..%e2%80%88/orders":        true, // a space that is not ASCII
		"GET http://a/static/../orders":         true,
		"GET http://a/static/%2e%2e/orders":     true,
		"GET http://a":                          true,
		"CONNECT a:443":                         true,
		"CONNECT /static/../orders":             true,
		"GET /health":                           false,
		"GET /%68ealth":                         false,
		"GET /health/":                          true,
		"GET /health/.":                         true,
		"GET /health;":                          true,
		"GET /./health":                         true,
		"GET //health":                          true,
		"GET /orders":                           true,
		"GET /odd/../listed":                    true, // whatever is listed
	}
	client := newEngine(t)
	flows := make(chan bool, 1)
	server := httptest.NewServer(httpguard.Middleware(client, point,
		httpguard.WithSkipPaths("/health", "", "*", "/odd/../listed"),
		httpguard.WithSkipPatterns(regexp.MustCompile(`(?s)(http://a)?/*static.*|`)),
	)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, ok := flowctl.FromContext(r.Context())
		flows <- ok
	})))
	defer server.Close()
	for request, want := range requests {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", request)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(request, err)
		}
		_ = resp.Body.Close()
		_ = conn.Close()
		select {
		case got := <-flows:
			if got != want {
				t.Errorf("%q: has a flow: %v want %v", request, got, want)
			}
		default: // net/http refuses it by itself
			if resp.StatusCode != http.StatusBadRequest || !want {
				t.Errorf("%q: status %d, and the handler was not called", request, resp.StatusCode)
			}
		}
	}
}

// Requests that no parser has made: what a program, or middleware before this one, put into them.
func TestOddURLsAreNotSkipped(t *testing.T) {
	for name, u := range map[string]*url.URL{
		"none":                     nil,
		"empty":                    {},
		"opaque":                   {Opaque: "//a/static/app.css", Path: "/static/app.css"},
		"no slash":                 {Path: "static/app.css"},
		"of OPTIONS *":             {Path: "*"},
		"raw path of another path": {Path: "/static/app.css", RawPath: "/orders"},
		"raw path with dots":       {Path: "/static/app.css", RawPath: "/static/%2e%2e/orders"},
		"raw path that is none":    {Path: "/static/app.css", RawPath: "/static/%zz"},
		"control character":        {Path: "/static/\x01"},
		"not UTF-8":                {Path: "/static/\xff"},
	} {
		ran := false
		h := httpguard.Middleware(newEngine(t), point, httpguard.WithSkipPaths("", "*", "static/app.css"), httpguard.WithSkipPatterns(regexp.MustCompile(`(?s).*`)))(
			http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, ran = flowctl.FromContext(r.Context()) }))
		r := &http.Request{Method: http.MethodGet, URL: u, Header: make(http.Header)}
		h.ServeHTTP(httptest.NewRecorder(), r.WithContext(t.Context()))
		if !ran {
			t.Errorf("%s: skipped", name)
		}
	}
}

// Around a reverse proxy whose backend resolves dots, as many do, a peer cannot reach what is limited by what is not.
func TestSkipsAroundAProxy(t *testing.T) {
	client := newEngine(t, policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Hour})
	served := 0
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if path.Clean(r.URL.Path) == "/orders/export" {
			served++
		}
	}))
	defer backend.Close()
	target, err := url.Parse(backend.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	server := httptest.NewServer(httpguard.Middleware(client, point, httpguard.WithSkipPatterns(regexp.MustCompile(`/static/.*`)))(
		&httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}))
	defer server.Close()
	for range 5 {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET /static/../orders/export HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		_ = conn.Close()
	}
	if served != 1 {
		t.Errorf("%d requests were served of a limit of 1", served)
	}
}
