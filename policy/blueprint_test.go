package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// Values of blueprints, for tests to break.
const (
	ramping = `blueprint: load-ramping/base
policy:
  policy_name: new-ui
  start: true
  load_ramp:
    sampler: {selectors: [{control_point: ui}]}
    steps: [{target_accept_percentage: 1, duration: 0s}]
`
	latency = `blueprint: load-scheduling/average-latency
policy:
  policy_name: slow
  load_scheduling_core:
    aimd_load_scheduler: {load_scheduler: {selectors: [{control_point: db}]}}
  latency_baseliner:
    flux_meter: {selectors: [{control_point: db, agent_group: x}]}
    latency_tolerance_multiplier: 2
`
)

func TestBlueprintErrors(t *testing.T) {
	const known = "want one of concurrency-limiting/base, concurrency-scheduling/base, load-ramping/base, " +
		"load-scheduling/average-latency, quota-scheduling/base, rate-limiting/base"
	for _, tt := range []struct {
		name, policy string
		edit         []string // old and new text
		want         string
	}{
		{
			"unknown blueprint", values,
			[]string{"rate-limiting/base", "load-scheduling/promql"},
			`limits.yaml:1:12: blueprint: unsupported blueprint "load-scheduling/promql"; ` + known,
		},
		{"blueprint without its kind", values, []string{"rate-limiting/base", "load-scheduling"}, `limits.yaml:1:12: blueprint: unsupported blueprint "load-scheduling"; ` + known},
		{"no blueprint", values, []string{"rate-limiting/base", ""}, "limits.yaml:1:1: blueprint: is required"},
		{"blueprint that is a number", values, []string{"rate-limiting/base", "1"}, "limits.yaml:1:12: blueprint: want a string, have a number; quote it"},
		{"no policy", values, []string{"policy:", "x-policy:"}, "" +
			"limits.yaml:1:1: policy.rate_limiter: is required\n" +
			"limits.yaml:1:1: policy.policy_name: is required"},
		{"no block", values, []string{"  rate_limiter:", "  components: []\nx-rest:"}, "limits.yaml:2:1: policy.rate_limiter: is required"},
		{
			"block of another blueprint", values,
			[]string{"rate_limiter", "quota_scheduler"},
			"limits.yaml:2:1: policy.rate_limiter: is required\n" +
				"limits.yaml:4:3: policy.quota_scheduler: unknown key; it belongs in flow_control",
		},
		{"no name", values, []string{"policy_name: per-tenant", "components: []"}, "limits.yaml:2:1: policy.policy_name: is required"},
		{"unknown key", values, []string{"policy_name", "name: x\n  policy_name"}, "limits.yaml:3:3: policy.name: unknown key; did you mean \"policy_name\"?"},
		{"unknown key at the top", values, []string{"policy:", "polcy: {}\npolicy:"}, `limits.yaml:2:1: polcy: unknown key; did you mean "policy"?`},
		{"unknown key of the block", values, []string{"fill_amount", "fill_amout"}, "" +
			"limits.yaml:4:3: policy.rate_limiter.fill_amount: is required\n" +
			`limits.yaml:6:5: policy.rate_limiter.fill_amout: unknown key; did you mean "fill_amount"?`},
		{"port of a circuit", values, []string{"fill_amount", "in_ports: {}\n    fill_amount"}, "limits.yaml:6:5: policy.rate_limiter.in_ports: unknown key; what it has in a circuit stands beside the other keys here"},
		{
			"pass-through", values,
			[]string{"fill_amount", "pass_through: 1\n    fill_amount"},
			"limits.yaml:6:5: policy.rate_limiter.pass_through: unknown key; it belongs in calendar_quota.in_ports or circuit_breaker.in_ports or concurrency_limiter.in_ports, for example",
		},
		{
			"port that is not a number", values,
			[]string{"bucket_capacity: 10", "bucket_capacity: {constant_signal: {value: 10}}"},
			"limits.yaml:5:22: policy.rate_limiter.bucket_capacity: want a number, have a mapping",
		},
		{"capacity", values, []string{"10", "-10"}, "limits.yaml:5:22: policy.rate_limiter.bucket_capacity: must be a number from 0 up, is -10"},
		{
			"long label", values,
			[]string{"tenant}", strings.Repeat("l", 256) + "}"},
			"limits.yaml:8:52: policy.rate_limiter.parameters.limit_by_label_key: is longer than 255 bytes",
		},
		{"interval", values, []string{"1s", "0s"}, "limits.yaml:8:28: policy.rate_limiter.parameters.interval: must be positive, is 0s"},
		{
			"additional component", values,
			[]string{"policy_name", "components: [{flow_control: {sampler: {}}}]\n  policy_name"},
			"limits.yaml:3:41: policy.components[0].flow_control.sampler.parameters.selectors: is required",
		},
		{
			"classifiers", values,
			[]string{"policy_name", "resources: {flow_control: {classifiers: [{}]}}\n  policy_name"},
			"limits.yaml:3:43: policy.resources.flow_control.classifiers: classifiers are not supported",
		},
		{
			"drivers", ramping,
			[]string{"start: true", "drivers: {average_latency_drivers: [{}], percentile_latency_drivers: [{}], promql_drivers: [{}], other_drivers: []}"},
			"limits.yaml:4:38: policy.drivers.average_latency_drivers: drivers of load ramps are not supported\n" +
				"limits.yaml:4:72: policy.drivers.percentile_latency_drivers: drivers of load ramps are not supported\n" +
				"limits.yaml:4:94: policy.drivers.promql_drivers: drivers of load ramps are not supported\n" +
				"limits.yaml:4:100: policy.drivers.other_drivers: unknown key",
		},
		{
			"drivers of the kubelet", ramping,
			[]string{"start: true", "kubelet_metrics: {criteria: {}}"},
			"limits.yaml:4:20: policy.kubelet_metrics: drivers of load ramps are not supported",
		},
		{"start", ramping, []string{"true", "1"}, "limits.yaml:4:10: policy.start: want a boolean, have a number"},
		{"no steps", ramping, []string{"[{target_accept_percentage: 1, duration: 0s}]", "[]"}, "limits.yaml:7:12: policy.load_ramp.steps: needs at least one step"},
		{"no ramp", ramping, []string{"load_ramp:", "components:\nx-rest:"}, "limits.yaml:2:1: policy.load_ramp: is required"},
		{
			"setting", ramping,
			[]string{"policy:", "dynamicConfig: {start: 1, reset: x}\npolicy:"},
			"limits.yaml:2:24: dynamicConfig.start: want a boolean, have a number\n" +
				"limits.yaml:2:34: dynamicConfig.reset: want a boolean, have a string; write true or false",
		},
		{
			"overload confirmations", latency,
			[]string{"    aimd_load", "    overload_confirmations: [{}]\n    kubelet_overload_confirmations: {criteria: {}}\n    aimd_load"},
			"limits.yaml:5:29: policy.load_scheduling_core.overload_confirmations: overload confirmations are not supported\n" +
				"limits.yaml:6:37: policy.load_scheduling_core.kubelet_overload_confirmations: overload confirmations are not supported",
		},
		{"no core", latency, []string{"load_scheduling_core:", "components:\nx-rest:", "  latency_baseliner:", "y:", "    flux", "    x-flux"}, "" +
			"limits.yaml:2:1: policy.load_scheduling_core: is required\n" +
			"limits.yaml:2:1: policy.latency_baseliner: is required\n" +
			"limits.yaml:7:1: y: unknown key"},
		{"no scheduler", latency, []string{"aimd_load_scheduler: {load_scheduler: {selectors: [{control_point: db}]}}", "dry_run: true"}, "limits.yaml:4:3: policy.load_scheduling_core.aimd_load_scheduler: is required"},
		{
			"another scheduler", latency,
			[]string{"aimd_load_scheduler:", "adaptive_load_scheduler:"},
			"limits.yaml:4:3: policy.load_scheduling_core.aimd_load_scheduler: is required\n" +
				`limits.yaml:5:5: policy.load_scheduling_core.adaptive_load_scheduler: unknown key; did you mean "aimd_load_scheduler"?`,
		},
		{
			"no flux meter", latency,
			[]string{"flux_meter: {selectors: [{control_point: db, agent_group: x}]}", "long_term_query_interval: 1s"},
			"limits.yaml:6:3: policy.latency_baseliner.flux_meter.selectors: is required",
		},
		{
			"flux meter", latency,
			[]string{"{control_point: db, agent_group: x}]", "{}], bucket: 1"},
			"limits.yaml:7:30: policy.latency_baseliner.flux_meter.selectors[0].control_point: is required\n" +
				"limits.yaml:7:35: policy.latency_baseliner.flux_meter.bucket: unknown key",
		},
		{
			"tolerance of 0", latency,
			[]string{"multiplier: 2", "multiplier: 0"},
			"limits.yaml:8:35: policy.latency_baseliner.latency_tolerance_multiplier: must be a number above 0, is 0",
		},
		{
			"interval of days", latency,
			[]string{"latency_tolerance_multiplier: 2", "long_term_query_interval: 86401s"},
			"limits.yaml:8:31: policy.latency_baseliner.long_term_query_interval: must be positive and at most 24h0m0s, is 24h0m1s",
		},
		{
			"slope of 0", latency,
			[]string{"aimd_load_scheduler: {", "aimd_load_scheduler: {gradient: {slope: 0}, "},
			"limits.yaml:5:45: policy.load_scheduling_core.aimd_load_scheduler.gradient.slope: must not be 0",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			policies, err := policy.Parse("limits.yaml", []byte(editIn(t, tt.policy, tt.edit...)))
			if err == nil {
				t.Fatalf("Parse = %+v, want an error", policies)
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBlueprintNames(t *testing.T) {
	for _, name := range []string{"rate-limiting", "rate-limiting/base"} {
		got, err := policy.Parse("x.yaml", []byte(editIn(t, values, "rate-limiting/base", name)))
		if err != nil || len(got) != 1 || got[0].Name != "per-tenant" {
			t.Errorf("Parse of blueprint %s = %+v, %v, want a policy", name, got, err)
		}
	}
}

func TestRampSettings(t *testing.T) {
	for _, tt := range []struct {
		name, start, dynamic string
		want                 bool
		values               []string
		warnings             []string
	}{
		{name: "start", start: "true", dynamic: "{}", want: true},
		{name: "not", start: "false", dynamic: "{}"},
		{name: "started", start: "false", dynamic: "{start: true}", want: true},
		{name: "stopped", start: "true", dynamic: "{start: false}"},
		{name: "reset", start: "true", dynamic: "{reset: true}"},
		{name: "not reset", start: "true", dynamic: "{reset: false}", want: true},
		{name: "values", start: "false", dynamic: `{pass_through_label_values: [a, ""]}`, values: []string{"a", ""}},
		{
			name: "unknown", start: "false", dynamic: "{rollout: true}",
			warnings: []string{"x.yaml:2:26: dynamicConfig.rollout: not used: nothing has this config key"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := editIn(t, ramping, "true", tt.start, "policy:", "dynamicConfig: "+tt.dynamic+"\npolicy:")
			want := []policy.Policy{{
				Name: "new-ui",
				Components: []policy.Component{policy.LoadRamp{
					ID: "root.0", Selectors: policy.At("ui"), Steps: []policy.RampStep{{Target: 1}},
					Start: tt.want, PassThroughValues: tt.values,
				}},
				Warnings: tt.warnings,
			}}
			got, err := policy.Parse("x.yaml", []byte(data))
			if diff := cmp.Diff(want, got); diff != "" || err != nil {
				t.Errorf("Parse: %v (-want +got):\n%s", err, diff)
			}
		})
	}
}

// TestMeterWarnsOnce reads a flux meter that is both signal and setpoint.
func TestMeterWarnsOnce(t *testing.T) {
	got, err := policy.Parse("x.yaml", []byte(latency))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"x.yaml:7:50: policy.latency_baseliner.flux_meter.selectors[0].agent_group: not used"}
	if diff := cmp.Diff(want, got[0].Warnings); diff != "" {
		t.Errorf("Warnings (-want +got):\n%s", diff)
	}
}
