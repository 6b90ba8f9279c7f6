package engine

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// rules are what the policies in force were compiled to. They are never changed, only replaced, so that flows read them
// without a lock.
type rules struct {
	installed     []*installed // in the order of the policies
	controlPoints map[string]*controlPoint
	sinks         map[string][]latencySink // by control point
	named         map[string]bool          // labels that policies read; see [Engine.NamedLabels]
	warnings      warnings
}

// installed is a component and what belongs to it. It goes on in the rules that come after, for as long as a policy has the
// same.
type installed struct {
	component
	named    identity
	sinks    map[string][]latencySink
	controls []func(now int64) // what the controller does
	holds    bool              // flows hold slots of it
	reported uint64            // overflows that were logged; the sweeper's own
}

// identity is how a component is named over the wire. The hash is that of all that is configured, so that of two
// components with one identity it does not matter which is which.
type identity struct{ policy, hash, id string }

// retired is one that is no longer in force, for as long as flows may hold slots of it.
type retired struct {
	*installed
	since int64
}

// Apply puts the policies into force, all at once and in place of those that were; none is fine. The error joins all that
// is wrong with them; then the old ones stay in force. Flows are decided about meanwhile.
//
// A component that stays the same, in a policy of the same name, with the same ID and the same configuration, goes on
// with its buckets, slots, queues, course and measurements. Others begin with full buckets and free slots. Without an
// ID a component is known by its place in the policy: give those an ID that are to keep what they have when that
// changes. A flow in flight ends where it began, and gives its slots back there, over the network as well, until the
// MaxInflight of its slots has passed; to a limiter that is new they do not count. A flow that waits in a queue which
// is no longer in force gives back what it has, and is decided about by the new policies, with the time that it has
// left.
func (e *Engine) Apply(policies []policy.Policy) error {
	e.applying.Lock()
	defer e.applying.Unlock()
	if e.closed.Load() {
		return fmt.Errorf("headgate: engine: %w", agentapi.ErrClosed)
	}
	next, err := e.compile(policies)
	if err != nil {
		return fmt.Errorf("headgate: engine: %w", err)
	}
	e.install(next)
	return nil
}

// install puts the rules into force. The goroutines that they need run from then on.
func (e *Engine) install(next *rules) {
	old := e.rules.Load()
	before, after := setOf(old.installed), setOf(next.installed)
	e.mu.Lock()
	for _, p := range next.installed {
		if p.holds && !before[p] {
			e.holders[p.named] = append(slices.Clip(e.holders[p.named]), p.component)
		}
	}
	e.mu.Unlock()
	e.rules.Store(next)
	e.warn(e.Warnings())
	// From here on, nobody who is sent away by a retired component comes back to it.
	for _, p := range old.installed {
		if after[p] {
			continue
		}
		p.retire()
		if p.holds {
			e.mu.Lock()
			e.retired = append(e.retired, retired{installed: p, since: e.now()})
			e.mu.Unlock()
		}
	}
	if !e.sweeping && len(next.installed) > 0 {
		e.sweeping = true
		e.running.Go(e.sweep)
	}
	steered := func(p *installed) bool { return len(p.controls) > 0 }
	if !e.controlled && slices.ContainsFunc(next.installed, steered) {
		e.controlled = true
		e.running.Go(e.control)
	}
}

// setOf makes a set of components: a file may have 100,000.
func setOf(all []*installed) map[*installed]bool {
	set := make(map[*installed]bool, len(all))
	for _, p := range all {
		set[p] = true
	}
	return set
}

// sweepRetired forgets components of which nobody holds anything, as slots that are held for too long are nobody's, and what
// no flow holds of the others. A flow that was under way when its limiter was retired may take a slot a little later,
// which is waited for if it does within a minute. One that waits elsewhere for longer ends well, but the answer
// over the network is that nothing came back.
func (e *Engine) sweepRetired() {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retired = slices.DeleteFunc(e.retired, func(r retired) bool {
		r.sweep(now, false)
		if now-r.since < int64(sweepEvery) || !r.vacant(now) {
			return false
		}
		left := slices.DeleteFunc(slices.Clone(e.holders[r.named]), func(c component) bool { return c == r.component })
		if e.holders[r.named] = left; len(left) == 0 {
			delete(e.holders, r.named)
		}
		return true
	})
}

// compile makes rules of the policies, with the components in force where they are the same.
func (e *Engine) compile(policies []policy.Policy) (*rules, error) {
	kept := make(map[identity]*installed, len(e.rules.Load().installed))
	for _, p := range e.rules.Load().installed {
		kept[p.named] = p
	}
	r := &rules{controlPoints: make(map[string]*controlPoint), sinks: make(map[string][]latencySink), named: make(map[string]bool)}
	components := 0
	for _, p := range policies {
		components += len(p.Components)
	}
	r.installed = make([]*installed, 0, components)
	var errs []error
	names := make(map[string]bool, len(policies))
	for _, p := range policies {
		if names[p.Name] {
			errs = append(errs, fmt.Errorf("policy %q: the name is taken by another policy", p.Name))
		}
		names[p.Name] = true
		errs = append(errs, e.add(r, p, kept))
	}
	slices.SortFunc(r.warnings.missing, missing.compare)
	return r, errors.Join(errs...)
}

// add compiles one policy.
func (e *Engine) add(r *rules, p policy.Policy, kept map[identity]*installed) error {
	if err := p.Validate(); err != nil {
		return err
	}
	r.warnings.unused = append(r.warnings.unused, p.Warnings...)
	for i, c := range p.Components {
		id := agentapi.Component{Policy: p.Name, Hash: configHash(p.Name, c), ID: "root." + strconv.Itoa(i)}
		built := new(installed)
		selectors, err := e.build(built, c, id)
		if err == nil {
			id := built.identity()
			built.named = identity{id.Policy, id.Hash, id.ID}
			if k := kept[built.named]; k != nil {
				built = k
			}
			err = r.place(built.component, selectors, e.rules.Load().controlPoints)
		}
		if err != nil {
			return fmt.Errorf("policy %q: components[%d]: %w", p.Name, i, err)
		}
		r.warnings.look(p.Name, built.named.id, c)
		r.installed = append(r.installed, built)
		r.name(built.identity(), c)
		r.acts(built.identity(), selectors)
		for at, sinks := range built.sinks {
			r.sinks[at] = append(r.sinks[at], sinks...)
		}
	}
	return nil
}

// build sets a component up, whose own ID goes before its place in the policy.
func (e *Engine) build(p *installed, c policy.Component, id agentapi.Component) (selectors []policy.Selector, err error) {
	switch c := c.(type) {
	case policy.RateLimiter:
		id.Kind, id.ID = agentapi.KindRateLimiter, cmp.Or(c.ID, id.ID)
		id.LabelKey, id.DeniedStatus, id.Capacity = c.LimitBy, c.DeniedStatus, c.Capacity
		p.component, selectors = newRateLimiter(e, c, id), c.Selectors
	case policy.ConcurrencyLimiter:
		id.Kind, id.ID = agentapi.KindConcurrencyLimiter, cmp.Or(c.ID, id.ID)
		id.LabelKey, id.DeniedStatus, id.Capacity = c.LimitBy, c.DeniedStatus, c.Max
		p.holds = true
		p.component, selectors = newConcurrencyLimiter(e, c, id), c.Selectors
	case policy.QuotaScheduler:
		id.Kind, id.ID = agentapi.KindQuotaScheduler, cmp.Or(c.ID, id.ID)
		id.LabelKey, id.DeniedStatus, id.Capacity = c.LimitBy, c.Scheduler.DeniedStatus, c.Capacity
		p.component, err = newQuotaScheduler(e, c, id)
		selectors = c.Selectors
	case policy.ConcurrencyScheduler:
		id.Kind, id.ID = agentapi.KindConcurrencyScheduler, cmp.Or(c.ID, id.ID)
		id.LabelKey, id.DeniedStatus, id.Capacity = c.LimitBy, c.Scheduler.DeniedStatus, c.Max
		p.holds = true
		p.component, err = newConcurrencyScheduler(e, c, id)
		selectors = c.Selectors
	case policy.LoadScheduler:
		id.Kind, id.ID, id.DeniedStatus = agentapi.KindLoadScheduler, cmp.Or(c.ID, id.ID), c.Scheduler.DeniedStatus
		p.component, err = newLoadScheduler(e, p, c, id)
		selectors = c.Selectors
	case policy.AIMDLoadScheduler:
		id.Kind, id.ID, id.DeniedStatus = agentapi.KindLoadScheduler, cmp.Or(c.ID, id.ID), c.Scheduler.DeniedStatus
		p.component, err = newAIMDLoadScheduler(e, p, c, id)
		selectors = c.Selectors
	case policy.Sampler:
		id.ID = cmp.Or(c.ID, id.ID)
		p.component, selectors = newSampler(e, c, id), c.Selectors
	case policy.LoadRamp:
		id.ID = cmp.Or(c.ID, id.ID)
		p.component, selectors = newLoadRamp(e, c, id), c.Selectors
	default:
		err = fmt.Errorf("the engine cannot run a %T", c)
	}
	return selectors, err
}

// place registers the component at each of its control points, once. What was counted there goes on.
func (r *rules) place(c component, selectors []policy.Selector, before map[string]*controlPoint) error {
	for _, s := range selectors {
		compiled, err := compileSelector(s)
		if err != nil {
			return err
		}
		p := r.controlPoints[s.ControlPoint]
		if p == nil {
			p = new(controlPoint)
			if b := before[s.ControlPoint]; b != nil {
				p.counts = b.counts
			} else {
				p.counts = new(counts)
			}
			r.controlPoints[s.ControlPoint] = p
		}
		p.add(c, compiled)
	}
	return nil
}
