package httpguard_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/baggage"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const point = "orders"

// limits are a policy of these components, or none.
func limits(components []policy.Component) []policy.Policy {
	if len(components) == 0 {
		return nil
	}
	return []policy.Policy{{Name: "limits", Components: components}}
}

// newEngine is an engine with these limiters, and a client of it.
func newEngine(tb testing.TB, limiters ...policy.Component) *flowctl.Client {
	tb.Helper()
	e, err := engine.New(limits(limiters))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = e.Close() })
	client, err := flowctl.New(e, flowctl.WithBaggage())
	if err != nil {
		tb.Fatal(err)
	}
	return client
}

// overAll runs a test over each kind of agent, none of which rejects anything.
func overAll(t *testing.T, test func(t *testing.T, client *flowctl.Client)) {
	t.Helper()
	sides.Setup{Options: []flowctl.Option{flowctl.WithBaggage()}}.Over(t, sides.All, func(t *testing.T, side *sides.Side) { test(t, side.Client) })
}

// serve has a handler answer a request, and gives what it panicked with.
func serve(h http.Handler, w http.ResponseWriter, r *http.Request) (panicked any) {
	defer func() { panicked = recover() }()
	h.ServeHTTP(w, r)
	return nil
}

// flowOf finds the flow of a request.
func flowOf(t *testing.T, r *http.Request) *flowctl.Flow {
	t.Helper()
	flow, ok := flowctl.FromContext(r.Context())
	if !ok {
		t.Fatal("no flow in the request's context")
	}
	return flow
}

// labelsOf are the labels that an agent saw.
func labelsOf(t *testing.T, r *http.Request) map[string]string {
	t.Helper()
	m := flowOf(t, r).CheckResponse().GetTelemetryFlowLabels()
	delete(m, "aperture.control_point_type")
	return m
}

func TestA17Statuses(t *testing.T) {
	const (
		ok     = flowctl.StatusOK
		failed = flowctl.StatusError
	)
	errOops := errors.New("oops")
	only := func(status int) func(error) bool {
		return func(err error) bool {
			s, ok := errors.AsType[*httpguard.StatusError](err)
			return ok && s.StatusCode == status
		}
	}
	tests := []struct {
		name      string
		handle    func(w http.ResponseWriter, r *http.Request, leave context.CancelFunc)
		isFailure func(error) bool
		timeout   time.Duration
		want      flowctl.Status
		panics    any
	}{
		{name: "nothing written", handle: answer(), want: ok},
		{name: "200", handle: answer(200), want: ok},
		{name: "404", handle: answer(404), want: ok},
		{name: "499", handle: answer(499), want: ok},
		{name: "500", handle: answer(500), want: failed},
		{name: "599", handle: answer(599), want: failed},
		{name: "informational, then 500", handle: answer(103, 500), want: failed},
		{name: "informational, then nothing", handle: answer(100, 103), want: ok},
		{name: "the first status counts: 500", handle: answer(500, 200), want: failed},
		{name: "the first status counts: 200", handle: answer(200, 500), want: ok},
		{name: "101 is final", handle: answer(101, 500), want: ok},
		{
			name: "a body, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				_, _ = w.Write(nil)
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name: "a string, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				_, _ = io.WriteString(w, "text")
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name: "a copy, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				_, _ = w.(io.ReaderFrom).ReadFrom(strings.NewReader("text"))
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name: "a copy of nothing, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				_, _ = w.(io.ReaderFrom).ReadFrom(strings.NewReader(""))
				w.WriteHeader(500)
			},
			want: failed,
		},
		{
			name: "a flush, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				w.(http.Flusher).Flush()
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name: "a flush by the controller, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				_ = http.NewResponseController(w).Flush()
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name:   "a panic",
			handle: func(http.ResponseWriter, *http.Request, context.CancelFunc) { panic(errOops) },
			want:   failed,
			panics: errOops,
		},
		{
			name: "a panic after 200",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				w.WriteHeader(200)
				panic(http.ErrAbortHandler)
			},
			want:   failed,
			panics: http.ErrAbortHandler,
		},
		{
			name:   "Goexit",
			handle: func(http.ResponseWriter, *http.Request, context.CancelFunc) { runtime.Goexit() },
			want:   failed,
		},
		{
			name: "a hijack that fails",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				if _, _, err := w.(http.Hijacker).Hijack(); !errors.Is(err, errNoHijack) {
					panic(err)
				}
				w.WriteHeader(200)
			},
			want: failed,
		},
		{
			name: "a hijack by the controller that fails",
			handle: func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
				_, _, _ = http.NewResponseController(w).Hijack()
			},
			want: failed,
		},
		{
			name: "the handler knows better: OK",
			handle: func(w http.ResponseWriter, r *http.Request, _ context.CancelFunc) {
				flowOf(t, r).SetStatus(ok)
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name: "the handler knows better: Error",
			handle: func(_ http.ResponseWriter, r *http.Request, _ context.CancelFunc) {
				flowOf(t, r).SetStatus(failed)
			},
			want: failed,
		},
		{
			name: "but not about a panic",
			handle: func(_ http.ResponseWriter, r *http.Request, _ context.CancelFunc) {
				flowOf(t, r).SetStatus(ok)
				panic(errOops)
			},
			want:   failed,
			panics: errOops,
		},
		{name: "judged: 404 is a failure", handle: answer(404), isFailure: only(404), want: failed},
		{name: "judged: 500 is none", handle: answer(500), isFailure: only(404), want: ok},
		{
			name:      "judged: nothing to judge",
			handle:    answer(302),
			isFailure: func(error) bool { panic("302 is no error") },
			want:      ok,
		},
		{
			name:      "judged: a panic is a failure",
			handle:    func(http.ResponseWriter, *http.Request, context.CancelFunc) { panic(errOops) },
			isFailure: func(error) bool { return false },
			want:      failed,
			panics:    errOops,
		},
		{
			name:      "a judge that panics",
			handle:    answer(500),
			isFailure: func(error) bool { panic(errOops) },
			want:      failed,
			panics:    errOops,
		},
		{
			name: "the client leaves",
			handle: func(_ http.ResponseWriter, r *http.Request, leave context.CancelFunc) {
				leave()
				<-r.Context().Done()
			},
			want: ok,
		},
		{
			name: "the client leaves, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, leave context.CancelFunc) {
				leave()
				w.WriteHeader(500)
			},
			want: ok,
		},
		{
			name: "500, then the client leaves",
			handle: func(w http.ResponseWriter, _ *http.Request, leave context.CancelFunc) {
				w.WriteHeader(500)
				leave()
			},
			want: failed,
		},
		{
			name: "judged: the client leaves, then 500",
			handle: func(w http.ResponseWriter, _ *http.Request, leave context.CancelFunc) {
				leave()
				w.WriteHeader(500)
			},
			isFailure: only(500),
			want:      failed,
		},
		{
			name: "the time is up, then 500",
			handle: func(w http.ResponseWriter, r *http.Request, _ context.CancelFunc) {
				<-r.Context().Done()
				w.WriteHeader(500)
			},
			timeout: time.Minute,
			want:    failed,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				client := agent.Client()
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				if tt.timeout > 0 {
					ctx, leave = context.WithTimeout(ctx, tt.timeout)
					defer leave()
				}
				h := httpguard.Middleware(client, point, httpguard.WithParams(func(*http.Request) flowctl.Params {
					return flowctl.Params{IsFailure: tt.isFailure}
				}))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { tt.handle(w, r, leave) }))

				done := make(chan struct{})
				go func() { // which Goexit may end
					defer close(done)
					r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/orders", nil)
					if got := serve(h, hijacker{httptest.NewRecorder()}, r); got != tt.panics {
						t.Errorf("panicked with %v, want %v", got, tt.panics)
					}
				}()
				<-done
				if err := client.Close(context.WithoutCancel(ctx)); err != nil {
					t.Fatal(err)
				}
				if spans := agent.Spans(); len(spans) != 1 || spans[0].Status != tt.want {
					t.Errorf("spans = %v, want one with status %v", spans, tt.want)
				}
			})
		})
	}
}

// answer writes statuses.
func answer(statuses ...int) func(http.ResponseWriter, *http.Request, context.CancelFunc) {
	return func(w http.ResponseWriter, _ *http.Request, _ context.CancelFunc) {
		for _, s := range statuses {
			w.WriteHeader(s)
		}
	}
}

var errNoHijack = errors.New("no hijacking today")

// hijacker is a ResponseWriter whose connection cannot be had.
type hijacker struct{ *httptest.ResponseRecorder }

func (hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) { return nil, nil, errNoHijack }

// TestA14HeadersBeforeTheStatus, TestA15StatusIsInRange and this are bugs A14 and A15: headers were set after the status
// and so got lost, and a status of 0 made net/http panic.
func TestRejections(t *testing.T) {
	tests := []struct {
		name       string
		answer     flowtest.Answer
		params     flowctl.Params
		point      string
		want       int
		retryAfter string
		detail     string
	}{
		{
			name:       "rate limited",
			answer:     flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 7 * time.Second},
			want:       429,
			retryAfter: "7",
			detail:     "rate limited",
		},
		{
			name:       "a part of a second is a second",
			answer:     flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 1},
			want:       429,
			retryAfter: "1",
			detail:     "rate limited",
		},
		{
			name:       "seconds are rounded up",
			answer:     flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Second + 1},
			want:       429,
			retryAfter: "2",
			detail:     "rate limited",
		},
		{
			name:   "nobody knows when",
			answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited},
			want:   429,
			detail: "rate limited",
		},
		{name: "no tokens", answer: flowtest.Answer{Reason: flowctl.ReasonNoTokens}, want: 503, detail: "no tokens"},
		{name: "not sampled", answer: flowtest.Answer{Reason: flowctl.ReasonNotSampled}, want: 403, detail: "not sampled"},
		{
			name:   "no ramp",
			answer: flowtest.Answer{Reason: flowctl.ReasonNoMatchingRamp},
			params: flowctl.Params{RampMode: true},
			want:   403,
			detail: "no matching ramp",
		},
		{
			name:   "the policy's status",
			answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited, HTTPStatus: 529},
			want:   529,
			detail: "rate limited",
		},
		{
			name:   "fail closed",
			answer: flowtest.Answer{Fail: status.Error(codes.Unavailable, "down")},
			params: flowctl.Params{OnUnreachable: flowctl.FailClosed},
			want:   503,
			detail: "nobody can say whether the request may run",
		},
		{name: "invalid label", params: flowctl.Params{Labels: map[string]string{"": "secret"}}, want: 500},
		{name: "invalid control point", point: strings.Repeat("p", 256), want: 500},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.answer)
				client := agent.Client()
				respond := func(opts ...httpguard.MiddlewareOption) *http.Response {
					opts = append(opts, httpguard.WithParams(func(*http.Request) flowctl.Params { return tt.params }))
					point := point
					if tt.point != "" {
						point = tt.point
					}
					h := httpguard.Middleware(client, point, opts...)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
						t.Error("the handler was called")
					}))
					r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/orders", failingBody{t})
					w := httptest.NewRecorder()
					w.Header().Set("Content-Length", "7") // of another body
					h.ServeHTTP(w, r)
					resp := w.Result()
					if got := resp.Header.Get("Retry-After"); resp.StatusCode != tt.want || got != tt.retryAfter {
						t.Errorf("got %d, Retry-After %q, want %d, %q", resp.StatusCode, got, tt.want, tt.retryAfter)
					}
					return resp
				}

				resp := respond()
				if got := resp.Header.Get("Content-Type"); got != "application/problem+json" {
					t.Errorf("Content-Type = %q", got)
				}
				if got := resp.Header.Get("Content-Length"); got != "" {
					t.Errorf("Content-Length = %q", got)
				}
				var problem map[string]any
				if err := json.NewDecoder(resp.Body).Decode(&problem); err != nil {
					t.Fatal(err)
				}
				title := http.StatusText(tt.want)
				if title == "" {
					title = "Rejected"
				}
				want := map[string]any{"title": title, "status": float64(tt.want)}
				if tt.detail != "" {
					want["detail"] = tt.detail
				}
				if diff := cmp.Diff(want, problem); diff != "" {
					t.Errorf("problem (-want +got):\n%s", diff)
				}

				resp = respond(httpguard.WithOnReject(httpguard.PlainText))
				if text, _ := io.ReadAll(resp.Body); string(text) != title+"\n" {
					t.Errorf("plain text = %q, want %q", text, title)
				}

				respond(httpguard.WithOnReject(nil))

				// One that only adds to the header.
				resp = respond(httpguard.WithOnReject(func(w http.ResponseWriter, r *http.Request, flow *flowctl.Flow) {
					w.Header().Set("Decision", flow.Decision().String())
					if flow != flowOf(t, r) {
						t.Error("the context has another flow")
					}
					if _, err := flow.End(r.Context()); !errors.Is(err, flowctl.ErrEnded) {
						t.Errorf("End = %v, want that the flow had ended", err)
					}
				}))
				if resp.Header.Get("Decision") == "" {
					t.Error("the header is lost")
				}
			})
		})
	}
}

// failingBody must not be read.
type failingBody struct{ t *testing.T }

func (b failingBody) Read([]byte) (int, error) {
	b.t.Error("the body was read")
	return 0, io.EOF
}

// A request whose client has left is neither run nor failed by an agent that was slow.
func TestCanceled(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		h := httpguard.Middleware(client, point)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			t.Error("the handler was called")
		}))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil))
		if w.Code != http.StatusRequestTimeout {
			t.Errorf("status %d, want 408", w.Code)
		}
	})
}

func TestA15StatusIsInRange(t *testing.T) {
	for _, tt := range []struct{ sent, want int }{
		{0, 429},
		{-1, 429},
		{99, 429},
		{100, 429},
		{200, 429},
		{302, 429},
		{399, 429},
		{400, 400},
		{418, 418},
		{599, 599},
		{600, 429},
		{1000, 429},
		{1 << 30, 429},
	} {
		t.Run(strconv.Itoa(tt.sent), func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited, HTTPStatus: tt.sent})
			server := httptest.NewServer(httpguard.Middleware(agent.Client(), point)(http.NotFoundHandler()))
			defer server.Close()
			resp, err := server.Client().Get(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != tt.want {
				t.Errorf("status %d, want %d", resp.StatusCode, tt.want)
			}
		})
	}
}

func TestA14HeadersBeforeTheStatus(t *testing.T) {
	client := newEngine(t, policy.RateLimiter{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Hour})
	server := httptest.NewServer(httpguard.Middleware(client, point)(http.NotFoundHandler()))
	defer server.Close()
	for _, want := range []int{http.StatusNotFound, http.StatusTooManyRequests} {
		resp, err := server.Client().Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		seconds, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if resp.StatusCode != want || (err == nil) != (want == http.StatusTooManyRequests) || seconds > 3600 {
			t.Errorf("got %d, %v, want %d", resp.StatusCode, resp.Header, want)
		}
	}
}

func TestRateLimitHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{
			{Name: `odd "name" \`, Components: []policy.Component{
				policy.RateLimiter{ID: "burst", Selectors: policy.At(point), Capacity: 2, Fill: 1, Interval: 10 * time.Second},
				policy.RateLimiter{Selectors: policy.At(point), Capacity: 5, Fill: 5, Interval: time.Second, LimitBy: "absent"},
			}},
			{Name: "in-flight", Components: []policy.Component{
				policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 3, MaxInflight: time.Minute},
			}},
			{Name: "überall", Components: []policy.Component{
				policy.RateLimiter{Selectors: policy.At(point), Capacity: 2e15, Fill: 1, Interval: time.Second},
			}},
			{Name: "huge", Components: []policy.Component{
				policy.RateLimiter{Selectors: policy.At(point), Capacity: 2e15, Fill: 1, Interval: time.Second},
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		h := httpguard.Middleware(client, point, httpguard.WithRateLimitHeaders())(http.NotFoundHandler())
		get := func() http.Header {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
			return w.Result().Header
		}
		const (
			policies = `"odd \"name\" \\/burst";q=2, "in-flight/concurrency_limiter.0";q=3;qu="concurrent-requests", "%c3%bcberall/rate_limiter.0";q=999999999999999, "huge/rate_limiter.0";q=999999999999999`
			rest     = `, "in-flight/concurrency_limiter.0";r=3, "%c3%bcberall/rate_limiter.0";r=999999999999999, "huge/rate_limiter.0";r=999999999999999` // a request's own slot will be free again
		)
		for i, want := range []string{`;r=1`, `;r=0`, `;r=0;t=10`} {
			got := get()
			if limit := got.Get("RateLimit"); limit != `"odd \"name\" \\/burst"`+want+rest {
				t.Errorf("request %d: RateLimit: %s", i, limit)
			}
			if limits := got.Get("RateLimit-Policy"); limits != policies {
				t.Errorf("request %d: RateLimit-Policy: %s", i, limits)
			}
		}
		if got := get().Get("Retry-After"); got != "10" {
			t.Errorf("Retry-After: %s, want 10", got)
		}
	})
}

// A rejected request takes nothing, and its response shows that.
func TestRateLimitHeadersOfARefund(t *testing.T) {
	client := newEngine(t,
		policy.RateLimiter{ID: "wide", Selectors: policy.At(point), Capacity: 5, Fill: 1, Interval: time.Hour},
		policy.RateLimiter{ID: "narrow", Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Hour})
	h := httpguard.Middleware(client, point, httpguard.WithRateLimitHeaders())(http.NotFoundHandler())
	for i := range 3 {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
		if limit, _, _ := strings.Cut(w.Result().Header.Get("RateLimit"), ","); !strings.HasSuffix(limit, `/wide";r=4`) {
			t.Errorf("request %d: RateLimit: %s want one that has 4 left", i, limit)
		}
	}
}

// A limiter may say a time that is none, or that no retry would outlive.
func TestRateLimitHeadersOfAbsurdWaits(t *testing.T) {
	for _, tt := range []struct {
		name string
		wait *durationpb.Duration
		want string
	}{
		{"negative", durationpb.New(-time.Hour), `"p/c";r=0`},
		{"short", durationpb.New(time.Hour), `"p/c";r=0;t=3600`},
		{"too long", &durationpb.Duration{Seconds: math.MaxInt64}, `"p/c";r=0`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			agent.Answer(flowtest.Answer{Response: &checkv1.CheckResponse{
				DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED,
				RejectReason: checkv1.CheckResponse_REJECT_REASON_RATE_LIMITED,
				WaitTime:     tt.wait,
				LimiterDecisions: []*checkv1.LimiterDecision{{
					PolicyName: "p", ComponentId: "c", Dropped: true, WaitTime: tt.wait,
					Details: &checkv1.LimiterDecision_RateLimiterInfo_{RateLimiterInfo: &checkv1.LimiterDecision_RateLimiterInfo{TokensInfo: &checkv1.LimiterDecision_TokensInfo{}}},
				}},
			}})
			w := httptest.NewRecorder()
			httpguard.Middleware(agent.Client(flowctl.WithCheckTimeout(time.Minute)), point, httpguard.WithRateLimitHeaders())(http.NotFoundHandler()).
				ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
			if got := w.Result().Header.Get("RateLimit"); got != tt.want {
				t.Errorf("RateLimit: %s want %s", got, tt.want)
			}
			if got := w.Result().Header.Get("Retry-After"); (got == "3600") != (tt.name == "short") || got != "" && got != "3600" {
				t.Errorf("Retry-After: %q", got)
			}
		})
	}
}

// Without a limiter, and without an agent, there is nothing to tell.
func TestRateLimitHeadersOfNothing(t *testing.T) {
	agent := flowtest.NewAgent(t)
	agent.Answer(flowtest.Answer{}, flowtest.Answer{Fail: status.Error(codes.Unavailable, "down")})
	for name, client := range map[string]*flowctl.Client{"off": nil, "remote": agent.Client()} {
		h := httpguard.Middleware(client, point, httpguard.WithRateLimitHeaders())(http.NotFoundHandler())
		for range 2 {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
			if h := w.Result().Header; h.Get("RateLimit") != "" || h.Get("RateLimit-Policy") != "" {
				t.Errorf("%s: %v", name, h)
			}
		}
	}
}

// TestA18ExplicitLabelsWin is bug A18: what the client sent replaced the labels of the application, and credentials went
// to the agent.
func TestA18ExplicitLabelsWin(t *testing.T) {
	headers := http.Header{
		"X-User-Tier":   {"platinum"},
		"User-Tier":     {"platinum"},
		"Authorization": {"Bearer secret"},
		"Cookie":        {"session=secret"},
		"Baggage":       {"user_tier=platinum,region=us,http.method=DELETE", "tenant=acme,authorization=secret"},
	}
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var got map[string]string
		h := httpguard.Middleware(client, point,
			httpguard.WithHeaders("X-User-Tier", "authorization"),
			httpguard.WithHeaders("Cookie", "X-Absent"),
			httpguard.WithParams(func(*http.Request) flowctl.Params {
				return flowctl.Params{Labels: map[string]string{
					"user_tier": "free", "http.request.header.x_user_tier": "free", "http.target": "/from-params",
				}}
			}),
		)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = labelsOf(t, r) }))

		r := httptest.NewRequestWithContext(labels.With(t.Context(), "region", "eu"), http.MethodPut, "http://shop.example/orders/7?token=secret", strings.NewReader("four"))
		maps.Copy(r.Header, headers)
		h.ServeHTTP(httptest.NewRecorder(), r)
		want := map[string]string{
			"user_tier":                       "free",
			"http.request.header.x_user_tier": "free",
			"http.target":                     "/from-params",
			"region":                          "eu",
			"tenant":                          "acme",
			"http.method":                     "PUT",
			"http.host":                       "shop.example",
			"http.scheme":                     "http",
			"http.flavor":                     "1.1",
			"http.request_content_length":     "4",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("labels (-want +got):\n%s", diff)
		}
	})
}

// Baggage that the application has parsed, or replaced, stays as it is; one that is not in order is no reason to fail.
func TestBaggage(t *testing.T) {
	tests := []struct {
		name, known string
		sent        []string
		want        string
	}{
		{name: "none"},
		{name: "sent", sent: []string{"a=1"}, want: "a=1"},
		{name: "sent in two", sent: []string{"a=1", "b=2"}, want: "a=1,b=2"},
		{name: "known", known: "a=1", sent: []string{"a=2"}, want: "a=1"},
		{name: "bad", sent: []string{"a=1,=,;=%,b"}, want: "a=1"},
		{name: "all bad", sent: []string{"=,;=%"}},
		{name: "too long", sent: []string{"a=" + strings.Repeat("x", 10000)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := t.Context()
			if tt.known != "" {
				bag, err := baggage.Parse(tt.known)
				if err != nil {
					t.Fatal(err)
				}
				ctx = baggage.ContextWithBaggage(ctx, bag)
			}
			var got baggage.Baggage
			h := httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				got = baggage.FromContext(r.Context())
			}))
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
			r.Header["Baggage"] = tt.sent
			h.ServeHTTP(httptest.NewRecorder(), r)
			members := strings.Split(got.String(), ",")
			slices.Sort(members)
			if got := strings.Join(members, ","); got != tt.want {
				t.Errorf("baggage = %q, want %q", got, tt.want)
			}
		})
	}
}

func TestControlPoints(t *testing.T) {
	pattern := httpguard.WithControlPoint(func(r *http.Request) string { return r.Pattern })
	tests := []struct {
		name    string
		handler func(client *flowctl.Client, h http.Handler) http.Handler
		want    string
	}{
		{
			name: "fixed",
			handler: func(client *flowctl.Client, h http.Handler) http.Handler {
				return httpguard.Middleware(client, "fixed", nil, httpguard.WithControlPoint(nil))(h)
			},
			want: "fixed",
		},
		{
			name: "the pattern, behind the mux",
			handler: func(client *flowctl.Client, h http.Handler) http.Handler {
				mux := http.NewServeMux()
				mux.Handle("GET /orders/{id}", httpguard.Middleware(client, "fixed", pattern)(h))
				return mux
			},
			want: "GET /orders/{id}",
		},
		{
			name: "the pattern, before the mux: it does not know yet",
			handler: func(client *flowctl.Client, h http.Handler) http.Handler {
				mux := http.NewServeMux()
				mux.Handle("GET /orders/{id}", h)
				return httpguard.Middleware(client, "fixed", pattern)(mux)
			},
			want: "fixed",
		},
		{
			name: "the mux is asked",
			handler: func(client *flowctl.Client, h http.Handler) http.Handler {
				mux := http.NewServeMux()
				mux.Handle("GET /orders/{id}", h)
				return httpguard.Middleware(client, "fixed", httpguard.WithControlPoint(func(r *http.Request) string {
					_, pattern := mux.Handler(r)
					return pattern
				}))(mux)
			},
			want: "GET /orders/{id}",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			overAll(t, func(t *testing.T, client *flowctl.Client) {
				got := ""
				h := tt.handler(client, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
					got = flowOf(t, r).ControlPoint()
				}))
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/orders/7", nil))
				if got != tt.want {
					t.Errorf("control point %q, want %q", got, tt.want)
				}
			})
		})
	}
}

// TestA25SkipRules is bug A25: one kind of rule replaced the other, and patterns matched anywhere in the path.
func TestA25SkipRules(t *testing.T) {
	guarded := map[string]bool{
		"/health":              false,
		"/ready":               false,
		"/healthy":             true,
		"/api/health":          true,
		"/health/":             true,
		"/static/app.js":       false,
		"/a/static/app.js":     true,
		"/connected":           false,
		"/api/connectedness":   true,
		"/is/connectedness":    true,
		"/connectedness":       false, // the longer alternative, though the shorter one comes first
		"/metrics":             false,
		"/metrics?all=1":       false,
		"/%68ealth":            false, // which is how /health may be sent too
		"/orders?next=/health": true,
	}
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		ran := false
		h := httpguard.Middleware(client, point,
			httpguard.WithSkipPaths("/health"),
			httpguard.WithSkipPatterns(regexp.MustCompile(`/static/.*`), nil, regexp.MustCompile(`/connected|/connectedness`)),
			httpguard.WithSkip(func(r *http.Request) bool { return r.URL.Path == "/metrics" }),
			httpguard.WithSkip(nil),
			httpguard.WithSkipPaths("/ready"),
		)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, ran = flowctl.FromContext(r.Context()) }))
		for path, want := range guarded {
			ran = !want
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
			if ran != want {
				t.Errorf("%s: has a flow: %v, want %v", path, ran, want)
			}
		}
	})
}

// A pattern is the caller's: it goes on matching as it did.
func TestSkipPatternsLeaveTheirsAlone(t *testing.T) {
	pattern := regexp.MustCompile("a|ab")
	httpguard.Middleware(nil, point, httpguard.WithSkipPatterns(pattern))
	if got := pattern.FindString("ab"); got != "a" {
		t.Errorf("the pattern matches %q, want a", got)
	}
}

// Off, and without a client at all, everything runs.
func TestOff(t *testing.T) {
	var off *flowctl.Client
	for name, m := range map[string]func(http.Handler) http.Handler{
		"nil client": httpguard.Middleware(off, point), "no client": httpguard.Middleware(nil, point),
	} {
		w := httptest.NewRecorder()
		m(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, flowOf(t, r).Decision())
		})).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
		if w.Body.String() != "accepted" {
			t.Errorf("%s: %s", name, w.Body)
		}
	}
}

// The handler gets the request unchanged, except for the context. The caller's request keeps its own context.
func TestRequestIsUnchanged(t *testing.T) {
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/orders/7", strings.NewReader("body"))
	r.SetPathValue("id", "7")
	r.Trailer = http.Header{"Checksum": nil}
	h := httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(_ http.ResponseWriter, got *http.Request) {
		if got.Body != r.Body || got.URL != r.URL || got.PathValue("id") != "7" || got.ContentLength != 4 || got.RemoteAddr != r.RemoteAddr {
			t.Errorf("got %+v, want %+v", got, r)
		}
	}))
	want := *r
	h.ServeHTTP(httptest.NewRecorder(), r)
	if _, ok := flowctl.FromContext(r.Context()); ok || !reflect.DeepEqual(&want, r) {
		t.Errorf("the caller's request was changed: %+v", r)
	}
}

// discard is a log for servers whose handlers panic.
func discard() *log.Logger { return log.New(io.Discard, "", 0) }
