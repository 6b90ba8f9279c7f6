// Package policy holds what an embedded engine enforces: plain Go values, written by hand or read from files by [Load].
// Headgate's own files have the fields of these values for keys. Files in Aperture's YAML shapes are read, too.
//
// Names of labels and control points have up to 255 bytes of valid UTF-8 wherever a policy has one: no flow has others.
//
// Values are data: nothing here runs. They are safe for concurrent use as long as they are not changed. An engine that
// was built from them keeps none of their maps and slices.
package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// A Policy is a named list of components that act at control points.
type Policy struct {
	// Name identifies the policy in decisions, errors and metrics. Required; unique within an engine.
	Name string

	// Labels are names of this policy for labels of the flow: {"user_type": "http.request.header.user_type"}. Where a component
	// names user_type, it reads the other label. If the flow itself has a label user_type, this policy ignores it. So callers
	// cannot use it to claim another value. Answers, warnings and telemetry name the flow's own label, and callers settle costs
	// by that label. A name cannot stand for another name.
	Labels map[string]string

	// Components run in this order within their stage. Required.
	Components []Component

	// Warnings lists what the policy's file says that this package has no use for, and values that flows hardly have,
	// each as "file:line:column: field: …". Load fills it; values written in Go leave it empty.
	Warnings []string
}

// A Component is one part of a policy that decides about flows: a [RateLimiter], [ConcurrencyLimiter], [QuotaScheduler],
// [ConcurrencyScheduler], [LoadScheduler], [AIMDLoadScheduler], [Sampler], [LoadRamp], [CalendarQuota] or [CircuitBreaker], or
// a pointer to one, which is not nil. The interface is sealed, so that kinds can be added.
type Component interface {
	kind() index
	id() string                               // its own, "" for the default
	check(wrong report)                       // what keeps it from running
	reads(read func(components.Role, string)) // the labels that it reads; "" for one that it may name but does not
}

// Values of a component's MaxIdle.
const (
	// DefaultMaxIdle is how long a limiter remembers an unused key when MaxIdle is zero.
	DefaultMaxIdle = 2 * time.Hour
	// KeepIdle makes a limiter remember idle keys for as long as there is room.
	KeepIdle time.Duration = -1
)
