// Package shared is the contract between an engine and a store that several engines have in common.
//
// The engine decides what to ask, and what a flow does if nobody answers. The store keeps the states: balances of buckets and
// calendar quotas, slots, boxes of queues, cached values, positions of ramps. It changes them one call after the other, by its
// own clock. A store has no policy: the numbers travel with each call.
package shared

import (
	"context"
	"errors"
	"time"
)

// A Store keeps states for any number of engines. It is safe for concurrent use.
//
// Each method that has a context also has a bound of the store's own, and returns an error when either ends. It is never
// called again for the same flow: a call that timed out may have counted. An error means that nobody has decided, and wraps
// [ErrDown] if the store did not even ask because its server was silent lately, or [ErrClosed]. Texts of errors name no address, no key
// and no value.
type Store interface {
	Limits
	Queues
	Caches
	Ramps
	Holders
}

// ErrDown is the error of calls that fail at once, because the server that they go to did not answer lately.
var ErrDown = errors.New("the store did not answer lately, and is asked again once in a while")

// ErrClosed is the error of calls after the store was closed, and of those that this has ended.
var ErrClosed = errors.New("the store is closed")

// Limits are what limiters take from and give back to.
type Limits interface {
	// Take asks for all that a flow wants, together: the answers are those of one moment at each server that is concerned. If
	// an ask that is not Dry is refused, nothing is taken. It fills answers, which has the length of asks. The caller does not change
	// asks, nor use them again, and does not read answers after an error.
	Take(ctx context.Context, asks []Ask, answers []Answer) error

	// Return gives back, and corrects, what was taken. It fills results, which has the length of returns. Slots are returned
	// until the store has confirmed it, or until they must have run out, also after Return has failed. Tokens are not: what is
	// lost stays lost.
	Return(ctx context.Context, returns []Return, results []Result) error

	// Look tells the usage of a key. It changes nothing.
	Look(ctx context.Context, key Key, rule *Rule) (Usage, error)

	// Reset forgets the state of a key, and wakes those that wait there.
	Reset(ctx context.Context, key Key) error
}

// A Key names one state. The same key of any engine with the same namespace is the same state.
type Key struct {
	Policy, Component string // identify the component
	Label, Value      string // of the component's label; both empty for a component without one
}

// A Kind is a kind of state.
type Kind uint8

// The kinds.
const (
	Bucket Kind = iota + 1 // tokens that come with time
	Quota                  // tokens that are there anew in each period of the calendar
	Slots                  // held until they are returned, or run out
)

// A Rule is the numbers that a key goes by. It is never changed.
type Rule struct {
	Kind Kind

	// Capacity is the most tokens of a bucket, the amount of a quota, or how many slots there are.
	Capacity float64

	// Base is the capacity that what was used is counted from when the numbers of a key change, if that is not Capacity, which bounds
	// what is left. It is 0 if it is Capacity. While a limit is lowered for a time, it is the capacity of the other times: a key that
	// goes down and up again has no more tokens than before.
	Base float64

	// Fill tokens come to a bucket in each Interval: continuously, or with Step at its end. With Delay a full bucket begins to
	// fill only after the time that it takes to fill it.
	Fill        float64
	Interval    time.Duration
	Step, Delay bool

	// MaxDebt is how far below 0 a settlement may take a bucket or a quota: by the capacity if it is 0, by any debt if it is negative.
	MaxDebt float64

	// Periods returns the boundaries of a quota's periods around a time of the store's clock: the beginning of the period
	// before, of that period, and of the next two.
	Periods func(at time.Time) [4]time.Time

	// MaxInflight is when slots run out that were not returned.
	MaxInflight time.Duration
}

// An Ask is what a flow wants of one key.
type Ask struct {
	Key    Key
	Rule   *Rule
	Tokens float64 // of slots, the part of them; 0 takes nothing, and is never refused

	// Dry takes what it can get, and does not keep the flow from anything else.
	Dry bool

	// Since is how long the numbers have been in force. If the key was last used with others, it goes by those up to then. It is 0 if
	// that is not known.
	Since time.Duration

	// Holder is the session whose slot it becomes; zero for the store's own instance. See [Holders].
	Holder Holder

	// Ahead is how many tokens of a bucket to draw for later flows of this engine, if they are there beyond Tokens; 0 for none.
	// At most half of the balance by the number of instances is given. Reserve is how many to draw if that is less, or if the ask
	// alone is refused: of those that are there, and of those that will come. The balance goes below 0 by at most half of the
	// capacity for that. Nothing is drawn if it would be less than Tokens.
	Ahead, Reserve float64

	// Owed is what this engine has let in while the store did not answer, in tokens. It is taken first, as a debt, also if the ask is
	// refused.
	Owed float64
}

// An Answer is what became of an Ask.
type Answer struct {
	// OK reports whether the tokens were there. They were taken if all asks of the flow that are not dry were OK.
	OK bool

	Left float64 // what is left for the next flow; below 0 in debt

	// Wait is how long until the tokens may be there, counted from the answer, if OK is false. It is 0 if that is not known, and
	// negative for never.
	Wait time.Duration

	// Slot is what Return needs; 0 if there is nothing to return it by. It is a random number for slots, and the period for
	// quotas.
	Slot uint64

	// Drawn is how many tokens were drawn, by Ahead or Reserve. After is when all of them may be used, counted from the answer. Each of
	// them may be used from when it comes: the last one then, the others before it as the rule fills.
	Drawn float64
	After time.Duration

	// Differs reports whether the key was last used with other numbers.
	Differs bool
}

// A Return gives back what a flow took of one key, or corrects it.
type Return struct {
	Key  Key
	Rule *Rule
	Slot uint64 // see Answer.Slot

	Tokens float64 // that were taken
	Cost   float64 // what the flow has cost: 0 if it did not run
	Unused bool    // the flow did not run, or the tokens were drawn ahead and not used

	// Queued says that flows wait at the key by Draw: what comes back falls to them.
	Queued bool
}

// A Result is what became of a Return.
type Result struct {
	Returned bool          // a slot was still held, or tokens came back
	Forgiven float64       // the cost that is beyond the largest debt
	Held     time.Duration // how long a slot was held; 0 if the store does not know
}

// A Usage is how much of a key is in use.
type Usage struct {
	Remaining float64 // below 0 in debt
	InFlight  int     // flows that hold slots
}

// Queues share tokens and slots among flows that wait in several engines.
type Queues interface {
	// Draw takes tokens or slots for flows that wait at a key. See [Drawing].
	Draw(ctx context.Context, d *Drawing) (Drawn, error)

	// Wake has f called when something came back to the key by another engine, until stop is called. F must not block. It may be called
	// without a reason, and is not called for all reasons: there must be a timer too.
	Wake(key Key, f func()) (stop func())
}

// A Drawing is what waits at one key of one engine. An empty one says that nothing waits there any more.
type Drawing struct {
	Key      Key
	Rule     *Rule
	Waiting  []Waiting
	Once     bool          // the flows that get nothing now do not wait
	Since    time.Duration // see Ask
	Owed     float64       // see Ask
	Unneeded []Grant       // what came for flows that are gone: it goes to others
}

// Waiting is the flows of one workload that wait, in their order: the costs of the first 32 of them. A workload has the same weight at
// all engines; where it differs the latest counts.
type Waiting struct {
	Workload string
	Weight   float64 // its priority
	Costs    []float64

	// Holders are the sessions whose slots they become, zero for the store's own instance. It is nil if all are.
	Holders []Holder
}

// A Grant is what the first flows of a workload got. Flows that cost more than the key's capacity are left out.
type Grant struct {
	Workload string
	Tokens   []float64 // of each flow, in their order
	Slots    []uint64  // of each flow; nil for a bucket
}

// Drawn is what fell to an engine.
type Drawn struct {
	Grants []Grant
	Left   float64
	// Next is when the engine's next turn is due, counted from the answer; 0 if that is not known, and negative for never.
	Next    time.Duration
	Differs bool // see Answer
}

// Caches keep values. A value may be gone at any time.
type Caches interface {
	// Get returns the values of the keys, nil for one that is not there.
	Get(ctx context.Context, keys []CacheKey) ([][]byte, error)

	// Set keeps a value for so long.
	Set(ctx context.Context, key CacheKey, value []byte, ttl time.Duration) error

	// Delete forgets a value.
	Delete(ctx context.Context, key CacheKey) error
}

// A CacheKey names a cached value. Values of all control points have an empty one.
type CacheKey struct{ ControlPoint, Key string }

// Ramps share where load ramps stand.
type Ramps interface {
	// Move returns where the ramp stands, with its own clock's time in At. If to is not nil, it puts the ramp there first, unless
	// the ramp has moved since the position "from": then it returns that one.
	Move(ctx context.Context, key Key, from uint64, to *Position) (Position, error)
}

// A Position is where a ramp stands.
type Position struct {
	Version   uint64        // grows with each move; 0 for a ramp that has none yet
	At        time.Duration // from the ramp's beginning, now
	Direction int           // 1 forward, -1 backward, 0 still
	Left      bool          // it has left the beginning of its first step
}

// A Holder is a session of a client. Its slots run out with it.
type Holder [16]byte

// Holders are those that hold slots.
type Holders interface {
	// Renew has a session live for so long from now on. It does not wait: the store sends it with others. It returns until when the
	// store certainly keeps all slots that it has taken for the session, by what its servers have confirmed; zero if nothing is confirmed.
	// In a cluster, slots that other instances take count from the next renewal on. A slot that is taken for the session within a
	// tenth of lasts after the call is kept for lasts after it was taken, at the least.
	Renew(session Holder, lasts time.Duration) (kept time.Time)

	// Kept returns until when the store's own instance may count on all slots that it holds. That is two thirds of a lease after the
	// sending of the last call that renewed the lease or took a slot, as far as the store has confirmed it. Others do not get the
	// slots before most of the last third has passed. It is zero while nothing is held.
	Kept() time.Time

	// Failures counts the calls that the store has made by itself, for none of its callers, and that failed.
	Failures() uint64

	// Instances returns how many instances have lately used the store, itself included. It does not wait.
	Instances() int

	// Down reports whether any of the store's servers was silent lately.
	Down() bool
}
