package headgate

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flight"
	"github.com/headgate-go/headgate/internal/flowinfo"
)

// RetryPolicy says how far [Retrying] goes. The zero value is right for most.
type RetryPolicy struct {
	// Attempts is how many flows a call starts at the most, the first included. Zero means 3; a negative one sets no
	// limit.
	Attempts int

	// MaxWait is the longest RetryAfter that a call waits out; a rejection that asks for more is final. Zero or less
	// sets no limit but the deadline of the call's context: set MaxWait where calls have none.
	MaxWait time.Duration

	// Jitter is how much longer than RetryAfter a wait may be, as a share of RetryAfter. Each wait is longer by a random
	// part of that, so that calls that were rejected together do not come back together. It counts neither for MaxWait
	// nor against the deadline. Zero means 0.2; a negative one adds nothing.
	Jitter float64

	// Budget is the share of retries among the calls with one Starter. Each call adds so much to what the calls have
	// for retries, and each retry takes 1. They have 10 to begin with, and never more than 100. Zero means 0.1: one
	// retry for ten calls. A negative one sets no limit, which is for callers that are few and mean to wait their turn.
	Budget float64
}

// Retrying returns a Starter that starts flows with the client, and starts another when one is rejected, after as long as
// the rejection says. It goes wherever a client goes: to [Guard], [GuardFunc], [Do], [Cached] and [CachedFunc], and to
// packages httpguard and grpcguard. A retry is safe whatever the guarded function does, for the function has not run.
// Once it has, it does not run again: its error is returned unchanged, that of a flow which it started itself too.
//
// A wait is as long as the flow's RetryAfter, a millisecond at the least, and longer by a random part of policy.Jitter.
// Start gives up at once, without a wait, when the rejection does not say when a retry can succeed, or says more than
// policy.MaxWait; when that would not be before the context's deadline; when it has started policy.Attempts flows; and
// when policy.Budget is spent, so that retries never become the load. A retry that can come before the deadline does:
// near a deadline waits are hardly longer than RetryAfter. A flow that no agent answered is not retried. The last flow is
// the one that Start returns, and its error goes to onReject.
//
// The budget is shared by all calls with the Starter: make it once, when the program starts, and one for each kind of
// work. One that is made for each call has a new budget each time, which never runs out.
//
// Each flow is ended before the wait for the next. A call that was rejected stays so when the client or its engine is
// closed during the wait, and the wait ends at once: the call does not run because of a shutdown. The flow that was rejected is
// the last then, and has ended already. When the context ends during a wait, the flow that is returned is
// Canceled: onReject is not called, and the error matches the context's and its cause.
func Retrying(client Starter, policy RetryPolicy) Starter {
	client = starter(client)
	if isOff(client) {
		return client
	}
	r := &retrier{
		client:   client,
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

// The defaults of a RetryPolicy.
const (
	defaultAttempts = 3
	defaultJitter   = 0.2
	defaultBudget   = 0.1
)

// A retrier is a Starter that hands over the last of the flows that a call needs until one is not rejected.
type retrier struct {
	client   Starter
	attempts int
	maxWait  time.Duration
	jitter   float64
	budget   *budget
}

// Runs are the client's: cached functions share runs with it, whether they retry or not.
func (r *retrier) Runs() *flight.Runs { return runsOf(r.client) }

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
	var rejected *flowctl.Flow
	for attempt := 1; ; attempt++ {
		flow := r.client.Start(ctx, controlPoint, params)
		if rejected != nil && errors.Is(flow.Err(), flowctl.ErrClosed) {
			endUnused(ctx, flow)
			return rejected
		}
		if flow.ShouldRun() || flow.Decision() != flowctl.Rejected || attempt == r.attempts {
			return flow
		}
		wait, ok := r.wait(ctx, flow.RetryAfter())
		if !ok || !r.budget.withdraw() {
			return flow
		}
		switch pause(ctx, flow, wait) {
		case pauseOver:
		case pauseClosed:
			r.budget.add(oneRetry)
			return flow
		case pauseCanceled:
			r.budget.add(oneRetry)
			// The next flow is Canceled, and says why as any other does. Nobody is asked about it.
		}
		rejected = flow
	}
}

// endUnused ends a flow that was to run and does not.
func endUnused(ctx context.Context, flow *flowctl.Flow) {
	if info, ok := flowinfo.From(flow.Context()); ok {
		info.EndUnused(ctx)
	}
}

const (
	// minWait is the shortest wait: what a rejection says of slots is an estimate, of microseconds where they were held
	// for so long, and a call without a limit would go round and round while that does not come true.
	minWait = time.Millisecond

	// lateMargin is what jitter leaves of the time until the deadline. An agent rejects flows whose callers have some 10
	// ms left, and the work wants time as well.
	lateMargin = 25 * time.Millisecond
)

// wait is how long to wait, if at all, when a rejection says after. What makes a wait longer than that never uses up more
// than half of the time that is left then, and jitter only what exceeds lateMargin.
func (r *retrier) wait(ctx context.Context, after time.Duration) (time.Duration, bool) {
	if after <= 0 || r.maxWait > 0 && after > r.maxWait {
		return 0, false
	}
	spare := time.Duration(math.MaxInt64) - after
	if deadline, ok := ctx.Deadline(); ok {
		if spare = time.Until(deadline) - after; spare <= 0 {
			return 0, false
		}
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

// shortOfTime reports whether the flow was not retried because its caller's deadline came before a retry could succeed.
func (r *retrier) shortOfTime(ctx context.Context, flow *flowctl.Flow) bool {
	deadline, ok := ctx.Deadline()
	after := flow.RetryAfter()
	return ok && flow.Decision() == flowctl.Rejected && after > 0 && time.Until(deadline) <= after && (r.maxWait <= 0 || after <= r.maxWait)
}

// How a pause ends.
type pauseEnd uint8

const (
	pauseOver     pauseEnd = iota // its time has passed
	pauseCanceled                 // the caller's context ended
	pauseClosed                   // the client was closed, or its engine
)

// pause ends the flow and waits. The time that the end takes is part of the wait.
func pause(ctx context.Context, flow *flowctl.Flow, wait time.Duration) pauseEnd {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	end(ctx, flow)
	var client, agent <-chan struct{}
	if info, ok := flowinfo.From(flow.Context()); ok {
		client, agent = info.Closed()
	}
	select {
	case <-timer.C:
		return pauseOver
	case <-ctx.Done():
		return pauseCanceled
	case <-client:
		return pauseClosed
	case <-agent:
		return pauseClosed
	}
}

// A budget is what the calls with one Starter have for retries, in millionths of a retry: a token bucket that calls fill
// and retries empty, as Finagle's RetryBudget is. There deposits expire, for which each needs the time; here the balance
// has a maximum, as in gRPC's retry throttling (proposal A6), so that a quiet day does not pay for a storm.
type budget struct {
	unlimited bool
	perCall   int64
	balance   atomic.Int64
}

const (
	oneRetry   = 1_000_000
	newBalance = 10 * oneRetry // what lets the first calls retry, and those of work that is seldom done
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
