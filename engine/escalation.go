package engine

import (
	"cmp"
	"math"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/policy"
)

// escalate returns the changes to other numbers and back, while a load scheduler lets in too little; nil if there is no
// escalation. Changed is called after each change; it may be nil.
func (p *installed) escalate(e *Engine, when policy.Escalation, changed func()) *bucket.Changes {
	if when.Load == "" {
		return nil
	}
	changes := new(bucket.Changes)
	from := componentName{p.named.policy, when.Load}
	below, escalated := int64(-1), false // since when it is below; -1 if it is not
	p.looks = append(p.looks, func(now int64) {
		// The scheduler is looked up each time, because Apply may replace it and keep the limiter. What is not a number is not
		// below.
		switch multiplier := desired(e.rules.Load().byName[from]); {
		case !(multiplier < when.Below):
			below = -1
		case below < 0:
			below = now
		}
		is := below >= 0 && now-below >= int64(when.For)
		if is == escalated {
			return
		}
		escalated = is
		changes.Set(e.now(), is)
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
	return changes
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

// desired returns the load multiplier that a load scheduler was last set to; NaN if it accepts every flow.
func desired(p *installed) float64 {
	if p == nil {
		return math.NaN()
	}
	s, ok := p.component.(*scheduler[load])
	if !ok {
		return math.NaN()
	}
	s.single.Lock()
	defer s.single.Unlock()
	return s.single.State.tokens.multiplier
}

// wake serves the flows that wait for tokens, at any key, after the numbers have changed.
func (s *scheduler[S]) wake() {
	serve := func(e *keys.Entry[line[S]]) {
		if e.State.waiting() {
			e.State.queue.changes++
			s.serve(e, s.engine.now())
		}
	}
	if s.table != nil {
		s.table.Each(serve)
		return
	}
	s.single.Lock()
	defer s.single.Unlock()
	serve(s.single)
}
