package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// RateLimiter is a token bucket for each value of a label. A flow takes tokens and is rejected while the bucket has
// too few: with DeniedStatus, and with the time until it has enough, unless it never will.
type RateLimiter struct {
	// ID names the component within its policy. Default: "rate_limiter.<index>", its place
	// among the policy's RateLimiters.
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

	// Overrides are other numbers for single values of the label; see [Override]. They need a LimitBy. A check costs the same with
	// any number of them.
	Overrides map[string]Override

	// StepFill adds Fill tokens at once at the end of each Interval; by default they trickle in continuously.
	StepFill bool

	// DelayInitialFill delays the refill of a full bucket that is drawn on, by the time that it takes to fill the whole
	// bucket. A flow that cost less than it took may fill the bucket, and then the delay begins anew.
	DelayInitialFill bool

	// MaxIdle is how long an unused bucket is remembered once it is full again. Zero means DefaultMaxIdle, KeepIdle
	// (or any negative value) as long as there is room. A bucket that is not full is never forgotten.
	MaxIdle time.Duration

	// TokensLabel is the label that says how many tokens a flow takes: a decimal number, not negative. A flow
	// without it, or with anything else in it, takes 1.
	TokensLabel string

	// MaxDebt is how far below zero flows may take a bucket that cost more than they took, as flowctl's Flow.Settle says. What is
	// beyond is forgiven, and counted in the engine's Stats. Zero means Capacity, and a negative value forgives nothing.
	// math.SmallestNonzeroFloat64 is as good as no debt. It needs a TokensLabel.
	MaxDebt float64

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 429.
	DeniedStatus int

	// When has other numbers for the buckets while a load scheduler lets in too little. The zero value does nothing.
	When Escalation

	// Local keeps the buckets in the engine. Otherwise engines that share a store share the buckets.
	Local bool

	// Share is how tokens are taken from the store of engines that share it: exactly, or leased. Empty means "exact". ShareLeased
	// needs a continuous fill, so neither StepFill nor DelayInitialFill. A component that is Local cannot have it.
	Share Share

	// OnOutage is what the component does while the store does not answer. Empty means "share". A component that is Local cannot
	// have it.
	OnOutage Outage

	// PassThrough accepts every flow and takes no tokens.
	PassThrough bool

	// DryRun decides and counts, but drops no flow. A flow that it would admit takes tokens; one that it would drop
	// takes none. flowctl.WithDryRun does the same for all components that a client's flows meet.
	DryRun bool
}

func (RateLimiter) kind() index  { return rateLimiter }
func (l RateLimiter) id() string { return l.ID }

func (l RateLimiter) reads(read func(components.Role, string)) {
	read(components.LimitsBy, l.LimitBy)
	read(components.CostsBy, l.TokensLabel)
	selectorsRead(l.Selectors, components.SelectsBy, read)
}

func (l RateLimiter) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), l.Selectors)
	l.numbers(wrong)
	checkName(wrong.sub(".LimitBy"), l.LimitBy)
	checkName(wrong.sub(".TokensLabel"), l.TokensLabel)
	checkStatus(wrong.sub(".DeniedStatus"), l.DeniedStatus)
	l.When.check(wrong.sub(".When"))
	checkShare(wrong.sub(".Share"), l.Share, l.Local, l.StepFill, l.DelayInitialFill)
	checkOutage(wrong.sub(".OnOutage"), l.OnOutage, l.Local)
	checkOverrides(wrong, l)
}

func (l RateLimiter) limits() (string, map[string]Override) { return l.LimitBy, l.Overrides }

func (l RateLimiter) escalation() Escalation { return l.When }

func (l RateLimiter) numbers(wrong report) {
	checkAmount(wrong.sub(".Capacity"), l.Capacity)
	checkAmount(wrong.sub(".Fill"), l.Fill)
	checkPositive(wrong.sub(".Interval"), l.Interval)
	checkDebt(wrong.sub(".MaxDebt"), l.MaxDebt, "TokensLabel", l.TokensLabel)
}

func (d *decoder) rateLimiter(c component) Component {
	l := d.bucket(c, "parameters", RateLimiter{})
	request := d.fields(c.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	l.ID = c.id
	l.Selectors = d.selectors(d.fill(c.value, "Selectors", "selectors"))
	l.Capacity = d.amount(c, "Capacity", "bucket_capacity")
	l.Fill = d.amount(c, "Fill", "fill_amount")
	l.TokensLabel = d.text(d.fill(request, "TokensLabel", "tokens_label_key"))
	l.DeniedStatus = d.status(d.fill(request, "DeniedStatus", "denied_response_status_code"))
	l.PassThrough = d.passThrough(c)
	l.DryRun = d.dryRun(c)
	return l
}

// bucket reads the parameters of a rate limiter under the key, and how a component like this one shares its buckets.
func (d *decoder) bucket(c component, key string, like Component) RateLimiter {
	f := d.fields(c.get(key), "interval continuous_fill max_idle_time limit_by_label_key label_key delay_initial_fill max_debt overrides lazy_sync", "")
	limiter := RateLimiter{
		Interval:         d.duration(d.fill(f, "Interval", "interval")),
		LimitBy:          d.text(d.fill(f, "LimitBy", "limit_by_label_key")),
		StepFill:         !d.boolean(f.get("continuous_fill"), true),
		DelayInitialFill: d.boolean(f.get("delay_initial_fill"), false),
		MaxIdle:          d.optional(f.get("max_idle_time"), KeepIdle),
		MaxDebt:          d.explicit(d.fill(f, "MaxDebt", "max_debt")),
		Overrides:        d.overrides(f, RateLimiter{}),
	}
	limiter.Local, limiter.Share, limiter.OnOutage = d.sharing(c.value, like)
	d.lazySync(f.get("lazy_sync"), &limiter)
	if old := f.get("label_key"); limiter.LimitBy == "" {
		limiter.LimitBy = d.text(d.fill(f, "LimitBy", "label_key"))
	} else if old.node != nil {
		d.unused(old, ": limit_by_label_key is set")
	}
	return limiter
}
