package engine

import (
	"context"
	"net/http"
	"sync/atomic"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// A stage is a step of a check. All its components decide about a flow; if one of them drops it, later stages are not
// asked. A flow in dry run passes every stage, as if all components were in dry run.
type stage int

// The stages, in the order of an Aperture agent.
const (
	stageRamp        stage = iota // samplers in ramp mode and load ramps; a flow in ramp mode needs at least one
	stageSample                   // samplers
	stageLimit                    // rate limiters, calendar quotas, concurrency limiters and circuit breakers
	stageShared                   // those of the limiters whose state is in the store, all together
	stageConcurrency              // concurrency schedulers
	stageLoad                     // quota and load schedulers, unless the flow's result is in the cache
	stages
)

// reason is why the stage rejects the flow. For a flow that is not in ramp mode, a ramp is like any sampler.
func (s stage) reason(req *agentapi.Request) agentapi.Reason {
	switch {
	case s == stageRamp && req.RampMode():
		return agentapi.ReasonNoMatchingRamp
	case s <= stageSample:
		return agentapi.ReasonNotSampled
	case s == stageLimit, s == stageShared:
		return agentapi.ReasonRateLimited
	default:
		return agentapi.ReasonNoTokens
	}
}

// A controlPoint is what acts at one control point, by stages.
type controlPoint struct {
	stages [stages][]placement
	counts *counts // of its flows; carried over from the rules before

	// unpicked counts the accepted flows that no component picked. It is carried over too, and nil where there are no
	// components.
	unpicked *atomic.Pointer[counts]
}

// countUnpicked counts a flow that no component picked.
func (p *controlPoint) countUnpicked(req *agentapi.Request) {
	c := p.unpicked.Load()
	if c == nil { // most control points have no such flow
		c = new(counts)
		if !p.unpicked.CompareAndSwap(nil, c) {
			c = p.unpicked.Load()
		}
	}
	count(c, req, decided(agentapi.ReasonNone))
}

// unpickedFlows returns how many flows were accepted that no component picked.
func (p *controlPoint) unpickedFlows() uint64 {
	if p.unpicked == nil {
		return p.counts.sum(decided(agentapi.ReasonNone))
	}
	if c := p.unpicked.Load(); c != nil {
		return c.sum(decided(agentapi.ReasonNone))
	}
	return 0
}

// A placement is a component in its place at one control point.
type placement struct {
	component
	decider   decider // the component, if it is asked by itself
	sharer    sharer  // the component, if it is asked together with others
	id        *agentapi.Component
	selectors selectors
}

func (p *controlPoint) add(in *installed, s *selector) {
	placements := &p.stages[in.stage]
	if n := len(*placements); n == 0 || (*placements)[n-1].component != in.component {
		one := placement{component: in.component, id: in.identity()}
		one.decider, _ = in.component.(decider)
		one.sharer, _ = in.component.(sharer)
		*placements = append(*placements, one)
	}
	last := &(*placements)[len(*placements)-1]
	last.selectors = append(last.selectors, s)
}

// controlPoint returns what acts at the control point: nothing if no policy names it.
func (e *Engine) controlPoint(controlPoint string) *controlPoint {
	if p := e.rules.Load().controlPoints[controlPoint]; p != nil {
		return p
	}
	return &e.unlisted
}

// count counts a flow that has been decided about.
func (p *controlPoint) count(req *agentapi.Request, v *agentapi.Verdict) {
	reason := agentapi.ReasonNone
	switch {
	case v.Rejected():
		reason = v.Rejection().Reason
	case v.Len() > 0 || p.unpicked == nil:
	case v.Details == nil || !v.Details.Result.Hit || len(p.stages[stageLoad]) == 0: // else some were not asked
		p.countUnpicked(req)
	}
	count(p.counts, req, decided(reason))
}

// decide asks the stages of the flow's control point. After an error the flow may hold something. A rejected flow in
// dry run may too, because it runs: it goes on to the later stages and to the cache.
func (e *Engine) decide(ctx context.Context, p *controlPoint, req *agentapi.Request, now *int64, v *agentapi.Verdict) error {
	dry := req.DryRun()
	for s := range stages {
		if s == stageLoad && req.Lookup() != nil {
			if e.lookup(ctx, p, req, now, v); v.Details.Result.Hit {
				break
			}
		}
		if len(p.stages[s]) > 0 {
			from := v.Len()
			var dropped bool
			var err error
			if s == stageShared {
				dropped, err = e.askTogether(ctx, p.stages[s], req, now, v)
			} else {
				dropped, err = e.ask(ctx, p.stages[s], req, now, v)
			}
			if err != nil {
				return err
			}
			if dropped && !dry {
				e.undo(ctx, v)
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

// ask asks all placements of a stage: the answer tells a client about each. They are asked one after the other, in the
// same order for all flows, so that no two flows wait for what the other one holds. A flow that one component has
// dropped waits for no other, and a flow in dry run waits for none. Now advances while the flow waits. Dropped reports
// whether a component dropped the flow, in the flow's dry run too; a component in dry run drops no flow.
func (e *Engine) ask(ctx context.Context, placements []placement, req *agentapi.Request, now *int64, v *agentapi.Verdict) (dropped bool, err error) {
	late := req.Late()
	for i := range placements {
		m := &placements[i]
		d, asks := m.meet(req, late, v)
		if d == nil {
			continue
		}
		if asks {
			a := asking{start: v.Start - e.epoch.UnixNano(), now: *now, wait: !dropped && !d.DryRun}
			if *now, err = m.decider.ask(ctx, req, a, d); err != nil {
				return dropped, err
			}
		}
		dropped = dropped || d.Dropped && !m.id.DryRun
	}
	return dropped, nil
}

// meet adds a decision to the verdict if the component picks the flow; otherwise d is nil. It reports whether the component is to be
// asked. If not, it has refused the flow.
func (m *placement) meet(req *agentapi.Request, late bool, v *agentapi.Verdict) (d *agentapi.LimiterDecision, asks bool) {
	selected := m.selectors.selects(&req.Labels)
	if selected == no {
		return nil, false
	}
	d = v.Add(m.id)
	d.DryRun = req.DryRun() || m.id.DryRun
	switch {
	case selected == unknown:
		m.refuse(req, d, agentapi.CauseLongLabel)
	case late:
		m.refuse(req, d, agentapi.CauseLate)
	default:
		return d, true
	}
	return d, false
}

// undo gives back what the flow was given. If a function of the program's panics meanwhile, no decision is left: another undo, which may
// follow, must not give back twice.
func (e *Engine) undo(ctx context.Context, v *agentapi.Verdict) {
	undone := false
	defer func() {
		if !undone {
			*v = agentapi.Verdict{}
		}
	}()
	e.settleFrom(ctx, v, 0, agentapi.Outcome{Ended: agentapi.EndedUnused})
	undone = true
	for i := range v.Len() {
		if d := v.At(i); !d.Dropped {
			d.Hold(0)
		}
	}
}

// slotsToCome reports whether the flow was dropped only because all slots were taken.
func slotsToCome(d *agentapi.LimiterDecision) bool {
	return d.Component.Slots && d.Capacity > 0 && d.Cause != agentapi.CauseLate && d.Cause != agentapi.CauseLongLabel &&
		d.Cause != agentapi.CauseNoStore
}

// reject turns the verdict into a rejection by the decisions of a stage that dropped the flow: the longest wait counts,
// then the order. If several stages drop a flow in dry run, the first one counts. If the engine was closed while the
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
	if own := by.Component.Reason; own != agentapi.ReasonNone {
		reason = own
	}
	r := agentapi.Rejection{Reason: reason, Cause: by.Cause, Status: int16(by.Component.DeniedStatus), By: by.Component}
	if by.Cause == agentapi.CauseNoStore {
		r.Status = http.StatusServiceUnavailable
	}
	if !hopeless && !closed {
		r.RetryAfter = by.Wait()
		r.NoReturns = r.RetryAfter == 0 && slotsToCome(by)
	}
	v.Reject(r)
}
