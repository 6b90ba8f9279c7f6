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
	// Attempts is the largest number of flows that a call starts, the first included. Zero means 3. A negative value
	// sets no limit.
	Attempts int

	// MaxWait is the longest RetryAfter that a call waits out; a rejection that asks for more is final. Zero or less
	// sets no limit except the deadline of the call's context. Set MaxWait if callers have no deadline.
	MaxWait time.Duration

	// Jitter is how much longer than RetryAfter a wait may be, as a share of RetryAfter. Each wait is longer by a
	// random part of that, so that calls that were rejected together do not come back together. It does not count
	// toward MaxWait, and never makes a retry miss the deadline. Zero means 0.2. A negative value adds nothing.
	Jitter float64

	// Budget is how many retries each call adds to the budget, which all calls with one Starter share. Each retry takes
	// 1. The budget begins with 10, and never exceeds 100. Zero means 0.1: one retry for ten calls. A negative value
	// sets no limit; use that for few callers that are meant to wait their turn.
	Budget float64
}

// Retrying returns a Starter that starts flows with the client. If a flow is rejected, it waits as long as the
// rejection says and starts another. Use it wherever you use a client: with [Guard], [GuardFunc], [Do], [Cached] and
// [CachedFunc], and with packages httpguard and grpcguard. A retry is safe, because the guarded function has not run.
// Once the function has run, it does not run again. Its error is returned unchanged, even if it is the rejection of a
// flow that the function started.
//
// A wait is as long as the flow's RetryAfter, at least a millisecond, and longer by a random part of policy.Jitter. If
// a retry can succeed before the deadline, the wait does not miss it: near a deadline, waits are hardly longer than
// RetryAfter. Start does not wait if
//   - the rejection does not say when a retry can succeed, or says more than policy.MaxWait;
//   - a retry could not succeed within the MaxWait of its Params, which bounds all waits of a call together, in queues
//     and between flows: with flowctl.NoWait there is no retry;
//   - a retry could not succeed before the context's deadline;
//   - it has started policy.Attempts flows;
//   - policy.Budget is used up, so that retries never become the load.
//
// A flow that no agent answered is not retried. Start returns the last flow, and its error goes to onReject.
//
// If no agent answers a retry, the call does not run, because a limit has held it back. Start returns the flow that was
// rejected before, which has ended already. So it does not matter whether the agent crashes, shuts down or hangs while a
// call waits for its retry. If the retry may not run anyway, as a flow that fails closed, Start returns its flow, which
// is Unreachable.
//
// All calls with the Starter share its budget. Make one Starter for each kind of work, when the program starts. A
// Starter that is made for each call has a new budget each time, which never runs out.
//
// Each flow is ended before the wait for the next. If the client or its engine is closed during a wait, Start returns
// at once with the flow that was rejected, which has ended already: a shutdown does not let the call run. If the
// context ends during a wait, Start returns a Canceled flow: onReject is not called, and the error matches the
// context's and its cause.
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

// A retrier is a Starter that retries rejected flows, and returns the last one.
type retrier struct {
	client   Starter
	attempts int
	maxWait  time.Duration
	jitter   float64
	budget   *budget
}

// Runs returns the client's runs: cached functions with retries share them with those without.
func (r *retrier) Runs() *flight.Runs { return runsOf(r.client) }

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

// Start starts flows with the client, as [Retrying] says, and returns the last one.
func (r *retrier) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	flow, _ := r.start(ctx, controlPoint, params)
	return flow
}

// start is Start. It also returns the flow that was rejected before the last one; nil if there was none.
func (r *retrier) start(ctx context.Context, controlPoint string, params flowctl.Params) (last, rejected *flowctl.Flow) {
	r.budget.deposit()
	var begin time.Time
	most := params.MaxWait
	if most > 0 {
		begin = time.Now()
	}
	for attempt := 1; ; attempt++ {
		flow, before := start(ctx, r.client, controlPoint, params)
		if before != nil {
			rejected = before
		}
		if rejected != nil && flow.Decision() == flowctl.Unreachable && (flow.ShouldRun() || errors.Is(flow.Err(), flowctl.ErrClosed)) {
			endUnused(ctx, flow)
			return rejected, nil
		}
		if flow.ShouldRun() || flow.Decision() != flowctl.Rejected || attempt == r.attempts {
			return flow, rejected
		}
		left := time.Duration(math.MaxInt64)
		if most > 0 {
			left = most - time.Since(begin)
		}
		wait, ok := r.wait(ctx, flow.RetryAfter(), left)
		if !ok || !r.budget.withdraw() {
			return flow, rejected
		}
		switch pause(ctx, flow, wait) {
		case pauseOver:
		case pauseClosed:
			r.budget.add(oneRetry)
			return flow, rejected
		case pauseCanceled:
			r.budget.add(oneRetry)
			// The next flow is Canceled, with the usual error. No agent is asked about it.
		}
		rejected = flow
		if most > 0 {
			params.MaxWait = max(most-time.Since(begin), flowctl.NoWait)
		}
	}
}

// start starts a flow. If the client is made by [Retrying], it also returns the flow that was rejected before.
func start(ctx context.Context, client Starter, controlPoint string, params flowctl.Params) (last, rejected *flowctl.Flow) {
	if r, ok := client.(*retrier); ok {
		return r.start(ctx, controlPoint, params)
	}
	return client.Start(ctx, controlPoint, params), nil
}

// endUnused ends a flow that may run and does not.
func endUnused(ctx context.Context, flow *flowctl.Flow) {
	if info, ok := flowinfo.From(flow.Context()); ok {
		info.EndUnused(ctx)
	}
}

const (
	// minWait is the shortest wait. For slots RetryAfter is an estimate, which can be microseconds. While it is wrong,
	// a call without a limit would try again and again without a pause.
	minWait = time.Millisecond

	// lateMargin is the time before the deadline that jitter does not use. An agent rejects flows whose callers have
	// some 10 ms left, and the work needs time as well.
	lateMargin = 25 * time.Millisecond
)

// wait returns how long to wait if a rejection says after, and whether to wait at all. The call may wait for as long as
// is left, and until its deadline. What wait adds to after is at most half of the time that is left then. Jitter uses
// only what exceeds lateMargin.
func (r *retrier) wait(ctx context.Context, after, left time.Duration) (time.Duration, bool) {
	if after <= 0 || r.maxWait > 0 && after > r.maxWait {
		return 0, false
	}
	if deadline, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(deadline))
	}
	spare := left - after
	if spare <= 0 && left < math.MaxInt64 {
		return 0, false
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
// most is the MaxWait of its parameters.
func (r *retrier) shortOfTime(ctx context.Context, flow *flowctl.Flow, most time.Duration) bool {
	deadline, ok := ctx.Deadline()
	after := flow.RetryAfter()
	return ok && flow.Decision() == flowctl.Rejected && after > 0 && time.Until(deadline) <= after &&
		(r.maxWait <= 0 || after <= r.maxWait) && (most <= 0 || after < most)
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

// A budget holds the retries of all calls with one Starter, in millionths of a retry. It is a token bucket that calls
// fill and retries empty, like Finagle's RetryBudget. Deposits expire there, and each needs a time. Here the balance
// has a maximum instead, as in gRPC's retry throttling (proposal A6), so that a quiet day cannot pay for a flood of
// retries.
type budget struct {
	unlimited bool
	perCall   int64
	balance   atomic.Int64
}

const (
	oneRetry   = 1_000_000
	newBalance = 10 * oneRetry // for the first calls, and for work that is seldom done
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

// deposit adds the share of one call.
func (b *budget) deposit() { b.add(b.perCall) }

func (b *budget) add(n int64) {
	for !b.unlimited {
		// If few flows are rejected, the balance is full. Calls on many processors then only load it, which is cheap.
		have := b.balance.Load()
		if have >= maxBalance || b.balance.CompareAndSwap(have, min(have+n, maxBalance)) {
			return
		}
	}
}

// withdraw takes a retry, and reports whether there was one.
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
