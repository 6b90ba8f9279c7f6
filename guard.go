package headgate

import (
	"context"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
)

// A Starter starts flows. A *flowctl.Client is one, and a nil client means that flow control is off. Other
// implementations must be safe for concurrent use, and must never return nil.
type Starter interface {
	Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow
}

// Guard wraps fn so that each call is a flow at the control point. fn gets the flow's context.
//
// If the flow is rejected, or if no agent answers and the flow may not run, fn is not called and onReject decides what
// is returned. onReject is called after the flow has ended, with the caller's context and a *flowctl.RejectedError or
// *flowctl.UnreachableError. If onReject is nil, the zero T and that error are returned. If the caller's context has
// ended, or the flow is invalid, onReject is not called, because nothing is wrong with the load. The zero T is then
// returned, with an error that matches the context's, or flowctl.ErrInvalid.
//
// params.IsFailure decides what fn's error means for the flow's status. The error is returned unchanged.
//
// Within fn, flowctl.FromContext finds the flow: to settle it for what the call has really cost, by flowctl's Flow.Settle, or to
// set its status.
//
// The maps and slices of params are copied, once. The guarded function is safe for concurrent use if fn and onReject
// are.
func Guard[T any](client Starter, controlPoint string, params flowctl.Params,
	fn func(context.Context) (T, error), onReject fallback.Func[T],
) func(context.Context) (T, error) {
	client, params = starter(client), params.Clone()
	return func(ctx context.Context) (T, error) {
		return guarded(ctx, client, controlPoint, params, fn, onReject)
	}
}

// guarded is one call of a guarded function.
func guarded[T any](ctx context.Context, client Starter, controlPoint string, params flowctl.Params,
	fn func(context.Context) (T, error), onReject func(context.Context, error) (T, error),
) (T, error) {
	flow := client.Start(ctx, controlPoint, params)
	if flow.ShouldRun() {
		return run(ctx, flow, fn)
	}
	end(ctx, flow)
	if onReject == nil || !offersFallback(flow.Decision()) {
		var zero T
		return zero, flow.Err()
	}
	return onReject(ctx, flow.Err())
}

// GuardFunc is [Guard] for a function with an argument. params makes the flow's parameters from the argument, such as
// labels for the user and the cost. A nil params means the zero Params. params is called for each flow, and its maps
// must not change until the flow has ended. Use fallback.For to pass a fallback.Func as onReject. The guarded function
// is safe for concurrent use if params, fn and onReject are.
func GuardFunc[A, T any](client Starter, controlPoint string, params func(context.Context, A) flowctl.Params,
	fn func(context.Context, A) (T, error), onReject func(context.Context, A, error) (T, error),
) func(context.Context, A) (T, error) {
	client = starter(client)
	return func(ctx context.Context, arg A) (T, error) {
		var p flowctl.Params
		if params != nil {
			p = params(ctx, arg)
		}
		var reject func(context.Context, error) (T, error)
		if onReject != nil {
			reject = func(ctx context.Context, err error) (T, error) { return onReject(ctx, arg, err) }
		}
		return guarded(ctx, client, controlPoint, p, func(ctx context.Context) (T, error) { return fn(ctx, arg) }, reject)
	}
}

// Do runs fn as one flow at the control point. It is for a block that needs the flow itself, to use its caches or to
// set its status. fn may also End the flow itself, if its work is done before it returns. If the flow does not run, Do
// returns the flow's error. The maps of params must not change until Do returns.
func Do(ctx context.Context, client Starter, controlPoint string, params flowctl.Params,
	fn func(ctx context.Context, flow *flowctl.Flow) error,
) error {
	flow := starter(client).Start(ctx, controlPoint, params)
	if !flow.ShouldRun() {
		end(ctx, flow)
		return flow.Err()
	}
	_, err := run(ctx, flow, func(ctx context.Context) (struct{}, error) { return struct{}{}, fn(ctx, flow) })
	return err
}

// starter returns the client, or the nil *flowctl.Client if there is none.
func starter(client Starter) Starter {
	if client == nil {
		return (*flowctl.Client)(nil)
	}
	return client
}

// isOff reports whether the Starter is a nil client, which lets all flows run.
func isOff(client Starter) bool {
	c, ok := client.(*flowctl.Client)
	return ok && c == nil
}

// run calls fn and ends the flow, however fn ends. It does not recover: a panic keeps its value and its stack, and
// Goexit goes on.
func run[T any](ctx context.Context, flow *flowctl.Flow, fn func(context.Context) (T, error)) (T, error) {
	returned := false
	defer func() {
		if !returned {
			flow.SetStatus(flowctl.StatusError)
		}
		end(ctx, flow)
	}()
	v, err := fn(flow.Context())
	flow.SetError(err)
	returned = true
	return v, err
}

// end ends the flow. It drops the error: the client has logged it, and it must not replace fn's.
func end(ctx context.Context, flow *flowctl.Flow) {
	_, _ = flow.End(ctx)
}

// offersFallback reports whether onReject decides what is returned for a flow that does not run.
func offersFallback(decision flowctl.Decision) bool {
	return decision == flowctl.Rejected || decision == flowctl.Unreachable
}
