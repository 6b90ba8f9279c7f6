package adaptor_test

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/adaptor"
)

func TestGuardDefaults(t *testing.T) {
	g := adaptor.New[string](nil, "fixed")
	if flow := g.Client.Start(t.Context(), "fixed", g.ParamsOf(t.Context(), "call")); flow.Decision() != flowctl.Accepted {
		t.Errorf("without a client the decision is %s want accepted", flow.Decision())
	}
	g.AddSkip(nil)
	if g.Skip(t.Context(), "call") {
		t.Error("a call is skipped that nothing skips")
	}
	if got := g.ControlPoint(t.Context(), "call"); got != "fixed" {
		t.Errorf("ControlPoint() = %q want %q", got, "fixed")
	}
}

func TestGuard(t *testing.T) {
	g := adaptor.New[string](nil, "fixed")
	g.PointOf = func(_ context.Context, call string) string { return call }
	g.Params = func(_ context.Context, call string) flowctl.Params { return flowctl.Params{ResultCacheKey: call} }
	g.AddSkip(func(_ context.Context, call string) bool { return call == "a" })
	g.AddSkip(func(_ context.Context, call string) bool { return call == "b" })
	for call, want := range map[string]struct {
		point string
		skip  bool
	}{"": {"fixed", false}, "a": {"a", true}, "b": {"b", true}, "c": {"c", false}} {
		if got := g.ControlPoint(t.Context(), call); got != want.point {
			t.Errorf("ControlPoint(%q) = %q want %q", call, got, want.point)
		}
		if got := g.Skip(t.Context(), call); got != want.skip {
			t.Errorf("Skip(%q) = %t want %t", call, got, want.skip)
		}
		if got := g.ParamsOf(t.Context(), call); got.ResultCacheKey != call {
			t.Errorf("ParamsOf(%q) are another call's", call)
		}
	}
}

func TestWithBaggage(t *testing.T) {
	member, err := baggage.NewMember("own", "1")
	if err != nil {
		t.Fatal(err)
	}
	own, err := baggage.New(member)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		own     bool // the application has put baggage into the context
		headers []string
		want    string
	}{
		"none":              {},
		"one":               {headers: []string{"a=1"}, want: "a=1"},
		"several":           {headers: []string{"a=1", "b=2"}, want: "a=1,b=2"},
		"a bad member":      {headers: []string{"=,a=1"}, want: "a=1"},
		"nothing good":      {headers: []string{"="}},
		"the application's": {own: true, headers: []string{"a=1"}, want: "own=1"},
		"no header":         {own: true, want: "own=1"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			if tt.own {
				ctx = baggage.ContextWithBaggage(ctx, own)
			}
			got := baggage.FromContext(adaptor.WithBaggage(ctx, tt.headers))
			want, err := baggage.Parse(tt.want)
			if err != nil && tt.want != "" {
				t.Fatal(err)
			}
			if got.Len() != want.Len() {
				t.Fatalf("baggage %q want %q", got, tt.want)
			}
			for _, m := range want.Members() {
				if got.Member(m.Key()).Value() != m.Value() {
					t.Errorf("baggage %q want %q", got, tt.want)
				}
			}
		})
	}
}
