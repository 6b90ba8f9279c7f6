package httpguard_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

// nullWriter is a ResponseWriter that allocates nothing.
type nullWriter struct{ header http.Header }

func (w nullWriter) Header() http.Header         { return w.header }
func (w nullWriter) Write(p []byte) (int, error) { return len(p), nil }
func (w nullWriter) WriteHeader(int)             {}

// guards are the same handler bare and guarded by an engine with a rate limiter for each user.
func guards(tb testing.TB) (bare, guarded http.Handler) {
	tb.Helper()
	client := newEngine(tb, policy.RateLimiter{
		Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "http.request.header.x_user",
	})
	body := []byte("hello")
	bare = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) })
	return bare, httpguard.Middleware(client, point, httpguard.WithHeaders("X-User"))(bare)
}

func upload(tb testing.TB) *http.Request {
	tb.Helper()
	r := httptest.NewRequestWithContext(tb.Context(), http.MethodPost, "/orders", strings.NewReader(strings.Repeat("a", 1000)))
	r.Header.Set("Content-Length", "1000") // as servers leave it
	r.Header.Set("X-User", "alice")
	return r
}

// TestA29Allocations is bug A29: to describe a request took 53 allocations, and a look at the network's interfaces. Here
// a guarded request takes 6 more than a bare one: its flow, the labels' map (two), the context that carries it and the
// layer that they are in, and one for the request with that context and the response together.
func TestA29Allocations(t *testing.T) {
	bare, guarded := guards(t)
	w, r := nullWriter{make(http.Header)}, upload(t)
	plain := testing.AllocsPerRun(1000, func() { bare.ServeHTTP(w, r) })
	if got := testing.AllocsPerRun(1000, func() { guarded.ServeHTTP(w, r) }) - plain; got > 6 {
		t.Errorf("%v allocations beyond the bare handler, want 6 at the most", got)
	}

	// Skipped requests cost nothing.
	var off *flowctl.Client
	skipping := httpguard.Middleware(off, point, httpguard.WithSkipPaths("/orders"))(bare)
	if got := testing.AllocsPerRun(1000, func() { skipping.ServeHTTP(w, r) }) - plain; got != 0 {
		t.Errorf("%v allocations for a request that is skipped, want 0", got)
	}
}

// A request that goes out takes 8 allocations more than its bare transport, the body that ends its flow among them.
func TestTransportAllocations(t *testing.T) {
	client := newEngine(t, policy.RateLimiter{Selectors: policy.At(point), Capacity: 1e12, Fill: 1e12, Interval: time.Second, LimitBy: "http.host"})
	resp := new(http.Response)
	bare := base(func(r *http.Request) (*http.Response, error) {
		*resp = http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(http.NoBody), Request: r}
		return resp, nil
	})
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "https://upstream.example/", http.NoBody)
	r.RequestURI, r.TLS = "", nil
	allocs := func(rt http.RoundTripper) float64 {
		return testing.AllocsPerRun(1000, func() {
			resp, err := rt.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
		})
	}
	if got := allocs(httpguard.NewTransport(client, point, bare)) - allocs(bare); got > 8 {
		t.Errorf("%v allocations beyond the bare transport, want 8 at the most", got)
	}
}

func BenchmarkMiddleware(b *testing.B) {
	bare, guarded := guards(b)
	for name, h := range map[string]http.Handler{"bare": bare, "guarded": guarded} {
		b.Run(name, func(b *testing.B) {
			w, r := nullWriter{make(http.Header)}, upload(b)
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(w, r)
			}
		})
	}
}
