package httpguard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A handler that answers the error of a flow within answers as a middleware does around it, also if the error is wrapped.
func TestAnswerIsTheMiddlewares(t *testing.T) {
	errGone := errors.New("gone")
	ended := func(cause error) func(context.Context) context.Context {
		return func(ctx context.Context) context.Context {
			ctx, cancel := context.WithCancelCause(ctx)
			cancel(cause)
			return ctx
		}
	}
	for _, tt := range []struct {
		name   string
		answer flowtest.Answer
		params flowctl.Params
		ctx    func(context.Context) context.Context
		want   int
	}{
		{name: "rate limited", answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 90 * time.Second}, want: 429},
		{name: "nobody knows when", answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited}, want: 429},
		{name: "no tokens", answer: flowtest.Answer{Reason: flowctl.ReasonNoTokens, RetryAfter: 1}, want: 503},
		{name: "not sampled", answer: flowtest.Answer{Reason: flowctl.ReasonNotSampled}, want: 403},
		{name: "unreachable", answer: flowtest.Answer{Fail: status.Error(codes.Unavailable, "10.0.0.1")}, params: flowctl.Params{OnUnreachable: flowctl.FailClosed}, want: 503},
		{name: "invalid", params: flowctl.Params{Labels: map[string]string{"": "secret"}}, want: 500},
		{name: "the client has left", ctx: ended(nil), want: 408},
		{name: "the service gave up", ctx: ended(errGone), want: 503},
		{name: "the service gave up as if the client had left", ctx: ended(fmt.Errorf("%w: %w", errGone, context.Canceled)), want: 503},
		{
			name: "out of time", want: 503,
			ctx: func(ctx context.Context) context.Context {
				ctx, cancel := context.WithTimeout(ctx, -1)
				cancel()
				return ctx
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Answers: []flowtest.Answer{tt.answer}}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				respond := func(h http.Handler) *http.Response {
					ctx := t.Context()
					if tt.ctx != nil {
						ctx = tt.ctx(ctx)
					}
					w := httptest.NewRecorder()
					w.Header().Set("Content-Length", "7") // of another body
					h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodPost, "/orders", failingBody{t}))
					return w.Result()
				}
				notCalled := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the handler was called") })
				around := respond(httpguard.Middleware(side.Client, point, httpguard.WithParams(func(*http.Request) flowctl.Params { return tt.params }))(notCalled))
				body, _ := io.ReadAll(around.Body)
				if around.StatusCode != tt.want {
					t.Errorf("the middleware answers %d want %d", around.StatusCode, tt.want)
				}
				wrap := func(err error) error { return fmt.Errorf("place order of alice: %w", err) }
				for name, wrapped := range map[string]func(error) error{
					"plain":   func(err error) error { return err },
					"wrapped": wrap,
					"joined":  func(err error) error { return errors.Join(errGone, wrap(err)) },
				} {
					within := respond(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						err := headgate.Do(r.Context(), side.Client, point, tt.params, func(context.Context, *flowctl.Flow) error { return nil })
						if !httpguard.Answer(w, r, wrapped(err)) {
							t.Errorf("%s: %v was not answered", name, err)
						}
					}))
					got, _ := io.ReadAll(within.Body)
					if diff := cmp.Diff(around.Header, within.Header); diff != "" || within.StatusCode != around.StatusCode || string(got) != string(body) {
						t.Errorf("%s: answered %d, %s want %d, %s; header (-want +got):\n%s", name, within.StatusCode, got, around.StatusCode, body, diff)
					}
				}
			})
		})
	}
}

// The error of a guard that the handler itself canceled is no client that has left.
func TestAnswerOfAContextWithin(t *testing.T) {
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
	ctx, cancel := context.WithCancel(r.Context())
	cancel()
	err := headgate.Do(ctx, newEngine(t), point, flowctl.Params{}, func(context.Context, *flowctl.Flow) error { return nil })
	w := httptest.NewRecorder()
	if !httpguard.Answer(w, r, err) || w.Code != http.StatusServiceUnavailable {
		t.Errorf("%v is answered with %d want 503", err, w.Code)
	}
}

// Errors that a program has made, and those of an upstream that pauses.
func TestAnswer(t *testing.T) {
	sent := 0
	rt := httpguard.NewTransport(newEngine(t), point, busy(&sent))
	_ = try(t, rt, "https://api.example/")
	paused := try(t, rt, "https://api.example/")
	for _, tt := range []struct {
		name       string
		err        error
		status     int // zero: it is not answered
		retryAfter string
		body       string
	}{
		{name: "none"},
		{name: "another", err: errors.New("another")},
		{name: "a context's", err: context.Canceled},
		{name: "a deadline", err: context.DeadlineExceeded},
		{name: "a status", err: &httpguard.StatusError{StatusCode: 429}},
		{name: "the end of a flow that has ended", err: flowctl.ErrEnded},
		{name: "a status of gRPC", err: status.Error(codes.ResourceExhausted, "secret")},
		{name: "paused", err: paused, status: 429, retryAfter: "60", body: `{"title":"Too Many Requests","status":429,"detail":"an upstream asks for a pause"}`},
		{
			name: "made", err: (&flowctl.RejectedError{ControlPoint: "secret", Reason: flowctl.ReasonNotSampled, HTTPStatus: 418}).WithRetryAfter(time.Second + 1),
			status: 418, retryAfter: "2", body: `{"title":"I'm a teapot","status":418,"detail":"not sampled"}`,
		},
		{name: "made without a status", err: &flowctl.RejectedError{}, status: 503, body: `{"title":"Service Unavailable","status":503,"detail":"no reason given"}`},
		{name: "made with a status that is none", err: &flowctl.RejectedError{HTTPStatus: 200}, status: 503, body: `{"title":"Service Unavailable","status":503,"detail":"no reason given"}`},
		{name: "the sentinel", err: fmt.Errorf("secret: %w", flowctl.ErrRejected), status: 503, body: `{"title":"Service Unavailable","status":503,"detail":"no reason given"}`},
		{name: "a nil pointer", err: (*flowctl.RejectedError)(nil), status: 503, body: `{"title":"Service Unavailable","status":503,"detail":"no reason given"}`},
		{
			name: "unreachable", err: &flowctl.UnreachableError{ControlPoint: "secret"},
			status: 503, body: `{"title":"Service Unavailable","status":503,"detail":"nobody can say whether the request may run"}`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			w.Header().Set("X-Kept", "yes")
			answered := httpguard.Answer(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil), tt.err)
			if answered != (tt.status != 0) {
				t.Fatalf("Answer() = %t", answered)
			}
			if !answered {
				if len(w.Header()) != 1 || w.Body.Len() > 0 {
					t.Errorf("it wrote %v, %s", w.Header(), w.Body)
				}
				return
			}
			if got := w.Header().Get("Retry-After"); w.Code != tt.status || got != tt.retryAfter || strings.TrimSpace(w.Body.String()) != tt.body {
				t.Errorf("answered %d, Retry-After %q, %s want %d, %q, %s", w.Code, got, w.Body, tt.status, tt.retryAfter, tt.body)
			}
			if w.Header().Get("X-Kept") != "yes" {
				t.Error("a header is lost")
			}
		})
	}
}

// Within a middleware that shows its limits, the answer shows them too. The flow within is not the middleware's.
func TestAnswerKeepsRateLimitHeaders(t *testing.T) {
	components := []policy.Component{
		policy.RateLimiter{ID: "outer", Selectors: policy.At(point), Capacity: 10, Interval: time.Hour},
		policy.RateLimiter{ID: "inner", Selectors: policy.At("inner"), Interval: time.Hour},
	}
	sides.Setup{Policies: limits(components)}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		h := httpguard.Middleware(side.Client, point, httpguard.WithRateLimitHeaders())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			err := headgate.Do(r.Context(), side.Client, "inner", flowctl.Params{}, func(context.Context, *flowctl.Flow) error { return nil })
			if !httpguard.Answer(w, r, err) {
				t.Errorf("%v was not answered", err)
			}
		}))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
		if got, want := w.Header().Get("RateLimit"), `"limits/outer";r=9`; w.Code != 429 || got != want {
			t.Errorf("answered %d, RateLimit %s want 429, %s", w.Code, got, want)
		}
	})
}
