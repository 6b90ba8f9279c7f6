package headgate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/canceled"
	"github.com/headgate-go/headgate/internal/flight"
	"github.com/headgate-go/headgate/internal/flowinfo"
)

// CachePolicy says how [Cached] and [CachedFunc] keep results. The zero value is right for most.
type CachePolicy[T any] struct {
	// TTL is how long a result is stored. Zero is the agent's default, 7 days. An engine keeps no value for longer than
	// that. If TTL is negative, nothing is stored; calls still share runs.
	TTL time.Duration

	// Codec turns results into the bytes that are stored, and back. Nil means JSON. The bytes do not say what T is, so a key
	// must not be used for two types: see [Cached].
	Codec Codec[T]

	// Exact stores results without a test. Set it for a Codec that gives back every T that it encodes, and for types
	// that JSON gives back. By default each new result is decoded again, and it is stored only if that gives the same
	// value.
	Exact bool

	// LastGood is the number of keys for which [CachedFunc] keeps the last result for onReject. If there are more,
	// those that were found or made longest ago go first. Zero means 256. If LastGood is negative, none is kept.
	// [Cached] has one key, and keeps its result unless LastGood is negative.
	LastGood int
}

// defaultLastGood is what a LastGood of 0 means.
const defaultLastGood = 256

// Cached is [Guard] for a function whose result can be used again. A call looks up params.ResultCacheKey in the control
// point's result cache. If it finds a result, it returns the result and does not run fn. Otherwise it runs fn, and
// stores what fn returned, unless that was an error. Without a key the control point is the key. Two cached functions
// at one control point need a key each, or each returns what the other one stored. [CachedFunc] is for a function whose
// argument decides the key.
//
// Calls at the same time share one run, which is one flow. A call first looks for a run under its key. If there is one,
// the call waits for it and starts no flow of its own: no agent is asked about the call, and its labels are not
// checked. So the key must include everything that decides who may have a result. Only the call's context bounds the
// wait.
//
// If there is no run, the call starts the flow of a new one. Calls that come while that flow waits in a queue share its
// decision. If the flow does not run, each call applies its own onReject, with three exceptions. If the flow ended
// Canceled or Invalid, one of the calls asks again. If the flow was rejected because it had too little time, a call asks
// again that has a later deadline, or may wait for longer by its MaxWait or CheckTimeout. If the flow was Unreachable, a
// call asks again that fails open.
//
// If the client or its engine is closed while a call waits, the call does not run when it asks again. It is rejected with
// [flowctl.CauseClosed]. If the first call was rejected and no agent answers when another call asks again, that rejection
// is the other call's too, as with [Retrying]. This holds even if the rejection came after the first call had given up.
//
// Calls share a run if the client, the control point, the key and T are the same. The function need not be the same, so
// a cached function can be made for each request: all calls get what the function that began the run returns. Without a
// client, only the calls of one function share runs. The same holds for a [Starter] that is no client, embeds none, and
// was not made by [Retrying] from one.
//
// A run does not belong to the call that began it. It has the values of that call's context, but neither its
// cancellation nor its deadline. It is canceled when the last call that waits for it has given up. A call that gives up
// returns its context's error. The run's flow ends with the run. A call whose context has ended before it begins is a
// call of [Guard], which still runs in a dry run and without a client. In a dry run of the client this also holds for a
// call whose context ends while it waits for an agent.
//
// A call from within a run waits only for runs that began inside that run, so that runs never wait for each other. If
// any other run is under way for its key, the call begins a run of its own. So one inner key may run once in each outer
// run, and is stored each time.
//
// If fn or a codec of yours panics, or calls runtime.Goexit, the panic or Goexit continues in the call that began the run, or in another
// one if that call has given up. The other calls get an error. The panic keeps its value. Its stack is that of the call; a
// program that ends by the panic prints fn's too. If all calls have given up, a panic of fn ends the program, like a panic in a
// goroutine that fn starts.
//
// A value is stored only if decoding gives it back, see CachePolicy.Exact. JSON loses bytes that are not UTF-8,
// unexported fields, and the types of numbers in an any, for example. With omitempty it turns an empty slice into a nil
// one, which is another value. Values are compared as reflect.DeepEqual does, with these exceptions. Times, also those of
// types that are defined as time.Time, are compared by [time.Time.Equal], in unexported fields and in keys of maps too.
// Protobuf messages are compared by proto.Equal. For them use a Codec that calls proto.Marshal and proto.Unmarshal. NaN
// equals NaN, but a map with NaN as a key equals none. A value is not stored if more than 30,000 pointers, interfaces,
// slices and maps are nested in it. The client logs results that are not stored, once a minute at most, by type and not
// by value. A failure of the cache is never the call's error. A cached value that cannot be decoded counts as none.
//
// The key must also stand for the type of the result. Results are stored without their type, so a function with another T and the
// same key finds them, and so does another release of the program. JSON leaves fields that it does not find at zero. If T
// changes, change the key with it, for example from "v1" to "v2".
//
// An agent gives no value with a rejection, and forgets what has expired. So a cached function keeps the last result
// that a call of it found or made, for onReject: fallback.Stale returns it until a grace period after it has expired.
// Make such a function once, and call it often. A result that the process stored itself expires when the TTL has
// passed. Of any other result the process knows only when it was last found or made, and the grace period counts from
// then. With a nil onReject nothing is kept.
//
// The cached function is safe for concurrent use if fn, onReject and the codec are. Several callers may get the same
// value, of a shared run or a stale one, so none of them may change what it points to.
func Cached[T any](client Starter, controlPoint string, params flowctl.Params,
	fn func(context.Context) (T, error), onReject fallback.Func[T], policy CachePolicy[T],
) func(context.Context) (T, error) {
	if params.ResultCacheKey == "" {
		params.ResultCacheKey = controlPoint
	}
	params = params.Clone()
	keys := 0
	if onReject != nil && policy.LastGood >= 0 {
		keys = 1
	}
	c := newCache(client, controlPoint, policy, keys)
	return func(ctx context.Context) (T, error) {
		return c.call(ctx, &params, fn, onReject)
	}
}

// CachedFunc is [Cached] for a function with an argument, as [GuardFunc] is for [Guard]. params makes the flow's
// parameters from the argument, and their ResultCacheKey names the result. The key must include everything that the
// result depends on, such as the user. A call with an empty key is a call of [GuardFunc]: its result is neither stored,
// nor shared, nor kept. So is every call if params is nil.
//
// params is called for each call. The maps that it returns must not change afterwards, because the run may go on after
// the call has given up. The last results are kept by key, for as many keys as policy.LastGood says. Use fallback.For
// to pass a fallback.Func as onReject. The cached function is safe for concurrent use if params, fn, onReject and the
// codec are.
func CachedFunc[A, T any](client Starter, controlPoint string, params func(context.Context, A) flowctl.Params,
	fn func(context.Context, A) (T, error), onReject func(context.Context, A, error) (T, error), policy CachePolicy[T],
) func(context.Context, A) (T, error) {
	keys := 0
	if onReject != nil && policy.LastGood >= 0 {
		keys = cmp.Or(policy.LastGood, defaultLastGood)
	}
	c := newCache(client, controlPoint, policy, keys)
	return func(ctx context.Context, arg A) (T, error) {
		var p flowctl.Params
		if params != nil {
			p = params(ctx, arg)
		}
		work := func(ctx context.Context) (T, error) { return fn(ctx, arg) }
		var reject func(context.Context, error) (T, error)
		if onReject != nil {
			reject = func(ctx context.Context, err error) (T, error) { return onReject(ctx, arg, err) }
		}
		return c.call(ctx, &p, work, reject)
	}
}

// defaultTTL is how long an agent keeps values unless its caller says otherwise.
const defaultTTL = 7 * 24 * time.Hour

// A cache is what the calls of one cached function have in common.
type cache[T any] struct {
	client       Starter
	controlPoint string
	runs         *flight.Runs // the client's; this function's own if the client has none
	policy       CachePolicy[T]
	kept         lastResults[T]
}

func newCache[T any](client Starter, controlPoint string, policy CachePolicy[T], keys int) *cache[T] {
	if policy.Codec == nil {
		policy.Codec = jsonCodec[T]{}
	}
	c := &cache[T]{client: starter(client), controlPoint: controlPoint, policy: policy}
	c.kept.max = keys
	if isOff(c.client) {
		c.policy.TTL = -1 // there is no cache
	}
	if c.runs = runsOf(c.client); c.runs == nil {
		c.runs = new(flight.Runs)
	}
	return c
}

// runsOf finds the runs that cached functions share with one client. It returns nil if the Starter has none.
func runsOf(client Starter) *flight.Runs {
	if c, ok := client.(interface{ Runs() *flight.Runs }); ok {
		return c.Runs()
	}
	return nil
}

// An outcome is how a run ended: with a result, or with a flow that did not run.
type outcome[T any] struct {
	value T
	err   error
	by    *cache[T] // the function that began the run, which has kept the value

	// Of a value.
	seen   time.Time // when it was found or made
	stored *expiry   // nil if it was found

	// decision is that of a flow that did not run; else zero.
	decision flowctl.Decision

	// deadline is the first call's, if a call with a later one asks again; else zero.
	deadline time.Time

	// asked is the first call's flow, if a call that may wait for longer than wait asks again; else nil.
	asked flowinfo.Info
	wait  time.Duration

	// rejection is how a limit rejected the call that led, although its flow may have ended otherwise after that; nil if
	// none did.
	rejection error

	// held is what kept a flow from running that no agent had decided about; else zero.
	held hold
}

// A hold is why a call that was held back may not run, if no agent decides about it when it asks anew.
type hold uint8

const (
	heldByClose     hold = iota + 1 // it waited when its client or engine was closed
	heldByRejection                 // the flow that it waited for was rejected
)

// heldBack is what a call has met in the runs that it waited for, before it asks anew. The zero value is nothing.
type heldBack struct {
	waited    bool  // for a decision, when neither the client nor its engine was closed
	rejection error // of the flow that it waited for; nil for none
}

// rejects reports whether a call that asks anew may not run, and its error then.
func (h *heldBack) rejects(flow *flowctl.Flow) (hold, error) {
	if flow.Decision() != flowctl.Unreachable {
		return 0, nil
	}
	if info, ok := flowinfo.From(flow.Context()); ok && h.waited && errors.Is(flow.Err(), flowctl.ErrClosed) {
		return heldByClose, info.ClosedError()
	}
	if h.rejection != nil && flow.ShouldRun() {
		return heldByRejection, h.rejection
	}
	return 0, nil
}

// isBy reports whether the call is held back as another one was.
func (h *heldBack) isBy(other hold) bool {
	return other == heldByClose && h.waited || other == heldByRejection && h.rejection != nil
}

// expiry is when the result of a run expires; nil if it is not stored. All functions that share the run share it.
type expiry struct{ atomic.Pointer[time.Time] }

// call is one call of a cached function.
func (c *cache[T]) call(ctx context.Context, params *flowctl.Params,
	fn func(context.Context) (T, error), onReject func(context.Context, error) (T, error),
) (T, error) {
	key := params.ResultCacheKey
	if onReject != nil {
		given := onReject
		onReject = func(ctx context.Context, err error) (T, error) {
			return given(c.kept.in(ctx, key), err)
		}
	}
	if key == "" || ctx.Err() != nil { // it cannot wait for a run, but a dry run still runs it
		return guarded(ctx, c.client, c.controlPoint, *params, fn, onReject)
	}
	var held heldBack
	for {
		run, leads := flight.Join[outcome[T]](ctx, c.runs, c.controlPoint, key)
		var out outcome[T]
		var err error
		ended, open := false, false
		if leads {
			out, ended = c.lead(ctx, run, params, fn, held)
		} else {
			open = c.runs.Closed == nil || !c.runs.Closed()
		}
		if !ended {
			out, err = run.Wait(ctx, leads)
		}
		switch {
		case c.runs.DryRun && ctx.Err() != nil && (out.decision != 0 || errors.Is(err, flight.ErrLeft) && !run.Works()):
			return guarded(ctx, c.client, c.controlPoint, *params, fn, onReject) // its time has passed with waiting for an agent
		case errors.Is(err, flight.ErrLeft):
			return out.value, c.gaveUp(ctx)
		case err != nil:
			return out.value, fmt.Errorf("headgate: cached %q: %w", c.controlPoint, err)
		case out.decision == 0:
			if out.by != c && out.err == nil {
				c.kept.keep(key, out.value, out.seen, out.stored)
			}
			return out.value, out.err
		case !leads && out.asksAnew(ctx, params, held):
			if ctx.Err() != nil {
				return out.value, c.gaveUp(ctx)
			}
			out.holdsBack(&held, open)
			continue
		case onReject == nil || !offersFallback(out.decision):
			return out.value, out.err
		default:
			return onReject(ctx, out.err)
		}
	}
}

// asksAnew reports whether a call that waited for a flow that did not run starts another one, because the decision was
// about the call that led.
func (o *outcome[T]) asksAnew(ctx context.Context, params *flowctl.Params, held heldBack) bool {
	if o.held != 0 {
		return !held.isBy(o.held) // it may run although the call that led may not
	}
	switch o.decision {
	case flowctl.Canceled, flowctl.Invalid:
		return true
	case flowctl.Unreachable: // the parameters of the call that led kept it from running
		return !params.RampMode && params.OnUnreachable == flowctl.FailOpen
	default:
		deadline, ok := ctx.Deadline()
		return !o.deadline.IsZero() && (!ok || deadline.After(o.deadline)) ||
			o.asked != nil && o.asked.LongestWait(params.MaxWait, params.CheckTimeout) > o.wait
	}
}

// holdsBack notes what has held back a call that waited for the flow. open reports whether the client and its engine
// were open when the wait began.
func (o *outcome[T]) holdsBack(held *heldBack, open bool) {
	if open && (o.decision == flowctl.Canceled || o.decision == flowctl.Rejected) {
		held.waited = true
	}
	// Too little time is no limit.
	if r, ok := errors.AsType[*flowctl.RejectedError](o.rejection); ok && r.Cause() != flowctl.CauseLate {
		held.rejection = r
	}
}

// lead starts the flow of a run. If the flow runs and no result is found, it starts fn. It reports whether the run has
// ended.
func (c *cache[T]) lead(ctx context.Context, run *flight.Run[outcome[T]], params *flowctl.Params,
	fn func(context.Context) (T, error), held heldBack,
) (out outcome[T], ended bool) {
	defer run.Abort() // in case this panics
	flow, before := start(ctx, c.client, c.controlPoint, *params)
	if by, err := held.rejects(flow); err != nil {
		endUnused(ctx, flow)
		out = outcome[T]{err: err, decision: flowctl.Rejected, held: by}
		run.End(out)
		return out, true
	}
	if !flow.ShouldRun() {
		end(ctx, flow)
		out = outcome[T]{err: flow.Err(), decision: flow.Decision(), rejection: rejectionOf(flow, before)}
		if shortOfTime(ctx, c.client, flow, params.MaxWait) {
			out.deadline, _ = ctx.Deadline()
		}
		out.asked, out.wait = waited(c.client, flow, params)
		run.End(out)
		return out, true
	}
	found := time.Now()
	if v, ok := c.find(ctx, flow); ok {
		out = outcome[T]{value: v, by: c, seen: found}
		c.kept.keep(params.ResultCacheKey, v, out.seen, nil)
		run.End(out)
		return out, true
	}
	key := params.ResultCacheKey
	if c.runs.DryRun && ctx.Err() != nil { // a call that waits for the run would give up at once; others ask anew
		run.End(outcome[T]{err: c.gaveUp(ctx), decision: flowctl.Canceled})
		out, _ = c.work(flow.Context(), flow, key, fn)
		return out, true
	}
	run.Go(flow.Context(), func(ctx context.Context) (outcome[T], func()) { return c.work(ctx, flow, key, fn) })
	return out, false
}

// rejectionOf is how a limit rejected a flow that did not run, or the flow before it; nil if none did.
func rejectionOf(flow, before *flowctl.Flow) error {
	if flow.Decision() == flowctl.Rejected {
		return flow.Err()
	}
	if info, ok := flowinfo.From(flow.Context()); ok {
		if err := info.LateRejection(); err != nil {
			return err
		}
	}
	if before != nil {
		return before.Err()
	}
	return nil
}

// shortOfTime reports whether the flow was rejected because the call had too little time. Another call may have more.
func shortOfTime(ctx context.Context, client Starter, flow *flowctl.Flow, most time.Duration) bool {
	if info, ok := flowinfo.From(flow.Context()); ok && info.ShortOfTime() {
		return true
	}
	r, ok := client.(*retrier)
	return ok && r.shortOfTime(ctx, flow, most)
}

// waited returns how long the flow of a call could wait, if it was rejected because it could wait no longer, and what knows how
// long others may; else nil.
func waited(client Starter, flow *flowctl.Flow, params *flowctl.Params) (asked flowinfo.Info, wait time.Duration) {
	rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
	if !ok {
		return nil, 0
	}
	info, ok := flowinfo.From(flow.Context())
	if !ok {
		return nil, 0
	}
	switch cause := rejected.Cause(); {
	case cause == flowctl.CauseTimeout, cause == flowctl.CauseQueueTooLong, cause == flowctl.CauseLate,
		cause == flowctl.CauseNone && rejected.Reason == flowctl.ReasonNoTokens: // an agent that does not say
		return info, info.LongestWait(params.MaxWait, params.CheckTimeout)
	}
	// Of waits for a retry, only MaxWait is a bound.
	if _, retries := client.(*retrier); retries && rejected.RetryAfter() > 0 && params.MaxWait > 0 {
		return info, params.MaxWait
	}
	return nil, 0
}

// find decodes the result that came with the check. If it returns one, it ends the flow.
func (c *cache[T]) find(ctx context.Context, flow *flowctl.Flow) (v T, ok bool) {
	data, hit, _ := flow.ResultCache()
	if !hit {
		return v, false
	}
	decoded := false
	defer func() {
		switch {
		case !decoded: // the codec panicked, or called runtime.Goexit
			flow.SetStatus(flowctl.StatusError)
			end(ctx, flow)
		case ok:
			end(ctx, flow)
		}
	}()
	found, err := c.policy.Codec.Decode(data)
	decoded = true
	if err != nil {
		return v, false
	}
	return found, true
}

// work is what a run does. It runs fn as the flow, and returns the function that stores the result, or nil. Calls that
// come before the result is stored get it too. The flow has ended by then, so that a slow store holds no slot.
func (c *cache[T]) work(ctx context.Context, flow *flowctl.Flow, key string, fn func(context.Context) (T, error)) (out outcome[T], store func()) {
	var data []byte
	out = outcome[T]{by: c, stored: new(expiry)}
	out.value, out.err = run(ctx, flow, func(context.Context) (T, error) {
		v, err := fn(ctx)
		if err == nil && c.policy.TTL >= 0 && flow.Success() {
			data = c.encode(v)
		}
		return v, err
	})
	if out.err != nil {
		return out, nil
	}
	out.seen = time.Now()
	c.kept.keep(key, out.value, out.seen, out.stored)
	if data == nil {
		return out, nil
	}
	return out, func() {
		expires := time.Now().Add(cmp.Or(c.policy.TTL, defaultTTL))
		if err := flow.SetResultCache(context.WithoutCancel(ctx), data, c.policy.TTL); err != nil {
			c.unstored(err)
			return
		}
		out.stored.Store(&expires)
	}
}

// encode makes the bytes that are stored for a result; nil where it is not to be stored.
func (c *cache[T]) encode(v T) []byte {
	data, err := encode(c.policy.Codec, c.policy.Exact, v)
	if err != nil {
		c.unstored(err)
		return nil
	}
	return data
}

func (c *cache[T]) unstored(err error) {
	if c.runs.Unstored != nil {
		c.runs.Unstored(c.controlPoint, err)
	}
}

// gaveUp is the error of a call whose context ended while it waited.
func (c *cache[T]) gaveUp(ctx context.Context) error {
	return canceled.New("cached", c.controlPoint, ctx.Err(), context.Cause(ctx))
}

// lastResults are the last results of a cached function by key, for onReject.
type lastResults[T any] struct {
	max int // keys; 0 keeps none

	mu    sync.Mutex
	byKey map[string]*lastResult[T]
	ring  lastResult[T] // its next is the newest result, and its previous the oldest
}

// A lastResult is what was last found or made under a key.
type lastResult[T any] struct {
	key     string
	value   T
	seen    time.Time // when it was found or made
	expires time.Time // it does not expire before then
	stored  *expiry   // of the run that made it; may be later

	previous, next *lastResult[T]
}

// unlink takes the result out of its ring.
func (r *lastResult[T]) unlink() { r.previous.next, r.next.previous = r.next, r.previous }

// link puts the result into the ring, first.
func (r *lastResult[T]) link(ring *lastResult[T]) {
	r.previous, r.next = ring, ring.next
	r.previous.next, r.next.previous = r, r
}

// keep remembers a result that was seen at the given time, and does not expire before then. If a run made it, stored
// tells its expiry once it is stored, and what was known of older results no longer counts. A hit does not move expires
// back: it is the result that this process stored last, or one that was stored later and expires later.
func (l *lastResults[T]) keep(key string, v T, seen time.Time, stored *expiry) {
	if l.max == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	last, ok := l.byKey[key]
	if !ok {
		if l.byKey == nil {
			l.byKey = make(map[string]*lastResult[T])
			l.ring.previous, l.ring.next = &l.ring, &l.ring
		}
		if len(l.byKey) == l.max {
			oldest := l.ring.previous
			oldest.unlink()
			delete(l.byKey, oldest.key)
		}
		last = &lastResult[T]{key: key}
		last.link(&l.ring)
		l.byKey[key] = last
	}
	if !seen.Before(last.seen) {
		last.unlink()
		last.link(&l.ring)
		last.value, last.seen = v, seen
		if stored != nil {
			last.expires, last.stored = seen, stored
		}
	}
	if seen.After(last.expires) {
		last.expires = seen
	}
}

// in returns the context in which the fallback finds the result under the key. It hides a result of an outer context.
func (l *lastResults[T]) in(ctx context.Context, key string) context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	last, ok := l.byKey[key]
	if !ok {
		last = new(lastResult[T])
	}
	expires := last.expires
	if last.stored != nil {
		if at := last.stored.Load(); at != nil && at.After(expires) {
			expires = *at
		}
	}
	return fallback.WithLast(ctx, last.value, expires)
}
