package policy

import "time"

// QuotaScheduler is a token bucket for each value of a label, with a queue before it: a flow that finds too few tokens
// waits for them, and flows that wait share what comes by weighted fair queueing; see [Scheduler].
type QuotaScheduler struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Capacity is the most tokens a bucket holds; a new bucket is full. Zero refuses every flow. Not negative.
	Capacity float64

	// Fill tokens are added each Interval. Zero never refills. Not negative.
	Fill     float64
	Interval time.Duration // Required, positive.

	// LimitBy is the label whose values have a bucket and a queue each. Empty: one for all flows. A flow without the
	// label passes unlimited.
	LimitBy string

	// StepFill, DelayInitialFill and MaxIdle are as in [RateLimiter].
	StepFill         bool
	DelayInitialFill bool
	MaxIdle          time.Duration

	// Scheduler says who goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// PassThrough accepts every flow and takes no tokens.
	PassThrough bool

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (s QuotaScheduler) id() string { return s.ID }

// ConcurrencyScheduler bounds the flows that are in flight at once for each value of a label, with a queue before it: a
// flow that finds all slots taken waits for one, and flows that wait share what is given back by weighted fair
// queueing; see [Scheduler].
type ConcurrencyScheduler struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Max is the number of slots. A flow is admitted while at least part of one is free, so a flow that costs more
	// than is free may overshoot. Zero refuses every flow. Not negative.
	Max float64

	// MaxInflight is when a slot whose flow has not ended is taken back. Required, positive.
	MaxInflight time.Duration

	// LimitBy is the label whose values have slots and a queue of their own. Empty: all flows share them. A flow
	// without the label passes unlimited.
	LimitBy string

	// MaxIdle is how long a key without flows in flight is remembered. Zero means DefaultMaxIdle, KeepIdle (or any
	// negative value) as long as there is room.
	MaxIdle time.Duration

	// Scheduler says who goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// PassThrough accepts every flow and takes no slots.
	PassThrough bool

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (s ConcurrencyScheduler) id() string { return s.ID }

// LoadScheduler lets in a share of the load that comes: tokens flow at LoadMultiplier times the rate at which flows have
// asked for them over the last 30 seconds, and flows that find too few wait for them by weighted fair queueing; see
// [Scheduler]. Until it has seen 30 seconds of load, and after as long a silence, it accepts every flow, those that wait
// already too.
type LoadScheduler struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// LoadMultiplier is the share, looked at every 10 seconds: below 0 counts as 0, which lets nothing in; a signal
	// that is not a number accepts every flow. Required.
	LoadMultiplier Signal

	// WorkloadLatencyTokens has a flow of a workload cost the workload's mean latency of the last 30 minutes, in
	// milliseconds, once there is one, unless a label says what it costs or the workload has NoTokens.
	WorkloadLatencyTokens bool

	// Scheduler says who goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (s LoadScheduler) id() string { return s.ID }

// AIMDLoadScheduler is a [LoadScheduler] that sets its own load multiplier, every 10 seconds: while Signal is on the bad
// side of Setpoint it multiplies the load that it has let in by a factor below 1, and else it adds to it step by step,
// until MaxLoadMultiplier, where it accepts every flow (additive increase, multiplicative decrease).
type AIMDLoadScheduler struct {
	// ID names the component within its policy. Default: "root.<index>", its place in Components.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Signal tells how loaded the service is, and Setpoint what it should be at. While either is not a number, or
	// Setpoint is 0, every flow is accepted. Required.
	Signal, Setpoint Signal

	// OverloadConfirmation must be other than 0 for an overload to count. Nil is always.
	OverloadConfirmation Signal

	// Gradient says how much an overload costs.
	Gradient Gradient

	// MaxLoadMultiplier is where every flow is accepted. Zero means 2. Not negative.
	MaxLoadMultiplier float64

	// LinearIncrement is added every 10 seconds without overload. Zero means 0.025. Not negative.
	LinearIncrement float64

	// WorkloadLatencyTokens is as in [LoadScheduler].
	WorkloadLatencyTokens bool

	// Scheduler says who goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (s AIMDLoadScheduler) id() string { return s.ID }

// Gradient is the factor of an overload: (signal/setpoint)^Slope, held within Min and Max.
type Gradient struct {
	// Slope is negative where a high signal is an overload, as for a latency, and positive where a low one is. Zero
	// means -1.
	Slope float64

	// Min and Max bound the factor. Zeros mean 0.1 and 1. Max is not negative, and not less than Min.
	Min, Max float64
}

// Scheduler says which of the flows that wait for tokens goes first: the one with the smallest virtual finish time by
// self-clocked fair queueing (Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994).
// Workloads share the tokens in proportion to their priorities, and within a workload the values of a fairness label
// share alike. The zero value serves flows in the order in which they come.
type Scheduler struct {
	// Workloads are tried in order: a flow belongs to the first that matches its labels, and to Default when none does.
	Workloads []Workload

	// Default is for flows that no workload matches.
	Default WorkloadParameters

	// Margin is how long before its deadline a flow gives up waiting, so that the answer arrives. Zero means
	// DefaultMargin. Not negative.
	Margin time.Duration

	// TokensLabel, PriorityLabel and WorkloadLabel are labels that override the workload's Tokens, Priority and Name,
	// where they can be used: a number of tokens that is not negative, a priority above 0. Let only those set them whom
	// you trust: a flow takes what it says, and a load scheduler takes it for the load.
	TokensLabel, PriorityLabel, WorkloadLabel string

	// FairnessLabel is the label whose values share a workload's tokens alike. Empty: first come, first served.
	FairnessLabel string

	// MaxQueue is how many flows may wait at once, for all values of the component's label together, since those may be
	// made up. When there is no room, the newest flow of the largest share is rejected: of the value of the component's
	// label with the most flows that wait, its largest workload, and there the largest fairness value. Zero means
	// DefaultMaxQueue. Not negative. Policy files have no key for it.
	MaxQueue int

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 503.
	DeniedStatus int
}

// Defaults of a Scheduler.
const (
	// DefaultMargin is the Margin of zero.
	DefaultMargin = 10 * time.Millisecond
	// DefaultMaxQueue is the MaxQueue of zero.
	DefaultMaxQueue = 10_000
)

// A Workload is a class of flows with a share of its own.
type Workload struct {
	// Name identifies the workload in decisions and metrics. Default: its index. Unique within the scheduler, and
	// neither "default" nor another workload's index.
	Name string

	// Labels say which flows belong to it. The zero value matches all.
	Labels LabelMatcher

	WorkloadParameters
}

// WorkloadParameters say how the flows of a workload wait.
type WorkloadParameters struct {
	// Priority is the workload's share among those that wait, in proportion to theirs. Zero means 1. Not negative.
	Priority float64

	// Tokens is what a flow costs. Zero means 1; NoTokens (or any negative value) lets flows in for free, and at once.
	Tokens float64

	// QueueTimeout is the longest that a flow waits. Zero leaves it to the flow's own deadline; NoQueue (or any
	// negative value) does not let it wait at all.
	QueueTimeout time.Duration
}

// Values of WorkloadParameters.
const (
	// NoQueue as a QueueTimeout accepts a flow at once or not at all.
	NoQueue time.Duration = -1
	// NoTokens as a workload's Tokens has its flows cost nothing, unless a label says otherwise.
	NoTokens float64 = -1
)
