package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/failsafe-go/failsafe-go/failsafehttp"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
)

// The handlers that a service without flow control has.
const (
	bareHTTP = "bare HTTP handler"
	bareGRPC = "bare gRPC handler"
)

// adaptorRows are handlers in their adaptors, without a server: that would take most of the time.
func (e *engines) adaptorRows() []*benchtable.Row {
	labels := oneLabel()
	limited := httpguard.Middleware(e.client, rateLimited, httpguard.WithParams(func(*http.Request) flowctl.Params {
		return flowctl.Params{Labels: labels}
	}))
	const failsafe = "failsafe-go HTTP handler, one rate limiter"
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(reply) })
	intercept := grpcguard.UnaryServerInterceptor(e.client, rateLimited, grpcguard.WithParams(
		func(context.Context, grpcguard.Call) flowctl.Params { return flowctl.Params{Labels: labels} }))
	return []*benchtable.Row{
		{Name: "HTTP middleware on the engine", Call: e.request(limited(handler)), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.MoreAllocs, bareHTTP, 6),
			benchtable.Beside(benchtable.InTime, failsafe),
			benchtable.Beside(benchtable.InParallel, failsafe),
		}},
		{Name: bareHTTP, Call: e.request(handler)},
		{Name: failsafe, Call: e.request(failsafehttp.NewHandler(handler,
			ratelimiter.NewBurstyBuilder[*http.Response](1<<30, time.Second).Build()))}, //nolint:bodyclose // no response: the type of what it limits
		{Name: "gRPC interceptor on the engine", Call: e.intercepted(intercept), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.MoreAllocs, bareGRPC, 6),
		}},
		{Name: bareGRPC, Call: e.intercepted(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			return handler(ctx, req)
		})},
	}
}

var reply = []byte("hello")

// nowhere discards responses.
type nowhere struct {
	header http.Header
	status int
}

func (w *nowhere) Header() http.Header         { return w.header }
func (w *nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (w *nowhere) WriteHeader(status int)      { w.status = status }

// request sends a handler the same request over and over.
func (e *engines) request(h http.Handler) func() func() error {
	return func() func() error {
		w := &nowhere{header: make(http.Header)}
		r := httptest.NewRequestWithContext(e.ctx, http.MethodGet, "/orders/7?verbose=1", http.NoBody)
		r.Header.Set("User-Agent", "bench")
		return func() error {
			h.ServeHTTP(w, r)
			if w.status != 0 { // which the handler does not set
				return fmt.Errorf("HTTP status %d", w.status)
			}
			return nil
		}
	}
}

// intercepted calls a handler through an interceptor.
func (e *engines) intercepted(intercept grpc.UnaryServerInterceptor) func() func() error {
	info := &grpc.UnaryServerInfo{FullMethod: "/shop.v1.Orders/Get"}
	handler := func(context.Context, any) (any, error) { return nil, nil }
	return func() func() error {
		ctx := metadata.NewIncomingContext(e.ctx, metadata.Pairs(
			":authority", "shop", "content-type", "application/grpc", "user-agent", "grpc-go/1.85.0"))
		return func() error { _, err := intercept(ctx, nil, info, handler); return err }
	}
}
