package policy

import (
	"github.com/headgate-go/headgate/internal/components"
)

// Sampler accepts a share of the flows. Flows with the same value of SessionLabel get the same decision. A value that
// is accepted at some percentage is accepted at every larger one.
type Sampler struct {
	// ID names the component within its policy. Default: "sampler.<index>", its place
	// among the policy's Samplers.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// AcceptPercentage is the share of flows that are accepted, 0 to 100. Zero accepts none. (In Aperture's files, a missing
	// key means 100, or 0 in ramp mode.)
	AcceptPercentage float64

	// SessionLabel is the label whose value decides, by its FNV-1a hash, as Aperture's agents do. The hash is uneven for values
	// that differ only in their last characters: 33.3 accepts none of user0 to user99, and 28.2 % of user0 to user4999. Values
	// that differ throughout, such as random IDs, are accepted by the percentage. Of flows without the label, or with an empty
	// value, a random share is accepted.
	SessionLabel string

	// PassThroughValues are values of SessionLabel that are always accepted; "" stands for flows without it.
	PassThroughValues []string

	// RampMode makes the sampler a ramp. A flow in ramp mode is accepted only if at least one such sampler, or a
	// [LoadRamp], selects it, and none of them drops it. Other flows are sampled as by any sampler.
	RampMode bool

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 403.
	DeniedStatus int

	// DryRun decides and counts, but drops no flow: in ramp mode it accepts all that it selects.
	DryRun bool
}

func (Sampler) kind() index  { return sampler }
func (s Sampler) id() string { return s.ID }

func (s Sampler) passes() (string, []string) { return s.SessionLabel, s.PassThroughValues }

func (s Sampler) reads(read func(components.Role, string)) {
	read(components.SamplesBy, s.SessionLabel)
	selectorsRead(s.Selectors, components.SelectsBy, read)
}

func (s Sampler) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), s.Selectors)
	checkPercentage(wrong.sub(".AcceptPercentage"), s.AcceptPercentage)
	checkName(wrong.sub(".SessionLabel"), s.SessionLabel)
	checkStatus(wrong.sub(".DeniedStatus"), s.DeniedStatus)
}

func (d *decoder) sampler(c component) Component {
	f := d.fields(c.get("parameters"), "selectors session_label_key denied_response_status_code ramp_mode", "")
	s := Sampler{
		ID:           c.id,
		Selectors:    d.selectors(d.fill(f, "Selectors", "selectors")),
		SessionLabel: d.text(d.fill(f, "SessionLabel", "session_label_key")),
		RampMode:     d.boolean(f.get("ramp_mode"), false),
		DeniedStatus: d.status(d.fill(f, "DeniedStatus", "denied_response_status_code")),
		DryRun:       d.dryRun(c),
	}
	s.PassThroughValues = d.passThroughValues(c, s.SessionLabel)
	percentage := d.fill(c.ports, "AcceptPercentage", "accept_percentage")
	s.AcceptPercentage = d.port(percentage)
	if percentage.node == nil && !s.RampMode {
		s.AcceptPercentage = 100
	}
	return s
}
