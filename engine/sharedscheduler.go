package engine

import (
	"context"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/engine/internal/wfq"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/policy"
)

// A sharedScheduler is a scheduler whose tokens or slots come from the store. Flows wait in the queues of this process, as in those of
// any scheduler. The queue says which flows of a workload come first. The store says which workloads are served, over all engines: what
// it grants is for the first flows of a workload.
//
// While flows wait at a key, one goroutine asks the store for them: when the key's next turn is due as the store has said, when the
// store wakes it, and when flows of another workload come, but not at a higher rate than [pace] says. A flow that
// comes when none waits is asked for at once. So is a flow that may not wait; the answer decides about it.
//
// While the store does not answer, this process serves the queue by its part of the tokens, or as OnOutage says.
type sharedScheduler[S any] struct {
	*scheduler[drawnState[S]]
	outage policy.Outage
	*sharedTally
}

// A far is what a scheduler knows of a store. All of it is called with the entry locked.
type far[S any] interface {
	// begin is called when a flow comes.
	begin(e *keys.Entry[line[S]], now int64)

	// here reports whether this process serves the queue.
	here(e *keys.Entry[line[S]]) bool

	// closed reports whether no flow is admitted, because the store does not answer.
	closed(e *keys.Entry[line[S]]) bool

	// turn returns the least time that a flow of the claim must wait, as the store has said; 0 if that is not known. A flow that may
	// not wait goes by what the store said to one that did not, too. The store learns of others in any case.
	turn(e *keys.Entry[line[S]], now int64, w wish, waits bool) int64

	// came notes that a flow has come to the queue.
	came(e *keys.Entry[line[S]], w *waiter)

	// attend has the store asked for the flows that wait.
	attend(e *keys.Entry[line[S]])

	// alone has this process decide about a flow, because the store has not answered in time. Closed reports whether it admits none.
	alone(e *keys.Entry[line[S]], now int64, f *pending) (got source.Taken, closed bool)

	// unneeded gives back what a flow has got that has gone.
	unneeded(e *keys.Entry[line[S]], w *waiter)
}

const (
	mostListed    = 32                     // flows of a workload that the store knows of
	mostWorkloads = 64                     // that the store knows of: peers may make up any number
	refresh       = 500 * time.Millisecond // after which the store would take flows that wait for gone is twice as long
	fastest       = 5 * time.Millisecond   // between two questions for a key
	askAgain      = 100 * time.Millisecond // after the store has not answered
	spilledName   = "\x00spilled"          // the value that those beyond the cap of keys share in the store
)

// draws is what asks the store for the flows that wait at a key. The lock of the entry guards it, except kick and woken.
type draws struct {
	kick  chan struct{} // wakes the goroutine
	woken atomic.Bool   // by the store

	sent    int64          // when the store was asked last
	onWire  bool           // it has not answered yet
	next    int64          // when the next turn is due; 0 if that is not known
	soon    bool           // there is something to tell the store
	urgent  bool           // a flow that does not wait has come since
	short   bool           // all that were listed got theirs, and others wait
	listed  map[string]int // flows that the store takes to wait here, by workload
	rule    *shared.Rule   // that it was asked with
	granted float64        // to this key, since then
	since   int64

	// once are the flows that do not wait, in the order in which they came. The first asked of them came before the store was asked
	// last: its answer is for them, too, even if it was not told of them.
	once  []*waiter
	asked int

	back []shared.Grant // what came for flows that had gone
}

// A listing is what the store was told of a workload.
type listing struct {
	waiters []*waiter
	more    bool // others wait
}

func newSharedScheduler[S any](e *Engine, in *installed, c limits[drawnState[S]], p *policy.Scheduler, outage policy.Outage, passThrough bool,
) (*sharedScheduler[S], error) {
	in.shared = true
	c.names = &e.store.names
	of, err := newScheduler(e, c, p)
	if err != nil {
		return nil, err
	}
	s := &sharedScheduler[S]{scheduler: of, outage: outage, sharedTally: new(sharedTally)}
	s.far, s.passThrough = s, passThrough
	s.settles(p.TokensLabel, !s.component.Slots)
	s.component.Settler = s
	return s, nil
}

func (s *sharedScheduler[S]) follow(other component) bool {
	before, ok := other.(*sharedScheduler[S])
	if !ok || !s.scheduler.follow(before.scheduler) {
		return false
	}
	s.sharedTally = before.sharedTally
	return true
}

// oldest returns the earliest time at which a flow may have taken the slot that it holds.
func (s *sharedScheduler[S]) oldest(now int64) (since int64, ok bool) {
	return now - s.longest.Load(), now < s.held.Load()
}

// vacant reports whether all slots have been returned or have run out.
func (s *sharedScheduler[S]) vacant(now int64) bool {
	return now >= s.held.Load() && s.keyed.vacant(now)
}

func (s *sharedScheduler[S]) ask(ctx context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (int64, error) {
	now, err := s.scheduler.ask(ctx, req, a, d)
	if d.Local && err == nil {
		s.local.Add(1)
		s.engine.store.unanswered.Add(1)
	}
	return now, err
}

// from returns the numbers of the entry.
func (s *sharedScheduler[S]) from(e *keys.Entry[line[drawnState[S]]]) *drawnFrom[S] {
	return s.of(e).rule.(*drawnFrom[S]) //nolint:forcetypeassert // it has no others
}

// key returns the name that the entry has in the store.
func (s *sharedScheduler[S]) key(e *keys.Entry[line[drawnState[S]]]) shared.Key {
	k := shared.Key{Policy: s.component.Policy, Component: s.component.ID, Label: s.component.LabelKey}
	switch {
	case s.table == nil:
	case e == s.table.Spill():
		k.Value = spilledName
	default:
		k.Value, _ = e.Key()
	}
	return k
}

// workloadName returns the name that a claim's workload has in the store.
func (s *sharedScheduler[S]) workloadName(c wfq.Claim) string {
	if s.workloads.priorityLabel == "" { // engines with other numbers mean the same one
		return c.Workload
	}
	return c.Workload + "\x00" + strconv.FormatFloat(c.Priority, 'g', -1, 64)
}

func (s *sharedScheduler[S]) begin(e *keys.Entry[line[drawnState[S]]], now int64) {
	if st := &e.State.tokens; st.here && st.draws == nil && now >= st.again && !s.engine.store.Down() {
		st.here = false
	}
}

func (s *sharedScheduler[S]) here(e *keys.Entry[line[drawnState[S]]]) bool {
	return e.State.tokens.here
}

func (s *sharedScheduler[S]) closed(e *keys.Entry[line[drawnState[S]]]) bool {
	return e.State.tokens.here && s.outage == policy.OutageClosed
}

func (s *sharedScheduler[S]) turn(e *keys.Entry[line[drawnState[S]]], now int64, w wish, waits bool) int64 {
	st, name := &e.State.tokens, s.workloadName(w.claim)
	if d := st.draws; d != nil && e.State.waiting() && d.next > now && d.listed[name] > 0 {
		return d.next - now
	}
	if !waits && st.refused == name {
		if wait, ok := st.refuses(now, s.from(e).current(), w.tokens); ok {
			return wait
		}
	}
	return 0
}

func (s *sharedScheduler[S]) came(e *keys.Entry[line[drawnState[S]]], w *waiter) {
	if w.Flow.once {
		s.attend(e)
	}
	d := e.State.tokens.draws
	switch {
	case d == nil:
		return
	case w.Flow.once:
		d.once, d.urgent = append(d.once, w), true
	case d.listed[s.workloadName(w.Claim())] > 0:
		return
	}
	d.soon = true
	d.wake()
}

// wake has the goroutine look what is to be done.
func (d *draws) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

func (s *sharedScheduler[S]) attend(e *keys.Entry[line[drawnState[S]]]) {
	st := &e.State.tokens
	switch d := st.draws; {
	case d == nil && e.State.waiting():
		d := &draws{kick: make(chan struct{}, 1), since: s.engine.now()}
		if s.engine.store.begin(func() { s.draw(e, d) }) {
			st.draws = d
		}
	case d == nil:
	case !e.State.waiting() && !d.onWire:
		d.wake()
	case d.rule != nil && d.rule != s.from(e).current():
		d.soon = true
		d.wake()
	}
}

func (s *sharedScheduler[S]) alone(e *keys.Entry[line[drawnState[S]]], now int64, f *pending) (got source.Taken, closed bool) {
	if s.outage == policy.OutageClosed {
		return got, true
	}
	from, st := s.from(e), &e.State.tokens
	got = st.take(now, from.budget, from.store.Instances(), f.tokens, from.open)
	bind[drawnState[S]](from, st, got.Slot, f.session)
	return got, false
}

func (s *sharedScheduler[S]) unneeded(e *keys.Entry[line[drawnState[S]]], w *waiter) {
	s.giveLater([]shared.Return{
		{Key: s.key(e), Rule: s.from(e).current(), Slot: w.Flow.slot, Tokens: w.Flow.tokens, Unused: true, Queued: true},
	})
}

// giveLater gives back what flows have got that have gone. It does not wait. If the call fails, the store goes on returning the slots.
func (s *sharedScheduler[S]) giveLater(batch []shared.Return) {
	back := func() {
		_, _ = s.engine.giveBack(s.engine.store.detached(), batch) // the flows' callers have gone
	}
	if !s.engine.store.begin(back) { // the engine was closed meanwhile, so no flow waits for the entry
		back()
	}
}

// draw asks the store for the flows that wait at the key until there are none, and there is nothing to give back.
func (s *sharedScheduler[S]) draw(e *keys.Entry[line[drawnState[S]]], d *draws) {
	stop := func() {}
	defer func() { stop() }()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for waited := false; ; {
		e.Lock()
		ask, listings := s.list(e, d)
		if ask == nil {
			e.State.tokens.draws = nil
			e.Unlock()
			return
		}
		e.Unlock()
		// It is for all flows that wait, and what comes for one that has gone is given back.
		answer, err := s.engine.store.Draw(s.engine.store.detached(), ask)
		e.Lock()
		s.drew(e, d, ask, listings, &answer, err)
		key := ask.Key
		e.Unlock()
		for pause := s.pause(e, d); pause > 0; pause = s.pause(e, d) {
			if !waited {
				waited = true
				stop = s.engine.store.Wake(key, func() { d.woken.Store(true); d.wake() })
			}
			timer.Reset(pause)
			select {
			case <-timer.C:
			case <-d.kick:
			case <-s.engine.done: // there is no pause any more
			}
		}
	}
}

// list returns what the store is to be told, and the flows of each workload. It is nil if there is nothing. After Close no flow waits.
func (s *sharedScheduler[S]) list(e *keys.Entry[line[drawnState[S]]], d *draws) (*shared.Drawing, []listing) {
	l, st, from, now := &e.State, &e.State.tokens, s.from(e), s.engine.now()
	rule := from.current()
	ask := &shared.Drawing{Key: s.key(e), Rule: rule, Unneeded: d.back, Once: true}
	at := s.terms.Load().at
	if from.changed != nil {
		at = max(at, from.changed())
	}
	ask.Since = time.Duration(max(now-at, 0))
	var listings []listing
	told := make(map[string]int)
	if l.waiting() && !s.engine.closed.Load() {
		turns := l.queue.Turns(mostListed)
		for dismissHopeless(l.queue, turns, rule) {
			turns = l.queue.Turns(mostListed)
		}
		ask.Once = len(turns) <= mostWorkloads
		for _, of := range turns[:min(len(turns), mostWorkloads)] {
			w := shared.Waiting{Workload: s.workloadName(of.Claim), Weight: of.Claim.Priority}
			for _, one := range of.Waiters {
				w.Costs = append(w.Costs, drawCost(rule, one))
				ask.Once = ask.Once && one.Flow.once
				if one.Flow.session != ([16]byte{}) && w.Holders == nil && rule.Kind == shared.Slots {
					w.Holders = make([]shared.Holder, 0, len(of.Waiters))
				}
			}
			for _, one := range of.Waiters {
				if w.Holders != nil {
					w.Holders = append(w.Holders, one.Flow.session)
				}
			}
			ask.Once = ask.Once && !of.More
			told[w.Workload] = len(w.Costs)
			ask.Waiting, listings = append(ask.Waiting, w), append(listings, listing{of.Waiters, of.More})
		}
	}
	if len(ask.Waiting) == 0 && len(d.back) == 0 && (len(d.listed) == 0 || st.here) {
		return nil, nil
	}
	ask.Owed = st.report(now)
	d.woken.Store(false)
	d.sent, d.onWire, d.soon, d.urgent, d.short, d.next, d.listed, d.rule, d.back = now, true, false, false, false, 0, told, rule, nil
	d.asked = len(d.once)
	return ask, listings
}

// drawCost is what a flow costs in the store.
func drawCost(r *shared.Rule, w *waiter) float64 {
	if r.Kind == shared.Slots {
		return min(w.Flow.tokens, source.MaxCost)
	}
	return w.Flow.tokens
}

// dismissHopeless sends flows away that never get what they cost, because the numbers have changed since they came. It reports whether
// there were any.
func dismissHopeless(q *queue, turns []wfq.Turns[pending], r *shared.Rule) (found bool) {
	for _, of := range turns {
		for _, w := range of.Waiters {
			if r.Capacity <= 0 || r.Kind == shared.Bucket && w.Flow.tokens > r.Capacity+source.Slack {
				q.dismiss(w)
				found = true
			}
		}
	}
	return found
}

// drew has the flows run that the store has granted something.
func (s *sharedScheduler[S]) drew(e *keys.Entry[line[drawnState[S]]], d *draws, ask *shared.Drawing, listings []listing, answer *shared.Drawn, err error) {
	st, now := &e.State.tokens, s.engine.now()
	d.onWire = false
	st.reported(now, ask.Owed, err == nil)
	if err != nil {
		s.failed(e, d, ask, err, now)
		return
	}
	s.engine.succeeded()
	st.here = false
	differs := answer.Differs && st.last == ask.Rule
	if differs && s.terms.Load().own.rule.(*drawnFrom[S]).other == nil { //nolint:forcetypeassert // it has no others
		s.differs.Add(1)
	}
	st.left, st.at, st.last = answer.Left, now, ask.Rule
	if answer.Next > 0 {
		d.next = now + min(int64(answer.Next), source.Century)
	}
	for _, g := range answer.Grants {
		for i := range ask.Waiting {
			if ask.Waiting[i].Workload == g.Workload {
				s.grant(e, d, ask, &listings[i], g, now)
			}
		}
	}
	more := true // there may be more for others: none that was listed waits any longer
	for _, of := range listings {
		for _, w := range of.waiters {
			if w.Waits() && answer.Next < 0 {
				e.State.queue.decide(w, agentapi.CauseNone, source.Never)
			}
			more = more && !w.Waits()
		}
	}
	if !more {
		s.refuseOnce(e, d, ask, answer, now)
	}
	d.once = slices.DeleteFunc(d.once, func(w *waiter) bool { return !w.Waits() })
	d.urgent = d.urgent || len(d.once) > 0
	if ask.Once {
		d.listed = nil
	}
	if q := e.State.queue; q != nil {
		q.changes++
		s.serve(e, now)
	}
	if more && !e.State.waiting() {
		d.since, d.granted = now, 0 // what was there at once does not say how fast more comes
	}
}

// refuseOnce drops the flows that do not wait, and came before the store was asked: there is nothing left for them.
func (s *sharedScheduler[S]) refuseOnce(e *keys.Entry[line[drawnState[S]]], d *draws, ask *shared.Drawing, answer *shared.Drawn, now int64) {
	st, wait := &e.State.tokens, int64(answer.Next)
	if wait == 0 && ask.Rule.Kind == shared.Slots {
		wait = st.forecast(ask.Rule.Capacity)
	}
	for _, w := range d.once[:d.asked] {
		if w.Waits() {
			st.learn(now, ask.Rule, w.Flow.tokens, &shared.Answer{Left: answer.Left, Wait: answer.Next})
			st.refused = s.workloadName(w.Claim())
			e.State.queue.decide(w, agentapi.CauseNone, wait)
		}
	}
}

// grant has the flows of a workload run that the store has granted something.
func (s *sharedScheduler[S]) grant(e *keys.Entry[line[drawnState[S]]], d *draws, ask *shared.Drawing, of *listing, g shared.Grant, now int64) {
	next := 0
	for i, tokens := range g.Tokens {
		for next < len(of.waiters) && drawCost(ask.Rule, of.waiters[next]) != tokens {
			next++ // the store has left it out
		}
		var slot uint64
		if i < len(g.Slots) {
			slot = g.Slots[i]
			s.holds(now, ask.Rule)
		}
		if next == len(of.waiters) || !of.waiters[next].Waits() || s.engine.closed.Load() {
			back := shared.Grant{Workload: g.Workload, Tokens: []float64{tokens}}
			if slot != 0 {
				back.Slots = []uint64{slot}
			}
			d.back, d.soon = append(d.back, back), true
			next = min(next+1, len(of.waiters)) // more may come than was asked for
			continue
		}
		w := of.waiters[next]
		next++
		e.State.queue.Serve(w)
		w.Flow.slot, w.Flow.left = slot, e.State.tokens.left
		if slot != 0 {
			w.Flow.left += tokens // what is left of slots does not count the flow
		}
		d.granted += tokens
		close(w.Flow.ready)
	}
	d.short = d.short || of.more && next == len(of.waiters)
	if d.listed[g.Workload] -= next; d.listed[g.Workload] <= 0 {
		delete(d.listed, g.Workload)
	}
}

// failed has this process serve the queue, because the store has not answered.
func (s *sharedScheduler[S]) failed(e *keys.Entry[line[drawnState[S]]], d *draws, ask *shared.Drawing, err error, now int64) {
	s.engine.countFailure(err, 0)
	d.listed = nil
	var back []shared.Return
	for _, g := range ask.Unneeded {
		for i, slot := range g.Slots { // tokens may have gone back already
			back = append(back, shared.Return{Key: ask.Key, Rule: ask.Rule, Slot: slot, Tokens: g.Tokens[i], Unused: true, Queued: true})
		}
	}
	if len(back) > 0 {
		s.giveLater(back)
	}
	st := &e.State.tokens
	st.here, st.again = true, now+int64(askAgain)
	q := e.State.queue
	if q == nil || s.engine.closed.Load() {
		return
	}
	q.changes++
	for w := q.First(); w != nil && s.closed(e); w = q.First() {
		w.Flow.local = true
		q.decide(w, agentapi.CauseNoStore, closedFor)
	}
	s.serve(e, now)
	for _, w := range d.once {
		if w.Waits() {
			_, likely := s.of(e).rule.Forecast(st, now, source.Ahead{}, w.Flow.tokens)
			w.Flow.local = true
			q.decide(w, agentapi.CauseNone, likely)
		}
	}
	d.once = nil
	s.serve(e, now)
}

// pause returns how long it is until the store is asked again. It is 0 if that is now, or if nothing waits any more.
func (s *sharedScheduler[S]) pause(e *keys.Entry[line[drawnState[S]]], d *draws) time.Duration {
	e.Lock()
	defer e.Unlock()
	st, now := &e.State.tokens, s.engine.now()
	if d.woken.Load() {
		d.soon = true
	}
	if st.here && e.State.queue != nil {
		s.serve(e, now) // slots may have run out
	}
	at := d.sent + int64(refresh)
	switch {
	case !e.State.waiting() || d.short || d.urgent && !st.here || s.engine.closed.Load():
		return 0
	case st.here:
		at = st.again
	default:
		if d.next > 0 {
			at = min(at, d.next)
		}
		if d.soon {
			at = d.sent
		}
		at = max(at, d.sent+int64(pace(s.from(e).current())))
	}
	return time.Duration(max(at-now, 0))
}

// pace is the shortest time between two questions for a key: no more than a quarter of what a bucket holds comes meanwhile.
func pace(r *shared.Rule) time.Duration {
	if r.Kind != shared.Bucket || r.Fill <= 0 {
		return fastest
	}
	return min(fastest, time.Duration(source.Nanos(r.Capacity/r.Fill/4*float64(r.Interval))))
}

// holds notes that a flow may hold a slot for as long as the rule says.
func (t *sharedTally) holds(now int64, r *shared.Rule) {
	raise(&t.longest, int64(r.MaxInflight))
	raise(&t.held, now+int64(r.MaxInflight))
}

// Settle gives back what was not used, and slots, and corrects what the flow took by what it cost.
func (s *sharedScheduler[S]) Settle(ctx context.Context, d *agentapi.LimiterDecision, o agentapi.Outcome) bool {
	return s.engine.settleOne(ctx, s, d, o)
}

// elsewhere has r return to the key that values beyond the cap share.
func (s *sharedScheduler[S]) elsewhere(d *agentapi.LimiterDecision, r *shared.Return) bool {
	r.Key.Value = spilledName
	return s.mayBeSpilled(d)
}

func (s *sharedScheduler[S]) returns(d *agentapi.LimiterDecision, o agentapi.Outcome) (r shared.Return, needed, done bool) {
	unused := o.Ended == agentapi.EndedUnused
	if d.Scope == agentapi.ScopeNone || unused && d.Consumed == 0 && d.Slot() == 0 {
		return r, false, false
	}
	if unused {
		count(s.counts, d, decisionsRefunded)
	}
	slot := s.component.Slots && d.Slot() != 0
	cost, settled := s.settled(d, o)
	if !unused && !slot && !settled {
		return r, false, false
	}
	e, name := s.known(d)
	r = shared.Return{Key: name, Slot: d.Slot(), Tokens: d.Consumed, Cost: cost, Unused: unused, Queued: true}
	here := false
	if e != nil {
		if settled {
			s.learn(e, d, o, cost)
		}
		r.Rule = s.from(e).current()
		done, here = s.returnsHere(e, d, &r, settled)
		e.Unlock()
	} else {
		t := s.terms.Load()
		place, _ := t.placed(d.Label)
		r.Rule = t.number(place).rule.(*drawnFrom[S]).current() //nolint:forcetypeassert // it has no others
	}
	if !here && s.mayBeSpilled(d) {
		spill := s.table.Spill()
		spill.Lock()
		done, here = s.returnsHere(spill, d, &r, settled)
		spill.Unlock()
	}
	if here {
		return r, false, done
	}
	if settled && cost == d.Consumed {
		s.countSettlement(d, true, 0)
		return r, false, false
	}
	if d.Local && slot { // it is not in the store
		return r, false, false
	}
	return r, true, false
}

// returnsHere is returns for what this process has granted in place of the store. The entry is locked. Here is false if it has not, or
// has told the store since.
func (s *sharedScheduler[S]) returnsHere(e *keys.Entry[line[drawnState[S]]], d *agentapi.LimiterDecision, r *shared.Return, settled bool,
) (done, here bool) {
	if !d.Local && d.Component != nil {
		return false, false
	}
	now := s.engine.now()
	done, here, forgiven := e.State.tokens.giveBackHere(now, r, settled)
	if here && settled {
		s.countSettlement(d, true, forgiven)
	}
	if here && e.State.queue != nil {
		e.State.queue.changes++
		s.serve(e, now)
	}
	return done, here
}

// mayBeSpilled reports whether the decision may be one about a value beyond the cap of keys: a slot's name over the wire does not say so.
func (s *sharedScheduler[S]) mayBeSpilled(d *agentapi.LimiterDecision) bool {
	return d.Component == nil && s.table != nil && s.table.Spilled() > 0
}

// known returns the entry that has decided, locked, and its name in the store. The entry is nil if there is none any more.
func (s *sharedScheduler[S]) known(d *agentapi.LimiterDecision) (*keys.Entry[line[drawnState[S]]], shared.Key) {
	var e *keys.Entry[line[drawnState[S]]]
	switch {
	case s.table == nil:
		e = s.single
		e.Lock()
	case d.Spilled:
		e = s.table.Spill()
		e.Lock()
	default:
		e = s.table.LockKnown(d.Label)
	}
	if e != nil {
		return e, s.key(e)
	}
	return nil, shared.Key{Policy: s.component.Policy, Component: s.component.ID, Label: s.component.LabelKey, Value: d.Label}
}

// learn has the flow's workload learn what its flows cost. If the flow's share waits here, it is charged with what the flow cost beyond
// the estimate.
func (s *sharedScheduler[S]) learn(e *keys.Entry[line[drawnState[S]]], d *agentapi.LimiterDecision, o agentapi.Outcome, cost float64) {
	if o.Labels == nil {
		return
	}
	of, _ := s.workloads.of(o.Labels)
	of.ratio.learn(d.Consumed, cost)
	if debt := cost - d.Consumed; debt > 0 && e.State.waiting() {
		s.charge(e, of, o.Labels, d.Consumed, debt)
	}
}

func (s *sharedScheduler[S]) returned(d *agentapi.LimiterDecision, o agentapi.Outcome, r *shared.Return, result shared.Result, err error) bool {
	_, settled := s.settled(d, o)
	if err != nil {
		s.unpaid.Add(1)
		if settled {
			s.countSettlement(d, false, max(r.Cost-r.Tokens, 0))
		}
		return false
	}
	if settled {
		s.countSettlement(d, true, result.Forgiven)
	}
	if !result.Returned && !settled {
		return false
	}
	if e, _ := s.known(d); e != nil {
		e.State.tokens.corrected(r, result)
		if result.Held > 0 && o.Ended != agentapi.EndedUnused {
			e.State.tokens.learnHold(result.Held)
		}
		e.Unlock()
	}
	return result.Returned && !settled
}

func (s *sharedScheduler[S]) peek(ctx context.Context, value string, now int64) (Usage, error) {
	e, n := s.met(value, now)
	key, rule, waiting := s.keyOf(value, e), n.rule.(*drawnFrom[S]).current(), e.State.waits() //nolint:forcetypeassert // it has no others
	e.Unlock()
	u, err := s.engine.store.Look(ctx, key, rule)
	if err != nil {
		return Usage{}, componentError(s.component.Policy, s.component.ID, err)
	}
	e.Lock()
	e.State.tokens.looked(now, u.Remaining)
	e.Unlock()
	return Usage{Capacity: rule.Capacity, Remaining: u.Remaining, InFlight: u.InFlight, Waiting: waiting}, nil
}

// keyOf returns the name in the store of a value, whose entry may be in no table.
func (s *sharedScheduler[S]) keyOf(value string, e *keys.Entry[line[drawnState[S]]]) shared.Key {
	key := s.key(e)
	if s.table != nil && e != s.table.Spill() {
		key.Value = s.namer.Name(value)
	}
	return key
}

func (s *sharedScheduler[S]) reset(ctx context.Context, value string, now int64) error {
	e, _ := s.met(value, now)
	key := s.keyOf(value, e)
	e.Unlock()
	if err := s.engine.store.Reset(ctx, key); err != nil {
		return componentError(s.component.Policy, s.component.ID, err)
	}
	e.Lock()
	defer e.Unlock()
	st := &e.State.tokens
	st.account = account[S]{}
	if d := st.draws; d != nil { // what waits there has been forgotten
		d.listed, d.soon = nil, true
		d.wake()
	}
	return nil
}

func (s *sharedScheduler[S]) stats(now int64) ComponentStats {
	all := s.scheduler.stats(now)
	all.Shared, all.LocalDecisions, all.Unreturned, all.NumbersDiffer = true, s.local.Load(), s.unpaid.Load(), s.differs.Load()
	return all
}

// differing returns how many answers since the last call were about keys that another engine has used with other numbers.
func (s *sharedScheduler[S]) differing() uint64 {
	n := s.differs.Load()
	return n - s.reported.Swap(n)
}
