package engine

import (
	"fmt"
	"maps"
	"slices"

	"github.com/headgate-go/headgate/policy"
)

// known is what conditions that must all hold say of a label.
type known struct {
	present, absent bool
	among           map[string]bool // the values that it may have; nil if it may have any
	not             map[string]bool // the values that it does not have
}

// contradicts reports whether no label is like that.
func (k known) contradicts() bool {
	if !k.present {
		return false
	}
	if k.absent {
		return true
	}
	if k.among == nil {
		return false
	}
	for value := range k.among {
		if !k.not[value] {
			return false
		}
	}
	return true
}

// A conjunction is what is known of labels, by their names.
type conjunction map[string]known

// present notes that a flow has the label, with one of the values if there are any.
func (c conjunction) present(label string, values ...string) {
	k := c[label]
	k.present = true
	if len(values) > 0 {
		among := make(map[string]bool, len(values))
		for _, value := range values {
			if k.among == nil || k.among[value] {
				among[value] = true
			}
		}
		k.among = among
	}
	c[label] = k
}

// absent notes that a flow does not have the label.
func (c conjunction) absent(label string) {
	k := c[label]
	k.absent = true
	c[label] = k
}

// not notes that a flow does not have the label with any of the values.
func (c conjunction) not(label string, values ...string) {
	k := c[label]
	if k.not == nil {
		k.not = make(map[string]bool, len(values))
	}
	for _, value := range values {
		k.not[value] = true
	}
	c[label] = k
}

// expression adds what an expression says, or its negation. It leaves out what is one of several possibilities.
func (c conjunction) expression(e policy.Expression, negated bool) {
	switch e := e.(type) {
	case policy.Not:
		c.expression(e.Of, !negated)
	case policy.All:
		if !negated || len(e) == 1 {
			for _, part := range e {
				c.expression(part, negated)
			}
		}
	case policy.Any:
		if negated || len(e) == 1 {
			for _, part := range e {
				c.expression(part, negated)
			}
		}
	case policy.LabelExists:
		if negated {
			c.absent(string(e))
		} else {
			c.present(string(e))
		}
	case policy.LabelEquals:
		if negated {
			c.not(e.Label, e.Value)
		} else {
			c.present(e.Label, e.Value)
		}
	case policy.LabelMatches:
		if !negated {
			c.present(e.Label)
		}
	}
}

// contradiction returns the first label that no flow has as the conditions say.
func (c conjunction) contradiction() (label string, found bool) {
	for _, label := range slices.Sorted(maps.Keys(c)) {
		if c[label].contradicts() {
			return label, true
		}
	}
	return "", false
}

// knownOf returns what the matcher says of the labels of the flows that it matches.
func knownOf(m policy.LabelMatcher) conjunction {
	c := make(conjunction)
	for label, value := range m.Equal {
		c.present(label, value)
	}
	for _, r := range m.Require {
		switch r.Operator {
		case policy.In:
			c.present(r.Key, r.Values...)
		case policy.NotIn:
			c.not(r.Key, r.Values...)
		case policy.Exists:
			c.present(r.Key)
		case policy.DoesNotExist:
			c.absent(r.Key)
		}
	}
	c.expression(m.Expression, false)
	return c
}

// neverHolds returns why a matcher matches no flow, to stand behind what it is of; "" if it may match some.
func neverHolds(m policy.LabelMatcher) string {
	if always(m.Expression) == no {
		return ".Expression holds for no flow: an any without parts is false, and an all without parts is true"
	}
	if label, found := knownOf(m).contradiction(); found {
		return fmt.Sprintf(" holds for no flow: its conditions on the label %q contradict each other", label)
	}
	if possible(m.Expression, false) {
		return ""
	}
	return ".Expression holds for no flow: in each of its possibilities, conditions on a label contradict each other"
}

// possible reports whether an expression, or its negation, may hold for a flow.
func possible(e policy.Expression, negated bool) bool {
	var parts []policy.Expression
	all := negated // the parts must all hold
	switch e := e.(type) {
	case policy.Not:
		return possible(e.Of, !negated)
	case policy.All:
		parts, all = e, !negated
	case policy.Any:
		parts = e
	default:
		return true
	}
	if !all {
		return slices.ContainsFunc(parts, func(part policy.Expression) bool { return possible(part, negated) })
	}
	c := make(conjunction)
	c.expression(e, negated)
	if _, found := c.contradiction(); found {
		return false
	}
	return !slices.ContainsFunc(parts, func(part policy.Expression) bool { return !possible(part, negated) })
}

// always is what an expression is for every flow, whatever its labels are; unknown where that depends on the flow.
func always(e policy.Expression) truth {
	switch e := e.(type) {
	case policy.Not:
		return yes - always(e.Of)
	case policy.All:
		least := yes
		for _, part := range e {
			least = min(least, always(part))
		}
		return least
	case policy.Any:
		most := no
		for _, part := range e {
			most = max(most, always(part))
		}
		return most
	default:
		return unknown
	}
}
