package policy

import (
	"cmp"
	"math"

	"github.com/headgate-go/headgate/internal/components"
)

// AIMDLoadScheduler is a [LoadScheduler] that sets its own load multiplier every 10 seconds (additive increase,
// multiplicative decrease). While Signal is on the bad side of Setpoint, it multiplies the share that it has let in by
// a factor below 1. Otherwise it adds to the share step by step. From MaxLoadMultiplier on, it accepts every flow.
type AIMDLoadScheduler struct {
	// ID names the component within its policy. Default: "aimd_load_scheduler.<index>", its place
	// among the policy's AIMDLoadSchedulers.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Signal is how loaded the service is, and Setpoint how loaded it should be. While either is not a number, or
	// Setpoint is 0, every flow is accepted. Required.
	Signal, Setpoint Signal

	// OverloadConfirmation must be other than 0 for an overload to count. Nil confirms every overload.
	OverloadConfirmation Signal

	// Gradient says how much an overload costs.
	Gradient Gradient

	// MaxLoadMultiplier is the multiplier from which on every flow is accepted. Zero means 2. Not negative.
	MaxLoadMultiplier float64

	// LinearIncrement is added every 10 seconds without overload. Zero means 0.025. Not negative.
	LinearIncrement float64

	// WorkloadLatencyTokens is as in [LoadScheduler].
	WorkloadLatencyTokens bool

	// Scheduler says which flow goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (AIMDLoadScheduler) kind() index  { return aimdLoadScheduler }
func (s AIMDLoadScheduler) id() string { return s.ID }
func (AIMDLoadScheduler) sheds()       {}

func (s AIMDLoadScheduler) reads(read func(components.Role, string)) {
	loadReads(s.Selectors, &s.Scheduler, s.WorkloadLatencyTokens, read)
	for _, signal := range []Signal{s.Signal, s.Setpoint, s.OverloadConfirmation} {
		signalReads(signal, read)
	}
}

// Gradient is the factor of an overload: (signal/setpoint)^Slope, held within Min and Max.
type Gradient struct {
	// Slope is negative where a high signal is an overload, as for a latency, and positive where a low one is. Zero
	// means -1.
	Slope float64

	// Min is the smallest factor. Zero means 0.1.
	Min float64

	// Max is the largest factor. Zero means 1. Not negative, and not less than Min.
	Max float64
}

func (s AIMDLoadScheduler) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), s.Selectors)
	checkSignal(wrong.sub(".Signal"), s.Signal)
	checkSignal(wrong.sub(".Setpoint"), s.Setpoint)
	if s.OverloadConfirmation != nil {
		checkSignal(wrong.sub(".OverloadConfirmation"), s.OverloadConfirmation)
	}
	s.Gradient.check(wrong.sub(".Gradient"))
	checkAmount(wrong.sub(".MaxLoadMultiplier"), s.MaxLoadMultiplier)
	checkAmount(wrong.sub(".LinearIncrement"), s.LinearIncrement)
	s.Scheduler.check(wrong.sub(".Scheduler"))
}

func (g Gradient) check(wrong report) {
	checkNumber(wrong.sub(".Slope"), g.Slope)
	checkNumber(wrong.sub(".Min"), g.Min)
	checkAmount(wrong.sub(".Max"), g.Max)
	least, most := cmp.Or(g.Min, 0.1), cmp.Or(g.Max, 1)
	if least > most {
		wrong(".Min", "must not be above the maximum of %v, is %v", most, least)
	}
}

func (d *decoder) aimdLoadScheduler(c component) Component { return d.aimdInCircuit(c) }

// adaptiveLoadScheduler reads an AIMD load scheduler by its old name, which has a smaller default increment.
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

	// Blueprint values have the defaults of Gradient. Circuits have no default slope, and by default no bounds.
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
