package engine

import (
	"cmp"
	"fmt"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newRateLimiter(e *Engine, in *installed, p policy.RateLimiter, c agentapi.Component) (component, error) {
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.DeniedStatus, p.Capacity, p.DryRun
	of := rateNumbers(in.escalate(e, p.When, nil))
	other := func(p policy.RateLimiter) *numbers[source.Source[bucket.State]] {
		p.When = atMost(p.When, p.Capacity, p.Fill)
		return of(p)
	}
	mode := bucketMode{p.LimitBy, p.StepFill, p.DelayInitialFill}
	if e.shares(p.Local) {
		return newSharedLimiter(e, in, sharedLimits[bucket.State]{
			component: c, maxIdle: p.MaxIdle, mode: mode,
			own: sharedNumbers(of, bucketBudget)(p), with: withNumbers(in, sharedNumbers(other, bucketBudget)), overrides: p.Overrides,
		}, sharing{outage: p.OnOutage, tokensLabel: p.TokensLabel, passThrough: p.PassThrough, leased: p.Share == policy.ShareLeased})
	}
	l, err := newLimiter(e, limits[bucket.State]{
		component: c, maxIdle: p.MaxIdle, mode: mode, own: of(p), with: withNumbers(in, other), overrides: p.Overrides,
	})
	if err != nil {
		return nil, err
	}
	l.costsBy(p.TokensLabel)
	l.passThrough = p.PassThrough
	return l, nil
}

// bucketMode is what must not change if buckets are to be kept: the label, and how they fill.
type bucketMode struct {
	label       string
	step, delay bool
}

// rateNumbers returns the function that makes the numbers of a limiter's keys, with the changes of its escalation.
func rateNumbers(changes *bucket.Changes) func(p policy.RateLimiter) *numbers[source.Source[bucket.State]] {
	return func(p policy.RateLimiter) *numbers[source.Source[bucket.State]] {
		return numbersOf(p.Capacity, escalated(&bucket.Rule{
			Capacity: p.Capacity,
			Fill:     p.Fill,
			Interval: float64(p.Interval),
			Step:     p.StepFill,
			Delay:    p.DelayInitialFill,
			MaxDebt:  p.MaxDebt,
		}, p.When, changes))
	}
}

func warnRateLimiter(w *warnings, of string, p policy.RateLimiter) {
	if p.PassThrough {
		return
	}
	w.bucket(of, p.Capacity, p.Fill, p.Interval)
	w.cost(of, p.Capacity, 1, p.TokensLabel)
	overridden(of, p.Overrides, func(of string, o policy.Override) {
		w.bucket(of, replaced(p.Capacity, o.Capacity), replaced(p.Fill, o.Fill), cmp.Or(o.Interval, p.Interval))
		w.cost(of, replaced(p.Capacity, o.Capacity), 1, p.TokensLabel)
	})
	if p.When.Load != "" {
		w.cost(of+": When", p.When.Capacity, 1, p.TokensLabel)
	}
}

// bucket warns of one that does not refill.
func (w *warnings) bucket(of string, capacity, fill float64, interval time.Duration) {
	if capacity > 0 && !(float64(interval)/fill < source.Century) {
		w.impossible = append(w.impossible, fmt.Sprintf("%s: a fill of %v in %v never refills the bucket: after its capacity of %v no flow is admitted",
			of, fill, interval, capacity))
	}
}

// cost warns of flows that take more than the bucket holds. Flows with the label for the cost may take less.
func (w *warnings) cost(of string, capacity, tokens float64, label string) {
	if capacity > 0 && tokens > capacity+source.Slack {
		without := ""
		if label != "" {
			without = fmt.Sprintf(" without the label %q", label)
		}
		w.impossible = append(w.impossible, fmt.Sprintf("%s: no flow%s is ever admitted: it takes %v tokens, and the bucket holds %v",
			of, without, tokens, capacity))
	}
}
