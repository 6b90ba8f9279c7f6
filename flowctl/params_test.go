package flowctl_test

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/flowctl"
)

func TestParamsClone(t *testing.T) {
	client := noPolicies(t)
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

// Tests compare Params, by go-cmp too.
func TestParamsEqual(t *testing.T) {
	full := func() flowctl.Params {
		return flowctl.Params{
			Labels: map[string]string{"k": "v"}, CheckTimeout: time.Second, RampMode: true, OnUnreachable: flowctl.FailClosed,
			GlobalCacheKeys: []string{"g"}, HTTP: &flowctl.HTTPRequest{Path: "/", Headers: map[string]string{"a": "b"}},
		}
	}
	for _, tt := range []struct {
		name string
		p, q flowctl.Params
		want bool
	}{
		{"zero", flowctl.Params{}, flowctl.Params{}, true},
		{"full", full(), full(), true},
		{"a clone", full(), full().Clone(), true},
		{"another label", flowctl.Params{Labels: map[string]string{"k": "v"}}, flowctl.Params{Labels: map[string]string{"k": "w"}}, false},
		{"another request", full(), flowctl.Params{HTTP: &flowctl.HTTPRequest{Path: "/other"}}, false},
		{"a function and none", flowctl.Params{IsFailure: func(error) bool { return true }}, flowctl.Params{}, false},
		{
			"two functions",
			flowctl.Params{IsFailure: func(error) bool { return true }},
			flowctl.Params{IsFailure: func(error) bool { return false }},
			true,
		},
		{
			"empty and nil",
			flowctl.Params{Labels: map[string]string{}, GlobalCacheKeys: []string{}, HTTP: &flowctl.HTTPRequest{}},
			flowctl.Params{HTTP: &flowctl.HTTPRequest{Headers: map[string]string{}}},
			true,
		},
		{"a request and none", flowctl.Params{HTTP: &flowctl.HTTPRequest{}}, flowctl.Params{}, false},
	} {
		if got := tt.p.Equal(tt.q); got != tt.want || cmp.Equal(tt.p, tt.q) != got {
			t.Errorf("%s: Equal() = %v, and cmp.Equal() = %v want %v", tt.name, got, cmp.Equal(tt.p, tt.q), tt.want)
		}
	}
}

// No field is forgotten by Equal.
func TestParamsEqualSeesEveryField(t *testing.T) {
	values := map[reflect.Type]any{
		reflect.TypeFor[map[string]string](): map[string]string{"k": "v"}, reflect.TypeFor[time.Duration](): time.Second,
		reflect.TypeFor[bool](): true, reflect.TypeFor[flowctl.UnreachablePolicy](): flowctl.FailClosed, reflect.TypeFor[string](): "text",
		reflect.TypeFor[[]string](): []string{"text"}, reflect.TypeFor[func(error) bool](): func(error) bool { return true },
		reflect.TypeFor[*flowctl.HTTPRequest](): new(flowctl.HTTPRequest), reflect.TypeFor[int64](): int64(1),
		reflect.TypeFor[netip.AddrPort](): netip.MustParseAddrPort("127.0.0.1:1"),
	}
	check := func(kind reflect.Type, equal func(changed reflect.Value) bool) {
		for i := range kind.NumField() {
			field := kind.Field(i)
			if !field.IsExported() {
				continue
			}
			changed := reflect.New(kind)
			changed.Elem().Field(i).Set(reflect.ValueOf(values[field.Type]))
			if equal(changed) {
				t.Errorf("%s.%s makes no difference", kind, field.Name)
			}
		}
	}
	check(reflect.TypeFor[flowctl.Params](), func(changed reflect.Value) bool {
		return changed.Elem().Interface().(flowctl.Params).Equal(flowctl.Params{})
	})
	check(reflect.TypeFor[flowctl.HTTPRequest](), func(changed reflect.Value) bool {
		return flowctl.Params{HTTP: changed.Interface().(*flowctl.HTTPRequest)}.Equal(flowctl.Params{HTTP: new(flowctl.HTTPRequest)})
	})
}
