package engine

import (
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/pattern"
	"github.com/headgate-go/headgate/policy"
)

// A selector says which flows of its control point a component acts on.
type selector struct {
	service string // "" for all
	match   []condition
	picked  atomic.Bool // it has picked a flow

	controlPoint, labels string // for people; see policy.LabelMatcher
	since                uint64 // flows that the control point had accepted before the component came into force
}

// A condition looks at a flow's labels.
type condition func(*agentapi.Labels) truth

// A truth is what is known of a condition. It is unknown if a value is too long to be matched in time, or was cut; of several
// conditions the others may decide (Kleene's three-valued logic).
type truth int8

const (
	no truth = iota
	unknown
	yes
)

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

func (s *selector) selects(labels *agentapi.Labels) truth {
	if s.service != "" && s.service != labels.Service() {
		return no
	}
	return holdAll(s.match, labels)
}

// selectors act on a flow that one of them selects.
type selectors []*selector

// selects reports whether one of them selects the flow. The first that does has picked it.
func (s selectors) selects(labels *agentapi.Labels) truth {
	most, by := no, (*selector)(nil)
	for _, one := range s {
		if t := one.selects(labels); t > most {
			if most, by = t, one; t == yes {
				break
			}
		}
	}
	if by != nil && !by.picked.Load() { // so that it is written once
		by.picked.Store(true)
	}
	return most
}

func holdAll(conditions []condition, labels *agentapi.Labels) truth {
	least := yes
	for _, holds := range conditions {
		if least = min(least, holds(labels)); least == no {
			break
		}
	}
	return least
}

func holdAny(conditions []condition, labels *agentapi.Labels) truth {
	most := no
	for _, holds := range conditions {
		if most = max(most, holds(labels)); most == yes {
			break
		}
	}
	return most
}

func compileSelector(s policy.Selector) (*selector, error) {
	compiled := &selector{service: s.Service, controlPoint: s.ControlPoint}
	if s.Service == "any" {
		compiled.service = ""
	}
	var err error
	compiled.match, err = compileMatcher(s.Labels)
	return compiled, err
}

// compileMatcher gives the conditions that all must hold.
func compileMatcher(m policy.LabelMatcher) ([]condition, error) {
	var all []condition
	if len(m.Equal) > 0 {
		for _, label := range slices.Sorted(maps.Keys(m.Equal)) {
			all = append(all, labelEquals(label, m.Equal[label]))
		}
	}
	for _, r := range m.Require {
		c, err := compileRequirement(r)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if m.Expression != nil {
		c, err := compileExpression(m.Expression)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func compileRequirement(r policy.Requirement) (condition, error) {
	key, contains := r.Key, oneOf(r.Values)
	in := func(l *agentapi.Labels) truth {
		value, ok := l.Lookup(key)
		return truthOf(ok && contains(value))
	}
	switch r.Operator {
	case policy.In:
		return in, nil
	case policy.NotIn:
		return not(in), nil
	case policy.Exists:
		return labelExists(key), nil
	case policy.DoesNotExist:
		return not(labelExists(key)), nil
	default:
		return nil, fmt.Errorf("unknown operator %q", r.Operator)
	}
}

// fewValues is the number of values up to which a search beats a map.
const fewValues = 8

// oneOf returns a function that reports whether a value is one of those. Its cost grows neither with the number of
// values, nor with the length of a value beyond the longest of them.
func oneOf(values []string) func(string) bool {
	values = slices.Clone(values)
	if len(values) <= fewValues {
		return func(value string) bool { return slices.Contains(values, value) }
	}
	set, longest := make(map[string]struct{}, len(values)), 0
	for _, value := range values {
		set[value] = struct{}{}
		longest = max(longest, len(value))
	}
	return func(value string) bool {
		if len(value) > longest {
			return false
		}
		_, ok := set[value]
		return ok
	}
}

func compileExpression(e policy.Expression) (condition, error) {
	switch e := e.(type) {
	case policy.Not:
		of, err := compileExpression(e.Of)
		if err != nil {
			return nil, err
		}
		return not(of), nil
	case policy.All:
		of, err := compileExpressions(e)
		return func(l *agentapi.Labels) truth { return holdAll(of, l) }, err
	case policy.Any:
		of, err := compileExpressions(e)
		return func(l *agentapi.Labels) truth { return holdAny(of, l) }, err
	case policy.LabelExists:
		return labelExists(string(e)), nil
	case policy.LabelEquals:
		return labelEquals(e.Label, e.Value), nil
	case policy.LabelMatches:
		re, err := pattern.Compile(e.Regex)
		if err != nil {
			return nil, err
		}
		return func(l *agentapi.Labels) truth {
			value, ok := l.Lookup(e.Label)
			if !ok {
				return no
			}
			if mayBeCut(value) {
				return unknown
			}
			matches, ok := re.Match(value)
			if !ok {
				return unknown
			}
			return truthOf(matches)
		}, nil
	default:
		return nil, fmt.Errorf("unknown expression %T", e)
	}
}

// mayBeCut reports whether a client may have cut the value, as labels.Repair does. The value then says nothing about what follows.
func mayBeCut(value string) bool {
	return len(value) > bounds.MaxLabelValue-utf8.UTFMax && len(value) <= bounds.MaxLabelValue
}

func compileExpressions(es []policy.Expression) ([]condition, error) {
	compiled := make([]condition, len(es))
	for i, e := range es {
		var err error
		if compiled[i], err = compileExpression(e); err != nil {
			return nil, err
		}
	}
	return compiled, nil
}

func labelExists(key string) condition {
	return func(l *agentapi.Labels) truth {
		_, ok := l.Lookup(key)
		return truthOf(ok)
	}
}

func labelEquals(key, want string) condition {
	return func(l *agentapi.Labels) truth {
		value, ok := l.Lookup(key)
		return truthOf(ok && value == want)
	}
}

func not(c condition) condition {
	return func(l *agentapi.Labels) truth { return yes - c(l) }
}
