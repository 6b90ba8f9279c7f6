// Package retries says when to retry: how long a wait is, whether it is worth it, and whether there is budget for it.
package retries

import (
	"context"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// A Policy has the fields of headgate.RetryPolicy, with what they mean there.
type Policy struct {
	Attempts int
	MaxWait  time.Duration
	Jitter   float64
	Budget   float64
}

// The defaults of a [Policy].
const (
	defaultAttempts = 3
	defaultJitter   = 0.2
	defaultBudget   = 0.1
)

const (
	// minWait is the shortest wait. For slots the time to retry after is an estimate, which can be microseconds. While it
	// is wrong, a call without a limit would try again and again without a pause.
	minWait = time.Millisecond

	// lateMargin is the time before the deadline that jitter does not use. An agent rejects flows whose callers have
	// some 10 ms left, and the work needs time as well.
	lateMargin = 25 * time.Millisecond
)

// Rules are what a policy says. [New] makes them. They are safe for concurrent use.
type Rules struct {
	Budget *Budget // never nil

	attempts int
	maxWait  time.Duration
	jitter   float64
}

// New makes the rules of a policy, with a new budget.
func New(policy Policy) *Rules {
	r := &Rules{
		Budget:   newBudget(policy.Budget),
		attempts: policy.Attempts,
		maxWait:  policy.MaxWait,
		jitter:   share(policy.Jitter, defaultJitter),
	}
	if policy.Attempts == 0 {
		r.attempts = defaultAttempts
	}
	return r
}

// Last reports whether there is no attempt after this one. The first attempt is 1.
func (r *Rules) Last(attempt int) bool { return attempt == r.attempts }

// TooLong reports whether a wait that is asked for is longer than the policy's MaxWait.
func (r *Rules) TooLong(after time.Duration) bool { return r.maxWait > 0 && after > r.maxWait }

// Wait returns how long to wait if a retry can succeed after the given time, and whether to wait at all. The call may wait
// for as long as is left, and the wait must end before its deadline. What Wait adds to after is at most half of the time that
// remains then. Jitter uses only what exceeds lateMargin.
func (r *Rules) Wait(ctx context.Context, after, left time.Duration) (time.Duration, bool) {
	if after <= 0 || after > left || r.TooLong(after) {
		return 0, false
	}
	spare := left - after
	if deadline, ok := ctx.Deadline(); ok {
		before := time.Until(deadline) - after
		if before <= 0 {
			return 0, false
		}
		spare = min(spare, before)
	}
	if short := minWait - after; short > 0 {
		short = min(short, spare/2)
		after += short
		spare -= short
	}
	room := max(spare-lateMargin, 0) / 2
	more := rand.Float64() * min(r.jitter*float64(after), float64(room))
	return after + min(time.Duration(more), room), true
}

// share returns what a field means: zero stands for the default, and a negative value or NaN for 0.
func share(field, zero float64) float64 {
	switch {
	case field == 0:
		return zero
	case field > 0:
		return field
	default: // NaN too
		return 0
	}
}

// An End is how a wait ends.
type End uint8

// The ends.
const (
	Over     End = iota // its time has passed
	Canceled            // the caller's context ended
	Closed              // the client was closed, or its engine
)

// Await waits until the timer fires, the context ends, or one of the channels is closed. Nil channels are never closed.
func Await(ctx context.Context, timer *time.Timer, client, agent <-chan struct{}) End {
	select {
	case <-timer.C:
		return Over
	case <-ctx.Done():
		return Canceled
	case <-client:
		return Closed
	case <-agent:
		return Closed
	}
}

// A Budget holds the retries of all calls with one policy, in millionths of a retry. It is a token bucket that calls fill
// and retries empty, like Finagle's RetryBudget. Deposits expire there, and each needs a time. Here the balance has a
// maximum instead, as in gRPC's retry throttling (proposal A6), so that a quiet day cannot pay for a flood of retries.
type Budget struct {
	unlimited bool
	perCall   int64
	balance   atomic.Int64
}

const (
	oneRetry   = 1_000_000
	newBalance = 10 * oneRetry // for the first calls, and for work that is seldom done
	maxBalance = 100 * oneRetry
)

func newBudget(field float64) *Budget {
	b := &Budget{
		unlimited: field < 0,
		perCall:   int64(math.Round(min(share(field, defaultBudget)*oneRetry, maxBalance))),
	}
	b.balance.Store(newBalance)
	return b
}

// Deposit adds the share of one call.
func (b *Budget) Deposit() { b.add(b.perCall) }

// Return gives back a retry that was taken and not made.
func (b *Budget) Return() { b.add(oneRetry) }

func (b *Budget) add(n int64) {
	for !b.unlimited {
		// If few calls are retried, the balance is full. Calls on many processors then only load it, which is cheap.
		have := b.balance.Load()
		if have >= maxBalance || b.balance.CompareAndSwap(have, min(have+n, maxBalance)) {
			return
		}
	}
}

// Withdraw takes a retry, and reports whether there was one.
func (b *Budget) Withdraw() bool {
	if b.unlimited {
		return true
	}
	for {
		have := b.balance.Load()
		if have < oneRetry {
			return false
		}
		if b.balance.CompareAndSwap(have, have-oneRetry) {
			return true
		}
	}
}
