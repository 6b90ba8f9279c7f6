package flowctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/canceled"
	"github.com/headgate-go/headgate/internal/deadline"
	"github.com/headgate-go/headgate/internal/sentinel"
)

// The errors of flows, to match with errors.Is.
//
// No error's text names a policy, a label, an address or a cause. Errors of calls other than Start have a method
// Cause() error, as [UnreachableError] has, and log/slog shows the cause. If a deadline has passed, the error's method
// Timeout returns true, as net.Error requires.
var (
	// ErrRejected matches when the agent said no. The error is a [*RejectedError].
	ErrRejected = sentinel.ErrRejected

	// ErrUnreachable matches when no usable answer came. The error of a flow is an [*UnreachableError].
	ErrUnreachable = sentinel.ErrUnreachable

	// ErrInvalid matches if no agent could be asked about the flow: no agent accepts its control point, labels or cache keys. The
	// error's text says what is wrong.
	ErrInvalid = errors.New("headgate: invalid flow")

	// ErrEnded matches if End is called for a flow that has ended already.
	ErrEnded = errors.New("headgate: flow has ended already")

	// ErrClosed matches when the client or its engine was closed. A flow's error that matches it matches ErrUnreachable
	// too.
	ErrClosed = errors.New("headgate: client closed")

	// ErrSlotLost is what [context.Cause] returns for the context of a flow that [WithCancelOnLostSlot] has canceled. No flow's
	// error matches it.
	ErrSlotLost = errors.New("headgate: slot lost: it was not renewed in time")
)

// RejectReason is why the agent rejected a flow.
type RejectReason uint8

// The reasons.
const (
	ReasonNone           = RejectReason(agentapi.ReasonNone)           // it was not rejected, or the agent does not say
	ReasonRateLimited    = RejectReason(agentapi.ReasonRateLimited)    // a rate or concurrency limit is exhausted
	ReasonNoTokens       = RejectReason(agentapi.ReasonNoTokens)       // a scheduler had no room in time, or a circuit breaker is open
	ReasonNotSampled     = RejectReason(agentapi.ReasonNotSampled)     // a sampler left it out
	ReasonNoMatchingRamp = RejectReason(agentapi.ReasonNoMatchingRamp) // in ramp mode, no ramp let it in
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

// RejectCause says why a flow was rejected, in more detail than the reason. Only agents of Headgate send it.
type RejectCause uint8

// The causes. A flow that was not rejected has CauseNone.
const (
	CauseNone         = RejectCause(agentapi.CauseNone)      // none but the reason, as for a workload with policy.NoQueue, or the agent does not say
	CauseLate         = RejectCause(agentapi.CauseLate)      // too little time was left for the answer to arrive
	CauseQueueFull    = RejectCause(agentapi.CauseQueueFull) // the queue was full
	CauseQueueTooLong = RejectCause(agentapi.CauseLongQueue) // the flow would have had to wait longer than it could
	CauseTimeout      = RejectCause(agentapi.CauseTimeout)   // the flow waited for as long as it could
	CauseClosed       = RejectCause(agentapi.CauseClosed)    // the engine, or the client of a remote agent, was closed while the flow waited
	CauseLabelTooLong = RejectCause(agentapi.CauseLongLabel) // the value of a label was too long for the policy

	// CauseCircuitOpen is the cause of a policy.CircuitBreaker that is open, or half-open without room for another probe. The
	// reason is ReasonNoTokens, because the protocol has none for it.
	CauseCircuitOpen = RejectCause(agentapi.CauseCircuitOpen)

	// CauseNoStore is the cause of a limit whose state is in a store that did not answer, if its policy rejects flows then.
	CauseNoStore = RejectCause(agentapi.CauseNoStore)
)

// String gives the cause in words.
func (c RejectCause) String() string {
	if c == CauseNone {
		return "no cause given"
	}
	return cmp.Or(agentapi.Cause(c).String(), fmt.Sprintf("cause %d", uint8(c)))
}

// RejectedError is the error of a flow that the agent rejected. It matches [ErrRejected].
//
// Its text has only what the callers of a service may know, whatever verb prints it: a gRPC handler that wraps the
// error sends the text to its caller. The methods and LogValue have the rest, for the program alone. They may be called on a nil
// pointer.
type RejectedError struct {
	ControlPoint string
	Reason       RejectReason

	// HTTPStatus is the status to answer with: the policy's, or one that fits the reason. It is within 400 to 599.
	HTTPStatus int

	retryAfter time.Duration
	details    **rejectionDetails // nil for an error that a program has made
}

// rejectionDetails are what the text of a RejectedError does not show. They are behind two pointers. A RejectedError that is no pointer has
// no methods, so fmt prints its fields. For %s, which fits no pointer, it prints what the first pointer leads to, and not what the second
// one does.
type rejectionDetails struct {
	cause                       RejectCause
	noReturns                   bool // so there is no time to retry after
	policy, component, labelKey string
}

// detailed returns what the text does not show.
func (e *RejectedError) detailed() rejectionDetails {
	if e == nil || e.details == nil {
		return rejectionDetails{}
	}
	return **e.details
}

// newRejectedError makes the error of a rejection, with its details in one allocation.
func newRejectedError(controlPoint string, r agentapi.Rejection) *RejectedError {
	made := &struct {
		err     RejectedError
		to      *rejectionDetails
		details rejectionDetails
	}{
		err:     RejectedError{ControlPoint: controlPoint, Reason: RejectReason(r.Reason), HTTPStatus: deniedStatus(r), retryAfter: r.RetryAfter},
		details: rejectionDetails{cause: RejectCause(r.Cause), noReturns: r.NoReturns},
	}
	made.to = &made.details
	made.err.details = &made.to
	if by := r.By; by != nil {
		made.details.policy, made.details.component, made.details.labelKey = by.Policy, by.ID, by.LabelKey
	}
	return &made.err
}

// noError is the text of an error that is a nil pointer, as package fmt prints it.
const noError = "<nil>"

// Error names the control point and the reason, and how long until a retry can succeed.
func (e *RejectedError) Error() string {
	if e == nil {
		return noError
	}
	text := fmt.Sprintf("headgate: start %q: rejected: %s", e.ControlPoint, e.Reason)
	if e.retryAfter > 0 {
		text += fmt.Sprintf(", retry after %s", max(e.retryAfter.Round(time.Millisecond), time.Millisecond))
	}
	return text
}

// Format prints what Error gives, whatever the verb.
func (e *RejectedError) Format(s fmt.State, verb rune) { format(s, verb, e) }

// Is makes errors.Is(err, ErrRejected) true.
func (e *RejectedError) Is(target error) bool { return target == ErrRejected }

// Cause says why the flow was rejected, in more detail than the reason.
func (e *RejectedError) Cause() RejectCause { return e.detailed().cause }

// Policy names the policy that rejected the flow; "" when the agent does not say.
func (e *RejectedError) Policy() string { return e.detailed().policy }

// Component names the policy's component that rejected the flow; "" when the agent does not say.
func (e *RejectedError) Component() string { return e.detailed().component }

// LabelKey is the key of the label that the component limits by; "" when it limits by none, or the agent does not say.
func (e *RejectedError) LabelKey() string { return e.detailed().labelKey }

// RetryAfter is how long until a retry can succeed. It is 0 if that is not known, or if no retry can succeed. At a concurrency
// limiter or scheduler it is not known until a flow has given a slot back. Until then, LogValue has retry_after_unknown if the
// engine is in this process.
func (e *RejectedError) RetryAfter() time.Duration {
	if e == nil {
		return 0
	}
	return e.retryAfter
}

// WithRetryAfter returns a copy of the error whose RetryAfter is the given time. It is for programs that make such errors
// themselves, for example to test a fallback.
func (e *RejectedError) WithRetryAfter(after time.Duration) *RejectedError {
	changed := new(RejectedError)
	if e != nil {
		*changed = *e
	}
	changed.retryAfter = max(after, 0)
	return changed
}

// LogValue is for the program's own logs. It is a group with the control point, the reason and the status, and with
// cause, policy, component, label_key and retry_after if they are known. It has no label's value. If a retry can
// succeed, but the engine cannot estimate when, it has retry_after_unknown, in words.
func (e *RejectedError) LogValue() slog.Value {
	if e == nil {
		return slog.Value{}
	}
	details := e.detailed()
	attrs := []slog.Attr{slog.String("control_point", e.ControlPoint), slog.String("reason", e.Reason.String())}
	if details.cause != CauseNone {
		attrs = append(attrs, slog.String("cause", details.cause.String()))
	}
	for _, named := range []slog.Attr{
		slog.String("policy", details.policy), slog.String("component", details.component), slog.String("label_key", details.labelKey),
	} {
		if named.Value.String() != "" {
			attrs = append(attrs, named)
		}
	}
	attrs = append(attrs, slog.Int("status", e.HTTPStatus))
	if e.retryAfter > 0 {
		attrs = append(attrs, slog.Duration("retry_after", e.retryAfter))
	} else if details.noReturns {
		attrs = append(attrs, slog.String("retry_after_unknown", "no flow has given a slot back yet"))
	}
	return slog.GroupValue(attrs...)
}

// GRPCStatus lets a gRPC handler return the error as it is. The code is ResourceExhausted for 429, Unavailable for 503,
// PermissionDenied for 403 and so on, and never OK. The message is the text of Error. If RetryAfter is known, there is
// a RetryInfo.
func (e *RejectedError) GRPCStatus() *status.Status {
	if e == nil {
		return status.New(grpcCode(0), e.Error())
	}
	s := status.New(grpcCode(e.HTTPStatus), e.Error())
	if e.retryAfter <= 0 {
		return s
	}
	withRetry, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.retryAfter)})
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

// UnreachableError is the error of a flow that no agent decided about. It matches [ErrUnreachable], and [ErrClosed] if
// the client or the engine was closed. Its text does not show the cause, which may name an address. The methods may be called on a
// nil pointer.
type UnreachableError struct {
	ControlPoint string

	details **unreachableDetails // nil for an error that a program has made
}

// unreachableDetails are behind two pointers as rejectionDetails are.
type unreachableDetails struct{ cause error }

// newUnreachableError makes the error in one allocation.
func newUnreachableError(controlPoint string, cause error) *UnreachableError {
	made := &struct {
		err     UnreachableError
		to      *unreachableDetails
		details unreachableDetails
	}{err: UnreachableError{ControlPoint: controlPoint}, details: unreachableDetails{cause}}
	made.to = &made.details
	made.err.details = &made.to
	return &made.err
}

// Error names the control point.
func (e *UnreachableError) Error() string {
	if e == nil {
		return noError
	}
	return fmt.Sprintf("headgate: start %q: agent unreachable", e.ControlPoint)
}

// Format prints what Error gives, whatever the verb.
func (e *UnreachableError) Format(s fmt.State, verb rune) { format(s, verb, e) }

// Is matches ErrUnreachable, and ErrClosed where it applies.
func (e *UnreachableError) Is(target error) bool {
	return target == ErrUnreachable || target == ErrClosed && errors.Is(e.Cause(), agentapi.ErrClosed)
}

// Cause is why no agent decided; for a remote agent it is the gRPC status. It is not unwrapped, so that a gRPC handler
// that returns the error does not pass the agent's status on as its own.
func (e *UnreachableError) Cause() error {
	if e == nil || e.details == nil {
		return nil
	}
	return (*e.details).cause
}

// Timeout reports whether the agent did not answer in time.
func (e *UnreachableError) Timeout() bool { return timedOut(e.Cause()) }

// Temporary is Timeout. It makes the error a net.Error.
func (e *UnreachableError) Temporary() bool { return e.Timeout() }

// LogValue is for the program's own logs: a group with the control point and the cause.
func (e *UnreachableError) LogValue() slog.Value {
	if e == nil {
		return slog.Value{}
	}
	return slog.GroupValue(slog.String("control_point", e.ControlPoint), slog.Any("cause", e.Cause()))
}

// GRPCStatus is Unavailable, with the text of Error.
func (e *UnreachableError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, e.Error())
}

// timerSlack is how long after its deadline a context may end.
const timerSlack = 50 * time.Millisecond

// newCanceledError makes the error of a flow whose caller's context ended first.
func newCanceledError(ctx context.Context, controlPoint string) error {
	if ctx.Err() == nil { // its deadline has passed, and its timer is late
		late := time.NewTimer(timerSlack)
		defer late.Stop()
		select {
		case <-ctx.Done():
		case <-late.C: // a context that says when it ends, and does not
			return canceled.New(opStart, controlPoint, context.DeadlineExceeded, context.DeadlineExceeded)
		}
	}
	return canceled.New(opStart, controlPoint, ctx.Err(), context.Cause(ctx))
}

// invalidError is the error of a flow that cannot be asked about. What is wrong names no key and no value.
type invalidError struct {
	controlPoint string
	err          error
}

func (e *invalidError) Error() string {
	return fmt.Sprintf("headgate: start %.40q: invalid: %v", e.controlPoint, e.err)
}

func (e *invalidError) Format(s fmt.State, verb rune) { format(s, verb, e) }

func (e *invalidError) Is(target error) bool { return target == ErrInvalid }

func (e *invalidError) Unwrap() error { return e.err }

// LogValue has the key of the label that is wrong, where one is.
func (e *invalidError) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("control_point", fmt.Sprintf("%.40s", e.controlPoint)), slog.String("problem", e.err.Error())}
	if label, ok := errors.AsType[interface {
		error
		LabelKey() string
	}](e.err); ok {
		attrs = append(attrs, slog.String("label_key", label.LabelKey()))
	}
	return slog.GroupValue(attrs...)
}

// GRPCStatus is Internal: it is the service that asked wrongly, and not its caller.
func (e *invalidError) GRPCStatus() *status.Status { return status.New(codes.Internal, e.Error()) }

// The kinds of calls, as errors name them.
const (
	opStart  = "start"
	opEnd    = "end"
	opReady  = "agent not ready"
	opClose  = "close client"
	opFind   = "cache lookup"
	opStore  = "cache store"
	opDelete = "cache delete"
)

// ownError is an error in words of this package, which the text of a callError shows.
type ownError string

func (e ownError) Error() string { return string(e) }

// callError is the error of a call other than a check. Its text does not show the cause, which may have the agent's
// words or name an address. The cause is not unwrapped, see UnreachableError.
type callError struct{ *callDetails }

// callDetails are behind a pointer as rejectionDetails are.
type callDetails struct {
	op           string
	controlPoint string
	cause        error
	match        error // nil: nothing
}

// newCallError makes the error in one allocation.
func newCallError(details callDetails) *callError {
	made := &struct {
		err     callError
		details callDetails
	}{details: details}
	made.err.callDetails = &made.details
	return &made.err
}

// callError makes the error of a call; nil when err is.
func (c *Client) callError(ctx context.Context, op, controlPoint string, err error) error {
	if err == nil {
		return nil
	}
	e := newCallError(callDetails{op: op, controlPoint: controlPoint, cause: err})
	switch code := status.Code(err); {
	case c.closed.Load(), errors.Is(err, agentapi.ErrClosed):
		e.match = ErrClosed
	case ctx.Err() != nil:
		e.match = ctx.Err()
	case code == codes.Unavailable, code == codes.DeadlineExceeded, errors.Is(err, errBreakerOpen):
		e.match = ErrUnreachable
	}
	return e
}

func (e *callError) Error() string {
	if e.controlPoint == "" {
		return fmt.Sprintf("headgate: %s: %s", e.op, e.text())
	}
	return fmt.Sprintf("headgate: %s %.*q: %s", e.op, bounds.MaxControlPoint, e.controlPoint, e.text())
}

// text is what may be said of the cause.
func (e *callError) text() string {
	own, isOwn := errors.AsType[ownError](e.cause)
	switch {
	case isOwn:
		return own.Error()
	case e.match == nil:
		return "the agent reports an error"
	case errors.Is(e.match, ErrInvalid):
		return e.cause.Error()
	case errors.Is(e.match, ErrClosed):
		return "client closed"
	case errors.Is(e.match, ErrUnreachable):
		return "agent unreachable"
	default:
		return canceled.Text(e.match)
	}
}

func (e *callError) Format(s fmt.State, verb rune) { format(s, verb, e) }

func (e *callError) Is(target error) bool { return e.match != nil && errors.Is(e.match, target) }

// Cause is the agent's error, or that of the connection.
func (e *callError) Cause() error { return e.cause }

func (e *callError) Timeout() bool { return deadline.In(e.match) || timedOut(e.cause) }

func (e *callError) Temporary() bool { return e.Timeout() }

// LogValue has the cause.
func (e *callError) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("op", e.op)}
	if e.controlPoint != "" {
		attrs = append(attrs, slog.String("control_point", fmt.Sprintf("%.*s", bounds.MaxControlPoint, e.controlPoint)))
	}
	return slog.GroupValue(append(attrs, slog.Any("cause", e.cause))...)
}

// timedOut reports whether err has a deadline that passed, or the gRPC status of one.
func timedOut(err error) bool { return deadline.In(err) || status.Code(err) == codes.DeadlineExceeded }

// format prints an error's text for every verb, so that none prints its fields.
func format(s fmt.State, verb rune, err error) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), err.Error())
}
