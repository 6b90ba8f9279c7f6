package flowctl

import (
	"context"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// End gives back what the flow holds at the agent, and records it for telemetry.
func (r *remote) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, failed bool) (agentapi.Returns, error) {
	if v.Details == nil || v.Details.Remote == nil {
		return agentapi.Returns{}, nil
	}
	return v.Details.Remote.End(ctx, req, v, failed)
}

// End is the remote's, for the flow that it answered by this check.
func (c *check) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, failed bool) (agentapi.Returns, error) {
	r := c.remote
	if r.exporter != nil {
		r.exporter.record(c, failed, req.DryRun() && v.Rejected())
	}
	refs := wire.Held(c.answer())
	if len(refs) == 0 {
		return agentapi.Returns{}, nil
	}
	returns := agentapi.Returns{Held: len(refs)}
	if r.spares() {
		return returns, errNotEnded
	}
	// Detached: a slot must come back although, and just when, the caller has gone.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
	defer cancel()
	m := new(checkv1.FlowEndResponse)
	err := r.invoke(call, checkv1.FlowControlService_FlowEnd_FullMethodName,
		&checkv1.FlowEndRequest{ControlPoint: req.ControlPoint, InflightRequests: refs}, m)
	if err != nil {
		return returns, err
	}
	r.answered()
	for _, s := range m.GetTokenReturnStatuses() {
		if s.GetReturned() && returns.Returned < returns.Held { // it may tell of more than it was asked about
			returns.Returned++
		}
	}
	return returns, nil
}
