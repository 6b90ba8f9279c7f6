package httpguard_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/adaptortest"
)

func TestPeers(t *testing.T) {
	serve := func(opts ...httpguard.MiddlewareOption) func(context.Context, *flowctl.Client, []string) bool {
		opts = append(opts, httpguard.WithHeaders("X-Tenant"))
		return func(ctx context.Context, client *flowctl.Client, baggage []string) bool {
			handled := false
			h := httpguard.Middleware(client, adaptortest.ControlPoint, opts...)(
				http.HandlerFunc(func(http.ResponseWriter, *http.Request) { handled = true }))
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", http.NoBody)
			r.Header["Baggage"] = baggage
			r.Header.Set("X-Tenant", "acme")
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if want := map[bool]int{true: http.StatusOK, false: http.StatusTooManyRequests}[handled]; w.Code != want {
				t.Errorf("status %d want %d", w.Code, want)
			}
			return handled
		}
	}
	const label = "http.request.header.x_tenant"
	t.Run("Check", adaptortest.Server{Serve: serve(), Tenant: label}.Test)
	t.Run("CheckHTTP", adaptortest.Server{Serve: serve(httpguard.WithCheckHTTP()), Tenant: label}.Test)
}
