package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// ConcurrencyScheduler bounds the flows that are in flight at once for each value of a label, with a queue before it: a
// flow that finds all slots taken waits for one, and flows that wait share what is given back by weighted fair
// queueing; see [Scheduler].
type ConcurrencyScheduler struct {
	// ID names the component within its policy. Default: "concurrency_scheduler.<index>", its place
	// among the policy's ConcurrencySchedulers.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Max is the number of slots. A flow is admitted while at least a part of a slot is free, so a flow that costs more
	// may overshoot. Zero refuses every flow. Not negative.
	Max float64

	// MaxInflight is the time after which a slot is taken back if its flow has not ended. Required, positive.
	MaxInflight time.Duration

	// LimitBy is the label whose values have slots and a queue of their own. Empty: all flows share them. A flow
	// without the label passes unlimited.
	LimitBy string

	// Overrides are as in [ConcurrencyLimiter].
	Overrides map[string]Override

	// MaxIdle is how long a key without flows in flight is remembered. Zero means DefaultMaxIdle, KeepIdle (or any
	// negative value) as long as there is room.
	MaxIdle time.Duration

	// Scheduler says which flow goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// Local and OnOutage are as in [ConcurrencyLimiter]. Engines that share the slots divide them by the priorities of all
	// their workloads. Values of the fairness label have equal shares within each engine.
	Local    bool
	OnOutage Outage

	// PassThrough accepts every flow and takes no slots.
	PassThrough bool

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (ConcurrencyScheduler) kind() index  { return concurrencyScheduler }
func (s ConcurrencyScheduler) id() string { return s.ID }

func (s ConcurrencyScheduler) reads(read func(components.Role, string)) {
	read(components.LimitsBy, s.LimitBy)
	selectorsRead(s.Selectors, components.SelectsBy, read)
	s.Scheduler.reads(components.SchedulesBy, read)
}

func (s ConcurrencyScheduler) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), s.Selectors)
	s.numbers(wrong)
	checkName(wrong.sub(".LimitBy"), s.LimitBy)
	s.Scheduler.check(wrong.sub(".Scheduler"))
	checkOutage(wrong.sub(".OnOutage"), s.OnOutage, s.Local)
	checkOverrides(wrong, s)
}

func (s ConcurrencyScheduler) limits() (string, map[string]Override) { return s.LimitBy, s.Overrides }

func (s ConcurrencyScheduler) numbers(wrong report) {
	checkAmount(wrong.sub(".Max"), s.Max)
	checkPositive(wrong.sub(".MaxInflight"), s.MaxInflight)
}

func (d *decoder) concurrencyScheduler(c component) Component {
	l := d.slots(c.get("concurrency_limiter"))
	local, _, outage := d.sharing(c.value, ConcurrencyScheduler{})
	return ConcurrencyScheduler{
		ID:          c.id,
		Selectors:   d.selectors(d.fill(c.value, "Selectors", "selectors")),
		Max:         d.amount(c, "Max", "max_concurrency"),
		MaxInflight: l.MaxInflight,
		LimitBy:     l.LimitBy,
		MaxIdle:     l.MaxIdle,
		Overrides:   l.Overrides,
		Scheduler:   d.scheduler(c.value),
		Local:       local,
		OnOutage:    outage,
		PassThrough: d.passThrough(c),
		DryRun:      d.dryRun(c),
	}
}
