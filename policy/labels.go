package policy

import (
	"maps"
	"reflect"
	"slices"
)

// checkLabels checks a policy's names for labels.
func checkLabels(wrong report, labels map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		wrong := wrong.sub(equal("", name))
		of := labels[name]
		_, copied := labels[of]
		switch why := impossible(name); {
		case name == "":
			wrong("", "has an empty label name")
		case why != "":
			wrong("", "name %s", why)
		case of == "":
			wrong("", "needs the name of the label that it copies")
		case copied:
			wrong("", "copies %s, which is a name of this policy's; it needs a label of the flow", quote(of))
		default:
			checkName(wrong, of)
		}
	}
}

// reading returns the component with the labels that it reads under the names of the policy. It changes nothing of c.
//
// A component then reads the label itself: a copy for each flow would cost something, and would arrive over the network only
// in part, and show values that are to be hidden.
func reading(c Component, labels map[string]string) Component {
	if len(labels) == 0 {
		return c
	}
	v := reflect.New(reflect.TypeOf(c)).Elem()
	v.Set(reflect.ValueOf(c))
	relabel(v, labels)
	c, _ = reflect.TypeAssert[Component](v)
	return c
}

// labelOf returns the label that a name stands for.
func labelOf(name string, labels map[string]string) string {
	if of, ok := labels[name]; ok {
		return of
	}
	return name
}

// relabel replaces the names of labels in a struct. It copies what the struct points to before it changes that.
func relabel(v reflect.Value, labels map[string]string) {
	s := shapeOf(v.Type())
	for i := range s.fields {
		f := &s.fields[i]
		part := v.Field(f.index)
		switch p := part.Addr().Interface().(type) {
		case *LabelMatcher:
			*p = p.reading(labels)
			continue
		case *Signal:
			if m, ok := (*p).(MeanLatency); ok {
				relabel(reflect.ValueOf(&m).Elem(), labels)
				*p = m
			}
			continue
		}
		switch part.Kind() { //nolint:exhaustive // the others name no labels
		case reflect.String:
			if f.label {
				part.SetString(labelOf(part.String(), labels))
			}
		case reflect.Struct:
			relabel(part, labels)
		case reflect.Slice:
			if part.Type().Elem().Kind() != reflect.Struct {
				break
			}
			copied := reflect.MakeSlice(part.Type(), part.Len(), part.Len())
			reflect.Copy(copied, part)
			for i := range copied.Len() {
				relabel(copied.Index(i), labels)
			}
			part.Set(copied)
		}
	}
}

// reading returns the matcher with the labels that the names stand for.
func (m LabelMatcher) reading(labels map[string]string) LabelMatcher {
	read := LabelMatcher{Expression: expressionReading(m.Expression, labels)}
	if m.Equal != nil {
		read.Equal = make(map[string]string, len(m.Equal))
	}
	for _, r := range m.Require {
		r.Key = labelOf(r.Key, labels)
		read.Require = append(read.Require, r)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Equal)) {
		of, value := labelOf(name, labels), m.Equal[name]
		if other, taken := read.Equal[of]; taken && other != value { // under two names it must have two values
			read.Require = append(read.Require, Requirement{Key: of, Operator: In, Values: []string{value}})
			continue
		}
		read.Equal[of] = value
	}
	return read
}

func expressionReading(e Expression, labels map[string]string) Expression {
	parts := func(of []Expression) []Expression {
		read := make([]Expression, len(of))
		for i, part := range of {
			read[i] = expressionReading(part, labels)
		}
		return read
	}
	switch e := e.(type) {
	case Not:
		return Not{Of: expressionReading(e.Of, labels)}
	case All:
		return All(parts(e))
	case Any:
		return Any(parts(e))
	case LabelExists:
		return LabelExists(labelOf(string(e), labels))
	case LabelEquals:
		return LabelEquals{labelOf(e.Label, labels), e.Value}
	case LabelMatches:
		return LabelMatches{labelOf(e.Label, labels), e.Regex}
	}
	return e
}
