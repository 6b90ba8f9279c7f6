package engine

import (
	"fmt"
	"maps"
	"regexp"
	"slices"

	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/policy"
)

// A selector says which flows of its control point a component acts on.
type selector struct {
	service string // "" for all
	match   []condition
}

// A condition looks at a flow's labels.
type condition func(*seam.Labels) bool

func (s *selector) selects(labels *seam.Labels) bool {
	return (s.service == "" || s.service == labels.Service()) && holdAll(s.match, labels)
}

// selectors act on a flow that one of them selects.
type selectors []selector

func (s selectors) selects(labels *seam.Labels) bool {
	for i := range s {
		if s[i].selects(labels) {
			return true
		}
	}
	return false
}

func holdAll(conditions []condition, labels *seam.Labels) bool {
	for _, holds := range conditions {
		if !holds(labels) {
			return false
		}
	}
	return true
}

func compileSelector(s policy.Selector) (selector, error) {
	compiled := selector{service: s.Service}
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
	for _, label := range slices.Sorted(maps.Keys(m.Equal)) {
		all = append(all, labelEquals(label, m.Equal[label]))
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
	key, values := r.Key, slices.Clone(r.Values)
	in := func(l *seam.Labels) bool {
		value, ok := l.Lookup(key)
		return ok && slices.Contains(values, value)
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
		return func(l *seam.Labels) bool { return holdAll(of, l) }, err
	case policy.Any:
		of, err := compileExpressions(e)
		return func(l *seam.Labels) bool {
			return slices.ContainsFunc(of, func(c condition) bool { return c(l) })
		}, err
	case policy.LabelExists:
		return labelExists(string(e)), nil
	case policy.LabelEquals:
		return labelEquals(e.Label, e.Value), nil
	case policy.LabelMatches:
		re, err := regexp.Compile(e.Regex)
		if err != nil {
			return nil, err
		}
		return func(l *seam.Labels) bool {
			value, ok := l.Lookup(e.Label)
			return ok && re.MatchString(value)
		}, nil
	default:
		return nil, fmt.Errorf("unknown expression %T", e)
	}
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
	return func(l *seam.Labels) bool {
		_, ok := l.Lookup(key)
		return ok
	}
}

func labelEquals(key, want string) condition {
	return func(l *seam.Labels) bool {
		value, ok := l.Lookup(key)
		return ok && value == want
	}
}

func not(c condition) condition {
	return func(l *seam.Labels) bool { return !c(l) }
}
