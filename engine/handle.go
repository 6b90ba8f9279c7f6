package engine

import (
	"context"
	"fmt"
	"slices"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/deadline"
	"github.com/headgate-go/headgate/policy"
)

// A Usage is what one value of a limiter's or scheduler's label has, at one time.
type Usage struct {
	// Capacity is the most tokens that the bucket holds, or the number of slots. A load scheduler's is the tokens that
	// it lets in each second, +Inf for everything.
	Capacity float64

	// Remaining is how many of these are left. It is below 0 if flows cost more than was free.
	Remaining float64

	// InFlight counts the flows that hold slots. It is 0 for a component without slots.
	InFlight int

	// Waiting counts the flows in the queue.
	Waiting int

	// State is "closed", "open" or "half-open" at a circuit breaker, and empty elsewhere. The numbers of a circuit breaker are about
	// probes: Capacity is how many there may be at a time, Remaining how many more it lets through, and InFlight how many are
	// under way. A circuit breaker that is closed lets through all flows, and has the whole Capacity left.
	State string
}

// A Component lets the engine's host inspect, reset or move a limiter, a circuit breaker, a scheduler, a sampler or a load ramp.
// Get one with [Engine.Component]. It belongs to the policies in force at that time: after [Engine.Apply], get the new one if its
// policy has changed. It is safe for concurrent use.
type Component struct {
	engine *Engine
	of     *installed
}

// Component finds a component of the policies in force by the name of its policy and its ID. A component without an ID
// has its kind and its index among the policy's components of that kind, as in "rate_limiter.0"; in files in Aperture's
// shapes, the ID is "root.<index>". The error names what the engine does not have: the policy, or its component.
func (e *Engine) Component(policyName, id string) (*Component, error) {
	r := e.rules.Load()
	if p := r.byName[componentName{policyName, id}]; p != nil {
		return &Component{engine: e, of: p}, nil
	}
	if !slices.ContainsFunc(r.installed, func(p *installed) bool { return p.named.policy == policyName }) {
		return nil, fmt.Errorf("headgate: engine: no policy %q", policyName)
	}
	return nil, fmt.Errorf("headgate: engine: policy %q: no component %q", policyName, id)
}

// Policy returns the name of the component's policy.
func (c *Component) Policy() string { return c.of.named.policy }

// ID returns the component's ID in its policy; see [Engine.Component].
func (c *Component) ID() string { return c.of.named.id }

// Kind returns what policy files call such a component; see [ComponentStats].
func (c *Component) Kind() string { return c.of.name }

// Peek returns the usage of a value of the component's label, at a limiter or a scheduler. It takes nothing. The value is "" for
// a component without a label. If no flow has had the value yet, everything is left. For a value without a bucket of its own,
// Peek returns the usage of the shared one (see [WithKeyCap]). It returns an error if the component has no buckets, if it has no
// label and the value is not "", or if it is no longer in force. The context bounds the wait for a store (see [WithStore]).
// Components in memory ignore it.
func (c *Component) Peek(ctx context.Context, value string) (Usage, error) {
	i, err := c.inspected(value)
	if err != nil {
		return Usage{}, err
	}
	return i.peek(ctx, value, c.engine.now())
}

// Reset gives a value of the component's label a new bucket or new slots, and closes its circuit breaker; see [Component.Peek]
// for the value and the errors. Waiting flows are served from the new state. Slots that flows hold are forgotten, and do not come
// back when those flows end. So for a while, more flows may run than there are slots. A load scheduler learns its load again, and
// lets everything in meanwhile.
func (c *Component) Reset(ctx context.Context, value string) error {
	i, err := c.inspected(value)
	if err != nil {
		return err
	}
	return i.reset(ctx, value, c.engine.now())
}

// componentError is the error of a call about a component. It names the policy and the component, because the caller has named
// them. Strangers see the errors of flows, which name neither.
func componentError(policyName, id string, err error) error {
	return deadline.Errorf("headgate: engine: policy %q: component %q: %w", policyName, id, err)
}

// Top returns the values of the component's label whose flows it rejects most often, the most frequent first. Use it to find out
// whose flows a limit rejects: values of labels are in no metric, log or error. A limiter, circuit breaker or scheduler with a
// label keeps 64 values. Every value with more than a 64th of its rejections is among them. Other components have no values. In a
// dry run, Top counts flows that the component would have rejected. It leaves out flows that share a bucket (see [WithKeyCap]),
// because it cannot tell them apart. It also leaves out flows that came with too little time, and some of the flows that were
// rejected in the same moment.
func (c *Component) Top() []TopValue {
	r, ok := c.of.component.(rejecting)
	if !ok {
		return nil
	}
	return r.top(c.engine.epoch)
}

// Ramp returns the component as a ramp that can be moved. It returns false if the component is not a [policy.LoadRamp].
func (c *Component) Ramp() (*Ramp, bool) {
	m, ok := c.of.component.(moved)
	if !ok {
		return nil, false
	}
	return &Ramp{engine: c.engine, course: m.course()}, true
}

// inspected returns the component if there is something to look at.
func (c *Component) inspected(value string) (inspected, error) {
	wrong := func(why string) error {
		return fmt.Errorf("headgate: engine: policy %q: component %q: %s", c.of.named.policy, c.of.named.id, why)
	}
	i, ok := c.of.component.(inspected)
	switch {
	case !ok:
		return nil, wrong("a " + c.of.name + " has no buckets")
	case value != "" && c.of.identity().LabelKey == "":
		return nil, wrong("it has no label whose value could be given")
	case i.gone():
		return nil, wrong("it is no longer in force")
	}
	return i, nil
}

// met returns the entry that a flow with the value would meet, locked, and its numbers. It counts as no use. A value that no flow has
// had yet has an entry that is in no table.
func (k *keyed[S, R]) met(value string, now int64) (*keys.Entry[S], *numbers[R]) {
	if k.table == nil {
		k.single.Lock()
		return k.single, k.of(k.single)
	}
	name := k.namer.Name(value)
	if e := k.table.LockPeek(name); e != nil {
		return e, k.of(e)
	}
	t := k.terms.Load()
	place, _ := t.placed(name) // that of its own numbers if there is none
	n := t.number(place)
	if k.asking {
		if o := k.ask(value, name); o != (policy.Override{}) {
			if other, err := t.with(o); err == nil {
				n = other
			}
		}
	}
	e := new(keys.Entry[S])
	e.Lock()
	k.ruling.fresh(n.rule, &e.State, now)
	return e, n
}

func (l *limiter[S]) peek(_ context.Context, value string, now int64) (Usage, error) {
	return l.usage(value, now), nil
}

func (l *limiter[S]) usage(value string, now int64) Usage {
	e, n := l.met(value, now)
	defer e.Unlock()
	return usageOf(n.rule.Usage(&e.State, now))
}

func (l *limiter[S]) reset(_ context.Context, value string, now int64) error {
	e, n := l.met(value, now)
	defer e.Unlock()
	n.rule.Fresh(&e.State, now)
	return nil
}

func (s *scheduler[S]) peek(_ context.Context, value string, now int64) (Usage, error) {
	return s.usage(value, now), nil
}

func (s *scheduler[S]) usage(value string, now int64) Usage {
	e, n := s.met(value, now)
	defer e.Unlock()
	l := &e.State
	if l.waiting() {
		s.serve(e, now) // what has come by now is for the flows that wait
	}
	u := usageOf(n.rule.Usage(&l.tokens, now))
	if l.queue != nil {
		u.Waiting = l.queue.Len()
	}
	return u
}

func (s *scheduler[S]) reset(_ context.Context, value string, now int64) error {
	e, n := s.met(value, now)
	defer e.Unlock()
	n.rule.Fresh(&e.State.tokens, now)
	if e.State.waiting() {
		e.State.queue.changes++
		s.serve(e, now)
	}
	return nil
}

func usageOf(u source.Usage) Usage {
	return Usage{Capacity: u.Capacity, Remaining: u.Remaining, InFlight: u.InFlight}
}
