package policy_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/policy"
)

// sharers are components of all kinds that engines can share. Each file has SHARING where the keys of a store stand, and so has each
// blueprint.
func sharers() []struct{ name, short, circuit, blueprint string } {
	const (
		bucket = "in_ports: {bucket_capacity: {constant_signal: {value: 9}}, fill_amount: {constant_signal: {value: 9}}}, selectors: [{control_point: a}], headgate: {SHARING}, "
		slots  = "in_ports: {max_concurrency: {constant_signal: {value: 9}}}, selectors: [{control_point: a}], headgate: {SHARING}, "
		steps  = "sampler: {selectors: [{control_point: a}]}, steps: [{target_accept_percentage: 9, duration: 0}]"
		plain  = "bucket_capacity: 9, fill_amount: 9, selectors: [{control_point: a}], headgate: {SHARING}, "
		slotsB = "max_concurrency: 9, selectors: [{control_point: a}], headgate: {SHARING}, "
	)
	return []struct{ name, short, circuit, blueprint string }{
		{
			"rate_limiter", "at: [a], capacity: 9, fill: 9, interval: 1s, SHARING",
			bucket + "parameters: {interval: 1s}", "blueprint: rate-limiting\npolicy: {policy_name: p, rate_limiter: {" + plain + "parameters: {interval: 1s}}}",
		},
		{
			"quota_scheduler", "at: [a], capacity: 9, fill: 9, interval: 1s, SHARING",
			bucket + "rate_limiter: {interval: 1s}", "blueprint: quota-scheduling\npolicy: {policy_name: p, quota_scheduler: {" + plain + "rate_limiter: {interval: 1s}}}",
		},
		{
			"concurrency_limiter", "at: [a], max: 9, max_inflight: 1s, SHARING", slots + "parameters: {max_inflight_duration: 1s}",
			"blueprint: concurrency-limiting\npolicy: {policy_name: p, concurrency_limiter: {" + slotsB + "parameters: {max_inflight_duration: 1s}}}",
		},
		{
			"concurrency_scheduler", "at: [a], max: 9, max_inflight: 1s, SHARING", slots + "concurrency_limiter: {max_inflight_duration: 1s}",
			"blueprint: concurrency-scheduling\npolicy: {policy_name: p, concurrency_scheduler: {" + slotsB + "concurrency_limiter: {max_inflight_duration: 1s}}}",
		},
		{"calendar_quota", "at: [a], amount: 9, period: day, SHARING", "selectors: [{control_point: a}], parameters: {amount: 9, period: day}, headgate: {SHARING}", ""},
		{
			"load_ramp", "at: [a], steps: [{target: 9, duration: 0}], SHARING", "parameters: {" + steps + "}, headgate: {SHARING}",
			"blueprint: load-ramping\npolicy: {policy_name: p, load_ramp: {" + steps + ", headgate: {SHARING}}}",
		},
	}
}

// sharing is what a component says about a store.
type sharing struct {
	Local    bool
	Share    policy.Share
	OnOutage policy.Outage
}

func sharingOf(t *testing.T, c policy.Component) sharing {
	t.Helper()
	switch c := c.(type) {
	case policy.RateLimiter:
		return sharing{c.Local, c.Share, c.OnOutage}
	case policy.QuotaScheduler:
		return sharing{c.Local, c.Share, c.OnOutage}
	case policy.ConcurrencyLimiter:
		return sharing{c.Local, "", c.OnOutage}
	case policy.ConcurrencyScheduler:
		return sharing{c.Local, "", c.OnOutage}
	case policy.CalendarQuota:
		return sharing{c.Local, "", c.OnOutage}
	case policy.LoadRamp:
		return sharing{Local: c.Local}
	default:
		t.Fatalf("no sharing of a %T", c)
		return sharing{}
	}
}

// inFiles returns the component in files of all formats, with the keys.
func inFiles(of struct{ name, short, circuit, blueprint string }, keys string) map[string]string {
	with := func(text string) string { return strings.Replace(text, "SHARING", keys, 1) }
	files := map[string]string{
		"short":   "headgate: 1\npolicies: [{name: p, components: [{" + of.name + ": {" + strings.TrimSuffix(with(of.short), ", ") + "}}]}]\n",
		"circuit": "circuit: {components: [{flow_control: {" + of.name + ": {" + with(of.circuit) + "}}}]}\n",
	}
	if of.blueprint != "" {
		files["blueprint"] = with(of.blueprint)
	}
	return files
}

// Every kind that shares something is among the sharers.
func TestSharersOfAllKinds(t *testing.T) {
	var tested []policy.Component
	for _, of := range sharers() {
		policies, err := policy.Parse("limits.yaml", []byte(inFiles(of, "")["short"]))
		if err != nil {
			t.Fatal(err)
		}
		tested = append(tested, policies[0].Components...)
	}
	allkinds.Covered(t, "sharers", allkinds.Having("Local"), tested...)
}

// What a component does with a store can be said in files of all formats, and comes back from a file that Format writes.
func TestSharingInFiles(t *testing.T) {
	for _, tt := range []struct {
		name, keys string
		want       sharing
	}{
		{"nothing", "", sharing{}},
		{"not local", "local: false", sharing{}},
		{"local", "local: true", sharing{Local: true}},
		{"exact", "share: exact", sharing{Share: policy.ShareExact}},
		{"leased", "share: leased", sharing{Share: policy.ShareLeased}},
		{"outage share", "on_outage: share", sharing{OnOutage: policy.OutageShare}},
		{"outage open", "on_outage: open", sharing{OnOutage: policy.OutageOpen}},
		{"outage closed", "on_outage: closed", sharing{OnOutage: policy.OutageClosed}},
		{"all", "local: false, share: leased, on_outage: closed", sharing{Share: policy.ShareLeased, OnOutage: policy.OutageClosed}},
	} {
		for _, of := range sharers() {
			for format, file := range inFiles(of, tt.keys) {
				t.Run(tt.name+"/"+of.name+"/"+format, func(t *testing.T) {
					policies, err := policy.Parse("limits.yaml", []byte(file))
					var want string
					switch {
					case strings.Contains(tt.keys, "share:") && !strings.Contains(of.name, "rate") && of.name != "quota_scheduler":
						want = "share: unknown key; it is for token buckets, and all else is exact"
					case strings.Contains(tt.keys, "on_outage:") && of.name == "load_ramp":
						want = "on_outage: unknown key; a load ramp goes on from where it last stood"
					}
					if want != "" {
						if err == nil || !strings.Contains(err.Error(), want) {
							t.Errorf("Parse = %v, want %s", err, want)
						}
						return
					}
					if err != nil {
						t.Fatalf("%v\n%s", err, file)
					}
					if diff := cmp.Diff(tt.want, sharingOf(t, policies[0].Components[0])); diff != "" {
						t.Errorf("(-want +got):\n%s", diff)
					}
					if len(policies[0].Warnings) > 0 {
						t.Errorf("warnings %q", policies[0].Warnings)
					}
					roundTrip(t, policies)
				})
			}
		}
	}
}

// Errors name the field, in Go and in files.
func TestSharingMistakes(t *testing.T) {
	const (
		local  = "is for components that are shared, and Local keeps this one to its engine"
		filled = "leased tokens are given ahead of a continuous fill, and need one that has neither steps nor a delay"
	)
	bucket := func(change func(*policy.RateLimiter)) policy.Component {
		l := policy.RateLimiter{Selectors: policy.At("a"), Capacity: 9, Fill: 9, Interval: time.Second}
		change(&l)
		return l
	}
	queue := func(change func(*policy.QuotaScheduler)) policy.Component {
		s := policy.QuotaScheduler{Selectors: policy.At("a"), Capacity: 9, Fill: 9, Interval: time.Second}
		change(&s)
		return s
	}
	slots := policy.ConcurrencyLimiter{Selectors: policy.At("a"), Max: 9, MaxInflight: time.Second, Local: true, OnOutage: policy.OutageOpen}
	slotsQueue := policy.ConcurrencyScheduler{Selectors: policy.At("a"), Max: 9, MaxInflight: time.Second, OnOutage: "Open"}
	quota := policy.CalendarQuota{Selectors: policy.At("a"), Amount: 9, Period: policy.PeriodDay, OnOutage: "fail"}
	for _, tt := range []struct {
		name      string
		component policy.Component
		keys      string
		field     string
		key       string
		want      string
	}{
		{"share", bucket(func(l *policy.RateLimiter) { l.Share = "leasd" }), "share: leasd", "Share", "share", `unknown share "leasd"; did you mean "leased"?; want exact or leased`},
		{"share that is long", bucket(func(l *policy.RateLimiter) { l.Share = policy.Share(strings.Repeat("x", 99)) }), "share: " + strings.Repeat("x", 99), "Share", "share", `unknown share "` + strings.Repeat("x", 40) + `…"; want exact or leased`},
		{"share in a queue", queue(func(s *policy.QuotaScheduler) { s.Share = "lazy" }), "share: lazy", "Share", "share", `unknown share "lazy"; want exact or leased`},
		{"outage", bucket(func(l *policy.RateLimiter) { l.OnOutage = "close" }), "on_outage: close", "OnOutage", "on_outage", `unknown outage mode "close"; did you mean "closed"?; want share, open or closed`},
		{"outage in a queue", queue(func(s *policy.QuotaScheduler) { s.OnOutage = "1" }), `on_outage: "1"`, "OnOutage", "on_outage", `unknown outage mode "1"; want share, open or closed`},
		{"outage of slots", slotsQueue, "on_outage: Open", "OnOutage", "on_outage", `unknown outage mode "Open"; did you mean "open"?; want share, open or closed`},
		{"outage of a quota", quota, "on_outage: fail", "OnOutage", "on_outage", `unknown outage mode "fail"; want share, open or closed`},
		{"a local share", bucket(func(l *policy.RateLimiter) { l.Local, l.Share = true, policy.ShareLeased }), "local: true, share: leased", "Share", "share", local},
		{"a local exact share", queue(func(s *policy.QuotaScheduler) { s.Local, s.Share = true, policy.ShareExact }), "local: true, share: exact", "Share", "share", local},
		{"a local outage", slots, "local: true, on_outage: open", "OnOutage", "on_outage", local},
		{"leased steps", bucket(func(l *policy.RateLimiter) { l.StepFill, l.Share = true, policy.ShareLeased }), "share: leased, STEP", "Share", "share", filled},
		{"a leased delay", queue(func(s *policy.QuotaScheduler) { s.DelayInitialFill, s.Share = true, policy.ShareLeased }), "share: leased, DELAY", "Share", "share", filled},
	} {
		err := policy.Policy{Name: "p", Components: []policy.Component{tt.component}}.Validate()
		if err == nil || err.Error() != `policy "p": components[0].`+tt.field+": "+tt.want {
			t.Errorf("%s: Validate = %v want %s", tt.name, err, tt.want)
		}
		kind := strings.TrimSuffix((policy.Policy{Components: []policy.Component{tt.component}}).Describe()[0].ID, ".0")
		for _, of := range sharers() {
			if of.name != kind {
				continue
			}
			for format, file := range inFiles(of, tt.keys) {
				t.Run(tt.name+"/"+format, func(t *testing.T) {
					if format == "short" {
						file = strings.NewReplacer("STEP", "step_fill: true", "DELAY", "delay_initial_fill: true").Replace(file)
					} else {
						file = strings.NewReplacer(", STEP", "", "interval: 1s", "interval: 1s, continuous_fill: false").Replace(file)
						if strings.Contains(file, ", DELAY") {
							file = strings.NewReplacer(", DELAY", "", "continuous_fill: false", "delay_initial_fill: true").Replace(file)
						} else if !strings.Contains(tt.keys, "STEP") {
							file = strings.Replace(file, ", continuous_fill: false", "", 1)
						}
					}
					_, err := policy.Parse("limits.yaml", []byte(file))
					if err == nil || !strings.HasPrefix(err.Error(), "limits.yaml:") || !strings.HasSuffix(err.Error(), kind+".headgate."+tt.key+": "+tt.want) &&
						(format != "short" || !strings.HasSuffix(err.Error(), kind+"."+tt.key+": "+tt.want)) {
						t.Errorf("Parse = %v\nwant %s\n%s", err, tt.want, file)
					}
				})
			}
		}
	}
}

// Components that measure their own process, or keep nothing, have no such keys, and the error says why.
func TestAlwaysLocal(t *testing.T) {
	const (
		load    = "load_scheduler is always local: it measures its own process"
		breaker = "; circuit_breaker is always local: it measures its own process"
		sampler = "; sampler is always local: it keeps nothing that others could share"
	)
	short := func(text string) string { return "headgate: 1\npolicies: [{name: p, components: [{" + text + "}]}]\n" }
	circuit := func(text string) string { return "circuit: {components: [{flow_control: {" + text + "}}]}\n" }
	for _, tt := range []struct{ name, file, want string }{
		{"a breaker", short("circuit_breaker: {at: [a], failure_count: 1, window: 1s, open_duration: 1s, local: true}"), "circuit_breaker.local: unknown key" + breaker},
		{"a breaker's outage", short("circuit_breaker: {at: [a], failure_count: 1, window: 1s, open_duration: 1s, on_outage: open}"), "circuit_breaker.on_outage: unknown key" + breaker},
		{"a sampler", short("sampler: {at: [a], accept_percentage: 1, share: exact}"), "sampler.share: unknown key" + sampler},
		{"a load scheduler", short("load_scheduler: {at: [a], load_multiplier: 1, share: leased}"), "load_scheduler.share: unknown key; " + load},
		{"an AIMD load scheduler", short("aimd_load_scheduler: {at: [a], signal: 1, setpoint: 1, headgate: {local: true}}"), "aimd_load_scheduler.headgate: unknown key; aimd_" + load},
		{"a workload", short("load_scheduler: {at: [a], load_multiplier: 1, workloads: [{local: true}]}"), "load_scheduler.workloads[0].local: unknown key; " + load},
		{"a breaker in a circuit", circuit("circuit_breaker: {selectors: [{control_point: a}], parameters: {failure_count: 1, window: 1s, open_duration: 1s}, headgate: {local: true}}"), "circuit_breaker.headgate: unknown key" + breaker},
		{"a breaker's parameters", circuit("circuit_breaker: {selectors: [{control_point: a}], parameters: {failure_count: 1, window: 1s, open_duration: 1s, headgate: {}}}"), "circuit_breaker.parameters.headgate: unknown key" + breaker},
		{"a sampler in a circuit", circuit("sampler: {parameters: {selectors: [{control_point: a}]}, headgate: {}}"), "sampler.headgate: unknown key" + sampler},
		{"a load scheduler in a circuit", circuit("load_scheduler: {in_ports: {load_multiplier: {signal_name: X}}, parameters: {selectors: [{control_point: a}]}, headgate: {on_outage: open}}"), "load_scheduler.headgate: unknown key; " + load},
		{"by its old name", circuit("adaptive_load_scheduler: {headgate: {}, in_ports: {signal: {signal_name: X}, setpoint: {signal_name: Y}}, parameters: {gradient: {slope: 1}, load_scheduler: {selectors: [{control_point: a}]}}}"), "adaptive_load_scheduler.headgate: unknown key; aimd_" + load},
		{"a blueprint", "blueprint: load-scheduling/average-latency\npolicy: {policy_name: p, load_scheduling_core: {headgate: {local: true}, aimd_load_scheduler: {load_scheduler: {selectors: [{control_point: a}]}}}, latency_baseliner: {flux_meter: {selectors: [{control_point: a}]}}}", "load_scheduling_core.headgate: unknown key; aimd_" + load},

		// Components that have the keys elsewhere.
		{"Aperture's way in a short file", short("rate_limiter: {at: [a], capacity: 1, fill: 1, interval: 1s, headgate: {local: true}}"), "rate_limiter.headgate: unknown key; what it has in other files stands beside the other keys of rate_limiter: local, share, on_outage"},
		{"the short way in Aperture's", circuit("rate_limiter: {selectors: [{control_point: a}], in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 1}}}, parameters: {interval: 1s}, local: true}"), "rate_limiter.local: unknown key; it belongs in rate_limiter.headgate"},
		{"among the parameters", circuit("rate_limiter: {selectors: [{control_point: a}], in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 1}}}, parameters: {interval: 1s, headgate: {local: true}}}"), "rate_limiter.parameters.headgate: unknown key; it belongs in rate_limiter"},
		{"in an override", short("rate_limiter: {at: [a], capacity: 1, fill: 1, interval: 1s, limit_by: b, overrides: {c: {capacity: 2, share: leased}}}"), "rate_limiter.overrides[0].share: unknown key; it belongs in rate_limiter"},
		{"misspelt", circuit("load_ramp: {parameters: {sampler: {selectors: [{control_point: a}]}, steps: [{target_accept_percentage: 9, duration: 0}]}, headgate: {locl: true}}"), `load_ramp.headgate.locl: unknown key; did you mean "local"?`},
		{"another type", circuit("calendar_quota: {selectors: [{control_point: a}], parameters: {amount: 9, period: day}, headgate: {local: closed}}"), "calendar_quota.headgate.local: want a boolean, have a string; write true or false"},
		{"no mapping", circuit("calendar_quota: {selectors: [{control_point: a}], parameters: {amount: 9, period: day}, headgate: local}"), "calendar_quota.headgate: want a mapping, have a string"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(tt.file))
			if err == nil {
				t.Fatal("Parse = nil")
			}
			if got := err.Error(); !strings.HasSuffix(got, tt.want) || strings.Contains(got, "\n") {
				t.Errorf("have %s\nwant %s", got, tt.want)
			}
		})
	}
}

// Aperture's lazy_sync means leased tokens, as far as these are possible and nothing else is said.
func TestLazySync(t *testing.T) {
	const at = "limits.yaml:1:"
	for _, tt := range []struct {
		name, parameters, beside string
		want                     sharing
		warning                  string
	}{
		{"none", "", "", sharing{}, ""},
		{"enabled", ", lazy_sync: {enabled: true}", "", sharing{Share: policy.ShareLeased}, ""},
		{"not enabled", ", lazy_sync: {enabled: false}", "", sharing{}, ""},
		{"a default", ", lazy_sync: {}", "", sharing{}, ""},
		{"null", ", lazy_sync: ~", "", sharing{}, ""},
		{"with its number", ", lazy_sync: {enabled: true, num_sync: 8}", "", sharing{Share: policy.ShareLeased}, "lazy_sync.num_sync: not used"},
		{"with an outage", ", lazy_sync: {enabled: true}", ", headgate: {on_outage: open}", sharing{Share: policy.ShareLeased, OnOutage: policy.OutageOpen}, ""},
		{"beside leased", ", lazy_sync: {enabled: false}", ", headgate: {share: leased}", sharing{Share: policy.ShareLeased}, ""},
		{"beside exact", ", lazy_sync: {enabled: true}", ", headgate: {share: exact}", sharing{Share: policy.ShareExact}, "lazy_sync.enabled: not used: headgate.share is set"},
		{"local", ", lazy_sync: {enabled: true}", ", headgate: {local: true}", sharing{Local: true}, "lazy_sync.enabled: not used: headgate.local is set"},
		{"steps", ", lazy_sync: {enabled: true}, continuous_fill: false", "", sharing{}, "lazy_sync.enabled: not used: leased tokens are given ahead of a continuous fill, and need one that has neither steps nor a delay"},
		{"a delay", ", lazy_sync: {enabled: true}, delay_initial_fill: true", "", sharing{}, "lazy_sync.enabled: not used: leased tokens are given ahead of a continuous fill, and need one that has neither steps nor a delay"},
	} {
		for kind, key := range map[string]string{"rate_limiter": "parameters", "quota_scheduler": "rate_limiter"} {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				policies, err := policy.Parse("limits.yaml", []byte("circuit: {components: [{flow_control: {"+kind+": {selectors: [{control_point: a}], "+
					"in_ports: {bucket_capacity: {constant_signal: {value: 9}}, fill_amount: {constant_signal: {value: 9}}}, "+
					key+": {interval: 1s"+tt.parameters+"}"+tt.beside+"}}}]}"))
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, sharingOf(t, policies[0].Components[0])); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				warnings := strings.Join(policies[0].Warnings, "\n")
				if tt.warning == "" && warnings != "" || !strings.HasSuffix(warnings, tt.warning) || warnings != "" && !strings.HasPrefix(warnings, at) {
					t.Errorf("warnings %q, want %q", warnings, tt.warning)
				}
			})
		}
	}
	_, err := policy.Parse("limits.yaml", []byte(`circuit: {components: [{flow_control: {rate_limiter: {selectors: [{control_point: a}],
  in_ports: {bucket_capacity: {constant_signal: {value: 9}}, fill_amount: {constant_signal: {value: 9}}},
  parameters: {interval: 1s, lazy_sync: {enable: true}}}}}]}`))
	if want := `limits.yaml:3:42: circuit.components[0].flow_control.rate_limiter.parameters.lazy_sync.enable: unknown key; did you mean "enabled"?`; err == nil || err.Error() != want {
		t.Errorf("Parse = %v want %s", err, want)
	}
}

// Numbers of an escalation hold for a shared limiter too: the store gets them with each call.
func TestSharingWithEscalation(t *testing.T) {
	components := []policy.Component{
		policy.LoadScheduler{ID: "load", Selectors: policy.At("a"), LoadMultiplier: policy.Constant(1)},
		policy.RateLimiter{
			Selectors: policy.At("a"), Capacity: 9, Fill: 9, Interval: time.Second, Share: policy.ShareLeased, OnOutage: policy.OutageClosed,
			When: policy.Escalation{Load: "load", Below: 1},
		},
		policy.QuotaScheduler{
			Selectors: policy.At("a"), Capacity: 9, Fill: 9, Interval: time.Second, Share: policy.ShareLeased,
			When: policy.Escalation{Load: "load", Below: 1},
		},
	}
	roundTrip(t, []policy.Policy{{Name: "p", Components: components}})
}
