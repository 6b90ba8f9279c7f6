package adaptor_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/baggage"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

func junk(n int) string {
	members := make([]string, n)
	for i := range members {
		members[i] = fmt.Sprintf("a%d=1", i)
	}
	return strings.Join(members, ",")
}

// However much baggage a stranger sends, the label that a limiter goes by is found: the member that a gateway adds, and the
// header or metadata that the service itself lists.
func TestJunkHidesNoLabel(t *testing.T) {
	const tenant = "x-tenant"
	for _, tt := range []struct {
		name    string
		headers []string // of baggage
	}{
		{"no junk", []string{"tenant=acme"}},
		{"63 members", []string{junk(63) + ",tenant=acme"}},
		{"64 members", []string{junk(64) + ",tenant=acme"}},
		{"1000 members", []string{junk(1000) + ",tenant=acme"}},
		{"8 KiB", []string{"a=" + strings.Repeat("1", 8192) + ",tenant=acme"}},
		{"another header", []string{junk(3), "tenant=acme"}},
		{"two headers of junk", []string{junk(64), junk(64) + ",tenant=acme"}},
		{"the stranger's own member", []string{"tenant=other," + junk(64) + ",tenant=acme"}},
	} {
		for _, by := range []string{"tenant", "http.request.header.x_tenant", tenant} {
			for _, named := range []bool{true, false} {
				for _, checkHTTP := range []bool{false, true} {
					grpcCall := by != "http.request.header.x_tenant"
					if checkHTTP && (by == tenant || !named && by == "tenant") { // a header of 8 KiB cannot hold all
						continue
					}
					var opts []flowctl.Option
					if opts = append(opts, flowctl.WithCheckTimeout(time.Minute), flowctl.WithBaggage()); named {
						opts[1] = flowctl.WithBaggage("tenant")
					}
					t.Run(fmt.Sprintf("%s by %s, named %v, CheckHTTP %v", tt.name, by, named, checkHTTP), func(t *testing.T) {
						sides.Setup{
							Policies: sides.Policies(policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Hour, LimitBy: by}),
							Options:  opts,
						}.Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
							httpOpts := []httpguard.MiddlewareOption{httpguard.WithHeaders("X-Tenant")}
							if checkHTTP {
								httpOpts = append(httpOpts, httpguard.WithCheckHTTP())
							}
							if by != tenant {
								h := httpguard.Middleware(side.Client, "point", httpOpts...)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
								request := func() int {
									r := httptest.NewRequest("GET", "/", nil)
									r.Header["Baggage"] = tt.headers
									r.Header.Set("X-Tenant", "acme")
									w := httptest.NewRecorder()
									h.ServeHTTP(w, r)
									return w.Code
								}
								if first, second := request(), request(); first != 200 || second != 429 {
									t.Errorf("HTTP statuses %d, %d want one request of the tenant", first, second)
								}
							}
							if !grpcCall || checkHTTP {
								return
							}
							limiter, err := side.Engine.Component("test", "rate_limiter.0")
							if err == nil {
								err = limiter.Reset("acme")
							}
							if err != nil {
								t.Fatal(err)
							}
							g := grpcguard.UnaryServerInterceptor(side.Client, "point", grpcguard.WithMetadata(tenant))
							call := func() error {
								md := metadata.MD{"baggage": tt.headers, tenant: {"acme"}}
								_, err := g(metadata.NewIncomingContext(t.Context(), md), nil, &grpc.UnaryServerInfo{FullMethod: "/a.B/C"},
									func(context.Context, any) (any, error) { return nil, nil })
								return err
							}
							if first, second := call(), call(); first != nil || second == nil {
								t.Errorf("gRPC errors %v, %v want one call of the tenant", first, second)
							}
						})
					})
				}
			}
		}
	}
}

// What the application has put into the context's baggage by itself stays, whatever a header says.
func TestApplicationsBaggageStays(t *testing.T) {
	sides.Setup{
		Policies: sides.Policies(policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Hour, LimitBy: "tenant"}),
		Options:  []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), flowctl.WithBaggage("tenant")},
	}.Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		h := httpguard.Middleware(side.Client, "point")(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		for i, want := range []int{200, 429} {
			bag, err := baggage.Parse("tenant=acme")
			if err != nil {
				t.Fatal(err)
			}
			r := httptest.NewRequest("GET", "/", nil).WithContext(baggage.ContextWithBaggage(t.Context(), bag))
			r.Header.Set("Baggage", fmt.Sprintf("%s,tenant=t%d", junk(64), i))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != want {
				t.Errorf("status %d want %d", w.Code, want)
			}
		}
	})
}
