package flowctl

import (
	"context"
	"math"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/flowinfo"
)

// flowInfo is what a flow's context has for other packages of Headgate.
type flowInfo Flow

var _ flowinfo.Info = (*flowInfo)(nil)

// DryRun reports whether no limit is in force for the flow.
func (f *flowInfo) DryRun() bool { return f.client == nil || f.client.dryRun }

// Pauses shows the pauses of the flow's client.
func (f *flowInfo) Pauses() flowinfo.Pauses {
	if f.client == nil {
		return nil
	}
	return (*pauses)(f.client)
}

// Closed tells when the flow's client and its agent are closed.
func (f *flowInfo) Closed() (client, agent <-chan struct{}) {
	if f.client == nil {
		return nil, nil
	}
	if c, ok := f.client.agent.(agentapi.Closer); ok {
		agent = c.Closed()
	}
	return f.client.done, agent
}

// ClosedError is the rejection by a close.
func (f *flowInfo) ClosedError() error {
	return newRejectedError(f.req.ControlPoint, byClose())
}

// LateRejection reads the answer that the flow itself does not use.
func (f *flowInfo) LateRejection() error {
	if !(*Flow)(f).holds() {
		return nil
	}
	c, ok := f.verdict.Details.Remote.(*check)
	if !ok || !c.late {
		return nil
	}
	var v agentapi.Verdict
	c.read(&f.req, &v)
	if !v.Rejected() {
		return nil
	}
	return newRejectedError(f.req.ControlPoint, v.Rejection())
}

// EndUnused ends the flow as an error.
func (f *flowInfo) EndUnused(ctx context.Context) {
	flow := (*Flow)(f)
	flow.SetStatus(StatusError)
	_, _ = flow.end(ctx, true) // the client logs the error
}

// timeUp is the most time that a caller has left when its deadline has ended a wait. Agents answer a moment before the
// deadline, so that the answer arrives in time.
const timeUp = 25 * time.Millisecond

// ShortOfTime reports whether the flow was rejected, just now, because its caller's deadline was too near, and not
// because of the check timeout or its MaxWait.
func (f *flowInfo) ShortOfTime() bool {
	if f.decision != Rejected {
		return false
	}
	deadline, ok := f.parent.Deadline()
	if !ok {
		return false
	}
	left := time.Until(deadline)
	switch r := f.verdict.Rejection(); {
	case r.Cause == agentapi.CauseTimeout:
		return left <= timeUp
	case r.Cause == agentapi.CauseLate, r.Cause == agentapi.CauseLongQueue,
		r.Cause == agentapi.CauseNone && r.Reason == agentapi.ReasonNoTokens: // an agent that does not say
		if most := f.req.MaxWait(); most > 0 { // agents answer a moment before a deadline, and not before MaxWait is over
			return most > agentapi.NoWait && left < min(most, math.MaxInt64-timeUp)+timeUp
		}
		return f.req.Timeout <= 0 || left < f.req.Timeout
	default:
		return false
	}
}

// LongestWait is what MaxWait and CheckTimeout of Params say together.
func (f *flowInfo) LongestWait(maxWait, checkTimeout time.Duration) time.Duration {
	longest := maxWait
	if maxWait == 0 {
		longest = checkTimeout
	}
	if longest == 0 && f.client != nil {
		longest = f.client.checkTimeout
	}
	if longest <= 0 {
		return math.MaxInt64
	}
	return longest
}
