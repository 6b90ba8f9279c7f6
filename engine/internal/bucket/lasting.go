package bucket

import (
	"encoding/binary"
	"math"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/statefile"
)

const (
	flagDebt    = 1 << 0
	flagDelayed = 1 << 1 // the time when the fill begins follows
)

// Mode is how the bucket fills.
func (r *Rule) Mode() string {
	switch {
	case r.Step && r.Delay:
		return "step delay"
	case r.Step:
		return "step"
	case r.Delay:
		return "delay"
	default:
		return "continuous"
	}
}

// Append writes flags, the tokens that are missing, the time that they are missing at, and the time when the fill begins if it
// is delayed.
func (r *Rule) Append(b []byte, state *State, now int64) []byte {
	if r.Idle(state, now) {
		return b
	}
	used, flags := source.UsedOf(state.tokens, r.Capacity), byte(0)
	if used.Debt {
		flags |= flagDebt
	}
	if state.start >= now {
		flags |= flagDelayed
	}
	b = statefile.AppendFloat(append(b, flags), used.Missing)
	b = binary.AppendVarint(b, state.last-now)
	if state.start >= now {
		b = binary.AppendVarint(b, state.start-now)
	}
	return b
}

// Restore refills what was written for the time since. No time that was written makes the bucket wait for longer than one that
// was just filled.
func (r *Rule) Restore(state *State, written []byte, at source.Restoring) (slots int, ok bool) {
	c := statefile.NewCursor(written)
	flags := c.Byte()
	used := source.Used{Missing: c.Float(), Debt: flags&flagDebt != 0}
	old := State{last: at.At(c.Varint()), start: math.MinInt64}
	latest := at.Now
	if flags&flagDelayed != 0 {
		old.start = min(at.At(c.Varint()), at.Now+r.timeToFill(r.Capacity))
		latest = max(latest, old.start)
	}
	if !c.Done() {
		return 0, false
	}
	old.last = min(old.last, latest)
	old.tokens = used.Balance(r.Capacity, source.Lowest(r.MaxDebt, r.Capacity))
	r.refill(&old, at.Now)
	r.refill(state, at.Now)
	if old.tokens < state.tokens {
		*state = old
	}
	return 0, true
}
