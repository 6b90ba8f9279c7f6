package engine

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
)

// DefaultLeasedKeys is the default number of keys for which an engine has leased tokens at a time.
const DefaultLeasedKeys = 10_000

// WithLeasedKeys bounds the number of keys, of all components together, for which the engine has leased tokens at a time. Such a
// key takes about 200 bytes for as long as flows come. For other keys of components with policy.ShareLeased, the engine asks the
// store about each flow. The default is [DefaultLeasedKeys].
func WithLeasedKeys(n int) Option {
	return option(func(e *Engine) error {
		if n < 0 {
			return fmt.Errorf("WithLeasedKeys(%d): negative", n)
		}
		e.leased.limit = n
		return nil
	})
}

const (
	// demandSpan is the time that an engine draws tokens for, by what flows of the last such time have wanted.
	demandSpan = int64(50 * time.Millisecond)

	// reserveSpan is the time that it reserves tokens for, of those that will come. Where flows want three times what comes, four
	// engines ask 1.4 times for 100 flows. With half of the span it was 2.8 times.
	reserveSpan = int64(100 * time.Millisecond)

	// unusedSpan is how long leased tokens may be unused before they go back.
	unusedSpan = int64(100 * time.Millisecond)

	// collectEvery is how often an engine that has leases looks for such tokens.
	collectEvery = 25 * time.Millisecond

	// mostAwaited is for how many answers to other flows a flow waits. Then it asks by itself: what is drawn at a time is too little.
	mostAwaited = 2
)

// A lease is what an engine has drawn ahead of a key's tokens. The lock of the key's entry guards it.
type lease struct {
	rule *shared.Rule // the numbers by which it was drawn

	// held is what is drawn and not spent. Of that, up to coming is not there yet: it comes as the rule says, the last of it at
	// full.
	held, coming float64
	full         int64

	back float64 // what is to go back at once, without the wait for unused tokens

	// low is the least that was there since then.
	low   float64
	since int64

	// now and before are what flows have wanted in the span that began at began, and in the one before. Wanted is when the last came.
	now, before   float64
	began, wanted int64

	drawing *drawing // the question for more that is under way; nil for none
}

// A drawing is a question for more tokens. Other flows of its key wait for the answer.
type drawing struct {
	of   *shared.Ask
	done chan struct{}
	void bool // the key was reset meanwhile; guarded by the entry's lock

	failed bool // the store did not answer; set before done is closed
}

// want notes that a flow wants tokens.
func (s *lease) want(now int64, tokens float64) {
	switch passed := now - s.began; {
	case passed >= 2*demandSpan:
		s.began, s.before, s.now = now, 0, 0
	case passed >= demandSpan:
		s.began, s.before, s.now = s.began+demandSpan, s.now, 0
	}
	s.now += tokens
	s.wanted = now
}

// demand returns what flows have wanted lately, without the flow that came now and wants so much. It is a number of such flows.
func (s *lease) demand(now int64, own float64) float64 {
	passed := min(float64(now-s.began)/float64(demandSpan), 1)
	return math.Round(max(s.now+s.before*(1-passed)-own, 0)/own) * own
}

// fill returns how many tokens the rule brings in a nanosecond.
func (s *lease) fill() float64 { return s.rule.Fill / float64(s.rule.Interval) }

// usable returns how many tokens are there.
func (s *lease) usable(now int64) float64 {
	if s.coming == 0 {
		return s.held
	}
	if now >= s.full {
		s.coming = 0
		return s.held
	}
	return max(s.held-min(s.coming, float64(s.full-now)*s.fill()), 0)
}

// until returns how long until so many tokens are there, which is no more than are held.
func (s *lease) until(now int64, tokens float64) int64 {
	return max(s.full-now-int64((s.held-tokens)/s.fill()), 1)
}

// spend takes tokens, which are there.
func (s *lease) spend(now int64, tokens float64) {
	s.held = max(s.held-tokens, 0)
	s.low = min(s.low, s.usable(now))
}

// add puts in what was drawn. It may be used after a time.
func (s *lease) add(now int64, tokens float64, after time.Duration) {
	empty, coming := s.held <= source.Slack, s.held-s.usable(now)
	if s.held += tokens; after > 0 {
		s.coming, s.full = coming+tokens, now+int64(after)
	}
	if empty {
		s.since, s.low = now, s.usable(now)
	}
}

// follow has the lease go by the numbers that are in force. What was drawn by others goes back.
func (s *lease) follow(rule *shared.Rule) {
	if s.rule == rule {
		return
	}
	s.back += s.held
	s.held, s.coming, s.low, s.rule = 0, 0, 0, rule
}

// forget drops all tokens, because the key was reset.
func (s *lease) forget() {
	s.held, s.coming, s.low, s.back = 0, 0, 0, 0
	if s.drawing != nil {
		s.drawing.void = true
	}
}

// collect takes out what is to go back: what was not used for long enough, or all.
func (s *lease) collect(now int64, all bool) (tokens float64) {
	tokens, s.back = s.back, 0
	switch {
	case all:
		tokens += s.held
		s.held, s.coming, s.low = 0, 0, 0
	case now-s.since >= unusedSpan:
		unused := min(s.low, s.usable(now))
		tokens += unused
		s.held -= unused
		s.since, s.low = now, s.usable(now)
	}
	return tokens
}

// idle reports whether the lease has nothing, and nobody comes for it.
func (s *lease) idle(now int64) bool {
	return s.drawing == nil && s.held <= source.Slack && s.back == 0 && now-s.wanted >= unusedSpan
}

// heldAhead returns what the engine has drawn ahead.
func (a *account[S]) heldAhead() float64 {
	if a.lease == nil {
		return 0
	}
	return a.lease.held + a.lease.back
}

// spends decides about the flow by what the entry, which is locked, has ahead, if that is enough now or later. It reports whether it has.
func (l *sharedLimiter[S]) spends(e *keys.Entry[account[S]], rule *shared.Rule, now int64, d *agentapi.LimiterDecision) (decided bool) {
	s := e.State.lease
	if s == nil {
		return false
	}
	s.follow(rule)
	if s.usable(now)-d.Consumed >= -source.Slack && d.Consumed <= rule.Capacity+source.Slack {
		s.spend(now, d.Consumed)
		d.Remaining = e.State.left + s.held
		e.Unlock()
		l.counts.decision(d)
		return true
	}
	if d.Consumed > s.held {
		return false
	}
	wait := s.until(now, d.Consumed)
	d.Remaining = e.State.left + s.held
	e.Unlock()
	l.reject(e, d, now, wait)
	return true
}

func (l *sharedLimiter[S]) offhand(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, awaited int) (done bool, more *drawing) {
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel)
	if !l.scope(&req.Labels, d) {
		l.counts.decision(d)
		return true, nil
	}
	if !l.leased {
		return false, nil
	}
	e, n := l.open(&req.Labels, d.Label, now)
	if e == nil {
		return false, nil
	}
	d.Capacity = n.capacity
	s, rule := e.State.lease, n.rule.current()
	if s != nil && awaited == 0 {
		s.want(now, d.Consumed)
	}
	if l.spends(e, rule, now, d) {
		return true, nil
	}
	if s != nil && awaited < mostAwaited && d.Consumed <= rule.Capacity+source.Slack {
		more = s.drawing
	}
	e.Unlock()
	return false, more
}

// draw has the question of the flow ask for tokens ahead, and the flow use what is there. The entry is locked.
func (l *sharedLimiter[S]) draw(e *keys.Entry[account[S]], now int64, d *agentapi.LimiterDecision, ask *shared.Ask) {
	switch s := e.State.lease; {
	case d.Consumed == 0 || d.Consumed > ask.Rule.Capacity+source.Slack || l.engine.closed.Load():
	case s == nil:
		if l.engine.leased.room() {
			s = &lease{rule: ask.Rule}
			s.want(now, d.Consumed)
			e.State.lease = s
			l.engine.leased.begin(&leaser[S]{l, s, d.Label})
		}
	case s.drawing == nil:
		s.follow(ask.Rule)
		instances := float64(max(l.engine.store.Instances(), 1))
		room := max(ask.Rule.Capacity/2/instances-s.held, 0) // what the flow uses comes back if it is refused
		used := min(s.usable(now), d.Consumed)
		demand := s.demand(now, d.Consumed)
		if ahead := min(demand, room); ahead >= d.Consumed { // less would lie about in parts that are too small for a flow
			ask.Ahead = ahead
		}
		soon := demand * float64(reserveSpan) / float64(demandSpan)
		if reserve := min(soon, room, s.fill()*float64(reserveSpan)/instances); reserve >= d.Consumed {
			ask.Reserve = reserve
		}
		if used == 0 && ask.Ahead == 0 && ask.Reserve == 0 {
			return // there is nothing to wait for
		}
		s.spend(now, used)
		ask.Tokens -= used
		s.drawing = &drawing{of: ask, done: make(chan struct{})}
	}
}

// An outcome is what became of a question for tokens ahead.
type outcome struct {
	drawn  float64
	after  time.Duration
	used   bool // the flow has got what it asked for
	failed bool // the store has not answered
}

// drew ends the question's drawing, if it has one. If the flow does not use its part of the lease, that part goes back to the lease. Over is
// what goes back to the store instead, because the engine was closed. The entry is locked.
func (l *sharedLimiter[S]) drew(e *keys.Entry[account[S]], now int64, d *agentapi.LimiterDecision, ask *shared.Ask, o outcome) (over float64) {
	s := e.State.lease
	if s == nil || s.drawing == nil || s.drawing.of != ask {
		return 0
	}
	g := s.drawing
	s.drawing = nil
	back := d.Consumed - ask.Tokens
	if o.used {
		back = 0
	}
	switch {
	case g.void:
	case l.engine.closed.Load(): // what was there has gone back, or goes
		over = back + o.drawn
	case s.rule != ask.Rule:
		s.back += back + o.drawn
	default:
		if o.drawn > 0 {
			s.add(now, o.drawn, o.after)
		}
		s.held += back
	}
	g.failed = o.failed
	close(g.done)
	return over
}

// giveOver gives back what came when the engine was closed.
func (l *sharedLimiter[S]) giveOver(ctx context.Context, d *agentapi.LimiterDecision, ask *shared.Ask, tokens float64) {
	if tokens <= 0 {
		return
	}
	if _, err := l.engine.giveBack(ctx, []shared.Return{{Key: l.key(d.Label), Rule: ask.Rule, Tokens: tokens, Unused: true}}); err != nil {
		l.unpaid.Add(1)
	}
}

// refunds puts what the flow has not used into its key's lease, and reports whether it has.
func (l *sharedLimiter[S]) refunds(d *agentapi.LimiterDecision) (done bool) {
	if !l.leased || d.Local || d.Consumed == 0 {
		return false
	}
	l.account(d, func(e *keys.Entry[account[S]]) {
		s, rule := e.State.lease, l.of(e).rule.current()
		if s == nil || s.rule != rule || l.engine.closed.Load() {
			return
		}
		most := rule.Capacity / 2 / float64(max(l.engine.store.Instances(), 1))
		if done = s.held+d.Consumed <= most; done {
			s.held += d.Consumed
		}
	})
	return done
}

func (l *sharedLimiter[S]) leases() bool { return l.leased }

// await waits for the answer to the question of another flow, for as long as the check may take, and reports whether it has come. So
// long has passed of that.
func (e *Engine) await(ctx context.Context, req *agentapi.Request, passed time.Duration, more *drawing) bool {
	var late <-chan time.Time
	if req.Timeout > 0 {
		t := time.NewTimer(req.Timeout - passed)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-more.done:
		return true
	case <-late:
	case <-ctx.Done():
	}
	return false
}

// leased are the leases of an engine.
type leased struct {
	limit int
	begun chan struct{} // receives when there is a lease, with room for one
	runs  bool          // guarded by Engine.applying

	mu    sync.Mutex
	all   []leasing
	count int
}

// A leasing is the lease of a key.
type leasing interface {
	// collect takes out what is to go back. It reports whether the lease has ended.
	collect(now int64, all bool) (r shared.Return, of *sharedTally, ended bool)

	// collected notes what became of the return.
	collected(r *shared.Return, result shared.Result)
}

// room takes room for a lease, and reports whether there was any.
func (q *leased) room() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.count >= q.limit {
		return false
	}
	q.count++
	return true
}

// begin adds a lease, for which room was taken.
func (q *leased) begin(of leasing) {
	q.mu.Lock()
	q.all = append(q.all, of)
	q.mu.Unlock()
	select {
	case q.begun <- struct{}{}:
	default:
	}
}

func (q *leased) none() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.count == 0
}

// collectLeases gives back what is not used, until the engine is closed, and all then.
func (e *Engine) collectLeases() {
	for {
		select {
		case <-e.done:
			e.collect(true)
			return
		case <-e.leased.begun:
		}
		tick := time.NewTicker(collectEvery)
		for !e.leased.none() {
			select {
			case <-e.done:
				tick.Stop()
				e.collect(true)
				return
			case <-tick.C:
				e.collect(false)
			}
		}
		tick.Stop()
	}
}

// collect gives back what is not used, or all, by one call.
func (e *Engine) collect(all bool) {
	q, now := &e.leased, e.now()
	q.mu.Lock()
	list := q.all
	q.all = nil
	q.mu.Unlock()
	var batch []shared.Return
	var of []leasing
	var tallies []*sharedTally
	kept := list[:0]
	for _, one := range list {
		r, tally, ended := one.collect(now, all)
		if r.Tokens > 0 {
			batch, of, tallies = append(batch, r), append(of, one), append(tallies, tally)
		}
		if !ended {
			kept = append(kept, one)
		}
	}
	q.mu.Lock()
	q.count -= len(list) - len(kept)
	clear(list[len(kept):])
	q.all = append(kept, q.all...)
	q.mu.Unlock()
	if len(batch) == 0 {
		return
	}
	results, err := e.giveBack(e.store.detached(), batch)
	for i, one := range of {
		if err != nil {
			tallies[i].unpaid.Add(1)
		} else {
			one.collected(&batch[i], results[i])
		}
	}
}

// A leaser is the lease of a limiter's key.
type leaser[S any] struct {
	l    *sharedLimiter[S]
	s    *lease
	name string
}

func (o *leaser[S]) collect(now int64, all bool) (r shared.Return, of *sharedTally, ended bool) {
	e, n := o.l.known(o.name)
	if e == nil {
		return r, o.l.sharedTally, true
	}
	defer e.Unlock()
	if e.State.lease != o.s {
		return r, o.l.sharedTally, true
	}
	r = shared.Return{Key: o.l.key(o.name), Rule: n.rule.current(), Tokens: o.s.collect(now, all), Unused: true}
	if o.s.idle(now) {
		e.State.lease, ended = nil, true
	}
	return r, o.l.sharedTally, ended
}

func (o *leaser[S]) collected(r *shared.Return, result shared.Result) {
	if e, _ := o.l.known(o.name); e != nil {
		e.State.corrected(r, result)
		e.Unlock()
	}
}
