package flowctl

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// End gives back what the flow holds at the agent, and records it for telemetry.
func (r *remote) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, o agentapi.Outcome) (agentapi.Returns, error) {
	if v.Details == nil || v.Details.Remote == nil {
		return agentapi.Returns{}, nil
	}
	return v.Details.Remote.End(ctx, req, v, o)
}

// End ends the flow of this check.
func (c *check) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, o agentapi.Outcome) (returns agentapi.Returns, first error) {
	r := c.remote
	if r.exporter != nil && !c.late { // a flow that was not let in did no work to report
		r.exporter.record(c, o.Ended, req.DryRun() && v.Rejected())
	}
	if c.stay != nil {
		defer c.leave()
	}
	refs := wire.Held(c.answer())
	lives := c.answer().GetAgentId() != 0
	settles := o.Costs != nil && !c.late && !v.Rejected() && !req.DryRun() && lives
	var outcome *sessionv1.Outcome
	if lives && c.answer().GetAwaitsOutcome() {
		outcome = c.outcome(v, o)
	}
	if outcome != nil && !settles { // nobody waits for the answer
		c.settle(nil, outcome)
	}
	if len(refs) == 0 && !settles {
		return agentapi.Returns{}, nil
	}
	returns.Held = len(refs)
	if r.spares() {
		switch {
		case len(refs) == 0:
			return returns, nil
		case lives:
			r.session.giveBack(c.answer().GetAgentId(), c.number, refs)
			return returns, errEndsLater
		default:
			return returns, errNotEnded
		}
	}
	// Detached, because slots must come back even if the caller has gone.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
	defer cancel()
	if settles {
		settled := c.settle(o.Costs, outcome)
		defer func() { returns.Settled = settled(call) }()
	}
	var left []*checkv1.InflightRequestRef // those that no call has brought back, as far as is known
	for len(refs) > 0 && call.Err() == nil {
		n := wire.Ended(req.ControlPoint, refs)
		returned, err := r.endSlots(call, req.ControlPoint, refs[:n])
		returns.Returned += returned
		if err != nil || returned < n { // a balancer may have sent it to another agent than the session's
			left = append(left, refs[:n]...)
		}
		if first == nil {
			first = err
		}
		refs = refs[n:]
	}
	if first == nil && len(refs) > 0 {
		first = call.Err()
	}
	if left = append(left, refs...); len(left) > 0 && lives {
		r.session.giveBack(c.answer().GetAgentId(), c.number, left)
	}
	return returns, first
}

// outcome is how the flow ended, as its span says it too. Of a flow that came late there is no span: it did not run.
func (c *check) outcome(v *agentapi.Verdict, o agentapi.Outcome) *sessionv1.Outcome {
	switch {
	case c.late, !o.Ended.Told(), v.Details.Result.Hit:
		return &sessionv1.Outcome{Status: sessionv1.Outcome_STATUS_UNKNOWN}
	case o.Ended == agentapi.EndedFailed:
		return &sessionv1.Outcome{Status: sessionv1.Outcome_STATUS_ERROR}
	default:
		return &sessionv1.Outcome{Status: sessionv1.Outcome_STATUS_OK, Took: durationpb.New(time.Since(c.returned))}
	}
}

// settle sends what the flow has cost, and how it has ended if the outcome is not nil. The function waits for the answer, and reports
// whether the agent has taken it.
func (c *check) settle(costs *agentapi.Cost, outcome *sessionv1.Outcome) func(context.Context) bool {
	id := c.answer().GetSettlementId()
	if id == 0 { // nothing of the flow can be corrected
		return func(context.Context) bool { return true }
	}
	one := c.remote.session.settle(c.answer().GetAgentId(), id, c.number, costs, outcome)
	if one == nil {
		return func(context.Context) bool { return false }
	}
	return one.await
}

// leave ends what the client keeps of the flow's slots.
func (c *check) leave() {
	c.remote.session.leave(c.stay, c)
	if c.cancel != nil {
		c.cancel(nil)
	}
}

// endSlots gives back slots by one call.
func (r *remote) endSlots(ctx context.Context, controlPoint string, refs []*checkv1.InflightRequestRef) (returned int, err error) {
	m := new(checkv1.FlowEndResponse)
	if err := r.invoke(ctx, checkv1.FlowControlService_FlowEnd_FullMethodName,
		&checkv1.FlowEndRequest{ControlPoint: controlPoint, InflightRequests: refs}, m); err != nil {
		return 0, err
	}
	r.answered()
	for _, s := range m.GetTokenReturnStatuses() {
		if s.GetReturned() && returned < len(refs) { // the agent may list more than it was asked about
			returned++
		}
	}
	return returned, nil
}
