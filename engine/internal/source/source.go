// Package source defines what limiters and schedulers get their tokens from: a [Source] of some kind, with a state for
// each key. Token buckets and concurrency slots are sources.
//
// Times are nanoseconds since an epoch of the caller's, by a monotonic clock.
package source

import "math"

// A Source gives tokens, and says when it will have some. S is the state of one key. A Source has no state of its own that
// changes; the caller guards the state that it hands in.
type Source[S any] interface {
	// Fresh makes the state that of an unused key.
	Fresh(state *S, now int64)

	// Idle reports whether a fresh state would behave like this one.
	Idle(state *S, now int64) bool

	// Take takes tokens, all of them or none.
	Take(state *S, now int64, tokens float64) Taken

	// Cost returns what a flow that wants so many tokens counts for among those that wait: no more than it can get, and
	// no more than leaves a sum exact enough for the others.
	Cost(tokens float64) float64

	// GiveBack returns tokens that were taken, and reports whether they had not been returned before. The slot is that of
	// Take. Unused says that the flow did not run.
	GiveBack(state *S, now int64, tokens float64, slot uint64, unused bool) bool

	// Usage returns how many tokens there are, and could be, and how many flows hold some.
	Usage(state *S, now int64) Usage

	// Forecast returns how long a flow must wait for its tokens while the flows ahead of it are served first: at the
	// least, and likely. Zero is for what is not known, and Never for tokens that will never be there. Callers ask where
	// a Take would fail, or where others wait.
	Forecast(state *S, now int64, ahead Ahead, tokens float64) (least, likely int64)

	// Timed reports whether tokens come by themselves. Then taking from a copy of the state tells the future.
	Timed() bool
}

// A Settler is a source whose tokens are corrected when it is known what a flow has cost.
type Settler[S any] interface {
	// Settle corrects a Take of tokens by a flow that has cost so much. What it cost less comes back, as far as there is room.
	// What it cost more is taken although it is not there. Forgiven is what is not taken either, because the debt has come to
	// its bound. The slot is that of Take. It is called once for each Take, and not after GiveBack.
	Settle(state *S, now int64, tokens, cost float64, slot uint64) (forgiven float64)
}

// An Heir is a source that can follow another one of its type, whose numbers differ.
type Heir[S any] interface {
	// Inherit makes a state of the source before one of this source, from the time on. What came until then came by the numbers
	// before. The key keeps what it has used.
	Inherit(state *S, before Source[S], now int64)
}

// Carry returns the balance of a key when its capacity changes: what was used remains used. A smaller capacity makes no debt,
// which would keep flows out for as long as the new rate takes to pay what the old numbers have granted.
func Carry(balance, before, after float64) float64 {
	return min(max(after-(before-balance), min(balance, 0)), after)
}

// A Lasting is a source whose states can be written down, and read by another process.
type Lasting[S any] interface {
	// Mode says what states mean besides the numbers, which may differ where they are read. It is the same where the same
	// sequence of calls, with other numbers perhaps, leads to the same kind of state.
	Mode() string

	// Append appends the state as it is at the time now, and nothing if a fresh state would behave like it. Times are
	// written relative to now, except those of a calendar.
	Append(b []byte, state *S, now int64) []byte

	// Restore takes what Append has written into a state that may have been used meanwhile: afterwards it has no more
	// tokens than either of both. It returns how many slots are taken by what was written. OK is false if nothing could be
	// taken from what was written.
	Restore(state *S, written []byte, at Restoring) (slots int, ok bool)
}

// Restoring says when a state is read, and when it was written.
type Restoring struct {
	Now  int64
	Then int64 // when it was written, in the time of the reader. It is no later than now, whatever clocks say

	// Copy means that the state is a copy: flows have come and ended after it.
	Copy bool
}

// At returns the time that was so long after the writing; before it if offset is negative.
func (r Restoring) At(offset int64) int64 { return r.Then + min(max(offset, -Century), Century) }

// Used is a balance as it is written: what is missing from the capacity, so that what was taken still counts where the capacity
// is another one. Whether it was a debt matters, because a smaller capacity must not make one.
type Used struct {
	Missing float64
	Debt    bool
}

// UsedOf returns what is used of a balance.
func UsedOf(balance, capacity float64) Used { return Used{capacity - balance, balance < 0} }

// Balance returns what is left of a capacity.
func (u Used) Balance(capacity, lowest float64) float64 {
	if !u.Debt {
		lowest = 0
	}
	return min(max(capacity-u.Missing, lowest), capacity)
}

// Taken is the result of [Source.Take].
type Taken struct {
	OK   bool
	Slot uint64  // what GiveBack needs
	Left float64 // the tokens that are left, for the decision to tell
	Wait int64   // if not OK, how long until the tokens may be there if none is given back; 0 for never, or not known

	// Later says, if Wait is 0, that the tokens may come yet: the source has other numbers for a time. A flow that waits goes on
	// waiting.
	Later bool
}

// Usage is how much of a source is in use.
type Usage struct {
	Capacity  float64
	Remaining float64 // below 0 where flows cost more than was free: a debt
	InFlight  int     // flows that hold slots
}

// Ahead is the cost of the flows that are served before another one: at the least, if no other flow comes, and likely.
// If they do not all cost the same as that one, Largest is the most that one of them may cost; otherwise it is 0.
type Ahead struct{ Least, Likely, Largest float64 }

// Never is the wait of a flow that can never be admitted.
const Never = -1

// Slack is the tolerance when tokens are compared: a billionth of a token. Floating point loses so much between the
// wait that was forecast for a flow and the tokens that there are then.
const Slack = 1e-9

// MaxCost bounds what one flow counts for, of slots, of a load, and in a queue. More would swallow the others in the
// sum, which is a float, and leave the limit open when the flow ends. A peer may have set the label that says the cost.
const MaxCost = 1e9

// Century is the longest time there is, in nanoseconds: the sum of two is within an int64, and buckets that take
// decades to fill are as good as stopped.
const Century = 100 * 365 * 24 * 3600 * 1_000_000_000

// Owe takes a debt from a balance, down to the lowest, and returns the rest. A balance that is lower stays.
func Owe(balance *float64, debt, lowest float64) (forgiven float64) {
	left := *balance - debt
	if to := max(left, min(*balance, lowest)); to != left {
		left, forgiven = to, to-left
	}
	*balance = left
	return forgiven
}

// Lowest returns the least that a balance may be: -maxDebt, -capacity if that is 0, and no less than a float64 has if it is
// negative.
func Lowest(maxDebt, capacity float64) float64 {
	switch {
	case maxDebt < 0:
		return -math.MaxFloat64
	case maxDebt == 0:
		return 0 - capacity // which is 0 for 0, not -0
	default:
		return -maxDebt
	}
}

// Nanos converts a time in nanoseconds, which is at most a [Century].
func Nanos(ns float64) int64 { return int64(min(ns, Century)) }
