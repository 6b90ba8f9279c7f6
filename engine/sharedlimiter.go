package engine

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/policy"
)

// A sharedLimiter is a limiter whose state is in the store. What it keeps of a key itself is an account. A key beyond the engine's cap
// has none: it is in the store like any other, and the engine forgets at once what it learns of it.
type sharedLimiter[S any] struct {
	keyed[account[S], *budget[S]]
	tokensLabel string
	outage      policy.Outage
	leased      bool // tokens are drawn ahead
	*sharedTally
}

// A sharedTally is what a component counts whose state is in the store. The component that follows it goes on with it.
type sharedTally struct {
	local    atomic.Uint64 // decisions without the store
	unpaid   atomic.Uint64 // what could not be returned
	differs  atomic.Uint64 // answers to keys that another engine has used with other numbers
	reported atomic.Uint64 // of differs, in the log
	held     atomic.Int64  // until when flows may hold slots
	longest  atomic.Int64  // the longest that a flow may hold one
}

// A sharedLimits is how a limiter is configured whose state is in the store.
type sharedLimits[S any] = config[account[S], *budget[S]]

// sharing is how a shared limiter is configured beyond its keys.
type sharing struct {
	outage      policy.Outage
	tokensLabel string
	passThrough bool
	leased      bool
}

// shares reports whether a component is to have its state in the store, unless it is local.
func (e *Engine) shares(local bool) bool { return e.store != nil && !local }

func newSharedLimiter[S any](e *Engine, in *installed, c sharedLimits[S], p sharing) (component, error) {
	in.stage, in.shared = stageShared, true
	c.ruling, c.names = budgetRuling[S](), &e.store.names
	k, err := newKeyed(e, c)
	if err != nil {
		return nil, err
	}
	l := &sharedLimiter[S]{keyed: k, tokensLabel: p.tokensLabel, outage: p.outage, leased: p.leased, sharedTally: new(sharedTally)}
	l.passThrough = p.passThrough
	l.settles(p.tokensLabel, !l.component.Slots)
	l.component.Settler = l
	return l, nil
}

// follow has the limiter follow one of the same label and mode. The states are those of the store.
func (l *sharedLimiter[S]) follow(other component) bool {
	before, ok := other.(*sharedLimiter[S])
	if !ok || l.mode == nil || before.mode != l.mode {
		return false
	}
	l.followed(&before.keyed)
	l.sharedTally = before.sharedTally
	return true
}

func (l *sharedLimiter[S]) takeOver() { l.change(nil) }

func (l *sharedLimiter[S]) askAgain() { l.reconsider(nil) }

// oldest returns the earliest time at which a flow may have taken the slot that it holds.
func (l *sharedLimiter[S]) oldest(now int64) (since int64, ok bool) {
	return now - l.longest.Load(), now < l.held.Load()
}

// vacant reports whether all slots have been returned or have run out.
func (l *sharedLimiter[S]) vacant(now int64) bool {
	return now >= l.held.Load() && l.keyed.vacant(now)
}

// open returns the entry of the flow's key, locked, and its numbers. The entry is nil if there is no room for it.
func (l *sharedLimiter[S]) open(labels *agentapi.Labels, name string, now int64) (*keys.Entry[account[S]], *numbers[*budget[S]]) {
	if l.table == nil {
		l.single.Lock()
		return l.single, l.of(l.single)
	}
	if e := l.table.LockKnown(name); e != nil {
		e.Use(now)
		return e, l.of(e)
	}
	if !l.asking || l.table.HasRoom(name, now) { // the host's function is not asked in vain
		if e := l.table.LockOwn(name, now, l.fresh(labels, name)); e != nil {
			return e, l.of(e)
		}
	}
	return nil, l.unkept(name)
}

// unkept returns the numbers of a key that has no entry.
func (l *sharedLimiter[S]) unkept(name string) *numbers[*budget[S]] {
	t := l.terms.Load()
	place, _ := t.placed(name)
	return t.number(place)
}

// known returns the key's entry, locked, and its numbers. The entry is nil if there is none.
func (l *sharedLimiter[S]) known(name string) (*keys.Entry[account[S]], *numbers[*budget[S]]) {
	if l.table == nil {
		l.single.Lock()
		return l.single, l.of(l.single)
	}
	if e := l.table.LockKnown(name); e != nil {
		return e, l.of(e)
	}
	return nil, l.unkept(name)
}

// account calls f with the account of the decision's key, locked, if there is one.
func (l *sharedLimiter[S]) account(d *agentapi.LimiterDecision, f func(e *keys.Entry[account[S]])) {
	if e, _ := l.known(d.Label); e != nil {
		f(e)
		e.Unlock()
	}
}

func (l *sharedLimiter[S]) key(name string) shared.Key {
	return shared.Key{Policy: l.component.Policy, Component: l.component.ID, Label: l.component.LabelKey, Value: name}
}

func (l *sharedLimiter[S]) prepare(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, ask *shared.Ask) bool {
	e, n := l.open(&req.Labels, d.Label, now)
	d.Capacity = n.capacity
	*ask = shared.Ask{Key: l.key(d.Label), Rule: n.rule.current(), Tokens: d.Consumed, Dry: d.DryRun, Since: l.since(now, n.rule)}
	if l.component.Slots {
		ask.Holder = req.Session()
		ask.Tokens = min(ask.Tokens, source.MaxCost)
	}
	if e == nil {
		return true
	}
	a, want := &e.State, d.Consumed
	if l.leased {
		if l.spends(e, ask.Rule, now, d) {
			return false
		}
		if s := a.lease; s != nil && s.drawing == nil {
			want -= s.usable(now)
		}
	}
	wait, refused := a.refuses(now, ask.Rule, want)
	if !refused {
		if l.leased {
			l.draw(e, now, d, ask)
		}
		ask.Owed = a.report(now)
		e.Unlock()
		return true
	}
	d.Remaining = a.left + a.heldAhead()
	e.Unlock()
	l.reject(e, d, now, wait)
	return false
}

// since returns for how long the numbers of a key have been in force.
func (l *sharedLimiter[S]) since(now int64, b *budget[S]) time.Duration {
	at := l.terms.Load().at
	if b.changed != nil {
		at = max(at, b.changed())
	}
	return time.Duration(max(now-at, 0))
}

// reject drops the flow, which may come back after the wait. The entry, which is not locked, is that of its key; nil for none.
func (l *sharedLimiter[S]) reject(e *keys.Entry[account[S]], d *agentapi.LimiterDecision, now, wait int64) {
	if e != nil {
		l.rejected(e, d, now)
	}
	l.drop(d, agentapi.CauseNone, wait)
	l.counts.decision(d)
}

func (l *sharedLimiter[S]) answered(ctx context.Context, _ *agentapi.Request, now int64, d *agentapi.LimiterDecision,
	ask *shared.Ask, answer *shared.Answer, taken bool,
) {
	d.Remaining = answer.Left
	wait := max(min(int64(answer.Wait), source.Century), source.Never)
	if l.component.Slots && wait != source.Never { // the store knows when slots run out, which flows hardly ever do
		wait = 0
	}
	e, _ := l.known(d.Label)
	if e != nil {
		over := l.drew(e, now, d, ask, outcome{drawn: answer.Drawn, after: answer.After, used: answer.OK && taken})
		defer l.giveOver(ctx, d, ask, over)
		d.Remaining += e.State.heldAhead()
		if e.State.learn(now, ask.Rule, ask.Tokens, answer) && l.steady(ask.Rule) {
			l.differs.Add(1)
		}
		e.State.reported(now, ask.Owed, true)
		if l.component.Slots && wait != source.Never {
			wait = e.State.forecast(ask.Rule.Capacity)
		}
		e.Unlock()
	}
	if !answer.OK {
		l.reject(e, d, now, wait)
		return
	}
	// The decision says what the flow's own take has left. Of slots it does not count the flow.
	switch d.Untaken = !taken; {
	case !taken && !l.component.Slots:
		d.Remaining -= d.Consumed
	case !taken:
	case l.component.Slots:
		d.Hold(answer.Slot)
		d.Remaining += ask.Tokens
		l.holds(now, ask.Rule)
	default:
		d.Hold(answer.Slot)
	}
	l.counts.decision(d)
}

// steady reports whether all engines go by these numbers as long as they have the same policy. With an escalation, each goes by the load
// of its own.
func (l *sharedLimiter[S]) steady(r *shared.Rule) bool {
	own := l.terms.Load().own.rule
	return own.other == nil && r != nil
}

// raise makes the number at least n.
func raise(to *atomic.Int64, n int64) {
	for {
		old := to.Load()
		if old >= n || to.CompareAndSwap(old, n) {
			return
		}
	}
}

func (l *sharedLimiter[S]) unasked(now int64, d *agentapi.LimiterDecision, ask *shared.Ask) {
	d.Untaken, d.Remaining = true, ask.Rule.Capacity // which it has if nothing is known of it
	l.account(d, func(e *keys.Entry[account[S]]) {
		l.drew(e, now, d, ask, outcome{})
		e.State.reported(now, ask.Owed, false)
		if e.State.last != nil {
			d.Remaining = e.State.left + e.State.heldAhead()
		}
	})
	if !l.component.Slots {
		d.Remaining -= d.Consumed
	}
	l.counts.decision(d)
}

func (l *sharedLimiter[S]) unanswered(req *agentapi.Request, now int64, d *agentapi.LimiterDecision, ask *shared.Ask) {
	l.local.Add(1)
	d.Local = true
	e, n := l.open(&req.Labels, d.Label, now)
	if e == nil {
		d.Spilled = true
		e = l.table.LockSpill()
		n = l.of(e)
	}
	want := ask.Tokens
	if l.leased { // a part of it may have been there
		want = d.Consumed
		l.drew(e, now, d, ask, outcome{failed: true})
	}
	e.State.reported(now, ask.Owed, false)
	if l.outage == policy.OutageClosed && want > 0 { // what costs nothing is never refused
		e.Unlock()
		l.drop(d, agentapi.CauseNoStore, closedFor)
		l.counts.decision(d)
		return
	}
	got := e.State.take(now, n.rule, l.engine.store.Instances(), want, l.outage == policy.OutageOpen)
	if got.Slot != 0 && ask.Holder != (shared.Holder{}) {
		s := e.State.spare
		bind(s.by.from, &s.state, got.Slot, ask.Holder)
	}
	e.Unlock()
	d.Remaining = got.Left
	if !got.OK {
		l.reject(e, d, now, got.Wait)
		return
	}
	d.Hold(got.Slot)
	if l.component.Slots {
		l.holds(now, ask.Rule)
	}
	l.counts.decision(d)
}

func (l *sharedLimiter[S]) refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause) {
	d.Consumed = tokensOf(&req.Labels, l.tokensLabel)
	if l.scope(&req.Labels, d) {
		l.drop(d, cause, 0)
	}
	l.counts.decision(d)
}

// Settle gives back what was not used, and slots, and corrects what the flow took by what it cost.
func (l *sharedLimiter[S]) Settle(ctx context.Context, d *agentapi.LimiterDecision, o agentapi.Outcome) bool {
	return l.engine.settleOne(ctx, l, d, o)
}

// elsewhere reports false: each value has a key of its own in the store.
func (l *sharedLimiter[S]) elsewhere(*agentapi.LimiterDecision, *shared.Return) bool { return false }

func (l *sharedLimiter[S]) returns(d *agentapi.LimiterDecision, o agentapi.Outcome) (r shared.Return, needed, done bool) {
	unused := o.Ended == agentapi.EndedUnused
	took := d.Consumed != 0 || d.Slot() != 0
	if d.Scope == agentapi.ScopeNone || unused && !took {
		return r, false, false
	}
	if unused {
		count(l.counts, d, decisionsRefunded)
	}
	slot := l.component.Slots && d.Slot() != 0
	cost, settled := l.settled(d, o)
	if d.Untaken || !unused && !slot && !settled {
		return r, false, false
	}
	r = shared.Return{Key: l.key(d.Label), Slot: d.Slot(), Tokens: d.Consumed, Cost: cost, Unused: unused}
	if done, here := l.returnsHere(d, &r, slot, settled); here {
		return r, false, done
	}
	if settled && cost == d.Consumed {
		l.countSettlement(d, true, 0)
		return r, false, false
	}
	if unused && l.refunds(d) {
		return r, false, true
	}
	r.Rule = l.rule(d.Label)
	if d.Local { // a quota's period has another name in the store, and a slot is not there
		if slot {
			return r, false, false
		}
		r.Slot = 0
	}
	return r, true, false
}

// rule returns the numbers that the key goes by now.
func (l *sharedLimiter[S]) rule(name string) *shared.Rule {
	e, n := l.known(name)
	if e != nil {
		e.Unlock()
	}
	return n.rule.current()
}

// returnsHere is returns for what this process has granted in place of the store. Here is false if it has not, or has told the store since.
// A name over the wire does not say whose slot it is, so it is looked for here too.
func (l *sharedLimiter[S]) returnsHere(d *agentapi.LimiterDecision, r *shared.Return, slot, settled bool) (done, here bool) {
	if !d.Local && (d.Component != nil || !slot) {
		return false, false
	}
	try := func(e *keys.Entry[account[S]]) {
		var forgiven float64
		if done, here, forgiven = e.State.giveBackHere(l.engine.now(), r, settled); here && settled {
			l.countSettlement(d, true, forgiven)
		}
	}
	if !d.Spilled {
		l.account(d, try)
	}
	if l.table != nil && (d.Spilled || slot) && !here {
		e := l.table.Spill()
		e.Lock()
		try(e)
		e.Unlock()
	}
	return done, here
}

func (l *sharedLimiter[S]) returned(d *agentapi.LimiterDecision, o agentapi.Outcome, r *shared.Return, result shared.Result, err error) bool {
	_, settled := l.settled(d, o)
	if err != nil {
		l.unpaid.Add(1)
		if settled {
			l.countSettlement(d, false, max(r.Cost-r.Tokens, 0))
		}
		return false
	}
	if settled {
		l.countSettlement(d, true, result.Forgiven)
	}
	if result.Returned || settled {
		l.account(d, func(e *keys.Entry[account[S]]) {
			e.State.corrected(r, result)
			if result.Held > 0 && o.Ended != agentapi.EndedUnused {
				e.State.learnHold(result.Held)
			}
		})
	}
	return result.Returned && !settled
}

func (l *sharedLimiter[S]) peek(ctx context.Context, value string, now int64) (Usage, error) {
	e, n := l.met(value, now)
	e.Unlock()
	name := ""
	if l.table != nil {
		if name = l.namer.Name(value); e == l.table.Spill() {
			n = l.unkept(name)
		}
	}
	rule := n.rule.current()
	u, err := l.engine.store.Look(ctx, l.key(name), rule)
	if err != nil {
		return Usage{}, componentError(l.component.Policy, l.component.ID, err)
	}
	if e, _ := l.known(name); e != nil {
		e.State.looked(now, u.Remaining)
		u.Remaining += e.State.heldAhead()
		e.Unlock()
	}
	return Usage{Capacity: rule.Capacity, Remaining: u.Remaining, InFlight: u.InFlight}, nil
}

func (l *sharedLimiter[S]) reset(ctx context.Context, value string, _ int64) error {
	name := ""
	if l.table != nil {
		name = l.namer.Name(value)
	}
	if err := l.engine.store.Reset(ctx, l.key(name)); err != nil {
		return componentError(l.component.Policy, l.component.ID, err)
	}
	if e, _ := l.known(name); e != nil {
		s := e.State.lease
		if s != nil {
			s.forget()
		}
		e.State = account[S]{lease: s}
		e.Unlock()
	}
	return nil
}

// usage returns what the engine has last learned of the state of all flows.
func (l *sharedLimiter[S]) usage(string, int64) Usage {
	l.single.Lock()
	defer l.single.Unlock()
	rule := l.of(l.single).rule.current()
	u := Usage{Capacity: rule.Capacity, Remaining: rule.Capacity}
	if a := &l.single.State; a.last != nil {
		u.Remaining = a.left + a.heldAhead()
	}
	return u
}

func (l *sharedLimiter[S]) stats(now int64) ComponentStats {
	all := l.keyed.stats(l.usage, now)
	all.Shared, all.LocalDecisions, all.Unreturned, all.NumbersDiffer = true, l.local.Load(), l.unpaid.Load(), l.differs.Load()
	return all
}

// differing returns how many answers since the last call were about keys that another engine has used with other numbers.
func (l *sharedLimiter[S]) differing() uint64 {
	n := l.differs.Load()
	return n - l.reported.Swap(n)
}
