package flowctl

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc/connectivity"
)

// vigilEvery is how often an agent is asked for a sign of life, and the least time that it has for it.
const vigilEvery = time.Second

// A silentError ends a check whose agent brings no sign of life.
type silentError struct {
	since time.Time // when it was asked for one
}

func (e *silentError) Error() string { return "it gave no sign of life while the flow waited" }

// silenceOf returns the error of a call that the vigil has ended; nil if it has not.
func silenceOf(call context.Context) error {
	if silent, ok := errors.AsType[*silentError](context.Cause(call)); ok {
		return silent
	}
	return nil
}

// A vigil finds out whether the agent lives while checks wait for long. An agent that has a flow wait in a queue sends
// nothing, and so does an agent that hangs. So while such checks wait, one goroutine asks the agent once a second for a
// sign of life: in the session, or by a call if the agent knows no sessions. The checks end if none comes. Whatever comes on the connection is one, because a busy agent must not be
// taken for a dead one.
//
// How long an agent may be silent is a check's own. The time begins with a question, because before it the agent had
// nothing to say. With a question each second, and checks that are watched after a second at the latest, an agent that
// hangs is found within the check timeout and 2 s.
type vigil struct {
	remote *remote

	mu      sync.Mutex
	watches map[*watch]struct{}
	running bool            // the goroutine is there
	busy    context.Context // while there are watches
	idle    context.CancelFunc
	next    time.Time // when the next question may go

	// Of the question that the agent has not answered.
	asked    time.Time // zero: there is none
	giveUp   context.CancelFunc
	received uint64 // what had come from the agent when the question was asked
	opened   uint64 // the calls that had been sent
	judges   time.Time
	timer    *time.Timer // calls judge, at the time judges
}

// A watch is a check that the vigil is kept for.
type watch struct {
	limit time.Duration // of the silence
	end   context.CancelCauseFunc
	over  bool
}

// attend has the vigil kept for a call when it takes long, and returns the call's context. Call the function when the
// call has ended.
func (v *vigil) attend(call context.Context, silence time.Duration) (context.Context, func()) {
	ctx, end := context.WithCancelCause(call)
	w := &watch{limit: max(silence, vigilEvery), end: end}
	timer := time.AfterFunc(min(silence, vigilEvery), func() { v.join(w) })
	return ctx, func() {
		timer.Stop()
		v.leave(w)
		end(nil)
	}
}

func (v *vigil) join(w *watch) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if w.over {
		return
	}
	if len(v.watches) == 0 {
		v.watches = make(map[*watch]struct{})
		v.busy, v.idle = context.WithCancel(context.Background()) //nolint:forbidigo // the question is no caller's; it ends with the last watch
	}
	v.watches[w] = struct{}{}
	switch {
	case !v.running:
		v.running = true
		go v.keep()
	case !v.asked.IsZero():
		v.judgeBy(v.asked.Add(w.limit))
	}
}

func (v *vigil) leave(w *watch) {
	v.mu.Lock()
	defer v.mu.Unlock()
	w.over = true
	if len(v.watches) == 0 {
		return
	}
	delete(v.watches, w)
	if len(v.watches) == 0 {
		v.idle()
	}
}

// keep asks the agent for signs of life as long as there are watches.
func (v *vigil) keep() {
	for {
		v.mu.Lock()
		if len(v.watches) == 0 {
			v.running = false
			v.mu.Unlock()
			return
		}
		busy, wait := v.busy, time.Until(v.next)
		v.mu.Unlock()
		if wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-busy.Done():
				timer.Stop()
				continue
			}
		}
		v.ask(busy)
	}
}

// ask asks the agent once. It returns when the agent has answered, or anything else has come from it by a second, or
// there are no watches any more.
func (v *vigil) ask(busy context.Context) {
	question, giveUp := context.WithCancel(busy)
	defer giveUp()
	v.mu.Lock()
	v.asked, v.giveUp = time.Now(), giveUp
	if v.received = v.remote.received.Load(); v.remote.links != nil {
		v.opened = v.remote.links.opened.Load()
	}
	v.next = v.asked.Add(vigilEvery)
	v.judges = v.next
	v.timer = time.AfterFunc(vigilEvery, v.judge)
	v.mu.Unlock()
	v.remote.alive(question)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.timer.Stop()
	v.asked = time.Time{}
}

// judgeBy has judge called at the time at the latest.
func (v *vigil) judgeBy(at time.Time) {
	if at.Before(v.judges) {
		v.judges = at
		v.timer.Reset(time.Until(at))
	}
}

// judge ends the checks whose agent has been silent for too long.
func (v *vigil) judge() {
	v.mu.Lock()
	if v.asked.IsZero() {
		v.mu.Unlock()
		return
	}
	if v.stirs() {
		v.giveUp()
		v.mu.Unlock()
		return
	}
	now := time.Now()
	v.judges = now.Add(vigilEvery)
	v.timer.Reset(vigilEvery)
	silent := &silentError{since: v.asked}
	var ended []*watch
	for w := range v.watches {
		if due := v.asked.Add(w.limit); due.After(now) {
			v.judgeBy(due)
		} else {
			ended = append(ended, w)
		}
	}
	v.mu.Unlock()
	for _, w := range ended { // which then leave
		w.end(silent)
	}
}

// stirs reports whether the question that is not answered says nothing of the agent: something else has come since, or
// the question has not been sent, because as many calls are under way as the agent allows. A question that was not sent
// because the agent reads nothing does say something.
func (v *vigil) stirs() bool {
	r := v.remote
	if r.links == nil { // all that is seen is the answer
		return false
	}
	return r.received.Load() != v.received || r.links.stirred(v.asked) ||
		r.dialled.GetState() == connectivity.Ready && r.links.opened.Load() == v.opened && r.links.writing.Load() == 0
}
