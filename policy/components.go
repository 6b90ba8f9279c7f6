package policy

import "slices"

// A component is what a file says about one.
type component struct {
	value
	id    string
	ports value               // the values of the input ports
	port  func(value) float64 // reads an input port
}

// inCircuit takes a component as circuits have it.
func (d *decoder) inCircuit(v value, as form, id string) component {
	f := d.fields(v, as.keys+" in_ports dry_run", "out_ports")
	return component{f, id, d.fields(f.get("in_ports"), as.ports+" "+as.options, ""), d.port}
}

// inValues takes a component as blueprint values have it.
func (d *decoder) inValues(v value, as form) component {
	f := d.fields(v, as.keys+" "+as.ports+" dry_run", "alerter")
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

func (d *decoder) passThroughValues(c component, sessionLabel string) []string {
	key := d.text(c.get("pass_through_label_values_config_key"))
	return d.valuesToPass(d.setting(key, c.get("pass_through_label_values")), sessionLabel)
}

// valuesToPass reads values of a label. Without the label, only "" has an effect: it lets all flows pass.
func (d *decoder) valuesToPass(v value, sessionLabel string) []string {
	values := d.labelValues(v)
	d.needsLabel(v, values, sessionLabel, "session_label_key")
	return values
}

// needsLabel warns of values of a label when there is no such label.
func (d *decoder) needsLabel(v value, values []string, label, key string) {
	if label == "" && len(values) > 0 && !slices.Contains(values, "") {
		d.unused(v, ", because there is no "+key)
	}
}

// The keys that several kinds have.
const (
	aimdPorts   = "signal setpoint overload_confirmation"
	samplerKeys = "parameters pass_through_label_values pass_through_label_values_config_key"
)
