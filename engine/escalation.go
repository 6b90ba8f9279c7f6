package engine

import (
	"cmp"
	"math"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/policy"
)

// An escalation is the course of the escalation of one limiter. The controller alone goes on with it, so it has no lock. A limiter whose
// policy changes leaves it to the next one of its name: a load scheduler that keeps flows out does so whatever Apply changes.
type escalation struct {
	below   int64 // since when the load scheduler is below; -1 if it is not
	is      bool  // the other numbers are in force
	changes bucket.Changes
}

// escalate returns the changes to other numbers and back, while a load scheduler lets in too little; nil if there is no
// escalation. Changed is called after each change; it may be nil.
func (p *installed) escalate(e *Engine, when policy.Escalation, changed func()) *bucket.Changes {
	if when.Load == "" {
		return nil
	}
	if before := e.rules.Load().byName[componentName{p.named.policy, p.named.id}]; before != nil {
		p.escalation = before.escalation
	}
	if p.escalation == nil {
		p.escalation = &escalation{below: -1}
	}
	c := p.escalation
	from := componentName{p.named.policy, when.Load}
	p.looks = append(p.looks, func(now int64) {
		// The scheduler is looked up each time, because Apply may replace it and keep the limiter.
		switch share := lettingIn(e.rules.Load().byName[from], now); {
		case !(share < when.Below):
			c.below = -1
		case c.below < 0:
			c.below = now
		}
		is := c.below >= 0 && now-c.below >= int64(when.For)
		if is == c.is {
			return
		}
		c.is = is
		c.changes.Set(e.now(), is)
		if changed != nil {
			changed()
		}
		if is {
			e.logger.Warn("headgate: a limiter has other numbers, because a load scheduler lets in little",
				"policy", from.policy, "component", p.named.id, "load_scheduler", from.id, "capacity", when.Capacity, "fill", when.Fill)
		} else {
			e.logger.Info("headgate: a limiter has its own numbers again", "policy", from.policy, "component", p.named.id)
		}
	})
	return &c.changes
}

// atMost returns the escalation of a value with an override, which gives it no more than it has otherwise: an override may be there to
// refuse the value.
func atMost(when policy.Escalation, capacity, fill float64) policy.Escalation {
	when.Capacity, when.Fill = min(when.Capacity, capacity), min(when.Fill, fill)
	return when
}

// escalated gives the rule the other numbers for the times that changes say, if that is not nil.
func escalated(rule *bucket.Rule, when policy.Escalation, changes *bucket.Changes) *bucket.Rule {
	if changes == nil {
		return rule
	}
	other := *rule
	other.Capacity, other.Fill = when.Capacity, when.Fill
	if other.MaxDebt == 0 { // which is the capacity; a debt is not forgiven because of a smaller one
		other.MaxDebt = cmp.Or(rule.Capacity, math.SmallestNonzeroFloat64)
	}
	rule.Other, rule.Changes = &other, changes
	return rule
}

// lettingIn returns the share of the load that a load scheduler lets in, +Inf for everything. A scheduler lets everything in while it
// learns how much comes: at first, and after a silence. A dry run counts as letting everything in, because a dry run changes no decision.
func lettingIn(p *installed, now int64) float64 {
	if p == nil {
		return math.Inf(1)
	}
	s, ok := p.component.(*scheduler[load])
	if !ok || s.component.DryRun {
		return math.Inf(1)
	}
	s.single.Lock()
	defer s.single.Unlock()
	l := &s.single.State.tokens
	l.relearn(now / int64(time.Second))
	return (*loadRule)(nil).letIn(l)
}

// wake serves the flows that wait for tokens, at any key, after the numbers have changed.
func (s *scheduler[S]) wake() {
	s.each(func(e *keys.Entry[line[S]]) {
		if e.State.waiting() {
			e.State.queue.changes++
			s.serve(e, s.engine.now())
		}
	})
}
