package calendar

import (
	"encoding/binary"
	"fmt"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/statefile"
)

const flagDebt = 1 << 0

// Mode is the calendar: what is left of a day says nothing about an hour.
func (r *Rule) Mode() string {
	return fmt.Sprintf("%d %s %d", r.Periods.Unit, r.Periods.Zone, r.Periods.First)
}

// Append writes flags, the tokens that are missing, and the end of the period, in Unix nanoseconds.
func (r *Rule) Append(b []byte, state *State, now int64) []byte {
	r.renew(state, now)
	if state.left >= r.Amount {
		return b
	}
	used, flags := source.UsedOf(state.left, r.Amount), byte(0)
	if used.Debt {
		flags |= flagDebt
	}
	return binary.AppendVarint(statefile.AppendFloat(append(b, flags), used.Missing), r.Epoch.UnixNano()+state.end)
}

// Restore takes what was written of a period that has not ended yet, and debts. A period that ends later than the present one
// is taken for the present one: a clock was wrong.
func (r *Rule) Restore(state *State, written []byte, at source.Restoring) (slots int, ok bool) {
	c := statefile.NewCursor(written)
	flags := c.Byte()
	used := source.Used{Missing: c.Float(), Debt: flags&flagDebt != 0}
	end := c.Varint()
	if !c.Done() {
		return 0, false
	}
	// Every state was brought up to date when it was written, so it ends no earlier.
	end = max(at.At(0), min(end-r.Epoch.UnixNano(), r.next(at.Now)))
	old := State{left: used.Balance(r.Amount, source.Lowest(r.MaxDebt, r.Amount)), end: end}
	r.renew(&old, at.Now)
	r.renew(state, at.Now)
	if old.left < state.left {
		*state = old
	}
	return 0, true
}
