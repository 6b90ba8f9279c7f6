package policy

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
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
)

// circuitKeys are the keys of a component of a circuit.
const circuitKeys = "flow_control variable bool_variable nested_circuit " + signalComponents

// spec reads a policy without its name: the top of a plain file, or the spec of a resource.
func (d *decoder) spec(v value) []Component {
	f := d.fields(v, "circuit resources", "")
	d.resources(f.get("resources"))
	circuit := d.fields(f.get("circuit"), "components", "evaluation_interval")
	d.learnCircuit(circuit.get("components"))
	components := d.circuit(d.fill(circuit, "components", "components"), nil)
	d.unusedMeters()
	return components
}

// resources notes the flux meters, for those ports that name one.
func (d *decoder) resources(v value) {
	resources := d.fields(v, "flow_control", "infra_meters telemetry_collectors")
	f := d.fields(resources.get("flow_control"), "classifiers flux_meters", "")
	d.refuse(f.get("classifiers"), sequence, "classifiers")
	if meters := f.get("flux_meters"); d.is(meters, mapping) {
		d.meters = meters
	}
}

// unusedMeters warns of the flux meters that no port names.
func (d *decoder) unusedMeters() {
	if d.meters.node == nil {
		return
	}
	for _, e := range d.meters.entries {
		if !d.metered[e.key] {
			d.unused(d.meters.part(e), ": no port of a load scheduler names it")
		}
	}
}

// circuit appends the components of a circuit that decide about flows.
func (d *decoder) circuit(v value, components []Component) []Component {
	if d.learned != nil {
		return nil
	}
	// A component may use signals that later components define: they are read first.
	first := len(components) // the circuit's place among the components of the policy
	items := d.items(v)
	deciders := make([]value, len(items))
	for i, item := range items {
		kind, v := d.one(item, circuitKeys)
		switch kind {
		case "": // d.one has reported why
		case "flow_control":
			deciders[i] = v
			d.outputs(v.node)
		case "variable", "bool_variable":
			d.variable(v, kind == "bool_variable")
		case "nested_circuit":
			d.errorf(v, "nested_circuit is not supported yet")
		default:
			d.unused(v, "")
			d.outputs(v.node)
		}
	}
	known := deciderKeys()
	for i, decider := range deciders {
		if decider.up == nil {
			continue
		}
		name, v := d.one(decider, known)
		if form, ok := formOf(name); ok {
			if d.sources != nil {
				v.field = fmt.Sprintf("components[%d]", len(components))
				d.note(v.field, v)
			}
			components = append(components, form.read(d, d.inCircuit(v, form, "root."+strconv.Itoa(first+i))))
		} else if name != "" {
			d.errorf(v, "%s is not supported yet", name)
		}
	}
	return components
}

// outputs notes the signals that come out of a component.
func (d *decoder) outputs(n *node) {
	for _, item := range n.items {
		d.outputs(item)
	}
	for _, e := range n.entries {
		if e.key != "out_ports" {
			d.outputs(e.value)
			continue
		}
		for _, port := range e.value.entries {
			if name := (value{node: port.value}).get("signal_name"); name.node != nil && name.kind == text {
				d.computed[name.text] = true
			}
		}
	}
}

// need returns v, and reports it if it is missing.
func (d *decoder) need(v value) value {
	if v.node == nil {
		d.errorf(v, "is required")
	}
	return v
}

// refuse reports a sequence or mapping of things that are not supported, unless it is empty.
func (d *decoder) refuse(v value, want kind, what string) {
	if d.is(v, want) && len(v.node.items)+len(v.entries) > 0 {
		d.errorf(v, "%s are not supported", what)
	}
}

// port reads an input port: the constant that it is connected to. A port without a connection is 0.
func (d *decoder) port(v value) float64 {
	if v.node == nil {
		d.noPort(v)
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

// noPort learns the keys of an input port, in a decoder that learns.
func (d *decoder) noPort(v value) {
	if d.learned != nil && has(d.learned[v.up.path()], v.key) { // blueprint values lack some
		d.one(v, "constant_signal signal_name")
		d.constant(v.get("constant_signal"))
	}
}

// signal reads an input port that may be connected to more than constants: to a flux meter, by its name, or to a signal
// that no component defines, which the host will provide. A port without a connection is nil.
func (d *decoder) signal(v value) Signal {
	if v.node == nil {
		d.noPort(v)
		return nil
	}
	switch kind, from := d.one(v, "constant_signal signal_name"); kind {
	case "constant_signal":
		return Constant(d.constant(from))
	case "signal_name":
		d.note(v.field, from)
		name := d.text(from)
		if constant, ok := d.signals[name]; ok {
			return Constant(constant)
		}
		if d.computed[name] {
			d.errorf(from, "unsupported circuit: signal %s comes from a component that is not supported", quote(name))
		} else if meter := d.meters.get(name); meter.node != nil {
			d.metered[name] = true
			meter.field = v.field
			return d.meter(meter)
		}
		return Named(name)
	}
	return nil
}

// meter reads a flux meter as the mean latency of half a minute, as Aperture's blueprints do.
func (d *decoder) meter(v value) MeanLatency {
	f := d.fields(v, "selectors attribute_key", "static_buckets linear_buckets exponential_buckets exponential_buckets_range")
	if attribute := f.get("attribute_key"); attribute.node != nil {
		d.want(attribute, "workload_duration_ms")
	}
	return MeanLatency{Selectors: d.selectors(d.fill(f, "Selectors", "selectors")), Over: 30 * time.Second}
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
	name := d.text(d.need(output))
	from := d.setting(d.text(f.get("config_key")), f.get("constant_output"))
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

// dynamicConfig notes what variables and some components may be set to.
func (d *decoder) dynamicConfig(v value) {
	if d.is(v, mapping) {
		d.dynamic = v
	}
}

// setting returns what dynamicConfig has under the key, or otherwise what the policy itself has.
func (d *decoder) setting(key string, otherwise value) value {
	if set := d.dynamic.get(key); key != "" && set.node != nil {
		d.used[key] = true
		return set
	}
	return otherwise
}

// unusedSettings warns of the settings that nothing has asked for.
func (d *decoder) unusedSettings() {
	if d.dynamic.node == nil {
		return
	}
	for _, e := range d.dynamic.entries {
		if !d.used[e.key] {
			d.unused(d.dynamic.part(e), ": nothing has this config key")
		}
	}
}

func (d *decoder) selectors(v value) []Selector {
	var selectors []Selector
	for _, item := range d.items(v) {
		f := d.fields(item, "control_point service label_matcher", "agent_group")
		selectors = append(selectors, Selector{
			ControlPoint: d.text(d.fill(f, "ControlPoint", "control_point")),
			Service:      d.labelValue(f.get("service")),
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
			m.Equal[e.key] = d.labelValue(label)
			if impossible(e.key) != "" { // only then: other names may look the same when cut to fit an error
				label.line, label.column = e.line, e.column
				d.note(equal(labels.field, e.key), label)
			}
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
			Values:   d.labelValues(d.fill(r, "Values", "values")),
		})
	}
	if e := d.fill(f, "Expression", "expression"); e.node != nil || d.learned != nil {
		m.Expression = d.expression(e)
	}
	return m
}

func (d *decoder) expression(v value) Expression {
	kind, part := d.one(v, expressionKeys)
	switch kind {
	case "not":
		part.field = child(v.field, "Of")
		d.note(part.field, part)
		return Not{Of: d.expression(part)}
	case "all":
		return All(d.expressions(part))
	case "any":
		return Any(d.expressions(part))
	case "label_exists":
		d.note(v.field, part)
		return LabelExists(d.text(part))
	case "label_equals":
		f := d.fields(part, "label value", "")
		return LabelEquals{Label: d.text(d.fill(f, "Label", "label")), Value: d.labelValue(f.get("value"))}
	case "label_matches":
		f := d.fields(part, "label regex", "")
		return LabelMatches{Label: d.text(d.fill(f, "Label", "label")), Regex: d.regex(d.fill(f, "Regex", "regex"))}
	}
	return nil
}

func (d *decoder) expressions(v value) []Expression {
	var expressions []Expression
	if !d.isShort {
		v = d.fields(v, "of", "").get("of")
	}
	for _, item := range d.items(v) {
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
