package httpguard_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

// A request that the service itself gave up is no mistake of its client's: the client is there, and reads the answer. One
// whose client has left is no fault of the service's.
func TestWhoEndedTheRequest(t *testing.T) {
	const (
		server = http.StatusServiceUnavailable
		client = http.StatusRequestTimeout
	)
	canceled := func(cause error) func(context.Context) (context.Context, context.CancelFunc) {
		return func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(ctx)
			cancel(cause)
			return ctx, func() { cancel(nil) }
		}
	}
	errDraining := errors.New("the service shuts down")
	tests := []struct {
		name   string
		ctx    func(context.Context) (context.Context, context.CancelFunc)
		want   int
		detail string
	}{
		{name: "deadline passed", want: server, detail: "the service ran out of time", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithDeadline(ctx, time.Now().Add(-time.Second))
		}},
		{name: "deadline passes meanwhile", want: server, detail: "the service ran out of time", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 20*time.Millisecond)
		}},
		{name: "deadline with a cause", want: server, detail: "the service ran out of time", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithDeadlineCause(ctx, time.Now().Add(-time.Second), errDraining)
		}},
		{name: "canceled for a reason", want: server, detail: "the service ran out of time", ctx: canceled(errDraining)},
		{name: "deadline with a cause that is a cancellation", want: server, detail: "the service ran out of time", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithDeadlineCause(ctx, time.Now().Add(-time.Second), context.Canceled)
		}},
		{name: "canceled for a cancellation elsewhere", want: server, detail: "the service ran out of time", ctx: canceled(fmt.Errorf("replica: %w", context.Canceled))},
		{name: "canceled for a deadline", want: server, detail: "the service ran out of time", ctx: canceled(context.DeadlineExceeded)},
		{name: "canceled", want: client, detail: "the request was canceled", ctx: canceled(nil)},
		{name: "canceled, then too late", want: client, detail: "the request was canceled", ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return context.WithDeadline(ctx, time.Now().Add(-time.Second))
		}},
	}
	// Flows wait for a slot that is taken, for as long as they may.
	taken := []policy.Component{policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}}
	overEngines(t, taken, func(t *testing.T, _ *engine.Engine, c *flowctl.Client) {
		holder := c.Start(t.Context(), point, flowctl.Params{})
		defer func() { _, _ = holder.End(t.Context()) }()
		h := httpguard.Middleware(c, point, httpguard.WithParams(func(*http.Request) flowctl.Params {
			return flowctl.Params{CheckTimeout: -1}
		}))(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the handler was called") }))
		for _, tt := range tests {
			ctx, cancel := tt.ctx(t.Context())
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/", http.NoBody))
			cancel()
			var problem struct {
				Status int
				Detail string
			}
			if err := json.Unmarshal(w.Body.Bytes(), &problem); err != nil {
				t.Fatal(err)
			}
			if rejected := tt.name == "deadline passes meanwhile" && problem.Detail == "no tokens"; rejected {
				problem.Detail = tt.detail // an agent that answers just before the deadline says why it cannot wait on
			}
			if w.Code != tt.want || problem.Status != tt.want || problem.Detail != tt.detail {
				t.Errorf("%s: %d, %+v want %d, %s", tt.name, w.Code, problem, tt.want, tt.detail)
			}
		}
	})
}

// Middleware for timeouts around the guard sets a deadline, which passes while something before the guard is slow, or the
// agent hangs.
func TestDeadlineOfAnOuterMiddleware(t *testing.T) {
	overEngines(t, nil, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
		guarded := httpguard.Middleware(client, point)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			t.Error("the handler was called")
		}))
		status := 0
		slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			inner := httptest.NewRecorder()
			guarded.ServeHTTP(inner, r)
			status = inner.Code
		})
		w := httptest.NewRecorder()
		http.TimeoutHandler(slow, 20*time.Millisecond, "").ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
		synctest.Wait()
		if w.Code != http.StatusServiceUnavailable || status != http.StatusServiceUnavailable {
			t.Errorf("status %d, of the guard %d, want 503", w.Code, status)
		}
	})
}
