package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// CircuitBreaker rejects flows for a while after too many flows have failed, for each value of a label. The value may name a
// dependency that is in trouble, or a tenant whose work fails. A flow fails if it ends with the status Error, or takes longer
// than SlowAfter.
//
// The breaker is closed at first, and every flow passes. It opens when at least MinFlows have ended within Window, and
// FailureRatio of them or FailureCount have failed. An open breaker rejects every flow, with DeniedStatus, the cause
// flowctl.CauseCircuitOpen, and the time until it lets flows through again. After OpenDuration it is half-open, and lets
// Probes flows through at a time. After Successes of these have ended well it closes, with nothing counted. When one fails it
// opens again.
//
// A flow counts when it ends, and only in the state that admitted it. These flows count neither as a success nor as a failure,
// and a probe among them gives its place back: flows that do not run, because another component rejects them or their caller has
// gone; flows that their caller has canceled, however they end and however long they took; and flows whose result a cache has. A
// flow that failed before its caller canceled it counts as a failure. A caller's deadline is not a cancellation.
//
// A breaker in the process knows how a flow ended as soon as it ends. A breaker of an agent that serves several processes learns
// it at once from clients that have a session with the agent. It learns it from the telemetry of other clients, about a second
// later. It learns nothing from clients with neither. Only the outcome of a flow that the agent has admitted counts, and only
// once. If the outcome of a probe does not come, the probe keeps its place until ProbeTimeout.
//
// A flowctl.AgentBreaker is something else: it stops checks to an agent that does not answer.
type CircuitBreaker struct {
	// ID names the component within its policy. Default: "circuit_breaker.<index>", its place
	// among the policy's CircuitBreakers.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// FailureRatio opens the breaker when this share of the flows that ended within Window has failed, from 0 to 1. Zero: the
	// share does not matter. Required unless FailureCount is set.
	FailureRatio float64

	// FailureCount opens the breaker when so many flows have failed within Window. Zero: the number does not matter. Not negative, and at
	// most 2,147,483,647, as all counts.
	FailureCount int

	// MinFlows is how many flows must have ended within Window before the breaker opens. Zero means 1. Not negative.
	MinFlows int

	// SlowAfter is how long a flow may take. A flow that takes longer fails, whatever its status, unless its caller has canceled it.
	// Waits in queues do not count.
	// Zero: flows may take any time. Not negative.
	SlowAfter time.Duration

	// Window is how long a flow counts after it has ended. It moves in steps of a fifth of its length, so that a flow counts for up to
	// one step longer. Required, at least 5 ms.
	Window time.Duration

	// OpenDuration is how long an open breaker rejects every flow. Required, positive.
	OpenDuration time.Duration

	// Probes is how many flows a half-open breaker lets through at a time. Zero means 1. Not negative.
	Probes int

	// Successes is how many probes must end well, with none failing, before a half-open breaker closes. Zero means Probes. Not
	// negative.
	Successes int

	// ProbeTimeout is the time after which another flow can take the place of a probe whose outcome has not come. If the outcome
	// comes later, while the breaker is half-open, it still counts. Zero means a minute. Not negative.
	ProbeTimeout time.Duration

	// LimitBy is the label whose values have a breaker each. Empty: one breaker for all flows. A flow without the
	// label passes.
	LimitBy string

	// Overrides are other numbers for single values of the label; see [Override]. They need a LimitBy. A check costs the same with
	// any number of them.
	Overrides map[string]Override

	// MaxIdle is how long an unused breaker is remembered once no flow counts any more. A breaker that is not closed is unused if
	// no flow has come for Window since it could have let one through. Make MaxIdle longer than flows take. Zero means
	// DefaultMaxIdle. KeepIdle, or any negative value, means as long as there is room.
	MaxIdle time.Duration

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 503.
	DeniedStatus int

	// PassThrough accepts every flow and counts none.
	PassThrough bool

	// DryRun decides and counts, but drops no flow. The outcome of a flow that the component would have dropped does not
	// count. flowctl.WithDryRun does the same for all components that a client's flows meet.
	DryRun bool
}

func (CircuitBreaker) kind() index  { return circuitBreaker }
func (b CircuitBreaker) id() string { return b.ID }

func (b CircuitBreaker) reads(read func(components.Role, string)) {
	read(components.LimitsBy, b.LimitBy)
	selectorsRead(b.Selectors, components.SelectsBy, read)
}

// minWindow is the shortest window of a circuit breaker. It has steps of a millisecond.
const minWindow = 5 * time.Millisecond

func (b CircuitBreaker) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), b.Selectors)
	checkNotNegative(wrong.sub(".SlowAfter"), b.SlowAfter)
	switch {
	case b.Window == 0:
		wrong(".Window", "is required")
	case b.Window < minWindow:
		wrong(".Window", "must be at least %s, is %s", minWindow, b.Window)
	}
	checkCount(wrong.sub(".Probes"), b.Probes)
	checkCount(wrong.sub(".Successes"), b.Successes)
	checkNotNegative(wrong.sub(".ProbeTimeout"), b.ProbeTimeout)
	checkName(wrong.sub(".LimitBy"), b.LimitBy)
	checkStatus(wrong.sub(".DeniedStatus"), b.DeniedStatus)
	checkOverrides(wrong, b)
	b.numbers(wrong)
}

func (b CircuitBreaker) limits() (string, map[string]Override) { return b.LimitBy, b.Overrides }

func (b CircuitBreaker) numbers(wrong report) {
	if !(b.FailureRatio >= 0 && b.FailureRatio <= 1) { // NaN is not >= 0
		wrong(".FailureRatio", "must be a share from 0 to 1, is %v", b.FailureRatio)
	}
	checkCount(wrong.sub(".FailureCount"), b.FailureCount)
	checkCount(wrong.sub(".MinFlows"), b.MinFlows)
	checkPositive(wrong.sub(".OpenDuration"), b.OpenDuration)
	if b.FailureRatio == 0 && b.FailureCount == 0 { // last: in a file nothing below the component is reported after it
		wrong("", "needs a failure ratio or a failure count above 0: without one it never opens")
	}
}

func checkCount(wrong report, n int) {
	if n < 0 || n > maxCount {
		wrong("", "must be a whole number from 0 to %d, is %d", maxCount, n)
	}
}

func (d *decoder) circuitBreaker(c component) Component {
	f := d.fields(c.get("parameters"), "failure_ratio failure_count min_flows slow_after window open_duration probes successes probe_timeout limit_by_label_key max_idle_time overrides", "")
	request := d.fields(c.get("request_parameters"), "denied_response_status_code", "")
	return CircuitBreaker{
		ID:           c.id,
		Selectors:    d.selectors(d.fill(c.value, "Selectors", "selectors")),
		FailureRatio: d.number(d.fill(f, "FailureRatio", "failure_ratio")),
		FailureCount: d.count(d.fill(f, "FailureCount", "failure_count")),
		MinFlows:     d.count(d.fill(f, "MinFlows", "min_flows")),
		SlowAfter:    d.duration(d.fill(f, "SlowAfter", "slow_after")),
		Window:       d.duration(d.fill(f, "Window", "window")),
		OpenDuration: d.duration(d.fill(f, "OpenDuration", "open_duration")),
		Probes:       d.count(d.fill(f, "Probes", "probes")),
		Successes:    d.count(d.fill(f, "Successes", "successes")),
		ProbeTimeout: d.duration(d.fill(f, "ProbeTimeout", "probe_timeout")),
		LimitBy:      d.text(d.fill(f, "LimitBy", "limit_by_label_key")),
		MaxIdle:      d.optional(f.get("max_idle_time"), KeepIdle),
		Overrides:    d.overrides(f, CircuitBreaker{}),
		DeniedStatus: d.status(d.fill(request, "DeniedStatus", "denied_response_status_code")),
		PassThrough:  d.passThrough(c),
		DryRun:       d.dryRun(c),
	}
}

// count reads a whole number that is not negative.
func (d *decoder) count(v value) int {
	n := d.number(v)
	if v.node == nil || v.kind != number {
		return 0
	}
	if !(n >= 0 && n <= maxCount && n == float64(int(n))) { // NaN is not >= 0
		d.errorf(v, "must be a whole number from 0 to %d, is %v", maxCount, n)
		return 0
	}
	return int(n)
}

// maxCount is what an int holds on every machine.
const maxCount = 1<<31 - 1
