package httpguard_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A response that says that the work failed counts if the caller cancels after it, and not if the cancellation came first.
func TestFailuresBesideCancellations(t *testing.T) {
	handle := func(answer func(w http.ResponseWriter, cancel func())) func(*sides.Side, context.Context, func()) {
		return func(side *sides.Side, ctx context.Context, cancel func()) {
			h := httpguard.Middleware(side.Client, "point")(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w, cancel) }))
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil))
		}
	}
	send := func(body string, err error, beforeAnswer, beforeClose bool) func(*sides.Side, context.Context, func()) {
		return func(side *sides.Side, ctx context.Context, cancel func()) {
			transport := httpguard.NewTransport(side.Client, "point", base(func(*http.Request) (*http.Response, error) {
				if beforeAnswer {
					cancel()
				}
				if err != nil {
					return nil, err
				}
				return &http.Response{StatusCode: http.StatusBadGateway, Body: io.NopCloser(strings.NewReader(body))}, nil
			}))
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
			resp, err := transport.RoundTrip(r)
			if err != nil {
				return
			}
			if beforeClose {
				cancel()
			}
			_, _ = io.ReadAll(resp.Body)
			_ = resp.Body.Close()
		}
	}
	for _, tt := range []struct {
		name  string
		serve func(*sides.Side, context.Context, func())
		opens bool
	}{
		{"a handler fails", handle(func(w http.ResponseWriter, _ func()) { w.WriteHeader(http.StatusBadGateway) }), true},
		{"a handler fails, and the client leaves", handle(func(w http.ResponseWriter, cancel func()) { w.WriteHeader(http.StatusBadGateway); cancel() }), true},
		{"the client leaves, and a handler fails", handle(func(w http.ResponseWriter, cancel func()) { cancel(); w.WriteHeader(http.StatusBadGateway) }), false},
		{"an upstream fails", send("body", nil, false, false), true},
		{"an upstream fails, and the caller leaves", send("body", nil, false, true), true},
		{"the caller leaves, and an upstream fails", send("body", nil, true, false), false},
		{"the caller leaves, and the connection breaks", send("", io.ErrUnexpectedEOF, true, false), false},
		{"the connection breaks", send("", io.ErrUnexpectedEOF, false, false), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			setup := sides.Setup{Policies: sides.Policies(policy.CircuitBreaker{
				Selectors: policy.At("point"), FailureCount: 1, Window: time.Minute, OpenDuration: time.Minute,
			})}
			setup.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				tt.serve(side, ctx, cancel)
				<-time.After(3 * time.Second) // a served breaker learns of ends by telemetry
				synctest.Wait()
				c, _ := side.Engine.Component("test", "circuit_breaker.0")
				if u, _ := c.Peek(t.Context(), ""); (u.State == "open") != tt.opens {
					t.Errorf("the breaker is %s want it open: %v", u.State, tt.opens)
				}
			})
		})
	}
}
