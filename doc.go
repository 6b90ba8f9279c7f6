// Package headgate puts flow control around any function: it asks an agent whether the function may run now, skips it
// when the answer is no, and tells the agent how it went.
//
//	limited := headgate.Guard(client, "checkout", flowctl.Params{}, charge, nil)
//	receipt, err := limited(ctx)
//
// The client comes from package flowctl. It asks an engine in this process (flowctl.New with package engine) or an
// agent across the network that speaks the Aperture protocol (flowctl.Dial). What is returned instead of a rejected
// function's result is the business of package fallback; what tells one flow from another, of package labels.
//
//   - [Guard] wraps a function without arguments, [GuardFunc] one with an argument that says what the flow is about.
//   - [Do] runs a block as one flow, and hands it the flow.
//   - [Cached] is Guard for a function whose result can be used again, by the agent's cache. [CachedFunc] is the same for
//     a function with an argument. Calls that look for one result at the same time share one run, which is one flow.
//   - [Retrying] makes a client wait and ask again when a flow is rejected, for all of these and for the adaptors.
//   - flowctl's Start and EndWith are for code that cannot be a closure.
//
// All of them promise the same: a flow that should not run does not; a flow that was started is ended, exactly once, on
// return, error, panic and runtime.Goexit alike; no panic is lost; and the function's own result and error come back as
// they are. Nothing is recovered either, except a panic of a function that calls of Cached share: that goes on in one of
// the calls.
package headgate
