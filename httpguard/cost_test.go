package httpguard_test

import (
	"bufio"
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A meter is a client whose flows take 10 of 100 tokens each, and what is left of them.
type meter struct {
	t      *testing.T
	engine *engine.Engine
	client *flowctl.Client
	logged bytes.Buffer
}

func newMeter(t *testing.T) *meter {
	t.Helper()
	m := &meter{t: t}
	side := sides.Setup{
		Policies: sides.Policies(policy.RateLimiter{
			Selectors: policy.At(point), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens",
		}),
		Options: []flowctl.Option{
			flowctl.WithLogger(slog.New(slog.NewTextHandler(&m.logged, nil))), flowctl.WithLabels(map[string]string{"tokens": "10"}),
		},
	}.New(t, sides.Embedded)
	m.engine, m.client = side.Engine, side.Client
	return m
}

// cost is what the only flow has cost.
func (m *meter) cost() float64 {
	m.t.Helper()
	c, err := m.engine.Component("test", "rate_limiter.0")
	if err != nil {
		m.t.Fatal(err)
	}
	u, err := c.Peek(m.t.Context(), "")
	if err != nil {
		m.t.Fatal(err)
	}
	return 100 - u.Remaining
}

// warned reports whether a bad cost was logged.
func (m *meter) warned() bool { return strings.Contains(m.logged.String(), "a flow was not settled") }

// What a flow that was estimated at 10 costs by the response's header and trailer.
func TestCostHeader(t *testing.T) {
	write := func(body string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { _, _ = io.WriteString(w, body) }
	}
	header := func(values ...string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			for _, v := range values {
				w.Header().Add("x-cost", v)
			}
		}
	}
	trailer := func(value string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.Header().Set(http.TrailerPrefix+"X-Cost", value) }
	}
	announced := func(w http.ResponseWriter) { w.Header().Set("Trailer", "X-Cost") }
	flush := func(w http.ResponseWriter) { w.(http.Flusher).Flush() }
	type steps []func(http.ResponseWriter)
	for _, tt := range []struct {
		name    string
		handler steps
		want    float64
		warned  bool
	}{
		{"neither", steps{write("hello")}, 10, false},
		{"a header", steps{header("4"), write("hello")}, 4, false},
		{"a header without a body", steps{header("4")}, 4, false},
		{"a fraction", steps{header("4.5")}, 4.5, false},
		{"a header of an error", steps{header("0"), func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) }}, 0, false},
		{"no number", steps{header("four"), write("hello")}, 10, true},
		{"an empty header", steps{header(""), write("hello")}, 10, true},
		{"a negative number", steps{header("-4")}, 10, true},
		{"not finite", steps{header("Inf")}, 10, true},
		{"too large for a number", steps{header("1e999")}, 10, true},
		{"two values", steps{header("4", "5")}, 10, true},
		{"a trailer", steps{write("hello"), flush, trailer("7")}, 7, false},
		{"a trailer that was announced", steps{announced, write("hello"), flush, header("7")}, 7, false},
		{"a trailer after a header", steps{header("4"), write("hello"), flush, trailer("7")}, 7, false},
		{"a bad trailer after a header", steps{header("4"), write("hello"), flush, trailer("x")}, 4, true},
		{"a trailer that is no number", steps{write("hello"), flush, trailer("x")}, 10, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for _, step := range tt.handler {
					step(w)
				}
			})
			check := func(t *testing.T, m *meter) {
				t.Helper()
				if got := m.cost(); got != tt.want || m.warned() != tt.warned {
					t.Errorf("it cost %v, warned %v want %v, %v", got, m.warned(), tt.want, tt.warned)
				}
			}
			t.Run("Middleware", func(t *testing.T) {
				m := newMeter(t)
				httpguard.Middleware(m.client, point, httpguard.WithCostHeader("tokens", "X-Cost"))(handler).
					ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
				check(t, m)
			})
			for _, http2 := range []bool{false, true} {
				name := map[bool]string{false: "Transport, HTTP/1.1", true: "Transport, HTTP/2"}[http2]
				t.Run(name, func(t *testing.T) {
					m := newMeter(t)
					server, client := serving(t, handler, http2)
					client.Transport = httpguard.NewTransport(m.client, point, client.Transport, httpguard.WithCostHeader("tokens", "x-cost"))
					resp, err := client.Do(to(t, server))
					if err != nil {
						t.Fatal(err)
					}
					if _, err := io.Copy(io.Discard, resp.Body); err != nil {
						t.Error(err)
					}
					if err := resp.Body.Close(); err != nil {
						t.Error(err)
					}
					check(t, m)
				})
			}
		})
	}
}

// serving is a server of the handler, and a client of it.
func serving(t *testing.T, handler http.Handler, http2 bool) (url string, client *http.Client) {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = http2
	if http2 {
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	return server.URL, server.Client()
}

func to(t *testing.T, url string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// If the body of a response is closed, or breaks off, before its trailer has come, the cost is not known.
func TestCostTrailerThatDoesNotCome(t *testing.T) {
	for _, tt := range []struct {
		name string
		read func(t *testing.T, body io.Reader)
		send func(w http.ResponseWriter)
	}{
		{"closed", func(t *testing.T, body io.Reader) {
			if _, err := io.ReadFull(body, make([]byte, 5)); err != nil {
				t.Error(err)
			}
		}, func(w http.ResponseWriter) { w.Header().Set(http.TrailerPrefix+"X-Cost", "7") }},
		{"broken off", func(t *testing.T, body io.Reader) {
			if _, err := io.Copy(io.Discard, body); err == nil {
				t.Error("the body is whole")
			}
		}, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMeter(t)
			read := make(chan struct{})
			server, client := serving(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, _ = io.WriteString(w, "hello")
				w.(http.Flusher).Flush()
				if tt.name == "closed" {
					<-read
				}
				tt.send(w)
			}), false)
			client.Transport = httpguard.NewTransport(m.client, point, client.Transport, httpguard.WithCostHeader("tokens", "X-Cost"))
			resp, err := client.Do(to(t, server))
			if err != nil {
				t.Fatal(err)
			}
			tt.read(t, resp.Body)
			if err := resp.Body.Close(); err != nil {
				t.Error(err)
			}
			close(read)
			if got := m.cost(); got != 10 || m.warned() {
				t.Errorf("it cost %v want 10", got)
			}
		})
	}
}

// A handler that panics has said nothing by its header, and one whose flow did not run neither.
func TestCostHeaderOfNoResponse(t *testing.T) {
	m := newMeter(t)
	middleware := httpguard.Middleware(m.client, point, httpguard.WithCostHeader("tokens", "X-Cost"))
	func() {
		defer func() { _ = recover() }()
		middleware(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Cost", "0")
			panic(http.ErrAbortHandler)
		})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	}()
	if got := m.cost(); got != 10 {
		t.Errorf("a panic cost %v want 10", got)
	}
}

// Several options read several headers.
func TestCostHeaders(t *testing.T) {
	side := sides.Setup{Policies: sides.Policies(
		policy.RateLimiter{Selectors: policy.At(point), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens"},
		policy.RateLimiter{Selectors: policy.At(point), Capacity: 100, Interval: time.Hour, TokensLabel: "bytes"},
	)}.New(t, sides.Embedded)
	httpguard.Middleware(side.Client, point, httpguard.WithCostHeader("tokens", "X-Tokens"), httpguard.WithCostHeader("bytes", "Content-Length"))(
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Tokens", "30")
			w.Header().Set("Content-Length", "5")
			_, _ = io.WriteString(w, "hello")
		})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	for i, want := range []float64{70, 95} {
		if got := side.Engine.Stats().Components[i].Usage.Remaining; got != want {
			t.Errorf("component %d has %v left want %v", i, got, want)
		}
	}
}

// The last bytes of a body can settle the flow, even if the end comes with them. A trailer counts then too, also if the caller
// closes the body without reading the end.
func TestCostInTheLastBytes(t *testing.T) {
	for _, tt := range []struct {
		name    string
		read    func(t *testing.T, flow *flowctl.Flow, body io.Reader)
		trailer http.Header
		want    float64
	}{
		{"settled by a line", func(t *testing.T, flow *flowctl.Flow, body io.Reader) {
			lines := bufio.NewScanner(body)
			for lines.Scan() {
				if lines.Text() == "cost 30" {
					flow.Settle("tokens", 30)
				}
			}
			if err := lines.Err(); err != nil {
				t.Error(err)
			}
		}, nil, 30},
		{"settled after the end", func(t *testing.T, flow *flowctl.Flow, body io.Reader) {
			if text, err := io.ReadAll(body); err != nil || string(text) != "hello\ncost 30\n" {
				t.Errorf("read %q, %v", text, err)
			}
			flow.Settle("tokens", 30)
		}, nil, 10},
		{"closed at the last bytes", func(t *testing.T, _ *flowctl.Flow, body io.Reader) {
			if n, err := body.Read(make([]byte, 100)); n != len("hello\ncost 30\n") || err != nil {
				t.Errorf("Read() = %d, %v", n, err)
			}
		}, http.Header{"X-Cost": {"7"}}, 7},
		{"read to the end, twice", func(t *testing.T, _ *flowctl.Flow, body io.Reader) {
			for range 2 {
				if _, err := io.Copy(io.Discard, body); err != nil {
					t.Error(err)
				}
			}
		}, http.Header{"X-Cost": {"7"}}, 7},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMeter(t)
			rt := httpguard.NewTransport(m.client, point, base(func(r *http.Request) (*http.Response, error) {
				body := io.NopCloser(iotest.DataErrReader(strings.NewReader("hello\ncost 30\n")))
				return &http.Response{StatusCode: 200, Body: body, Trailer: tt.trailer, Request: r}, nil
			}), httpguard.WithCostHeader("tokens", "X-Cost"))
			resp, err := rt.RoundTrip(to(t, "https://api.example/"))
			if err != nil {
				t.Fatal(err)
			}
			tt.read(t, flowOf(t, resp.Request), resp.Body)
			if err := resp.Body.Close(); err != nil {
				t.Error(err)
			}
			if got := m.cost(); got != tt.want {
				t.Errorf("it cost %v want %v", got, tt.want)
			}
		})
	}
}
