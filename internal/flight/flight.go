// Package flight lets callers share runs: callers that look for the same value at the same time get it from one run.
//
// golang.org/x/sync/singleflight does not fit: it cannot tell when the last caller has left, and a panic of a run that
// callers wait for on a channel ends the process.
package flight

import (
	"context"
	"errors"
	"reflect"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
)

// Runs holds the runs under way that callers may share: those of one client. The zero value is ready. Runs is safe for
// concurrent use.
type Runs struct {
	// Unstored, if it is not nil, is called with values that a run made and that were not stored. It is set before the
	// first run, and is safe for concurrent use.
	Unstored func(controlPoint string, err error)

	// Closed, if it is not nil, reports whether the client or its agent in this process is closed. It is set before the
	// first run, and is safe for concurrent use.
	Closed func() bool

	// DryRun is set if all flows of the client run, also those whose callers' contexts end before an agent has answered. It is
	// set before the first run.
	DryRun bool

	mu  sync.Mutex
	all map[place]underway
}

// place is where callers find a run: callers share those that are in one place.
type place struct {
	controlPoint, key string
	value             reflect.Type
	within            *core // nil: any caller finds the run; otherwise only calls from within that run do
}

// underway is a run of any value.
type underway interface{ base() *core }

// A Run is one run. One caller leads it, and others may wait for what it makes.
type Run[V any] struct {
	core
	value V // written before the run ends, and not after
}

// core is a run without its value.
type core struct {
	runs  *Runs
	at    place
	outer *core // the run within which this one was begun; nil when there is none

	// ended is set when the run has ended, for contexts that outlive it.
	ended atomic.Bool

	// Under runs.mu. What is set when the run ends does not change after that.
	how      ending
	done     chan struct{} // closed when the run ends; nil while no caller waits for that
	cancel   context.CancelFunc
	waiting  int // callers, the leader included
	orphan   bool
	told     bool // a panic or a Goexit has reached a caller
	panicked any
	stack    []byte
}

func (c *core) base() *core { return c }

// ending is how a run ended.
type ending uint8

const (
	running ending = iota
	returned
	panicked
	exited // by runtime.Goexit
)

// The errors of [Run.Wait].
var (
	// ErrLeft means that the caller's context ended before the run did.
	ErrLeft = errors.New("the caller has left")

	// ErrNotReturned means that the run panicked, or called runtime.Goexit, which has reached another caller.
	ErrNotReturned = errors.New("the run that the call shared did not return: it panicked, or called runtime.Goexit")
)

type coreKey struct{}

// within finds the run that ctx comes from. A run that has ended waits for nothing. So a call in the context of such a
// run counts as one of the run around it.
func within(ctx context.Context) *core {
	c, _ := ctx.Value(coreKey{}).(*core)
	for c != nil && c.ended.Load() {
		c = c.outer
	}
	return c
}

// isIn reports whether the run was begun within the other one.
func (c *core) isIn(other *core) bool {
	for c = c.outer; c != nil; c = c.outer {
		if c == other {
			return true
		}
	}
	return false
}

// Join finds the run of a V under the control point and the key, or begins one, which the caller leads. A leader must
// end the run, by [Run.End], [Run.Go] or [Run.Abort]. All others, and the leader after Go, call [Run.Wait].
//
// A call from within a run waits only for runs that were begun inside it. If the value has another run, the calls from
// within share a run of their own. So each run waits only for runs below it, and no two wait for each other.
func Join[V any](ctx context.Context, runs *Runs, controlPoint, key string) (run *Run[V], leads bool) {
	in := within(ctx)
	at := place{controlPoint: controlPoint, key: key, value: reflect.TypeFor[V]()}
	runs.mu.Lock()
	defer runs.mu.Unlock()
	var found underway
	ok := false
	if in != nil {
		own := at
		own.within = in
		found, ok = runs.all[own]
	}
	if !ok {
		if found, ok = runs.all[at]; ok && in != nil && found.base().how == running && !found.base().isIn(in) {
			at.within, ok = in, false
		}
	}
	if ok {
		run = found.(*Run[V]) // which it is: the type of its value is a part of its place
		if run.done == nil && run.how == running {
			run.done = make(chan struct{})
		}
		run.waiting++
		return run, false
	}
	run = &Run[V]{core: core{runs: runs, at: at, outer: in, waiting: 1}}
	if runs.all == nil {
		runs.all = make(map[place]underway)
	}
	runs.all[at] = run
	return run, true
}

// End ends the run with a value. It is for a leader that has not called Go.
func (r *Run[V]) End(v V) {
	r.runs.mu.Lock()
	defer r.runs.mu.Unlock()
	r.value = v
	r.end(returned, false)
}

// Works reports whether the run has begun to work.
func (r *Run[V]) Works() bool {
	r.runs.mu.Lock()
	defer r.runs.mu.Unlock()
	return r.cancel != nil
}

// Abort ends a run that its leader will not end, because the leader panicked or called runtime.Goexit itself. It does
// nothing if the run was ended, or has begun to work.
func (r *Run[V]) Abort() {
	r.runs.mu.Lock()
	defer r.runs.mu.Unlock()
	if r.how == running && r.cancel == nil {
		r.told = true
		r.end(exited, false)
	}
}

// Go calls work in a goroutine of its own, which ends when work and the function that it returned have returned. The
// work's context has the values of ctx, and is canceled when the last caller has left. The run ends with the value that
// work returns. If work returns a function too, calls find the run until that function has returned. Otherwise the next
// call begins another run.
func (r *Run[V]) Go(ctx context.Context, work func(context.Context) (V, func())) {
	ctx, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), coreKey{}, &r.core))
	r.runs.mu.Lock()
	r.cancel = cancel
	if r.done == nil {
		r.done = make(chan struct{})
	}
	r.runs.mu.Unlock()
	go func() {
		defer cancel()
		after := r.observe(ctx, work)
		if after == nil {
			return
		}
		defer func() {
			r.runs.mu.Lock()
			defer r.runs.mu.Unlock()
			r.forget()
		}()
		after()
	}()
}

// observe calls work and ends the run. It recovers a panic, because callers may handle it, and here it would end the
// process. If no caller waits, it does not recover.
func (r *Run[V]) observe(ctx context.Context, work func(context.Context) (V, func())) (after func()) {
	how := exited
	defer func() {
		r.runs.mu.Lock()
		defer r.runs.mu.Unlock()
		if how == exited && r.waiting > 0 {
			if p := recover(); p != nil {
				how, r.panicked, r.stack = panicked, p, debug.Stack()
			}
		}
		r.end(how, after != nil)
	}()
	r.value, after = work(ctx)
	how = returned
	return after
}

// end is how every run ends. The runs are locked.
func (c *core) end(how ending, found bool) {
	c.how = how
	c.ended.Store(true)
	if c.done != nil {
		close(c.done)
	}
	if !found {
		c.forget()
	}
}

// forget makes the next call begin another run. The runs are locked.
func (c *core) forget() {
	if found, ok := c.runs.all[c.at]; ok && found.base() == c {
		delete(c.runs.all, c.at)
	}
}

// Wait waits until the run has ended, and returns its value. When ctx ends first, the caller leaves, and the error is
// ErrLeft. A panic or Goexit of the run goes on in the leader, or in one of the others if the leader has left. The rest
// get ErrNotReturned.
func (r *Run[V]) Wait(ctx context.Context, leads bool) (v V, err error) {
	r.runs.mu.Lock()
	how, done := r.how, r.done
	r.runs.mu.Unlock()
	if how == running {
		select {
		case <-done:
		case <-ctx.Done():
			if r.leave(leads) {
				return v, ErrLeft
			}
		}
	}
	if r.how == returned {
		return r.value, nil
	}
	if !r.tells(leads) {
		return v, ErrNotReturned
	}
	if r.how == exited {
		runtime.Goexit()
	}
	// The panic that says where the work panicked comes first, and the work's own panic replaces it. A caller that
	// recovers gets the original value. A program without a recover prints both.
	defer panic(r.panicked)                                                            //nolint:forbidigo // see above
	panic("headgate: the run of a cached function panicked at:\n\n" + string(r.stack)) //nolint:forbidigo // see above
}

// leave gives up waiting, unless the run has ended: then the call may be the one that a panic reaches. When the last
// caller leaves, the run is canceled, and the next call begins another.
func (c *core) leave(leads bool) bool {
	c.runs.mu.Lock()
	defer c.runs.mu.Unlock()
	if c.how != running {
		return false
	}
	c.orphan = c.orphan || leads
	if c.waiting--; c.waiting == 0 {
		c.cancel() // which there is: a leader that has not called Go still counts
		c.forget()
	}
	return true
}

// tells reports whether this is the caller that a panic or a Goexit reaches.
func (c *core) tells(leads bool) bool {
	c.runs.mu.Lock()
	defer c.runs.mu.Unlock()
	if leads || c.orphan && !c.told {
		c.told = true
		return true
	}
	return false
}
