package engine

import (
	"fmt"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
)

// A Usage is what one value of a limiter's or scheduler's label has, at one time.
type Usage struct {
	// Capacity is the most tokens that its bucket holds, or the slots that there are. A load scheduler's is what it
	// lets in during a second, +Inf where that is everything.
	Capacity float64

	// Remaining is what is left of it: less than none where flows cost more than was free.
	Remaining float64

	// InFlight counts the flows that hold slots; 0 where there are none to hold.
	InFlight int

	// Waiting counts the flows in the queue.
	Waiting int
}

// An inspected component has a state for each value of its label.
type inspected interface {
	component
	usage(value string, now int64) Usage
	reset(value string, now int64)
}

// Peek tells what the value of its label has at a limiter or a scheduler, for those who run the engine; it takes nothing.
// A component is named by its policy and its own ID, which is "root.<index>" where the policy gives it none. The value is
// "" where it has no label. A value that no flow has had yet has everything; one that has no bucket of its own (see
// [WithKeyCap]) shares the one that is told about. The error says which of the names the engine does not have.
func (e *Engine) Peek(policyName, component, value string) (Usage, error) {
	c, err := e.inspect(policyName, component, value)
	if err != nil {
		return Usage{}, err
	}
	return c.usage(value, e.now()), nil
}

// Reset gives the value of its label a new bucket, or new slots, at a limiter or a scheduler that is named as for
// [Engine.Peek]. Flows that wait are served from it. Slots that flows hold are forgotten, and do not come back when
// those flows end, so that for a while more may be at work than there are slots. A load scheduler learns its load
// again, and lets everything in meanwhile.
func (e *Engine) Reset(policyName, component, value string) error {
	c, err := e.inspect(policyName, component, value)
	if err != nil {
		return err
	}
	c.reset(value, e.now())
	return nil
}

// inspect finds what can be looked at.
func (e *Engine) inspect(policyName, id, value string) (inspected, error) {
	c, err := e.component(policyName, id)
	if err != nil {
		return nil, fmt.Errorf("headgate: engine: %w", err)
	}
	i, ok := c.(inspected)
	switch {
	case !ok:
		return nil, fmt.Errorf("headgate: engine: policy %q: component %q: a sampler has no buckets", policyName, id)
	case value != "" && c.identity().LabelKey == "":
		return nil, fmt.Errorf("headgate: engine: policy %q: component %q: it has no label whose value could be given", policyName, id)
	}
	return i, nil
}

// component finds a component by its names.
func (e *Engine) component(policyName, id string) (component, error) {
	known := false
	for _, p := range e.rules.Load().installed {
		switch {
		case p.named.policy != policyName:
		case p.named.id == id:
			return p.component, nil
		default:
			known = true
		}
	}
	if !known {
		return nil, fmt.Errorf("no policy %q", policyName)
	}
	return nil, fmt.Errorf("policy %q: no component %q", policyName, id)
}

// met returns the entry that a flow with the value would meet, locked. It counts as no use.
func (k *keyed[S]) met(value string, now int64) *keys.Entry[S] {
	if k.table == nil {
		k.single.Lock()
		return k.single
	}
	return k.table.LockPeek(k.namer.Name(value), now)
}

func (l *limiter[S]) usage(value string, now int64) Usage {
	e := l.met(value, now)
	defer e.Unlock()
	return usageOf(l.source.Usage(&e.State, now))
}

func (l *limiter[S]) reset(value string, now int64) {
	e := l.met(value, now)
	defer e.Unlock()
	l.source.Fresh(&e.State, now)
}

func (s *scheduler[S]) usage(value string, now int64) Usage {
	e := s.met(value, now)
	defer e.Unlock()
	l := &e.State
	if l.waiting() {
		s.serve(e, now) // what has come by now is for those who wait
	}
	u := usageOf(s.source.Usage(&l.tokens, now))
	if l.queue != nil {
		u.Waiting = l.queue.Len()
	}
	return u
}

func (s *scheduler[S]) reset(value string, now int64) {
	e := s.met(value, now)
	defer e.Unlock()
	s.source.Fresh(&e.State.tokens, now)
	if e.State.waiting() {
		e.State.queue.changes++
		s.serve(e, now)
	}
}

func usageOf(u source.Usage) Usage {
	return Usage{Capacity: u.Capacity, Remaining: u.Remaining, InFlight: u.InFlight}
}
