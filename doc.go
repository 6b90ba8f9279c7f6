// Package headgate puts flow control around any function. It asks an agent whether the function may run now, skips the
// function when the answer is no, and reports to the agent how the run went.
//
//	limited := headgate.Guard(client, "checkout", flowctl.Params{}, charge, nil)
//	receipt, err := limited(ctx)
//
// The client comes from package flowctl. It asks an engine in this process (flowctl.New with package engine) or an
// agent across the network that speaks the Aperture protocol (flowctl.Dial). Package fallback has what is returned
// instead of a rejected function's result. Package labels has the labels that tell flows apart.
//
//   - [Guard] wraps a function without arguments. [GuardFunc] wraps one with an argument, which describes the flow.
//   - [Do] runs a block as one flow, and passes the flow to it.
//   - [Cached] is Guard for a function whose result can be used again, by the agent's cache. [CachedFunc] is the same for
//     a function with an argument. Calls for the same result at the same time share one run, which is one flow.
//   - [Retrying] makes a client wait and ask again when a flow is rejected. All of these and the adaptors can use it.
//   - flowctl's Start and EndWith are for code that cannot be a closure.
//
// All of them promise the same. A flow that should not run does not run. A flow that was started is ended exactly once: on
// return, error, panic and runtime.Goexit. The function's own result and error come back unchanged. No panic is lost. Only two of
// them recover panics: flowctl's EndWith panics again with the same value, and a panic in a shared run of Cached continues in one
// of the calls.
package headgate
