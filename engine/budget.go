package engine

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/calendar"
	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/shared"
)

// A budget is the rule of a key whose state is in the store. It has the numbers that travel to the store, and the source that decides in
// this process while the store does not answer. S is the state of that source.
type budget[S any] struct {
	own *shared.Rule

	// other is what is in force while others says so. Changed is when that changed last. All are nil for none.
	other   *shared.Rule
	others  func() bool
	changed func() int64

	// divide returns the source of one of so many instances, and with how many tokens it begins if nothing is known.
	divide func(instances float64) (from source.Source[S], begins float64)
	latest atomic.Pointer[part[S]]
}

// A part is what one of several instances has of a budget.
type part[S any] struct {
	instances int
	from      source.Source[S]
	begins    float64
}

// current returns the numbers that are in force.
func (b *budget[S]) current() *shared.Rule {
	if b.other != nil && b.others() {
		return b.other
	}
	return b.own
}

// part returns that of one of so many instances. All keys have the same one while their number stays the same.
func (b *budget[S]) part(instances int) *part[S] {
	instances = max(instances, 1)
	p := b.latest.Load()
	if p == nil || p.instances != instances {
		from, begins := b.divide(float64(instances))
		p = &part[S]{instances, from, begins}
		b.latest.Store(p)
	}
	return p
}

// bucketBudget is the budget of a bucket. A part may hold a whole token, if the bucket may, because no flow could pass otherwise. It
// begins with no more than its share, so since the beginning of an outage all parts together let in no more than the bucket would.
func bucketBudget(r *bucket.Rule) *budget[bucket.State] {
	b := &budget[bucket.State]{own: sharedBucket(r)}
	if r.Changes != nil {
		b.other, b.others, b.changed = sharedBucket(r.Other), func() bool { return r.Current() != r }, r.Changes.Since
		b.other.Base = r.Capacity
	}
	b.divide = func(n float64) (source.Source[bucket.State], float64) {
		of := func(r *bucket.Rule) *bucket.Rule {
			one := *r
			one.Fill, one.Capacity = r.Fill/n, max(r.Capacity/n, min(r.Capacity, 1))
			switch {
			case r.MaxDebt > 0:
				one.MaxDebt = r.MaxDebt / n
			case r.MaxDebt == 0: // by the capacity, which may be more than its share
				one.MaxDebt = max(r.Capacity/n, math.SmallestNonzeroFloat64)
			}
			return &one
		}
		one := of(r)
		if r.Other != nil {
			one.Other = of(r.Other)
		}
		return one, r.Current().Capacity / n
	}
	return b
}

func sharedBucket(r *bucket.Rule) *shared.Rule {
	return &shared.Rule{
		Kind: shared.Bucket, Capacity: r.Capacity, Fill: r.Fill, Interval: nanos(r.Interval), Step: r.Step, Delay: r.Delay, MaxDebt: r.MaxDebt,
	}
}

// nanos returns a duration, which may be as long as there are any.
func nanos(ns float64) time.Duration {
	if ns >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(ns)
}

// quotaBudget is the budget of a calendar quota.
func quotaBudget(r *calendar.Rule) *budget[calendar.State] {
	return &budget[calendar.State]{
		own: &shared.Rule{Kind: shared.Quota, Capacity: r.Amount, MaxDebt: r.MaxDebt, Periods: r.Periods.Boundaries()},
		divide: func(n float64) (source.Source[calendar.State], float64) {
			one := *r
			one.Amount = r.Amount / n
			if r.MaxDebt > 0 {
				one.MaxDebt = r.MaxDebt / n
			}
			return &one, one.Amount
		},
	}
}

// slotsBudget is the budget of slots. A part has a whole number of slots, because a flow is admitted while any part of a slot is free.
func slotsBudget(r *slots.Rule) *budget[slots.State] {
	return &budget[slots.State]{
		own: &shared.Rule{Kind: shared.Slots, Capacity: r.Limit, MaxInflight: time.Duration(r.MaxInflight)},
		divide: func(n float64) (source.Source[slots.State], float64) {
			one := *r
			if n > 1 {
				one.Limit = math.Floor(r.Limit/n + source.Slack)
			}
			return &one, one.Limit
		},
	}
}

// longestRefusal is how long an engine goes by the store's word that there are no tokens, before it asks again.
const longestRefusal = int64(time.Second)

// An account is what an engine keeps of a key whose state is in the store. The zero value is that of a key that the store was not asked
// about. The lock of its entry guards it.
type account[S any] struct {
	// Up to recheck, flows that want least tokens or more are refused without a question: there are none before until, or
	// never if that is source.Never.
	until, recheck int64
	least          float64

	left float64      // what the latest answer said
	at   int64        // when it came
	last *shared.Rule // the numbers of its question; nil if there was none

	// hold is how long flows have held slots lately, in nanoseconds: a moving average over so many returns.
	hold    float64
	returns int32

	spare *spare[S] // what decides while the store does not answer; nil for none
	lease *lease    // what was drawn ahead; nil for none
}

// A spare is what decides about a key while the store does not answer.
type spare[S any] struct {
	by    *part[S]
	state S

	// owed is what it has let in and the store does not know of. Of that, a question that is under way reports so much.
	owed, reporting float64
}

// refuses reports whether the key is known to have too few tokens, and for how long: source.Never if no time brings them.
func (a *account[S]) refuses(now int64, r *shared.Rule, want float64) (wait int64, ok bool) {
	switch {
	case want == 0 || now >= a.recheck || want < a.least:
		return 0, false
	case a.until == source.Never || want > r.Capacity+source.Slack:
		return source.Never, true
	case want == a.least:
		return a.until - now, true
	case r.Kind == shared.Bucket && r.Fill > 0 && !r.Step && !r.Delay:
		return a.until - now + source.Nanos(math.Ceil((want-a.least)/r.Fill*float64(r.Interval))), true
	default: // only the store knows for how long
		return 0, false
	}
}

// learn notes what the store has answered to a question of the numbers. It reports whether another engine has used other numbers since
// this one used these.
func (a *account[S]) learn(now int64, asked *shared.Rule, want float64, answer *shared.Answer) (differs bool) {
	differs = answer.Differs && a.last == asked
	a.left, a.at, a.last = answer.Left, now, asked
	switch {
	case answer.OK || answer.Wait == 0 || asked.Kind == shared.Slots: // a slot may come back at any time
	case now < a.recheck && want >= a.least && a.until != source.Never: // a smaller flow says more
	case answer.Wait < 0:
		a.until, a.recheck, a.least = source.Never, now+longestRefusal, want
	default:
		wait := min(int64(answer.Wait), source.Century)
		early := wait/1e6 + int64(time.Microsecond) // what floating point may add to a wait
		a.until, a.recheck, a.least = now+wait, now+min(wait-early, longestRefusal), want
	}
	return differs
}

// looked notes what a look at the store has found. A look uses no numbers, so another engine may have used others since.
func (a *account[S]) looked(now int64, left float64) {
	a.left, a.at = left, now
	if a.last == nil {
		a.last = new(shared.Rule) // that of no question
	}
}

// corrected forgets when there are tokens again, because of a return. What is left changes by what the store has taken or given
// back for it.
func (a *account[S]) corrected(r *shared.Return, result shared.Result) {
	a.recheck = 0
	lowest := source.Lowest(r.Rule.MaxDebt, r.Rule.Capacity)
	switch debt := r.Cost - r.Tokens; {
	case result.Forgiven > 0: // there may have been less than the engine knew
		a.left = min(a.left, lowest)
	case debt > 0:
		source.Owe(&a.left, debt, lowest)
	case result.Returned:
		a.left = min(a.left-debt, max(r.Rule.Capacity, a.left))
	}
}

// mostReturns is how many returns of slots the average of their times is taken over.
const mostReturns = 16

// learnHold takes the time that a flow has held a slot into the average.
func (a *account[S]) learnHold(held time.Duration) {
	a.returns = min(a.returns+1, mostReturns)
	a.hold += (float64(held) - a.hold) / float64(a.returns)
}

// forecast returns when a slot is likely to be free, if flows end one after the other, at even distances; 0 if that is not known.
func (a *account[S]) forecast(limit float64) int64 {
	if a.returns == 0 || limit == 0 {
		return 0
	}
	used := max(limit-a.left, 1)
	return source.Nanos(max(a.hold*max(used-limit, 0)/max(used, limit)+a.hold/used, 1))
}

// idle reports whether the key may be forgotten. What the store has is not.
func (a *account[S]) idle(now int64) bool {
	if now < a.recheck || a.lease != nil {
		return false
	}
	return a.spare == nil || a.spare.reporting == 0 && a.spare.due(now) == 0 && a.spare.free(now)
}

// free reports whether no flow holds a slot of the spare.
func (s *spare[S]) free(now int64) bool {
	return s.by.from.Timed() || s.by.from.Idle(&s.state, now)
}

// due is what the store is to learn of: what was let in, except what has come to this part since then.
func (s *spare[S]) due(now int64) float64 {
	if s.owed <= 0 || !s.by.from.Timed() {
		return 0
	}
	u := s.by.from.Usage(&s.state, now)
	return max(min(s.owed, u.Capacity-u.Remaining), 0)
}

// report returns what the next question is to tell the store. No other one tells it meanwhile.
func (a *account[S]) report(now int64) (owed float64) {
	s := a.spare
	if s == nil || s.reporting > 0 {
		return 0
	}
	s.reporting = s.due(now)
	return s.reporting
}

// reported notes what became of a question that was to tell the store of so much. When the store answers, and knows all, it decides again.
func (a *account[S]) reported(now int64, owed float64, answered bool) {
	s := a.spare
	if s == nil {
		return
	}
	if owed > 0 {
		if s.reporting = 0; answered {
			s.owed = max(s.owed-owed, 0)
		}
	}
	if answered && s.reporting == 0 && s.due(now) == 0 && s.free(now) {
		a.spare = nil
	}
}

// take has this process decide, by its part of the budget. With open, it admits what it has no tokens for, too.
func (a *account[S]) take(now int64, b *budget[S], instances int, want float64, open bool) source.Taken {
	s := a.spare
	switch p := b.part(instances); {
	case s == nil:
		s = &spare[S]{by: p}
		a.spare = s
		a.begin(now)
	case s.by != p:
		inherit(p.from, &s.state, s.by.from, now)
		s.by = p
	}
	got := s.by.from.Take(&s.state, now, want)
	if !got.OK && open {
		got = source.Taken{OK: true, Left: got.Left}
		if from, ok := s.by.from.(source.Settler[S]); ok {
			s.owed += want - from.Settle(&s.state, now, 0, want, 0)
		}
		return got
	}
	if got.OK {
		s.owed += want
		return got
	}
	_, got.Wait = s.by.from.Forecast(&s.state, now, source.Ahead{}, want)
	return got
}

// giveBackHere gives back what this process has granted or, if it is settled, corrects it by the cost. Here is false if the account knows
// nothing of that.
func (a *account[S]) giveBackHere(now int64, r *shared.Return, settled bool) (done, here bool, forgiven float64) {
	s := a.spare
	switch {
	case s == nil:
		return false, false, 0
	case r.Slot != 0 && !s.by.from.Timed(): // a quota's is its period
		done = s.by.from.GiveBack(&s.state, now, r.Tokens, r.Slot, r.Unused)
		return done, done, 0
	case r.Unused:
		s.owed = max(s.owed-r.Tokens, 0)
		return s.by.from.GiveBack(&s.state, now, r.Tokens, r.Slot, true), true, 0
	case settled:
		if from, ok := s.by.from.(source.Settler[S]); ok {
			forgiven = from.Settle(&s.state, now, r.Tokens, r.Cost, r.Slot)
		}
		s.owed = max(s.owed+r.Cost-r.Tokens-forgiven, 0)
		return false, true, forgiven
	}
	return false, false, 0
}

// begin makes the spare's state that of a key of which the store has said how much is left, as far as it has.
func (a *account[S]) begin(now int64) {
	s := a.spare
	at, begins := now, s.by.begins
	if a.last != nil && s.by.from.Timed() {
		at, begins = a.at, min(a.left/float64(s.by.instances), begins)
	}
	s.by.from.Fresh(&s.state, at)
	from, ok := s.by.from.(source.Settler[S])
	if !ok {
		return
	}
	if used := s.by.from.Usage(&s.state, at).Remaining - begins; used > 0 {
		from.Settle(&s.state, at, 0, used, 0)
	}
}

// inheritBudget has a key go by other numbers: what is not known to be true of these is asked anew.
func inheritBudget[S any](b *budget[S], a *account[S], before *budget[S], now int64) {
	a.recheck = 0
	a.left = source.Carry(a.left, before.current().Capacity, b.current().Capacity)
	if a.lease != nil {
		a.lease.follow(b.current())
	}
	if s := a.spare; s != nil {
		p := b.part(s.by.instances)
		inherit(p.from, &s.state, s.by.from, now)
		s.by = p
	}
}

// budgetRuling is how budgets go about accounts.
func budgetRuling[S any]() ruling[account[S], *budget[S]] {
	return ruling[account[S], *budget[S]]{
		fresh:   func(_ *budget[S], a *account[S], _ int64) { *a = account[S]{} },
		idle:    func(_ *budget[S], a *account[S], now int64) bool { return a.idle(now) },
		inherit: inheritBudget[S],
	}
}

// sharedNumbers returns the function that makes the numbers of a component whose state is in the store, by those that it has in memory.
func sharedNumbers[P, S any, R source.Source[S]](of func(P) *numbers[source.Source[S]], to func(R) *budget[S]) func(P) *numbers[*budget[S]] {
	return func(p P) *numbers[*budget[S]] {
		n := of(p)
		return &numbers[*budget[S]]{rule: to(n.rule.(R)), capacity: n.capacity} //nolint:forcetypeassert // of makes no other
	}
}
