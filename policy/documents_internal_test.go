package policy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Update is set to have tests write anew the files that they compare with.
var Update = flag.Bool("update", false, "write the files that tests compare with anew")

// zeroMeans says what a 0 in a file means, for the fields whose zero in Go means a default.
var zeroMeans = map[string]string{
	"MaxIdle": "as long as there is room", "MaxDebt": "none", "Margin": "none", "Tokens": "free", "QueueTimeout": "it does not wait",
	"LinearIncrement": "nothing is added", "Gradient.Min": "0", "Gradient.Max": "0", "Override.*": "0",
}

// sources are the comments and constants of this package.
type sources struct {
	comments  map[string]string   // of fields, by "Type.Field"
	constants map[string][]string // the values of the constants of a type
}

func readSources(t *testing.T) sources {
	t.Helper()
	s := sources{map[string]string{}, map[string][]string{}}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	plain := func(group *ast.CommentGroup) string {
		var p comment.Parser
		text := string((&comment.Printer{TextWidth: -1}).Text(p.Parse(group.Text())))
		return strings.Join(strings.Fields(linked.ReplaceAllString(text, "$1")), " ")
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.TypeSpec:
				of, ok := n.Type.(*ast.StructType)
				if !ok {
					break
				}
				before := ""
				for _, field := range of.Fields.List {
					if text := plain(cmp.Or(field.Doc, field.Comment)); text != "" {
						before = text // of those that follow without one, too
					}
					for _, name := range field.Names {
						s.comments[n.Name.Name+"."+name.Name] = before
					}
				}
			case *ast.ValueSpec:
				if of, ok := n.Type.(*ast.Ident); ok && len(n.Values) == 1 {
					if value, ok := n.Values[0].(*ast.BasicLit); ok && value.Kind == token.STRING {
						text, _ := strconv.Unquote(value.Value)
						s.constants[of.Name] = append(s.constants[of.Name], text)
					}
				}
			}
			return true
		})
	}
	return s
}

// linked is a name that a comment links to.
var linked = regexp.MustCompile(`\[(\w+)\]`)

// compare compares a file with what it should hold, or writes it.
func compare(t *testing.T, file string, want []byte) {
	t.Helper()
	if *Update {
		if err := os.WriteFile(file, want, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want) {
		t.Errorf("%s is out of date: run go test ./policy -run %s -update", file, t.Name())
	}
}

// TestDocumentedKeys keeps the tables of short files in docs/policies.md up to date.
func TestDocumentedKeys(t *testing.T) {
	const (
		file       = "../docs/policies.md"
		begin, end = "<!-- generated: keys -->\n", "<!-- /generated -->\n"
	)
	for _, row := range keyRows {
		if (row.zero != 0) != (zeroMeans[row.field] != "") {
			t.Errorf("zeroMeans of %s is %q", row.field, zeroMeans[row.field])
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(text), begin)
	_, after, foundEnd := strings.Cut(rest, end)
	if !found || !foundEnd {
		t.Fatalf("%s has no place for the tables", file)
	}
	compare(t, file, []byte(before+begin+keyTables(readSources(t))+end+after))
}

// TestSchema keeps docs/policy.schema.json up to date.
func TestSchema(t *testing.T) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(schema(readSources(t))); err != nil {
		t.Fatal(err)
	}
	compare(t, "../docs/policy.schema.json", b.Bytes())
}

// object is an object of JSON.
type object = map[string]any

// schema returns a JSON Schema of draft 7, which editors know, for short files.
func schema(s sources) object {
	definitions := object{
		"component":  exactlyOne(kindProperties()),
		"duration":   object{"anyOf": []any{object{"type": "string", "pattern": `^(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h))+$`}, object{"const": 0}}},
		"expression": exactlyOne(expressionProperties()),
		"signal": object{"anyOf": []any{
			object{"type": "number"}, object{"type": "string", "minLength": 1}, exactlyOne(object{meanLatencyKey: reference("MeanLatency")}),
		}},
	}
	structs(func(of reflect.Type) {
		properties, need := object{}, []string{}
		addProperties(properties, &need, shapeOf(of), s)
		d := object{"type": "object", "properties": properties, "additionalProperties": false}
		if _, ok := properties[atKey]; ok {
			d["oneOf"] = []any{object{"required": []string{atKey}}, object{"required": []string{"selectors"}}}
		}
		if len(need) > 0 {
			d["required"] = need
		}
		definitions[of.Name()] = d
	})
	return object{
		"$schema":     "http://json-schema.org/draft-07/schema#",
		"title":       "Policies of Headgate",
		"description": "A policy file in Headgate's own shape. Written by go test ./policy -run TestSchema -update.",
		"type":        "object",
		"properties": object{
			"headgate": object{"const": version, "description": "The version of the format."},
			"policies": object{"type": "array", "minItems": 1, "items": reference("Policy")},
		},
		"patternProperties":    object{"^x-": object{}},
		"additionalProperties": false,
		"required":             strings.Fields(shapeKeys),
		"definitions":          definitions,
	}
}

func reference(to string) object { return object{"$ref": "#/definitions/" + to} }

// exactlyOne is an object with exactly one of the properties.
func exactlyOne(properties object) object {
	return object{"type": "object", "properties": properties, "additionalProperties": false, "minProperties": 1, "maxProperties": 1}
}

func kindProperties() object {
	properties := object{}
	for _, kind := range kinds {
		properties[kind.name] = reference(reflect.TypeOf(kind.zero).Name())
	}
	return properties
}

func expressionProperties() object {
	list := object{"type": "array", "items": reference("expression")}
	return object{
		"not": reference("expression"), "all": list, "any": list, "label_exists": object{"type": "string"},
		"label_equals": reference("LabelEquals"), "label_matches": reference("LabelMatches"),
	}
}

// addProperties adds the properties for the fields of a struct, and the names of those that must be there.
func addProperties(properties object, need *[]string, of *shape, s sources) {
	for _, f := range of.fields {
		if f.rule == inline {
			addProperties(properties, need, f.inner, s)
			continue
		}
		property := f.property(s)
		if text := f.comment(s, of); text != "" {
			if means := cmp.Or(zeroMeans[f.field], zeroMeans[f.goName(of)]); f.zero != 0 {
				text += " In a file, 0 means: " + means + "."
			}
			property["description"] = strings.ReplaceAll(text, "`", "")
		}
		properties[f.key] = property
		switch {
		case f.kind == reflect.TypeFor[[]Selector]():
			properties[atKey] = object{"type": "array", "minItems": 1, "items": object{"type": "string", "minLength": 1}, "description": "Control points: all their flows are selected."}
		case f.rule == required:
			*need = append(*need, f.key)
		}
	}
}

// property returns the schema of a field's values.
func (f *shapeField) property(s sources) object {
	text := object{"type": "string"}
	switch t := f.kind; {
	case t == reflect.TypeFor[time.Duration]():
		return object{"allOf": []any{reference("duration")}}
	case t == reflect.TypeFor[Signal]():
		return object{"allOf": []any{reference("signal")}}
	case t == reflect.TypeFor[Expression]():
		return object{"allOf": []any{reference("expression")}}
	case t == reflect.TypeFor[[]Component]():
		return object{"type": "array", "minItems": 1, "items": reference("component")}
	case f.status:
		return object{"type": "integer", "minimum": 400, "maximum": 599}
	case t.Kind() == reflect.String && s.constants[t.Name()] != nil:
		return object{"enum": s.constants[t.Name()]}
	case t.Kind() == reflect.String:
		return text
	case t.Kind() == reflect.Bool:
		return object{"type": "boolean"}
	case t.Kind() == reflect.Float64 && f.rule == nonzero && f.zero == 0:
		return object{"type": "number", "not": object{"const": 0}}
	case t.Kind() == reflect.Float64:
		return object{"type": "number"}
	case t.Kind() == reflect.Int && f.rule == nonzero:
		return object{"type": "integer", "minimum": 1}
	case t.Kind() == reflect.Int:
		return object{"type": "integer", "minimum": 0}
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.String:
		return object{"type": "array", "items": text}
	case t.Kind() == reflect.Slice:
		return object{"type": "array", "items": reference(t.Elem().Name())}
	case t.Kind() == reflect.Map && t.Elem().Kind() == reflect.String:
		return object{"type": "object", "additionalProperties": text}
	case t.Kind() == reflect.Map:
		return object{"type": "object", "additionalProperties": reference(t.Elem().Name())}
	case t.Kind() == reflect.Pointer:
		return object{"allOf": []any{reference(t.Elem().Name())}}
	default:
		return object{"allOf": []any{reference(t.Name())}}
	}
}

// TestSchemaFindsMistakes checks short files against the schema: all that can be read are valid, and mistakes are found.
func TestSchemaFindsMistakes(t *testing.T) {
	text, err := os.ReadFile("../docs/policy.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var root object
	if err := json.Unmarshal(text, &root); err != nil {
		t.Fatal(err)
	}
	check := func(text string) (problems []string) {
		r, errs := newReader("x.yaml", []byte(text))
		if r == nil {
			t.Fatal(errs)
		}
		r.all(func(doc *node) bool {
			if isShort(doc) {
				problems = append(problems, (&validator{root: root}).check(root, plainValue(doc), "")...)
			}
			return true
		})
		if len(r.errs) > 0 {
			t.Fatal(r.errs)
		}
		return problems
	}
	files := 0
	for _, pattern := range []string{"testdata/*.yaml", "../engine/testdata/*.yaml", "../examples/*/*.yaml"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range found {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Parse(file, text); err != nil || !bytes.Contains(text, []byte("headgate:")) {
				continue // meant to be wrong, or of another shape
			}
			files++
			if problems := check(string(text)); problems != nil {
				t.Errorf("%s: %s", file, problems)
			}
		}
	}
	if files == 0 {
		t.Error("no short file")
	}
	const good = "headgate: 1\npolicies: [{name: p, components: [{rate_limiter: {at: [a], capacity: 1, fill: 1, interval: 1s}}]}]\n"
	if problems := check(good); problems != nil {
		t.Error(problems)
	}
	for _, mistake := range [][2]string{
		{"capacity", "capacty"},
		{"headgate", "headgat"},
		{"name", "nam"},
		{"rate_limiter", "rate_limitr"},
		{"at:", "control_points:"},
		{"at: [a]", "at: [a], selectors: [{control_point: a}]"},
		{"at: [a]", "at: []"},
		{"at: [a]", "selectors: [{point: a}]"},
		{"1s", "1"},
		{"1s", "soon"},
		{"capacity: 1", "capacity: many"},
		{"capacity: 1, ", ""},
		{"fill: 1", "fill: 1, denied_status: 200"},
		{"fill: 1", "fill: 1, dry_run: 1"},
		{"fill: 1", "fill: 1, share: lazy"},
		{"fill: 1", "fill: 1, on_outage: true"},
		{"headgate: 1", "headgate: 2"},
		{"[{rate", "[{sampler: {}, rate"},
	} {
		if problems := check(strings.Replace(good, mistake[0], mistake[1], 1)); problems == nil {
			t.Errorf("%s instead of %s is valid", mistake[1], mistake[0])
		}
	}
}

// plainValue returns a node as JSON would have it.
func plainValue(n *node) any {
	switch n.kind {
	case boolean:
		return n.number != 0
	case number:
		return n.number
	case text:
		return n.text
	case sequence:
		items := []any{}
		for _, item := range n.items {
			items = append(items, plainValue(item))
		}
		return items
	case mapping:
		o := object{}
		for _, e := range n.entries {
			o[e.key] = plainValue(e.value)
		}
		return o
	default:
		return nil
	}
}

// A validator checks values by what our schema uses of JSON Schema.
type validator struct{ root object }

func (v *validator) check(schema object, value any, at string) (problems []string) {
	wrong := func(what string, more ...any) { problems = append(problems, at+": "+what+fmt.Sprint(more...)) }
	array := func(of any) []any { a, _ := of.([]any); return a }
	o, isObject := value.(object)
	items, isArray := value.([]any)
	n, isNumber := value.(float64)
	text, isText := value.(string)
	properties, _ := schema["properties"].(object)
	for _, keyword := range slices.Sorted(maps.Keys(schema)) {
		want := schema[keyword]
		switch keyword {
		case "$schema", "title", "description", "definitions", "properties", "patternProperties":
		case "$ref":
			name := strings.TrimPrefix(want.(string), "#/definitions/")
			problems = append(problems, v.check(v.root["definitions"].(object)[name].(object), value, at)...)
		case "allOf":
			for _, part := range array(want) {
				problems = append(problems, v.check(part.(object), value, at)...)
			}
		case "anyOf", "oneOf":
			valid := 0
			for _, part := range array(want) {
				if v.check(part.(object), value, at) == nil {
					valid++
				}
			}
			if valid == 0 || keyword == "oneOf" && valid > 1 {
				wrong(keyword, " has ", valid, " valid parts")
			}
		case "not":
			if v.check(want.(object), value, at) == nil {
				wrong("not")
			}
		case "const":
			if value != want {
				wrong("want ", want)
			}
		case "enum":
			if !slices.Contains(array(want), value) {
				wrong("want one of ", want)
			}
		case "type":
			_, isBool := value.(bool)
			if is := map[string]bool{
				"object": isObject, "array": isArray, "string": isText, "boolean": isBool, "number": isNumber,
				"integer": isNumber && n == float64(int64(n)),
			}; !is[want.(string)] {
				wrong("want ", want)
			}
		case "pattern":
			if isText && !regexp.MustCompile(want.(string)).MatchString(text) {
				wrong("want ", want)
			}
		case "minimum":
			if isNumber && n < want.(float64) {
				wrong("is below ", want)
			}
		case "maximum":
			if isNumber && n > want.(float64) {
				wrong("is above ", want)
			}
		case "minLength":
			if isText && len(text) < int(want.(float64)) {
				wrong("is too short")
			}
		case "minItems":
			if isArray && len(items) < int(want.(float64)) {
				wrong("has too few items")
			}
		case "items":
			for i, item := range items {
				problems = append(problems, v.check(want.(object), item, fmt.Sprint(at, "[", i, "]"))...)
			}
		case "minProperties":
			if isObject && len(o) < int(want.(float64)) {
				wrong("has too few keys")
			}
		case "maxProperties":
			if isObject && len(o) > int(want.(float64)) {
				wrong("has too many keys")
			}
		case "required":
			for _, key := range array(want) {
				if _, ok := o[key.(string)]; isObject && !ok {
					wrong("lacks ", key)
				}
			}
		case "additionalProperties":
			for key, part := range o {
				if properties[key] != nil {
					problems = append(problems, v.check(properties[key].(object), part, child(at, key))...)
				} else if more, ok := want.(object); ok {
					problems = append(problems, v.check(more, part, child(at, key))...)
				} else if schema["patternProperties"] == nil || !strings.HasPrefix(key, "x-") {
					wrong("unknown key ", key)
				}
			}
		default:
			panic("the test does not know " + keyword)
		}
	}
	return problems
}

// keyTables returns a table for each kind, and for what kinds share.
func keyTables(s sources) string {
	var b strings.Builder
	table := func(title string, of *shape) {
		fmt.Fprintf(&b, "\n#### %s\n\n| key | value | default |\n| --- | --- | --- |\n", title)
		for _, f := range of.fields {
			if f.rule == inline {
				title := inlineTitles[f.inner.of.Name()]
				fmt.Fprintf(&b, "| | the keys of [%s](#%s) | |\n", strings.ToLower(title), anchor(title))
				continue
			}
			key := "`" + f.key + "`"
			if f.kind == reflect.TypeFor[[]Selector]() {
				key = "`at`, or `selectors`"
			}
			fmt.Fprintf(&b, "| %s | %s | %s |\n", key, f.describe(s, of), f.otherwise(s, of))
		}
	}
	table("A policy", shapeOf(reflect.TypeFor[Policy]()))
	for _, kind := range kinds {
		table("`"+kind.name+"`", shapeOf(reflect.TypeOf(kind.zero)))
	}
	seen := map[string]bool{}
	structs(func(of reflect.Type) {
		if title := inlineTitles[of.Name()]; title != "" && !seen[title] {
			seen[title] = true
			table(title, shapeOf(of))
		}
	})
	b.WriteString("\n")
	return b.String()
}

// inlineTitles are the titles of the structs that are no kinds.
var inlineTitles = map[string]string{
	"Scheduler": "A queue", "Workload": "A workload", "WorkloadParameters": "How a workload waits", "Selector": "A selector",
	"LabelMatcher": "Conditions", "Requirement": "A requirement", "Gradient": "A gradient", "RampStep": "A step of a ramp",
	"MeanLatency": "A mean latency", "Escalation": "An escalation", "Override": "An override",
}

func anchor(title string) string { return strings.ReplaceAll(strings.ToLower(title), " ", "-") }

func (f *shapeField) goName(of *shape) string { return of.of.Field(f.index).Name }

// comment returns the comment of a field, with keys for the Go names of this field and its neighbors.
func (f *shapeField) comment(s sources, of *shape) string {
	return word.ReplaceAllStringFunc(s.comments[of.of.Name()+"."+f.goName(of)], func(name string) string {
		for _, f := range of.fields {
			if f.goName(of) == name && f.rule != inline {
				return "`" + f.key + "`"
			}
		}
		return name
	})
}

var word = regexp.MustCompile(`\b[A-Z]\w*`)

// describe returns the type of a field, and the first sentence about it.
func (f *shapeField) describe(s sources, of *shape) string {
	first, _, _ := strings.Cut(f.comment(s, of)+" ", ". ")
	if first = strings.TrimSuffix(strings.TrimSpace(first), "."); strings.HasPrefix(first, "Required") || first == "" {
		return f.typeText(s)
	}
	return f.typeText(s) + ": " + first
}

func (f *shapeField) typeText(s sources) string {
	link := func(t reflect.Type) string {
		title := inlineTitles[t.Name()]
		return fmt.Sprintf("[%s](#%s)", strings.ToLower(title), anchor(title))
	}
	switch t := f.kind; {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration"
	case t == reflect.TypeFor[[]Selector]():
		return "a list of control points, or of " + link(t.Elem())
	case t == reflect.TypeFor[[]Component]():
		return "a list of components, each under the name of its kind"
	case t == reflect.TypeFor[Signal]():
		return "a number, the name of a signal, or " + link(reflect.TypeFor[MeanLatency]()) + " under `" + meanLatencyKey + "`"
	case t == reflect.TypeFor[Expression]():
		return "one of `" + strings.Join(strings.Fields(expressionKeys), "`, `") + "`"
	case t.Kind() == reflect.String && s.constants[t.Name()] != nil:
		return "`" + strings.Join(s.constants[t.Name()], "`, `") + "`"
	case t.Kind() == reflect.String:
		return "text"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Float64:
		return "a number"
	case t.Kind() == reflect.Int:
		return "a whole number"
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.String:
		return "a list of texts"
	case t.Kind() == reflect.Slice:
		return "a list, each " + link(t.Elem())
	case t.Kind() == reflect.Map && t.Elem().Kind() == reflect.String:
		return "a mapping of texts"
	case t.Kind() == reflect.Map:
		return "a mapping, each value " + link(t.Elem())
	case t.Kind() == reflect.Pointer:
		return link(t.Elem())
	default:
		return link(t)
	}
}

// defaultOf finds what a comment says about zero.
var defaultOf = regexp.MustCompile(`(?:Zero means|Empty means|Default:) ("[^"]*"|[^.,;:]*(?:\.[0-9]+)?)|(?:Zero|Empty): ([^.]*)`)

// otherwise returns what holds without the key, and what 0 means.
func (f *shapeField) otherwise(s sources, of *shape) string {
	text := f.comment(s, of)
	if f.rule == required {
		return "required"
	}
	found := "none"
	if f.kind.Kind() == reflect.Bool {
		found = "false"
	}
	if match := defaultOf.FindStringSubmatch(text); match != nil {
		found = match[1] + match[2]
		if text, err := strconv.Unquote(found); err == nil {
			found = "`" + text + "`"
		}
	} else if strings.Contains(text, " as in ") {
		found = "as there"
	}
	found = strings.NewReplacer("DefaultMaxIdle", "2h", "DefaultMaxQueue", "10,000", "DefaultMargin", "10ms").Replace(found)
	if means := cmp.Or(zeroMeans[f.field], zeroMeans[f.goName(of)]); f.zero != 0 {
		found += "; 0: " + means
	}
	return found
}
