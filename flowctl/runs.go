package flowctl

import (
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/flight"
)

// Runs is for package headgate, whose cached functions share runs with one client. It is nil for a nil client.
func (c *Client) Runs() *flight.Runs {
	if c == nil {
		return nil
	}
	return &c.runs
}

// unstored logs that a cached function could not have its result stored.
func (c *Client) unstored(controlPoint string, err error) {
	c.unstoredLog.warn(c.logger, "headgate: a result was not stored in the cache", "control_point", controlPoint, "error", err)
}

// timeUp is how little time a caller has left when its deadline is what ended a wait. Agents answer a moment before the
// deadline, so that the answer is heard.
const timeUp = 25 * time.Millisecond

// shortOfTime reports whether the flow was rejected, just now, because its caller's deadline was too near: the check
// timeout would have left it more time.
func (f *Flow) shortOfTime() bool {
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
		return f.req.Timeout <= 0 || left < f.req.Timeout
	default:
		return false
	}
}
