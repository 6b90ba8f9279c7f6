package policy

import (
	"maps"
	"slices"
	"strconv"

	"github.com/headgate-go/headgate/internal/credential"
)

// String returns the matcher as text for people, as in `tier = "gold" and not (path matches "^/api")`; "" if it matches
// everything. The text has about 1,000 bytes at the most: "…" stands for what is left out. Values of labels that carry
// credentials are "(hidden)".
func (m LabelMatcher) String() string {
	var d description
	first := true
	and := func() {
		if !first {
			d.add(" and ")
		}
		first = false
	}
	for _, label := range slices.Sorted(maps.Keys(m.Equal)) {
		and()
		d.equals(label, m.Equal[label])
	}
	for _, r := range m.Require {
		and()
		d.requirement(r)
	}
	if m.Expression != nil {
		and()
		d.expression(m.Expression)
	}
	return string(d.text)
}

// A description is a text that grows up to a bound.
type description struct {
	text []byte
	full bool
}

const (
	longestDescription = 1000 // bytes
	longestPart        = 100  // bytes of a value or a regular expression
)

func (d *description) add(text string) {
	switch {
	case d.full:
	case len(d.text)+len(text) > longestDescription:
		d.text, d.full = append(d.text, "…"...), true
	default:
		d.text = append(d.text, text...)
	}
}

// label adds the name of a label.
func (d *description) label(name string) { d.add(printable(name)) }

// value adds a value of the label, or what stands for it.
func (d *description) value(label, value string) {
	if credential.Named(label) {
		d.add("(hidden)")
		return
	}
	d.add(strconv.Quote(clip(value, longestPart)))
}

func (d *description) equals(label, value string) {
	d.label(label)
	d.add(" = ")
	d.value(label, value)
}

func (d *description) requirement(r Requirement) {
	d.label(r.Key)
	switch r.Operator {
	case Exists:
		d.add(" exists")
	case DoesNotExist:
		d.add(" does not exist")
	case In:
		d.values(" in [", r)
	case NotIn:
		d.values(" not in [", r)
	default:
		d.add(" " + printable(clip(string(r.Operator), longestPart)))
	}
}

func (d *description) values(operator string, r Requirement) {
	d.add(operator)
	for i, value := range r.Values {
		if d.full {
			break // of a list that may be long
		}
		if i > 0 {
			d.add(", ")
		}
		d.value(r.Key, value)
	}
	d.add("]")
}

func (d *description) expression(e Expression) {
	if d.full {
		return
	}
	switch e := e.(type) {
	case Not:
		d.add("not (")
		d.expression(e.Of)
		d.add(")")
	case All:
		d.parts(e, " and ", "true")
	case Any:
		d.parts(e, " or ", "false")
	case LabelExists:
		d.label(string(e))
		d.add(" exists")
	case LabelEquals:
		d.equals(e.Label, e.Value)
	case LabelMatches:
		d.label(e.Label)
		d.add(" matches ")
		d.value(e.Label, e.Regex)
	}
}

// parts adds the parts of an expression. One without parts is always the same.
func (d *description) parts(parts []Expression, between, none string) {
	if len(parts) == 0 {
		d.add(none)
		return
	}
	d.add("(")
	for i, part := range parts {
		if d.full {
			break
		}
		if i > 0 {
			d.add(between)
		}
		d.expression(part)
	}
	d.add(")")
}
