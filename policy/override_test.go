package policy_test

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// limitedFile is a file with one component that has a label, and the override in its place.
func limitedFile(kind, parameters, override string) []byte {
	under := map[string]string{"quota_scheduler": "rate_limiter", "concurrency_scheduler": "concurrency_limiter"}[kind]
	if under == "" {
		under = "parameters"
	}
	ports := ""
	switch kind {
	case "rate_limiter", "quota_scheduler":
		ports = "in_ports: {bucket_capacity: {constant_signal: {value: 9}}, fill_amount: {constant_signal: {value: 9}}}"
	case "concurrency_limiter", "concurrency_scheduler":
		ports = "in_ports: {max_concurrency: {constant_signal: {value: 9}}}"
	}
	return []byte(fmt.Sprintf(`circuit:
  components:
    - flow_control:
        %s:
          selectors: [{control_point: point}]
          %s
          %s: {limit_by_label_key: tenant, %s,
            overrides: {Zeta: %s}}
`, kind, ports, under, parameters, override))
}

// What is wrong with an override, in Go and in a file. The errors do not say the value, which may be a customer's name. In the order of
// the values, Zeta is the first.
func TestOverrideMistakes(t *testing.T) {
	at := policy.At("point")
	rate := func(o policy.Override) policy.Component {
		return policy.RateLimiter{
			Selectors: at, Capacity: 9, Fill: 9, Interval: time.Second, LimitBy: "tenant",
			Overrides: map[string]policy.Override{"Zeta": o, "acme": {Capacity: 1}},
		}
	}
	breaker := func(o policy.Override) policy.Component {
		return policy.CircuitBreaker{
			Selectors: at, FailureRatio: 0.5, Window: time.Minute, OpenDuration: time.Minute, LimitBy: "tenant",
			Overrides: map[string]policy.Override{"Zeta": o},
		}
	}
	const noNumber = "names no number"
	for _, tt := range []struct {
		name             string
		c                policy.Component
		field, want      string // of the Go value
		kind, parameters string // of the file; "" for none
		override         string
		key, inFile      string // if it is not want
	}{
		{"no number", rate(policy.Override{}), "[0]", noNumber, "rate_limiter", "interval: 1s", "{}", "[0]", noNumber},
		{"nothing", rate(policy.Override{}), "[0]", noNumber, "rate_limiter", "interval: 1s", "~", "[0]", "is required"},
		{"negative", rate(policy.Override{Capacity: -1}), "[0].Capacity", "must be a number from 0 up, is -1", "rate_limiter", "interval: 1s", "{capacity: -1}", "[0].capacity", ""},
		{"not a number", rate(policy.Override{Fill: math.NaN()}), "[0].Fill", "must be a number from 0 up, is NaN", "rate_limiter", "interval: 1s", "{fill: .nan}", "[0].fill", ""},
		{"no time", rate(policy.Override{Interval: -1}), "[0].Interval", "must be positive, is -1ns", "rate_limiter", "interval: 1s", "{interval: 0s}", "[0].interval", "must be positive, is 0s"},
		{"debt without a label for the cost", rate(policy.Override{MaxDebt: 1}), "[0].MaxDebt", "needs a TokensLabel: without one no flow owes anything", "rate_limiter", "interval: 1s", "{max_debt: 1}", "[0].max_debt", ""},
		{"a number of another kind", rate(policy.Override{Max: 5}), "[0].Max", "a rate_limiter has no such number", "rate_limiter", "interval: 1s", "{max: 5}", "[0].max", "unknown key"},
		{"a misspelt number", rate(policy.Override{}), "[0]", noNumber, "rate_limiter", "interval: 1s", "{capacty: 5}", "[0].capacty", `unknown key; did you mean "capacity"?`},
		{"slots", policy.ConcurrencyLimiter{Selectors: at, Max: 1, MaxInflight: 1, LimitBy: "tenant", Overrides: map[string]policy.Override{"Zeta": {Max: math.Inf(1)}}}, "[0].Max", "must be a number from 0 up, is +Inf", "concurrency_limiter", "max_inflight_duration: 1s", "{max: -1}", "[0].max", "must be a number from 0 up, is -1"},
		{"places", policy.ConcurrencyScheduler{Selectors: at, Max: 1, MaxInflight: 1, LimitBy: "tenant", Overrides: map[string]policy.Override{"Zeta": {MaxInflight: -1}}}, "[0].MaxInflight", "must be positive, is -1ns", "concurrency_scheduler", "max_inflight_duration: 1s", "{max_inflight: -1s}", "[0].max_inflight", "must be positive, is -1s"},
		{"calendar", policy.CalendarQuota{Selectors: at, Amount: 1, Period: policy.PeriodDay, LimitBy: "tenant", Overrides: map[string]policy.Override{"Zeta": {Amount: -1}}}, "[0].Amount", "must be a number from 0 up, is -1", "calendar_quota", "amount: 1, period: day", "{amount: -1}", "[0].amount", ""},
		{"queue", policy.QuotaScheduler{Selectors: at, Interval: 1, LimitBy: "tenant", Overrides: map[string]policy.Override{"Zeta": {MaxDebt: 1}}}, "[0].MaxDebt", "needs a Scheduler.TokensLabel: without one no flow owes anything", "quota_scheduler", "interval: 1s", "{max_debt: 1}", "[0].max_debt", ""},
		{"share", breaker(policy.Override{FailureRatio: 2}), "[0].FailureRatio", "must be a share from 0 to 1, is 2", "circuit_breaker", "failure_ratio: 1, window: 1s, open_duration: 1s", "{failure_ratio: 2}", "[0].failure_ratio", ""},
		{"a breaker that never opens", breaker(policy.Override{FailureRatio: math.SmallestNonzeroFloat64}), "[0]", "needs a failure ratio or a failure count above 0: without one it never opens", "circuit_breaker", "failure_ratio: 1, window: 1s, open_duration: 1s", "{failure_ratio: 0}", "[0]", ""},
		{"no count", breaker(policy.Override{FailureCount: -1}), "[0].FailureCount", "must be a whole number from 0 to 2147483647, is -1", "circuit_breaker", "failure_ratio: 1, window: 1s, open_duration: 1s", "{min_flows: 0}", "[0].min_flows", "must be a whole number above 0"},
		{"no label", policy.RateLimiter{Selectors: at, Interval: 1, Overrides: map[string]policy.Override{"Zeta": {Capacity: 1}}}, "", "needs a LimitBy: without a label there are no values that could have other numbers", "", "", "", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := policy.Policy{Name: "p", Components: []policy.Component{tt.c}}.Validate()
			if err == nil {
				t.Fatal("Validate = nil")
			}
			if diff := cmp.Diff(`policy "p": components[0].Overrides`+tt.field+": "+tt.want, err.Error()); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
			if tt.kind == "" {
				return
			}
			_, err = policy.Parse("limits.yaml", limitedFile(tt.kind, tt.parameters, tt.override))
			if err == nil {
				t.Fatal("Parse = nil")
			}
			if tt.inFile == "" {
				tt.inFile = tt.want
			}
			first, _, _ := strings.Cut(err.Error(), "\n")
			if !strings.HasPrefix(first, "limits.yaml:8:") || !strings.Contains(first, ".overrides"+tt.key+": "+tt.inFile) || strings.Contains(err.Error(), "Zeta") {
				t.Errorf("Parse = %q want %s: %s", first, tt.key, tt.inFile)
			}
		})
	}
}

// A value that flows hardly have is worth a warning, and the other numbers of the file hold.
func TestOverrideOfOddValue(t *testing.T) {
	file := strings.Replace(string(limitedFile("rate_limiter", "interval: 1s", "{capacity: 5}")), "{Zeta:", `{"acme]": {fill: 3}, Zeta:`, 1)
	policies, err := policy.Parse("limits.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]policy.Override{"acme]": {Fill: 3}, "Zeta": {Capacity: 5}}
	if diff := cmp.Diff(want, policies[0].Components[0].(policy.RateLimiter).Overrides); diff != "" {
		t.Errorf("Overrides (-want +got):\n%s", diff)
	}
	if w := strings.Join(policies[0].Warnings, "; "); !strings.Contains(w, "overrides[1]: flows hardly have this value") || strings.Contains(w, "acme") {
		t.Errorf("Warnings = %q", w)
	}
}

// A file with ten thousand overrides is read in a moment.
func TestManyOverrides(t *testing.T) {
	var many strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&many, "              tenant-%d: {capacity: %d, fill: 1}\n", i, i+1)
	}
	file := strings.Replace(string(limitedFile("rate_limiter", "interval: 1s", "~")), "{Zeta: ~}}", "{\n"+strings.ReplaceAll(many.String(), "}\n", "},\n")+"              }}", 1)
	policies, err := policy.Parse("limits.yaml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	all := policies[0].Components[0].(policy.RateLimiter).Overrides
	if want := (policy.Override{Capacity: 10_000, Fill: 1}); len(all) != 10_000 || all["tenant-9999"] != want {
		t.Errorf("%d overrides, the last %+v want %+v", len(all), all["tenant-9999"], want)
	}
}

// No error shows the value that an override is for, which may be the name of a customer. Each says where it is.
func TestErrorsHideOverridden(t *testing.T) {
	const short = "headgate: 1\npolicies:\n- name: p\n  components:\n  - rate_limiter: {at: [s], limit_by: u, capacity: 1, fill: 1, interval: 1s, overrides: "
	const aperture = "circuit:\n  components:\n  - flow_control:\n      rate_limiter:\n        selectors: [{control_point: s}]\n" +
		"        in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 1}}}\n" +
		"        parameters: {interval: 1s, limit_by_label_key: u, overrides: "
	const secret = "0419"
	for _, wrong := range []string{
		`{"0419": {capacity: 1}, "0419": {capacity: 2}}`, `{"0419": {capcity: 1}}`, `{"0419": {max: 1}}`, `{"0419": {capacity: -1}}`,
		`{"0419": {capacity: x}}`, `{"0419": {<<: 1}}`, `{"0419": {<<: {}, <<: {}}}`, `{"0419": {capacity: 1, capacity: 2}}`, `{"0419": [1]}`,
		`{"0419": 3}`, `{"0419": }`, `{0419: {capacity: 1}}`, `{0_419: {capacity: 1}}`, `{? ["0419"] : 3}`, `{? {"0419": 1} : 3}`,
		`{"0419": {capacity: __REQUIRED_FIELD__}}`, `{"0419": {__REQUIRED_FIELD__: 1}}`, `{"0419__REQUIRED_FIELD__": {capacity: 1}}`,
		`{"0419": {interval: 1}}`, `{"0419": {interval: 0s}}`, `{"0419": {max_debt: 1}}`, `{"0419": !!str 3}`, `{"0419": *x}`, `["0419": {capacity: 1}]`,
		`{"0419" {capacity: 1}}`, `{"0419": {capacity: 1}`, `{"0419": {capacity: 1}, b: `, `{"0419\xff": {}}`, `{"0419` + "\xff" + `": {}}`, `{"0419` + "\x01" + `": {}}`,
	} {
		for format, head := range map[string]string{"short": short, "aperture": aperture} {
			_, err := policy.Parse("limits.yaml", []byte(head+wrong+"}\n"))
			switch {
			case err == nil:
				t.Errorf("%s: %s is no error", format, wrong)
			case strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "0_419"):
				t.Errorf("%s: %s: %v", format, wrong, err)
			case !strings.HasPrefix(err.Error(), "limits.yaml:"):
				t.Errorf("%s: %s: %v want it to say where", format, wrong, err)
			}
		}
	}
	for _, kept := range []string{`"0419": &a {capacity: __REQUIRED_FIELD__}`, `a: {"0419": [__REQUIRED_FIELD__]}`, `"0419__REQUIRED_FIELD__": 1`} {
		_, err := policy.Parse("limits.yaml", []byte("x-tenants: {"+kept+"}\n"+short+"{}}\n"))
		if err == nil || strings.Contains(err.Error(), secret) || !strings.HasPrefix(err.Error(), "limits.yaml:1:") {
			t.Errorf("%s: %v", kept, err)
		}
	}
}
