package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// LoadRamp is a [Sampler] in ramp mode whose percentage moves along Steps, and stays at the last one's target.
type LoadRamp struct {
	// ID names the component within its policy. Default: "load_ramp.<index>", its place
	// among the policy's LoadRamps.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Steps are taken in order. At least one.
	Steps []RampStep

	// Start makes the ramp move as soon as the engine has it. Otherwise it stays at the first step until the engine's Component
	// moves it.
	Start bool

	// SessionLabel and PassThroughValues are as in [Sampler].
	SessionLabel      string
	PassThroughValues []string

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 403.
	DeniedStatus int

	// Local keeps the position of the ramp in the engine. Otherwise engines that share a store move the ramp together.
	Local bool

	// DryRun decides and counts, but drops no flow: flows in ramp mode are all accepted.
	DryRun bool
}

func (LoadRamp) kind() index  { return loadRamp }
func (r LoadRamp) id() string { return r.ID }

func (r LoadRamp) passes() (string, []string) { return r.SessionLabel, r.PassThroughValues }

func (r LoadRamp) reads(read func(components.Role, string)) {
	read(components.SamplesBy, r.SessionLabel)
	selectorsRead(r.Selectors, components.SelectsBy, read)
}

// A RampStep is one leg of a [LoadRamp].
type RampStep struct {
	// Target is the percentage at the end of the step, 0 to 100.
	Target float64

	// Duration is how long the step takes. The first step stands at its target all the while; later ones move there
	// from the target before, in a straight line. Zero is a jump. Not negative.
	Duration time.Duration
}

func (r LoadRamp) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), r.Selectors)
	if len(r.Steps) == 0 {
		wrong(".Steps", "needs at least one step")
	}
	for i, step := range r.Steps {
		wrong := wrong.at(".Steps", i)
		checkPercentage(wrong.sub(".Target"), step.Target)
		checkNotNegative(wrong.sub(".Duration"), step.Duration)
	}
	checkName(wrong.sub(".SessionLabel"), r.SessionLabel)
	checkStatus(wrong.sub(".DeniedStatus"), r.DeniedStatus)
}

func (d *decoder) loadRamp(c component) Component {
	r := d.ramp(d.fields(c.get("parameters"), "sampler steps", ""))
	r.ID = c.id
	forward, backward, reset := d.port(c.ports.get("forward")), d.port(c.ports.get("backward")), d.port(c.ports.get("reset"))
	r.Start = forward != 0 && backward == 0 && reset == 0
	r.PassThroughValues = d.passThroughValues(c, r.SessionLabel)
	r.Local, _, _ = d.sharing(c.value, LoadRamp{})
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
