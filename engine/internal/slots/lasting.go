package slots

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/statefile"
)

// A Hold is until when no flow is admitted, because flows that another process has admitted may still run. The zero value holds
// nothing up. It is safe for concurrent use.
type Hold struct {
	until    atomic.Int64
	rejected atomic.Uint64
}

// Until has no flow admitted before the time.
func (h *Hold) Until(at int64) { h.until.Store(at) }

// Reject counts a flow if it is rejected while none is admitted.
func (h *Hold) Reject(now int64) {
	if h.left(now) > 0 {
		h.rejected.Add(1)
	}
}

// Rejected returns how many flows Reject has counted.
func (h *Hold) Rejected() uint64 { return h.rejected.Load() }

func (h *Hold) left(now int64) int64 {
	if h == nil {
		return 0
	}
	return max(h.until.Load()-now, 0)
}

// grace is how long a slot of a copy counts at the least.
const grace = 10 * time.Second

const flagSession = 1 << 0 // a session's ID of sessionSize bytes follows

const sessionSize = 16

// revival is how long the session of a restored slot lives if its client does not renew it. It is as long as a session that is
// not renewed lives otherwise: see package agent.
const revival = 10 * time.Second

// Mode returns the only one that there is.
func (r *Rule) Mode() string { return "slots" }

// Append writes the slots, in the order of admission: for each its name, its tokens, the time of its admission, and flags.
func (r *Rule) Append(b []byte, f *State, now int64) []byte {
	r.reclaim(f, now)
	var name [8]byte
	for i := f.oldest; i != none; i = f.slots[i].next {
		s := &f.slots[i]
		binary.BigEndian.PutUint64(name[:], s.id)
		b = statefile.AppendText(b, name[:])
		b = binary.AppendVarint(statefile.AppendFloat(b, s.tokens), s.since-now)
		if s.session == ([16]byte{}) {
			b = append(b, 0)
		} else {
			b = append(append(b, flagSession), s.session[:]...)
		}
	}
	return b
}

// Restore takes the slots whose flows may still run, besides those that are taken already. Each is taken back when MaxInflight
// has passed since its admission, as if there had been no restart.
//
// A slot that was bound to a session is bound to it again: its client has revival to renew the session.
//
// Some flows of a copy have ended meanwhile, and their clients do not end them again. A flow that had run for long is likely to run on, and
// a flow that had just begun is not. So a slot of a copy counts for as long again as its flow had run, and for grace at the
// least.
func (r *Rule) Restore(f *State, written []byte, at source.Restoring) (taken int, ok bool) {
	c := statefile.NewCursor(written)
	var all []slot
	for c.Whole() && !c.Done() {
		name, s := c.Text(), slot{tokens: c.Float()}
		age := -min(max(c.Varint(), -source.Century), 0)
		if c.Byte()&flagSession != 0 {
			copy(s.session[:], c.Bytes(sessionSize))
		}
		if len(name) != 8 || !(s.tokens > 0) || s.tokens > source.MaxCost {
			return 0, false
		}
		s.id = binary.BigEndian.Uint64(name)
		s.since = min(at.At(-age), -1) // which marks it
		if at.Copy {
			s.since = min(s.since, at.Now+max(age, int64(grace))-r.MaxInflight)
		}
		if s.id != 0 && at.Now-s.since < r.MaxInflight {
			all = append(all, s)
		}
	}
	if !c.Whole() {
		return 0, false
	}
	r.add(f, all, at.Now)
	return len(all), true
}

// add takes the slots, whatever there is in use.
func (r *Rule) add(f *State, all []slot, now int64) {
	if len(all) == 0 {
		return
	}
	for _, s := range all {
		f.put(s.id, s.since, s.tokens)
		if s.session != ([16]byte{}) && r.Leases != nil {
			r.Leases.revive(s.session, now)
			r.Bind(f, s.id, s.session)
		}
	}
	order := make([]int32, 0, f.count)
	for i := f.oldest; i != none; i = f.slots[i].next {
		order = append(order, i)
	}
	slices.SortStableFunc(order, func(a, b int32) int { return cmp.Compare(f.slots[a].since, f.slots[b].since) })
	before := none
	for n, i := range order {
		after := none
		if n+1 < len(order) {
			after = order[n+1]
		}
		f.slots[i].prev, f.slots[i].next = before, after
		before = i
	}
	f.oldest, f.newest = order[0], before
}
