// Package agentapi is what a client and an agent say to each other in one process: a [Request], a [Verdict], and the
// [Agent] that turns one into the other. It speaks plain Go values; the wire's messages exist only in the remote agent
// and in the server that offers an engine to others.
package agentapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"net/netip"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.opentelemetry.io/otel/metric"
)

// ErrClosed is what an agent answers with after it was closed.
var ErrClosed = errors.New("closed")

// An Agent decides about flows. Its methods are safe for concurrent use.
type Agent interface {
	// Check fills v, which is zero, with the answer to req. An error means that nobody answered. The agent keeps
	// neither req nor v; both live in the flow and come back in End.
	Check(ctx context.Context, req *Request, v *Verdict) error

	// End ends a flow that Check answered: it gives back what the flow holds and reports how it went. It is called
	// once, and does not fail because ctx was canceled.
	End(ctx context.Context, req *Request, v *Verdict, failed bool) (Returns, error)

	// Store and Delete change one cache entry. A ttl of 0 is the agent's default.
	Store(ctx context.Context, key CacheKey, value []byte, ttl time.Duration) error
	Delete(ctx context.Context, key CacheKey) error

	// Ready waits until the agent can be asked, or ctx ends.
	Ready(ctx context.Context) error

	// Expect tells the agent how long the checks of a client may take; 0 or less is no limit. A check may still ask for
	// another time.
	Expect(timeout time.Duration)

	// Instrument shows what the agent knows of itself by the provider, until it is closed. Another call with the same
	// provider does nothing.
	Instrument(provider metric.MeterProvider) error
}

// A Reverter is an agent that can take back all that Check gave a flow, tokens and slots. Revert takes the place of End.
type Reverter interface {
	Revert(req *Request, v *Verdict)
}

// A Request is what a flow asks.
type Request struct {
	ControlPoint string
	Labels       Labels

	// Timeout is the longest that the answer may take, waits in queues included; 0 is no limit of its own. The
	// agent applies it, because a call within the process needs no timer.
	Timeout time.Duration
}

// Lookup names the cache entries to look up with the check; nil looks up none.
func (r *Request) Lookup() *Lookup {
	if r.Labels.Details == nil || !r.Labels.Details.Looks {
		return nil
	}
	return &r.Labels.Details.Lookup
}

// RampMode says whether the flow needs a ramp that lets it in.
func (r *Request) RampMode() bool { return r.Labels.Details != nil && r.Labels.Details.RampMode }

// Late says that too little time is left for the answer to be heard: limiters refuse, for what they gave nobody would
// give back.
func (r *Request) Late() bool { return r.Labels.Details != nil && r.Labels.Details.Late }

// DryRun reports whether the flow runs whatever the answer: no component has it wait, and it keeps what components give
// it although others drop it.
func (r *Request) DryRun() bool { return r.Labels.Details != nil && r.Labels.Details.DryRun }

// Crowded is closed when the flow is to end its waits a twentieth of its time before it has to; nil for never.
func (r *Request) Crowded() <-chan struct{} {
	if r.Labels.Details == nil {
		return nil
	}
	return r.Labels.Details.Crowded
}

// Labels are a flow's labels, in layers that are never merged unless somebody asks: the embedded engine looks up one or
// two keys, so a merged map would be the dearest part of a check. Nobody writes to the maps.
type Labels struct {
	Params  map[string]string
	Context map[string]string
	Details *RequestDetails
}

// RequestDetails are what most flows of a client have in common; one that differs has details of its own. Not all of it is labels:
// each word here is one that no flow has to make room for.
type RequestDetails struct {
	Baggage   map[string]string
	Transport map[string]string
	Defaults  map[string]string

	// HTTP is the request that the flow is about, for an agent that makes labels of it itself; it stands in for
	// Transport. Nil: the labels are all there is.
	HTTP *HTTPRequest

	// Service names the client's service, for selectors.
	Service string

	// Crowded is closed when so many checks are under way that the flow is to end its waits earlier. Nil means never.
	Crowded <-chan struct{}

	// For the request's methods of these names; the lookup if Looks.
	Lookup                        Lookup
	Looks, RampMode, Late, DryRun bool
}

// Lookup finds a label; the layer with the highest precedence wins.
func (l *Labels) Lookup(key string) (string, bool) {
	if v, ok := l.Params[key]; ok {
		return v, true
	}
	if v, ok := l.Context[key]; ok {
		return v, true
	}
	if l.Details == nil {
		return "", false
	}
	if v, ok := l.Details.Baggage[key]; ok {
		return v, true
	}
	if v, ok := l.Details.Transport[key]; ok {
		return v, true
	}
	v, ok := l.Details.Defaults[key]
	return v, ok
}

// Service names the client's service; "" when it has none.
func (l *Labels) Service() string {
	if l.Details == nil {
		return ""
	}
	return l.Details.Service
}

// HTTP is the request that the agent is to make labels of; nil when there is none.
func (l *Labels) HTTP() *HTTPRequest {
	if l.Details == nil {
		return nil
	}
	return l.Details.HTTP
}

// Merged gives all labels as one map, which the caller must not change: it is one of the layers where the others are
// empty.
func (l *Labels) Merged() map[string]string {
	var layers [5]map[string]string
	n, size := 0, 0
	add := func(m map[string]string) {
		if len(m) > 0 {
			layers[n] = m
			n++
			size += len(m)
		}
	}
	if l.Details != nil {
		add(l.Details.Defaults)
		add(l.Details.Transport)
		add(l.Details.Baggage)
	}
	add(l.Context)
	add(l.Params)
	if n <= 1 {
		return layers[0]
	}
	merged := make(map[string]string, size)
	for _, m := range layers[:n] {
		maps.Copy(merged, m)
	}
	return merged
}

// HTTPRequest is an HTTP request as an agent is told of it: all text is valid UTF-8, and within the bounds of labels.
type HTTPRequest struct {
	Method, Path, Host, Scheme, Protocol string

	Size                int64             // of the body in bytes; negative when unknown
	Headers             map[string]string // by names in lower case, without those that carry credentials
	Source, Destination netip.AddrPort    // zero when unknown

	// Own is the baggage header that the request came with. The one in Headers carries the flow's labels.
	Own string
}

// Lookup is the cache entries that a check looks up.
type Lookup struct {
	Result string   // "" looks up none
	Global []string // empty ones are skipped

	// Room takes room for a value of so many bytes in the answer, and reports whether there was any. The result's value
	// goes first. A value that does not fit is a miss, and the others are the cache's own, which nobody may change. Nil is
	// room for any, and the values are copies.
	Room func(size int) bool
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
)

// Cause is what came between a flow and its tokens. Only agents of Headgate tell it.
type Cause uint8

// The causes, numbered as on the wire.
const (
	CauseNone      Cause = iota // none but the reason
	CauseLate                   // too little time was left for the answer to be heard
	CauseQueueFull              // as many wait as may
	CauseLongQueue              // the wait would have been longer than the flow had time
	CauseTimeout                // it waited for as long as it could
	CauseClosed                 // the engine was closed while the flow waited
	CauseLongLabel              // a label's value is too long for a component to go by
	Causes                      // how many there are
)

// String gives the cause in words; "" for none.
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
		return "engine closed"
	case CauseLongLabel:
		return "label too long"
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

// VerdictDetails hold the parts of a verdict that flows in a hurry do without.
type VerdictDetails struct {
	err       atomic.Pointer[error] // why the flow was not accepted
	rejection Rejection

	Decisions []LimiterDecision // after the first
	Waited    time.Duration     // in queues
	Result    CacheAnswer
	Global    map[string]CacheAnswer

	// Wire is what the remote agent keeps of its answer.
	Wire any
}

// More gives v.Details, which it makes where there is none.
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
	rejected bool // it is one

	// RetryAfter is how long until a retry can succeed; 0 when unknown.
	RetryAfter time.Duration

	// NoReturns tells why RetryAfter is 0: a flow may be admitted, but no slot has come back yet to tell when. It does
	// not travel.
	NoReturns bool

	// By is the component that rejected the flow; nil for none in particular.
	By *Component
}

// Reject turns the verdict into the rejection.
func (v *Verdict) Reject(r Rejection) {
	r.rejected = true
	v.More().rejection = r
}

// Fail notes the flow's error, unless one is noted already, and returns the noted one. It is the client's: an agent
// returns its error. For a verdict that is a rejection it is safe for concurrent use.
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

// Rejected says whether the flow was rejected.
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
	d.Component = c
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

// At gives decision i of Len.
func (v *Verdict) At(i int) *LimiterDecision {
	if i == 0 {
		return &v.first
	}
	return &v.Details.Decisions[i-1]
}

// Kind is what sort of component decided.
type Kind uint8

// The kinds of components.
const (
	KindRateLimiter Kind = iota + 1
	KindConcurrencyLimiter
	KindQuotaScheduler
	KindConcurrencyScheduler
	KindSampler
	KindRampSampler // one that flows in ramp mode need
	KindLoadScheduler
)

// Component identifies a limiter or scheduler to those outside the engine.
type Component struct {
	Policy string
	Hash   string // of the component as the engine read it
	ID     string
	Kind   Kind

	// LabelKey is the label that the limiter has a bucket for each value of; "" when it has one for all.
	LabelKey string

	// DeniedStatus is the configured HTTP status of a rejection; 0: by reason.
	DeniedStatus int

	// Capacity is the most tokens that a bucket holds, or the slots that there are.
	Capacity float64

	// DryRun marks a component in dry run: flows that it drops pass.
	DryRun bool

	// Workload says which workload of a scheduler a flow belongs to, and its priority there; nil for limiters. Decisions
	// leave it out because hardly anybody asks.
	Workload func(*Labels) (label string, priority float64)

	// Limiter is the engine's own.
	Limiter any
}

// LimiterDecision is what one component made of a flow.
type LimiterDecision struct {
	Component *Component

	// Label is the value of the component's label. Together with Found it says which bucket decided.
	Label string

	// Remaining is the tokens that are free, of the component's capacity: below 0 where more are in use. Consumed is
	// those that this flow took.
	Remaining, Consumed float64

	// held is the slot of a flow that was not dropped, and the wait of one that was: none has both.
	held uint64

	Scope Scope
	Cause Cause

	// Dropped marks a decision that drops the flow, or would without a dry run.
	Dropped bool

	// Spilled says that the label's value had no bucket of its own, and the one that all such values share decided.
	Spilled bool

	// DryRun marks a decision in a dry run, the component's or the request's: the flow passes if it is dropped too.
	DryRun bool
}

// Passed reports whether the component let the flow pass, be it by a dry run.
func (d *LimiterDecision) Passed() bool { return !d.Dropped || d.DryRun }

// Hold notes what the flow holds until it ends; 0 for nothing. It was not dropped.
func (d *LimiterDecision) Hold(slot uint64) { d.held = slot }

// Slot identifies what the flow holds; 0 when it holds nothing.
func (d *LimiterDecision) Slot() uint64 {
	if d.Dropped {
		return 0
	}
	return d.held
}

// Drop drops the flow, which could pass after the wait; 0 when nobody knows.
func (d *LimiterDecision) Drop(wait time.Duration) { d.Dropped, d.held = true, uint64(wait) }

// Wait is how long until the flow could pass; 0 when it did or when nobody knows.
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

// Returns counts the concurrency slots of a flow that ended.
type Returns struct {
	Held     int // what the flow held
	Returned int // what was still the flow's when it ended
}

// ShortValue is the value of a label if it has at most so many bytes, and otherwise a name of that length for it: its
// beginning and 128 bits of its SHA-256. At least 48 bytes are room for one.
func ShortValue(value string, most int) string {
	if len(value) <= most {
		return value
	}
	sum := sha256.Sum256([]byte(value))
	code := "#" + hex.EncodeToString(sum[:16])
	n := most - len(code)
	for n > 0 && !utf8.RuneStart(value[n]) {
		n--
	}
	return value[:n] + code
}

// DryRunKey is for a bool in a flow's context. It is true when no limit is in force for the flow: its client is nil or in
// dry run.
type DryRunKey struct{}

// PausesKey is for the [Pauses] of a flow's client, in the flow's context. A nil client has none.
type PausesKey struct{}

// Pauses shows, for a client, the pauses of package httpguard's Transports. It is safe for concurrent use.
type Pauses interface {
	// Began notes that an upstream asked for a pause of the given length, at a control point and with an HTTP status.
	Began(ctx context.Context, controlPoint string, status int, pause time.Duration)

	// Refused notes that a request was not sent because of a pause, which has the given time left.
	Refused(ctx context.Context, controlPoint string, left time.Duration)
}

// UnusedKey is for the [Unused] of a flow, in the flow's context.
type UnusedKey struct{}

// Unused ends a flow that was let in and did not run after all. EndUnused is the flow's End, and gives back what the flow
// was given, tokens too, as far as the agent can be told.
type Unused interface {
	EndUnused(ctx context.Context)
}
