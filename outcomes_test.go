package headgate_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// tellers are the ways in which an engine learns how flows end.
var tellers = map[string]func(t *testing.T, policies []policy.Policy) (*engine.Engine, *flowctl.Client){
	"in the process": func(t *testing.T, policies []policy.Policy) (*engine.Engine, *flowctl.Client) {
		side := sides.Setup{Policies: policies}.New(t, sides.Embedded)
		return side.Engine, side.Client
	},
	"by a session, then by telemetry": func(t *testing.T, policies []policy.Policy) (*engine.Engine, *flowctl.Client) {
		side := sides.Setup{Policies: policies}.New(t, sides.Served)
		return side.Engine, side.Client
	},
	"by a session": func(t *testing.T, policies []policy.Policy) (*engine.Engine, *flowctl.Client) {
		side := sides.Setup{Policies: policies, Options: []flowctl.Option{flowctl.WithoutTelemetry()}}.New(t, sides.Served)
		return side.Engine, side.Client
	},
	"by telemetry": func(t *testing.T, policies []policy.Policy) (*engine.Engine, *flowctl.Client) {
		e, err := engine.New(policies)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = e.Close() })
		server := grpc.NewServer(append(agent.ServerOptions(), sides.WithoutSessions())...)
		agent.Register(server, e)
		return e, sides.Dial(t, server)
	},
}

// overTellers runs f in a bubble for each way in which an engine learns how flows end.
func overTellers(t *testing.T, components []policy.Component, f func(t *testing.T, client *flowctl.Client, breaker func() engine.Usage)) {
	t.Helper()
	for name, teller := range tellers {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, client := teller(t, sides.Policies(components...))
				synctest.Wait() // the session has begun
				f(t, client, func() engine.Usage {
					t.Helper()
					<-time.After(3 * time.Second) // the telemetry has come
					c, err := e.Component("test", "circuit_breaker.0")
					if err != nil {
						t.Fatal(err)
					}
					usage, err := c.Peek(t.Context(), "")
					if err != nil {
						t.Fatal(err)
					}
					return usage
				})
			})
		})
	}
}

// probed is a circuit breaker that one failure opens, also of a slow flow, and one success closes.
func probed() policy.CircuitBreaker {
	return policy.CircuitBreaker{
		Selectors: policy.At(point), FailureCount: 1, SlowAfter: 2 * time.Second, Window: time.Hour, OpenDuration: time.Minute, ProbeTimeout: time.Hour,
	}
}

// halfOpen has the breaker open, and waits until the next flow is a probe.
func halfOpen(t *testing.T, client *flowctl.Client, breaker func() engine.Usage) {
	t.Helper()
	flow := client.Start(t.Context(), point, flowctl.Params{})
	flow.SetStatus(flowctl.StatusError)
	_, _ = flow.End(t.Context())
	if got := breaker().State; got != "open" {
		t.Fatalf("the breaker is %s after a failure", got)
	}
	<-time.After(time.Minute)
}

// A brokenBody breaks off when work has returned.
type brokenBody struct{ work func() error }

func (b brokenBody) Read([]byte) (int, error) { return 0, b.work() }
func (b brokenBody) Close() error             { return nil }

// ends are the ways in which guarded work ends. The work of each waits first.
var ends = []struct {
	name  string
	by    func(ctx context.Context, client *flowctl.Client, wait func())
	fails bool // if its caller has not canceled it
}{
	{"Start", func(ctx context.Context, client *flowctl.Client, wait func()) {
		flow := client.Start(ctx, point, flowctl.Params{})
		wait()
		_, _ = flow.End(ctx)
	}, false},
	{"SetStatus", func(ctx context.Context, client *flowctl.Client, wait func()) {
		flow := client.Start(ctx, point, flowctl.Params{})
		wait()
		flow.SetStatus(flowctl.StatusError)
		_, _ = flow.End(ctx)
	}, true},
	{"SetStatus of OK", func(ctx context.Context, client *flowctl.Client, wait func()) {
		flow := client.Start(ctx, point, flowctl.Params{})
		wait()
		flow.SetStatus(flowctl.StatusOK)
		_, _ = flow.End(ctx)
	}, false},
	{"SetError", func(ctx context.Context, client *flowctl.Client, wait func()) {
		flow := client.Start(ctx, point, flowctl.Params{})
		wait()
		flow.SetError(errWork)
		_, _ = flow.End(ctx)
	}, true},
	{"Guard", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_, _ = headgate.Guard(client, point, flowctl.Params{}, worker(wait), nil)(ctx)
	}, false},
	{"Guard, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_, _ = headgate.Guard(client, point, flowctl.Params{}, func(context.Context) (int, error) { wait(); return 0, errWork }, nil)(ctx)
	}, true},
	{"Guard, panic", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_, _ = headgate.Guard(client, point, flowctl.Params{}, func(context.Context) (int, error) { wait(); panic(errWork) }, nil)(ctx)
	}, true},
	{"Guard, Goexit", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_, _ = headgate.Guard(client, point, flowctl.Params{}, func(context.Context) (int, error) { wait(); runtime.Goexit(); return 0, nil }, nil)(ctx)
	}, true},
	{"Do, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_ = headgate.Do(ctx, client, point, flowctl.Params{}, func(context.Context, *flowctl.Flow) error { wait(); return errWork })
	}, true},
	{"Cached", func(ctx context.Context, client *flowctl.Client, wait func()) {
		params := flowctl.Params{ResultCacheKey: "key"}
		_, _ = headgate.Cached(client, point, params, worker(wait), nil, headgate.CachePolicy[int]{TTL: time.Hour})(ctx)
	}, false},
	{"Cached, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		params := flowctl.Params{ResultCacheKey: "key"}
		_, _ = headgate.Cached(client, point, params, func(context.Context) (int, error) { wait(); return 0, errWork }, nil, headgate.CachePolicy[int]{})(ctx)
	}, true},
	{"unary server, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_, _ = grpcguard.UnaryServerInterceptor(client, point)(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/shop/Get"},
			func(context.Context, any) (any, error) { wait(); return nil, errWork })
	}, true},
	{"stream server, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_ = grpcguard.StreamServerInterceptor(client, point)(nil, dryRunStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: "/shop/Watch"},
			func(any, grpc.ServerStream) error { wait(); return errWork })
	}, true},
	{"unary client, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_ = grpcguard.UnaryClientInterceptor(client, point)(ctx, "/shop/Get", nil, nil, nil,
			func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
				wait()
				return errWork
			})
	}, true},
	{"stream client, error", func(ctx context.Context, client *flowctl.Client, wait func()) {
		_, _ = grpcguard.StreamClientInterceptor(client, point)(ctx, &grpc.StreamDesc{}, nil, "/shop/Watch",
			func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
				wait()
				return nil, errWork
			})
	}, true},
	{"middleware", serving(func(http.ResponseWriter) {}), false},
	{"middleware, 502", serving(func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) }), true},
	{"middleware, panic", serving(func(http.ResponseWriter) { panic(errWork) }), true},
	{"middleware, abort", serving(func(http.ResponseWriter) { panic(http.ErrAbortHandler) }), true},
	{"transport", sending(func(wait func()) (*http.Response, error) {
		wait()
		return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
	}), false},
	{"transport, 502", sending(func(wait func()) (*http.Response, error) {
		wait()
		return &http.Response{StatusCode: http.StatusBadGateway, Body: http.NoBody}, nil
	}), true},
	{"transport, error", sending(func(wait func()) (*http.Response, error) { wait(); return nil, errWork }), true},
	{"transport, body", sending(func(wait func()) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Body: brokenBody{func() error { wait(); return io.EOF }}}, nil
	}), false},
	{"transport, broken body", sending(func(wait func()) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Body: brokenBody{func() error { wait(); return errWork }}}, nil
	}), true},
}

func serving(handle func(http.ResponseWriter)) func(context.Context, *flowctl.Client, func()) {
	return func(ctx context.Context, client *flowctl.Client, wait func()) {
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { wait(); handle(w) })
		r := httptest.NewRequest(http.MethodGet, "/", http.NoBody).WithContext(ctx)
		httpguard.Middleware(client, point)(handler).ServeHTTP(httptest.NewRecorder(), r)
	}
}

func sending(roundTrip func(wait func()) (*http.Response, error)) func(context.Context, *flowctl.Client, func()) {
	return func(ctx context.Context, client *flowctl.Client, wait func()) {
		transport := httpguard.NewTransport(client, point, roundTrips(func(*http.Request) (*http.Response, error) { return roundTrip(wait) }))
		resp, err := transport.RoundTrip(httptest.NewRequest(http.MethodGet, "https://api.example/", http.NoBody).WithContext(ctx))
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
}

// A flow that its caller has canceled counts neither way, however it ends, also if it was slow: a probe gives its place back. What its
// caller has not canceled counts.
func TestOutcomesOfCanceledFlows(t *testing.T) {
	for _, end := range ends {
		for _, canceled := range []bool{false, true} {
			name, want := end.name, engine.Usage{Capacity: 1, Remaining: 1, State: "closed"}
			switch {
			case canceled:
				name, want = end.name+", canceled", engine.Usage{Capacity: 1, Remaining: 1, State: "half-open"}
			case end.fails:
				want = engine.Usage{Capacity: 1, State: "open"}
			}
			t.Run(name, func(t *testing.T) {
				overTellers(t, []policy.Component{probed()}, func(t *testing.T, client *flowctl.Client, breaker func() engine.Usage) {
					halfOpen(t, client, breaker)
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					ran, done := false, make(chan struct{})
					go func() { // a Goexit ends it
						defer close(done)
						defer func() { _ = recover() }()
						end.by(ctx, client, func() {
							ran = true
							if canceled {
								<-time.After(3 * time.Second)
								cancel()
							}
						})
					}()
					<-done
					if got := breaker(); got != want || !ran {
						t.Errorf("the breaker is %+v want %+v; the work ran: %v", got, want, ran)
					}
				})
			})
		}
	}
}

// A result from a cache counts neither way, however the flow ends.
func TestOutcomesOfCachedResults(t *testing.T) {
	for _, status := range []flowctl.Status{flowctl.StatusUnset, flowctl.StatusOK, flowctl.StatusError} {
		t.Run(status.String(), func(t *testing.T) {
			overTellers(t, []policy.Component{probed()}, func(t *testing.T, client *flowctl.Client, breaker func() engine.Usage) {
				params := flowctl.Params{ResultCacheKey: "key"}
				first := client.Start(t.Context(), point, params)
				if err := first.SetResultCache(t.Context(), []byte("value"), time.Hour); err != nil {
					t.Fatal(err)
				}
				_, _ = first.End(t.Context())
				halfOpen(t, client, breaker)
				flow := client.Start(t.Context(), point, params)
				if _, hit, err := flow.ResultCache(); !hit || err != nil {
					t.Fatalf("the flow has found nothing: %v", err)
				}
				flow.SetStatus(status)
				_, _ = flow.End(t.Context())
				if got, want := breaker(), (engine.Usage{Capacity: 1, Remaining: 1, State: "half-open"}); got != want {
					t.Errorf("the breaker is %+v want %+v", got, want)
				}
			})
		})
	}
}

// Requests that a pause keeps from being sent count neither way, although their flows were let in. Those that wait until it is over
// count when they are sent.
func TestOutcomesOfRequestsThatAreNotSent(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts []httpguard.TransportOption
		sent int
	}{
		{"refused", nil, 1},
		{"sent later", []httpguard.TransportOption{httpguard.WithMaxWait(time.Minute)}, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			breaker := probed()
			breaker.FailureCount, breaker.SlowAfter = 2, 0
			queue := policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}
			overTellers(t, []policy.Component{breaker, queue}, func(t *testing.T, client *flowctl.Client, breaker func() engine.Usage) {
				sent := 0
				transport := httpguard.NewTransport(client, point, roundTrips(func(*http.Request) (*http.Response, error) {
					sent++
					<-time.After(time.Second)
					if sent > 1 {
						return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
					}
					return &http.Response{
						StatusCode: http.StatusServiceUnavailable, Header: http.Header{"Retry-After": {"5"}}, Body: http.NoBody,
					}, nil
				}), append(tt.opts, httpguard.WithParams(func(*http.Request) flowctl.Params {
					return flowctl.Params{MaxWait: time.Minute}
				}))...)
				done := make(chan struct{})
				for range 4 {
					go func() {
						defer func() { done <- struct{}{} }()
						resp, err := transport.RoundTrip(httptest.NewRequest(http.MethodGet, "https://api.example/", http.NoBody))
						if err == nil {
							_ = resp.Body.Close()
						}
					}()
				}
				for range 4 {
					<-done
				}
				if got, want := breaker(), (engine.Usage{Capacity: 1, Remaining: 1, State: "closed"}); got != want || sent != tt.sent {
					t.Errorf("the breaker is %+v after one failure want %+v; %d requests were sent want %d", got, want, sent, tt.sent)
				}
			})
		})
	}
}
