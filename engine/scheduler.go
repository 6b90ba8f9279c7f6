package engine

import (
	"cmp"
	"context"
	"errors"
	"math"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// errRetired sends a flow away that waits for a scheduler which is no longer in force.
var errRetired = errors.New("the scheduler is no longer in force")

// A scheduler admits a flow at once, or lets it wait in a queue for tokens, one queue for each key.
//
// Nobody serves the queue: whoever changes what is there hands on what there is to those who are first, under the lock
// of the key. A flow that waits is woken when its tokens are its own. Where tokens come by themselves, the queue has a
// timer, set for the one who is first.
type scheduler[S any] struct {
	keyed[line[S]]
	source    source.Source[S]
	meet      func(state *S, now int64, tokens float64, price *latencyCost) // counts the flows that come; nil where nobody does
	gave      func(state *S, now int64, tokens float64, price *latencyCost) // counts the flows that are let in; nil where nobody does
	letIn     func(state *S) float64                                        // of the load that is let in; nil where none is
	workloads *workloads
	margin    time.Duration
	maxQueue  int64
	room      atomic.Int64 // of maxQueue, for more flows that wait, over all keys: those may be as many as peers make up
	crowd     *crowd       // of the queues, where each key has one
	engine    *Engine
}

// A line is the state of one key: what there is, and who waits for it.
type line[S any] struct {
	tokens S
	queue  *queue // nil until somebody has to wait
}

func newQuotaScheduler(e *Engine, p policy.QuotaScheduler, c agentapi.Component) (component, error) {
	s, err := newScheduler(e, c, p.MaxIdle, &p.Scheduler, &bucket.Rule{
		Capacity: p.Capacity,
		Fill:     p.Fill,
		Interval: float64(p.Interval),
		Step:     p.StepFill,
		Delay:    p.DelayInitialFill,
	})
	if err != nil {
		return nil, err
	}
	s.passThrough, s.component.DryRun = p.PassThrough, p.DryRun
	return s, nil
}

func newConcurrencyScheduler(e *Engine, p policy.ConcurrencyScheduler, c agentapi.Component) (component, error) {
	rule := &slots.Rule{Limit: p.Max, MaxInflight: min(int64(p.MaxInflight), source.Century)}
	s, err := newScheduler(e, c, p.MaxIdle, &p.Scheduler, rule)
	if err != nil {
		return nil, err
	}
	s.passThrough, s.component.DryRun = p.PassThrough, p.DryRun
	return s, nil
}

func newScheduler[S any](e *Engine, c agentapi.Component, maxIdle time.Duration, p *policy.Scheduler, from source.Source[S]) (*scheduler[S], error) {
	w, err := compileWorkloads(p)
	if err != nil {
		return nil, err
	}
	s := &scheduler[S]{
		source:    from,
		workloads: w,
		margin:    cmp.Or(p.Margin, policy.DefaultMargin),
		maxQueue:  int64(cmp.Or(p.MaxQueue, policy.DefaultMaxQueue)),
		engine:    e,
	}
	s.room.Store(s.maxQueue)
	s.keyed = newKeyed(e, c, maxIdle,
		func(l *line[S], now int64) { from.Fresh(&l.tokens, now) },
		func(l *line[S], now int64) bool { return !l.waiting() && from.Idle(&l.tokens, now) })
	if s.table != nil {
		s.crowd = new(crowd)
	}
	s.component.Limiter = s
	s.component.Workload = s.workload
	return s, nil
}

// waiting reports whether any flow waits.
func (l *line[S]) waiting() bool { return l.waits() > 0 }

// waits is how many flows wait.
func (l *line[S]) waits() int {
	if l.queue == nil {
		return 0
	}
	return l.queue.len
}

// ahead is what the flows cost that go before one of that cost which would wait from now on.
func (l *line[S]) ahead(c claim, cost float64) source.Ahead {
	if !l.waiting() {
		return source.Ahead{}
	}
	return l.queue.ahead(c, cost)
}

// workload names a flow's class to those outside.
func (s *scheduler[S]) workload(labels *agentapi.Labels) (label string, priority float64) {
	if s.passThrough {
		return s.workloads.others.label, s.workloads.others.priority
	}
	of, _ := s.workloads.of(labels)
	c := s.workloads.claim(of, labels)
	if c.workload == of.label {
		return c.workload, c.priority
	}
	return keys.NewNamer(s.workloads.workloadLabel, s.engine.secret[:]).Name(c.workload), c.priority
}

func (s *scheduler[S]) decide(req *agentapi.Request, now int64, d *agentapi.LimiterDecision) {
	t := s.enter(req, now, d, func(*workload) time.Duration { return 0 })
	s.count(t.of, req, d)
}

// admit is decide for a flow that waits, at the longest until its deadline less the margin. It gives the time when it
// was decided. An error means that it was not, because the flow's caller has gone or the scheduler was retired.
func (s *scheduler[S]) admit(ctx context.Context, req *agentapi.Request, start, now int64, d *agentapi.LimiterDecision) (int64, error) {
	t := s.enter(req, now, d, func(of *workload) time.Duration { return s.patience(ctx, req, of, now-start) })
	if d.Dropped && d.Cause == agentapi.CauseNone && d.Wait() != source.Never && t.of.timeout >= 0 {
		d.Cause = agentapi.CauseLate // its workload may wait, and the margin takes all the time that it has
	}
	decided := now
	if t.waiter != nil {
		var err error
		decided, err = s.wait(ctx, req, start, t, d)
		t.of.waits.add(decided - now)
		s.engine.instruments.waited(ctx, &s.component, t.of, decided-now)
		if err != nil {
			return decided, err
		}
	}
	s.count(t.of, req, d)
	return decided, nil
}

// A ticket is a flow's place in a queue.
type ticket[S any] struct {
	*waiter  // nil where the flow has been decided about
	of       *workload
	claim    claim
	entry    *keys.Entry[line[S]]
	patience time.Duration
}

// enter decides about the flow, or puts it into the queue. Only then does it ask how long a flow of the workload may
// wait, for that takes a look at the clock.
func (s *scheduler[S]) enter(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, patience func(*workload) time.Duration) ticket[S] {
	of, known := s.workloads.of(&req.Labels)
	t := ticket[S]{of: of}
	price := of.latency
	tokens, said := tokensSaid(&req.Labels, s.workloads.tokensLabel)
	if said {
		price = nil
	} else {
		tokens = of.cost()
	}
	d.Consumed = tokens
	if !s.scope(&req.Labels, d) {
		return t
	}
	var r reservation
	for {
		longest, leave := s.stand(req, now, d, &t, price, known, patience, &r)
		if longest == nil {
			break
		}
		// Only one entry is locked at a time, so that two flows that look for room do not wait for each other.
		r = reservation{has: longest.turnOut(leave), own: true}
	}
	if r.has {
		s.room.Add(1)
	}
	return t
}

// A reservation is the room that a flow of another key has left to this one.
type reservation struct {
	has bool
	own bool // no room is to be looked for at other keys any more
}

// stand is enter, for one who has its bucket. Where there is no room, and another key has a longer queue, it decides
// nothing, and returns that queue, and how many flows are left to it.
func (s *scheduler[S]) stand(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, t *ticket[S], price *latencyCost, known bool,
	patience func(*workload) time.Duration, r *reservation,
) (longest *queue, leave int) {
	e := s.lock(d, now)
	defer e.Unlock()
	l, of := &e.State, t.of
	if s.meet != nil {
		s.meet(&l.tokens, now, d.Consumed, price)
	}
	if s.gave != nil && d.DryRun { // it is let in, whatever is decided
		s.gave(&l.tokens, now, d.Consumed, price)
	}
	if !known {
		s.drop(d, agentapi.CauseLongLabel, 0)
		return nil, 0
	}
	if l.waiting() {
		s.serve(e, now) // what has come by now is for those who wait
	}
	if !l.waiting() || d.Consumed == 0 {
		if got := s.source.Take(&l.tokens, now, d.Consumed); got.OK {
			if s.gave != nil && !d.DryRun {
				s.gave(&l.tokens, now, d.Consumed, price)
			}
			fill(d, got)
			return nil, 0
		}
	}
	t.claim, t.entry, t.patience = s.workloads.claim(of, &req.Labels), e, patience(of)
	cost := s.source.Cost(d.Consumed)
	least, likely := s.source.Forecast(&l.tokens, now, l.ahead(t.claim, cost), d.Consumed)
	d.Remaining = s.source.Usage(&l.tokens, now).Remaining
	switch {
	case likely == source.Never:
		s.drop(d, agentapi.CauseNone, likely)
		return nil, 0
	case t.patience == 0 && (!l.waiting() || least > 0):
		s.drop(d, agentapi.CauseNone, s.estimate(l, now, t.claim, cost, d.Consumed))
		return nil, 0
	}
	until := immortal
	if t.patience < forever {
		until = now + int64(t.patience)
	}
	if least > int64(t.patience) {
		if least, likely = s.reconsider(l, now, until, t.claim, cost, d.Consumed, least, likely); least > int64(t.patience) {
			s.drop(d, agentapi.CauseLongQueue, likely)
			return nil, 0
		}
	}
	// A flow that does not wait stands in the queue for a moment only, and needs no room.
	placed := t.patience > 0
	if placed && !r.has && !s.takeRoom() {
		if others := l.waits() + 1; !r.own {
			if longest = s.crowd.longest(others); longest != nil {
				return longest, others
			}
		}
		if !evict(l.queue, t.claim) {
			s.drop(d, agentapi.CauseQueueFull, s.estimate(l, now, t.claim, cost, d.Consumed))
			return nil, 0
		}
	}
	if placed {
		r.has = false // it is the flow's
	}
	if l.queue == nil {
		l.queue = s.newQueue(e)
	}
	w := &waiter{tokens: d.Consumed, cost: cost, price: price, until: until, placed: placed}
	l.queue.push(w, t.claim)
	s.serve(e, now) // it may be the first, and need less than who was
	switch {
	case w.served:
		w.fill(d)
	case t.patience == 0:
		l.queue.remove(w)
		s.serve(e, now)
		s.drop(d, agentapi.CauseNone, likely)
	default:
		w.ready = make(chan struct{})
		t.waiter = w
	}
	return nil, 0
}

// takeRoom takes the room of one who waits; false says that there is none. The queue gives it back.
func (s *scheduler[S]) takeRoom() bool {
	if s.room.Add(-1) < 0 {
		s.room.Add(1)
		return false
	}
	return true
}

// evict makes room for a flow of the claim where there is none: the newest flow of the largest share leaves the queue of
// the same key. It reports whether the flow has that room now.
func evict(q *queue, c claim) bool {
	if q == nil {
		return false
	}
	w := q.evictable(c)
	if w == nil {
		return false
	}
	q.evict(w)
	return true
}

// newQueue makes the queue of an entry.
func (s *scheduler[S]) newQueue(e *keys.Entry[line[S]]) *queue {
	q := newQueue(&s.room, func() { s.ring(e) })
	if q.crowd = s.crowd; q.crowd != nil {
		q.turnOut = func(least int) bool {
			e.Lock()
			defer e.Unlock()
			if q.len <= least {
				return false
			}
			q.evict(q.newest())
			s.serve(e, s.engine.now()) // another flow may be the first now
			return true
		}
	}
	return q
}

// wait waits for the flow to be served, and decides.
func (s *scheduler[S]) wait(ctx context.Context, req *agentapi.Request, start int64, t ticket[S], d *agentapi.LimiterDecision) (int64, error) {
	var timer *time.Timer
	var expired <-chan time.Time
	var crowded <-chan struct{}
	if t.patience < forever {
		timer = time.NewTimer(t.patience)
		defer timer.Stop()
		expired, crowded = timer.C, req.Crowded()
	}
	retired := false
	for waiting := true; waiting; {
		waiting = false
		select {
		case <-t.ready:
		case <-expired:
		case <-ctx.Done():
		case <-s.engine.done:
		case <-s.retired:
			retired = true
		case <-crowded:
			now := s.engine.now()
			timer.Reset(min(s.timeLeft(ctx, req, now-start), time.Duration(t.until-now)))
			waiting, crowded = true, nil
		}
	}
	e, l := t.entry, &t.entry.State
	e.Lock()
	defer e.Unlock()
	now := s.engine.now()
	s.serve(e, now) // at the last moment
	gone := ctx.Err()
	switch {
	case t.served && gone == nil:
		t.fill(d)
		return now, nil
	case t.served:
		s.source.GiveBack(&l.tokens, now, t.tokens, t.slot, true)
		l.queue.version++
	case !t.evicted:
		l.queue.remove(t.waiter)
	}
	s.serve(e, now)
	switch {
	case gone != nil: // no caller hears when to retry
		s.drop(d, agentapi.CauseTimeout, 0)
		return now, gone
	case s.engine.closed.Load(): // also where another event came first: no flow may run because of a shutdown
		s.drop(d, agentapi.CauseClosed, 0)
		return now, nil
	case t.evicted:
		s.drop(d, agentapi.CauseQueueFull, s.estimate(l, now, t.claim, t.cost, t.tokens))
		return now, nil
	}
	s.drop(d, agentapi.CauseTimeout, s.estimate(l, now, t.claim, t.cost, t.tokens))
	if retired {
		return now, errRetired
	}
	return now, nil
}

// serve hands what there is to those who are first, and sets the alarm for the next. The entry is locked.
func (s *scheduler[S]) serve(e *keys.Entry[line[S]], now int64) {
	s.catchUp(e, now)
	s.hand(e, now)
	e.State.queue.setAlarm(s.engine.now)
}

// catchUp serves those who were due before now, each at its time: alarms are late, and what comes to a full source
// meanwhile is lost though somebody waits for it. It goes before all that gives something to a source for which somebody
// waits, and leaves the alarm to serve. The entry is locked.
func (s *scheduler[S]) catchUp(e *keys.Entry[line[S]], now int64) {
	for q := e.State.queue; q.due > 0 && q.due < now; {
		s.hand(e, q.due)
	}
}

// hand gives what there is at a time to the flows that are first, and notes when the next is due. Once the engine is closed it
// serves none: no flow may run because the others were rejected.
func (s *scheduler[S]) hand(e *keys.Entry[line[S]], at int64) {
	q := e.State.queue
	q.due = 0
	if s.engine.closed.Load() {
		return
	}
	for w := q.first(); w != nil; w = q.first() {
		got := s.source.Take(&e.State.tokens, at, w.tokens)
		if !got.OK {
			if got.Wait > 0 {
				q.due = at + got.Wait
			}
			return
		}
		q.pop()
		if s.gave != nil {
			s.gave(&e.State.tokens, at, w.tokens, w.price)
		}
		w.served, w.slot, w.left = true, got.Slot, got.Left
		if w.ready != nil {
			close(w.ready)
		}
	}
}

// ring is what the alarm of the entry's queue does.
func (s *scheduler[S]) ring(e *keys.Entry[line[S]]) {
	e.Lock()
	defer e.Unlock()
	e.State.queue.rings = 0
	s.serve(e, s.engine.now())
}

// count counts a decision, by the flow's workload. Tokens count as where flows wait: in a sum that is infinite nobody
// sees the others.
func (s *scheduler[S]) count(of *workload, req *agentapi.Request, d *agentapi.LimiterDecision) {
	of.counts.decision(d)
	switch {
	case !d.Passed():
		of.drops[d.Cause].Add(1)
		addFloat(of.counts, d, tokensRejected, min(tokensOf(&req.Labels, s.workloads.tokensLabel, of.cost()), source.MaxCost))
	case d.Dropped:
		addFloat(of.counts, d, tokensAccepted, min(tokensOf(&req.Labels, s.workloads.tokensLabel, of.cost()), source.MaxCost))
	default:
		addFloat(of.counts, d, tokensAccepted, min(d.Consumed, source.MaxCost))
	}
}

// forever is how long a flow may wait that has all the time.
const forever time.Duration = math.MaxInt64

// patience is how long a flow of the workload may wait that has asked for so long already: until it needs its answer,
// less what that takes to arrive.
func (s *scheduler[S]) patience(ctx context.Context, req *agentapi.Request, of *workload, asked int64) time.Duration {
	if of.timeout < 0 {
		return 0
	}
	wait := s.timeLeft(ctx, req, asked)
	if of.timeout > 0 {
		wait = min(wait, of.timeout)
	}
	return wait
}

// timeLeft is how long the flow may wait by its deadline and its own timeout.
func (s *scheduler[S]) timeLeft(ctx context.Context, req *agentapi.Request, asked int64) time.Duration {
	left := forever
	if at, ok := ctx.Deadline(); ok {
		left = time.Until(at)
	}
	if req.Timeout > 0 {
		left = min(left, req.Timeout-time.Duration(asked))
	}
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

func (s *scheduler[S]) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	of, _ := s.workloads.of(&req.Labels)
	d.Consumed = tokensOf(&req.Labels, s.workloads.tokensLabel, of.cost())
	if s.scope(&req.Labels, d) {
		s.drop(d, cause, 0)
	}
	s.count(of, req, d)
}

func (s *scheduler[S]) giveBack(now int64, d *agentapi.LimiterDecision, unused bool) bool {
	return s.returned(d, unused, func(e *keys.Entry[line[S]]) bool {
		waiting := e.State.waiting()
		if waiting {
			s.catchUp(e, now)
		}
		ok := s.source.GiveBack(&e.State.tokens, now, d.Consumed, d.Slot(), unused)
		if waiting {
			e.State.queue.version++
			s.serve(e, now)
		}
		return ok
	})
}
