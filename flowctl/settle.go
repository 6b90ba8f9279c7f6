package flowctl

import "math"

// Settle says how many tokens the flow has really cost by a label. The label is the TokensLabel of rate limiters, calendar quotas
// and quota schedulers. When the flow started, they took what the label said, or what they take without it. They correct that
// when the flow ends:
//
//   - If the flow cost less, what is too much goes back, up to the capacity of the bucket.
//   - If it cost more, the rest becomes a debt: the balance of the bucket is below zero, and flows are rejected, or wait, until
//     the debt is paid. The policy's MaxDebt bounds the debt. The engine's Stats count what is beyond.
//
// A load scheduler lets in the same share of the load. Its queue, and that of a quota scheduler, learn what flows cost.
//
// The last call before End counts for each label. After the flow has ended, Settle does nothing. If nothing is said, as after a panic,
// the flow keeps its charge: what it cost is not known. Settle(label, 0) is for work that has certainly not begun.
// Tokens that are negative, infinite or not a number, and an empty label, are ignored and logged once a minute: what was
// said before still counts.
//
// Settle changes nothing at components that took no tokens by the label: another label is theirs, they let the flow
// pass without a bucket, they are in dry run or the client is, or they have slots, which come back anyway. The same holds for a flow that
// did not run. An agent across the network takes settlements if it is Headgate's, and the flow's check was part of a session with it:
// see EndResponse.Settled. End then waits for its answer. Flows that settle nothing make no call for it.
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
