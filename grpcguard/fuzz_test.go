package grpcguard_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
	"github.com/headgate-go/headgate/labels"
)

// FuzzMetadata checks that whatever a peer sends, and whichever method it calls, the call is a flow that can be asked
// about, whose labels are within the limits, show no credential, and are the application's where it has any.
func FuzzMetadata(f *testing.F) {
	f.Add("/shop.v1.Orders/Get", "x-tenant", "acme", "tier=gold,region=eu")
	f.Add("/s/m", "rpc.method", "other", "rpc.method=other,user=1")
	f.Add("/s/m", "authorization", "Bearer s", "authorization=s")
	f.Add("/s/m", "Cookie", "s", "tier=%ff")
	f.Add("/s/m", "trace-bin", "\xff\x00", "=,;=%")
	f.Add("/s/m", "user", "1", strings.Repeat("tier=1,", 2000))
	f.Add("", strings.Repeat("k", 300), strings.Repeat("ü", 3000), "tier="+strings.Repeat("v", 8000))
	f.Add("\xff"+strings.Repeat("x", 5000)+"/m", "", "", "")

	f.Fuzz(func(t *testing.T, fullMethod, key, value, sentBaggage string) {
		s := embeddedSide(t, false)
		opts := []grpcguard.Option{
			grpcguard.WithoutDefaultSkips(),
			grpcguard.WithMetadata(key, "user"),
			grpcguard.WithParams(func(context.Context, grpcguard.Call) flowctl.Params {
				return flowctl.Params{Labels: set{"plan": "free"}}
			}),
		}
		md := metadata.MD{key: {value, value}, strings.ToLower(key): {value}, "baggage": {sentBaggage}, "plan": {value}, "unlisted": {value}}
		ctx := labels.With(t.Context(), "user", "42")
		_, err := grpcguard.UnaryServerInterceptor(s.starts, point, opts...)(metadata.NewIncomingContext(ctx, md), nil,
			&grpc.UnaryServerInfo{FullMethod: fullMethod}, func(context.Context, any) (any, error) { return nil, nil })
		if err != nil {
			t.Errorf("server: %v", err)
		}
		err = grpcguard.UnaryClientInterceptor(s.starts, point, opts...)(metadata.NewOutgoingContext(ctx, md), fullMethod, nil, nil, nil,
			func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil })
		if err != nil {
			t.Errorf("client: %v", err)
		}

		all := s.labels()
		if len(all) != 2 {
			t.Fatalf("%d checks want 2", len(all))
		}
		for i, got := range all {
			side := []string{"server", "client"}[i]
			if err := labels.Check(got); err != nil {
				t.Errorf("%s: %v", side, err)
			}
			if got["user"] != "42" || got["plan"] != "free" {
				t.Errorf("%s: user = %q, plan = %q want 42, free", side, got["user"], got["plan"])
			}
			if len(fullMethod) < labels.MaxValueLen && !strings.HasSuffix(strings.ToValidUTF8(fullMethod, "\uFFFD"), got["rpc.method"]) {
				t.Errorf("%s: rpc.method = %q of %q", side, got["rpc.method"], fullMethod)
			}
			known := []string{"rpc.service", "rpc.method", "user", "plan", "tier", strings.ToLower(key)}
			for name := range got {
				if !slices.Contains(known, name) || strings.HasSuffix(name, "-bin") ||
					slices.Contains([]string{"authorization", "cookie", "x-api-key"}, name) {
					t.Errorf("%s lets %q out", side, name)
				}
			}
		}
		if ok := (ended{point, flowctl.StatusOK}); !slices.Equal(s.ends(), []ended{ok, ok}) {
			t.Errorf("the agent saw the ends %v want two", s.ends())
		}
	})
}
