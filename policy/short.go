package policy

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headgate-go/headgate/internal/slip"
)

// Headgate's own files have the fields of this package's values for keys; see keys.go. The decoder reads them by
// reflection.

// version is that of the files that this package reads and writes.
const version = 1

// isShort reports whether a document is in Headgate's own shape.
func isShort(doc *node) bool {
	for key := range strings.FieldsSeq(shapeKeys) {
		if _, ok := doc.find(key); ok {
			return true
		}
	}
	return false
}

// short reads a document in Headgate's own shape.
func (d *decoder) short(top value) []Policy {
	d.isShort = true
	d.shape = func(d *decoder) {
		d.isShort = true
		f := d.fields(value{}, shapeKeys, "")
		d.shortPolicy(d.items(f.get("policies"))[0])
	}
	f := d.fields(top, shapeKeys, "")
	v := d.need(f.get("headgate"))
	if v.node != nil && v.kind == number && v.number != version {
		d.errorf(v, "is version %v of the format; this Headgate reads version %d", v.number, version)
		return nil // the rest may be right
	}
	d.number(v)
	list := d.need(f.get("policies"))
	items := d.items(list)
	if list.node != nil && list.kind == sequence && len(items) == 0 {
		d.errorf(list, "needs at least one policy")
	}
	policies := make([]Policy, 0, len(items))
	for _, item := range items {
		item.field, d.warnings = "", nil
		known := len(d.errs)
		p := d.shortPolicy(item)
		d.finish(&p, known, func(d *decoder) {
			d.isShort = true
			d.shortPolicy(item)
		})
		policies = append(policies, p)
	}
	return policies
}

// shortPolicy reads one of the policies.
func (d *decoder) shortPolicy(v value) Policy {
	var p Policy
	d.note("", v)
	if v.node == nil {
		d.errorf(v, "want a policy, have nothing")
	}
	s := shapeOf(reflect.TypeFor[Policy]())
	f := d.fields(v, s.keys, "")
	d.shapeFields(f, s, reflect.ValueOf(&p).Elem())
	d.names = append(d.names, f.get("name"))
	return p
}

// structure reads a mapping into a struct.
func (d *decoder) structure(v value, into reflect.Value) {
	s := shapeOf(into.Type())
	d.shapeFields(d.fields(v, s.keys, ""), s, into)
}

// shapeFields reads the fields of a struct from what d.fields returned.
func (d *decoder) shapeFields(f value, s *shape, into reflect.Value) {
	for i := range s.fields {
		field := &s.fields[i]
		to := into.Field(field.index)
		if field.rule == inline {
			part := f
			if field.name != "" {
				part.field = child(f.field, field.name)
				d.note(part.field, f)
			}
			d.shapeFields(part, field.inner, to)
			continue
		}
		if selectors, ok := reflect.TypeAssert[*[]Selector](to.Addr()); ok {
			*selectors = d.shortSelectors(f, field.name)
			continue
		}
		v := d.fill(f, field.name, field.key)
		if field.rule == required {
			d.need(v)
		}
		d.shapeField(v, field, to)
	}
}

// shapeField reads the value of a field.
func (d *decoder) shapeField(v value, field *shapeField, to reflect.Value) {
	switch p := to.Addr().Interface().(type) {
	case *time.Duration:
		*p = d.shortDuration(v, field)
		return
	case *[]Component:
		*p = d.shortComponents(v)
		return
	case *Expression:
		if v.node != nil || d.learned != nil {
			*p = d.expression(v)
		}
		return
	case *Signal:
		*p = d.shortSignal(v)
		return
	case *[]string:
		*p = d.labelValues(v)
		return
	}
	switch to.Kind() { //nolint:exhaustive // a test has every field of this package
	case reflect.String:
		switch {
		case field.value:
			to.SetString(d.labelValue(v))
		case field.regex:
			to.SetString(d.regex(v))
		default:
			to.SetString(d.text(v))
		}
	case reflect.Bool:
		to.SetBool(d.boolean(v, false))
	case reflect.Float64:
		to.SetFloat(d.shortNumber(v, field))
	case reflect.Int:
		to.SetInt(int64(d.shortCount(v, field)))
	case reflect.Struct:
		if !d.meansLabels(v, to.Type()) && (v.node != nil || d.learned != nil) {
			d.structure(v, to)
		}
	case reflect.Pointer:
		if v.node != nil || d.learned != nil {
			made := reflect.New(to.Type().Elem())
			d.structure(v, made.Elem())
			to.Set(made)
		}
	case reflect.Slice:
		items := d.items(v)
		if len(items) == 0 {
			break
		}
		to.Set(reflect.MakeSlice(to.Type(), len(items), len(items)))
		for i, item := range items {
			if item.node == nil {
				d.errorf(item, "want %s, have %s", mapping, null)
			}
			d.structure(item, to.Index(i))
		}
	case reflect.Map:
		d.shortMap(v, field, to)
	}
}

// meansLabels reports whether a value has labels of flows, and an escalation belongs there: both have the key when. That is an error.
func (d *decoder) meansLabels(v value, as reflect.Type) bool {
	if as != reflect.TypeFor[Escalation]() || v.node == nil || v.kind != mapping || len(v.entries) == 0 {
		return false
	}
	keys := shapeOf(as).keys
	for _, e := range v.entries {
		if has(keys, e.key) || likely(e.key, strings.Fields(keys)) != "" {
			return false
		}
	}
	d.errorf(v, "wants load, below and the like, which make an escalation; labels of flows belong in when of selectors[]")
	return true
}

// shortMap reads a mapping whose keys are the user's: names or values of labels. Its values are text, or structs.
func (d *decoder) shortMap(v value, f *shapeField, to reflect.Value) {
	of := to.Type().Elem()
	if d.learned != nil {
		switch element := (value{up: d.keep(v)}); {
		case of == reflect.TypeFor[Override](): // only the numbers of its component belong there
			if c, ok := kindNamed(v.up.key); ok {
				d.fields(element, overrideKeys(c), "")
			}
		case of.Kind() == reflect.Struct:
			d.structure(element, reflect.New(of).Elem())
		}
		return
	}
	if !d.is(v, mapping) {
		return
	}
	entries := slices.SortedFunc(slices.Values(v.entries), func(a, b entry) int { return strings.Compare(a.key, b.key) })
	made := reflect.MakeMapWithSize(to.Type(), len(entries))
	if of.Kind() == reflect.Struct {
		v.here = d.keep(v)
	}
	for i, e := range entries {
		part, element := v.part(e), reflect.New(of).Elem()
		field := equal(v.field, e.key)
		if of.Kind() == reflect.Struct { // the key is a value of a label, which no error shows
			part.named, part.index = false, i
			field = v.field + "[" + strconv.Itoa(i) + "]"
			if why := slip.In(e.key); why != "" {
				d.warn(part, "flows hardly have this value: "+why)
			}
		}
		if d.sources != nil {
			part.field = field
			at := part
			at.line, at.column = e.line, e.column // what is wrong is mostly the key
			d.note(field, at)
		}
		switch {
		case of.Kind() == reflect.Struct:
			if part.node == nil {
				d.errorf(part, "want %s, have %s", mapping, null)
			}
			d.structure(part, element)
		case part.node == nil:
			d.errorf(part, "want %s, have %s", text, null)
		case f.value:
			element.SetString(d.labelValue(part))
		default:
			element.SetString(d.text(part))
		}
		made.SetMapIndex(reflect.ValueOf(e.key), element)
	}
	to.Set(made)
}

// notZero refuses a 0 that would mean a default.
func (d *decoder) notZero(v value, field *shapeField, isZero bool) {
	if isZero && v.node != nil && field.rule == nonzero {
		d.errorf(v, "must not be 0")
	}
}

func (d *decoder) shortNumber(v value, field *shapeField) float64 {
	n := d.number(v)
	switch {
	case v.node == nil || v.kind != number:
		return 0
	case n == 0 && field.zero != 0:
		return field.zero
	case n < 0 && field.zero < 0: // a negative number is Go's way to say 0
		d.errorf(v, "must be a number from 0 up, is %v", n)
	}
	d.notZero(v, field, n == 0)
	return n
}

func (d *decoder) shortCount(v value, field *shapeField) int {
	if field.status {
		if v.node != nil && v.kind != number {
			d.errorf(v, "want an HTTP status, as in 429; have %s", v.kind)
			return 0
		}
		status := d.status(v)
		d.notZero(v, field, v.node != nil && v.number == 0)
		return status
	}
	n := d.count(v)
	d.notZero(v, field, n == 0 && v.node != nil && v.kind == number && v.number == 0)
	return n
}

func (d *decoder) shortDuration(v value, field *shapeField) time.Duration {
	t := d.duration(v)
	switch {
	case v.node == nil:
		return 0
	case field.zero != 0:
		return d.optional(v, time.Duration(field.zero))
	}
	d.notZero(v, field, t == 0)
	return t
}

// shortSelectors reads the control points of at, or else selectors.
func (d *decoder) shortSelectors(f value, name string) []Selector {
	at, full := f.get(atKey), f.get("selectors")
	field := child(f.field, name)
	if at.node == nil && full.node == nil && d.learned == nil {
		at.field = field
		d.note(field, at)
		d.need(at)
		return nil
	}
	if at.node != nil && full.node != nil {
		full.field = field
		d.note(field, full)
		d.errorf(full, "at says which flows already; use one of them")
		return nil
	}
	var selectors []Selector
	if at.node != nil {
		at.field = field
		d.note(field, at)
		for _, item := range d.items(at) {
			if item.node == nil {
				d.errorf(item, "want %s, have %s", text, null)
			} else if item.kind == mapping {
				d.errorf(item, "want %s, have %s; selectors, instead of at, can say more", text, item.kind)
			}
			d.note(child(item.field, "ControlPoint"), item)
			selectors = append(selectors, Selector{ControlPoint: d.text(item)})
		}
		return selectors
	}
	full.field = field
	d.note(field, full)
	for _, item := range d.items(full) {
		if item.node != nil && item.kind == text {
			d.errorf(item, "want %s, have %s; control points alone stand in at", mapping, text)
		} else if item.node == nil {
			d.errorf(item, "want %s, have %s", mapping, null)
		}
		var s Selector
		d.structure(item, reflect.ValueOf(&s).Elem())
		selectors = append(selectors, s)
	}
	return selectors
}

// shortComponents reads the components of a policy, each under the name of its kind.
func (d *decoder) shortComponents(v value) []Component {
	var components []Component
	for i, item := range d.items(v) {
		key, part := d.one(item, kindKeys())
		if d.learned != nil {
			for i := range kinds {
				d.structure(item.missing(kinds[i].name), reflect.New(reflect.TypeOf(kinds[i].zero)).Elem())
			}
			return nil
		}
		zero, ok := kindNamed(key)
		if !ok {
			continue
		}
		if d.sources != nil {
			part.field = "components[" + strconv.Itoa(i) + "]"
			d.note(part.field, part)
		}
		made := reflect.New(reflect.TypeOf(zero)).Elem()
		d.structure(part, made)
		c, _ := reflect.TypeAssert[Component](made)
		d.withoutEffect(part, c)
		components = append(components, c)
	}
	return components
}

// A passing component lets flows pass that have certain values of its session label.
type passing interface {
	Component
	passes() (label string, values []string)
}

// withoutEffect warns of values of a label that the component does not look at.
func (d *decoder) withoutEffect(v value, c Component) {
	if p, ok := c.(passing); ok {
		label, values := p.passes()
		d.needsLabel(v.get("pass_through_values"), values, label, "session_label")
	}
}

// shortSignal reads a signal: a number, the name of one that the host provides, or a mean latency.
func (d *decoder) shortSignal(v value) Signal {
	switch {
	case d.learned != nil:
		d.one(v, meanLatencyKey)
		d.structure(v.missing(meanLatencyKey), reflect.New(reflect.TypeFor[MeanLatency]()).Elem())
		return nil
	case v.node == nil:
		return nil
	case v.kind == number:
		return Constant(v.number)
	case v.kind == text:
		return Named(d.text(v))
	case v.kind == mapping:
		if key, part := d.one(v, meanLatencyKey); key != "" {
			var m MeanLatency
			part.field = v.field
			d.structure(part, reflect.ValueOf(&m).Elem())
			return m
		}
		return nil
	}
	d.errorf(v, "want a number, the name of a signal, or %s; have %s", meanLatencyKey, v.kind)
	return nil
}

// longer returns a hint at the known word that a wrong one begins or ends with: Aperture's format says bucket_capacity for
// capacity, and limit_by_label_key for limit_by.
func longer(wrong string, known []string) string {
	best := ""
	for _, word := range known {
		if len(word) > len(best) && (strings.HasPrefix(wrong, word+"_") || strings.HasSuffix(wrong, "_"+word)) {
			best = word
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}
