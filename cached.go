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
	// TTL is how long a result is stored. Zero is the agent's default, 7 days, which is the longest that an engine keeps
	// a value. With a negative one nothing is stored; calls still share runs.
	TTL time.Duration

	// Codec turns results into the bytes that are stored, and back. Nil is JSON.
	Codec Codec[T]

	// Exact is for a Codec that gives back every T that it encodes, and for types that JSON gives back: then results are
	// stored as they are encoded. Otherwise a result is decoded again when it was made, and it is stored only if that
	// gives the same value.
	Exact bool

	// LastGood is for how many keys [CachedFunc] keeps the last result for onReject. Those that were found or made
	// longest ago go first. Zero means 256; with a negative one none is kept. [Cached] has one key, and keeps its result
	// unless LastGood is negative.
	LastGood int
}

// defaultLastGood is what a LastGood of 0 means.
const defaultLastGood = 256

// Cached is [Guard] for a function whose result can be used again: a call that finds one under params.ResultCacheKey in
// the control point's result cache returns it, and does not run fn. Without a key the control point is the key, so two
// cached functions at one control point need a key each, or each returns what the other one stored. [CachedFunc] is for
// a function whose argument decides the key.
//
// A call that finds no result runs fn, and stores what fn returned, unless that was an error.
//
// Calls at the same time share one run, which is one flow. A call first looks for a run under its key. If there is one,
// the call waits for it, and starts no flow of its own: no agent is asked about it, and its labels are not checked. What
// decides who may have a result must therefore be part of the key. Only its context bounds its wait. If there is none,
// the call starts the flow of a new run. Calls that come while that flow waits in a queue share what is decided about it.
// If it does not run, each of them applies its own onReject. One of them asks anew if the flow ended Canceled or Invalid,
// or if it was rejected because the first call's deadline was too near.
//
// Runs are shared by client, control point, key and T, and not by function: where the key is a request's, the cached
// function can be made for the request. Whichever function began the run, the others get what it returns. Without a
// client, and with a [Starter] that neither is a client nor embeds one nor is made by [Retrying] from one, only the calls
// of one function share runs.
//
// A run does not belong to the call that began it. It has the values of that call's context, but neither its cancellation
// nor its deadline, and it is canceled when the last call that waits for it has given up. A call that gives up returns
// its context's error. The run's flow ends with the run. A call whose context has ended before it begins is a call of
// [Guard]: it runs in a dry run and without a client.
//
// A call from within a run waits only for runs that were begun inside that run, so that runs never wait for each other.
// Where any other run is under way for its key, it begins a run of its own. One inner key may therefore run once in each
// outer run, and is stored each time.
//
// A panic of fn, or a Goexit, reaches the call that began the run, or if that has given up one of the others; the rest
// get an error. So does one of the codec. The panic's value is the same there. Its stack is that of the call; a program
// that ends by the panic prints fn's too. When all calls have given up, a panic of fn ends the program, like one in any
// goroutine of fn's own.
//
// A value is stored only if decoding gives it back, see CachePolicy.Exact. JSON loses bytes that are not UTF-8,
// unexported fields, and the types of numbers in an any, for example. Values are compared as reflect.DeepEqual does, but
// times by [time.Time.Equal]. A nil slice is not an empty one: with omitempty, JSON does not give an empty one back. The
// client logs results that are not stored, once a minute at most, by type and not by value. What goes wrong with the
// cache is never the call's error, and a value in it that cannot be decoded counts as none.
//
// An agent gives no value with a rejection, and forgets what has expired. So a cached function keeps the last result that
// a call of it found or made, for onReject: fallback.Stale returns it until a grace period after it has expired. That is
// for functions which are made once and called often. A result that the process stored itself expires when the TTL has
// passed. Of any other it only knows that it was good when it was last found or made, and the grace period counts from
// then. With a nil onReject nothing is kept.
//
// The cached function is safe for concurrent use if fn, onReject and the codec are. Callers may get one value together,
// of a shared run or a stale one: none of them may change what it points to.
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

// CachedFunc is [Cached] for a function with an argument, as [GuardFunc] is for [Guard]: params makes the flow's
// parameters from the argument, and their ResultCacheKey names the result. Everything that the result depends on must be
// in the key, also whose it is. A call whose key is empty is a call of [GuardFunc]: its result is neither stored, nor
// shared, nor kept. So is every call where params is nil.
//
// params is called for each call. The maps of what it returns must not change afterwards, because the run may go on when
// the call has given up. The last results are kept by key, for as many keys as policy.LastGood says. Use fallback.For to
// pass a fallback.Func as onReject. The cached function is safe for concurrent use if params, fn, onReject and the codec
// are.
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
	runs         *flight.Runs // the client's, or if it has none of this function alone
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

// runsOf finds the runs that cached functions share with one client; nil where a Starter has none.
func runsOf(client Starter) *flight.Runs {
	if c, ok := client.(interface{ Runs() *flight.Runs }); ok {
		return c.Runs()
	}
	return nil
}

// An outcome is what a run came to: a result, or a flow that did not run.
type outcome[T any] struct {
	value T
	err   error
	by    *cache[T] // whose call it was, and so who has kept the value

	// For a value: when it was found or made, and for one that was made when it expires.
	seen   time.Time
	stored *expiry

	// For a flow that did not run, whose error is err; zero for all others.
	decision flowctl.Decision

	// deadline is the first call's where a call with a later one is to ask anew; else zero.
	deadline time.Time
}

// expiry is when the result of a run expires, if it has been stored. Functions that share the run have it in common, and
// nothing else of each other.
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
	if key == "" || ctx.Err() != nil { // it could not wait for a run; a dry run runs it all the same
		return guarded(ctx, c.client, c.controlPoint, *params, fn, onReject)
	}
	for {
		run, leads := flight.Join[outcome[T]](ctx, c.runs, c.controlPoint, key)
		var out outcome[T]
		var err error
		ended := false
		if leads {
			out, ended = c.lead(ctx, run, params, fn)
		}
		if !ended {
			out, err = run.Wait(ctx, leads)
		}
		switch {
		case errors.Is(err, flight.ErrLeft):
			return out.value, c.gaveUp(ctx)
		case err != nil:
			return out.value, fmt.Errorf("headgate: cached %q: %w", c.controlPoint, err)
		case out.decision == 0:
			if out.by != c && out.err == nil {
				c.kept.keep(key, out.value, out.seen, out.stored)
			}
			return out.value, out.err
		case !leads && out.asksAnew(ctx, params):
			if ctx.Err() != nil {
				return out.value, c.gaveUp(ctx)
			}
			continue
		case onReject == nil || !offersFallback(out.decision):
			return out.value, out.err
		default:
			return onReject(ctx, out.err)
		}
	}
}

// asksAnew reports whether a call that waited for a flow that did not run starts another: what was decided was about the
// call that led, and not about this one.
func (o *outcome[T]) asksAnew(ctx context.Context, params *flowctl.Params) bool {
	switch o.decision {
	case flowctl.Canceled, flowctl.Invalid:
		return true
	case flowctl.Unreachable: // by the parameters of the call that led
		return !params.RampMode && params.OnUnreachable == flowctl.FailOpen
	default:
		deadline, ok := ctx.Deadline()
		return !o.deadline.IsZero() && (!ok || deadline.After(o.deadline))
	}
}

// lead starts the flow of a run, and has fn run where that is wanted. It reports whether the run has ended.
func (c *cache[T]) lead(ctx context.Context, run *flight.Run[outcome[T]], params *flowctl.Params,
	fn func(context.Context) (T, error),
) (out outcome[T], ended bool) {
	defer run.Abort() // in case this panics
	flow := c.client.Start(ctx, c.controlPoint, *params)
	if !flow.ShouldRun() {
		end(ctx, flow)
		out = outcome[T]{err: flow.Err(), decision: flow.Decision()}
		if shortOfTime(ctx, c.client, flow) {
			out.deadline, _ = ctx.Deadline()
		}
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
	run.Go(flow.Context(), func(ctx context.Context) (outcome[T], func()) { return c.work(ctx, flow, key, fn) })
	return out, false
}

// shortOfTime reports whether the flow was rejected for want of time, which another call may have.
func shortOfTime(ctx context.Context, client Starter, flow *flowctl.Flow) bool {
	if info, ok := flowinfo.From(flow.Context()); ok && info.ShortOfTime() {
		return true
	}
	r, ok := client.(*retrier)
	return ok && r.shortOfTime(ctx, flow)
}

// find decodes the result that came with the check. Where there is one, it ends the flow.
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

// work is what a run does: it runs fn as the flow, and gives back the function that stores the result, if it is to be
// stored. Calls that come until then get it too. The flow has ended by then, so that a slow store holds no slot.
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
	ring  lastResult[T] // its next is the one that was found or made last, and its previous the one longest ago
}

// A lastResult is what was last found or made under a key.
type lastResult[T any] struct {
	key     string
	value   T
	seen    time.Time // when it was found or made
	expires time.Time // before then it does not expire
	stored  *expiry   // nor before then

	previous, next *lastResult[T]
}

// unlink takes the result out of its ring.
func (r *lastResult[T]) unlink() { r.previous.next, r.next.previous = r.next, r.previous }

// link puts the result into the ring, first.
func (r *lastResult[T]) link(ring *lastResult[T]) {
	r.previous, r.next = ring, ring.next
	r.previous.next, r.next.previous = r, r
}

// keep remembers a result that was seen at a time, and does not expire before then. Where a run made it, it may have been
// stored since, or may yet be, and what is known of those before says nothing. A hit does not move expires back: if it is
// not what this process stored last, it was stored after that, and expires later.
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

// in is the context in which the fallback finds the result under the key. One that a context further out has is not it.
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
