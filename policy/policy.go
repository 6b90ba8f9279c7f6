// Package policy holds what an embedded engine enforces: plain Go values, written by hand or read from files in
// Aperture's YAML shapes by [Load].
//
// Names of labels and control points have up to 255 bytes of valid UTF-8 wherever a policy has one: no flow has others.
//
// Values are data: nothing here runs. They are safe for concurrent use as long as nobody changes them, and an engine
// that was built from them keeps none of their maps and slices.
package policy

import (
	"time"
)

// A Policy is a named list of components that act at control points.
type Policy struct {
	// Name identifies the policy in decisions, errors and metrics. Required; unique within an engine.
	Name string

	// Components run in this order within their stage. Required.
	Components []Component

	// Warnings lists what the file that the policy came from says and this package has no use for, one
	// "file:line:column: field: …" each. Load fills it; values written in Go leave it empty.
	Warnings []string
}

// A Component is one part of a policy that decides about flows: a [RateLimiter], [ConcurrencyLimiter], [QuotaScheduler],
// [ConcurrencyScheduler], [LoadScheduler], [AIMDLoadScheduler], [Sampler] or [LoadRamp]. The interface is sealed, so that
// kinds can be added.
type Component interface {
	id() string         // its own, "" for the default
	check(wrong report) // what keeps it from running
}

// Values of a component's MaxIdle.
const (
	// DefaultMaxIdle is how long a limiter remembers a key that nobody uses when MaxIdle is zero.
	DefaultMaxIdle = 2 * time.Hour
	// KeepIdle makes a limiter remember idle keys for as long as there is room.
	KeepIdle time.Duration = -1
)

// RateLimiter is a token bucket for each value of a label. A flow takes tokens and is rejected while the bucket has
// too few: with DeniedStatus, and with the time until it has enough, unless it never will.
type RateLimiter struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Capacity is the most tokens a bucket holds; a new bucket is full. Zero refuses every flow. Not negative.
	Capacity float64

	// Fill tokens are added each Interval. Zero never refills. Not negative.
	Fill     float64
	Interval time.Duration // Required, positive.

	// LimitBy is the label whose values have a bucket each. Empty: one bucket for all flows. A flow without the
	// label passes unlimited.
	LimitBy string

	// StepFill adds Fill tokens at once at the end of each Interval; by default they trickle in continuously.
	StepFill bool

	// DelayInitialFill makes a full bucket that is drawn on wait as long as it takes to fill it whole before it
	// begins to refill.
	DelayInitialFill bool

	// MaxIdle is how long an unused bucket is remembered once it is full again. Zero means DefaultMaxIdle, KeepIdle
	// (or any negative value) as long as there is room. A bucket that is not full is never forgotten.
	MaxIdle time.Duration

	// TokensLabel is the label that says how many tokens a flow takes: a decimal number, not negative. A flow
	// without it, or with anything else in it, takes 1.
	TokensLabel string

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 429.
	DeniedStatus int

	// PassThrough accepts every flow and takes no tokens.
	PassThrough bool

	// DryRun decides and counts, but drops no flow. A flow takes what there is for it, and one that the component would
	// have dropped takes nothing. flowctl.WithDryRun does the same for all components that a client's flows meet.
	DryRun bool
}

func (l RateLimiter) id() string { return l.ID }

// ConcurrencyLimiter bounds the flows that are in flight at once for each value of a label. A flow takes slots when it
// starts and gives them back when it ends; while all are taken, flows are rejected with DeniedStatus.
type ConcurrencyLimiter struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Max is the number of slots. A flow is admitted while at least part of one is free, so a flow that costs more
	// than is free may overshoot. Zero refuses every flow. Not negative.
	Max float64

	// MaxInflight is when a slot whose flow has not ended is taken back. Required, positive.
	MaxInflight time.Duration

	// LimitBy is the label whose values have slots of their own. Empty: all flows share them. A flow without the
	// label passes unlimited.
	LimitBy string

	// MaxIdle is how long a key without flows in flight is remembered. Zero means DefaultMaxIdle, KeepIdle (or any
	// negative value) as long as there is room.
	MaxIdle time.Duration

	// TokensLabel is the label that says how many slots a flow takes: a decimal number, not negative. A flow without
	// it, or with anything else in it, takes 1.
	TokensLabel string

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 429.
	DeniedStatus int

	// PassThrough accepts every flow and takes no slots.
	PassThrough bool

	// DryRun decides and counts, but drops no flow. A flow takes what there is for it, and one that the component would
	// have dropped takes nothing. flowctl.WithDryRun does the same for all components that a client's flows meet.
	DryRun bool
}

func (l ConcurrencyLimiter) id() string { return l.ID }

// A Selector picks the flows of one control point, or those of them whose labels match.
type Selector struct {
	// ControlPoint is compared exactly; there is no wildcard. Required.
	ControlPoint string

	// Service is compared exactly with the client's service name. Empty and "any" select every service.
	Service string

	// Labels narrows the selection. The zero value matches all labels.
	Labels LabelMatcher
}

// At selects every flow of the control points.
func At(controlPoints ...string) []Selector {
	selectors := make([]Selector, len(controlPoints))
	for i, cp := range controlPoints {
		selectors[i].ControlPoint = cp
	}
	return selectors
}

// A LabelMatcher matches labels that satisfy all of its parts. The zero value matches everything.
type LabelMatcher struct {
	// Equal holds labels and the exact values they must have.
	Equal map[string]string

	// Require holds conditions on single labels.
	Require []Requirement

	// Expression is a condition of any shape; nil is always true.
	Expression Expression
}

// A Requirement is a condition on one label.
type Requirement struct {
	Key      string
	Operator Operator
	Values   []string // for In and NotIn: at least one
}

// Operator is how a [Requirement] looks at its label.
type Operator string

// The operators. A label that a flow does not have satisfies NotIn.
const (
	In           Operator = "In"
	NotIn        Operator = "NotIn"
	Exists       Operator = "Exists"
	DoesNotExist Operator = "DoesNotExist"
)

// An Expression is a condition on labels: [Not], [All], [Any], [LabelExists], [LabelEquals] or [LabelMatches]. The
// interface is sealed.
type Expression interface {
	expression()
}

type (
	// Not is true when Of is false.
	Not struct{ Of Expression }

	// All is true when each of its parts is; without parts it is true.
	All []Expression

	// Any is true when at least one of its parts is; without parts it is false.
	Any []Expression

	// LabelExists is true when the flow has the label.
	LabelExists string

	// LabelEquals is true when the flow has the label with just this value.
	LabelEquals struct{ Label, Value string }

	// LabelMatches is true when the flow has the label and Regex (RE2, not anchored) finds a match in its value. Regex
	// compiles to at most 1,000 instructions. Where the value has more bytes than 262,144 by the number of instructions,
	// a match would take too long: the component rejects the flow, unless its other conditions do not hold.
	LabelMatches struct{ Label, Regex string }
)

func (Not) expression()          {}
func (All) expression()          {}
func (Any) expression()          {}
func (LabelExists) expression()  {}
func (LabelEquals) expression()  {}
func (LabelMatches) expression() {}
