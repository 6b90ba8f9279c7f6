package policy

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/pattern"
)

// Validate reports everything that keeps an engine from running the policy, as [*Error] without file and position. Of
// more than 20 problems it returns the first 20. Policies that [Load] and [Parse] return are valid.
func (p Policy) Validate() error {
	var errs []error
	p.check(func(field, format string, args ...any) {
		if len(errs) >= mostErrors {
			return
		}
		field = fmt.Sprintf("policy %s: %s", quote(p.Name), field)
		errs = append(errs, &Error{Field: field, Message: fmt.Sprintf(format, args...)})
	})
	return join(errs)
}

// report takes a problem of a field, whose path goes from the Policy down.
type report func(field, format string, args ...any)

// sub returns the report for the fields of a field.
func (r report) sub(prefix string) report {
	return func(field, format string, args ...any) { r(prefix+field, format, args...) }
}

// at returns the report for an element of a field, and for its fields.
func (r report) at(prefix string, index int) report {
	return func(field, format string, args ...any) {
		r(prefix+"["+strconv.Itoa(index)+"]"+field, format, args...)
	}
}

// check holds the rules, for files as for policies written in Go.
func (p Policy) check(wrong report) {
	if p.Name == "" {
		wrong("name", "is required")
	}
	if strings.Contains(p.Name, placeholder) {
		wrong("name", "has %s, which is to be replaced", placeholder)
	}
	if len(p.Components) == 0 {
		wrong("components", "needs at least one flow-control component")
	}
	checkLabels(wrong.sub("labels"), p.Labels)
	taken := map[string]int{}
	var ids identifier
	for i, c := range p.Components {
		wrong := wrong.at("components", i)
		c, why := asValue(c)
		if why != "" {
			wrong("", "%s", why)
			continue
		}
		c.check(wrong)
		id := ids.id(c)
		if first, ok := taken[id]; ok {
			wrong(".ID", "%s is the ID of components[%d] too", quote(id), first)
		} else {
			taken[id] = i
		}
	}
	checkEscalations(wrong, p.Components)
}

func checkNumber(wrong report, n float64) {
	if math.IsNaN(n) || math.IsInf(n, 0) {
		wrong("", "must be a finite number, is %v", n)
	}
}

func checkAmount(wrong report, amount float64) {
	if !(amount >= 0) || math.IsInf(amount, 1) { // NaN is not >= 0
		wrong("", "must be a number from 0 up, is %v", amount)
	}
}

// checkDebt checks a MaxDebt, and that there is a label by which flows come to owe something.
func checkDebt(wrong report, debt float64, labelField, label string) {
	checkNumber(wrong, debt)
	if debt != 0 && label == "" {
		wrong("", "needs a %s: without one no flow owes anything", labelField)
	}
}

func checkPercentage(wrong report, percentage float64) {
	if !(percentage >= 0 && percentage <= 100) { // NaN is not >= 0
		wrong("", "must be a percentage from 0 to 100, is %v", percentage)
	}
}

func checkNotNegative(wrong report, d time.Duration) {
	if d < 0 {
		wrong("", "must not be negative, is %s", d)
	}
}

func checkPositive(wrong report, d time.Duration) {
	if d <= 0 {
		wrong("", "must be positive, is %s", d)
	}
}

func checkStatus(wrong report, status int) {
	if status != 0 && (status < 400 || status > 599) {
		wrong("", "must be an HTTP status from 400 to 599, is %d", status)
	}
}

// maxName is the most bytes of a control point, and of a label's name, that a flow can have.
const maxName = 255

// impossible returns why no flow can have a label, or a control point, of the name; "" if one can.
func impossible(name string) string {
	switch {
	case len(name) > maxName:
		return fmt.Sprintf("is longer than %d bytes", maxName)
	case !utf8.ValidString(name):
		return "is not valid UTF-8"
	case strings.Contains(name, placeholder):
		return "has " + placeholder + ", which is to be replaced"
	default:
		return ""
	}
}

// checkName is for the name of a label or a control point that may be left out.
func checkName(wrong report, name string) {
	if why := impossible(name); why != "" {
		wrong("", "%s", why)
	}
}

// checkRequired is checkName for a name that must be there.
func checkRequired(wrong report, name string) {
	if name == "" {
		wrong("", "is required")
	}
	checkName(wrong, name)
}

func checkSelectors(wrong report, selectors []Selector) {
	if len(selectors) == 0 {
		wrong("", "needs at least one selector")
	}
	for i, s := range selectors {
		wrong := wrong.at("", i)
		checkRequired(wrong.sub(".ControlPoint"), s.ControlPoint)
		s.Labels.check(wrong.sub(".Labels"))
	}
}

func (m LabelMatcher) check(wrong report) {
	if len(m.Equal) > 0 {
		m.checkEqual(wrong)
	}
	for i, r := range m.Require {
		r.check(wrong.at(".Require", i))
	}
	if m.Expression != nil {
		checkExpression(wrong.sub(".Expression"), m.Expression)
	}
}

func (m LabelMatcher) checkEqual(wrong report) {
	if _, ok := m.Equal[""]; ok {
		wrong(".Equal", "has an empty label name")
	}
	for _, name := range slices.Sorted(maps.Keys(m.Equal)) {
		if why := impossible(name); why != "" {
			wrong(equal(".Equal", name), "name %s", why)
		}
	}
}

// equal returns the path of a label in the Equal field of a LabelMatcher.
func equal(field, name string) string { return field + "[" + quote(name) + "]" }

func (r Requirement) check(wrong report) {
	checkRequired(wrong.sub(".Key"), r.Key)
	switch r.Operator {
	case In, NotIn:
		if len(r.Values) == 0 {
			wrong(".Values", "needs at least one value for %s", r.Operator)
		}
	case Exists, DoesNotExist:
		if len(r.Values) > 0 {
			wrong(".Values", "must be empty for %s", r.Operator)
		}
	case "":
		wrong(".Operator", "is required")
	default:
		known := []string{string(In), string(NotIn), string(Exists), string(DoesNotExist)}
		wrong(".Operator", "unknown operator %s%s", quote(string(r.Operator)), suggest(string(r.Operator), known))
	}
}

func checkExpression(wrong report, e Expression) {
	label := func(name string) { checkRequired(wrong.sub(".Label"), name) }
	switch e := e.(type) {
	case Not:
		checkExpression(wrong.sub(".Of"), e.Of)
	case All:
		for i, part := range e {
			checkExpression(wrong.at("", i), part)
		}
	case Any:
		for i, part := range e {
			checkExpression(wrong.at("", i), part)
		}
	case LabelExists:
		checkRequired(wrong, string(e))
	case LabelEquals:
		label(e.Label)
	case LabelMatches:
		label(e.Label)
		checkRegex(wrong.sub(".Regex"), e.Regex)
	case nil:
		wrong("", "is required")
	default:
		wrong("", "is a %T; want Not, All, Any, LabelExists, LabelEquals or LabelMatches", e)
	}
}

func checkRegex(wrong report, regex string) {
	if regex == "" {
		wrong("", "is required")
		return
	}
	if err := pattern.Check(regex); err != nil {
		wrong("", "%s", printable(clip(err.Error(), 100)))
	}
}
