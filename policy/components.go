package policy

import (
	"math"
	"time"
)

// laterKinds are the flow_control components that cannot run.
const laterKinds = "aiad_load_scheduler private range_driven_load_scheduler"

// A componentKind is a flow_control component that can run. To add one is to add it to kinds, and its rules to
// validate.go.
type componentKind struct {
	keys    string // all but in_ports, out_ports and dry_run
	ports   string // those of in_ports that blueprint values have too, as numbers
	options string // the others of in_ports
	read    func(d *decoder, c component) Component
}

var kinds = map[string]componentKind{ //nolint:gochecknoglobals // a table, never written to
	"rate_limiter": {
		"selectors parameters request_parameters", "bucket_capacity fill_amount", "pass_through", (*decoder).rateLimiter,
	},
	"concurrency_limiter": {
		"selectors parameters request_parameters", "max_concurrency", "pass_through", (*decoder).concurrencyLimiter,
	},
	"quota_scheduler": {
		"selectors rate_limiter scheduler", "bucket_capacity fill_amount", "pass_through", (*decoder).quotaScheduler,
	},
	"concurrency_scheduler": {
		"selectors concurrency_limiter scheduler", "max_concurrency", "pass_through", (*decoder).concurrencyScheduler,
	},
	"load_scheduler": {
		"parameters dry_run_config_key", "", "load_multiplier", (*decoder).loadScheduler,
	},
	"aimd_load_scheduler": {
		"parameters dry_run_config_key", "", "signal setpoint overload_confirmation", (*decoder).aimdLoadScheduler,
	},
	"adaptive_load_scheduler": {
		"parameters dry_run_config_key", "", "signal setpoint overload_confirmation", (*decoder).adaptiveLoadScheduler,
	},
	"sampler": {
		"parameters pass_through_label_values pass_through_label_values_config_key", "", "accept_percentage", (*decoder).sampler,
	},
	"load_ramp": {
		"parameters pass_through_label_values pass_through_label_values_config_key", "", "forward backward reset", (*decoder).loadRamp,
	},
}

// A component is what a file says about one.
type component struct {
	value
	id    string
	ports value               // has what is connected to the input ports,
	port  func(value) float64 // and this reads it
}

// inCircuit takes a component as circuits have it.
func (d *decoder) inCircuit(v value, kind componentKind, id string) component {
	f := d.fields(v, kind.keys+" in_ports dry_run", "out_ports")
	return component{f, id, d.fields(f.get("in_ports"), kind.ports+" "+kind.options, ""), d.port}
}

// inValues takes a component as blueprint values have it.
func (d *decoder) inValues(v value, kind componentKind) component {
	f := d.fields(v, kind.keys+" "+kind.ports+" dry_run", "alerter")
	return component{f, blueprintID, f, d.number}
}

// amount reads an input port that must be connected.
func (d *decoder) amount(c component, field, port string) float64 {
	return c.port(d.need(d.fill(c.ports, field, port)))
}

// passThrough reads an input port that only circuits have.
func (d *decoder) passThrough(c component) bool { return d.port(c.ports.get("pass_through")) != 0 }

func (d *decoder) dryRun(c component) bool {
	return d.boolean(d.setting(d.text(c.get("dry_run_config_key")), c.get("dry_run")), false)
}

func (d *decoder) rateLimiter(c component) Component {
	l := d.bucket(c.get("parameters"))
	request := d.fields(c.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	l.ID = c.id
	l.Selectors = d.selectors(d.fill(c.value, "Selectors", "selectors"))
	l.Capacity = d.amount(c, "Capacity", "bucket_capacity")
	l.Fill = d.amount(c, "Fill", "fill_amount")
	l.TokensLabel = d.text(d.fill(request, "TokensLabel", "tokens_label_key"))
	l.DeniedStatus = d.status(d.fill(request, "DeniedStatus", "denied_response_status_code"))
	l.PassThrough = d.passThrough(c)
	l.DryRun = d.dryRun(c)
	return l
}

func (d *decoder) quotaScheduler(c component) Component {
	l := d.bucket(c.get("rate_limiter"))
	return QuotaScheduler{
		ID:               c.id,
		Selectors:        d.selectors(d.fill(c.value, "Selectors", "selectors")),
		Capacity:         d.amount(c, "Capacity", "bucket_capacity"),
		Fill:             d.amount(c, "Fill", "fill_amount"),
		Interval:         l.Interval,
		LimitBy:          l.LimitBy,
		StepFill:         l.StepFill,
		DelayInitialFill: l.DelayInitialFill,
		MaxIdle:          l.MaxIdle,
		Scheduler:        d.scheduler(c.value),
		PassThrough:      d.passThrough(c),
		DryRun:           d.dryRun(c),
	}
}

// bucket reads the parameters of a rate limiter.
func (d *decoder) bucket(v value) RateLimiter {
	f := d.fields(v, "interval continuous_fill max_idle_time limit_by_label_key label_key delay_initial_fill", "lazy_sync")
	limiter := RateLimiter{
		Interval:         d.duration(d.fill(f, "Interval", "interval")),
		LimitBy:          d.text(d.fill(f, "LimitBy", "limit_by_label_key")),
		StepFill:         !d.boolean(f.get("continuous_fill"), true),
		DelayInitialFill: d.boolean(f.get("delay_initial_fill"), false),
		MaxIdle:          d.optional(f.get("max_idle_time"), KeepIdle),
	}
	if old := f.get("label_key"); limiter.LimitBy == "" {
		limiter.LimitBy = d.text(d.fill(f, "LimitBy", "label_key"))
	} else if old.node != nil {
		d.unused(old, ": limit_by_label_key is set")
	}
	return limiter
}

func (d *decoder) concurrencyLimiter(c component) Component {
	l := d.slots(c.get("parameters"))
	request := d.fields(c.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	l.ID = c.id
	l.Selectors = d.selectors(d.fill(c.value, "Selectors", "selectors"))
	l.Max = d.amount(c, "Max", "max_concurrency")
	l.TokensLabel = d.text(d.fill(request, "TokensLabel", "tokens_label_key"))
	l.DeniedStatus = d.status(d.fill(request, "DeniedStatus", "denied_response_status_code"))
	l.PassThrough = d.passThrough(c)
	l.DryRun = d.dryRun(c)
	return l
}

func (d *decoder) concurrencyScheduler(c component) Component {
	l := d.slots(c.get("concurrency_limiter"))
	return ConcurrencyScheduler{
		ID:          c.id,
		Selectors:   d.selectors(d.fill(c.value, "Selectors", "selectors")),
		Max:         d.amount(c, "Max", "max_concurrency"),
		MaxInflight: l.MaxInflight,
		LimitBy:     l.LimitBy,
		MaxIdle:     l.MaxIdle,
		Scheduler:   d.scheduler(c.value),
		PassThrough: d.passThrough(c),
		DryRun:      d.dryRun(c),
	}
}

// slots reads the parameters of a concurrency limiter.
func (d *decoder) slots(v value) ConcurrencyLimiter {
	f := d.fields(v, "max_inflight_duration max_idle_time limit_by_label_key", "")
	return ConcurrencyLimiter{
		MaxInflight: d.duration(d.fill(f, "MaxInflight", "max_inflight_duration")),
		LimitBy:     d.text(d.fill(f, "LimitBy", "limit_by_label_key")),
		MaxIdle:     d.optional(f.get("max_idle_time"), KeepIdle),
	}
}

func (d *decoder) loadScheduler(c component) Component {
	s := d.load(c.get("parameters"))
	s.ID = c.id
	s.LoadMultiplier = d.signal(d.fill(c.ports, "LoadMultiplier", "load_multiplier"))
	s.DryRun = d.dryRun(c)
	return s
}

// load reads the parameters of a load scheduler.
func (d *decoder) load(v value) LoadScheduler {
	f := d.fields(v, "selectors scheduler workload_latency_based_tokens", "")
	return LoadScheduler{
		Selectors:             d.selectors(d.fill(f, "Selectors", "selectors")),
		WorkloadLatencyTokens: d.boolean(f.get("workload_latency_based_tokens"), false),
		Scheduler:             d.scheduler(f),
	}
}

func (d *decoder) aimdLoadScheduler(c component) Component { return d.aimdInCircuit(c) }

// adaptiveLoadScheduler reads what the AIMD load scheduler was called before its default increment grew.
func (d *decoder) adaptiveLoadScheduler(c component) Component {
	s := d.aimdInCircuit(c)
	if s.LinearIncrement == 0 {
		s.LinearIncrement = 0.0025
	}
	return s
}

func (d *decoder) aimdInCircuit(c component) AIMDLoadScheduler {
	s := d.aimd(c.get("parameters"))
	s.ID = c.id
	s.Signal = d.signal(d.fill(c.ports, "Signal", "signal"))
	s.Setpoint = d.signal(d.fill(c.ports, "Setpoint", "setpoint"))
	s.OverloadConfirmation = d.signal(d.fill(c.ports, "OverloadConfirmation", "overload_confirmation"))
	s.DryRun = d.dryRun(c)

	// Blueprint values have the defaults of Gradient. Here there are none: no slope, and no bounds.
	gradient := c.get("parameters").get("gradient")
	d.need(gradient.get("slope"))
	if gradient.get("min_gradient").node == nil {
		s.Gradient.Min = -math.MaxFloat64
	}
	if gradient.get("max_gradient").node == nil {
		s.Gradient.Max = math.MaxFloat64
	}
	return s
}

// aimd reads the parameters of an AIMD load scheduler.
func (d *decoder) aimd(v value) AIMDLoadScheduler {
	f := d.fields(v, "load_scheduler gradient max_load_multiplier load_multiplier_linear_increment", "alerter")
	load := d.load(f.get("load_scheduler"))
	gradient := d.fields(d.fill(f, "Gradient", "gradient"), "slope min_gradient max_gradient", "")
	slope := d.fill(gradient, "Slope", "slope")
	s := AIMDLoadScheduler{
		Selectors: load.Selectors,
		Gradient: Gradient{
			Slope: d.number(slope),
			Min:   d.explicit(d.fill(gradient, "Min", "min_gradient")),
			Max:   d.explicit(d.fill(gradient, "Max", "max_gradient")),
		},
		MaxLoadMultiplier:     d.positive(d.fill(f, "MaxLoadMultiplier", "max_load_multiplier")),
		LinearIncrement:       d.explicit(d.fill(f, "LinearIncrement", "load_multiplier_linear_increment")),
		WorkloadLatencyTokens: load.WorkloadLatencyTokens,
		Scheduler:             load.Scheduler,
	}
	if slope.node != nil && s.Gradient.Slope == 0 {
		d.errorf(slope, "must not be 0")
	}
	return s
}

// scheduler reads the key of that name.
func (d *decoder) scheduler(of value) Scheduler {
	f := d.fields(d.fill(of, "Scheduler", "scheduler"), "workloads default_workload_parameters decision_deadline_margin "+
		"tokens_label_key priority_label_key workload_label_key fairness_label_key denied_response_status_code", "")
	s := Scheduler{
		Default:       d.workloadParameters(d.fill(f, "Default", "default_workload_parameters")),
		Margin:        d.optional(d.fill(f, "Margin", "decision_deadline_margin"), time.Nanosecond), // none to speak of
		TokensLabel:   d.text(d.fill(f, "TokensLabel", "tokens_label_key")),
		PriorityLabel: d.text(d.fill(f, "PriorityLabel", "priority_label_key")),
		WorkloadLabel: d.text(d.fill(f, "WorkloadLabel", "workload_label_key")),
		FairnessLabel: d.text(d.fill(f, "FairnessLabel", "fairness_label_key")),
		DeniedStatus:  d.status(d.fill(f, "DeniedStatus", "denied_response_status_code")),
	}
	for _, item := range d.items(d.fill(f, "Workloads", "workloads")) {
		w := d.fields(item, "name label_matcher parameters", "")
		s.Workloads = append(s.Workloads, Workload{
			Name:               d.text(d.fill(w, "Name", "name")),
			Labels:             d.labelMatcher(d.need(d.fill(w, "Labels", "label_matcher"))),
			WorkloadParameters: d.workloadParameters(w.get("parameters")),
		})
	}
	return s
}

func (d *decoder) workloadParameters(v value) WorkloadParameters {
	f := d.fields(v, "priority tokens queue_timeout", "")
	p := WorkloadParameters{
		Priority:     d.positive(d.fill(f, "Priority", "priority")),
		QueueTimeout: d.optional(f.get("queue_timeout"), NoQueue),
	}
	if tokens := d.fill(f, "Tokens", "tokens"); tokens.node != nil {
		if p.Tokens = d.number(tokens); p.Tokens == 0 {
			p.Tokens = NoTokens
		} else if p.Tokens < 0 {
			d.errorf(tokens, "must be a number from 0 up, is %v", p.Tokens)
		}
	}
	return p
}

func (d *decoder) sampler(c component) Component {
	f := d.fields(c.get("parameters"), "selectors session_label_key denied_response_status_code ramp_mode", "")
	s := Sampler{
		ID:                c.id,
		Selectors:         d.selectors(d.fill(f, "Selectors", "selectors")),
		SessionLabel:      d.text(d.fill(f, "SessionLabel", "session_label_key")),
		PassThroughValues: d.passThroughValues(c),
		RampMode:          d.boolean(f.get("ramp_mode"), false),
		DeniedStatus:      d.status(d.fill(f, "DeniedStatus", "denied_response_status_code")),
		DryRun:            d.dryRun(c),
	}
	percentage := d.fill(c.ports, "AcceptPercentage", "accept_percentage")
	s.AcceptPercentage = d.port(percentage)
	if percentage.node == nil && !s.RampMode {
		s.AcceptPercentage = 100
	}
	return s
}

func (d *decoder) loadRamp(c component) Component {
	r := d.ramp(d.fields(c.get("parameters"), "sampler steps", ""))
	r.ID = c.id
	forward, backward, reset := d.port(c.ports.get("forward")), d.port(c.ports.get("backward")), d.port(c.ports.get("reset"))
	r.Start = forward != 0 && backward == 0 && reset == 0
	r.PassThroughValues = d.passThroughValues(c)
	r.DryRun = d.dryRun(c)
	return r
}

// ramp reads the parameters of a load ramp.
func (d *decoder) ramp(f value) LoadRamp {
	sampler := d.fields(f.get("sampler"), "selectors session_label_key denied_response_status_code", "ramp_mode")
	r := LoadRamp{
		Selectors:    d.selectors(d.fill(sampler, "Selectors", "selectors")),
		SessionLabel: d.text(d.fill(sampler, "SessionLabel", "session_label_key")),
		DeniedStatus: d.status(d.fill(sampler, "DeniedStatus", "denied_response_status_code")),
	}
	for _, item := range d.items(d.fill(f, "Steps", "steps")) {
		step := d.fields(item, "target_accept_percentage duration", "")
		r.Steps = append(r.Steps, RampStep{
			Target:   d.number(d.need(d.fill(step, "Target", "target_accept_percentage"))),
			Duration: d.duration(d.need(d.fill(step, "Duration", "duration"))),
		})
	}
	return r
}

func (d *decoder) passThroughValues(c component) []string {
	key := d.text(c.get("pass_through_label_values_config_key"))
	return d.texts(d.setting(key, c.get("pass_through_label_values")))
}
