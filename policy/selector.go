package policy

import "github.com/headgate-go/headgate/internal/components"

// A Selector picks the flows of one control point, or those of them whose labels match.
type Selector struct {
	// ControlPoint is compared exactly; there is no wildcard. Required.
	ControlPoint string

	// Service is compared exactly with the client's service name. Empty and "any" select every service.
	Service string

	// Labels narrows the selection. The zero value matches all labels.
	Labels LabelMatcher
}

// At selects every flow of the control points.
func At(controlPoints ...string) []Selector {
	selectors := make([]Selector, len(controlPoints))
	for i, cp := range controlPoints {
		selectors[i].ControlPoint = cp
	}
	return selectors
}

// A LabelMatcher matches labels that satisfy all of its parts. The zero value matches everything.
type LabelMatcher struct {
	// Equal holds labels and the exact values they must have.
	Equal map[string]string

	// Require holds conditions on single labels.
	Require []Requirement

	// Expression is a condition of any shape; nil is always true.
	Expression Expression
}

// A Requirement is a condition on one label.
type Requirement struct {
	Key      string
	Operator Operator
	Values   []string // for In and NotIn: at least one
}

// Operator is how a [Requirement] looks at its label.
type Operator string

// The operators. A label that a flow does not have satisfies NotIn.
const (
	In           Operator = "In"
	NotIn        Operator = "NotIn"
	Exists       Operator = "Exists"
	DoesNotExist Operator = "DoesNotExist"
)

// An Expression is a condition on labels: [Not], [All], [Any], [LabelExists], [LabelEquals] or [LabelMatches]. The
// interface is sealed.
type Expression interface {
	expression()
}

type (
	// Not is true when Of is false.
	Not struct{ Of Expression }

	// All is true when each of its parts is; without parts it is true.
	All []Expression

	// Any is true when at least one of its parts is; without parts it is false.
	Any []Expression

	// LabelExists is true when the flow has the label.
	LabelExists string

	// LabelEquals is true when the flow has the label with just this value.
	LabelEquals struct{ Label, Value string }

	// LabelMatches is true when the flow has the label and Regex (RE2, not anchored) finds a match in its value. Regex
	// compiles to at most 1,000 instructions. If the value has more bytes than 262,144 divided by the number of
	// instructions, a match would take too long: the component rejects the flow, unless its other conditions do not
	// hold.
	LabelMatches struct{ Label, Regex string }
)

func (Not) expression()          {}
func (All) expression()          {}
func (Any) expression()          {}
func (LabelExists) expression()  {}
func (LabelEquals) expression()  {}
func (LabelMatches) expression() {}

// selectorsRead calls read with the labels that the selectors read.
func selectorsRead(selectors []Selector, of components.Role, read func(components.Role, string)) {
	for i := range selectors {
		selectors[i].Labels.reads(of, read)
	}
}

// reads calls read with the labels that the matcher reads.
func (m *LabelMatcher) reads(of components.Role, read func(components.Role, string)) {
	for key := range m.Equal {
		read(of, key)
	}
	for _, r := range m.Require {
		read(of, r.Key)
	}
	expressionReads(m.Expression, of, read)
}

func expressionReads(e Expression, of components.Role, read func(components.Role, string)) {
	switch e := e.(type) {
	case Not:
		expressionReads(e.Of, of, read)
	case All:
		for _, part := range e {
			expressionReads(part, of, read)
		}
	case Any:
		for _, part := range e {
			expressionReads(part, of, read)
		}
	case LabelExists:
		read(of, string(e))
	case LabelEquals:
		read(of, e.Label)
	case LabelMatches:
		read(of, e.Label)
	}
}
