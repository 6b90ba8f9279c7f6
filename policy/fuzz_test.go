package policy_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/policy"
)

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatalf("testdata: %v, %v", files, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, seed := range []string{
		"", "---\n...\n", "a: &x {b: [*x, *y]}\n<<: *x\n", "circuit: {components: [{flow_control: {sampler: {}}}]}",
		"blueprint: load-ramping\npolicy: {load_ramp: {steps: [~, {}]}, drivers: {promql_drivers: [x]}}", "blueprint: [x]\npolicy: *y",
		"blueprint: load-scheduling/average-latency\npolicy: {load_scheduling_core: 1, latency_baseliner: {flux_meter: []}}",
		"resources: {flow_control: {flux_meters: {a: &a {selectors: [*a]}}}}\ncircuit: {components: [{flow_control: {load_scheduler: {in_ports: {load_multiplier: {signal_name: a}}}}}]}",
		"circuit: {components: [{flow_control: {quota_scheduler: {scheduler: {workloads: [{name: '1'}, {name: default}, ~]}}}}, {query: {out_ports: {x: {signal_name: 1}}}}]}",
		"a: |+\n\n b\n", "? a\n: b\n", "{a: b c: d, \"e\": [f\tg]}", "x-a: &a {k.l: 1}\n\"b\\n\": *a\n", "!!str a: !x\n", "%YAML 1.2\n---\n", "\xff\xfe", "{a, b: , [c]: d}", "- - -\n -", "a: 'b\n\n",
		"{\"circuit\": {}}\n---\n# c\n[a: b]\n...\n%YAML 1.2\n", "a: &a {<<: [*a]}\nb: 010\n", "a: b\n  - c\n", "a: {b: c\nd}\r\ne: \"\\q\"\r}\n---\n]\n",
		"circuit: {components: [{flow_control: {rate_limiter: {in_ports: {interval: __REQUIRED_FIELD__}, parametrs: {}}}}]}",
		"circuit: {components: [{flow_control: {calendar_quota: {selectors: [{control_point: a}], parameters: {amount: 1, period: week, week_start: sunday, time_zone: Asia/Kolkata}}}}]}",
		"circuit: {components: [{flow_control: {circuit_breaker: {selectors: [{control_point: a}], parameters: {failure_count: 2147483647, window: 5ms, open_duration: 1ns}}}}]}",
		"circuit: {components: [{flow_control: {circuit_breaker: {parameters: {failure_ratio: .nan, failure_count: 1.5, min_flows: 1e300, probes: -1, window: 1ns}}}}]}",
		"circuit: {components: [{flow_control: {calendar_quota: {in_ports: {pass_through: ~}, parameters: {amount: .nan, period: 1, week_start: [], time_zone: ../../etc}}}}]}",
		"circuit: {components: [{flow_control: {rate_limiter: {headgate: {local: ~, share: leased, on_outage: []}, parameters: {lazy_sync: {enabled: true, num_sync: .nan}}}}}]}",
		"circuit: {components: [{flow_control: {load_ramp: {headgate: {on_outage: open}}}}, {flow_control: {circuit_breaker: {headgate: 1}}}]}",
		"headgate: 1\npolicies: [{name: a, components: [{quota_scheduler: {at: [b], capacity: 1, fill: 1, interval: 1s, local: false, share: leased, on_outage: closed}}]}]\n",
		"headgate: 1\npolicies: [{name: a, components: [{sampler: {headgate: {share: ''}, local: true}}, {calendar_quota: {share: \"\\0\", on_outage: ~}}]}]\n",
		"headgate: 1\npolicies: [{name: a, components: [{rate_limiter: {at: [b], capacity: 0, fill: 1e300, interval: 1ns, max_idle: 0s}}]}, {name: c}, ~]\n",
		"headgate: 1\npolicies: [{name: a, components: [{sampler: {selectors: [{control_point: b, when: {c: \"\\0\"}, expression: {all: []}}], accept_percentage: 1}}]}]\n---\npolicies: 1\n",
		"headgate: .nan\npolicies: [[], {name: [], components: [{aimd_load_scheduler: {signal: {mean_latency: ~}, gradient: 1}}, {load_ramp: {steps: [~]}}, {}]}]",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		policies, err := policy.Parse("fuzz.yaml", data)
		if (err == nil) != (len(policies) > 0) {
			t.Fatalf("Parse = %d policies, %v", len(policies), err)
		}
		for _, p := range policies {
			if err := p.Validate(); err != nil {
				t.Errorf("Parse gave an invalid policy: %v", err)
			}
			for _, warning := range p.Warnings {
				if !strings.HasPrefix(warning, "fuzz.yaml:") || strings.Contains(warning, "\n") {
					t.Errorf("warning %q, want one line that begins with a position", warning)
				}
			}
		}
		if len(policies) > 0 {
			if len(data) < 1<<10 { // what aliases stand for may be more than a file may have
				roundTrip(t, policies)
			}
			if e, err := engine.New(policies, signals(policies)...); err != nil {
				t.Errorf("the engine refuses what Parse gave: %v", err)
			} else {
				_ = e.Close()
			}
		}
		problems := each(err)
		if len(problems) > 20 {
			problems = problems[:20] // the rest is only counted
		}
		for _, err := range problems {
			var e *policy.Error
			if !errors.As(err, &e) {
				t.Fatalf("%T is no *policy.Error: %v", err, err)
			}
			if e.File != "fuzz.yaml" || e.Line < 1 || e.Column < 1 || e.Message == "" {
				t.Errorf("Error = %#v, want file, position and message", e)
			}
			if len(e.Message) > 300 {
				t.Errorf("Message has %d bytes: %s", len(e.Message), e.Message)
			}
		}
	})
}

// each returns the errors that err joins, or only err.
func each(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err != nil {
		return []error{err}
	}
	return nil
}

// signals provides the signals that the policies leave to the engine's host.
func signals(policies []policy.Policy) []engine.Option {
	var opts []engine.Option
	known := map[policy.Named]bool{}
	provide := func(signals ...policy.Signal) {
		for _, s := range signals {
			if name, ok := s.(policy.Named); ok && !known[name] {
				known[name] = true
				opts = append(opts, engine.WithSignal(string(name), func() float64 { return 1 }))
			}
		}
	}
	for _, p := range policies {
		for _, c := range p.Components {
			switch c := c.(type) {
			case policy.LoadScheduler:
				provide(c.LoadMultiplier)
			case policy.AIMDLoadScheduler:
				provide(c.Signal, c.Setpoint, c.OverloadConfirmation)
			}
		}
	}
	return opts
}
