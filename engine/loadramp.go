package engine

import (
	"slices"
	"sync/atomic"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// A loadRamp is a sampler in ramp mode whose percentage moves.
type loadRamp struct {
	*sampler
	ramp *ramp
}

func newLoadRamp(e *Engine, in *installed, p policy.LoadRamp, c agentapi.Component) (component, error) {
	s := samplerOf(e, in, policy.Sampler{
		Selectors:         p.Selectors,
		SessionLabel:      p.SessionLabel,
		PassThroughValues: p.PassThroughValues,
		DeniedStatus:      p.DeniedStatus,
		DryRun:            p.DryRun,
	}, c)
	l := &loadRamp{sampler: s, ramp: newRamp(p, e.now())}
	s.percentage = l.ramp.percentage
	return l, nil
}

func (l *loadRamp) course() *ramp { return l.ramp }

// A Ramp moves a load ramp of a policy while the engine runs. Get one with [Component.Ramp]. It is that of the policies
// in force then: after [Engine.Apply], get the new one if the policy's ramp has changed. It is safe for concurrent use.
type Ramp struct {
	engine *Engine
	course *ramp
}

// Forward has the ramp move towards its last step's target, from where it stands.
func (r *Ramp) Forward() { r.course.move(r.engine.now(), 1) }

// Backward has the ramp move back the way it came, down to the beginning of its first step.
func (r *Ramp) Backward() { r.course.move(r.engine.now(), -1) }

// Hold has the ramp stand still where it is.
func (r *Ramp) Hold() { r.course.move(r.engine.now(), 0) }

// Reset puts the ramp back to the beginning of its first step, where it stands still.
func (r *Ramp) Reset() { r.course.reset(r.engine.now()) }

// Percentage is the share of flows that the ramp accepts just now, 0 to 100.
func (r *Ramp) Percentage() float64 { return r.course.percentage(r.engine.now()) }

// A position is where a load ramp stands and which way it moves. It is never changed, only replaced, so that flows read
// it without a lock.
type position struct {
	at        int64 // nanoseconds from the ramp's beginning, at the time since
	since     int64
	direction int64 // 1 forward, -1 backward, 0 still
	left      bool  // it has left the beginning of its first step, which may have no length
}

// ramp is the course of a load ramp.
type ramp struct {
	steps  []policy.RampStep
	length int64
	starts bool // by itself
	now    atomic.Pointer[position]
}

func newRamp(p policy.LoadRamp, now int64) *ramp {
	r := &ramp{steps: slices.Clone(p.Steps), starts: p.Start}
	for _, s := range p.Steps {
		r.length = min(r.length+min(int64(s.Duration), source.Century), source.Century) // so that the sum fits an int64
	}
	start := &position{since: now}
	if p.Start {
		start.direction, start.left = 1, true
	}
	r.now.Store(start)
	return r
}

// along is how far along the ramp p has come.
func (r *ramp) along(p *position, now int64) int64 {
	return min(max(p.at+p.direction*max(now-p.since, 0), 0), r.length)
}

// move changes the direction of the ramp, from where it stands.
func (r *ramp) move(now, direction int64) {
	for {
		old := r.now.Load()
		next := &position{at: r.along(old, now), since: now, direction: direction}
		next.left = direction > 0 || direction == 0 && old.left
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
	p, from := r.now.Load(), r.steps[0].Target
	at := r.along(p, now)
	if at == 0 && !p.left {
		return from
	}
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
