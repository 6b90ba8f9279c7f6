package engine

import "github.com/headgate-go/headgate/internal/agentapi"

// A source is where a component has its tokens from; S is the state of one key.
type source[S any] interface {
	fresh(state *S, now int64)

	// idle reports whether a fresh state would do as well as this one.
	idle(state *S, now int64) bool

	// take takes tokens, all of them or none.
	take(state *S, now int64, tokens float64) taken

	// cost is how many tokens a flow that wants so many counts for among those who wait: no more than it can get, nor
	// than leaves a sum exact enough for the others.
	cost(tokens float64) float64

	// giveBack takes back what was taken; false says that it has been taken back before. Unused says that the flow did
	// not run.
	giveBack(state *S, now int64, tokens float64, slot uint64, unused bool) bool

	// usage is how many tokens there are, and could be, and how many flows hold some.
	usage(state *S, now int64) Usage

	// forecast says how long a flow has to wait for its tokens when flows of that cost go before it: at the least,
	// and likely, where zero is not known. It is never where so many tokens will never be there. It is asked where a
	// take would fail, or where others wait.
	forecast(state *S, now int64, ahead backlog, tokens float64) (least, likely int64)

	// timed reports whether tokens come by themselves: then taking from a copy of the state tells the future.
	timed() bool
}

// taken is what came of asking a source for tokens.
type taken struct {
	ok   bool
	slot uint64  // what giveBack needs
	left float64 // for the decision to tell
	wait int64   // if not ok, how long until the tokens may be there though nobody gives any back; 0 when never
}

func (g taken) fill(d *agentapi.LimiterDecision) {
	d.Hold(g.slot)
	d.Remaining = g.left
}

// never as a wait is that of a flow which cannot ever be admitted.
const never = -1
