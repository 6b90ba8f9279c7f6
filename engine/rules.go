package engine

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync/atomic"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/components"
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
	shared    bool              // its state is in the store
	selectors []policy.Selector // until they are compiled
	acts      selectors         // in the order of the policy
	sinks     map[string][]latencySink
	controls  []func(now int64) // what the controller does
	looks     []func(now int64) // what it does each second
	override  func(any) (any, error)
	picks     string // an encoding of the selectors

	escalation *escalation // nil for none
	ramp       *sharedRamp // nil for none

	// follows is the component whose state it takes over when it comes into force, because only numbers differ.
	follows *installed

	// What was logged. The sweeper uses it.
	reported        atomic.Uint64 // overflows
	reportedInvalid atomic.Uint64 // overrides that the host's function returned
}

// identity names a component over the wire. The hash covers all that is configured, so two components with one identity
// can stand for each other.
type identity struct{ policy, hash, id string }

// A componentName is what people call a component.
type componentName struct{ policy, id string }

// retired is a component that is no longer in force, kept for as long as flows may hold slots of it. If another component has
// followed it, it is only a name that the slots of before have.
type retired struct {
	*installed
	since    int64
	followed bool
}

// Apply replaces the policies in force, all at once. An empty list is valid. If a policy is invalid, the old policies stay in
// force, and the error joins every problem. The engine decides about flows meanwhile.
//
// A component keeps its buckets, slots, queues, course and measurements if its policy's name, its ID and its configuration stay
// the same. A component without an ID is known by its kind and its index among the policy's components of that kind. Give it an
// ID if it is to keep its state when the index changes.
//
// A limiter, a circuit breaker, and a scheduler that has a LimitBy field, also keep their state if anything changes besides the
// label and how buckets fill: StepFill and DelayInitialFill, or the period, the time zone and the start of the week of a calendar
// quota. The new numbers hold at once. A bucket first gets the tokens that have come by the old numbers, and what was used stays
// used: with 5 more of Capacity, it has 5 tokens more. With less Capacity it has fewer tokens, but no debt that it did not have
// before. Slots stay taken, even if there are more than the new Max. Waiting flows keep their places, and are served by the new
// numbers. The engine decides about them anew if the tokens to come can never be enough for them. It does so, too, if no flow
// waits any more because of a dry run or PassThrough. A [policy.Escalation] that is in force stays in force, with its new
// numbers.
//
// All other components begin with full buckets and free slots. A flow in flight gives its slots back to the component that
// granted them, over the network too, until their MaxInflight has passed. A new limiter does not count these slots. If a flow
// waits in a queue that is no longer in force, it gives back what it has. The new policies decide about it, within the time that
// it has left.
//
// With [WithOverrides], Apply calls the function for all keys, one after the other, before it returns.
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
	followed := make(map[*installed]bool)
	for _, p := range next.installed {
		if p.follows != nil {
			followed[p.follows] = true
			p.reported.Store(p.follows.reported.Load())
			p.reportedInvalid.Store(p.follows.reportedInvalid.Load())
			p.component.(successor).takeOver() //nolint:forcetypeassert // it has said that it can
		}
	}
	if !maps.Equal(before, after) || !slices.Equal(old.warnings.unused, next.warnings.unused) { // else all were logged
		e.warn(e.Warnings())
	}
	// From here on, a flow that a retired component sends away does not come back to it.
	for _, p := range old.installed {
		if after[p] {
			continue
		}
		if !followed[p] {
			if p.retiree != nil {
				p.retiree.retire()
			}
		}
		if p.kind.slots {
			e.mu.Lock()
			e.retired = append(e.retired, retired{installed: p, since: e.now(), followed: followed[p]})
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
	ahead := func(p *installed) bool {
		l, ok := p.component.(interface{ leases() bool })
		return ok && l.leases()
	}
	if e.store != nil && !e.leased.runs && slices.ContainsFunc(next.installed, ahead) {
		e.leased.runs = true
		e.running.Go(e.collectLeases)
	}
	if slices.ContainsFunc(next.installed, func(p *installed) bool { return p.ramp != nil }) {
		if !e.following {
			e.following = true
			e.running.Go(e.followRamps)
		}
		select {
		case e.ramped <- struct{}{}: // those that are new do not wait
		default:
		}
	}
	for _, p := range next.installed {
		p.follows = nil
	}
	if e.overrides != nil {
		for _, p := range next.installed {
			if a, ok := p.component.(asker); ok {
				a.askAgain()
			}
		}
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
	held := e.heldSince(now)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retired = slices.DeleteFunc(e.retired, func(r retired) bool {
		if r.followed {
			since, ok := held[r.keeps()]
			if now-r.since < int64(sweepEvery) || ok && since < r.since+int64(sweepEvery) {
				return false
			}
			e.forget(r.installed)
			return true
		}
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

// keeps identifies the state of a component that another one has followed.
func (r retired) keeps() any { return r.component.(successor).keeps() } //nolint:forcetypeassert // only those are followed

// heldSince returns when the slots were taken that are held the longest, for each state that a component has taken over. It looks at
// all keys of these, so it holds no lock meanwhile.
func (e *Engine) heldSince(now int64) map[any]int64 {
	e.mu.RLock()
	all := slices.Clone(e.retired)
	e.mu.RUnlock()
	held, seen := make(map[any]int64), make(map[any]bool)
	for _, r := range all {
		if !r.followed || seen[r.keeps()] {
			continue
		}
		seen[r.keeps()] = true
		if since, ok := r.component.(successor).oldest(now); ok { //nolint:forcetypeassert // only those are followed
			held[r.keeps()] = since
		}
	}
	return held
}

// compile makes rules of the policies. It keeps the components in force that stay the same.
func (e *Engine) compile(policies []policy.Policy) (*rules, error) {
	kept := make(map[identity]*installed, len(e.rules.Load().installed))
	for _, p := range e.rules.Load().installed {
		kept[p.named] = p
	}
	r := &rules{controlPoints: make(map[string]*controlPoint), sinks: make(map[string][]latencySink), named: make(map[string]bool)}
	r.warnings.shared = e.store != nil
	most := 0
	for _, p := range policies {
		most += len(p.Components)
	}
	r.installed = make([]*installed, 0, most)
	r.byName = make(map[componentName]*installed, most)
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
	unread := maps.Clone(p.Labels)
	for i, d := range p.Describe() {
		c, _ := d.Component.(policy.Component)
		kind := kinds[d.Kind]
		built, err := kind.install(e, c, d, agentapi.Component{Policy: p.Name, Hash: configHash(p.Name, c)})
		if err == nil {
			selectors := built.selectors
			built.selectors = nil
			r.acts(built.identity(), selectors, built.sinks)
			before := e.rules.Load().controlPoints
			if k := kept[built.named]; k != nil {
				built = k
			} else {
				err = built.come(e.rules.Load().byName[componentName{p.Name, d.ID}], selectors, before)
			}
			r.place(built, before)
		}
		if err != nil {
			return fmt.Errorf("policy %q: components[%d]: %w", p.Name, i, err)
		}
		from := len(r.warnings.waits)
		of := fmt.Sprintf("policy %q: component %q", p.Name, d.ID)
		kind.look(&r.warnings, of, c)
		r.warnings.conditions(of, "", reflect.ValueOf(c))
		for i := range r.warnings.waits[from:] {
			r.warnings.waits[from+i].by = built.component
		}
		r.installed = append(r.installed, built)
		r.byName[componentName{p.Name, d.ID}] = built
		r.name(built.identity(), d.Reads)
		for at, sinks := range built.sinks {
			r.sinks[at] = append(r.sinks[at], sinks...)
		}
		d.Names(func(_ components.Role, name string) { delete(unread, name) })
	}
	for name, of := range unread {
		r.warnings.missing = append(r.warnings.missing, missing{components.LimitsBy, fmt.Sprintf(
			"policy %q: no component reads %q, which is a name of the policy's for the label %q", p.Name, name, of)})
	}
	return nil
}

// come prepares the component to come into force after the one of the same name, which may be nil.
func (p *installed) come(after *installed, list []policy.Selector, before map[string]*controlPoint) error {
	p.picks = string(appendValue(nil, reflect.ValueOf(list)))
	if after != nil && after.kind == p.kind {
		if s, ok := p.component.(successor); ok && s.follow(after.component) {
			p.follows = after
			if after.picks == p.picks { // they go on counting
				p.acts = after.acts
				return nil
			}
		}
	}
	var err error
	p.acts, err = compileSelectors(list, before)
	return err
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
