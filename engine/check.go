package engine

import (
	"context"
	"errors"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A stage is a step of a check. Its components all say what they think of a flow; when one of them drops it, the stages
// after it are not asked. A flow in dry run passes every stage, as if all components were in dry run.
type stage int

// The stages, in the order of an Aperture agent.
const (
	stageRamp        stage = iota // samplers in ramp mode and load ramps, of which flows in ramp mode need one
	stageSample                   // samplers
	stageLimit                    // rate limiters and concurrency limiters
	stageConcurrency              // concurrency schedulers
	stageLoad                     // quota and load schedulers, unless the flow's result is in the cache
	stages
)

// stageOf is where the component belongs.
func stageOf(c *agentapi.Component) stage {
	switch c.Kind {
	case agentapi.KindRampSampler:
		return stageRamp
	case agentapi.KindSampler:
		return stageSample
	case agentapi.KindConcurrencyScheduler:
		return stageConcurrency
	case agentapi.KindQuotaScheduler, agentapi.KindLoadScheduler:
		return stageLoad
	default:
		return stageLimit
	}
}

// reason is why the stage rejects the flow. To a flow that is not in ramp mode a ramp is a sampler as any.
func (s stage) reason(req *agentapi.Request) agentapi.Reason {
	switch {
	case s == stageRamp && req.RampMode():
		return agentapi.ReasonNoMatchingRamp
	case s <= stageSample:
		return agentapi.ReasonNotSampled
	case s == stageLimit:
		return agentapi.ReasonRateLimited
	default:
		return agentapi.ReasonNoTokens
	}
}

// A controlPoint is what acts at one control point, by stages.
type controlPoint struct {
	stages [stages][]placement
	counts *counts // of its flows; those of the control point in rules before, if there was one
}

// A placement is a component in its place at one control point.
type placement struct {
	component
	waits     admitter // the component, where flows may wait for it
	id        *agentapi.Component
	selectors selectors
}

// An admitter is a component that may have a flow wait.
type admitter interface {
	// admit is decide for a flow that waits, if it must, for as long as it can, which began to ask at start. It gives the
	// time then. An error means that it did not decide, because the flow's caller has gone or, errRetired, the component
	// is no longer in force.
	admit(ctx context.Context, req *agentapi.Request, start, now int64, d *agentapi.LimiterDecision) (int64, error)
}

func (p *controlPoint) add(c component, s selector) {
	placements := &p.stages[stageOf(c.identity())]
	if n := len(*placements); n == 0 || (*placements)[n-1].component != c {
		waits, _ := c.(admitter)
		*placements = append(*placements, placement{component: c, waits: waits, id: c.identity()})
	}
	last := &(*placements)[len(*placements)-1]
	last.selectors = append(last.selectors, s)
}

// Check decides about a flow. Clients of package flowctl call it. It waits where a scheduler has the flow wait; then an
// error is that of ctx. If the engine is closed meanwhile, the flow is rejected. If it was closed before, the error is
// agentapi.ErrClosed.
func (e *Engine) Check(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) error {
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	start := e.now()
	now := start
	for {
		v.Start = e.epoch.UnixNano() + start
		p := e.controlPoint(req.ControlPoint)
		err := e.decide(ctx, p, req, &now, v)
		if err == nil {
			p.count(req, v)
			break
		}
		undo(v, now)
		*v = agentapi.Verdict{}
		if !errors.Is(err, errRetired) {
			if ctx.Err() != nil {
				count(p.counts, req, flowsCanceled)
			}
			return err
		}
	}
	if now != start {
		v.More().Waited = time.Duration(now - start)
	}
	return nil
}

// controlPoint is what acts at the control point, which is nothing at those that no policy names.
func (e *Engine) controlPoint(controlPoint string) *controlPoint {
	if p := e.rules.Load().controlPoints[controlPoint]; p != nil {
		return p
	}
	return &e.unlisted
}

// count counts a flow that has been decided about.
func (p *controlPoint) count(req *agentapi.Request, v *agentapi.Verdict) {
	reason := agentapi.ReasonNone
	if v.Rejected() {
		reason = v.Rejection().Reason
	}
	count(p.counts, req, decided(reason))
}

// decide asks the stages of the flow's control point. After an error the flow may hold something, and in a dry run after a
// rejection too, for then it runs: it goes on to the stages and to the cache that it would not have come to.
func (e *Engine) decide(ctx context.Context, p *controlPoint, req *agentapi.Request, now *int64, v *agentapi.Verdict) error {
	dry := req.DryRun()
	for s := range stages {
		if s == stageLoad && req.Lookup() != nil {
			if e.lookup(p, req, v); v.Details.Result.Hit {
				break
			}
		}
		if len(p.stages[s]) > 0 {
			from := v.Len()
			dropped, err := e.ask(ctx, p.stages[s], req, now, v)
			if err != nil {
				return err
			}
			if dropped && !dry {
				undo(v, *now)
			}
			if dropped {
				reject(v, from, s.reason(req))
			}
		}
		if s == stageRamp && req.RampMode() && v.Len() == 0 {
			v.Reject(agentapi.Rejection{Reason: agentapi.ReasonNoMatchingRamp})
		}
		if v.Rejected() && !dry {
			break
		}
	}
	return nil
}

// ask asks the placements of a stage, all of them: a client is told about each. They are asked one after the other, in an
// order that is the same for all flows, so that no two of them wait for what the other one holds. After one has dropped
// the flow, it waits for none, and in a dry run neither. The time goes on while it waits. Dropped reports what components in
// force decided, in a flow's dry run too; a component in dry run drops no flow.
func (e *Engine) ask(ctx context.Context, placements []placement, req *agentapi.Request, now *int64, v *agentapi.Verdict) (dropped bool, err error) {
	late, dry := req.Late(), req.DryRun()
	for i := range placements {
		m := &placements[i]
		selected := m.selectors.selects(&req.Labels)
		if selected == no {
			continue
		}
		d := v.Add(m.id)
		d.DryRun = dry || m.id.DryRun
		switch {
		case selected == unknown:
			m.refuse(req, d, agentapi.CauseLongLabel)
		case late:
			m.refuse(req, d, agentapi.CauseLate)
		case m.waits == nil || dropped || d.DryRun:
			m.decide(req, *now, d)
		default:
			if *now, err = m.waits.admit(ctx, req, v.Start-e.epoch.UnixNano(), *now, d); err != nil {
				return dropped, err
			}
		}
		dropped = dropped || d.Dropped && !m.id.DryRun
	}
	return dropped, nil
}

// undo gives back what the flow was given.
func undo(v *agentapi.Verdict, now int64) {
	for i := range v.Len() {
		d := v.At(i)
		if c, ok := d.Component.Limiter.(component); ok && !d.Dropped {
			c.giveBack(now, d, true)
			d.Hold(0)
		}
	}
}

// slotsToCome reports whether the decision was for want of a slot that some flow can have.
func slotsToCome(d *agentapi.LimiterDecision) bool {
	switch d.Component.Kind {
	case agentapi.KindConcurrencyLimiter, agentapi.KindConcurrencyScheduler:
		return d.Component.Capacity > 0 && d.Cause != agentapi.CauseLate && d.Cause != agentapi.CauseLongLabel
	default:
		return false
	}
}

// reject turns the verdict into a rejection by the decisions of a stage that dropped the flow: the longest wait counts,
// then the order. The first stage counts, of those that a flow in dry run is dropped by. If the engine was closed while the
// flow waited, that counts before all: a flow that came back would not be limited any more.
func reject(v *agentapi.Verdict, from int, reason agentapi.Reason) {
	var by *agentapi.LimiterDecision
	hopeless, closed := false, false
	for i := from; i < v.Len(); i++ {
		d := v.At(i)
		if !d.Dropped || d.Component.DryRun {
			continue
		}
		if d.Wait() == source.Never || d.Wait() >= source.Century/2 { // which is about where waits are cut off
			d.Drop(0)
			hopeless = true
		}
		if d.Cause == agentapi.CauseClosed {
			by, closed = d, true
			break
		}
		if by == nil || d.Wait() > by.Wait() {
			by = d
		}
	}
	if v.Rejected() {
		return
	}
	r := agentapi.Rejection{Reason: reason, Cause: by.Cause, Status: int16(by.Component.DeniedStatus), By: by.Component}
	if !hopeless && !closed {
		r.RetryAfter = by.Wait()
		r.NoReturns = r.RetryAfter == 0 && slotsToCome(by)
	}
	v.Reject(r)
}
