// Package calendar is the quota of calendar quotas: so many tokens in each period of a time zone's calendar.
package calendar

import (
	"math"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A Rule is what the quotas of one component have in common. It is a [source.Source], and does not change.
type Rule struct {
	Amount  float64 // tokens in each period
	Periods Periods
	Epoch   time.Time // when the caller's time was 0

	// MaxDebt is how far below 0 a settlement may take a quota: by the amount if it is 0, by any debt if it is negative.
	MaxDebt float64
}

// A State is what one key has in the period that ends at end. Its zero value is not ready; see [Rule.Fresh].
type State struct {
	left float64 // below 0 for a debt
	end  int64
}

// Fresh makes the quota whole.
func (r *Rule) Fresh(q *State, _ int64) { *q = State{left: r.Amount} }

// renew makes the quota whole if its period has ended. A debt is paid first: each period that has begun since then pays its
// amount. A clock that steps back changes nothing.
func (r *Rule) renew(q *State, now int64) {
	for now >= q.end && q.left < 0 && r.Amount > 0 {
		*q = State{min(q.left+r.Amount, r.Amount), r.next(q.end)}
	}
	if now >= q.end {
		*q = State{min(q.left+r.Amount, r.Amount), r.next(now)}
	}
}

// next returns the end of the period that a time is in.
func (r *Rule) next(at int64) int64 {
	return int64(r.Periods.End(r.Epoch.Add(time.Duration(at))).Sub(r.Epoch))
}

// Take takes tokens of the period. A flow that costs nothing always gets its tokens. The slot is the end of the period,
// for GiveBack.
func (r *Rule) Take(q *State, now int64, tokens float64) source.Taken {
	r.renew(q, now)
	left := q.left - tokens
	switch {
	case tokens == 0: // whatever the quota owes
	case left >= -source.Slack:
		q.left = max(left, 0)
	default:
		return source.Taken{Left: q.left, Wait: max(r.wait(q, now, tokens), 0)}
	}
	return source.Taken{OK: true, Slot: uint64(q.end), Left: q.left}
}

// exactPeriods is how many periods a wait is exact for. The ones after them count as the mean of these: each costs a look at
// the calendar, for a flow that is rejected.
const exactPeriods = 12

// wait returns how long until the tokens may be there. They are not there now.
func (r *Rule) wait(q *State, now int64, tokens float64) int64 {
	if tokens > r.Amount+source.Slack || r.Amount == 0 {
		return source.Never
	}
	at, missing := q.end, tokens-r.Amount-min(q.left, 0) // when the next period begins
	for range exactPeriods {
		if missing <= source.Slack {
			return at - now
		}
		at, missing = r.next(at), missing-r.Amount
	}
	each := float64(at-q.end) / exactPeriods
	return source.Nanos(float64(at-now) + math.Ceil(max(missing, 0)/r.Amount)*each)
}

// Cost returns the tokens, up to [source.MaxCost].
func (r *Rule) Cost(tokens float64) float64 { return min(tokens, source.MaxCost) }

// Timed reports true.
func (r *Rule) Timed() bool { return true }

// GiveBack undoes a Take of the same period. The tokens of a period that has ended are not given back.
func (r *Rule) GiveBack(q *State, now int64, tokens float64, period uint64, unused bool) bool {
	r.renew(q, now)
	if !unused || period != uint64(q.end) {
		return false
	}
	q.left = min(q.left+tokens, r.Amount)
	return true
}

// Settle corrects a Take. A refund is of the period of the Take only; a debt is of the period that it is settled in.
func (r *Rule) Settle(q *State, now int64, tokens, cost float64, period uint64) (forgiven float64) {
	r.renew(q, now)
	switch {
	case cost > tokens:
		return source.Owe(&q.left, cost-tokens, source.Lowest(r.MaxDebt, r.Amount))
	case period == uint64(q.end):
		q.left = min(q.left+(tokens-cost), r.Amount)
	}
	return 0
}

// Inherit carries over what is left of the period.
func (r *Rule) Inherit(q *State, before source.Source[State], now int64) {
	if old, ok := before.(*Rule); ok && *old != *r {
		old.renew(q, now)
		q.left = source.Carry(q.left, old.Amount, r.Amount)
	}
}

// Usage returns what is left of the quota, which is less than nothing if it is in debt.
func (r *Rule) Usage(q *State, now int64) source.Usage {
	r.renew(q, now)
	return source.Usage{Capacity: r.Amount, Remaining: q.left}
}

// Forecast returns how long until the next period begins. Least is 0 if the tokens are there, those of the flows ahead
// included. If they want more than the next period has, the flow waits for longer.
func (r *Rule) Forecast(q *State, now int64, ahead source.Ahead, tokens float64) (least, likely int64) {
	r.renew(q, now)
	least = r.wait(q, now, tokens)
	likely = least
	if least != source.Never && ahead.Least+tokens <= q.left+source.Slack {
		least = 0
	}
	return least, likely
}

// Idle reports whether the quota is whole, or will be when it is used.
func (r *Rule) Idle(q *State, now int64) bool {
	if q.left < 0 {
		r.renew(q, now)
	}
	return q.left >= r.Amount || now >= q.end && q.left >= 0
}
