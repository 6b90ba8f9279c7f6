package engine

import (
	"context"
	"slices"
	"sync/atomic"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/shared"
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
	if e.shares(p.Local) {
		l.ramp.shared = newSharedRamp(e, shared.Key{Policy: c.Policy, Component: c.ID}, l.ramp)
		in.ramp = l.ramp.shared
	}
	s.percentage = l.ramp.percentage
	return l, nil
}

func (l *loadRamp) course() *ramp { return l.ramp }

// A Ramp moves a load ramp of a policy while the engine runs. Get one with [Component.Ramp]. It belongs to the policies in force
// at that time: after [Engine.Apply], get the new one if the policy's ramp has changed. It is safe for concurrent use.
type Ramp struct {
	engine *Engine
	course *ramp
}

// Forward makes the ramp move towards its last step's target, from its present place.
//
// If engines share a store (see [WithStore]), the ramp moves in the store, and all engines follow within a second. The context
// bounds the wait for the store. If the store returns an error, Forward returns it, and the ramp may not have moved. Without a
// store there is no error.
func (r *Ramp) Forward(ctx context.Context) error { return r.move(ctx, 1) }

// Backward makes the ramp move back through its steps, down to the beginning of the first one. See Forward for the error.
func (r *Ramp) Backward(ctx context.Context) error { return r.move(ctx, -1) }

// Hold stops the ramp where it is. See Forward for the error.
func (r *Ramp) Hold(ctx context.Context) error { return r.move(ctx, 0) }

// Reset puts the ramp back to the beginning of its first step, where it stands still. See Forward for the error.
func (r *Ramp) Reset(ctx context.Context) error {
	if s := r.course.shared; s != nil {
		return s.move(ctx, func(*position, int64) *position { return new(position) })
	}
	r.course.reset(r.engine.now())
	return nil
}

func (r *Ramp) move(ctx context.Context, direction int64) error {
	if s := r.course.shared; s != nil {
		return s.move(ctx, func(p *position, now int64) *position { return r.course.moved(p, now, direction) })
	}
	r.course.move(r.engine.now(), direction)
	return nil
}

// Percentage is the share of flows that the ramp accepts now, from 0 to 100.
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
	shared *sharedRamp // nil if the ramp is the engine's own
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
		if old := r.now.Load(); r.now.CompareAndSwap(old, r.moved(old, now, direction)) {
			return
		}
	}
}

// moved returns the position from which the ramp goes on in another direction.
func (r *ramp) moved(p *position, now, direction int64) *position {
	return &position{at: r.along(p, now), since: now, direction: direction, left: direction > 0 || direction == 0 && p.left}
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
