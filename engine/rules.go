package engine

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

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
	byName        map[componentName]*installed
	warnings      warnings
}

// installed is a component and what belongs to it. Later rules keep it for as long as a policy has the same component.
type installed struct {
	component
	keeper  keeper  // the component, if it keeps keys
	retiree retiree // the component, if it is one

	kind      *kind
	name      string // of the kind
	named     identity
	before    []identity // by which flows of before a restart end, too; guarded by Engine.mu
	stage     stage
	selectors []policy.Selector // until they are compiled
	acts      selectors         // in the order of the policy
	sinks     map[string][]latencySink
	controls  []func(now int64) // what the controller does
	retired   atomic.Bool       // it is no longer in force
	reported  uint64            // overflows that were logged; only the sweeper uses it
}

// identity names a component over the wire. The hash covers all that is configured, so two components with one identity
// can stand for each other.
type identity struct{ policy, hash, id string }

// A componentName is what people call a component.
type componentName struct{ policy, id string }

// retired is a component that is no longer in force, kept for as long as flows may hold slots of it.
type retired struct {
	*installed
	since int64
}

// Apply replaces the policies in force, all at once. There may be none. If a policy is invalid, the old policies stay
// in force; the error joins every problem. Flows are decided about meanwhile.
//
// A component keeps its buckets, slots, queues, course and measurements if its policy's name, its ID and its
// configuration stay the same. Others begin with full buckets and free slots. Without an ID, a component is known by
// its kind and its index among the policy's components of that kind: give it an ID if it is to keep its state when the
// index changes. A flow in flight gives its slots back where it got them, over the network too, until their MaxInflight
// has passed; a new limiter does not count them. A flow that waits in a queue that is no longer in force gives back
// what it has. The new policies decide about it, within the time that it has left.
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
		if p.kind.slots && !before[p] {
			e.holders[p.named] = append(slices.Clip(e.holders[p.named]), p.component)
		}
	}
	e.mu.Unlock()
	e.rules.Store(next)
	if !maps.Equal(before, after) || !slices.Equal(old.warnings.unused, next.warnings.unused) { // else all were logged
		e.warn(e.Warnings())
	}
	// From here on, a flow that a retired component sends away does not come back to it.
	for _, p := range old.installed {
		if after[p] {
			continue
		}
		p.retired.Store(true)
		if p.retiree != nil {
			p.retiree.retire()
		}
		if p.kind.slots {
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

// sweepRetired forgets the retired components of which no flow holds a slot, and the idle keys of the others. A slot
// that is held for too long does not count. A flow that was under way when its limiter was retired may take a slot a
// little later: a component is kept for a minute for that. A flow that takes one later ends well, but the answer over
// the network is that nothing came back.
func (e *Engine) sweepRetired() {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retired = slices.DeleteFunc(e.retired, func(r retired) bool {
		if r.keeper != nil {
			r.keeper.sweep(now, false)
		}
		if now-r.since < int64(sweepEvery) || r.retiree != nil && !r.retiree.vacant(now) {
			return false
		}
		e.forget(r.installed)
		return true
	})
}

// compile makes rules of the policies. It keeps the components in force that stay the same.
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
	r.byName = make(map[componentName]*installed, components)
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
	for i, d := range p.Describe() {
		c, kind := p.Components[i], kinds[d.Kind]
		built, err := kind.install(e, c, d, agentapi.Component{Policy: p.Name, Hash: configHash(p.Name, c)})
		if err == nil {
			selectors := built.selectors
			built.selectors = nil
			r.acts(built.identity(), selectors)
			before := e.rules.Load().controlPoints
			if k := kept[built.named]; k != nil {
				built = k
			} else {
				built.acts, err = compileSelectors(selectors, before)
			}
			r.place(built, before)
		}
		if err != nil {
			return fmt.Errorf("policy %q: components[%d]: %w", p.Name, i, err)
		}
		from := len(r.warnings.waits)
		kind.look(&r.warnings, fmt.Sprintf("policy %q: component %q", p.Name, d.ID), c)
		for i := range r.warnings.waits[from:] {
			r.warnings.waits[from+i].by = built.component
		}
		r.installed = append(r.installed, built)
		r.byName[componentName{p.Name, d.ID}] = built
		r.name(built.identity(), d.Reads)
		for at, sinks := range built.sinks {
			r.sinks[at] = append(r.sinks[at], sinks...)
		}
	}
	return nil
}

// compileSelectors compiles those of a component that comes into force. It notes how many flows came before.
func compileSelectors(list []policy.Selector, before map[string]*controlPoint) (selectors, error) {
	all := make(selectors, len(list))
	for i, s := range list {
		var err error
		if all[i], err = compileSelector(s); err != nil {
			return nil, err
		}
		all[i].labels = s.Labels.String()
		if b := before[s.ControlPoint]; b != nil {
			all[i].since = b.counts.sum(decided(agentapi.ReasonNone))
		}
	}
	return all, nil
}

// place registers the component at each of its control points, once. The counters of a control point go on.
func (r *rules) place(in *installed, before map[string]*controlPoint) {
	for _, s := range in.acts {
		p := r.controlPoints[s.controlPoint]
		if p == nil {
			p = new(controlPoint)
			if b := before[s.controlPoint]; b != nil {
				p.counts, p.unpicked = b.counts, b.unpicked
			} else {
				p.counts, p.unpicked = new(counts), new(atomic.Pointer[counts])
			}
			r.controlPoints[s.controlPoint] = p
		}
		p.add(in, s)
	}
}

// missed returns how many flows were accepted at the selector's control point while the component is in force, if the
// selector has picked none.
func (r *rules) missed(s *selector) uint64 {
	if s.picked.Load() {
		return 0
	}
	return r.controlPoints[s.controlPoint].counts.sum(decided(agentapi.ReasonNone)) - s.since
}
