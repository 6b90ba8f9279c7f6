package flowctl

import "math"

// Settle says how many tokens the flow has really cost by a label. The label is the TokensLabel of rate limiters, calendar quotas
// and quota schedulers. When the flow started, these components took as many tokens as the label's value, or their default
// without the label. They correct that when the flow ends:
//
//   - If the flow cost less, the rest goes back, up to the capacity of the bucket.
//   - If it cost more, the rest becomes a debt: the balance of the bucket is below zero, and flows are rejected, or wait, until
//     the debt is paid. The policy's MaxDebt bounds the debt. The engine's Stats count the tokens beyond it.
//
// A load scheduler still lets in the same share of the load. Its queue, and that of a quota scheduler, price later flows by what
// flows have cost.
//
// For each label, the last call before End counts. After the flow has ended, Settle does nothing. If Settle is not called, as
// after a panic, the flow keeps its charge, because its cost is not known. Settle(label, 0) is for work that has certainly not
// begun. A call with an empty label, or with tokens that are negative, infinite or not a number, is ignored and logged once a
// minute. An earlier call then still counts.
//
// Settle changes nothing at a component that took no tokens by the label. Such a component has another TokensLabel, let the flow
// pass without a bucket, is in dry run, or has slots, which come back anyway. Settle also changes nothing if the client is in dry
// run, or if the flow did not run. An agent across the network takes settlements if it is one of Headgate's, and if the flow's
// check was part of a session with it: see EndResponse.Settled. End then waits for its answer. Flows that settle nothing make no
// call for it.
//
// Within a function that package headgate guards, and within a handler of an adaptor, [FromContext] finds the flow. Settle
// allocates once for each label.
func (f *Flow) Settle(label string, tokens float64) {
	if f.client == nil || f.progress.ended() {
		return
	}
	if !(tokens >= 0 && tokens <= math.MaxFloat64) || label == "" {
		f.client.settleLog.warn(f.client.logger, "headgate: a flow was not settled: tokens must be a number from 0 up, and need a label",
			"control_point", f.req.ControlPoint, "label", label, "tokens", tokens)
		return
	}
	f.costs.Say(label, tokens)
}
