package policy

import "time"

// Sampler accepts a share of the flows. Flows with the same value of SessionLabel share their fate, and one that was
// accepted at some percentage is at every larger one.
type Sampler struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// AcceptPercentage is the share of flows that are accepted, 0 to 100. Zero accepts none. (In a file, a key that is
	// missing means 100.)
	AcceptPercentage float64

	// SessionLabel is the label whose value decides (by its FNV-1a hash). Of flows without it, and where it is empty,
	// a random share is accepted.
	SessionLabel string

	// PassThroughValues are values of SessionLabel that are always accepted; "" stands for flows without it.
	PassThroughValues []string

	// RampMode makes the sampler one that flows in ramp mode need: they are accepted only where at least one such
	// sampler, or a [LoadRamp], selects them, and none of them drops them. Other flows it samples as any sampler does.
	RampMode bool

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 403.
	DeniedStatus int

	// DryRun decides and counts, but drops no flow: in ramp mode it accepts all that it selects.
	DryRun bool
}

func (s Sampler) id() string { return s.ID }

// LoadRamp is a [Sampler] in ramp mode whose percentage moves along Steps, and stays at the last one's target.
type LoadRamp struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Steps are taken in order. At least one.
	Steps []RampStep

	// Start has the ramp move as soon as the engine has it. Otherwise it stands at the first step until the engine's
	// Ramp moves it.
	Start bool

	// SessionLabel and PassThroughValues are as in [Sampler].
	SessionLabel      string
	PassThroughValues []string

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 403.
	DeniedStatus int

	// DryRun decides and counts, but drops no flow: flows in ramp mode are all accepted.
	DryRun bool
}

func (r LoadRamp) id() string { return r.ID }

// A RampStep is one leg of a [LoadRamp].
type RampStep struct {
	// Target is the percentage at the end of the step, 0 to 100.
	Target float64

	// Duration is how long the step takes. The first step stands at its target all the while; later ones move there
	// from the target before, in a straight line. Zero is a jump. Not negative.
	Duration time.Duration
}
