package policy

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// What Aperture's format has besides the components below.
const (
	metadataUnused = "namespace labels annotations generateName uid resourceVersion generation creationTimestamp " +
		"deletionTimestamp deletionGracePeriodSeconds finalizers managedFields ownerReferences selfLink"

	// signalComponents compute signals, which Headgate's limiters do not follow.
	signalComponents = "alerter and arithmetic_combinator auto_scale decider differentiator ema extrapolator first_valid " +
		"gradient_controller holder integrator inverter max min nested_signal_egress nested_signal_ingress or " +
		"pid_controller polynomial_range_function pulse_generator query signal_generator sma switcher unary_operator"

	// laterKinds are the flow_control components that cannot run yet.
	laterKinds = "adaptive_load_scheduler aiad_load_scheduler aimd_load_scheduler concurrency_scheduler load_ramp " +
		"load_scheduler private quota_scheduler range_driven_load_scheduler sampler"
)

// kinds are the flow_control components that can run: the functions that read them. To add a kind is to add its
// function here, its rules to validate.go, and to take it from laterKinds.
var kinds = map[string]func(d *decoder, v value, id string) Component{ //nolint:gochecknoglobals // a table, never written to
	"rate_limiter":        (*decoder).rateLimiter,
	"concurrency_limiter": (*decoder).concurrencyLimiter,
}

// spec reads a policy without its name: the top of a plain file, or the spec of a resource.
func (d *decoder) spec(v value) []Component {
	f := d.fields(v, "circuit resources", "")
	resources := d.fields(f.get("resources"), "flow_control", "infra_meters telemetry_collectors")
	meters := d.fields(resources.get("flow_control"), "classifiers", "flux_meters")
	if classifiers := meters.get("classifiers"); len(d.items(classifiers)) > 0 {
		d.errorf(classifiers, "classifiers are not supported")
	}
	circuit := d.fields(f.get("circuit"), "components", "evaluation_interval")
	items := d.items(d.fill(circuit, "components", "components"))

	// A limiter may use signals that later components define: those first.
	type limiter struct {
		value
		id string
	}
	var limiters []limiter
	for i, item := range items {
		kind, v := d.one(item, "flow_control variable bool_variable nested_circuit "+signalComponents)
		switch kind {
		case "": // d.one has told why
		case "flow_control":
			limiters = append(limiters, limiter{v, fmt.Sprintf("root.%d", i)})
		case "variable", "bool_variable":
			d.variable(v, kind == "bool_variable")
		case "nested_circuit":
			d.errorf(v, "nested_circuit is not supported yet")
		default:
			d.unused(v, "")
		}
	}
	var components []Component
	known := strings.Join(slices.Sorted(maps.Keys(kinds)), " ") + " " + laterKinds
	for _, l := range limiters {
		kind, v := d.one(l.value, known)
		if read, ok := kinds[kind]; ok {
			v.field = fmt.Sprintf("components[%d]", len(components))
			d.sources[v.field] = v
			components = append(components, read(d, v, l.id))
		} else if kind != "" {
			d.errorf(v, "%s is not supported yet", kind)
		}
	}
	return components
}

func (d *decoder) rateLimiter(v value, id string) Component {
	f := d.fields(v, "selectors in_ports parameters request_parameters dry_run", "out_ports")
	ports := d.fields(f.get("in_ports"), "bucket_capacity fill_amount pass_through", "")
	parameters := d.fields(f.get("parameters"),
		"interval continuous_fill max_idle_time limit_by_label_key label_key delay_initial_fill", "lazy_sync")
	request := d.fields(f.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	limiter := RateLimiter{
		ID:               id,
		Selectors:        d.selectors(d.fill(f, "Selectors", "selectors")),
		Capacity:         d.required(d.fill(ports, "Capacity", "bucket_capacity")),
		Fill:             d.required(d.fill(ports, "Fill", "fill_amount")),
		Interval:         d.duration(d.fill(parameters, "Interval", "interval")),
		LimitBy:          d.text(parameters.get("limit_by_label_key")),
		StepFill:         !d.boolean(parameters.get("continuous_fill"), true),
		DelayInitialFill: d.boolean(parameters.get("delay_initial_fill"), false),
		MaxIdle:          d.maxIdle(parameters.get("max_idle_time")),
		TokensLabel:      d.text(request.get("tokens_label_key")),
		DeniedStatus:     d.status(d.fill(request, "DeniedStatus", "denied_response_status_code")),
		PassThrough:      d.port(ports.get("pass_through")) != 0,
		DryRun:           d.boolean(f.get("dry_run"), false),
	}
	if old := parameters.get("label_key"); limiter.LimitBy == "" {
		limiter.LimitBy = d.text(old)
	} else if old.node != nil {
		d.unused(old, ": limit_by_label_key is set")
	}
	return limiter
}

func (d *decoder) concurrencyLimiter(v value, id string) Component {
	f := d.fields(v, "selectors in_ports parameters request_parameters dry_run", "out_ports")
	ports := d.fields(f.get("in_ports"), "max_concurrency pass_through", "")
	parameters := d.fields(f.get("parameters"), "max_inflight_duration max_idle_time limit_by_label_key", "")
	request := d.fields(f.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	return ConcurrencyLimiter{
		ID:           id,
		Selectors:    d.selectors(d.fill(f, "Selectors", "selectors")),
		Max:          d.required(d.fill(ports, "Max", "max_concurrency")),
		MaxInflight:  d.duration(d.fill(parameters, "MaxInflight", "max_inflight_duration")),
		LimitBy:      d.text(parameters.get("limit_by_label_key")),
		MaxIdle:      d.maxIdle(parameters.get("max_idle_time")),
		TokensLabel:  d.text(request.get("tokens_label_key")),
		DeniedStatus: d.status(d.fill(request, "DeniedStatus", "denied_response_status_code")),
		PassThrough:  d.port(ports.get("pass_through")) != 0,
		DryRun:       d.boolean(f.get("dry_run"), false),
	}
}

// maxIdle reads max_idle_time, where 0 means for ever and nothing means the default.
func (d *decoder) maxIdle(v value) time.Duration {
	t := d.duration(v)
	switch {
	case v.node == nil:
		return 0
	case t < 0:
		d.errorf(v, "must not be negative, is %s", t)
	}
	if t == 0 {
		return KeepIdle
	}
	return t
}

// required reads an input port that must be connected.
func (d *decoder) required(v value) float64 {
	if v.node == nil {
		d.errorf(v, "is required")
	}
	return d.port(v)
}

// port reads an input port: the constant that it is connected to. One that nothing is connected to is 0.
func (d *decoder) port(v value) float64 {
	if v.node == nil {
		return 0
	}
	switch kind, from := d.one(v, "constant_signal signal_name"); kind {
	case "constant_signal":
		return d.constant(from)
	case "signal_name":
		name := d.text(from)
		signal, ok := d.signals[name]
		if !ok {
			d.errorf(from, "unsupported circuit: signal %s is not constant", quote(name))
		}
		return signal
	}
	return 0
}

// constant reads a constant_signal.
func (d *decoder) constant(v value) float64 {
	kind, from := d.one(v, "value special_value")
	if kind == "special_value" {
		d.errorf(from, "special_value is not supported")
		return 0
	}
	return d.number(from)
}

// variable reads a variable or bool_variable component: a constant signal that dynamicConfig may override.
func (d *decoder) variable(v value, isBool bool) {
	f := d.fields(v, "constant_output config_key out_ports", "")
	output := d.fields(d.fields(f.get("out_ports"), "output", "").get("output"), "signal_name", "").get("signal_name")
	name := d.text(output)
	if output.node == nil {
		d.errorf(output, "is required")
	}
	from := f.get("constant_output")
	if key := d.text(f.get("config_key")); key != "" {
		if set := d.dynamic.get(key); set.node != nil {
			d.used[key] = true
			from = set
		}
	}
	var signal float64
	if !isBool {
		signal = d.constant(from)
	} else if d.boolean(from, false) {
		signal = 1
	}
	if _, ok := d.signals[name]; ok {
		d.errorf(output, "signal %s has two sources", quote(name))
	}
	d.signals[name] = signal
}

func (d *decoder) selectors(v value) []Selector {
	var selectors []Selector
	for _, item := range d.items(v) {
		f := d.fields(item, "control_point service label_matcher", "agent_group")
		selectors = append(selectors, Selector{
			ControlPoint: d.text(d.fill(f, "ControlPoint", "control_point")),
			Service:      d.text(f.get("service")),
			Labels:       d.labelMatcher(d.fill(f, "Labels", "label_matcher")),
		})
	}
	return selectors
}

func (d *decoder) labelMatcher(v value) LabelMatcher {
	f := d.fields(v, "match_labels match_list match_expressions expression", "")
	var m LabelMatcher
	if labels := d.fill(f, "Equal", "match_labels"); d.is(labels, mapping) {
		m.Equal = map[string]string{}
		for _, e := range labels.entries {
			label := labels.part(e)
			if label.node == nil {
				d.errorf(label, "want %s, have %s", text, null)
			}
			m.Equal[e.key] = d.text(label)
		}
	}
	list, old := d.fill(f, "Require", "match_list"), f.get("match_expressions")
	items := d.items(list)
	if len(items) == 0 {
		items = d.items(d.fill(f, "Require", "match_expressions"))
	} else if old.node != nil {
		d.unused(old, ": match_list is set")
	}
	for _, item := range items {
		r := d.fields(item, "key operator values", "")
		m.Require = append(m.Require, Requirement{
			Key:      d.text(d.fill(r, "Key", "key")),
			Operator: Operator(d.text(d.fill(r, "Operator", "operator"))),
			Values:   d.texts(d.fill(r, "Values", "values")),
		})
	}
	if e := d.fill(f, "Expression", "expression"); e.node != nil {
		m.Expression = d.expression(e)
	}
	return m
}

func (d *decoder) expression(v value) Expression {
	kind, part := d.one(v, "not all any label_exists label_equals label_matches")
	switch kind {
	case "not":
		part.field = child(v.field, "Of")
		d.sources[part.field] = part
		return Not{Of: d.expression(part)}
	case "all":
		return All(d.expressions(part))
	case "any":
		return Any(d.expressions(part))
	case "label_exists":
		d.sources[v.field] = part
		return LabelExists(d.text(part))
	case "label_equals":
		f := d.fields(part, "label value", "")
		return LabelEquals{Label: d.text(d.fill(f, "Label", "label")), Value: d.text(f.get("value"))}
	case "label_matches":
		f := d.fields(part, "label regex", "")
		return LabelMatches{Label: d.text(d.fill(f, "Label", "label")), Regex: d.text(d.fill(f, "Regex", "regex"))}
	}
	return nil
}

func (d *decoder) expressions(v value) []Expression {
	var expressions []Expression
	for _, item := range d.items(d.fields(v, "of", "").get("of")) {
		expressions = append(expressions, d.expression(item))
	}
	return expressions
}

// status reads an HTTP status: a name of Aperture's or a number.
func (d *decoder) status(v value) int {
	switch {
	case v.node == nil:
		return 0
	case v.kind == text:
		code, ok := statuses[v.text]
		if !ok && isNumber(v.text) {
			d.errorf(v, "unknown error status %s; write it without quotes", quote(v.text))
		} else if !ok {
			d.errorf(v, "unknown error status %s%s", quote(v.text), suggest(v.text, slices.Sorted(maps.Keys(statuses))))
		}
		return code
	case v.kind == number && v.number == math.Trunc(v.number) && math.Abs(v.number) < 1000:
		return int(v.number)
	}
	d.errorf(v, "want an HTTP status, as in TooManyRequests or 429; have %s", v.kind)
	return 0
}

// statuses are the names that Aperture's format has for "unset" and for the error statuses.
var statuses = map[string]int{ //nolint:gochecknoglobals // a table, never written to
	"Empty":                         0,
	"BadRequest":                    400,
	"Unauthorized":                  401,
	"PaymentRequired":               402,
	"Forbidden":                     403,
	"NotFound":                      404,
	"MethodNotAllowed":              405,
	"NotAcceptable":                 406,
	"ProxyAuthenticationRequired":   407,
	"RequestTimeout":                408,
	"Conflict":                      409,
	"Gone":                          410,
	"LengthRequired":                411,
	"PreconditionFailed":            412,
	"PayloadTooLarge":               413,
	"URITooLong":                    414,
	"UnsupportedMediaType":          415,
	"RangeNotSatisfiable":           416,
	"ExpectationFailed":             417,
	"MisdirectedRequest":            421,
	"UnprocessableEntity":           422,
	"Locked":                        423,
	"FailedDependency":              424,
	"UpgradeRequired":               426,
	"PreconditionRequired":          428,
	"TooManyRequests":               429,
	"RequestHeaderFieldsTooLarge":   431,
	"InternalServerError":           500,
	"NotImplemented":                501,
	"BadGateway":                    502,
	"ServiceUnavailable":            503,
	"GatewayTimeout":                504,
	"HTTPVersionNotSupported":       505,
	"VariantAlsoNegotiates":         506,
	"InsufficientStorage":           507,
	"LoopDetected":                  508,
	"NotExtended":                   510,
	"NetworkAuthenticationRequired": 511,
}
