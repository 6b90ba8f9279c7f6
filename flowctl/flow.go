package flowctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/flowinfo"
	"github.com/headgate-go/headgate/internal/wire"
)

// A Flow is one request to run guarded work, and the run if it is admitted. It lasts from [Client.Start] to [Flow.End]. It is never
// nil, and every method is safe to call at any time and from any goroutine.
//
// Every verb that prints a flow, or the context that it gives, prints no label. A struct with a flow in an unexported field is
// different: package fmt prints such fields without calling methods. Then a verb that fits no pointer, such as %s, shows the
// flow's labels. Print the flow itself, or give the struct a method String.
type Flow struct {
	parent  context.Context // of the caller, with the flow's trace span where there is one
	client  *Client         // nil: flow control is off
	req     agentapi.Request
	verdict agentapi.Verdict
	fails   func(error) bool

	costs    agentapi.Costs
	progress progress

	// These do not change once Start has returned the flow.
	decision Decision
	run      bool
	traced   bool // there is a span
}

// A Decision is the outcome of a flow's check.
type Decision uint8

// The decisions. Zero is none of them, and no flow has it.
const (
	Accepted    Decision = iota + 1 // the agent said yes
	Rejected                        // the agent said no
	Unreachable                     // no usable answer came
	Canceled                        // the caller's own context ended first
	Invalid                         // no agent could be asked about the flow
)

// String gives the decision in lower case.
func (d Decision) String() string {
	switch d {
	case Accepted:
		return "accepted"
	case Rejected:
		return "rejected"
	case Unreachable:
		return "unreachable"
	case Canceled:
		return "canceled"
	case Invalid:
		return "invalid"
	default:
		return fmt.Sprintf("Decision(%d)", uint8(d))
	}
}

// Status is how a flow's work went.
type Status uint8

// The statuses.
const (
	StatusUnset Status = iota
	StatusOK
	StatusError

	// statusGone is StatusError of a flow that its caller had canceled when it failed. What a driver makes of a cancellation has any
	// form, so the failure says nothing about the work.
	statusGone
)

// String gives the status as telemetry does: "OK", "Error" or "Unset".
func (s Status) String() string {
	switch s {
	case StatusUnset:
		return "Unset"
	case StatusOK:
		return "OK"
	case StatusError:
		return "Error"
	default:
		return fmt.Sprintf("Status(%d)", uint8(s))
	}
}

// An EndResponse is what an agent did when a flow ended: what it took back, and what it settled.
type EndResponse struct {
	Held     int // slots that the flow took
	Returned int // slots that it still held; the agent had taken back the others, because the flow took too long

	// Settled reports whether the agent took all that [Flow.Settle] said. It is false if nothing was said, if the flow did not
	// run or was not decided about, and in a client's dry run. For an agent across the network it is also false if the agent
	// is not Headgate's, has been restarted, or remembers too many later flows, and if the check came before the client's session
	// had begun. Then what the flow took stays taken. If no answer came in time it is false too, although the agent may take the
	// settlement yet.
	Settled bool
}

// Decision is what was decided.
func (f *Flow) Decision() Decision { return f.decision }

// ShouldRun reports whether to do the work. It is true if the flow was accepted. It is also true if no usable answer
// came, unless RampMode or FailClosed is set. In a dry run it is always true.
func (f *Flow) ShouldRun() bool { return f.run }

// Success reports whether an agent answered, even if it said no. [Flow.ShouldRun] reports whether to do the work.
func (f *Flow) Success() bool { return f.decision == Accepted || f.decision == Rejected }

// Err is nil for an accepted flow. For any other flow it is a [*RejectedError], an [*UnreachableError], an error that
// matches the context's, or one that matches [ErrInvalid]. It is the same value each time. A flow that runs although it
// was not accepted has an error too.
func (f *Flow) Err() error {
	if err := f.verdict.Err(); err != nil || f.decision != Rejected {
		return err
	}
	return f.verdict.Fail(newRejectedError(f.req.ControlPoint, f.verdict.Rejection()))
}

// RejectReason is why the agent rejected the flow; ReasonNone when it did not.
func (f *Flow) RejectReason() RejectReason { return RejectReason(f.verdict.Rejection().Reason) }

// RetryAfter is how long until a retry of a rejected flow can succeed; 0 if that is not known, or if no retry can
// succeed.
func (f *Flow) RetryAfter() time.Duration { return f.verdict.Rejection().RetryAfter }

// HTTPStatus is the status to answer a request with: 200 if the flow runs, and else one within 400 to 599. A rejection
// has the policy's status, or one that fits the reason. A Canceled flow has 408 if its context was canceled, as when
// the client has left. It has 503 if the service itself gave up: the context's deadline has passed, or its cause is
// another than context.Canceled.
func (f *Flow) HTTPStatus() int {
	switch {
	case f.run:
		return http.StatusOK
	case f.decision == Rejected:
		return deniedStatus(f.verdict.Rejection())
	case f.decision == Unreachable:
		return http.StatusServiceUnavailable
	case f.decision == Canceled && f.callerLeft():
		return http.StatusRequestTimeout // which no caller reads
	case f.decision == Canceled:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

// callerLeft reports whether a Canceled flow's context was canceled without a cause, as servers do when a client has
// left. A deadline that has passed is the service's own. So is a cause, even one that matches context.Canceled.
func (f *Flow) callerLeft() bool {
	return errors.Is(f.parent.Err(), context.Canceled) && context.Cause(f.parent) == context.Canceled //nolint:errorlint // see above
}

// deniedStatus is the HTTP status of a rejection.
func deniedStatus(r agentapi.Rejection) int {
	if s := int(r.Status); s >= 400 && s <= 599 {
		return s
	}
	return RejectReason(r.Reason).httpStatus()
}

// ControlPoint is where the flow was started.
func (f *Flow) ControlPoint() string { return f.req.ControlPoint }

// String names the flow's control point and decision, and none of its labels.
func (f *Flow) String() string { return fmt.Sprintf("flow %q: %s", f.req.ControlPoint, f.decision) }

// Format prints what String gives, whatever the verb, so that no label is printed.
func (f *Flow) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, f.String()) }

// flowContext is the flow as a context: the same object, so that it costs no allocation of its own.
type flowContext Flow

type flowKey struct{}

// Context is the caller's context with the flow in it, for [FromContext].
func (f *Flow) Context() context.Context { return (*flowContext)(f) }

func (c *flowContext) Deadline() (time.Time, bool) { return c.parent.Deadline() }
func (c *flowContext) Done() <-chan struct{}       { return c.parent.Done() }
func (c *flowContext) Err() error                  { return c.parent.Err() }
func (c *flowContext) String() string              { return fmt.Sprintf("headgate.Flow(%q)", c.req.ControlPoint) }
func (c *flowContext) Format(s fmt.State, _ rune)  { _, _ = io.WriteString(s, c.String()) }

func (c *flowContext) Value(key any) any {
	switch key {
	case flowKey{}:
		return (*Flow)(c)
	case flowinfo.Key{}:
		return (*flowInfo)(c)
	default:
		return c.parent.Value(key)
	}
}

// cancelOnLostSlot has the flow's context end when the flow's slots are lost.
func (f *Flow) cancelOnLostSlot() {
	if f.verdict.Details == nil {
		return
	}
	if c, ok := f.verdict.Details.Remote.(*check); ok && c.stay != nil {
		f.parent, c.cancel = context.WithCancelCause(f.parent)
		c.remote.session.watch(c.stay, c, c.cancel)
	}
}

// watchSlots has the agent in this process watch the flow's slots that it holds by a lease.
func (f *Flow) watchSlots() {
	leaser := f.client.leaser
	if !f.Success() || leaser.Leased(&f.verdict) == 0 {
		return
	}
	var over func(lost bool)
	if f.client.cancelLost {
		parent, cancel := context.WithCancelCause(f.parent)
		f.parent = parent
		over = func(lost bool) {
			if lost {
				cancel(ErrSlotLost)
			}
			cancel(nil)
		}
	}
	leaser.Watch(&f.verdict, over)
}

// FromContext finds the innermost flow that ctx comes from.
func FromContext(ctx context.Context) (*Flow, bool) {
	f, ok := ctx.Value(flowKey{}).(*Flow)
	return f, ok
}

// SetStatus sets how the work went. It overrides what [Flow.SetError] or [Flow.EndWith] derives from an error. Only a
// panic overrides it, and a Goexit in package headgate's guards. After the flow has ended it does nothing.
func (f *Flow) SetStatus(s Status) {
	if s == StatusError {
		s = f.failed(f.progress.set())
	}
	f.progress.setStatus(s)
}

// SetError derives the flow's status from the error that the work ended with, by Params.IsFailure: nil is OK. If the caller
// has canceled the flow by then, circuit breakers do not count it, whatever the error is.
func (f *Flow) SetError(err error) {
	if err == nil && f.progress.derived() == StatusUnset {
		return // which is OK, and a load is cheaper than a store
	}
	if err != nil {
		f.progress.setDerived(f.failed(f.progress.derived())) // in case IsFailure panics
		if f.isFailure(err) {
			return
		}
	}
	f.progress.setDerived(StatusOK)
}

// failed is the status of work that has failed, which had the status before. What failed before its caller canceled stays a
// failure.
func (f *Flow) failed(before Status) Status {
	if before != StatusError && f.callerCanceled() {
		return statusGone
	}
	return StatusError
}

func (f *Flow) callerCanceled() bool { return errors.Is(f.parent.Err(), context.Canceled) }

func (f *Flow) isFailure(err error) bool {
	if f.fails != nil {
		return f.fails(err)
	}
	return !f.isCanceled(err)
}

// isCanceled reports whether an error comes from the caller's cancellation. An expired deadline is a failure: slow work is what
// overload looks like.
func (f *Flow) isCanceled(err error) bool {
	return f.callerCanceled() &&
		(errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(f.parent)) || status.Code(err) == codes.Canceled)
}

// endStatus is how the flow ends: one that did not run ends as Error, one of which nothing was said as OK.
func (f *Flow) endStatus() Status {
	switch set, derived := f.progress.set(), f.progress.derived(); {
	case !f.run, set == statusGone:
		return StatusError
	case set != StatusUnset:
		return set
	case derived == StatusError, derived == statusGone:
		return StatusError
	default:
		return StatusOK
	}
}

// ending is how the flow ends for its agent, with the status. One that its caller has canceled says nothing about the work even if it
// ended well: how long it took was up to the caller.
func (f *Flow) ending(s Status) agentapi.Ended {
	switch {
	case s == StatusError && f.run && cmp.Or(f.progress.set(), f.progress.derived()) == statusGone:
		return agentapi.EndedGone
	case s == StatusError:
		return agentapi.EndedFailed
	case f.callerCanceled():
		return agentapi.EndedUnknown
	default:
		return agentapi.EndedOK
	}
}

// End ends the flow. It gives back the concurrency slots that the flow holds, even if the flow was rejected, settles what
// [Flow.Settle] said, and reports the flow's status. The status is Error if the flow did not run, and OK if it ran and no status
// was set. End does not stop when ctx is canceled. It has a time limit of its own, see [WithEndTimeout], and does not wait for an
// agent that counts as dead, see [AgentBreaker]. Only the first call counts; later ones return [ErrEnded]. Any other error means
// that slots may not have been given back. To an agent of Headgate, the client's session gives them back later, for up to 10
// minutes. Any other agent takes them back later by itself.
func (f *Flow) End(ctx context.Context) (EndResponse, error) { return f.end(ctx, false) }

// end is End. An unused flow did not run although it was let in.
func (f *Flow) end(ctx context.Context, unused bool) (EndResponse, error) {
	if f.progress.end() {
		return EndResponse{}, ErrEnded
	}
	if f.client == nil {
		return EndResponse{}, nil
	}
	return f.client.end(ctx, f, unused)
}

// EndWith ends the flow of a function that returns *errp. Defer it directly, right after Start:
//
//	flow := client.Start(ctx, "checkout", params)
//	defer flow.EndWith(&err)
//
// It derives the status as [Flow.SetError] does, and never changes *errp. If the function panics, the status is Error,
// and the panic goes on with the same value. A nil errp counts as no error. After an explicit End it only lets a panic
// go on.
//
// EndWith cannot tell a runtime.Goexit from a return. If another deferred function calls it, it cannot see panics.
// Package headgate's Guard and Do have neither limit.
func (f *Flow) EndWith(errp *error) {
	if p := recover(); p != nil {
		f.SetStatus(StatusError)
		_, _ = f.End(f.parent)
		panic(p) //nolint:forbidigo // it is the caller's panic, which goes on
	}
	if f.progress.ended() {
		return
	}
	defer func() { _, _ = f.End(f.parent) }() // also when IsFailure panics
	switch {
	case !f.run: // the error is the flow's own
	case errp == nil:
		f.SetError(nil)
	default:
		f.SetError(*errp)
	}
}

// CheckResponse is the agent's answer as a message of the protocol. For an engine it is the message that the engine
// would have sent. It is a copy; nil if no agent answered.
func (f *Flow) CheckResponse() *checkv1.CheckResponse {
	if !f.Success() || f.client == nil {
		return nil
	}
	if remote := f.remoteAnswer(); remote != nil {
		m := new(checkv1.CheckResponse)
		if data, err := remote.CheckResponse(); err != nil || proto.Unmarshal(data, m) != nil {
			return nil // which cannot be: the answer was decoded before
		}
		return m
	}
	return proto.CloneOf(wire.Response(&f.req, &f.verdict)) // a copy, because its cached values are the flow's
}

// remoteAnswer is the answer of a remote agent; nil where there is none.
func (f *Flow) remoteAnswer() agentapi.RemoteAnswer {
	if !f.Success() || f.verdict.Details == nil {
		return nil
	}
	return f.verdict.Details.Remote
}

// holds reports whether the flow may hold slots at a remote agent although it is Canceled: its caller's context had
// ended when the answer came.
func (f *Flow) holds() bool {
	return f.decision == Canceled && f.verdict.Details != nil && f.verdict.Details.Remote != nil
}

// ResultCache returns what the check found under Params.ResultCacheKey. On a hit ok is true. On a plain miss ok is false and err
// is nil. Otherwise err says what went wrong. If the flow was not accepted, ResultCache returns the flow's error. A rejected flow
// in a dry run is an exception: it has the values that the cache has.
func (f *Flow) ResultCache() (value []byte, ok bool, err error) {
	if asked := f.req.Lookup(); asked == nil || asked.Result == "" {
		return nil, false, nil
	}
	if err := f.unanswered(); err != nil {
		return nil, false, err
	}
	if f.verdict.Details == nil {
		return nil, false, nil
	}
	return f.cacheAnswer(f.verdict.Details.Result)
}

// GlobalCache returns what the check found under one of Params.GlobalCacheKeys, as [Flow.ResultCache] does.
func (f *Flow) GlobalCache(key string) (value []byte, ok bool, err error) {
	if f.req.Lookup() == nil {
		return nil, false, nil
	}
	if err := f.unanswered(); err != nil {
		return nil, false, err
	}
	if f.verdict.Details == nil {
		return nil, false, nil
	}
	return f.cacheAnswer(f.verdict.Details.Global[key])
}

// unanswered is why the check did not look into the caches; nil if it did. For a flow that is rejected in a dry run it
// did.
func (f *Flow) unanswered() error {
	if f.decision == Rejected && f.run {
		return nil
	}
	return f.Err()
}

func (f *Flow) cacheAnswer(a agentapi.CacheAnswer) ([]byte, bool, error) {
	if a.Err != nil {
		return nil, false, newCallError(callDetails{op: opFind, controlPoint: f.req.ControlPoint, cause: a.Err})
	}
	return a.Value, a.Hit, nil
}

// SetResultCache stores the value under Params.ResultCacheKey. A ttl of 0 is the agent's default, 7 days.
func (f *Flow) SetResultCache(ctx context.Context, value []byte, ttl time.Duration) error {
	return f.store(ctx, f.resultKey(), value, ttl)
}

// SetGlobalCache stores the value under a key that all control points share. A ttl of 0 is the agent's default, 7 days,
// and a negative one is an error. An engine keeps no value for longer than 7 days.
func (f *Flow) SetGlobalCache(ctx context.Context, key string, value []byte, ttl time.Duration) error {
	return f.store(ctx, agentapi.CacheKey{Key: key, Global: true}, value, ttl)
}

// DeleteResultCache removes the value under Params.ResultCacheKey. A missing value is no error.
func (f *Flow) DeleteResultCache(ctx context.Context) error {
	return f.remove(ctx, f.resultKey())
}

// DeleteGlobalCache removes the value under a key that all control points share. A missing value is no error.
func (f *Flow) DeleteGlobalCache(ctx context.Context, key string) error {
	return f.remove(ctx, agentapi.CacheKey{Key: key, Global: true})
}

func (f *Flow) resultKey() agentapi.CacheKey {
	k := agentapi.CacheKey{ControlPoint: f.req.ControlPoint}
	if asked := f.req.Lookup(); asked != nil {
		k.Key = asked.Result
	}
	return k
}

func (f *Flow) store(ctx context.Context, key agentapi.CacheKey, value []byte, ttl time.Duration) error {
	switch {
	case f.client == nil:
		return nil
	case key.Key == "":
		return newCallError(callDetails{opStore, f.req.ControlPoint, errNoCacheKey, ErrInvalid})
	case ttl < 0:
		return newCallError(callDetails{opStore, f.req.ControlPoint, errNegativeTTL, ErrInvalid})
	}
	if err := bounds.CheckCacheKeys(key.Key); err != nil {
		return newCallError(callDetails{opStore, f.req.ControlPoint, err, ErrInvalid})
	}
	return f.client.callError(ctx, opStore, f.req.ControlPoint, f.client.agent.Store(ctx, key, value, ttl))
}

func (f *Flow) remove(ctx context.Context, key agentapi.CacheKey) error {
	switch {
	case f.client == nil:
		return nil
	case key.Key == "":
		return newCallError(callDetails{opDelete, f.req.ControlPoint, errNoCacheKey, ErrInvalid})
	}
	return f.client.callError(ctx, opDelete, f.req.ControlPoint, f.client.agent.Delete(ctx, key))
}

var (
	errNoCacheKey  = errors.New("the flow was started without a cache key")
	errNegativeTTL = errors.New("the time to live is negative")
)
