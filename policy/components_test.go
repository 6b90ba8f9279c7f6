package policy_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// TestLoadKinds reads files of all shapes, with all kinds of components and all their keys.
func TestLoadKinds(t *testing.T) {
	scheduler := policy.Scheduler{
		Workloads: []policy.Workload{
			{
				Name: "interactive", Labels: policy.LabelMatcher{Equal: map[string]string{"job": "chat"}},
				WorkloadParameters: policy.WorkloadParameters{Priority: 10, Tokens: 2.5, QueueTimeout: 500 * time.Millisecond},
			},
			{WorkloadParameters: policy.WorkloadParameters{Tokens: policy.NoTokens, QueueTimeout: policy.NoQueue}},
		},
		Default: policy.WorkloadParameters{Priority: 0.5}, Margin: 20 * time.Millisecond,
		TokensLabel: "cost", PriorityLabel: "priority", WorkloadLabel: "job", FairnessLabel: "user", DeniedStatus: 429,
	}
	reads := []policy.Selector{{ControlPoint: "search", Labels: policy.LabelMatcher{Equal: map[string]string{"kind": "read"}}}}
	people := policy.LabelMatcher{Require: []policy.Requirement{{Key: "plan", Operator: policy.NotIn, Values: []string{"internal"}}}}

	for _, tt := range []struct {
		file string
		want []policy.Policy // Warnings without the file's name
	}{
		{"kinds.yaml", []policy.Policy{{
			Name: "kinds",
			Components: []policy.Component{
				policy.QuotaScheduler{
					ID: "root.0", Selectors: policy.At("llm"), Capacity: 60, Fill: 30, Interval: time.Minute, LimitBy: "api_key",
					StepFill: true, DelayInitialFill: true, MaxIdle: policy.KeepIdle, MaxDebt: 120, Scheduler: scheduler, Overrides: map[string]policy.Override{
						"acme":   {Capacity: 600, Fill: 300, Interval: 30 * time.Second, MaxDebt: math.SmallestNonzeroFloat64},
						"banned": {Capacity: math.SmallestNonzeroFloat64},
					}, Share: policy.ShareExact, OnOutage: policy.OutageClosed, PassThrough: true, DryRun: true,
				},
				policy.ConcurrencyScheduler{
					ID: "root.1", Selectors: policy.At("export"), Max: 64, MaxInflight: 30 * time.Second, LimitBy: "tenant",
					MaxIdle: time.Minute, Overrides: map[string]policy.Override{"acme": {Max: 128, MaxInflight: time.Minute}}, Local: true, Scheduler: policy.Scheduler{Margin: 1}, PassThrough: true, DryRun: true,
				},
				policy.LoadScheduler{
					ID: "root.3", Selectors: policy.At("db-read"), LoadMultiplier: policy.Named("SHARE"), WorkloadLatencyTokens: true,
					Scheduler: scheduler, DryRun: true,
				},
				policy.AIMDLoadScheduler{
					ID: "root.4", Selectors: policy.At("db-read"),
					Signal:               policy.MeanLatency{Selectors: policy.At("db-read", "db-write"), Over: 30 * time.Second},
					Setpoint:             policy.Constant(90),
					OverloadConfirmation: policy.Named("CPU_IS_HIGH"),
					Gradient:             policy.Gradient{Slope: -0.5, Min: -math.MaxFloat64, Max: math.MaxFloat64},
					MaxLoadMultiplier:    1.5,
					LinearIncrement:      math.SmallestNonzeroFloat64,
					DryRun:               true,
				},
				policy.AIMDLoadScheduler{
					ID: "root.6", Selectors: policy.At("db-write"), Signal: policy.Named("CPU"), Setpoint: policy.Constant(0.8),
					Gradient:        policy.Gradient{Slope: 1, Min: math.SmallestNonzeroFloat64, Max: 2},
					LinearIncrement: 0.0025,
				},
				policy.Sampler{
					ID: "root.7", Selectors: policy.At("new-ui"), AcceptPercentage: 12.5, SessionLabel: "user",
					PassThroughValues: []string{"alice", "carol"}, RampMode: true, DeniedStatus: 404, DryRun: true,
				},
				policy.LoadRamp{
					ID: "root.8", Selectors: policy.At("new-search"),
					Steps: []policy.RampStep{{Target: 1}, {Target: 100, Duration: 5 * time.Minute}},
					Start: true, SessionLabel: "user", PassThroughValues: []string{"bob", ""}, DeniedStatus: 404, Local: true, DryRun: true,
				},
				policy.CalendarQuota{
					ID: "root.9", Selectors: policy.At("prompt"), Amount: 1e6, Period: policy.PeriodWeek, TimeZone: "Europe/Berlin",
					WeekStart: "sunday", LimitBy: "tenant", MaxIdle: policy.KeepIdle, TokensLabel: "cost", MaxDebt: -1, DeniedStatus: 403,
					Overrides: map[string]policy.Override{"acme": {Amount: 5e6, MaxDebt: math.SmallestNonzeroFloat64}},
					OnOutage:  policy.OutageOpen, PassThrough: true, DryRun: true,
				},
				policy.CircuitBreaker{
					ID: "root.10", Selectors: policy.At("prompt"), FailureRatio: 0.5, FailureCount: 20, MinFlows: 10, SlowAfter: 2 * time.Second,
					Window: 10 * time.Second, OpenDuration: 5 * time.Second, Probes: 3, Successes: 2, ProbeTimeout: 30 * time.Second,
					LimitBy: "upstream", Overrides: map[string]policy.Override{"flaky": {FailureRatio: 0.9, FailureCount: 200, MinFlows: 100, OpenDuration: time.Second}}, MaxIdle: policy.KeepIdle, DeniedStatus: 502, PassThrough: true, DryRun: true,
				},
			},
			Warnings: []string{
				"28:42: spec.circuit.components[0].flow_control.quota_scheduler.rate_limiter.lazy_sync.num_sync: not used",
				"28:36: spec.circuit.components[0].flow_control.quota_scheduler.rate_limiter.lazy_sync.enabled: not used: headgate.share is set",
				"59:13: spec.circuit.components[3].flow_control.load_scheduler.out_ports: not used",
				"101:13: spec.circuit.components[8].flow_control.load_ramp.out_ports: not used",
				"10:15: spec.resources.flow_control.flux_meters.idle: not used: no port of a load scheduler names it",
			},
		}}},
		{"fleet.yaml", []policy.Policy{{
			Name: "fleet",
			Components: []policy.Component{
				policy.RateLimiter{Selectors: policy.At("search"), Capacity: 1000, Fill: 1000, Interval: time.Second, LimitBy: "tenant", Share: policy.ShareLeased},
				policy.ConcurrencyLimiter{Selectors: policy.At("payment"), Max: 3, MaxInflight: time.Minute, OnOutage: policy.OutageClosed},
				policy.ConcurrencyLimiter{ID: "memory", Selectors: policy.At("export"), Max: 50, MaxInflight: 10 * time.Minute, Local: true},
			},
		}}},
		{"leased.yaml", []policy.Policy{{
			Name: "leased",
			Components: []policy.Component{
				policy.RateLimiter{
					ID: "root.0", Selectors: policy.At("search"), Capacity: 1000, Fill: 1000, Interval: time.Second, LimitBy: "tenant",
					Share: policy.ShareLeased, OnOutage: policy.OutageClosed,
				},
				policy.RateLimiter{ID: "root.1", Selectors: policy.At("crawl"), Capacity: 10, Fill: 10, Interval: time.Second, Share: policy.ShareLeased},
			},
		}}},
		{"search.yaml", []policy.Policy{{
			Name: "search",
			Components: []policy.Component{
				policy.RateLimiter{
					ID: "root.0", Selectors: []policy.Selector{{ControlPoint: "search", Labels: people}}, Capacity: 40, Fill: 20,
					Interval: time.Second, LimitBy: "tenant", DelayInitialFill: true, TokensLabel: "cost", DeniedStatus: 429,
				},
				policy.ConcurrencyScheduler{
					ID: "root.1", Selectors: policy.At("search"), Max: 64, MaxInflight: 30 * time.Second,
					Scheduler: policy.Scheduler{
						Workloads: []policy.Workload{{
							Name: "paid", Labels: policy.LabelMatcher{Equal: map[string]string{"plan": "paid"}},
							WorkloadParameters: policy.WorkloadParameters{Priority: 100},
						}},
						Default:       policy.WorkloadParameters{Priority: 10, QueueTimeout: 200 * time.Millisecond},
						PriorityLabel: "prio", FairnessLabel: "tenant",
					},
				},
			},
			Warnings: []string{"3:3: circuit.evaluation_interval: not used"},
		}}},
		{"protect-db.yaml", []policy.Policy{{
			Name: "protect-db",
			Components: []policy.Component{policy.AIMDLoadScheduler{
				ID: "root.0", Selectors: policy.At("db-read"), Signal: policy.Named("LATENCY_MS"), Setpoint: policy.Constant(80),
				Gradient: policy.Gradient{Slope: -1, Min: 0.1, Max: 1}, MaxLoadMultiplier: 2, LinearIncrement: 0.025,
				Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{Priority: 1}},
			}},
			Warnings: []string{"17:15: spec.circuit.components[0].flow_control.aimd_load_scheduler.parameters.alerter: not used"},
		}}},
		{"llm-quota.yaml", []policy.Policy{{
			Name: "llm-quota",
			Components: []policy.Component{policy.QuotaScheduler{
				ID: "root.0", Selectors: policy.At("llm-call"), Capacity: 60, Fill: 30, Interval: time.Minute, LimitBy: "api_key",
				Scheduler: policy.Scheduler{TokensLabel: "est_tokens", WorkloadLabel: "job"},
			}},
		}}},
		{"export-slots.yaml", []policy.Policy{{
			Name: "export-slots",
			Components: []policy.Component{policy.ConcurrencyLimiter{
				ID: "root.0", Selectors: policy.At("export"), Max: 5, MaxInflight: 2 * time.Minute, LimitBy: "tenant",
				TokensLabel: "slots", DeniedStatus: 429,
			}},
		}}},
		{"new-ui.yaml", []policy.Policy{{
			Name: "new-ui",
			Components: []policy.Component{policy.LoadRamp{
				ID: "root.0", Selectors: policy.At("new-ui"), Start: true, SessionLabel: "user",
				Steps: []policy.RampStep{{Target: 1}, {Target: 100, Duration: 5 * time.Minute}, {Target: 100, Duration: time.Second}},
			}},
		}}},
		{"new-search.yaml", []policy.Policy{{
			Name: "new-search",
			Components: []policy.Component{policy.LoadRamp{
				ID: "root.0", Selectors: policy.At("new-search"), Start: true, SessionLabel: "user",
				Steps:             []policy.RampStep{{Target: 50, Duration: time.Minute}},
				PassThroughValues: []string{"alice"}, DeniedStatus: 404, DryRun: true,
			}},
			Warnings: []string{"6:3: policy.evaluation_interval: not used"},
		}}},
		{"slow-search.yaml", []policy.Policy{{
			Name: "slow-search",
			Components: []policy.Component{
				policy.AIMDLoadScheduler{
					ID: "root.0", Selectors: []policy.Selector{{ControlPoint: "search", Service: "shop"}},
					Signal:   policy.MeanLatency{Selectors: reads, Over: 30 * time.Second},
					Setpoint: policy.MeanLatency{Selectors: reads, Over: time.Hour, Times: 1.5},
					Gradient: policy.Gradient{Slope: -0.5}, MaxLoadMultiplier: 3, LinearIncrement: 0.05, WorkloadLatencyTokens: true,
					Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: time.Second}}, DryRun: true,
				},
				policy.RateLimiter{ID: "root.2", Selectors: policy.At("search"), Capacity: 20, Fill: 10, Interval: time.Second},
			},
			Warnings: []string{
				"20:7: policy.load_scheduling_core.aimd_load_scheduler.alerter: not used",
				"35:5: policy.latency_baseliner.long_term_query_periodic_interval: not used",
				"31:7: policy.latency_baseliner.flux_meter.static_buckets: not used",
			},
		}}},
		{"shop.yaml", []policy.Policy{
			{Name: "shop-rate", Components: []policy.Component{policy.RateLimiter{
				ID: "root.0", Selectors: []policy.Selector{{ControlPoint: "search", Labels: people}}, Capacity: 40, Fill: 20,
				Interval: time.Second, LimitBy: "tenant", DelayInitialFill: true, TokensLabel: "cost", DeniedStatus: 503, DryRun: true,
			}}},
			{
				Name: "shop-slots",
				Components: []policy.Component{policy.ConcurrencyScheduler{
					ID: "root.0", Selectors: policy.At("search"), Max: 64, MaxInflight: 30 * time.Second,
					Scheduler: policy.Scheduler{FairnessLabel: "tenant"},
				}},
				Warnings: []string{"22:5: policy.concurrency_scheduler.alerter: not used"},
			},
			{Name: "shop-load", Components: []policy.Component{policy.AIMDLoadScheduler{
				ID: "root.0", Selectors: policy.At("search"),
				Signal:   policy.MeanLatency{Selectors: policy.At("search"), Over: 30 * time.Second},
				Setpoint: policy.MeanLatency{Selectors: policy.At("search"), Over: 30 * time.Minute, Times: 1.25},
			}}},
		}},
	} {
		t.Run(tt.file, func(t *testing.T) {
			file := "testdata/" + tt.file
			got, err := policy.Load(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range got {
				for i, w := range p.Warnings {
					p.Warnings[i] = strings.TrimPrefix(w, file+":")
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Load(%s) (-want +got):\n%s", file, diff)
			}
		})
	}
}

// Valid plain policies, for tests to break.
const (
	quota = `circuit:
  components:
    - flow_control:
        quota_scheduler:
          selectors: [{control_point: llm}]
          in_ports: {bucket_capacity: {constant_signal: {value: 10}}, fill_amount: {constant_signal: {value: 5}}}
          rate_limiter: {interval: 1s}
          scheduler:
            workloads: [{name: chat, label_matcher: {}, parameters: {priority: 2}}, {label_matcher: {}}]
            default_workload_parameters: {tokens: 1}
            decision_deadline_margin: 1s
`
	load = `circuit:
  components:
    - flow_control:
        load_scheduler:
          in_ports: {load_multiplier: {signal_name: SHARE}}
          parameters: {selectors: [{control_point: db}]}
    - query: {promql: {query_string: up, out_ports: {output: {signal_name: UP}}}}
    - variable: {constant_output: {value: 0.5}, out_ports: {output: {signal_name: HALF}}}
`
	aimd = `circuit:
  components:
    - flow_control:
        aimd_load_scheduler:
          in_ports: {signal: {signal_name: LATENCY}, setpoint: {constant_signal: {value: 80}}}
          parameters:
            gradient: {slope: -1}
            max_load_multiplier: 2
            load_scheduler: {selectors: [{control_point: db}]}
`
	ramp = `circuit:
  components:
    - flow_control:
        load_ramp:
          in_ports: {forward: {signal_name: GO}}
          parameters:
            sampler: {selectors: [{control_point: ui}]}
            steps: [{target_accept_percentage: 1, duration: 0s}]
    - bool_variable: {constant_output: true, out_ports: {output: {signal_name: GO}}}
`
	sampler = `circuit:
  components:
    - flow_control:
        sampler:
          in_ports: {accept_percentage: {constant_signal: {value: 10}}}
          parameters: {selectors: [{control_point: ui}], ramp_mode: false}
`
)

func TestComponentErrors(t *testing.T) {
	const at = "circuit.components[0].flow_control."
	for _, tt := range []struct {
		name, policy string
		edit         []string // old and new text
		want         string
	}{
		{"empty quota scheduler", "circuit: {components: [{flow_control: {quota_scheduler: {}}}]}", nil, "" +
			"limits.yaml:1:57: " + at + "quota_scheduler.in_ports.bucket_capacity: is required\n" +
			"limits.yaml:1:57: " + at + "quota_scheduler.in_ports.fill_amount: is required\n" +
			"limits.yaml:1:57: " + at + "quota_scheduler.selectors: is required\n" +
			"limits.yaml:1:57: " + at + "quota_scheduler.rate_limiter.interval: is required"},
		{"empty concurrency scheduler", "circuit: {components: [{flow_control: {concurrency_scheduler: {}}}]}", nil, "" +
			"limits.yaml:1:63: " + at + "concurrency_scheduler.in_ports.max_concurrency: is required\n" +
			"limits.yaml:1:63: " + at + "concurrency_scheduler.selectors: is required\n" +
			"limits.yaml:1:63: " + at + "concurrency_scheduler.concurrency_limiter.max_inflight_duration: is required"},
		{"empty load scheduler", "circuit: {components: [{flow_control: {load_scheduler: {}}}]}", nil, "" +
			"limits.yaml:1:56: " + at + "load_scheduler.parameters.selectors: is required\n" +
			"limits.yaml:1:56: " + at + "load_scheduler.in_ports.load_multiplier: is required"},
		{"empty AIMD load scheduler", "circuit: {components: [{flow_control: {aimd_load_scheduler: {}}}]}", nil, "" +
			"limits.yaml:1:61: " + at + "aimd_load_scheduler.parameters.gradient.slope: is required\n" +
			"limits.yaml:1:61: " + at + "aimd_load_scheduler.parameters.load_scheduler.selectors: is required\n" +
			"limits.yaml:1:61: " + at + "aimd_load_scheduler.in_ports.signal: is required\n" +
			"limits.yaml:1:61: " + at + "aimd_load_scheduler.in_ports.setpoint: is required"},
		{
			"empty sampler", "circuit: {components: [{flow_control: {sampler: {}}}]}", nil,
			"limits.yaml:1:49: " + at + "sampler.parameters.selectors: is required",
		},
		{"empty load ramp", "circuit: {components: [{flow_control: {load_ramp: {}}}]}", nil, "" +
			"limits.yaml:1:51: " + at + "load_ramp.parameters.sampler.selectors: is required\n" +
			"limits.yaml:1:51: " + at + "load_ramp.parameters.steps: is required"},

		{"unknown key of a scheduler", quota, []string{"decision_deadline_margin", "decision_deadline"}, "" +
			"limits.yaml:11:13: " + at + `quota_scheduler.scheduler.decision_deadline: unknown key; did you mean "decision_deadline_margin"?`},
		{"unknown key of a workload", quota, []string{"priority", "prioritty"}, "" +
			"limits.yaml:9:70: " + at + `quota_scheduler.scheduler.workloads[0].parameters.prioritty: unknown key; did you mean "priority"?`},
		{"parameters of another kind", quota, []string{"rate_limiter", "concurrency_limiter"}, "" +
			"limits.yaml:4:9: " + at + "quota_scheduler.rate_limiter.interval: is required\n" +
			"limits.yaml:7:11: " + at + "quota_scheduler.concurrency_limiter: unknown key; it belongs in flow_control or concurrency_scheduler"},
		{
			"workload without a matcher", quota,
			[]string{"{label_matcher: {}}", "{name: x}"},
			"limits.yaml:9:85: " + at + "quota_scheduler.scheduler.workloads[1].label_matcher: is required",
		},
		{
			"workload named default", quota,
			[]string{"chat", "default"},
			"limits.yaml:9:32: " + at + `quota_scheduler.scheduler.workloads[0].name: "default" is what flows without a workload have`,
		},
		{
			"workload named like another's index", quota,
			[]string{"chat", `"1"`},
			"limits.yaml:9:32: " + at + `quota_scheduler.scheduler.workloads[0].name: "1" is the index of another workload`,
		},
		{
			"workloads of one name", quota,
			[]string{"{label_matcher: {}}", "{label_matcher: {}, name: chat}"},
			"limits.yaml:9:111: " + at + `quota_scheduler.scheduler.workloads[1].name: "chat" is the name of workload 0 too`,
		},
		{
			"matcher of a workload", quota,
			[]string{"label_matcher: {}, ", "label_matcher: {match_list: [{key: k, operator: in, values: [x]}]}, "},
			"limits.yaml:9:86: " + at + `quota_scheduler.scheduler.workloads[0].label_matcher.match_list[0].operator: unknown operator "in"; did you mean "In"?`,
		},
		{
			"long label of a workload", quota,
			[]string{"label_matcher: {}, ", "label_matcher: {match_labels: {" + strings.Repeat("l", 256) + ": x}}, "},
			"limits.yaml:9:69: " + at + "quota_scheduler.scheduler.workloads[0].label_matcher.match_labels." + strings.Repeat("l", 40) + "…: name is longer than 255 bytes",
		},
		{
			"long labels of a scheduler", quota,
			[]string{"decision_deadline_margin: 1s", "" +
				"tokens_label_key: " + strings.Repeat("l", 256) + "\n            priority_label_key: " + strings.Repeat("l", 256) +
				"\n            workload_label_key: " + strings.Repeat("l", 256) + "\n            fairness_label_key: " + strings.Repeat("l", 256)},
			"limits.yaml:11:31: " + at + "quota_scheduler.scheduler.tokens_label_key: is longer than 255 bytes\n" +
				"limits.yaml:12:33: " + at + "quota_scheduler.scheduler.priority_label_key: is longer than 255 bytes\n" +
				"limits.yaml:13:33: " + at + "quota_scheduler.scheduler.workload_label_key: is longer than 255 bytes\n" +
				"limits.yaml:14:33: " + at + "quota_scheduler.scheduler.fairness_label_key: is longer than 255 bytes",
		},
		{
			"long label of a quota scheduler", quota,
			[]string{"interval: 1s", "interval: 1s, limit_by_label_key: " + strings.Repeat("l", 256)},
			"limits.yaml:7:60: " + at + "quota_scheduler.rate_limiter.limit_by_label_key: is longer than 255 bytes",
		},
		{
			"long label of a concurrency scheduler",
			"circuit: {components: [{flow_control: {concurrency_scheduler: {selectors: [{control_point: a}], in_ports: " +
				"{max_concurrency: {constant_signal: {value: 1}}},\n  concurrency_limiter: {max_inflight_duration: 1s, limit_by_label_key: " +
				strings.Repeat("l", 256) + "}}}}]}", nil,
			"limits.yaml:2:72: " + at + "concurrency_scheduler.concurrency_limiter.limit_by_label_key: is longer than 255 bytes",
		},
		{"priority of 0", quota, []string{"2}", "0}"}, "limits.yaml:9:80: " + at + "quota_scheduler.scheduler.workloads[0].parameters.priority: must be a number above 0, is 0"},
		{
			"infinite priority", quota,
			[]string{"2}", ".inf}"},
			"limits.yaml:9:80: " + at + "quota_scheduler.scheduler.workloads[0].parameters.priority: must be a number from 0 up, is +Inf",
		},
		{
			"negative tokens", quota,
			[]string{"tokens: 1", "tokens: -1"},
			"limits.yaml:10:51: " + at + "quota_scheduler.scheduler.default_workload_parameters.tokens: must be a number from 0 up, is -1",
		},
		{
			"tokens that are not a number", quota,
			[]string{"tokens: 1", "tokens: .nan"},
			"limits.yaml:10:51: " + at + "quota_scheduler.scheduler.default_workload_parameters.tokens: must be a finite number, is NaN",
		},
		{
			"negative timeout", quota,
			[]string{"tokens: 1", "queue_timeout: -1s"},
			"limits.yaml:10:58: " + at + "quota_scheduler.scheduler.default_workload_parameters.queue_timeout: must not be negative, is -1s",
		},
		{
			"timeout without a unit", quota,
			[]string{"tokens: 1", "queue_timeout: 1"},
			"limits.yaml:10:58: " + at + `quota_scheduler.scheduler.default_workload_parameters.queue_timeout: want a duration such as "1.5s", have a number`,
		},
		{
			"negative margin", quota,
			[]string{"margin: 1s", "margin: -1s"},
			"limits.yaml:11:39: " + at + "quota_scheduler.scheduler.decision_deadline_margin: must not be negative, is -1s",
		},
		{
			"status of a scheduler", quota,
			[]string{"decision_deadline_margin: 1s", "denied_response_status_code: OK"},
			"limits.yaml:11:42: " + at + `quota_scheduler.scheduler.denied_response_status_code: unknown error status "OK"`,
		},
		{
			"port that wants a constant", quota,
			[]string{"constant_signal: {value: 10}", "signal_name: CAP"},
			"limits.yaml:6:53: " + at + `quota_scheduler.in_ports.bucket_capacity.signal_name: unsupported circuit: signal "CAP" is not constant`,
		},
		{
			"capacity", quota,
			[]string{"10", "-10"},
			"limits.yaml:6:39: " + at + "quota_scheduler.in_ports.bucket_capacity: must be a number from 0 up, is -10",
		},

		{
			"computed signal", load,
			[]string{"SHARE", "UP"},
			"limits.yaml:5:53: " + at + `load_scheduler.in_ports.load_multiplier.signal_name: unsupported circuit: signal "UP" comes from a component that is not supported`,
		},
		{
			"signal of a scheduler", load,
			[]string{"SHARE}}", "IT}}\n          out_ports: {observed_load_multiplier: {signal_name: IT}}"},
			"limits.yaml:5:53: " + at + `load_scheduler.in_ports.load_multiplier.signal_name: unsupported circuit: signal "IT" comes from a component that is not supported`,
		},
		{
			"signal without a name", load,
			[]string{"SHARE", "''"},
			"limits.yaml:5:53: " + at + "load_scheduler.in_ports.load_multiplier.signal_name: needs a name",
		},
		{
			"name that is a number", load,
			[]string{"SHARE", "7"},
			"limits.yaml:5:53: " + at + "load_scheduler.in_ports.load_multiplier.signal_name: want a string, have a number; quote it",
		},
		{
			"signal that is not a number", load,
			[]string{"signal_name: SHARE", "constant_signal: {value: .nan}"},
			"limits.yaml:5:39: " + at + "load_scheduler.in_ports.load_multiplier: must be a finite number, is NaN",
		},
		{
			"special value", load,
			[]string{"signal_name: SHARE", "constant_signal: {special_value: NaN}"},
			"limits.yaml:5:73: " + at + "load_scheduler.in_ports.load_multiplier.constant_signal.special_value: special_value is not supported",
		},
		{
			"port without a variant", load,
			[]string{"signal_name: SHARE", ""},
			"limits.yaml:5:39: " + at + "load_scheduler.in_ports.load_multiplier: wants one of constant_signal, signal_name",
		},
		{
			"name of a key of dynamicConfig", load,
			[]string{"parameters:", "dry_run_config_key: true\n          parameters:"},
			"limits.yaml:6:31: " + at + "load_scheduler.dry_run_config_key: want a string, have a boolean; quote it",
		},
		{
			"flux meter without selectors", load,
			[]string{"circuit:", "resources: {flow_control: {flux_meters: {SHARE: {}}}}\ncircuit:"},
			"limits.yaml:1:49: resources.flow_control.flux_meters.SHARE.selectors: is required",
		},
		{
			"long control point of a flux meter", load,
			[]string{"circuit:", "resources: {flow_control: {flux_meters: {SHARE: {selectors: [{control_point: " + strings.Repeat("c", 256) + "}]}}}}\ncircuit:"},
			"limits.yaml:1:78: resources.flow_control.flux_meters.SHARE.selectors[0].control_point: is longer than 255 bytes",
		},
		{
			"flux meter of something else", load,
			[]string{"circuit:", "resources: {flow_control: {flux_meters: {SHARE: {selectors: [{control_point: a}], attribute_key: bytes}}}}\ncircuit:"},
			`limits.yaml:1:98: resources.flow_control.flux_meters.SHARE.attribute_key: want workload_duration_ms, have "bytes"`,
		},

		{
			"slope of 0", aimd,
			[]string{"-1", "0"},
			"limits.yaml:7:31: " + at + "aimd_load_scheduler.parameters.gradient.slope: must not be 0",
		},
		{
			"no slope", aimd,
			[]string{"slope: -1", "max_gradient: 1"},
			"limits.yaml:7:23: " + at + "aimd_load_scheduler.parameters.gradient.slope: is required",
		},
		{
			"gradient's bounds", aimd,
			[]string{"-1}", "-1, min_gradient: 2, max_gradient: 1}"},
			"limits.yaml:7:49: " + at + "aimd_load_scheduler.parameters.gradient.min_gradient: must not be above the maximum of 1, is 2",
		},
		{
			"gradient", aimd,
			[]string{"{slope: -1}", "-1"},
			"limits.yaml:7:23: " + at + "aimd_load_scheduler.parameters.gradient: want a mapping, have a number",
		},
		{
			"multiplier of 0", aimd,
			[]string{"max_load_multiplier: 2", "max_load_multiplier: 0"},
			"limits.yaml:8:34: " + at + "aimd_load_scheduler.parameters.max_load_multiplier: must be a number above 0, is 0",
		},
		{
			"negative increment", aimd,
			[]string{"max_load_multiplier: 2", "load_multiplier_linear_increment: -1"},
			"limits.yaml:8:47: " + at + "aimd_load_scheduler.parameters.load_multiplier_linear_increment: must be a number from 0 up, is -1",
		},

		{"no steps", ramp, []string{"[{target_accept_percentage: 1, duration: 0s}]", "[]"}, "limits.yaml:8:20: " + at + "load_ramp.parameters.steps: needs at least one step"},
		{"step without a target", ramp, []string{"target_accept_percentage: 1, ", ""}, "limits.yaml:8:21: " + at + "load_ramp.parameters.steps[0].target_accept_percentage: is required"},
		{"step without a duration", ramp, []string{", duration: 0s", ""}, "limits.yaml:8:21: " + at + "load_ramp.parameters.steps[0].duration: is required"},
		{
			"target", ramp,
			[]string{": 1,", ": 101,"},
			"limits.yaml:8:48: " + at + "load_ramp.parameters.steps[0].target_accept_percentage: must be a percentage from 0 to 100, is 101",
		},
		{"duration of a step", ramp, []string{"0s", "-1s"}, "limits.yaml:8:61: " + at + "load_ramp.parameters.steps[0].duration: must not be negative, is -1s"},
		{
			"port of a ramp", ramp,
			[]string{"{forward: {signal_name: GO}}", "{forward: {signal_name: GO}, reset: {signal_name: NO}}"},
			"limits.yaml:5:71: " + at + `load_ramp.in_ports.reset.signal_name: unsupported circuit: signal "NO" is not constant`,
		},
		{
			"status of a ramp", ramp,
			[]string{"sampler: {", "sampler: {denied_response_status_code: 1, "},
			"limits.yaml:7:52: " + at + "load_ramp.parameters.sampler.denied_response_status_code: must be an HTTP status from 400 to 599, is 1",
		},

		{
			"long label of a ramp", ramp,
			[]string{"sampler: {", "sampler: {session_label_key: " + strings.Repeat("l", 256) + ", "},
			"limits.yaml:7:42: " + at + "load_ramp.parameters.sampler.session_label_key: is longer than 255 bytes",
		},
		{
			"long label of a sampler", sampler,
			[]string{"ramp_mode: false", "session_label_key: " + strings.Repeat("l", 256)},
			"limits.yaml:6:77: " + at + "sampler.parameters.session_label_key: is longer than 255 bytes",
		},
		{"percentage", sampler, []string{"10", "110"}, "limits.yaml:5:41: " + at + "sampler.in_ports.accept_percentage: must be a percentage from 0 to 100, is 110"},
		{
			"pass-through values", sampler,
			[]string{"parameters:", "pass_through_label_values: [~, 7]\n          parameters:"},
			"limits.yaml:6:39: " + at + "sampler.pass_through_label_values[0]: want a string, have nothing\n" +
				"limits.yaml:6:42: " + at + "sampler.pass_through_label_values[1]: want a string, have a number; quote it",
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

func TestComponentValues(t *testing.T) {
	signal := func(s policy.Signal) policy.Component {
		return policy.LoadScheduler{ID: "root.0", Selectors: policy.At("db"), LoadMultiplier: s}
	}
	sampling := func(percentage float64, rampMode bool) policy.Component {
		return policy.Sampler{ID: "root.0", Selectors: policy.At("ui"), AcceptPercentage: percentage, RampMode: rampMode}
	}
	starting := func(start bool) policy.Component {
		return policy.LoadRamp{ID: "root.0", Selectors: policy.At("ui"), Steps: []policy.RampStep{{Target: 1}}, Start: start}
	}
	const port = "{accept_percentage: {constant_signal: {value: 10}}}"
	for _, tt := range []struct {
		name, policy string
		edit         []string // old and new text
		want         policy.Component
	}{
		{"named signal", load, nil, signal(policy.Named("SHARE"))},
		{"constant signal", load, []string{"signal_name: SHARE", "constant_signal: {value: -1}"}, signal(policy.Constant(-1))},
		{"variable signal", load, []string{"SHARE", "HALF"}, signal(policy.Constant(0.5))},
		{
			"flux meter",
			load,
			[]string{"circuit:", "resources: {flow_control: {flux_meters: {SHARE: {selectors: [{control_point: a}]}}}}\ncircuit:"},
			signal(policy.MeanLatency{Selectors: policy.At("a"), Over: 30 * time.Second}),
		},
		{
			"variable before a flux meter",
			load,
			[]string{"circuit:", "resources: {flow_control: {flux_meters: {HALF: {}}}}\ncircuit:", "SHARE", "HALF"},
			signal(policy.Constant(0.5)),
		},
		{"sampler", sampler, nil, sampling(10, false)},
		{"sampler without a percentage", sampler, []string{port, "{}"}, sampling(100, false)},
		{"ramp sampler without a percentage", sampler, []string{port, "{}", "ramp_mode: false", "ramp_mode: true"}, sampling(0, true)},
		{"moving ramp", ramp, nil, starting(true)},
		{"standing ramp", ramp, []string{"forward: {signal_name: GO}", "forward: {constant_signal: {value: 0}}"}, starting(false)},
		{"unconnected ramp", ramp, []string{"{forward: {signal_name: GO}}", "{}"}, starting(false)},
		{"ramp that goes back", ramp, []string{"{forward:", "{backward: {signal_name: GO}, forward:"}, starting(false)},
		{"ramp that is reset", ramp, []string{"{forward:", "{reset: {constant_signal: {value: 1}}, forward:"}, starting(false)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := policy.Parse("limits.yaml", []byte(editIn(t, tt.policy, tt.edit...)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]policy.Component{tt.want}, got[0].Components); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
		})
	}
}
