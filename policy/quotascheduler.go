package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// QuotaScheduler is a token bucket for each value of a label, with a queue before it: a flow that finds too few tokens
// waits for them, and flows that wait share what comes by weighted fair queueing; see [Scheduler].
type QuotaScheduler struct {
	// ID names the component within its policy. Default: "quota_scheduler.<index>", its place
	// among the policy's QuotaSchedulers.
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

	// Overrides are as in [RateLimiter].
	Overrides map[string]Override

	// StepFill, DelayInitialFill and MaxIdle are as in [RateLimiter].
	StepFill         bool
	DelayInitialFill bool
	MaxIdle          time.Duration

	// MaxDebt is as in [RateLimiter]. It needs the TokensLabel of Scheduler.
	MaxDebt float64

	// When has other numbers for the buckets while a load scheduler lets in too little. The zero value does nothing.
	When Escalation

	// Scheduler says which flow goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// Share is as in [RateLimiter], but ShareLeased means ShareExact, and an engine with a store warns of it: it asks the store for
	// the flows that wait.
	Share Share

	// Local and OnOutage are as in [RateLimiter]. Engines that share the buckets divide them by the priorities of all their
	// workloads. Values of the fairness label have equal shares within each engine.
	Local    bool
	OnOutage Outage

	// PassThrough accepts every flow and takes no tokens.
	PassThrough bool

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (QuotaScheduler) kind() index  { return quotaScheduler }
func (s QuotaScheduler) id() string { return s.ID }

func (s QuotaScheduler) reads(read func(components.Role, string)) {
	read(components.LimitsBy, s.LimitBy)
	selectorsRead(s.Selectors, components.SelectsBy, read)
	s.Scheduler.reads(components.SchedulesBy, read)
}

func (s QuotaScheduler) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), s.Selectors)
	s.numbers(wrong)
	checkName(wrong.sub(".LimitBy"), s.LimitBy)
	s.When.check(wrong.sub(".When"))
	s.Scheduler.check(wrong.sub(".Scheduler"))
	checkShare(wrong.sub(".Share"), s.Share, s.Local, s.StepFill, s.DelayInitialFill)
	checkOutage(wrong.sub(".OnOutage"), s.OnOutage, s.Local)
	checkOverrides(wrong, s)
}

func (s QuotaScheduler) limits() (string, map[string]Override) { return s.LimitBy, s.Overrides }

func (s QuotaScheduler) escalation() Escalation { return s.When }

func (s QuotaScheduler) numbers(wrong report) {
	checkAmount(wrong.sub(".Capacity"), s.Capacity)
	checkAmount(wrong.sub(".Fill"), s.Fill)
	checkPositive(wrong.sub(".Interval"), s.Interval)
	checkDebt(wrong.sub(".MaxDebt"), s.MaxDebt, "Scheduler.TokensLabel", s.Scheduler.TokensLabel)
}

func (d *decoder) quotaScheduler(c component) Component {
	l := d.bucket(c, "rate_limiter", QuotaScheduler{})
	return QuotaScheduler{
		ID:               c.id,
		Selectors:        d.selectors(d.fill(c.value, "Selectors", "selectors")),
		Capacity:         d.amount(c, "Capacity", "bucket_capacity"),
		Fill:             d.amount(c, "Fill", "fill_amount"),
		Interval:         l.Interval,
		LimitBy:          l.LimitBy,
		StepFill:         l.StepFill,
		DelayInitialFill: l.DelayInitialFill,
		MaxIdle:          l.MaxIdle,
		MaxDebt:          l.MaxDebt,
		Overrides:        l.Overrides,
		Local:            l.Local,
		Share:            l.Share,
		OnOutage:         l.OnOutage,
		Scheduler:        d.scheduler(c.value),
		PassThrough:      d.passThrough(c),
		DryRun:           d.dryRun(c),
	}
}
