package engine

import (
	"math"
	"strconv"
	"time"

	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/policy"
)

// A limiter is a component at work.
type limiter interface {
	// decide fills the decision, which names the component already. It takes what it admits.
	decide(req *seam.Request, now int64, d *seam.LimiterDecision)

	// refuse fills the decision without asking: the flow is dropped, if the limiter would have had a say.
	refuse(req *seam.Request, d *seam.LimiterDecision)

	// revert gives back what decide took: another limiter rejected the flow.
	revert(now int64, d *seam.LimiterDecision)

	// sweep forgets idle keys, and if a key did not fit lately, all that nobody will miss.
	sweep(now int64)

	// overflow says how many decisions had no state of their own to decide by, because there were too many keys.
	overflow() uint64

	// identity names the component to others.
	identity() *seam.Component
}

// A slotHolder is a limiter whose flows hold something until they end.
type slotHolder interface {
	// giveBack takes the decision's slot back; false says that it was taken back before.
	giveBack(now int64, d *seam.LimiterDecision) bool
}

// never as a decision's wait marks a flow that this limiter cannot ever admit.
const never = time.Duration(-1)

// keyed is what limiters have in common: a state for each value of a label, or one for all flows.
type keyed[S any] struct {
	component   seam.Component
	tokensLabel string
	passThrough bool
	dryRun      bool
	maxIdle     time.Duration // 0: forever

	table  *table[S] // nil without a label
	single *entry[S] // the state of all flows, without a label
}

func (k *keyed[S]) identity() *seam.Component { return &k.component }

// state returns the entry to decide by, locked, and notes in d which one it is; nil when the flow passes without.
func (k *keyed[S]) state(req *seam.Request, now int64, d *seam.LimiterDecision) *entry[S] {
	d.Consumed = k.cost(&req.Labels)
	switch {
	case k.passThrough:
		return nil
	case k.table == nil:
		d.Scope = seam.ScopeDefault
		k.single.mu.Lock()
		return k.single
	}
	value, ok := req.Labels.Lookup(k.component.LabelKey)
	if !ok {
		return nil
	}
	d.Scope, d.Label = seam.ScopeLabel, value
	return k.table.lock(value, now)
}

func (k *keyed[S]) refuse(req *seam.Request, d *seam.LimiterDecision) {
	d.Consumed = k.cost(&req.Labels)
	switch value, ok := req.Labels.Lookup(k.component.LabelKey); {
	case k.passThrough:
		return
	case k.table == nil:
		d.Scope = seam.ScopeDefault
	case !ok:
		return
	default:
		d.Scope, d.Label = seam.ScopeLabel, value
	}
	k.drop(d, 0)
}

// known returns the entry that d was decided by, locked.
func (k *keyed[S]) known(d *seam.LimiterDecision) *entry[S] {
	if k.table == nil {
		k.single.mu.Lock()
		return k.single
	}
	return k.table.lockKnown(d.Label)
}

func (k *keyed[S]) sweep(now int64) {
	if k.table != nil {
		k.table.sweep(now, k.maxIdle)
	}
}

func (k *keyed[S]) overflow() uint64 {
	if k.table == nil {
		return 0
	}
	return k.table.spilled.Load()
}

// cost is how many tokens the flow takes: 1, or what its label says, if that is a number of tokens.
func (k *keyed[S]) cost(labels *seam.Labels) float64 {
	if k.tokensLabel == "" {
		return 1
	}
	text, ok := labels.Lookup(k.tokensLabel)
	if !ok {
		return 1
	}
	tokens, err := strconv.ParseFloat(text, 64)
	if err != nil || !(tokens >= 0) || math.IsInf(tokens, 1) {
		return 1
	}
	return tokens
}

// drop turns the decision into a refusal.
func (k *keyed[S]) drop(d *seam.LimiterDecision, wait time.Duration) {
	d.Consumed = 0
	d.DryRun = k.dryRun
	d.Dropped = !k.dryRun
	if d.Dropped {
		d.Wait = wait
	}
}

func newKeyed[S any](e *Engine, c seam.Component, tokensLabel string, maxIdle time.Duration,
	fresh func(*S, int64), forgettable func(*S, int64) bool,
) keyed[S] {
	k := keyed[S]{component: c, tokensLabel: tokensLabel, maxIdle: maxIdle}
	switch {
	case maxIdle == 0:
		k.maxIdle = policy.DefaultMaxIdle
	case maxIdle < 0:
		k.maxIdle = 0
	}
	if c.LabelKey != "" {
		k.table = newTable(e.keyCap, fresh, forgettable)
		k.table.full = e.full
	} else {
		k.single = new(entry[S])
		fresh(&k.single.state, 0)
	}
	return k
}

type rateLimiter struct {
	keyed[bucket]
	rule bucketRule
}

func newRateLimiter(e *Engine, p policy.RateLimiter, c seam.Component) *rateLimiter {
	l := &rateLimiter{rule: bucketRule{
		capacity: p.Capacity,
		fill:     p.Fill,
		interval: float64(p.Interval),
		step:     p.StepFill,
		delay:    p.DelayInitialFill,
	}}
	l.keyed = newKeyed(e, c, p.TokensLabel, p.MaxIdle, l.rule.fresh, l.rule.full)
	l.passThrough, l.dryRun = p.PassThrough, p.DryRun
	l.component.Limiter = l
	return l
}

func (l *rateLimiter) decide(req *seam.Request, now int64, d *seam.LimiterDecision) {
	b := l.state(req, now, d)
	if b == nil {
		return
	}
	ok, wait := l.rule.take(&b.state, now, d.Consumed)
	d.Remaining = b.state.tokens
	b.mu.Unlock()
	switch {
	case ok:
	case wait == 0:
		l.drop(d, never)
	default:
		l.drop(d, time.Duration(wait))
	}
}

func (l *rateLimiter) revert(_ int64, d *seam.LimiterDecision) {
	if d.Scope == seam.ScopeNone || d.Consumed == 0 {
		return
	}
	b := l.known(d)
	l.rule.giveBack(&b.state, d.Consumed)
	b.mu.Unlock()
}

type concurrencyLimiter struct {
	keyed[inflight]
	limit       float64
	maxInflight int64
}

func newConcurrencyLimiter(e *Engine, p policy.ConcurrencyLimiter, c seam.Component) *concurrencyLimiter {
	l := &concurrencyLimiter{limit: p.Max, maxInflight: clampNanos(float64(p.MaxInflight))}
	l.keyed = newKeyed(e, c, p.TokensLabel, p.MaxIdle,
		func(f *inflight, _ int64) { freshInflight(f) },
		func(f *inflight, now int64) bool {
			f.reclaim(now)
			return f.count == 0
		})
	l.passThrough, l.dryRun = p.PassThrough, p.DryRun
	l.component.Limiter = l
	return l
}

func (l *concurrencyLimiter) decide(req *seam.Request, now int64, d *seam.LimiterDecision) {
	f := l.state(req, now, d)
	if f == nil {
		return
	}
	ok := true
	f.state.reclaim(now)
	d.Remaining = l.limit - f.state.used
	if d.Consumed > 0 { // what costs nothing holds nothing
		d.Slot, ok = f.state.take(l.limit, d.Consumed, now, now+l.maxInflight)
	}
	f.mu.Unlock()
	switch {
	case ok:
	case l.limit == 0:
		l.drop(d, never)
	default:
		l.drop(d, 0)
	}
}

func (l *concurrencyLimiter) revert(now int64, d *seam.LimiterDecision) {
	if d.Slot != 0 {
		l.giveBack(now, d)
		d.Slot = 0
	}
}

func (l *concurrencyLimiter) giveBack(now int64, d *seam.LimiterDecision) bool {
	f := l.known(d)
	defer f.mu.Unlock()
	f.state.reclaim(now)
	if f.state.give(d.Slot) {
		return true
	}
	if l.table == nil || f == &l.table.spill {
		return false
	}
	// The key may have been admitted to the table only after this flow took its slot from the spill entry.
	l.table.spill.mu.Lock()
	defer l.table.spill.mu.Unlock()
	l.table.spill.state.reclaim(now)
	return l.table.spill.state.give(d.Slot)
}
