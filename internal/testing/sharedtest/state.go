package sharedtest

import (
	"math"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// slack is the tolerance when tokens are compared.
const slack = 1e-9

// A state is what the server keeps of a key. It goes by the numbers that it was last used with.
type state struct {
	server *Server
	rule   shared.Rule
	latest time.Time // when it was used last

	tokens float64   // of a bucket or a quota
	last   time.Time // the time that tokens is true for
	start  time.Time // a bucket does not fill before
	end    time.Time // of a quota's period

	slots []slot // in the order in which they were taken
}

type slot struct {
	name   uint64
	tokens float64
	since  time.Time
	by     owner
}

// An owner holds slots: an instance, or a session that is not zero.
type owner struct {
	store  *Store
	holder shared.Holder
}

// state returns the state of the key, up to date. A key that is of another kind now begins anew.
func (s *Server) state(now time.Time, key shared.Key, rule *shared.Rule) *state {
	st := s.states[key]
	if st == nil || st.rule.Kind != rule.Kind {
		st = &state{server: s, rule: *rule, latest: now, tokens: rule.Capacity, last: now}
		s.states[key] = st
	}
	return st
}

// follow has the state go by the rule, which has been in force for so long, and be up to date. It reports whether the state went by other
// numbers before.
func (st *state) follow(now time.Time, rule *shared.Rule, since time.Duration) bool {
	at := now.Add(-since)
	if at.Before(st.latest) {
		at = st.latest
	}
	st.renew(at)
	differs := st.change(at, rule)
	st.renew(now)
	return differs
}

// change is the change of follow, at the time.
func (st *state) change(now time.Time, rule *shared.Rule) bool {
	before := st.rule
	st.rule = *rule
	if base(&before) == base(rule) && before.Capacity == rule.Capacity && before.Fill == rule.Fill && before.Interval == rule.Interval && before.Step == rule.Step &&
		before.Delay == rule.Delay && before.MaxDebt == rule.MaxDebt && before.MaxInflight == rule.MaxInflight {
		return false
	}
	// What was used remains used. A smaller capacity makes no debt.
	st.tokens = min(max(base(rule)-(base(&before)-st.tokens), min(st.tokens, 0)), rule.Capacity)
	switch {
	case rule.Kind != shared.Bucket:
	case rule.Delay && st.start.After(now):
		if full := now.Add(st.timeToFill(rule.Capacity)); full.Before(st.start) {
			st.start = full
		}
		st.last = st.start
		if rule.Step {
			st.last = st.last.Add(-rule.Interval)
		}
	case rule.Step && rule.Interval < before.Interval && st.last.Before(now):
		st.last = now
	}
	return true
}

// base is the capacity that what was used is counted from.
func base(r *shared.Rule) float64 {
	if r.Base == 0 {
		return r.Capacity
	}
	return r.Base
}

// renew brings the state up to now.
func (st *state) renew(now time.Time) {
	st.latest = now
	switch st.rule.Kind {
	case shared.Bucket:
		st.refill(now)
	case shared.Quota:
		st.begin(now)
	case shared.Slots:
		st.reclaim(now)
	}
}

func (st *state) refill(now time.Time) {
	r := &st.rule
	if now.After(st.start) && now.After(st.last) && r.Interval > 0 {
		elapsed := float64(now.Sub(st.last))
		if r.Step {
			steps := math.Floor(elapsed / float64(r.Interval))
			st.tokens += steps * r.Fill
			st.last = st.last.Add(time.Duration(steps) * r.Interval)
		} else {
			st.tokens += r.Fill * elapsed / float64(r.Interval)
			st.last = now
		}
		st.tokens = min(st.tokens, r.Capacity)
	}
	if st.tokens >= r.Capacity-slack {
		st.tokens = r.Capacity
	}
	if r.Delay && st.tokens >= r.Capacity {
		st.start = now.Add(st.timeToFill(r.Capacity))
		st.last = st.start
		if r.Step {
			st.last = st.last.Add(-r.Interval)
		}
	}
}

func (st *state) timeToFill(tokens float64) time.Duration {
	r := &st.rule
	if r.Fill == 0 || tokens <= 0 {
		return 0
	}
	fills := tokens / r.Fill
	if r.Step {
		fills = math.Ceil(tokens / min(r.Fill, r.Capacity))
	}
	return time.Duration(min(math.Ceil(fills*float64(r.Interval)), math.MaxInt64/4))
}

// begin has the quota begin anew for each period that has begun. A debt is paid first.
func (st *state) begin(now time.Time) {
	if st.end.IsZero() {
		st.end = st.rule.Periods(now)[2]
	}
	for !now.Before(st.end) {
		st.tokens = min(st.tokens+st.rule.Capacity, st.rule.Capacity)
		next := st.rule.Periods(st.end)[2]
		if st.tokens >= 0 || st.rule.Capacity <= 0 {
			next = st.rule.Periods(now)[2]
		}
		st.end = next
	}
}

// reclaim takes back slots whose time is over, or whose owners are gone.
func (st *state) reclaim(now time.Time) {
	left := make([]slot, 0, len(st.slots)) // a copy of the state may have the same slots
	for _, one := range st.slots {
		gone := now.Sub(one.since) >= st.rule.MaxInflight
		if one.by.holder != (shared.Holder{}) {
			of := st.server.sessions[one.by.holder]
			gone = gone || !of.until.After(now) || one.since.Before(of.since)
		} else if cut := one.by.store.cutAt; !cut.IsZero() {
			gone = gone || !now.Before(cut.Add(Lease))
		}
		if !gone {
			left = append(left, one)
		}
	}
	st.slots = left
}

func (st *state) used() (tokens float64) {
	for _, one := range st.slots {
		tokens += one.tokens
	}
	return tokens
}

// left returns what is left by the rule.
func (st *state) left(rule *shared.Rule) float64 {
	if rule.Kind == shared.Slots {
		return rule.Capacity - st.used()
	}
	return st.tokens
}

// lowest is the least that the balance may be.
func (st *state) lowest() float64 {
	switch r := &st.rule; {
	case r.MaxDebt < 0:
		return -math.MaxFloat64
	case r.MaxDebt == 0:
		return 0 - r.Capacity
	default:
		return -r.MaxDebt
	}
}

// owe takes what is not there, down to the lowest balance, and returns what it has not taken.
func (st *state) owe(_ time.Time, debt float64) (forgiven float64) {
	if st.rule.Kind == shared.Slots || debt <= 0 {
		return 0
	}
	left := st.tokens - debt
	if to := max(left, min(st.tokens, st.lowest())); to != left {
		left, forgiven = to, to-left
	}
	st.tokens = left
	return forgiven
}

// room reports whether so many tokens are there, and after which wait otherwise.
func (st *state) room(now time.Time, want float64) (ok bool, wait time.Duration) {
	r := &st.rule
	switch {
	case want == 0:
		return true, 0
	case r.Kind == shared.Slots:
		if r.Capacity-st.used() > slack || len(st.slots) == 0 && r.Capacity > 0 {
			return true, 0
		}
		if r.Capacity == 0 {
			return false, -1
		}
		return false, st.slots[0].since.Add(r.MaxInflight).Sub(now) // nobody knows how long flows run
	case st.tokens-want >= -slack:
		return true, 0
	case want > r.Capacity || r.Kind == shared.Bucket && r.Fill <= 0 || r.Capacity == 0:
		return false, -1
	case r.Kind == shared.Quota:
		at, missing := st.end, want-r.Capacity-min(st.tokens, 0)
		for missing > slack {
			at, missing = r.Periods(at)[2], missing-r.Capacity
		}
		return false, at.Sub(now)
	}
	return false, st.until(now, want)
}

// until returns how long it takes until a bucket has so many tokens, or has had so many if it never holds them at once.
func (st *state) until(now time.Time, want float64) time.Duration {
	missing := want - st.tokens
	if st.rule.Step {
		missing -= slack / 2
	}
	wait := st.last.Sub(now) + st.timeToFill(missing)
	if !now.After(st.start) {
		wait = max(wait, st.start.Sub(now)+1)
	}
	return max(wait, 1)
}

// take takes tokens for which there is room, and returns what they are returned by.
func (st *state) take(now time.Time, want float64, by owner) uint64 {
	switch st.rule.Kind {
	case shared.Slots:
		if want == 0 {
			return 0
		}
		one := slot{name(), want, now, by}
		if by.holder != (shared.Holder{}) {
			one.by.store = nil
		}
		st.slots = append(st.slots, one)
		return one.name
	case shared.Quota:
		if want > 0 {
			st.tokens = max(st.tokens-want, 0)
		}
		return uint64(st.end.UnixNano())
	default:
		if want > 0 {
			st.tokens = max(st.tokens-want, 0)
		}
		return 0
	}
}

func (st *state) giveBack(now time.Time, r shared.Return) (done shared.Result) {
	if st.rule.Kind == shared.Slots {
		for i, one := range st.slots {
			if one.name == r.Slot {
				st.slots = append(st.slots[:i], st.slots[i+1:]...)
				return shared.Result{Returned: true, Held: now.Sub(one.since)}
			}
		}
		return done
	}
	current := st.rule.Kind == shared.Bucket || r.Slot == uint64(st.end.UnixNano())
	back := r.Tokens - r.Cost
	if r.Unused {
		back = r.Tokens
	}
	switch {
	case back < 0:
		done.Forgiven = st.owe(now, -back)
	case current && back > 0:
		st.tokens = min(st.tokens+back, st.rule.Capacity)
		done.Returned = true
	}
	return done
}
