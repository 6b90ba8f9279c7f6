package bucket

import (
	"slices"
	"sync/atomic"
)

// Changes says from when to when the buckets of one component have other numbers: see [Rule.Other]. The zero value says that
// they have their own. One goroutine sets it, and any number go by it.
type Changes struct{ latest atomic.Pointer[[]change] }

// A change is when the numbers changed.
type change struct {
	at    int64
	other bool // from then on the other ones are in force
}

// mostChanges is how many changes a bucket that nobody has used meanwhile still follows one by one.
const mostChanges = 16

// Set puts the other numbers into force from now on, or the own ones. The time is not before that of the call before.
func (c *Changes) Set(now int64, other bool) {
	var latest []change
	if before := c.latest.Load(); before != nil {
		latest = (*before)[max(len(*before)-mostChanges+1, 0):]
	}
	latest = append(slices.Clip(latest), change{now, other})
	c.latest.Store(&latest)
}

// Since returns when the numbers that are in force now have come into force; 0 for always.
func (c *Changes) Since() int64 {
	latest := c.latest.Load()
	if latest == nil {
		return 0
	}
	return (*latest)[len(*latest)-1].at
}

// Current returns the rule, or its other numbers if they are in force now. It does nothing to a bucket.
func (r *Rule) Current() *Rule {
	if r.Changes != nil {
		if latest := r.Changes.latest.Load(); latest != nil && (*latest)[len(*latest)-1].other {
			return r.Other
		}
	}
	return r
}

// inForce has the bucket go by the numbers that were in force, one after the other, and returns those that are now. Tokens
// beyond a capacity are lost when it comes into force, and a capacity that grows brings none: what a bucket grants is
// within the numbers of each time.
//
// A bucket has been there up to last, which in steps is earlier than when it was used, and while its fill is delayed later.
// Some changes may happen to it again then, which takes nothing but what was given back since.
func (r *Rule) inForce(b *State) *Rule {
	if r.Changes == nil {
		return r
	}
	latest := r.Changes.latest.Load()
	if latest == nil {
		return r
	}
	is := r
	if !(*latest)[0].other {
		is = r.Other // before the changes that are known
	}
	reached := b.last
	if r.Delay && b.start >= b.last { // it was full, and nothing has come since
		reached = min(reached, b.start-max(r.timeToFill(r.Capacity), r.Other.timeToFill(r.Other.Capacity)))
	}
	for _, c := range *latest {
		next := r
		if c.other {
			next = r.Other
		}
		if c.at >= reached {
			is.refill(b, c.at)
			b.tokens = min(b.tokens, next.Capacity)
		}
		is = next
	}
	b.tokens = min(b.tokens, is.Capacity)
	return is
}
