// Package bucket is the token bucket of rate limiters and quota schedulers.
package bucket

import (
	"math"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A Rule is what the buckets of one component have in common. It is a [source.Source]. Only Changes
// changes.
type Rule struct {
	Capacity float64 // the most tokens that a bucket holds; it starts with as many
	Fill     float64 // tokens that come in each interval; with 0, none ever come
	Interval float64 // nanoseconds

	// Step fills at the end of each interval instead of continuously.
	Step bool

	// Delay has a full bucket begin to refill only after the time that it takes to fill it.
	Delay bool

	// MaxDebt is how far below 0 a settlement may take a bucket: by the capacity if it is 0, by any debt if it is negative.
	MaxDebt float64

	// Other are the numbers of the times that Changes says, in place of these; they have neither. Both are nil for none.
	Other   *Rule
	Changes *Changes
}

// A State is one bucket: a leaky bucket as a meter (ITU-T I.371), kept as a count that is brought up to date when it is
// used. Its zero value is not ready; see [Rule.Fresh].
type State struct {
	tokens float64
	last   int64 // the time that tokens is true for; may lie ahead while the fill is delayed
	start  int64 // the bucket does not fill before this time
}

// Fresh makes the bucket full.
func (r *Rule) Fresh(b *State, now int64) {
	*b = State{tokens: r.Capacity, last: now, start: math.MinInt64}
	r.inForce(b)
}

// refill brings the bucket up to now. A clock that steps back changes nothing.
func (r *Rule) refill(b *State, now int64) {
	if now > b.start && now > b.last {
		elapsed := float64(now - b.last)
		if r.Step {
			steps := math.Floor(elapsed / r.Interval)
			b.tokens += steps * r.Fill
			b.last += source.Nanos(steps * r.Interval)
		} else {
			b.tokens += r.Fill * elapsed / r.Interval
			b.last = now
		}
		b.tokens = min(b.tokens, r.Capacity)
	}
	// A bucket that floating point has left a little short is full too: a flow that costs the capacity gets its tokens.
	// Otherwise the rounding of a sum would decide whether the bucket delays its fill.
	if b.tokens >= r.Capacity-source.Slack {
		b.tokens = max(b.tokens, r.Capacity)
	}
	if r.Delay && b.tokens >= r.Capacity {
		b.start = now + r.timeToFill(r.Capacity)
		b.last = b.start
		if r.Step {
			b.last -= int64(r.Interval)
		}
	}
}

// takeOrWait takes want tokens, or none if there are too few. Then wait is how long until there are enough, and 0 if
// there never will be.
func (r *Rule) takeOrWait(b *State, now int64, want float64) (ok bool, wait int64) {
	r.refill(b, now)
	if want == 0 {
		return true, 0 // whatever the bucket owes
	}
	if left := b.tokens - want; left >= -source.Slack {
		b.tokens = max(left, 0)
		return true, 0
	}
	if !r.brings(want) {
		return false, 0
	}
	return false, max(r.until(b, now, want), 1)
}

// until returns how long it takes until so many tokens have come, including those that are there. The bucket is up to
// date.
func (r *Rule) until(b *State, now int64, tokens float64) int64 {
	missing := tokens - b.tokens
	if missing <= source.Slack {
		return 0
	}
	var debt int64 // the time that it takes to pay it, with what the last step brings beyond
	if r.Step {
		missing -= source.Slack / 2 // otherwise what floating point loses would cost another interval
		if b.tokens < 0 && r.Fill > r.Capacity {
			steps := math.Ceil(-b.tokens / r.Fill)
			debt = source.Nanos(steps * r.Interval)
			missing = tokens - min(b.tokens+steps*r.Fill, r.Capacity) - source.Slack/2
		}
	}
	wait := b.last - now + debt + r.timeToFill(max(missing, 0))
	if now <= b.start {
		wait = max(wait, b.start-now+1)
	}
	return wait
}

// Take takes tokens. A flow that costs nothing always gets its tokens. Tokens that never come by other numbers may come by the
// rule's own.
func (r *Rule) Take(b *State, now int64, tokens float64) source.Taken {
	is := r.inForce(b)
	ok, wait := is.takeOrWait(b, now, tokens)
	return source.Taken{OK: ok, Left: b.tokens, Wait: wait, Later: !ok && wait == 0 && is != r && r.brings(tokens)}
}

// brings reports whether so many tokens come, given time.
func (r *Rule) brings(tokens float64) bool { return tokens <= r.Capacity && r.Fill > 0 }

// Cost returns the tokens, up to [source.MaxCost].
func (r *Rule) Cost(tokens float64) float64 { return min(tokens, source.MaxCost) }

// Timed reports true.
func (r *Rule) Timed() bool { return true }

// GiveBack undoes a Take.
func (r *Rule) GiveBack(b *State, now int64, tokens float64, _ uint64, _ bool) bool {
	b.tokens = min(b.tokens+tokens, r.inForce(b).Capacity)
	return true
}

// Settle corrects a Take. A refund that fills the bucket begins its delay anew, as all that fills it does.
func (r *Rule) Settle(b *State, now int64, tokens, cost float64, _ uint64) (forgiven float64) {
	r = r.inForce(b)
	r.refill(b, now) // what comes from now on pays the debt
	if cost > tokens {
		return source.Owe(&b.tokens, cost-tokens, source.Lowest(r.MaxDebt, r.Capacity))
	}
	b.tokens = min(b.tokens+(tokens-cost), r.Capacity)
	return 0
}

// Inherit carries the balance over. A step that is under way goes on, unless steps are shorter now: then it begins anew, so that the
// time before counts for one of them at the most.
//
// While both rules go by their other numbers, the balance is carried from those to those. If only one does, it is carried by the own
// numbers of both, and what is beyond the other capacity is lost: other numbers that come or go bring no tokens.
func (r *Rule) Inherit(b *State, before source.Source[State], now int64) {
	old, ok := before.(*Rule)
	if !ok || *old == *r {
		return
	}
	was, is := old.inForce(b), r.Current()
	was.refill(b, now)
	if was == old || is == r {
		b.tokens = min(source.Carry(b.tokens, old.Capacity, r.Capacity), is.Capacity)
	} else {
		b.tokens = source.Carry(b.tokens, was.Capacity, is.Capacity)
	}
	switch {
	case r.Delay && b.start > now: // no longer than it takes to fill by the new numbers
		b.start = min(b.start, now+r.timeToFill(r.Capacity))
		b.last = b.start
		if r.Step {
			b.last -= int64(r.Interval)
		}
	case r.Step && r.Interval < old.Interval:
		b.last = max(b.last, now)
	}
}

// Usage returns what the bucket holds, which is less than nothing if it is in debt.
func (r *Rule) Usage(b *State, now int64) source.Usage {
	r = r.inForce(b)
	r.refill(b, now)
	return source.Usage{Capacity: r.Capacity, Remaining: b.tokens}
}

// Forecast returns when the bucket will have the tokens that are wanted, those of the flows ahead included.
//
// A bucket that holds up to 10 tokens gets 5 a second, and is empty. Three flows are ahead, of a token each. The next one
// wants one too: it is served when 4 tokens have come, in 0.8 s, which is the least and likely. If flows of a higher
// priority are likely to come meanwhile, and get 2 tokens, ahead is {Least: 3, Likely: 5}, and likely is 1.2 s.
func (r *Rule) Forecast(b *State, now int64, ahead source.Ahead, tokens float64) (least, likely int64) {
	r = r.inForce(b)
	r.refill(b, now)
	if !r.brings(tokens) {
		return source.Never, source.Never
	}
	least = max(r.until(b, now, ahead.Least+tokens), 0)
	if likely = least; ahead.Likely > ahead.Least {
		likely = r.until(b, now, ahead.Likely+tokens)
	}
	return least, max(likely, 1)
}

// Idle reports whether the bucket is full, just like a fresh one: to forget it changes nothing. A bucket with other numbers
// must be as full as it would be by its own, too, because a fresh one is full when those come back.
func (r *Rule) Idle(b *State, now int64) bool {
	is := r.inForce(b)
	if is != r {
		own, other := *b, *b // so that the time of both goes on
		r.refill(&own, now)
		is.refill(&other, now)
		return own.tokens >= r.Capacity && other.tokens >= is.Capacity
	}
	r.refill(b, now)
	return b.tokens >= r.Capacity
}

func (r *Rule) timeToFill(tokens float64) int64 {
	if r.Fill == 0 || tokens == 0 {
		return 0
	}
	fills := tokens / r.Fill
	if r.Step { // none of them brings more than the bucket holds
		fills = math.Ceil(tokens / min(r.Fill, r.Capacity))
	}
	return source.Nanos(math.Ceil(fills * r.Interval))
}
