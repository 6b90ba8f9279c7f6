package engine

import (
	"math"
)

// bucketRule is what the token buckets of one rate limiter have in common. Times are nanoseconds since the engine's
// epoch.
type bucketRule struct {
	capacity float64
	fill     float64 // tokens each interval
	interval float64
	step     bool // fill at the end of each interval instead of continuously
	delay    bool // a full bucket waits as long as it takes to fill before it refills
}

// bucket is the state of one token bucket: a leaky bucket as a meter (ITU-T I.371), kept as a count that is brought up
// to date when somebody looks.
type bucket struct {
	tokens float64
	last   int64 // the time that tokens is true for; may lie ahead while the fill is delayed
	start  int64 // nothing is filled up to here
}

// slack forgives what floating point loses between the wait that a flow was told and the tokens that it then finds: a
// billionth of a token.
const slack = 1e-9

func (r *bucketRule) fresh(b *bucket, now int64) {
	*b = bucket{tokens: r.capacity, last: now, start: math.MinInt64}
}

// refill brings the bucket up to now. A clock that steps back changes nothing.
func (r *bucketRule) refill(b *bucket, now int64) {
	if now > b.start && now > b.last {
		elapsed := float64(now - b.last)
		if r.step {
			steps := math.Floor(elapsed / r.interval)
			b.tokens += steps * r.fill
			b.last += clampNanos(steps * r.interval)
		} else {
			b.tokens += r.fill * elapsed / r.interval
			b.last = now
		}
		b.tokens = min(b.tokens, r.capacity)
	}
	if r.delay && b.tokens >= r.capacity {
		b.start = now + r.timeToFill(r.capacity)
		b.last = b.start
		if r.step {
			b.last -= int64(r.interval)
		}
	}
}

// takeOrWait takes want tokens, or none if there are too few: then wait is how long until there are enough, and 0 when there
// never will be.
func (r *bucketRule) takeOrWait(b *bucket, now int64, want float64) (ok bool, wait int64) {
	r.refill(b, now)
	left := b.tokens - want
	if left >= -slack || want == 0 {
		b.tokens = max(left, 0)
		return true, 0
	}
	if want > r.capacity || r.fill == 0 {
		return false, 0
	}
	return false, max(r.until(b, now, want), 1)
}

// until is how long it takes until so many tokens have come, those that are there counted. The bucket is up to now.
func (r *bucketRule) until(b *bucket, now int64, tokens float64) int64 {
	missing := tokens - b.tokens
	if missing <= slack {
		return 0
	}
	if r.step {
		missing -= slack / 2 // else what floating point loses would cost another interval
	}
	wait := b.last - now + r.timeToFill(missing)
	if now <= b.start {
		wait = max(wait, b.start-now+1)
	}
	return wait
}

func (r *bucketRule) take(b *bucket, now int64, tokens float64) taken {
	ok, wait := r.takeOrWait(b, now, tokens)
	return taken{ok: ok, left: b.tokens, wait: wait}
}

func (r *bucketRule) cost(tokens float64) float64 { return min(tokens, maxCost) }

func (r *bucketRule) timed() bool { return true }

// giveBack undoes a take.
func (r *bucketRule) giveBack(b *bucket, _ int64, tokens float64, _ uint64, _ bool) bool {
	b.tokens = min(b.tokens+tokens, r.capacity)
	return true
}

func (r *bucketRule) usage(b *bucket, now int64) Usage {
	r.refill(b, now)
	return Usage{Capacity: r.capacity, Remaining: b.tokens}
}

func (r *bucketRule) forecast(b *bucket, now int64, ahead backlog, tokens float64) (least, likely int64) {
	r.refill(b, now)
	if tokens > r.capacity || r.fill == 0 {
		return never, never
	}
	least = max(r.until(b, now, ahead.least+tokens), 0)
	if likely = least; ahead.likely > ahead.least {
		likely = r.until(b, now, ahead.likely+tokens)
	}
	return least, max(likely, 1)
}

// idle reports whether the bucket is full, just like a fresh one, so that nobody can tell when it is forgotten.
func (r *bucketRule) idle(b *bucket, now int64) bool {
	r.refill(b, now)
	return b.tokens >= r.capacity
}

func (r *bucketRule) timeToFill(tokens float64) int64 {
	if r.fill == 0 || tokens == 0 {
		return 0
	}
	fills := tokens / r.fill
	if r.step { // of which none brings more than the bucket holds
		fills = math.Ceil(tokens / min(r.fill, r.capacity))
	}
	return clampNanos(math.Ceil(fills * r.interval))
}

// century is the longest time there is, in nanoseconds: the sum of two is within an int64, and buckets that take
// decades to fill are as good as stopped.
const century = 100 * 365 * 24 * 3600 * 1_000_000_000

func clampNanos(ns float64) int64 { return int64(min(ns, century)) }
