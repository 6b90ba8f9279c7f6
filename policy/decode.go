package policy

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/headgate-go/headgate/internal/slip"
)

// A value is a place in a file: what stands there, or that nothing does.
type value struct {
	*node               // nil if nothing, or null, stands there
	here         *value // itself, for up
	up           *value // what it is part of; nil at the top
	line, column int    // where to look for it
	key          string // its key, if it is in a mapping
	index        int    // its index, if it is in a sequence
	named        bool   // there is a key
	field        string // the Go field of the Policy that it fills; only where sources are sought
}

// path returns the path of keys to v, as errors show it.
func (v value) path() string {
	switch {
	case v.up == nil:
		return ""
	case v.named:
		return child(v.up.path(), v.key)
	default:
		return v.up.path() + "[" + strconv.Itoa(v.index) + "]"
	}
}

// A decoder reads one document of a file into a Policy. What it returns is good only if there are no errors. Most files
// have none, so a first decoder, which is hasty, only finds out whether there are any. A second one notes what is wrong
// and reads on, so that all of it is reported at once. For what check finds wrong with a Policy, a third one seeks where the file
// says it. None of them keeps anything for each value: a file may have a million.
type decoder struct {
	hasty    bool // it stops at the first error
	noting   bool // it notes errors, and stops when there are mostErrors
	file     string
	errs     []*Error
	warnings []string
	failed   map[string]bool     // what errs are about, by path
	warned   map[string]bool     // what is in warnings
	invalid  bool                // there is an error
	sources  map[string]value    // what fills the Go fields of these names, where known; nil in a decoder that seeks none
	learned  map[string]string   // keys of each mapping, by path; only in a decoder that learns
	shape    func(*decoder)      // reads an empty document of the same shape
	homes    map[string][]string // what another decoder has learned by shape
	isShort  bool                // the document is in Headgate's own shape
	names    []value             // the policies', also if they lack one
	name     value               // that of the one policy of Aperture's shapes
	dynamic  value               // dynamicConfig
	used     map[string]bool     // keys of dynamicConfig
	signals  map[string]float64  // the constant ones, by name
	computed map[string]bool     // the other signals that a component has for output, by name
	meters   value               // flux_meters
	metered  map[string]bool     // those that a port names
	kept     *slab[value]

	kindAround func(value) *kindOf // the function: the readers in the table of kinds cannot refer to the table
}

func newDecoder(file string) *decoder {
	return &decoder{
		file:     file,
		failed:   map[string]bool{},
		warned:   map[string]bool{},
		used:     map[string]bool{},
		signals:  map[string]float64{},
		computed: map[string]bool{},
		metered:  map[string]bool{},
		kept:     new(slab[value]),
	}
}

// stopped is the panic of a decoder that need not read on. The rest of a large file may be errors, too.
type stopped struct{}

// whileNeeded calls read. It ends read when the decoder need not read on.
func (d *decoder) whileNeeded(read func()) {
	defer func() {
		if r := recover(); r != nil && r != any(stopped{}) {
			panic(r) //nolint:forbidigo // it is a fault of the program, and goes on
		}
	}()
	read()
}

// errorf notes what is wrong with v. After an error of v, or of what it is part of, it notes nothing: that would be an
// echo.
func (d *decoder) errorf(v value, format string, args ...any) {
	if !d.notes(v) {
		return
	}
	path := v.path()
	d.failed[path] = true
	d.errs = append(d.errs, &Error{
		File: d.file, Line: v.line, Column: v.column, Field: path, Message: fmt.Sprintf(format, args...),
	})
	if len(d.errs) >= mostErrors {
		panic(stopped{}) //nolint:forbidigo // whileNeeded ends it
	}
}

// notes reports whether an error of v is to be noted: whether this decoder notes any, and this one is no echo. If the decoder is hasty,
// notes does not return.
func (d *decoder) notes(v value) bool {
	d.invalid = true
	if d.hasty {
		panic(stopped{}) //nolint:forbidigo // whileNeeded ends it
	}
	if !d.noting {
		return false
	}
	for at := &v; at != nil && at.up != nil; at = at.up {
		if d.failed[at.path()] {
			return false
		}
	}
	return true
}

// unused notes, once, that the file says something that is of no use here.
func (d *decoder) unused(v value, why string) { d.warn(v, "not used"+why) }

// warn notes a warning about v once.
func (d *decoder) warn(v value, message string) {
	if d.sources != nil {
		return // another decoder has warned
	}
	e := Error{File: d.file, Line: v.line, Column: v.column, Field: v.path(), Message: message}
	if warning := e.Error(); !d.warned[warning] {
		d.warned[warning] = true
		d.warnings = append(d.warnings, warning)
	}
}

// note notes that v fills the Go field, if that is sought.
func (d *decoder) note(field string, v value) {
	if d.sources == nil {
		return
	}
	if _, sought := d.sources[field]; sought {
		d.sources[field] = v
	}
}

// missing returns the value of a key that a mapping v lacks.
func (v value) missing(key string) value {
	here := v.here
	if here == nil {
		here = new(value) // &v would have each call allocate
		*here = v
	}
	return value{up: here, line: v.line, column: v.column, key: key, named: true, field: v.field}
}

// part returns the value of an entry of a mapping v.
func (v value) part(e entry) value {
	p := v.missing(e.key)
	p.line, p.column = e.line, e.column // where to look for no value, or for one on lines of its own
	if e.value.kind != null {
		p.node = e.value
		if e.value.line == e.line {
			p.column = e.value.column
		}
	}
	return p
}

// is reports whether v has the kind. Another kind is an error; a missing value is not.
func (d *decoder) is(v value, want kind) bool {
	if v.node == nil || v.kind == want {
		return v.node != nil
	}
	hint := ""
	switch {
	case want == boolean && v.kind == text && (v.text == "true" || v.text == "false"),
		want == number && v.kind == text && isNumber(v.text):
		hint = "; write it without quotes"
	case want == boolean && v.kind == text:
		hint = "; write true or false"
	case want == text && v.kind != sequence && v.kind != mapping:
		hint = "; quote it"
	}
	d.errorf(v, "want %s, have %s%s", want, v.kind, hint)
	return false
}

// isNumber reports whether text would be a number if it were not quoted.
func isNumber(text string) bool { return decimal.MatchString(text) || hexadecimal.MatchString(text) }

// keep returns a copy of v for others to point to.
func (d *decoder) keep(v value) *value {
	kept := &d.kept.take(1)[0]
	*kept = v
	return kept
}

// fields returns a mapping, or no value instead of anything else. It may have the keys in read and, with a warning,
// those in skip: keys that Aperture's format has and Headgate has no use for. Both are separated by spaces.
func (d *decoder) fields(v value, read, skip string) value {
	if d.learned != nil {
		d.learned[v.path()] = read + " " + skip
	}
	v.here = d.keep(v)
	if !d.is(v, mapping) {
		v.node = nil
		return v
	}
	for _, e := range v.entries {
		if has(read, e.key) {
			continue
		}
		key := v.part(e)
		key.line, key.column = e.line, e.column
		if !has(skip, e.key) {
			d.unknown(key, read+" "+skip)
		} else if key.node != nil {
			d.unused(key, "")
		}
	}
	return v
}

// get returns the value of a key of what fields returned.
func (v value) get(key string) value {
	if v.node != nil {
		if e, ok := v.find(key); ok {
			return v.part(e)
		}
	}
	return v.missing(key)
}

// fill returns the value of the key as get does, and notes that it fills the Go field.
func (d *decoder) fill(v value, field, key string) value {
	p := v.get(key)
	if d.sources != nil {
		p.field = child(v.field, field)
		d.note(p.field, p)
	}
	return p
}

// has reports whether a key is one of those that keys separates by spaces.
func has(keys, key string) bool {
	for known := range strings.SplitSeq(keys, " ") {
		if known == key && key != "" {
			return true
		}
	}
	return false
}

// child adds a key to a path.
func child(path, key string) string {
	unusual := func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("_.-/", r))
	}
	if key == "" || strings.ContainsFunc(key, unusual) {
		return path + "[" + quote(key) + "]"
	}
	key = clip(key, 40)
	if path == "" {
		return key
	}
	return path + "." + key
}

// one reads a mapping that has exactly one of the keys, which names separates by spaces.
func (d *decoder) one(v value, names string) (key string, chosen value) {
	f := d.fields(v, names, "")
	if f.node == nil {
		d.errorf(v, "is required")
		return "", value{}
	}
	known, unknown := 0, false
	for _, e := range f.entries {
		if !has(names, e.key) {
			unknown = true
		} else if e.value.kind != null {
			known, key, chosen = known+1, e.key, f.part(e)
		}
	}
	switch {
	case known == 1:
		return key, chosen
	case known > 1:
		var have []string
		for _, e := range f.entries {
			if e.value.kind != null && has(names, e.key) {
				have = append(have, e.key)
			}
		}
		d.errorf(v, "has %s; want one of them", clip(strings.Join(have, " and "), 100))
	case unknown:
		d.failed[v.path()] = true // fields has reported it
	default:
		d.errorf(v, "wants one of %s", clip(strings.ReplaceAll(names, " ", ", "), 100))
	}
	return "", value{}
}

// items returns the values of a sequence.
func (d *decoder) items(v value) []value {
	if d.learned != nil {
		return []value{{up: d.keep(v)}}
	}
	if !d.is(v, sequence) {
		return nil
	}
	up := d.keep(v)
	items := make([]value, len(v.node.items))
	for i, n := range v.node.items {
		item := value{up: up, line: n.line, column: n.column, index: i}
		if n.kind != null {
			item.node = n
		}
		if d.sources != nil {
			item.field = v.field + "[" + strconv.Itoa(i) + "]"
			d.note(item.field, item)
		}
		items[i] = item
	}
	return items
}

// text reads a text that stands in one line. A name that goes on in the next line is mostly two names, and lacks a comma or a dash.
func (d *decoder) text(v value) string {
	text := d.anyText(v)
	if text != "" && v.goesOn > 0 {
		d.errorf(v, `goes on in line %d; is a comma or a "- " missing? If not, write it in one line`, v.goesOn)
	} else if text != "" && v.bare && strings.Contains(text, " ") && !strings.Contains(text, "/") { // which requests have
		d.warn(v, "is one name with a space in it; is a comma missing? If not, put it in quotes")
	}
	return text
}

// anyText reads a text.
func (d *decoder) anyText(v value) string {
	if !d.is(v, text) {
		return ""
	}
	return v.text
}

// labelValue reads a value that flows are compared with. It warns of a value that programs hardly give: the file is
// well formed, but the component does not act on the flows that are meant. Those of blocks have several lines on purpose.
func (d *decoder) labelValue(v value) string {
	text := d.anyText(v)
	why := slip.In(text)
	if text != "" && v.goesOn > 0 && !v.block {
		why = fmt.Sprintf(`it goes on in line %d; is a comma or a "- " missing?`, v.goesOn)
	}
	if why != "" {
		d.warn(v, "flows hardly have this value: "+why)
	}
	return text
}

// regex reads a regular expression. It warns of one that hardly matches what is meant.
func (d *decoder) regex(v value) string {
	text := d.anyText(v)
	why := slip.InRegex(text)
	if why == "" && text != "" && v.goesOn > 0 {
		why = fmt.Sprintf("it goes on in line %d, and has a space or a line break there", v.goesOn)
	}
	if why != "" {
		d.warn(v, "hardly any value matches this: "+why)
	}
	return text
}

func (d *decoder) labelValues(v value) []string {
	var values []string
	for _, item := range d.items(v) {
		if item.node == nil {
			d.errorf(item, "want %s, have %s", text, null)
		}
		values = append(values, d.labelValue(item))
	}
	return values
}

func (d *decoder) number(v value) float64 {
	if !d.is(v, number) {
		return 0
	}
	return v.number
}

// positive reads a number that is above 0, for a field whose zero means the default.
func (d *decoder) positive(v value) float64 {
	n := d.number(v)
	if v.node != nil && v.kind == number && !(n > 0) {
		d.errorf(v, "must be a number above 0, is %v", n)
	}
	return n
}

// explicit reads a number for a field whose zero means the default. It turns a 0 in the file into the smallest number
// above 0.
func (d *decoder) explicit(v value) float64 {
	if n := d.number(v); n != 0 || v.node == nil {
		return n
	}
	return math.SmallestNonzeroFloat64
}

func (d *decoder) boolean(v value, absent bool) bool {
	if !d.is(v, boolean) {
		return absent
	}
	return v.number != 0
}

func (d *decoder) duration(v value) time.Duration {
	const want = `want a duration such as "1.5s"`
	switch {
	case v.node == nil:
		return 0
	case v.kind == number && v.number == 0:
		return 0
	case v.kind != text:
		d.errorf(v, "%s, have %s", want, v.kind)
		return 0
	}
	t, err := time.ParseDuration(v.text)
	switch {
	case err == nil:
	case wellFormed(v.text):
		d.errorf(v, "duration %s is too long; the longest is %q", quote(v.text), fmt.Sprintf("%dh", math.MaxInt64/int64(time.Hour)))
	default:
		d.errorf(v, "bad duration %s; %s", quote(v.text), want)
	}
	return t
}

// wellFormed reports whether the text is a duration, also one that is too long for a time.Duration.
func wellFormed(text string) bool {
	digit := func(r rune) rune {
		if '0' <= r && r <= '9' {
			return '0'
		}
		return r
	}
	_, err := time.ParseDuration(strings.Map(digit, text))
	return err == nil
}

// optional reads a duration that is not negative, for a field whose zero means the default. It returns zero for a 0 in
// the file.
func (d *decoder) optional(v value, zero time.Duration) time.Duration {
	t := d.duration(v)
	switch {
	case v.node == nil:
		return 0
	case t < 0:
		d.errorf(v, "must not be negative, is %s", t)
	case t == 0:
		return zero
	}
	return t
}
