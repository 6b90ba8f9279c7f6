package policy

import (
	"maps"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Format returns a file in Headgate's own shape that holds the policies. [Parse] reads the same policies from it. Only
// negative numbers that mean the same as [KeepIdle], [NoQueue] or [NoTokens] become these, and pointers to components
// become values. Warnings are left out. A policy that [Policy.Validate] refuses is an error, and so are two of one name,
// a value that is not valid UTF-8 or has the placeholder of Aperture's files, and conditions that are nested deeper than a file may
// be.
func Format(policies []Policy) ([]byte, error) {
	if len(policies) == 0 {
		return nil, &Error{Message: "no policy to write"}
	}
	file := &written{entries: []writtenEntry{{"headgate", &written{scalar: strconv.Itoa(version)}}}}
	list := &written{list: true, block: true}
	names := map[string]bool{}
	for _, p := range policies {
		if err := p.Validate(); err != nil {
			return nil, err
		}
		if names[p.Name] {
			return nil, &Error{Field: "policy " + quote(p.Name), Message: "is there twice"}
		}
		names[p.Name] = true
		var w writer
		field := "policy " + quote(p.Name) + ": "
		out := w.structure(reflect.ValueOf(p), field)
		if w.err == nil && out.depth()+2 > maxDepth { // the file and the list of policies
			w.err = &Error{Field: strings.TrimSuffix(field, ": "), Message: tooDeep}
		}
		if w.err != nil {
			return nil, w.err
		}
		out.block = true
		list.items = append(list.items, out)
	}
	file.entries = append(file.entries, writtenEntry{"policies", list})
	file.block = true
	return file.appendBlock(nil, 0), nil
}

// A written is a value of a file: a scalar, a list, or a mapping.
type written struct {
	scalar  string // as it stands in the file
	list    bool
	items   []*written     // of a list
	entries []writtenEntry // of a mapping
	block   bool           // it has lines of its own, however short it is
}

type writtenEntry struct {
	key   string // as it stands in the file
	value *written
}

// depth counts the lists and mappings in each other.
func (v *written) depth() int {
	deepest := 0
	for _, item := range v.items {
		deepest = max(deepest, item.depth())
	}
	for _, e := range v.entries {
		deepest = max(deepest, e.value.depth())
	}
	if v.scalar != "" {
		return 0
	}
	return deepest + 1
}

// A writer makes such values of Go values.
type writer struct{ err error }

// structure writes a struct. Field is where it is, for errors.
func (w *writer) structure(v reflect.Value, field string) *written {
	out := &written{}
	w.add(out, v, field)
	return out
}

func (w *writer) add(out *written, v reflect.Value, field string) {
	s := shapeOf(v.Type())
	for i := range s.fields {
		f := &s.fields[i]
		part, at := v.Field(f.index), field+f.name
		if f.rule == inline {
			w.add(out, part, at+".")
			continue
		}
		key := f.key
		if selectors, ok := reflect.TypeAssert[[]Selector](part); ok && onlyPoints(selectors) {
			points := &written{list: true}
			for _, s := range selectors {
				points.items = append(points.items, w.text(s.ControlPoint, at))
			}
			out.entries = append(out.entries, writtenEntry{atKey, points})
			continue
		}
		if value := w.field(part, f, at); value != nil && (f.rule == required || !part.IsZero()) {
			out.entries = append(out.entries, writtenEntry{key, value})
		}
	}
}

// onlyPoints reports whether the selectors say nothing but control points.
func onlyPoints(selectors []Selector) bool {
	return len(selectors) > 0 && !slices.ContainsFunc(selectors, func(s Selector) bool {
		return s.Service != "" || s.Labels.Equal != nil || s.Labels.Require != nil || s.Labels.Expression != nil
	})
}

// field writes a field; nil if there is nothing to write.
func (w *writer) field(v reflect.Value, f *shapeField, at string) *written {
	switch value := v.Interface().(type) {
	case time.Duration:
		if f.zero != 0 && (value == time.Duration(f.zero) || value < 0) {
			value = 0
		}
		return &written{scalar: durationText(value)}
	case []Component:
		out := &written{list: true, block: true}
		for i, c := range value {
			c, _ := asValue(c)
			component := w.structure(reflect.ValueOf(c), at+"["+strconv.Itoa(i)+"].")
			component.block = true
			out.items = append(out.items, &written{entries: []writtenEntry{{kinds[c.kind()].name, component}}, block: true})
		}
		return out
	case Expression:
		return w.expression(value, at)
	case Signal:
		return w.signal(value, at)
	}
	switch v.Kind() { //nolint:exhaustive // a test has every field of this package
	case reflect.String:
		return w.text(v.String(), at)
	case reflect.Bool:
		return &written{scalar: strconv.FormatBool(v.Bool())}
	case reflect.Float64:
		n := v.Float()
		if f.zero != 0 && (n == f.zero || n < 0 && f.zero < 0) {
			n = 0
		}
		return &written{scalar: numberText(n)}
	case reflect.Int:
		return &written{scalar: strconv.FormatInt(v.Int(), 10)}
	case reflect.Struct:
		return w.structure(v, at+".")
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return w.structure(v.Elem(), at+".")
	case reflect.Slice:
		out := &written{list: true}
		for i := range v.Len() {
			item, at := v.Index(i), at+"["+strconv.Itoa(i)+"]"
			if item.Kind() == reflect.String {
				out.items = append(out.items, w.text(item.String(), at))
			} else {
				out.items = append(out.items, w.structure(item, at+"."))
			}
		}
		return out
	case reflect.Map:
		return w.mapping(v, at)
	}
	return nil
}

// mapping writes a map in the order of its keys.
func (w *writer) mapping(v reflect.Value, at string) *written {
	values := map[string]reflect.Value{}
	for key, value := range v.Seq2() {
		values[key.String()] = value
	}
	out := &written{}
	for i, key := range slices.Sorted(maps.Keys(values)) {
		part := equal(at, key)
		if v.Type().Elem().Kind() == reflect.Struct { // the key is a value of a label, which no error shows
			part = at + "[" + strconv.Itoa(i) + "]"
		}
		entry := writtenEntry{key: w.text(key, part).scalar}
		if value := values[key]; value.Kind() == reflect.String {
			entry.value = w.text(value.String(), part)
		} else {
			entry.value = w.structure(value, part+".")
		}
		out.entries = append(out.entries, entry)
	}
	return out
}

func (w *writer) signal(s Signal, at string) *written {
	switch s := s.(type) {
	case Constant:
		return &written{scalar: numberText(float64(s))}
	case Named:
		return w.text(string(s), at)
	case MeanLatency:
		return &written{entries: []writtenEntry{{meanLatencyKey, w.structure(reflect.ValueOf(s), at+".")}}}
	}
	return nil
}

func (w *writer) expression(e Expression, at string) *written {
	one := func(key string, value *written) *written { return &written{entries: []writtenEntry{{key, value}}} }
	parts := func(key string, of []Expression) *written {
		out := &written{list: true}
		for i, part := range of {
			out.items = append(out.items, w.expression(part, at+"["+strconv.Itoa(i)+"]"))
		}
		return one(key, out)
	}
	switch e := e.(type) {
	case Not:
		return one("not", w.expression(e.Of, at+".Of"))
	case All:
		return parts("all", e)
	case Any:
		return parts("any", e)
	case LabelExists:
		return one("label_exists", w.text(string(e), at))
	case LabelEquals:
		return one("label_equals", w.structure(reflect.ValueOf(e), at+"."))
	case LabelMatches:
		return one("label_matches", w.structure(reflect.ValueOf(e), at+"."))
	}
	return nil
}

// bare is text that all readers of YAML take for the same text without quotes, unless it is one of ambiguous.
var bare = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_./-]*$`)

// ambiguous is what some of them take for something else.
var ambiguous = regexp.MustCompile(`^(?i:null|true|false|yes|no|on|off|y|n)$`)

func (w *writer) text(s, at string) *written {
	switch {
	case !utf8.ValidString(s):
		return w.refuse(at, "is not valid UTF-8")
	case strings.Contains(s, placeholder):
		return w.refuse(at, "has "+placeholder+", which is to be replaced")
	case bare.MatchString(s) && !ambiguous.MatchString(s):
		return &written{scalar: s}
	}
	return &written{scalar: strconv.Quote(s)} // whose escapes are YAML's, too
}

// refuse notes the first text that a file cannot have.
func (w *writer) refuse(at, why string) *written {
	if w.err == nil {
		w.err = &Error{Field: at, Message: why}
	}
	return &written{}
}

func numberText(n float64) string {
	if a := math.Abs(n); a == 0 {
		return "0"
	} else if a >= 1e-6 && a < 1e15 {
		return strconv.FormatFloat(n, 'f', -1, 64)
	}
	return strconv.FormatFloat(n, 'g', -1, 64)
}

// durationText returns a duration without the zeros of [time.Duration.String]: 2m rather than 2m0s.
func durationText(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

const (
	longestLine = 100
	longestKey  = 1000 // of a key that needs no mark; YAML has 1,024 characters
)

// flow returns a value in one line.
func (v *written) flow() string {
	var b strings.Builder
	v.addFlow(&b)
	return b.String()
}

func (v *written) addFlow(b *strings.Builder) {
	switch {
	case v.list:
		b.WriteByte('[')
		for i, item := range v.items {
			if i > 0 {
				b.WriteString(", ")
			}
			item.addFlow(b)
		}
		b.WriteByte(']')
	case v.scalar != "":
		b.WriteString(v.scalar)
	default:
		b.WriteByte('{')
		for i, e := range v.entries {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(e.mark() + e.key + ": ")
			e.value.addFlow(b)
		}
		b.WriteByte('}')
	}
}

// mark returns what stands before the key.
func (e writtenEntry) mark() string {
	if len(e.key) > longestKey {
		return "? "
	}
	return ""
}

// appendBlock appends a list or mapping in lines that are indented so far. The first of them is indented already.
func (v *written) appendBlock(b []byte, indent int) []byte {
	begin := func(i int) {
		if i > 0 {
			b = append(b, strings.Repeat(" ", indent)...)
		}
	}
	for i, item := range v.items {
		begin(i)
		b = append(b, "- "...)
		b = item.appendValue(b, indent+2, indent+2, false)
	}
	for i, e := range v.entries {
		begin(i)
		b = append(b, e.mark()+e.key...)
		if e.mark() != "" {
			b = append(append(b, '\n'), strings.Repeat(" ", indent)...)
		}
		b = append(b, ':')
		b = e.value.appendValue(b, indent+2, indent+len(e.key)+2, true)
	}
	return b
}

// appendValue appends a value behind what stands in its line up to a column: in the same line if there is room, or else in
// lines of its own. Behind a key these begin in the next line.
func (v *written) appendValue(b []byte, indent, column int, behindKey bool) []byte {
	space := ""
	if behindKey {
		space = " "
	}
	empty := len(v.items)+len(v.entries) == 0
	if line := v.flow(); empty || !v.block && column+len(line) <= longestLine {
		return append(b, space+line+"\n"...)
	}
	if behindKey {
		b = append(append(b, '\n'), strings.Repeat(" ", indent)...)
	}
	return v.appendBlock(b, indent)
}
