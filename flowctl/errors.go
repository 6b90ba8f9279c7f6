package flowctl

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/headgate-go/headgate/internal/seam"
)

// The outcomes of a flow that errors are matched against with errors.Is.
var (
	// ErrRejected matches when the agent said no. The error is a [*RejectedError].
	ErrRejected = errors.New("headgate: flow rejected")

	// ErrUnreachable matches when nobody answered. The error is an [*UnreachableError].
	ErrUnreachable = errors.New("headgate: agent unreachable")

	// ErrInvalid matches when the flow could not be asked about: its control point, labels or cache keys are
	// not what an agent accepts. The error's text says what is wrong.
	ErrInvalid = errors.New("headgate: invalid flow")

	// ErrEnded matches when a flow is ended that has ended already.
	ErrEnded = errors.New("headgate: flow has ended already")

	// ErrClosed matches, besides ErrUnreachable, when the client or its engine was closed.
	ErrClosed = errors.New("headgate: client closed")
)

// RejectReason is why the agent rejected a flow.
type RejectReason uint8

// The reasons.
const (
	ReasonNone           = RejectReason(seam.ReasonNone)           // it was not rejected, or the agent does not say
	ReasonRateLimited    = RejectReason(seam.ReasonRateLimited)    // a rate or concurrency limit is exhausted
	ReasonNoTokens       = RejectReason(seam.ReasonNoTokens)       // a scheduler had no room in time
	ReasonNotSampled     = RejectReason(seam.ReasonNotSampled)     // a sampler left it out
	ReasonNoMatchingRamp = RejectReason(seam.ReasonNoMatchingRamp) // in ramp mode, and no ramp let it in
)

// String gives the reason in words.
func (r RejectReason) String() string {
	switch r {
	case ReasonNone:
		return "no reason given"
	case ReasonRateLimited:
		return "rate limited"
	case ReasonNoTokens:
		return "no tokens"
	case ReasonNotSampled:
		return "not sampled"
	case ReasonNoMatchingRamp:
		return "no matching ramp"
	default:
		return fmt.Sprintf("reason %d", uint8(r))
	}
}

// httpStatus is the HTTP status of a rejection whose policy names none.
func (r RejectReason) httpStatus() int {
	switch r {
	case ReasonRateLimited:
		return http.StatusTooManyRequests
	case ReasonNoTokens:
		return http.StatusServiceUnavailable
	default:
		return http.StatusForbidden
	}
}

// RejectedError is the error of a flow that the agent rejected. It matches [ErrRejected].
type RejectedError struct {
	ControlPoint string
	Reason       RejectReason

	// Policy and Component name what rejected the flow, and LabelKey the label that it limits by, where the agent
	// says so.
	Policy    string
	Component string
	LabelKey  string

	// HTTPStatus fits the rejection: the policy's, or one by the reason. It is within 400 to 599.
	HTTPStatus int

	// Wait is how long until a retry can succeed; 0 when that is not known, or never.
	Wait time.Duration

	cause seam.Cause // more than the reason, where the agent is an engine
}

// Error names the control point, the reason and the component; never a label's value.
func (e *RejectedError) Error() string {
	text := fmt.Sprintf("headgate: start %q: rejected: %s", e.ControlPoint, e.Reason)
	if cause := e.cause.String(); cause != "" {
		text += " (" + cause + ")"
	}
	if e.Policy != "" {
		text += fmt.Sprintf(" by %s/%s", e.Policy, e.Component)
	}
	if e.Wait > 0 {
		text += fmt.Sprintf(", retry after %s", max(e.Wait.Round(time.Millisecond), time.Millisecond))
	}
	return text
}

// Is makes errors.Is(err, ErrRejected) true.
func (e *RejectedError) Is(target error) bool { return target == ErrRejected }

// RetryAfter is Wait: how long until a retry can succeed; 0 when that is not known, or never.
func (e *RejectedError) RetryAfter() time.Duration { return e.Wait }

// GRPCStatus lets a gRPC handler return the error as it is: ResourceExhausted for 429, Unavailable for 503,
// PermissionDenied for 403 and so on, never OK, with a RetryInfo where RetryAfter is known. Its message leaves out which
// policy it was: that is not for the callers of a service.
func (e *RejectedError) GRPCStatus() *status.Status {
	s := status.New(grpcCode(e.HTTPStatus), fmt.Sprintf("headgate: start %q: rejected: %s", e.ControlPoint, e.Reason))
	if e.Wait <= 0 {
		return s
	}
	withRetry, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.Wait)})
	if err != nil {
		return s
	}
	return withRetry
}

// grpcCode is total, and never OK: a rejection must not look like a reply.
func grpcCode(httpStatus int) codes.Code {
	switch httpStatus {
	case http.StatusTooManyRequests:
		return codes.ResourceExhausted
	case http.StatusBadRequest:
		return codes.InvalidArgument
	case http.StatusUnauthorized:
		return codes.Unauthenticated
	case http.StatusForbidden:
		return codes.PermissionDenied
	case http.StatusNotFound:
		return codes.NotFound
	case http.StatusNotImplemented:
		return codes.Unimplemented
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return codes.DeadlineExceeded
	}
	if httpStatus >= http.StatusInternalServerError {
		return codes.Unavailable
	}
	return codes.ResourceExhausted
}

// UnreachableError is the error of a flow that nobody decided about. It matches [ErrUnreachable], and [ErrClosed] when
// that is because the client or the engine was closed.
type UnreachableError struct {
	ControlPoint string
	cause        error
}

// Error names the control point and the cause.
func (e *UnreachableError) Error() string {
	return fmt.Sprintf("headgate: start %q: agent unreachable: %v", e.ControlPoint, e.cause)
}

// Is matches ErrUnreachable, and ErrClosed where it applies.
func (e *UnreachableError) Is(target error) bool {
	return target == ErrUnreachable || target == ErrClosed && errors.Is(e.cause, seam.ErrClosed)
}

// Cause is why: for a remote agent the gRPC status. It is not unwrapped, so that a gRPC handler that returns the error
// does not pass the agent's status on as its own.
func (e *UnreachableError) Cause() error { return e.cause }

// GRPCStatus is Unavailable, without the cause's text: that is not for the callers of a service.
func (e *UnreachableError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, fmt.Sprintf("headgate: start %q: agent unreachable", e.ControlPoint))
}

// canceledError is the error of a flow whose caller gave up first.
type canceledError struct {
	controlPoint string
	err          error // the context's
	cause        error // why it was canceled
}

// timerSlack is how long after its deadline a context may end.
const timerSlack = 50 * time.Millisecond

func newCanceledError(ctx context.Context, controlPoint string) *canceledError {
	if ctx.Err() == nil { // its deadline has passed, and its timer is late
		late := time.NewTimer(timerSlack)
		defer late.Stop()
		select {
		case <-ctx.Done():
		case <-late.C: // a context that says when it ends, and does not
			return &canceledError{controlPoint, context.DeadlineExceeded, context.DeadlineExceeded}
		}
	}
	return &canceledError{controlPoint, ctx.Err(), context.Cause(ctx)}
}

func (e *canceledError) Error() string {
	return fmt.Sprintf("headgate: start %q: %v", e.controlPoint, e.cause)
}

func (e *canceledError) Unwrap() []error { return []error{e.err, e.cause} }

func (e *canceledError) GRPCStatus() *status.Status {
	return status.New(status.FromContextError(e.err).Code(), fmt.Sprintf("headgate: start %q: %v", e.controlPoint, e.err))
}

// invalidError is the error of a flow that cannot be asked about.
type invalidError struct {
	controlPoint string
	err          error
}

func (e *invalidError) Error() string {
	return fmt.Sprintf("headgate: start %.40q: invalid: %v", e.controlPoint, e.err)
}

func (e *invalidError) Is(target error) bool { return target == ErrInvalid }

func (e *invalidError) Unwrap() error { return e.err }

// GRPCStatus is Internal: it is the service that asked wrongly, and not its caller.
func (e *invalidError) GRPCStatus() *status.Status {
	return status.New(codes.Internal, "headgate: invalid flow")
}

// callError is why a call failed that is not a check. The agent's status is not unwrapped, see UnreachableError.
type callError struct {
	op           string
	controlPoint string
	err          error
	match        error // nil: nothing
}

// callError makes the error of a call; nil when err is.
func (c *Client) callError(ctx context.Context, op, controlPoint string, err error) error {
	if err == nil {
		return nil
	}
	e := &callError{op: op, controlPoint: controlPoint, err: err}
	switch code := status.Code(err); {
	case c.closed.Load(), errors.Is(err, seam.ErrClosed):
		e.match = ErrClosed
	case ctx.Err() != nil:
		e.match = ctx.Err()
	case code == codes.Unavailable, code == codes.DeadlineExceeded, errors.Is(err, errGateOpen):
		e.match = ErrUnreachable
	}
	return e
}

func (e *callError) Error() string {
	text := e.err.Error()
	if s, ok := status.FromError(e.err); ok {
		text = s.Message()
	}
	if e.controlPoint == "" {
		return fmt.Sprintf("headgate: %s: %s", e.op, text)
	}
	return fmt.Sprintf("headgate: %s %q: %s", e.op, e.controlPoint, text)
}

func (e *callError) Is(target error) bool { return e.match != nil && errors.Is(e.match, target) }
