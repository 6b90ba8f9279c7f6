// Package agentapi is what connects a client and an agent in one process: the [Agent] turns a [Request] into a
// [Verdict]. All are plain Go values. Messages of the wire exist only in the remote agent and in the server that offers
// an engine to others.
package agentapi

import (
	"context"
	"errors"
	"io"
	"iter"
	"log/slog"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/headgate-go/headgate/internal/statefile"
)

// ErrClosed is what an agent answers with after it was closed.
var ErrClosed = errors.New("closed")

// An Agent decides about flows. Its methods are safe for concurrent use.
type Agent interface {
	// Check fills v, which is zero, with the answer to req. An error means that no answer came in time. If
	// v.Details.Remote is set nevertheless, an answer came after ctx had ended, and End gives back what the flow holds.
	// The agent keeps neither req nor v; both live in the flow and come back in End.
	Check(ctx context.Context, req *Request, v *Verdict) error

	// End ends a flow that Check answered, even after ctx had ended. It gives back what the flow holds, corrects what the
	// flow took by what it cost, and reports how the flow went. The outcome is that of a flow that ran, except at an agent that is
	// no Reverter: there a flow can end unused. It is called once, and does not fail because ctx was canceled.
	End(ctx context.Context, req *Request, v *Verdict, o Outcome) (Returns, error)

	// Store and Delete change one cache entry. A ttl of 0 is the agent's default.
	Store(ctx context.Context, key CacheKey, value []byte, ttl time.Duration) error
	Delete(ctx context.Context, key CacheKey) error

	// Ready waits until the agent can be asked, or ctx ends.
	Ready(ctx context.Context) error

	// Expect tells the agent how long the checks of a client may take; 0 or less is no limit. A check may still ask for
	// another time.
	Expect(timeout time.Duration) (forget func())

	// Instrument shows what the agent knows of itself by the provider, until it is closed. Another call with the same
	// provider does nothing.
	Instrument(provider metric.MeterProvider) error
}

// A Reverter is an agent that can take back all that Check gave a flow, tokens and slots. Revert takes the place of End.
type Reverter interface {
	Revert(ctx context.Context, req *Request, v *Verdict)
}

// A Local is an agent in this process, which package agent can offer to others.
type Local interface {
	Agent
	Reverter
	Closer

	// EndSlots gives back slots by their names on the wire, because a server does not keep flows. It gives back together what is in
	// another place. The ends are in the order of the slots.
	EndSlots(ctx context.Context, slots []SlotName) []SlotEnd

	// Settle settles decisions of any number of flows as their components do, and notes in each whether it is done. It settles
	// together what is in another place.
	Settle(ctx context.Context, all []Settling)

	// Renew has a client's session live for so long from now on. Slots of flows that named it run out when it does. A
	// session that has run out begins anew: it does not bring slots back. It returns for how long from now on the session's slots in
	// another place are certainly kept; see [Leaser]. That is at most lasts, and 0 if it is not known or there is no such place.
	Renew(session [16]byte, lasts time.Duration) (leased time.Duration)

	// Lookup finds values in the caches. If room is not nil, it takes room for a value in the answer, or reports that
	// there is none, which makes a miss. Then the values must not be changed. Flows look up with their check.
	Lookup(ctx context.Context, keys []CacheKey, room func(size int) bool) []CacheAnswer

	// Measures reports whether a policy needs the latencies of flows at the control point, or at any if it is "".
	Measures(controlPoint string) bool

	// Observe measures a flow that has run and ended well, by what its client reports.
	Observe(controlPoint string, labels map[string]string, latency time.Duration)

	// NamedLabels returns the keys of the labels that the policies in force read. A key is true if latencies are
	// measured by the label, so that telemetry must report it. The map must not be changed.
	NamedLabels() map[string]bool

	// ServiceWarnings lists the selectors that name a service, because flows over the wire have none. Those of
	// components that no other selector applies to come first.
	ServiceWarnings() []string

	// Acting returns, for each control point, the components that act on flows without a service, as flows over the
	// wire are. Both are in order.
	Acting() iter.Seq2[string, []*Component]

	// WriteState writes what limits hold to a file of at most limit bytes. The header's Written and Secret are the agent's own. It
	// stalls no check: it locks one key at a time.
	WriteState(to io.Writer, h statefile.Header, limit int) (StateCount, error)

	// ReadState takes what was written into the limits in force, and leaves to no flow more than was written. It is called
	// once, before flows come. It logs what it drops.
	ReadState(*statefile.File) StateCount

	// HoldOff rejects flows that want slots for so long from now on. HeldOff counts them.
	HoldOff(time.Duration)
	HeldOff() uint64

	// Logger is the agent's. It is never nil.
	Logger() *slog.Logger
}

// A SlotName is what a slot is called on the wire.
type SlotName struct {
	Policy, Hash, Component, Label string

	Slot uint64
}

// A SlotEnd is what became of a slot that was to be given back.
type SlotEnd struct {
	Known    bool // the agent has the component
	Returned bool // the slot was still taken
}

// A Leaser is a Local that may hold slots for flows in another place, by a lease. When the lease has run out, flows that run may have lost
// their slots.
type Leaser interface {
	// Leases reports whether flows may have such slots. It does not change.
	Leases() bool

	// Leased returns how many such slots a flow has. Slots of a dry run do not count: no limit is broken if others get them.
	Leased(v *Verdict) int

	// Watch watches those of a flow until End or Revert. If over is not nil it is called once: when the slots are lost, or after the flow
	// has ended. It must not block.
	Watch(v *Verdict, over func(lost bool))
}

// A StateCount counts what a state has, or what was taken from one.
type StateCount struct {
	Keys    int // states of keys, and those without a key
	Slots   int // those that were taken
	Dropped int // states that were not taken, or had no room in the file
}

// A Host has an agent in this process: an engine.
type Host interface {
	Agent() Local
}

// A Closer is an agent that signals when it is closed.
type Closer interface {
	Closed() <-chan struct{}
}

// CacheKey names a cache entry: a result of one control point, or, where Global is set, an entry that all control
// points share.
type CacheKey struct {
	ControlPoint string
	Key          string
	Global       bool
}

// CacheAnswer is what became of one lookup. The zero value is a miss.
type CacheAnswer struct {
	Value []byte
	Hit   bool
	Err   error
}

// Reason is why a flow was rejected.
type Reason uint8

// The reasons, numbered as on the wire.
const (
	ReasonNone Reason = iota
	ReasonRateLimited
	ReasonNoTokens
	ReasonNotSampled
	ReasonNoMatchingRamp
	Reasons // how many there are
)

// Cause is what caused a rejection, besides its reason. Only agents of Headgate report it.
type Cause uint8

// The causes, numbered as on the wire.
const (
	CauseNone        Cause = iota // none but the reason
	CauseLate                     // too little time was left for the answer to arrive
	CauseQueueFull                // as many flows wait as may
	CauseLongQueue                // the wait would have been longer than the flow had time
	CauseTimeout                  // the flow waited for as long as it could
	CauseClosed                   // the engine or the client was closed while the flow waited
	CauseLongLabel                // a label's value is too long for a component to go by
	CauseCircuitOpen              // a circuit breaker is open, or half-open without room for another probe
	CauseNoStore                  // the store that engines share the limit by did not answer
	Causes                        // how many there are
)

// String returns the cause in words; "" for none.
func (c Cause) String() string {
	switch c {
	case CauseLate:
		return "too late"
	case CauseQueueFull:
		return "queue full"
	case CauseLongQueue:
		return "queue too long to wait"
	case CauseTimeout:
		return "waited in vain"
	case CauseClosed:
		return "closed"
	case CauseLongLabel:
		return "label too long"
	case CauseCircuitOpen:
		return "circuit open"
	case CauseNoStore:
		return "store did not answer"
	default:
		return ""
	}
}

// A Verdict is what the agent answered.
type Verdict struct {
	Start   int64           // when the agent was asked, in Unix nanoseconds
	first   LimiterDecision // inline, so that the flow that meets one limiter allocates nothing for it
	Details *VerdictDetails
}

// VerdictDetails hold the parts of a verdict that most flows do not need.
type VerdictDetails struct {
	err       atomic.Pointer[error] // of the flow: see Verdict.Fail
	rejection Rejection

	Decisions []LimiterDecision // after the first
	Waited    time.Duration     // in queues
	Result    CacheAnswer
	Global    map[string]CacheAnswer

	// Remote is the answer of a remote agent; nil for any other agent.
	Remote RemoteAnswer
}

// A RemoteAnswer is the answer of a remote agent, as it is kept until the flow has ended. Its messages are encoded, so
// that an engine links no protocol.
type RemoteAnswer interface {
	// CheckResponse is the answer as an encoded CheckResponse. It must not be changed.
	CheckResponse() ([]byte, error)

	// HTTP is what the agent wants done with the HTTP request; nil if the check had none.
	HTTP(*HTTPRequest) *HTTPAnswer

	// End gives back what the flow holds, and reports how it went.
	End(ctx context.Context, req *Request, v *Verdict, o Outcome) (Returns, error)
}

// HTTPAnswer is what an agent wants done with an HTTP request. If the request was accepted, Header is set in it.
// Otherwise Header and Body are the answer's. The map is the caller's.
type HTTPAnswer struct {
	Header map[string]string
	Body   string
}

// More returns v.Details, and makes it if there is none.
func (v *Verdict) More() *VerdictDetails {
	if v.Details == nil {
		v.Details = new(VerdictDetails)
	}
	return v.Details
}

// A Rejection is why the agent said no, and what to make of it.
type Rejection struct {
	Status   int16 // HTTP status; 0: by reason
	Reason   Reason
	Cause    Cause
	rejected bool // false in a zero Rejection, which is none

	// RetryAfter is how long until a retry can succeed; 0 when unknown.
	RetryAfter time.Duration

	// NoReturns means that a flow can be admitted, but RetryAfter is unknown, because no slot has come back yet. The
	// wire does not carry it.
	NoReturns bool

	// By is the component that rejected the flow; nil for none in particular.
	By *Component
}

// Reject turns the verdict into the rejection.
func (v *Verdict) Reject(r Rejection) {
	r.rejected = true
	v.More().rejection = r
}

// Fail notes the flow's error, unless one is noted already, and returns the noted one. Agents do not call it. The error
// is the client's, and is here because few flows have one and the flow itself has no room. For a verdict that is a
// rejection it is safe for concurrent use.
func (v *Verdict) Fail(err error) error {
	if x := v.More(); !x.err.CompareAndSwap(nil, &err) {
		return *x.err.Load()
	}
	return err
}

// Err is the flow's error that was noted; nil when none was.
func (v *Verdict) Err() error {
	if v.Details == nil {
		return nil
	}
	if err := v.Details.err.Load(); err != nil {
		return *err
	}
	return nil
}

// Rejected reports whether the flow was rejected.
func (v *Verdict) Rejected() bool { return v.Details != nil && v.Details.rejection.rejected }

// Rejection is why the flow was rejected; zero when it was not.
func (v *Verdict) Rejection() Rejection {
	if v.Details == nil {
		return Rejection{}
	}
	return v.Details.rejection
}

// Add appends a zero decision for the component and returns it. The pointer is good until the next Add.
func (v *Verdict) Add(c *Component) *LimiterDecision {
	d := &v.first
	if d.Component != nil {
		x := v.More()
		x.Decisions = append(x.Decisions, LimiterDecision{})
		d = &x.Decisions[len(x.Decisions)-1]
	}
	d.Component, d.Capacity = c, c.Capacity
	return d
}

// Len is the number of limiter decisions.
func (v *Verdict) Len() int {
	switch {
	case v.first.Component == nil:
		return 0
	case v.Details == nil:
		return 1
	default:
		return 1 + len(v.Details.Decisions)
	}
}

// At returns decision i of Len.
func (v *Verdict) At(i int) *LimiterDecision {
	if i == 0 {
		return &v.first
	}
	return &v.Details.Decisions[i-1]
}

// Info is the kind of message by which the protocol reports a component's decisions.
type Info uint8

// The infos of the protocol.
const (
	InfoRateLimiter Info = iota
	InfoConcurrencyLimiter
	InfoQuotaScheduler
	InfoConcurrencyScheduler
	InfoLoadScheduler
	InfoSampler
	Infos // how many there are
)

// A Settler ends the decisions that it made about flows.
type Settler interface {
	// Settle ends the decision d, which did not drop the flow: what d took or holds goes back, as far as the outcome
	// says, and tokens that d took by a label are corrected by the flow's cost. It reports whether anything that was not
	// used, or a slot, went back. A second call gives back nothing. It does not fail because ctx was canceled. A component that has
	// its state outside the process counts what it could not give back: neither the flow nor its caller could do more.
	Settle(ctx context.Context, d *LimiterDecision, o Outcome) bool
}

// A Settling is a decision that is to be settled, and what the component that made it says then; see [Settler].
type Settling struct {
	By       Settler
	Decision *LimiterDecision
	Outcome  Outcome
	Done     bool
}

// An Outcome is what became of a flow.
type Outcome struct {
	Ended Ended

	// Costs are what the flow has cost, by label, as far as that is known; they are closed. What is not known, and what a flow
	// that ended unused has cost, changes nothing.
	Costs *Cost

	// Labels are the flow's. Schedulers charge its share in the queue by them. Nil charges no share.
	Labels *Labels

	// Waited is how long the flow has waited in queues since its check began.
	Waited time.Duration

	// Took is how long the work took, if the client says so; 0 if the flow ends just now.
	Took time.Duration
}

// Failed reports whether the flow ran, and ended as an error.
func (o Outcome) Failed() bool { return o.Ended.Failed() }

// Ended is how a flow ended.
type Ended uint8

// How flows end.
const (
	EndedUnused Ended = iota // it did not run: another component rejected it, its caller has gone, or a pause of its upstream began
	EndedOK
	EndedFailed
	EndedUnknown // it ran, with an unknown result: its caller canceled it, or a cache had its result
	EndedGone    // it failed after its caller had canceled it, which says nothing about the work either
)

// Failed reports whether the flow ran, and ended as an error.
func (e Ended) Failed() bool { return e == EndedFailed || e == EndedGone }

// Told reports whether the end says how the work went.
func (e Ended) Told() bool { return e == EndedOK || e == EndedFailed }

// Component identifies a limiter or scheduler outside the engine.
type Component struct {
	Policy string
	Hash   string // of the component as the engine read it
	ID     string
	Info   Info

	// Slots reports whether flows hold slots of the component until they end.
	Slots bool

	// Outcomes reports whether the component decides by how flows end. Over the network, sessions say it, else the clients' telemetry.
	Outcomes bool

	// Reason is why the component rejects flows; ReasonNone if it is the reason of its stage.
	Reason Reason

	// LabelKey is the label that has a bucket for each value; "" if one bucket is for all flows.
	LabelKey string

	// TokensLabel is the label that says how many tokens a flow takes, by which the component corrects what it took when the
	// flow's cost is known; "" where it corrects nothing, as slots are not corrected.
	TokensLabel string

	// DeniedStatus is the configured HTTP status of a rejection; 0: by reason.
	DeniedStatus int

	// Capacity is the most tokens that a bucket holds, or the slots that there are, unless a value has numbers of its own.
	Capacity float64

	// DryRun marks a component in dry run: flows that it drops pass.
	DryRun bool

	// Workload returns the workload of a scheduler that a flow belongs to, and its priority there; nil for limiters.
	// Decisions leave it out because it is rarely needed.
	Workload func(*Labels) (label string, priority float64)

	// Settler is the component at work in an engine; nil for a component of another agent.
	Settler Settler
}

// LimiterDecision is what one component made of a flow.
type LimiterDecision struct {
	Component *Component

	// Label is the value of the component's label. Together with Scope it says which bucket decided.
	Label string

	// Remaining is how many tokens of the component's capacity are free; below 0 if more are in use. Consumed is how
	// many this flow took.
	Remaining, Consumed float64

	// Capacity is the most tokens that the bucket which decided holds, or its slots. It is the component's, unless the value has
	// numbers of its own.
	Capacity float64

	// held is the slot of a flow that was not dropped, see Hold, or the wait of one that was: no flow has both.
	held uint64

	Scope Scope
	Cause Cause

	// Dropped marks a decision that drops the flow, or would without a dry run.
	Dropped bool

	// Spilled marks a decision by the bucket that all label values without a bucket of their own share.
	Spilled bool

	// DryRun marks a decision in a dry run, the component's or the request's: the flow passes even if it is dropped.
	DryRun bool

	// Local marks a decision that the engine made in place of the store that has the limit, because the store did not answer.
	Local bool

	// Untaken marks a decision that let the flow pass and gave it nothing, because another component that was asked together
	// with this one dropped it.
	Untaken bool
}

// Passed reports whether the flow passes the component, in a dry run even if it is dropped.
func (d *LimiterDecision) Passed() bool { return !d.Dropped || d.DryRun }

// Hold notes what a flow that was not dropped holds until it ends; 0 for nothing. A component without slots notes what
// it needs to take back what was not used.
func (d *LimiterDecision) Hold(slot uint64) { d.held = slot }

// Slot identifies what the flow holds; 0 when it holds nothing.
func (d *LimiterDecision) Slot() uint64 {
	if d.Dropped {
		return 0
	}
	return d.held
}

// Drop drops the flow, which then holds nothing. It could pass after the wait; 0 means unknown.
func (d *LimiterDecision) Drop(wait time.Duration) { d.Dropped, d.held = true, uint64(wait) }

// Wait is how long until the flow could pass; 0 if it passed or if that is unknown.
func (d *LimiterDecision) Wait() time.Duration {
	if !d.Dropped {
		return 0
	}
	return time.Duration(d.held)
}

// Scope is which of a limiter's buckets decided.
type Scope uint8

// The scopes.
const (
	ScopeNone    Scope = iota // none: the flow lacks the limiter's label, or the limiter lets everything pass
	ScopeDefault              // the one for all flows
	ScopeLabel                // the one of the label's value
)

// Returns are what became of what a flow had when it ended.
type Returns struct {
	Held     int  // the concurrency slots that the flow held
	Returned int  // those that were still the flow's when it ended
	Settled  bool // there were costs, and the agent took them
}
