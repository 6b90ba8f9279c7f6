package policy

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// A blueprint makes a policy of the values in a file.
type blueprint struct {
	keys, unused string // of the policy, beside those that every blueprint has
	read         func(d *decoder, policy value) Component
}

// blueprintID is the ID of the component that a blueprint makes. Components that the values add come after it.
const blueprintID = "root.0"

// blueprints are those that can run: each makes one component that decides about flows.
var blueprints = map[string]blueprint{ //nolint:gochecknoglobals // a table, never written to
	"rate-limiting/base":              {"rate_limiter", "", block("rate_limiter")},
	"quota-scheduling/base":           {"quota_scheduler", "", block("quota_scheduler")},
	"concurrency-limiting/base":       {"concurrency_limiter", "", block("concurrency_limiter")},
	"concurrency-scheduling/base":     {"concurrency_scheduler", "", block("concurrency_scheduler")},
	"load-ramping/base":               {"load_ramp start drivers kubelet_metrics", "evaluation_interval", (*decoder).loadRamping},
	"load-scheduling/average-latency": {"load_scheduling_core latency_baseliner", "evaluation_interval", (*decoder).averageLatency},
}

// blueprintOf returns the blueprint whose values a document has.
func blueprintOf(top value) (b blueprint, ok bool) {
	from := top.get("blueprint")
	if from.node == nil || from.kind != text {
		return b, false
	}
	b, ok = blueprints[from.text]
	if !ok && !strings.Contains(from.text, "/") {
		b, ok = blueprints[from.text+"/base"]
	}
	return b, ok
}

// values reads the values of a blueprint.
func (d *decoder) values(top value, p *Policy) {
	b, ok := blueprintOf(top)
	if ok { // before the keys at the top are read, which may belong elsewhere
		d.shape = func(d *decoder) {
			top := d.fields(value{}, "blueprint uri policy dynamicConfig", "")
			policy := d.fields(top.get("policy"), "policy_name components resources "+b.keys, b.unused)
			d.resources(policy.get("resources"))
			b.read(d, policy)
			d.learnCircuit(policy.get("components"))
		}
	}
	f := d.fields(top, "blueprint uri policy dynamicConfig", "")
	from := d.need(f.get("blueprint"))
	name := d.text(from)
	if !ok {
		known := slices.Sorted(maps.Keys(blueprints))
		d.errorf(from, "unsupported blueprint %s; want one of %s", quote(name), strings.Join(known, ", "))
		return
	}
	d.text(f.get("uri"))
	d.dynamicConfig(f.get("dynamicConfig"))

	policy := d.fields(f.get("policy"), "policy_name components resources "+b.keys, b.unused)
	d.name = d.fill(policy, "name", "policy_name")
	p.Name = d.text(d.name)
	d.resources(policy.get("resources"))
	first := policy
	first.field = "components[0]"
	p.Components = d.circuit(policy.get("components"), []Component{b.read(d, first)})
	d.unusedMeters()
}

// block returns the reader of a blueprint whose values are one component, under the name of its kind.
func block(name string) func(d *decoder, policy value) Component {
	return func(d *decoder, policy value) Component {
		v := d.need(policy.get(name))
		d.note(v.field, v)
		form, _ := formOf(name)
		return form.read(d, d.inValues(v, form))
	}
}

func (d *decoder) loadRamping(policy value) Component {
	drivers := d.fields(policy.get("drivers"), "average_latency_drivers percentile_latency_drivers promql_drivers", "")
	for _, key := range []string{"average_latency_drivers", "percentile_latency_drivers", "promql_drivers"} {
		d.refuse(drivers.get(key), sequence, "drivers of load ramps")
	}
	d.refuse(policy.get("kubelet_metrics"), mapping, "drivers of load ramps")

	v := d.need(policy.get("load_ramp"))
	d.note(v.field, v)
	f := d.fields(v, "sampler steps headgate dry_run", "")
	r := d.ramp(f)
	r.ID = blueprintID
	r.Start = d.boolean(d.setting("start", policy.get("start")), false)
	if d.boolean(d.setting("reset", value{}), false) {
		r.Start = false
	}
	r.PassThroughValues = d.valuesToPass(d.setting("pass_through_label_values", value{}), r.SessionLabel)
	r.Local, _, _ = d.sharing(f, LoadRamp{})
	r.DryRun = d.boolean(f.get("dry_run"), false)
	return r
}

func (d *decoder) averageLatency(policy value) Component {
	v := d.need(policy.get("load_scheduling_core"))
	d.note(v.field, v)
	core := d.fields(v, "aimd_load_scheduler overload_confirmations kubelet_overload_confirmations dry_run", "")
	d.refuse(core.get("overload_confirmations"), sequence, "overload confirmations")
	d.refuse(core.get("kubelet_overload_confirmations"), mapping, "overload confirmations")
	s := d.aimd(d.need(core.get("aimd_load_scheduler")))
	s.ID = blueprintID
	s.DryRun = d.boolean(d.setting("dry_run", core.get("dry_run")), false)

	// The signal is the mean of the last 30 seconds, and the setpoint a multiple of a long-term mean.
	baseliner := d.fields(d.need(policy.get("latency_baseliner")),
		"flux_meter latency_tolerance_multiplier long_term_query_interval", "long_term_query_periodic_interval")
	meter := baseliner.get("flux_meter")
	meter.field = child(policy.field, "Signal")
	s.Signal = d.meter(meter)
	meter.field = child(policy.field, "Setpoint")
	setpoint := d.meter(meter)
	baseliner.field = meter.field
	setpoint.Over, setpoint.Times = 30*time.Minute, 1.25
	if v := d.fill(baseliner, "Over", "long_term_query_interval"); v.node != nil {
		setpoint.Over = d.duration(v)
	}
	if v := d.fill(baseliner, "Times", "latency_tolerance_multiplier"); v.node != nil {
		setpoint.Times = d.positive(v)
	}
	s.Setpoint = setpoint
	return s
}
