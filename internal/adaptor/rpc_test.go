package adaptor_test

import (
	"context"
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/baggage"
	"google.golang.org/grpc/codes"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/labels"
)

func methodOf(call string) string { return call }

func TestRPCSkips(t *testing.T) {
	infrastructure := []string{
		"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
	}
	for name, tt := range map[string]struct {
		noDefaults bool
		calls      []string
		want       bool
	}{
		"infrastructure":                  {calls: infrastructure, want: true},
		"infrastructure without defaults": {noDefaults: true, calls: infrastructure},
		"others":                          {calls: []string{"/shop.v1.Orders/Get", "/grpc.health.v1.Health/../Check", "/grpc.health.v1.Healthy/Check", ""}},
		"the adaptor's own":               {noDefaults: true, calls: []string{"/own"}, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := adaptor.NewRPC[string](nil, "fixed", nil)
			g.NoDefaultSkips = tt.noDefaults
			g.AddSkip(func(_ context.Context, call string) bool { return call == "/own" })
			g.Ready(methodOf)
			for _, call := range tt.calls {
				if got := g.Skip(t.Context(), call); got != tt.want {
					t.Errorf("Skip(%q) = %t want %t", call, got, tt.want)
				}
			}
		})
	}
}

func TestRPCLabels(t *testing.T) {
	own := map[string]string{"rpc.service": "shop.v1.Orders", "rpc.method": "Get"}
	for name, tt := range map[string]struct {
		sent, want map[string]string
	}{
		"no metadata":                     {want: own},
		"empty metadata":                  {sent: map[string]string{}, want: own},
		"metadata":                        {sent: map[string]string{"tenant": "acme"}, want: map[string]string{"rpc.service": "shop.v1.Orders", "rpc.method": "Get", "tenant": "acme"}},
		"metadata with the labels' names": {sent: map[string]string{"rpc.service": "other", "rpc.method": "other"}, want: own},
		"metadata that cannot be a label": {sent: map[string]string{"": "acme"}, want: own},
		"metadata called baggage":         {sent: map[string]string{"baggage": "a=1"}, want: map[string]string{"rpc.service": "shop.v1.Orders", "rpc.method": "Get", "baggage": "a=1"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := adaptor.NewRPC[string](nil, "fixed", nil)
			g.Ready(methodOf)
			for direction, ctx := range map[string]context.Context{
				"in":  g.Incoming(t.Context(), "/shop.v1.Orders/Get", []string{"user=7"}, maps.Clone(tt.sent)),
				"out": g.Outgoing(t.Context(), "/shop.v1.Orders/Get", maps.Clone(tt.sent)),
			} {
				explicit, transport, err := labels.FromContext(ctx)
				if diff := cmp.Diff(tt.want, transport); diff != "" || len(explicit) > 0 || err != nil {
					t.Errorf("%s: labels %v, %v (-want +got):\n%s", direction, explicit, err, diff)
				}
				if got := baggage.FromContext(ctx).Member("user").Value(); (got == "7") != (direction == "in") {
					t.Errorf("%s: the baggage has the user %q", direction, got)
				}
			}
			// What was sent with this call is not shared with the next.
			_, transport, _ := labels.FromContext(g.Outgoing(t.Context(), "/shop.v1.Orders/Get", nil))
			if diff := cmp.Diff(own, transport); diff != "" {
				t.Errorf("the next call's labels (-want +got):\n%s", diff)
			}
		})
	}
}

// The guard's IsFailure is for Params that have none.
func TestGuardIsFailure(t *testing.T) {
	never := func(error) bool { return false }
	always := func(error) bool { return true }
	for name, tt := range map[string]struct {
		guard, params func(error) bool
		set, want     bool
	}{
		"none":        {},
		"the guard's": {guard: always, set: true, want: true},
		"the Params'": {params: always, set: true, want: true},
		"both":        {guard: never, params: always, set: true, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			g := adaptor.NewRPC[string](nil, "fixed", tt.guard)
			if tt.params != nil {
				g.Params = func(context.Context, string) flowctl.Params { return flowctl.Params{IsFailure: tt.params} }
			}
			got := g.ParamsOf(t.Context(), "call").IsFailure
			if (got != nil) != tt.set || got != nil && got(errBroken) != tt.want {
				t.Errorf("the flow's IsFailure is set: %t, want %t which returns %t", got != nil, tt.set, tt.want)
			}
		})
	}
}

func TestIsFailureCode(t *testing.T) {
	failures := map[codes.Code]bool{
		codes.Unknown: true, codes.DeadlineExceeded: true, codes.Unimplemented: true, codes.Internal: true,
		codes.Unavailable: true, codes.DataLoss: true,
	}
	for code := range codes.Code(100) {
		if got, want := adaptor.IsFailureCode(code), failures[code] || code > 16; got != want {
			t.Errorf("IsFailureCode(%v) = %t want %t", code, got, want)
		}
	}
}
