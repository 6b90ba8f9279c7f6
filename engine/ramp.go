package engine

import (
	"sync/atomic"

	"github.com/headgate-go/headgate/policy"
)

// A position is where a load ramp stands and which way it moves. It is never changed, only replaced, so that flows read
// it without a lock.
type position struct {
	at        int64 // nanoseconds from the ramp's beginning, at the time since
	since     int64
	direction int64 // 1 forward, -1 backward, 0 still
}

// ramp is the course of a load ramp.
type ramp struct {
	steps  []policy.RampStep
	length int64
	now    atomic.Pointer[position]
}

func newRamp(p policy.LoadRamp, now int64) *ramp {
	r := &ramp{steps: p.Steps}
	for _, s := range p.Steps {
		r.length += int64(s.Duration)
	}
	start := &position{since: now}
	if p.Start {
		start.direction = 1
	}
	r.now.Store(start)
	return r
}

// along is how far along the ramp p has come.
func (r *ramp) along(p *position, now int64) int64 {
	return min(max(p.at+p.direction*max(now-p.since, 0), 0), r.length)
}

// move changes the way that the ramp goes, from where it stands.
func (r *ramp) move(now, direction int64) {
	for {
		old := r.now.Load()
		next := &position{at: r.along(old, now), since: now, direction: direction}
		if r.now.CompareAndSwap(old, next) {
			return
		}
	}
}

// reset puts the ramp back to its beginning, where it stands still.
func (r *ramp) reset(now int64) { r.now.Store(&position{since: now}) }

// percentage is what the ramp accepts: the first step's target all through the first step, and from there on a straight
// line to each next target. It ends on the last target, not a tick before it.
func (r *ramp) percentage(now int64) float64 {
	at := r.along(r.now.Load(), now)
	from := r.steps[0].Target
	for i, s := range r.steps {
		if length := int64(s.Duration); at < length {
			if i == 0 {
				return from
			}
			return from + (s.Target-from)*float64(at)/float64(length)
		}
		at -= int64(s.Duration)
		from = s.Target
	}
	return from
}
