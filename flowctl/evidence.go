package flowctl

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// catchUp notes what has come from the agent since the last failure.
func (r *remote) catchUp(received uint64) {
	if r.breaker.outdated(received) {
		r.answered()
	}
}

// answered notes that the agent is there.
func (r *remote) answered() {
	if r.breaker.answered() {
		r.backLog.log(r.logger.Info, "headgate: the agent answers again")
	}
}

// failed decides whether a check that got no answer counts against the agent.
func (r *remote) failed(ctx, call context.Context, err error, c *check) {
	received, code := r.received.Load(), status.Code(err)
	silent, isSilent := errors.AsType[*silentError](err)
	switch {
	case isSilent: // what came before the silence does not count
		r.silent(c.returned, silent.since, received, err)
	case c.heard(received):
		r.answered()
	case r.links != nil && r.links.stirred(c.start):
		// There is a connection, and nothing is known of it. That counts neither against the agent nor for it.
	case code == codes.Unavailable && ctx.Err() == nil,
		code == codes.DeadlineExceeded && !callerEnded(ctx, err) && call.Err() != nil:
		r.silent(c.returned, c.returned, received, err)
	}
	if refused(code) {
		r.refusals.warn(r.logger, "headgate: the agent refuses to decide", "error", err)
	}
}

// silent counts a check against the agent: nothing has come from it since then.
func (r *remote) silent(now, since time.Time, received uint64, err error) {
	if r.breaker.failed(now, since, received) {
		r.breakerLog.warn(r.logger, "headgate: the agent does not answer; flows are Unreachable at once", "error", err)
	}
}

// refused reports whether an agent that answers with the code decides about no flow at all.
func refused(code codes.Code) bool {
	return code == codes.Unauthenticated || code == codes.PermissionDenied || code == codes.Unimplemented
}

// spares reports whether a call other than a check is left out, because the agent is dead.
func (r *remote) spares() bool {
	r.catchUp(r.received.Load())
	return r.breaker.spares(time.Now())
}
