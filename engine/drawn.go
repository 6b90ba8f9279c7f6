package engine

import (
	"math"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/policy"
)

// A drawnState is that of a key at which flows wait for what a store shares out among engines.
type drawnState[S any] struct {
	account[S]

	// here reports whether this process decides, because the store did not answer. Again is when it asks the store again.
	here  bool
	again int64

	draws *draws // nil while nothing is to be drawn

	refused string // the workload that the account's refusal is about
}

// A drawnFrom is the source of such keys. It gives tokens itself only while the store does not answer: otherwise they come to flows
// that wait; see [sharedScheduler].
type drawnFrom[S any] struct {
	*budget[S]
	store *store
	open  bool // it admits all while the store does not answer
}

// drawNumbers returns the function that makes the numbers of a scheduler that draws from a store.
func drawNumbers[P, S any, R source.Source[S]](e *Engine, outage policy.Outage, of func(P) *numbers[source.Source[S]], to func(R) *budget[S],
) func(P) *numbers[source.Source[drawnState[S]]] {
	budgets := sharedNumbers(of, to)
	return func(p P) *numbers[source.Source[drawnState[S]]] {
		b := budgets(p)
		return numbersOf[drawnState[S]](b.capacity, &drawnFrom[S]{b.rule, e.store, outage == policy.OutageOpen})
	}
}

// Fresh makes the state one that the store was not asked about.
func (*drawnFrom[S]) Fresh(state *drawnState[S], _ int64) { *state = drawnState[S]{} }

// Idle reports whether nothing is known of the key.
func (*drawnFrom[S]) Idle(state *drawnState[S], now int64) bool {
	return state.draws == nil && state.account.idle(now)
}

// Take takes from this process's part while the store does not answer.
func (f *drawnFrom[S]) Take(state *drawnState[S], now int64, tokens float64) source.Taken {
	switch {
	case tokens == 0:
		return source.Taken{OK: true, Left: state.left}
	case !state.here:
		return source.Taken{Left: state.left, Later: true}
	}
	got := state.take(now, f.budget, f.store.Instances(), tokens, f.open)
	if !got.OK {
		got.Later = got.Wait == 0 // a slot comes back when a flow ends
		got.Wait = max(got.Wait, 0)
	}
	return got
}

// Cost returns what the source of this process would.
func (f *drawnFrom[S]) Cost(tokens float64) float64 {
	if f.own.Kind == shared.Slots {
		tokens = min(tokens, f.own.Capacity)
	}
	return min(tokens, source.MaxCost)
}

// Timed reports false: what comes is for others, too.
func (*drawnFrom[S]) Timed() bool { return false }

// GiveBack gives back what this process has granted.
func (*drawnFrom[S]) GiveBack(state *drawnState[S], now int64, tokens float64, slot uint64, unused bool) bool {
	done, _, _ := state.giveBackHere(now, &shared.Return{Slot: slot, Tokens: tokens, Unused: unused}, false)
	return done
}

// Usage returns what the store said last.
func (f *drawnFrom[S]) Usage(state *drawnState[S], _ int64) source.Usage {
	rule := f.current()
	u := source.Usage{Capacity: rule.Capacity, Remaining: rule.Capacity}
	if state.last != nil {
		u.Remaining = state.left
	}
	return u
}

// Forecast returns, at the least, when so many tokens can have come since the store said what there is, if all of them come to this
// engine. What is likely goes by how many have come to it lately.
func (f *drawnFrom[S]) Forecast(state *drawnState[S], now int64, ahead source.Ahead, tokens float64) (least, likely int64) {
	rule := f.current()
	switch {
	case rule.Capacity <= 0 || rule.Kind == shared.Bucket && tokens > rule.Capacity+source.Slack:
		return source.Never, source.Never
	case state.here:
		if state.spare == nil {
			return 0, 0
		}
		return state.spare.by.from.Forecast(&state.spare.state, now, ahead, tokens)
	case state.last == nil || now-state.at > longestRefusal:
		return 0, 0 // others may have given something back
	}
	if rule.Kind == shared.Bucket && rule.Fill > 0 && !rule.Step && !rule.Delay {
		each := float64(rule.Interval) / rule.Fill
		there := min(state.left+float64(now-state.at)/each, rule.Capacity)
		least = source.Nanos(math.Ceil(max(ahead.Least+tokens-there, 0) * each))
	}
	if likely = least; rule.Kind == shared.Bucket { // of slots nothing may be known
		likely = max(least, 1)
	}
	if d := state.draws; d != nil {
		likely = max(likely, d.next-now)
		if d.granted > 0 {
			likely = max(likely, source.Nanos(float64(now-d.since)/d.granted*(ahead.Likely+tokens)))
		}
	}
	return least, likely
}

// Inherit has the key go by other numbers.
func (f *drawnFrom[S]) Inherit(state *drawnState[S], before source.Source[drawnState[S]], now int64) {
	if b, ok := before.(*drawnFrom[S]); ok {
		inheritBudget(f.budget, &state.account, b.budget, now)
	}
}

// Bind has a slot of this process run out with the session.
func (*drawnFrom[S]) Bind(state *drawnState[S], slot uint64, session [16]byte) {
	if s := state.spare; s != nil {
		bind(s.by.from, &s.state, slot, session)
	}
}
