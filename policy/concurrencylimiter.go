package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// ConcurrencyLimiter bounds the flows that are in flight at once for each value of a label. A flow takes slots when it
// starts and gives them back when it ends; while all are taken, flows are rejected with DeniedStatus.
type ConcurrencyLimiter struct {
	// ID names the component within its policy. Default: "concurrency_limiter.<index>", its place
	// among the policy's ConcurrencyLimiters.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Max is the number of slots. A flow is admitted while at least a part of a slot is free, so a flow that costs more
	// may overshoot. Zero refuses every flow. Not negative.
	Max float64

	// MaxInflight is the time after which a slot is taken back if its flow has not ended. Required, positive.
	MaxInflight time.Duration

	// LimitBy is the label whose values have slots of their own. Empty: all flows share them. A flow without the
	// label passes unlimited.
	LimitBy string

	// Overrides are other numbers for single values of the label; see [Override]. They need a LimitBy. A check costs the same with
	// any number of them.
	Overrides map[string]Override

	// MaxIdle is how long a key without flows in flight is remembered. Zero means DefaultMaxIdle, KeepIdle (or any
	// negative value) as long as there is room.
	MaxIdle time.Duration

	// TokensLabel is the label that says how many slots a flow takes: a decimal number, not negative. A flow without
	// it, or with anything else in it, takes 1.
	TokensLabel string

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 429.
	DeniedStatus int

	// Local keeps the slots in the engine. Otherwise engines that share a store share the slots.
	Local bool

	// OnOutage is what the component does while the store does not answer. Empty means "share". A component that is Local cannot
	// have it.
	OnOutage Outage

	// PassThrough accepts every flow and takes no slots.
	PassThrough bool

	// DryRun decides and counts, but drops no flow. A flow that it would admit takes slots; one that it would drop
	// takes none. flowctl.WithDryRun does the same for all components that a client's flows meet.
	DryRun bool
}

func (ConcurrencyLimiter) kind() index  { return concurrencyLimiter }
func (l ConcurrencyLimiter) id() string { return l.ID }

func (l ConcurrencyLimiter) reads(read func(components.Role, string)) {
	read(components.LimitsBy, l.LimitBy)
	read(components.CostsBy, l.TokensLabel)
	selectorsRead(l.Selectors, components.SelectsBy, read)
}

func (l ConcurrencyLimiter) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), l.Selectors)
	l.numbers(wrong)
	checkName(wrong.sub(".LimitBy"), l.LimitBy)
	checkName(wrong.sub(".TokensLabel"), l.TokensLabel)
	checkStatus(wrong.sub(".DeniedStatus"), l.DeniedStatus)
	checkOutage(wrong.sub(".OnOutage"), l.OnOutage, l.Local)
	checkOverrides(wrong, l)
}

func (l ConcurrencyLimiter) limits() (string, map[string]Override) { return l.LimitBy, l.Overrides }

func (l ConcurrencyLimiter) numbers(wrong report) {
	checkAmount(wrong.sub(".Max"), l.Max)
	checkPositive(wrong.sub(".MaxInflight"), l.MaxInflight)
}

func (d *decoder) concurrencyLimiter(c component) Component {
	l := d.slots(c.get("parameters"))
	request := d.fields(c.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	l.ID = c.id
	l.Selectors = d.selectors(d.fill(c.value, "Selectors", "selectors"))
	l.Max = d.amount(c, "Max", "max_concurrency")
	l.TokensLabel = d.text(d.fill(request, "TokensLabel", "tokens_label_key"))
	l.DeniedStatus = d.status(d.fill(request, "DeniedStatus", "denied_response_status_code"))
	l.Local, _, l.OnOutage = d.sharing(c.value, ConcurrencyLimiter{})
	l.PassThrough = d.passThrough(c)
	l.DryRun = d.dryRun(c)
	return l
}

// slots reads the parameters of a concurrency limiter.
func (d *decoder) slots(v value) ConcurrencyLimiter {
	f := d.fields(v, "max_inflight_duration max_idle_time limit_by_label_key overrides", "")
	return ConcurrencyLimiter{
		MaxInflight: d.duration(d.fill(f, "MaxInflight", "max_inflight_duration")),
		LimitBy:     d.text(d.fill(f, "LimitBy", "limit_by_label_key")),
		MaxIdle:     d.optional(f.get("max_idle_time"), KeepIdle),
		Overrides:   d.overrides(f, ConcurrencyLimiter{}),
	}
}
