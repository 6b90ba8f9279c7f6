package flowctl_test

import (
	"strings"
	"testing"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
)

func TestParamsClone(t *testing.T) {
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	good, bad := map[string]string{"k": "v"}, map[string]string{"k": strings.Repeat("v", 4097)}
	for _, tt := range []struct {
		name   string
		params func() flowctl.Params
		want   flowctl.Decision
	}{
		{"no labels", func() flowctl.Params { return flowctl.Params{}.Clone() }, flowctl.Accepted},
		{"good", func() flowctl.Params { return flowctl.Params{Labels: good}.Clone() }, flowctl.Accepted},
		{"bad", func() flowctl.Params { return flowctl.Params{Labels: bad}.Clone() }, flowctl.Invalid},
		{"bad afterwards", func() flowctl.Params {
			labels := map[string]string{"k": "v"}
			p := flowctl.Params{Labels: labels}.Clone()
			labels["k"] = bad["k"]
			return p
		}, flowctl.Accepted},
		{"good replaced by bad", func() flowctl.Params {
			p := flowctl.Params{Labels: good}.Clone()
			p.Labels = bad
			return p
		}, flowctl.Invalid},
		{"none replaced by bad", func() flowctl.Params {
			p := flowctl.Params{}.Clone()
			p.Labels = bad
			return p
		}, flowctl.Invalid},
		{"good replaced by none", func() flowctl.Params {
			p := flowctl.Params{Labels: good}.Clone()
			p.Labels = nil
			return p
		}, flowctl.Accepted},
		{"bad replaced by good", func() flowctl.Params {
			p := flowctl.Params{Labels: bad}.Clone()
			p.Labels = good
			return p
		}, flowctl.Accepted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flow := client.Start(t.Context(), "cp", tt.params())
			if got := flow.Decision(); got != tt.want {
				t.Errorf("Decision() = %v want %v", got, tt.want)
			}
			_, _ = flow.End(t.Context())
		})
	}

	keys := []string{"a"}
	p := flowctl.Params{GlobalCacheKeys: keys}.Clone()
	keys[0] = "b"
	if got := p.GlobalCacheKeys[0]; got != "a" {
		t.Errorf("GlobalCacheKeys[0] = %q after its original has changed, want %q", got, "a")
	}
}
