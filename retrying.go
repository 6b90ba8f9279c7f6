package headgate

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/flight"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/retries"
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
	return &retrier{client: client, rules: retries.New(retries.Policy(policy))}
}

// A retrier is a Starter that retries rejected flows, and returns the last one.
type retrier struct {
	client Starter
	rules  *retries.Rules
}

// Runs returns the client's runs: cached functions with retries share them with those without.
func (r *retrier) Runs() *flight.Runs { return runsOf(r.client) }

// Start starts flows with the client, as [Retrying] says, and returns the last one.
func (r *retrier) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	flow, _ := r.start(ctx, controlPoint, params)
	return flow
}

// start is Start. It also returns the flow that was rejected before the last one; nil if there was none.
func (r *retrier) start(ctx context.Context, controlPoint string, params flowctl.Params) (last, rejected *flowctl.Flow) {
	r.rules.Budget.Deposit()
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
		if flow.ShouldRun() || flow.Decision() != flowctl.Rejected || r.rules.Last(attempt) {
			return flow, rejected
		}
		left := time.Duration(math.MaxInt64)
		if most > 0 {
			left = most - time.Since(begin)
		}
		wait, ok := r.rules.Wait(ctx, flow.RetryAfter(), left)
		if !ok || !r.rules.Budget.Withdraw() {
			return flow, rejected
		}
		switch pause(ctx, flow, wait) {
		case retries.Over:
		case retries.Closed:
			r.rules.Budget.Return()
			return flow, rejected
		case retries.Canceled:
			r.rules.Budget.Return()
			// The next flow is Canceled, with the usual error. No agent is asked about it.
		}
		rejected = flow
		if most > 0 {
			if params.MaxWait = most - time.Since(begin); params.MaxWait <= 0 { // zero would stand for the default
				params.MaxWait = flowctl.NoWait
			}
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

// shortOfTime reports whether the flow was not retried because its caller's deadline came before a retry could succeed.
// most is the MaxWait of its parameters.
func (r *retrier) shortOfTime(ctx context.Context, flow *flowctl.Flow, most time.Duration) bool {
	deadline, ok := ctx.Deadline()
	after := flow.RetryAfter()
	return ok && flow.Decision() == flowctl.Rejected && after > 0 && time.Until(deadline) <= after &&
		!r.rules.TooLong(after) && (most <= 0 || after < most)
}

// pause ends the flow and waits. The time that the end takes is part of the wait.
func pause(ctx context.Context, flow *flowctl.Flow, wait time.Duration) retries.End {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	end(ctx, flow)
	var client, agent <-chan struct{}
	if info, ok := flowinfo.From(flow.Context()); ok {
		client, agent = info.Closed()
	}
	return retries.Await(ctx, timer, client, agent)
}
