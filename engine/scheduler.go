package engine

import (
	"cmp"
	"context"
	"errors"
	"math"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// errRetired sends away a flow that waits for a scheduler that is no longer in force.
var errRetired = errors.New("the scheduler is no longer in force")

// A scheduler admits a flow at once, or has it wait for tokens in a queue, one for each key.
//
// No goroutine serves the queue. Every change of what a key has serves the first flows, under the lock of the key. A
// flow that waits is woken when it has its tokens. If tokens come by themselves, the queue has a timer, set for the
// first flow.
type scheduler[S any] struct {
	keyed[line[S], source.Source[S]]
	meter     meter[S] // the source, if it is one
	workloads *workloads
	margin    time.Duration
	most      int64      // flows that may wait, if no other component follows
	room      *wfq.Room  // for flows that wait, over all keys: peers may make up any number of keys
	rested    *rested[S] // shared with a component that follows, as the room is
	far       far[S]     // the store that tokens come from; nil if they come from the source
}

// mostRested is how many keys keep a queue although no flow waits.
const mostRested = 256

// rested is the entries whose queues were emptied last. A queue takes several times the memory of its key, so not every
// key at which a flow has ever waited can keep one. A busy key keeps its queue, because making one costs as much as a
// short wait.
type rested[S any] struct {
	last    atomic.Uint64
	entries [mostRested]atomic.Pointer[keys.Entry[line[S]]]
}

// rest notes that no flow waits at the entry any more, and releases the queue of the entry that was noted first.
// The entry is locked.
func (s *scheduler[S]) rest(e *keys.Entry[line[S]]) {
	if s.table == nil || e.State.queue.rests != 0 {
		return
	}
	n := s.rested.last.Add(1)
	e.State.queue.rests = n
	old := s.rested.entries[n%mostRested].Swap(e)
	// A locked entry is in use. It is noted again after the next flows have waited there.
	if old == nil || old == e || !old.TryLock() {
		return
	}
	defer old.Unlock()
	if q := old.State.queue; q != nil && q.rests == n-mostRested { // it has not been noted again
		old.State.queue = nil
	}
}

// A meter is a source that counts the flows that come and those that are let in, as load schedulers do.
type meter[S any] interface {
	// price returns how many tokens a flow of the workload takes unless a label says.
	price(of *workload) float64

	// meet counts a flow that comes, whatever is decided about it.
	meet(state *S, now int64, want demand)

	// gave counts a flow that is let in.
	gave(state *S, now int64, want demand)

	// letIn returns the share of the load that is let in.
	letIn(state *S) float64
}

// A demand is the tokens that a flow wants.
type demand struct {
	tokens float64
	by     *workload // the workload whose price they are; nil if a label says how many
}

// A line is the state of one key: its tokens, and the queue of flows that wait for them.
type line[S any] struct {
	tokens S
	queue  *queue // nil while no flow has waited lately
}

func newScheduler[S any](e *Engine, c limits[S], p *policy.Scheduler) (*scheduler[S], error) {
	w, err := compileWorkloads(p)
	if err != nil {
		return nil, err
	}
	s := &scheduler[S]{
		workloads: w,
		margin:    cmp.Or(p.Margin, policy.DefaultMargin),
		most:      int64(cmp.Or(p.MaxQueue, policy.DefaultMaxQueue)),
		rested:    new(rested[S]),
	}
	s.room = wfq.NewRoom(s.most, c.component.LabelKey != "")
	s.meter, _ = c.own.rule.(meter[S])
	s.keyed, err = newKeyed(e, config[line[S], source.Source[S]]{
		component: c.component, maxIdle: c.maxIdle, mode: c.mode, own: c.own, with: c.with, overrides: c.overrides,
		ruling: lineRuling[S](), names: c.names,
	})
	if err != nil {
		return nil, err
	}
	s.component.Settler = s
	s.component.Workload = s.workload
	_, can := c.own.rule.(source.Settler[S])
	s.settles(p.TokensLabel, can)
	return s, nil
}

// lineRuling is how sources go about the states of a scheduler.
func lineRuling[S any]() ruling[line[S], source.Source[S]] {
	return ruling[line[S], source.Source[S]]{
		fresh: func(from source.Source[S], l *line[S], now int64) { from.Fresh(&l.tokens, now) },
		idle: func(from source.Source[S], l *line[S], now int64) bool {
			return !l.waiting() && from.Idle(&l.tokens, now)
		},
		inherit: func(from source.Source[S], l *line[S], before source.Source[S], now int64) {
			inherit(from, &l.tokens, before, now)
			if l.queue != nil {
				l.queue.changes++
			}
		},
	}
}

// follow has the scheduler follow one of the same label and mode. Workloads of the same name go on counting.
func (s *scheduler[S]) follow(other component) bool {
	before, ok := other.(*scheduler[S])
	if !ok || s.mode == nil || before.mode != s.mode {
		return false
	}
	s.followed(&before.keyed)
	s.room, s.rested = before.room, before.rested
	s.workloads.follow(before.workloads)
	return true
}

// takeOver serves the flows that wait, by the new numbers. If no flow waits any more, because of a dry run or PassThrough, they are
// decided about anew.
func (s *scheduler[S]) takeOver() {
	s.room.Resize(s.most)
	s.change(func(e *keys.Entry[line[S]]) {
		if s.passThrough || s.component.DryRun {
			for e.State.waiting() {
				e.State.queue.dismiss(e.State.queue.First())
			}
		}
		s.serve(e, s.engine.now())
	})
}

func (s *scheduler[S]) askAgain() {
	s.reconsider(func(e *keys.Entry[line[S]]) { s.serve(e, s.engine.now()) })
}

func (s *scheduler[S]) oldest(now int64) (since int64, ok bool) {
	s.each(func(e *keys.Entry[line[S]]) { older(s.of(e).rule, &e.State.tokens, now, &since, &ok) })
	return since, ok
}

// waiting reports whether any flow waits.
func (l *line[S]) waiting() bool { return l.waits() > 0 }

// waits is how many flows wait.
func (l *line[S]) waits() int {
	if l.queue == nil {
		return 0
	}
	return l.queue.Len()
}

// workload returns the workload of a flow and its priority, as answers show them.
func (s *scheduler[S]) workload(labels *agentapi.Labels) (label string, priority float64) {
	if s.passThrough {
		return s.workloads.others.label, s.workloads.others.priority
	}
	of, _ := s.workloads.of(labels)
	c := s.workloads.claim(of, labels)
	if c.Workload == of.label {
		return c.Workload, c.Priority
	}
	return keys.NewNamer(s.workloads.workloadLabel, &s.engine.secret).Name(c.Workload), c.Priority
}

// ask has the flow wait, if it may, at the longest until its deadline less the margin.
func (s *scheduler[S]) ask(ctx context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (int64, error) {
	var t ticket[S]
	s.enter(req, a.now, d, &t, func(of *workload) time.Duration {
		if !a.wait {
			return 0
		}
		return s.patience(ctx, req, of, a.now-a.start)
	})
	now := a.now
	if t.waiter != nil {
		var err error
		now, err = s.wait(ctx, req, a.start, &t, d)
		t.of.waits.add(now - a.now)
		s.engine.instruments.waited(ctx, &s.component, t.of, now-a.now)
		if err != nil {
			return now, err
		}
	}
	if a.wait && (t.waiter == nil || t.once) && d.Dropped && d.Cause == agentapi.CauseNone && d.Wait() != source.Never && t.of.timeout >= 0 {
		d.Cause = agentapi.CauseLate // its workload may wait, and the margin takes all the time that it has
		if req.MaxWait() > 0 && s.answerLeft(ctx, req, now-a.start) > 0 {
			d.Cause = agentapi.CauseLongQueue // it has time, and may not wait any longer
		}
	}
	if d.Dropped && t.entry != nil && d.Cause != agentapi.CauseClosed && d.Cause != agentapi.CauseNoStore {
		s.heldOff(d, now)
		s.rejected(t.entry, d, now)
	}
	s.count(t.of, req, d)
	return now, nil
}

// A ticket is a flow that asks, and its place in a queue.
type ticket[S any] struct {
	*waiter // nil if the flow was decided about at once

	of       *workload
	known    bool // the flow's labels could be matched
	once     bool // it does not wait: the store decides about it at once
	session  [16]byte
	demand   demand
	wish     wish
	entry    *keys.Entry[line[S]]
	patience time.Duration
}

// enter decides about the flow, or puts it into the queue. It calls patience only for a flow that is not admitted at
// once, because patience reads the clock.
func (s *scheduler[S]) enter(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, t *ticket[S], patience func(*workload) time.Duration) {
	t.of, t.known = s.workloads.of(&req.Labels)
	t.demand, t.session = s.demand(&req.Labels, t.of), req.Session()
	d.Consumed = t.demand.tokens
	if !s.scope(&req.Labels, d) {
		return
	}
	var r reservation
	defer func() { // also if the host's function panics
		if r.has {
			s.room.Return()
		}
	}()
	for {
		turnOut, leave := s.stand(req, now, d, t, patience, &r)
		if turnOut == nil {
			break
		}
		// Only one entry is locked at a time, so that two flows that look for room do not wait for each other.
		r = reservation{has: turnOut(leave), own: true}
	}
}

// demand returns what a flow of the workload wants.
func (s *scheduler[S]) demand(labels *agentapi.Labels, of *workload) demand {
	if tokens, ok := tokensSaid(labels, s.workloads.tokensLabel); ok {
		return demand{tokens: tokens}
	}
	if s.meter != nil {
		return demand{tokens: s.meter.price(of), by: of}
	}
	return demand{tokens: of.tokens, by: of}
}

// A reservation is the room that an evicted flow of another key has left to this one.
type reservation struct {
	has bool
	own bool // look for room only at the flow's own key
}

// stand is enter for a flow that has a bucket. If there is no room, and another key has a longer queue, it decides
// nothing. It returns a function that evicts a flow from that queue, and how many flows must be left there.
func (s *scheduler[S]) stand(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, t *ticket[S],
	patience func(*workload) time.Duration, r *reservation,
) (turnOut func(leave int) bool, leave int) {
	t.entry = s.lock(&req.Labels, d, now)
	defer t.entry.Unlock()
	n := s.of(t.entry)
	d.Capacity = n.capacity
	if s.far != nil {
		s.far.begin(t.entry, now)
	}
	if s.answer(now, d, t) {
		return nil, 0
	}
	t.patience = patience(t.of)
	t.wish = wish{claim: s.workloads.claim(t.of, &req.Labels), tokens: d.Consumed, cost: n.rule.Cost(t.of.ratio.of(d.Consumed))}
	likely, ok := s.judge(now, d, t, r)
	if !ok {
		return nil, 0
	}
	if t.patience == 0 && s.asksFar(t.entry) {
		t.once, t.patience = true, forever
		s.enqueue(now, d, t)
		return nil, 0
	}
	if t.patience == 0 {
		s.pass(now, d, t, likely)
		return nil, 0
	}
	if turnOut, leave, ok = s.findRoom(now, d, t, r); ok {
		s.enqueue(now, d, t)
	}
	return turnOut, leave
}

// asksFar reports whether the store decides about the flows of the entry.
func (s *scheduler[S]) asksFar(e *keys.Entry[line[S]]) bool { return s.far != nil && !s.far.here(e) }

// answer decides about a flow that need not wait, and reports whether it has.
func (s *scheduler[S]) answer(now int64, d *agentapi.LimiterDecision, t *ticket[S]) bool {
	l := &t.entry.State
	if s.meter != nil {
		s.meter.meet(&l.tokens, now, t.demand)
		if d.DryRun { // it is let in, whatever is decided
			s.meter.gave(&l.tokens, now, t.demand)
		}
	}
	if !t.known {
		s.drop(d, agentapi.CauseLongLabel, 0)
		return true
	}
	if s.far != nil && d.Consumed != 0 && s.far.closed(t.entry) {
		d.Local = true
		s.drop(d, agentapi.CauseNoStore, closedFor)
		return true
	}
	if l.waiting() {
		s.serve(t.entry, now) // what has come by now is for the flows that wait
	}
	if l.waiting() && d.Consumed != 0 {
		return false
	}
	got := s.of(t.entry).rule.Take(&l.tokens, now, d.Consumed)
	if !got.OK {
		return false
	}
	if s.meter != nil && !d.DryRun {
		s.meter.gave(&l.tokens, now, t.demand)
	}
	bind(s.of(t.entry).rule, &l.tokens, got.Slot, t.session)
	d.Local = s.far != nil && d.Consumed != 0
	fill(d, got)
	return true
}

// judge drops a flow that would wait in vain. For the others OK is true, and likely is how long they would wait.
func (s *scheduler[S]) judge(now int64, d *agentapi.LimiterDecision, t *ticket[S], r *reservation) (likely int64, ok bool) {
	l := &t.entry.State
	from := s.of(t.entry).rule
	least, likely := forecast(from, l, now, t.wish)
	d.Remaining = from.Usage(&l.tokens, now).Remaining
	asks, turn := s.asksFar(t.entry), int64(0)
	if asks && likely != source.Never {
		turn = s.far.turn(t.entry, now, t.wish, t.patience > 0)
	}
	switch {
	case likely == source.Never, turn == source.Never:
		s.drop(d, agentapi.CauseNone, source.Never)
		return 0, false
	case t.patience == 0 && turn > 0:
		s.drop(d, agentapi.CauseNone, max(turn, likely))
		return 0, false
	case turn > int64(t.patience):
		s.drop(d, agentapi.CauseLongQueue, max(turn, likely))
		return 0, false
	case t.patience == 0 && asks && least == 0:
	case t.patience == 0 && (!l.waiting() || least > 0):
		s.drop(d, agentapi.CauseNone, estimate(from, l, now, t.wish))
		return 0, false
	case least > int64(t.patience):
		if least, likely = rethink(from, l, now, t.deadline(now), t.wish, s.displaced(t, r), least, likely); least > int64(t.patience) {
			s.drop(d, agentapi.CauseLongQueue, likely)
			return 0, false
		}
	}
	return likely, true
}

// deadline is when the flow gives up.
func (t *ticket[S]) deadline(now int64) int64 {
	if t.patience < forever {
		return now + int64(t.patience)
	}
	return wfq.NoDeadline
}

// pass decides about a flow that may not wait: it is served if its turn comes before those that wait, and dropped
// otherwise. It is in the queue only for a moment, and needs no room.
func (s *scheduler[S]) pass(now int64, d *agentapi.LimiterDecision, t *ticket[S], likely int64) {
	w := s.push(now, t, false)
	switch {
	case w.Served():
		fillServed(d, w)
		return
	case w.Flow.dismissed:
		s.drop(d, agentapi.CauseNone, source.Never)
		return
	}
	t.entry.State.queue.Remove(w)
	s.serve(t.entry, now)
	s.drop(d, agentapi.CauseNone, likely)
}

// findRoom takes room for a flow that waits, from another flow if it must. OK is false if the flow is dropped, or if
// turnOut is to be called first.
func (s *scheduler[S]) findRoom(now int64, d *agentapi.LimiterDecision, t *ticket[S], r *reservation) (turnOut func(leave int) bool, leave int, ok bool) {
	l := &t.entry.State
	if r.has || s.room.Take() {
		r.has = false // it is the flow's
		return nil, 0, true
	}
	if !r.own {
		leave = l.waits() + 1
		if turnOut = s.room.Longest(leave); turnOut != nil {
			return turnOut, leave, false
		}
	}
	if w := l.queue.evictable(t.wish.claim); w != nil {
		l.queue.evict(w)
		return nil, 0, true
	}
	s.drop(d, agentapi.CauseQueueFull, estimate(s.of(t.entry).rule, l, now, t.wish))
	return nil, 0, false
}

// displaced returns the flow of the same queue that findRoom evicts for this one; nil for none.
func (s *scheduler[S]) displaced(t *ticket[S], r *reservation) *waiter {
	l := &t.entry.State
	if !l.waiting() || r.has || !s.room.Full() || !r.own && s.room.Longest(l.waits()+1) != nil {
		return nil
	}
	return l.queue.evictable(t.wish.claim)
}

// enqueue puts a flow that has room into the queue.
func (s *scheduler[S]) enqueue(now int64, d *agentapi.LimiterDecision, t *ticket[S]) {
	w := s.push(now, t, !t.once)
	switch {
	case w.Served():
		fillServed(d, w)
		return
	case w.Flow.dismissed:
		s.drop(d, agentapi.CauseNone, source.Never)
		return
	}
	w.Flow.ready = make(chan struct{})
	t.waiter = w
}

// push puts the flow into the queue, and serves the queue: the flow may be first now, and need less than the one that
// was.
func (s *scheduler[S]) push(now int64, t *ticket[S], placed bool) *waiter {
	l := &t.entry.State
	if l.queue == nil {
		l.queue = s.newQueue(t.entry)
	}
	w := &waiter{Flow: pending{demand: t.demand, session: t.session, once: t.once}, Cost: t.wish.cost, Deadline: t.deadline(now), Placed: placed}
	l.queue.rests = 0
	l.queue.Push(w, t.wish.claim)
	if s.far != nil {
		s.far.came(t.entry, w)
	}
	s.serve(t.entry, now)
	return w
}

// newQueue makes the queue of an entry.
func (s *scheduler[S]) newQueue(e *keys.Entry[line[S]]) *queue {
	q := &queue{alarm: alarm{ring: func() { s.ring(e) }}}
	q.Queue = wfq.New[pending](s.room, func(leave int) bool {
		e.Lock()
		defer e.Unlock()
		if q.Len() <= leave {
			return false
		}
		q.evict(q.Newest())
		s.serve(e, s.engine.now()) // another flow may be the first now
		return true
	})
	return q
}

// wait waits for the flow to be served, and decides.
func (s *scheduler[S]) wait(ctx context.Context, req *agentapi.Request, start int64, t *ticket[S], d *agentapi.LimiterDecision) (int64, error) {
	var timer *time.Timer
	var expired <-chan time.Time
	var crowded <-chan struct{}
	if t.once { // it waits for an answer, and not for tokens
		if left := s.checkLeft(ctx, req, s.engine.now()-start); left < forever {
			timer = time.NewTimer(max(left-s.margin, left/2))
			defer timer.Stop()
			expired = timer.C
		}
	} else if t.patience < forever {
		timer = time.NewTimer(t.patience)
		defer timer.Stop()
		expired, crowded = timer.C, req.Crowded()
	}
	retired, closing, overdue := false, false, false
	for waiting := true; waiting; {
		waiting = false
		select {
		case <-t.Flow.ready:
		case <-expired:
			overdue = t.once
		case <-ctx.Done():
		case <-s.engine.done:
		case <-req.Closing():
			closing = true
		case <-s.retired:
			retired = true
		case <-crowded:
			now := s.engine.now()
			timer.Reset(min(s.timeLeft(ctx, req, now-start), time.Duration(t.Deadline-now)))
			waiting, crowded = true, nil
		}
	}
	e, l := t.entry, &t.entry.State
	e.Lock()
	defer e.Unlock()
	now := s.engine.now()
	if overdue && t.Waits() && ctx.Err() == nil && !s.engine.closed.Load() {
		l.queue.Remove(t.waiter)
		s.decideAlone(e, now, t, d)
		return now, nil
	}
	s.serve(e, now) // at the last moment
	n := s.of(e)
	from := n.rule
	d.Capacity = n.capacity // which may have changed meanwhile
	gone := ctx.Err()
	switch {
	case t.Served() && gone == nil:
		fillServed(d, t.waiter)
		return now, nil
	case t.Served() && s.far != nil && !t.Flow.local:
		s.far.unneeded(e, t.waiter)
	case t.Served():
		from.GiveBack(&l.tokens, now, t.Flow.tokens, t.Flow.slot, true)
		if l.queue != nil {
			l.queue.changes++
		}
	case t.Waits():
		l.queue.Remove(t.waiter)
	}
	s.serve(e, now)
	switch {
	case gone != nil: // no caller is left to retry
		s.drop(d, agentapi.CauseTimeout, 0)
		return now, gone
	case closing, s.engine.closed.Load(): // also where another event came first: no flow may run because of a shutdown
		s.drop(d, agentapi.CauseClosed, 0)
		return now, nil
	case t.Evicted():
		s.drop(d, agentapi.CauseQueueFull, estimate(from, l, now, t.wish))
		return now, nil
	case t.Flow.decided:
		d.Local = t.Flow.local
		s.drop(d, t.Flow.cause, t.Flow.wait)
		return now, nil
	}
	s.drop(d, agentapi.CauseTimeout, estimate(from, l, now, t.wish))
	if retired || t.Flow.dismissed {
		return now, errRetired
	}
	return now, nil
}

// decideAlone decides about a flow that does not wait, and that the store has not decided about in time.
func (s *scheduler[S]) decideAlone(e *keys.Entry[line[S]], now int64, t *ticket[S], d *agentapi.LimiterDecision) {
	got, closed := s.far.alone(e, now, &t.Flow)
	d.Local = true
	switch {
	case closed:
		s.drop(d, agentapi.CauseNoStore, closedFor)
	case got.OK:
		fill(d, got)
	default:
		d.Remaining = got.Left
		s.drop(d, agentapi.CauseNone, got.Wait)
	}
	s.serve(e, now)
}

// serve gives what there is to the first flows, and sets the alarm for the next. The entry is locked.
func (s *scheduler[S]) serve(e *keys.Entry[line[S]], now int64) {
	if e.State.queue == nil {
		return
	}
	s.catchUp(e, now)
	s.hand(e, now)
	e.State.queue.alarm.set(s.engine.now)
	if s.far != nil {
		s.far.attend(e)
	}
	if !e.State.waiting() {
		s.rest(e)
	}
}

// catchUp serves the flows that were due before now, each at its time: alarms are late, and what comes to a full source
// meanwhile is lost although a flow waits for it. Call it before anything is given back to a source for which flows
// wait. It leaves the alarm to serve. The entry is locked.
func (s *scheduler[S]) catchUp(e *keys.Entry[line[S]], now int64) {
	for a := &e.State.queue.alarm; a.due > 0 && a.due < now; {
		s.hand(e, a.due)
	}
}

// hand gives what there is at a time to the flows that are first, and notes when the next is due. Once the engine is closed it
// serves none: no flow may run because the others were rejected.
func (s *scheduler[S]) hand(e *keys.Entry[line[S]], at int64) {
	q := e.State.queue
	q.alarm.due = 0
	if s.engine.closed.Load() || s.asksFar(e) {
		return
	}
	for w := q.First(); w != nil; w = q.First() {
		got := s.of(e).rule.Take(&e.State.tokens, at, w.Flow.tokens)
		if !got.OK && got.Wait <= 0 && !got.Later { // by numbers that have changed since it came
			q.dismiss(w)
			continue
		}
		if !got.OK {
			if got.Wait > 0 {
				q.alarm.due = at + got.Wait
			}
			return
		}
		q.Pop()
		if s.meter != nil {
			s.meter.gave(&e.State.tokens, at, w.Flow.demand)
		}
		bind(s.of(e).rule, &e.State.tokens, got.Slot, w.Flow.session)
		w.Flow.slot, w.Flow.left, w.Flow.local = got.Slot, got.Left, s.far != nil
		if w.Flow.ready != nil {
			close(w.Flow.ready)
		}
	}
}

// ring is what the alarm of the entry's queue does.
func (s *scheduler[S]) ring(e *keys.Entry[line[S]]) {
	e.Lock()
	defer e.Unlock()
	if e.State.queue == nil {
		return
	}
	e.State.queue.alarm.rings = 0
	s.serve(e, s.engine.now())
}

// count counts a decision, by the flow's workload. Tokens count up to source.MaxCost, as in a queue: an infinite sum
// would hide all others.
func (s *scheduler[S]) count(of *workload, req *agentapi.Request, d *agentapi.LimiterDecision) {
	of.counts.decision(d)
	switch {
	case !d.Passed():
		of.drops[d.Cause].Add(1)
		addFloat(of.counts, d, tokensRejected, min(s.demand(&req.Labels, of).tokens, source.MaxCost))
	case d.Dropped:
		addFloat(of.counts, d, tokensAccepted, min(s.demand(&req.Labels, of).tokens, source.MaxCost))
	default:
		addFloat(of.counts, d, tokensAccepted, min(d.Consumed, source.MaxCost))
	}
}

// forever is how long a flow without a deadline may wait.
const forever time.Duration = math.MaxInt64

// patience returns how long a flow of the workload may wait after it has asked for so long: until it needs its answer,
// less the time that the answer takes to arrive, and no longer than its MaxWait.
func (s *scheduler[S]) patience(ctx context.Context, req *agentapi.Request, of *workload, asked int64) time.Duration {
	if of.timeout < 0 || req.MaxWait() == agentapi.NoWait {
		return 0
	}
	s.cut(of, req)
	wait := s.timeLeft(ctx, req, asked)
	if of.timeout > 0 {
		wait = min(wait, of.timeout)
	}
	return wait
}

// cut notes by what the flow cuts its wait short, or the timeout of its workload. A check timeout of a client is left out, because Expect
// says it. So is one that is not longer than the margin, or than the default margin: such a flow is not to wait. So is that of a request
// over the network, which has a Closing: it is what is left.
func (s *scheduler[S]) cut(of *workload, req *agentapi.Request) {
	if most := req.MaxWait(); most > agentapi.NoWait {
		of.cut(&of.cuts.maxWait, most, most)
	}
	if req.Closing() == nil && req.Timeout > min(s.margin, policy.DefaultMargin) {
		if shortest := time.Duration(s.engine.checkTimeout.Load()); shortest == 0 || req.Timeout < shortest {
			of.cut(&of.cuts.check, req.Timeout, req.Timeout-s.margin)
		}
	}
}

// shortestWaits returns the shortest MaxWait and check timeout of flows that cut the timeout of a workload short; 0 where there was
// none.
func (s *scheduler[S]) shortestWaits(workload int) (maxWait, check time.Duration) {
	for of := range s.workloads.all {
		if of.index == workload {
			return time.Duration(of.cuts.maxWait.Load()), time.Duration(of.cuts.check.Load())
		}
	}
	return 0, 0
}

// shortestCheck returns the shortest check timeout of flows of workloads without a timeout that the margin has not let wait; 0 if there
// was none.
func (s *scheduler[S]) shortestCheck() (check time.Duration) {
	for of := range s.workloads.all {
		if own := time.Duration(of.cuts.check.Load()); of.timeout == 0 && own > 0 && own <= s.margin && (check == 0 || own < check) {
			check = own
		}
	}
	return check
}

// timeLeft returns how long the flow may wait by its deadline, its own timeout and its MaxWait. The last is no time for
// an answer, so neither the margin nor a crowd takes any of it.
func (s *scheduler[S]) timeLeft(ctx context.Context, req *agentapi.Request, asked int64) time.Duration {
	left := s.answerLeft(ctx, req, asked)
	if most := req.MaxWait(); most > 0 {
		left = min(left, max(most-time.Duration(asked), 0))
	}
	return left
}

// answerLeft returns how long the flow may wait by its deadline and its own timeout, so that the answer is in time.
func (s *scheduler[S]) answerLeft(ctx context.Context, req *agentapi.Request, asked int64) time.Duration {
	left := s.checkLeft(ctx, req, asked)
	if left == forever {
		return left
	}
	select {
	case <-req.Crowded():
		left -= max(left, 0) / 20
	default:
	}
	return max(left, s.margin) - s.margin
}

// checkLeft returns how long it is until the flow's deadline, or the end of its own timeout.
func (s *scheduler[S]) checkLeft(ctx context.Context, req *agentapi.Request, asked int64) time.Duration {
	left := forever
	if at, ok := ctx.Deadline(); ok {
		left = time.Until(at)
	}
	if req.Timeout > 0 {
		left = min(left, req.Timeout-time.Duration(asked))
	}
	return left
}

func (s *scheduler[S]) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	of, _ := s.workloads.of(&req.Labels)
	d.Consumed = s.demand(&req.Labels, of).tokens
	if s.scope(&req.Labels, d) {
		s.drop(d, cause, 0)
	}
	s.count(of, req, d)
}

// Settle gives back what was not used, and slots, and corrects what the flow took by what it cost. Flows that wait get what
// goes back.
func (s *scheduler[S]) Settle(_ context.Context, d *agentapi.LimiterDecision, o agentapi.Outcome) bool {
	unused := o.Ended == agentapi.EndedUnused
	if o.Costs != nil {
		s.correct(d, o)
	}
	return (unused || d.Slot() != 0) && s.giveBack(s.engine.now(), d, unused)
}

// giveBack returns to the entry what the decision gave the flow. It reports whether there was anything to return.
func (s *scheduler[S]) giveBack(now int64, d *agentapi.LimiterDecision, unused bool) bool {
	return s.returned(d, unused, func(e *keys.Entry[line[S]]) bool {
		waiting := e.State.waiting()
		if waiting {
			s.catchUp(e, now)
		}
		ok := s.of(e).rule.GiveBack(&e.State.tokens, now, d.Consumed, d.Slot(), unused)
		if waiting {
			e.State.queue.changes++
			s.serve(e, now)
		}
		return ok
	})
}
