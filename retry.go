package headgate

import (
	"context"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
)

// RetryPolicy says how far [Retry] goes. The zero value is right for most.
type RetryPolicy struct {
	// Attempts is how many flows a call starts at the most, the first included. Zero means 3; a negative one sets no
	// limit.
	Attempts int

	// MaxWait is the longest RetryAfter that a call waits out; a rejection that asks for more is final. Zero or less
	// sets no limit but the deadline of the call's context: set MaxWait where calls have none.
	MaxWait time.Duration

	// Jitter is how much longer than RetryAfter a wait may be, as a share of RetryAfter. Each wait is longer by a random
	// part of that, so that calls that were rejected together do not come back together. Zero means 0.2; a negative one
	// adds nothing.
	Jitter float64

	// Budget is the share of retries among the calls of one function. Each call adds so much to what the calls have
	// for retries, and each retry takes 1. They have 10 to begin with, and never more than 100. Zero means 0.1: one
	// retry for ten calls. A negative one sets no limit, which is for callers that are few and mean to wait their turn.
	Budget float64
}

// Retry is [Guard] for calls that can wait: when its flow is rejected, a call waits as long as the rejection says and
// starts another. That is safe whatever fn does, for fn has not run. Once it has, it does not run again: its error is
// returned unchanged, that of a flow which fn started itself too.
//
// A wait is as long as the flow's RetryAfter, a millisecond at the least, and longer by a random part of policy.Jitter.
// The call gives up at once, without a wait, when the rejection does not say when a retry can succeed, or says more than
// policy.MaxWait; when the wait would not be over before the context's deadline; when it has started policy.Attempts
// flows; and when the calls of the function have spent policy.Budget, so that retries never become the load. A flow that
// nobody answered is not retried. After that all is as with Guard: the last flow's error goes to onReject, or is
// returned.
//
// The budget is that of this function: make it once, when the program starts. One that is made for each call has a new
// budget each time, which never runs out.
//
// Each flow is ended before the wait for the next. When the context ends during a wait the call is Canceled: onReject is
// not called, and the error matches the context's and its cause.
func Retry[T any](client Starter, controlPoint string, params flowctl.Params,
	fn func(context.Context) (T, error), onReject fallback.Func[T], policy RetryPolicy,
) func(context.Context) (T, error) {
	return Guard(newRetrier(client, policy), controlPoint, params, fn, onReject)
}

// The defaults of a RetryPolicy.
const (
	defaultAttempts = 3
	defaultJitter   = 0.2
	defaultBudget   = 0.1
)

// A retrier is the Starter of one function: of the flows that a call needs until one is not rejected, it hands over the
// last.
type retrier struct {
	client   Starter
	attempts int
	maxWait  time.Duration
	jitter   float64
	budget   *budget
}

func newRetrier(client Starter, policy RetryPolicy) *retrier {
	r := &retrier{
		client:   starter(client),
		attempts: policy.Attempts,
		maxWait:  policy.MaxWait,
		jitter:   share(policy.Jitter, defaultJitter),
		budget:   newBudget(policy.Budget),
	}
	if policy.Attempts == 0 {
		r.attempts = defaultAttempts
	}
	return r
}

// share makes of a field the share that it means.
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

// Start is the client's, as often as it takes.
func (r *retrier) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	r.budget.deposit()
	for attempt := 1; ; attempt++ {
		flow := r.client.Start(ctx, controlPoint, params)
		if flow.ShouldRun() || flow.Decision() != flowctl.Rejected || attempt == r.attempts {
			return flow
		}
		wait, ok := r.wait(ctx, flow.RetryAfter())
		if !ok || !r.budget.withdraw() {
			return flow
		}
		if !pause(ctx, flow, wait) {
			r.budget.add(oneRetry)
			// The next flow is Canceled, and says why as any other does. Nobody is asked about it.
		}
	}
}

// minWait is the shortest wait: what a rejection says of slots is an estimate, of microseconds where they were held for
// so long, and a call without a limit would go round and round while that does not come true.
const minWait = time.Millisecond

// wait is how long to wait, if at all, when a rejection says after.
func (r *retrier) wait(ctx context.Context, after time.Duration) (time.Duration, bool) {
	if after <= 0 || r.maxWait > 0 && after > r.maxWait {
		return 0, false
	}
	after = max(after, minWait)
	wait := time.Duration(math.MaxInt64)
	if more := rand.Float64() * min(r.jitter*float64(after), math.MaxInt64); more < float64(wait-after) {
		wait = after + time.Duration(more)
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
		return 0, false
	}
	return wait, true
}

// pause ends the flow and waits. The time that the end takes is part of the wait. It is false when ctx ends first.
func pause(ctx context.Context, flow *flowctl.Flow, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	end(ctx, flow)
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A budget is what the calls of one function have for retries, in millionths of a retry: a token bucket that calls fill
// and retries empty, as Finagle's RetryBudget is. There deposits expire, for which each needs the time; here the balance
// has a maximum, as in gRPC's retry throttling (proposal A6), so that a quiet day does not pay for a storm.
type budget struct {
	unlimited bool
	perCall   int64
	balance   atomic.Int64
}

const (
	oneRetry   = 1_000_000
	newBalance = 10 * oneRetry // what lets the first calls retry, and those of a function that is seldom called
	maxBalance = 100 * oneRetry
)

func newBudget(field float64) *budget {
	b := &budget{
		unlimited: field < 0,
		perCall:   int64(math.Round(min(share(field, defaultBudget)*oneRetry, maxBalance))),
	}
	b.balance.Store(newBalance)
	return b
}

// deposit is what each call does.
func (b *budget) deposit() { b.add(b.perCall) }

func (b *budget) add(n int64) {
	for !b.unlimited {
		// Where few flows are rejected the balance is full, and a load is all that calls on many processors share.
		have := b.balance.Load()
		if have >= maxBalance || b.balance.CompareAndSwap(have, min(have+n, maxBalance)) {
			return
		}
	}
}

// withdraw is what each retry does; it is false when there is too little left.
func (b *budget) withdraw() bool {
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
