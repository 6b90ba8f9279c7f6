package headgate

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/canceled"
	"github.com/headgate-go/headgate/internal/seam"
)

// A Codec turns values into bytes for a cache, and back. It must be safe for concurrent use.
type Codec[T any] interface {
	Encode(v T) ([]byte, error)
	Decode(data []byte) (T, error)
}

// Cached is [Guard] for a function whose result can be used again: a call that finds one under params.ResultCacheKey in
// the control point's result cache returns it, and does not run fn. Without a key the control point is the key, so two
// cached functions at one control point need a key each, or each returns what the other one stored.
//
// A call that finds none runs fn, and stores what fn returned for the ttl (0: the agent's default, 7 days, which is the
// longest that an engine keeps a value; with a negative one nothing is stored) unless that was an error. Calls at the
// same time share one run, each with a flow of its own. The run does not belong to the call that began it: it has that
// call's context without its cancellation and deadline, and it is canceled when the last call that waits for it has
// given up. A call that gives up returns its context's error.
//
// What is shared is by client, control point, key and T, and not by function: where the key is a request's, make the
// cached function for the request. Whichever function began the run, the others get what it returns. With a nil client
// only the calls of one function share. A call from within a run does not wait for one that waits for it, nor for one of
// another client that was begun elsewhere: it runs fn alone then, and stores nothing.
//
// A panic of fn, or a Goexit, reaches the call that began the run, or if that has given up one of the others; the rest
// get an error. The panic's value is the same there. Its stack is that of the call; a program that ends by the panic
// prints fn's too. When all calls have given up, a panic of fn ends the program, like one in any goroutine of fn's own.
//
// An agent gives no value with a rejection, and forgets what has expired. So a cached function keeps the last result that
// a call of it found or made, for onReject: fallback.Stale returns it until a grace period after it has expired. That is
// for functions which are made once and called often. A result that the process stored itself expires when the ttl has
// passed. Of any other it only knows that it was good when it was last found or made, and the grace period counts from
// then. With a nil onReject nothing is kept.
//
// What goes wrong with the cache is never the call's error: a value that cannot be decoded is a miss, and one that cannot
// be stored is not stored. A nil codec is JSON. The cached function is safe for concurrent use if fn, onReject and codec
// are. Callers may get one value together, of a shared run or a stale one: nobody may change what it points to.
func Cached[T any](client Starter, controlPoint string, params flowctl.Params, ttl time.Duration,
	fn func(context.Context) (T, error), onReject fallback.Func[T], codec Codec[T],
) func(context.Context) (T, error) {
	if params.ResultCacheKey == "" {
		params.ResultCacheKey = controlPoint
	}
	if codec == nil {
		codec = jsonCodec[T]{}
	}
	shared := &shared[T]{key: runKey[T]{controlPoint, params.ResultCacheKey}, ttl: ttl, fn: fn, codec: codec}
	if onReject != nil {
		shared.keeps = true
		given := onReject
		onReject = func(ctx context.Context, err error) (T, error) {
			return given(shared.withLast(ctx), err)
		}
	}
	return Guard(client, controlPoint, params, shared.call, onReject)
}

// defaultTTL is how long an agent keeps values unless it is told.
const defaultTTL = 7 * 24 * time.Hour

// jsonCodec is the codec that nil stands for.
type jsonCodec[T any] struct{}

func (jsonCodec[T]) Encode(v T) ([]byte, error) { return json.Marshal(v) }

func (jsonCodec[T]) Decode(data []byte) (v T, err error) {
	err = json.Unmarshal(data, &v)
	return v, err
}

// shared is what the calls of one cached function have in common. golang.org/x/sync/singleflight does not fit: it cannot
// tell when the last caller has left, and a panic of a run that callers wait for on a channel ends the process.
type shared[T any] struct {
	key   runKey[T]
	ttl   time.Duration
	fn    func(context.Context) (T, error)
	codec Codec[T]
	runs  seam.Runs // of calls without a client
	keeps bool      // the last result, for onReject

	mu      sync.Mutex
	last    T         // the last result that was found or made
	seen    time.Time // when it was
	expires time.Time // before then last does not expire; zero: there is none
	stored  *expiry   // nor before then
}

// expiry is when the result of a run expires, if it has been stored. Functions that share the run have it in common, and
// nothing else of each other.
type expiry struct{ atomic.Pointer[time.Time] }

// runKey is what calls have in common that share a run: they look for the same result, of one type, with one client.
type runKey[T any] struct{ controlPoint, key string }

// sharedRun is one run of the function. Its results are written before done is closed, and not after. It is closed under
// runs.Mu, so that whoever waits then is told how the run ended.
type sharedRun[T any] struct {
	of     *shared[T]
	cancel context.CancelFunc
	done   chan struct{}
	value  T
	data   []byte // value, for the cache; nil when there is nothing to store
	err    error
	how    ending
	panic  any
	stack  []byte // of the panic
	made   time.Time
	stored *expiry

	inside

	// Under runs.Mu.
	waiting int
	orphan  bool // the call that began it has given up
	told    bool // of the panic
}

// inside is a run as calls within it see it, which have it in their context: they must not wait for one that waits for
// them. That can be seen for the runs of one client, which have a lock in common. A call whose way leads through others
// waits for no run but those that were begun within the run that it is in.
type inside struct {
	runs  *seam.Runs
	outer *inside // the run within which the run was begun

	// Under runs.Mu.
	on map[*inside]int // the runs that calls within wait for
}

type insideKey struct{}

// only says whether the run, and all that it is in, are of those.
func (in *inside) only(runs *seam.Runs) bool {
	for ; in != nil; in = in.outer {
		if in.runs != runs {
			return false
		}
	}
	return true
}

// isIn says whether the run is the other one, or was begun within it.
func (in *inside) isIn(other *inside) bool {
	for in != nil && in != other {
		in = in.outer
	}
	return in != nil
}

// waitsFor says whether the run waits for the other one, or is it. The runs are locked.
func (in *inside) waitsFor(other *inside, asked map[*inside]bool) bool {
	if in == other {
		return true
	}
	asked[in] = true
	for next := range in.on {
		if !asked[next] && next.waitsFor(other, asked) {
			return true
		}
	}
	return false
}

// wait notes that a call within waits for the other run, or no more. The runs are locked.
func (in *inside) wait(other *inside, calls int) {
	if in.on == nil {
		in.on = make(map[*inside]int)
	}
	if in.on[other] += calls; in.on[other] == 0 {
		delete(in.on, other)
	}
}

type ending uint8

const (
	exited ending = iota // by runtime.Goexit, unless it turns out otherwise
	returned
	panicked
)

var errNotReturned = errors.New("the run that the call shared did not return: it panicked, or called runtime.Goexit")

// call is the function that Guard guards.
func (s *shared[T]) call(ctx context.Context) (T, error) {
	if flow, ok := flowctl.FromContext(ctx); ok {
		if data, hit, _ := flow.ResultCache(); hit {
			now := time.Now()
			if v, err := s.codec.Decode(data); err == nil {
				s.keep(v, now, nil)
				return v, nil
			}
		}
	}
	run, began, leave := s.join(ctx)
	if run == nil {
		v, err := s.fn(ctx)
		if err == nil {
			s.keep(v, time.Now(), new(expiry))
		}
		return v, err
	}
	defer leave()
	select {
	case <-run.done:
	case <-ctx.Done():
		if run.leave(began) {
			var zero T
			return zero, canceled.New("cached", s.key.controlPoint, ctx.Err(), context.Cause(ctx))
		}
	}
	if run.how == returned || !run.tells(began) {
		if run.of != s && run.how == returned && run.err == nil { // else the run has kept it
			s.keep(run.value, run.made, run.stored)
		}
		return run.value, run.err
	}
	if run.how == exited {
		runtime.Goexit()
	}
	// It is fn's panic that goes on. Where it was recovered is a panic of its own, which it replaces: who recovers gets
	// the value as it was, and a program that nobody recovers in prints both.
	defer panic(run.panic)                                                               //nolint:forbidigo // see above
	panic("headgate: the run of a cached function panicked at:\n\n" + string(run.stack)) //nolint:forbidigo // see above
}

// keep remembers a result that was seen at a time, and does not expire before then. Where a run made it, it may have been
// stored since, or may yet be, and what is known of those before says nothing. A hit does not move expires back: if it is
// not what this process stored last, it was stored after that, and expires later.
func (s *shared[T]) keep(v T, seen time.Time, stored *expiry) {
	if !s.keeps {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !seen.Before(s.seen) {
		s.last, s.seen = v, seen
		if stored != nil {
			s.expires, s.stored = seen, stored
		}
	}
	if seen.After(s.expires) {
		s.expires = seen
	}
}

// withLast is the context in which the fallback finds the result.
func (s *shared[T]) withLast(ctx context.Context) context.Context {
	s.mu.Lock()
	last, expires, stored := s.last, s.expires, s.stored
	s.mu.Unlock()
	if stored != nil {
		if at := stored.Load(); at != nil && at.After(expires) {
			expires = *at
		}
	}
	return fallback.WithLast(ctx, last, expires)
}

// join waits for the run that is under way, or begins one. There is none where the one under way waits for the run that
// the call is in, or may. Leave is to be called when the wait is over.
func (s *shared[T]) join(ctx context.Context) (run *sharedRun[T], began bool, leave func()) {
	runs, ok := ctx.Value(seam.RunsKey{}).(*seam.Runs)
	if !ok {
		runs = &s.runs
	}
	within, _ := ctx.Value(insideKey{}).(*inside)
	alike := within.only(runs)
	runs.Mu.Lock()
	defer runs.Mu.Unlock()
	run, ok = runs.All[s.key].(*sharedRun[T])
	switch {
	case !ok:
		run = &sharedRun[T]{of: s, done: make(chan struct{}), stored: new(expiry), inside: inside{runs: runs, outer: within}}
		detached := context.WithValue(context.WithoutCancel(ctx), insideKey{}, &run.inside)
		detached, run.cancel = context.WithCancel(detached)
		began = true
		if runs.All == nil {
			runs.All = make(map[any]any)
		}
		runs.All[s.key] = run
		go run.do(detached)
	case within == nil, run.over(), !alike && run.outer.isIn(within):
	case !alike, run.waitsFor(within, make(map[*inside]bool)):
		return nil, false, nil
	}
	run.waiting++
	if within == nil || !alike {
		return run, began, func() {}
	}
	within.wait(&run.inside, 1)
	return run, began, func() {
		runs.Mu.Lock()
		defer runs.Mu.Unlock()
		within.wait(&run.inside, -1)
	}
}

// leave gives up waiting, unless the run has ended: then the call may be the one that a panic reaches. Without anybody
// who waits the run is canceled, and the next call begins another.
func (run *sharedRun[T]) leave(began bool) bool {
	run.runs.Mu.Lock()
	defer run.runs.Mu.Unlock()
	if run.over() {
		return false
	}
	run.orphan = run.orphan || began
	if run.waiting--; run.waiting == 0 {
		run.cancel()
		run.forget()
	}
	return true
}

// over says whether the run has ended.
func (run *sharedRun[T]) over() bool {
	select {
	case <-run.done:
		return true
	default:
		return false
	}
}

// forget has the next call begin another run. The runs are locked.
func (run *sharedRun[T]) forget() {
	if run.runs.All[run.of.key] == run {
		delete(run.runs.All, run.of.key)
	}
}

// tells says whether this is the call that a panic reaches.
func (run *sharedRun[T]) tells(began bool) bool {
	run.runs.Mu.Lock()
	defer run.runs.Mu.Unlock()
	if began || run.orphan && !run.told {
		run.told = true
		return true
	}
	return false
}

// do is the run. Calls that come until its value is stored get it too. Where nothing is to be stored they begin another.
func (run *sharedRun[T]) do(ctx context.Context) {
	s := run.of
	defer func() {
		run.runs.Mu.Lock()
		defer run.runs.Mu.Unlock()
		run.forget()
	}()
	defer run.cancel()
	run.observe(ctx)
	if flow := run.storesBy(ctx); flow != nil {
		expires := time.Now().Add(cmp.Or(s.ttl, defaultTTL))
		if err := flow.SetResultCache(context.WithoutCancel(ctx), run.data, s.ttl); err == nil {
			run.stored.Store(&expires)
		}
	}
}

// storesBy is the flow by which the result is to be stored; nil where it is not.
func (run *sharedRun[T]) storesBy(ctx context.Context) *flowctl.Flow {
	flow, ok := flowctl.FromContext(ctx)
	if !ok || !flow.Success() || run.data == nil || run.of.ttl < 0 || run.runs == &run.of.runs { // there is no client
		return nil
	}
	return flow
}

// observe runs the function, notes how that ended, and lets the calls have it. It recovers because a panic here would
// end the process, where callers may have their ways to deal with one. A panic that no call waits for is not recovered.
func (run *sharedRun[T]) observe(ctx context.Context) {
	s := run.of
	defer func() {
		run.runs.Mu.Lock()
		defer run.runs.Mu.Unlock()
		defer close(run.done)
		if run.storesBy(ctx) == nil {
			run.forget()
		}
		if run.how == returned || run.waiting == 0 {
			return
		}
		run.err = fmt.Errorf("headgate: cached %q: %w", s.key.controlPoint, errNotReturned)
		if p := recover(); p != nil {
			run.how, run.panic, run.stack = panicked, p, debug.Stack()
		}
	}()
	run.value, run.err = s.fn(ctx)
	if run.err == nil {
		if data, err := s.codec.Encode(run.value); err == nil {
			run.data = append([]byte{}, data...) // not nil
		}
		run.made = time.Now()
		s.keep(run.value, run.made, run.stored)
	}
	run.how = returned
}
