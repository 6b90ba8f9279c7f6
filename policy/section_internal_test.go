package policy

import (
	"reflect"
	"strings"
	"testing"
)

const sectionDocument = "apiVersion: fluxninja.com/v1alpha1\nkind: Policy\nmetadata: {name: p}\nspec:\n  circuit:\n    components:\n" +
	"    - alerter: {}\n    - flow_control: {concurrency_limiter: {selectors: [{control_point: a, service: %}], " +
	"in_ports: {max_concurrency: {constant_signal: {value: 5}}}, parameters: {max_inflight_duration: 1m}}}\n"

// checkSections compares a file that is read in as many sections as it may have with one that is read as a whole.
func checkSections(t *testing.T, text string) {
	t.Helper()
	r, _ := newReader("x.yaml", []byte(text))
	if r == nil {
		return
	}
	sections, good := r.good("x", 1)
	var whole loader
	r.all(func(doc *node) bool {
		var one loader // names are compared by take, not by sections
		policies, errs := one.document("x.yaml", "x", doc, false)
		whole.fail(errs)
		whole.policies = append(whole.policies, policies...)
		return true
	})
	if want := len(whole.errs)+len(r.errs) == 0; good != want {
		t.Fatalf("good = %t, want %t: errors of the whole file are %v, %v\n%s", good, want, r.errs, whole.errs, text)
	}
	if !good {
		return
	}
	var policies []Policy
	for _, s := range sections {
		policies = append(policies, s.policies...)
	}
	if !reflect.DeepEqual(policies, whole.policies) {
		t.Errorf("sections have %+v, the whole file %+v\n%s", policies, whole.policies, text)
	}
}

// sectionSeeds are what "---" may stand in, or next to.
func sectionSeeds() []string {
	return []string{
		"", "---\n", "--- {}\n", "---\t{}\n", "---{}\n", "---x: 1\n", "...\n", "...\n---\n", "# c\n---\n", "\n---\n# c\n", "---\r", "\r---\r\n", "---",
		"a: |\n---\n", "a: |\n  b\n---\n", "|\n---\n", "--- |\n---\n", "--- |\nb\n---\n", "--- >\n\n---\n", "a: |+\n\n---\n\n",
		"a: \"b\n---\nc\"\n", "a: 'b\n---\n'\n", "a: 'b\n--- '\n", "a: \"b\\\n---\n\"\n", "a: b\n---\nc\n", "a: 'b\n----\nc'\n",
		"a: [\n---\n]\n", "{\n---\n}\n", "{a: b,\n--- c: d}\n", "[\n--- a]\n", "- a\n---\n- b\n", "? a\n---\n: b\n", "a:\n---\n b\n", "- - a\n---\n  - b\n",
		"x-a: &a {b: c}\n---\nx-b: *a\n", "&a\n---\na\n", "!!str\n---\na\n", "<<: &a {x-a: b}\n---\n<<: *a\n",
		"%YAML 1.2\n---\n", "...\n%YAML 1.2\n---\n", "...\n%FOO\n---\n", "...\n%TAG ! x\n---\n", "\n%FOO\n---\n", "---\n%FOO\n---\n",
		"null\n---\n~\n", "---\n---\n---\n", "x-a: 1\n", "}\n---\n", "a: b: c\n---\n",
	}
}

func TestSections(t *testing.T) {
	resource := strings.Replace(sectionDocument, "%", "any", 1)
	for _, seed := range sectionSeeds() {
		for _, text := range []string{
			seed, resource + seed, resource + "---\n" + seed, seed + resource, seed + "---\n" + resource,
			resource + "---\n" + seed + "---\n" + resource, resource + seed + resource,
			strings.Replace(sectionDocument, "%", "\n"+seed, 1) + "---\n" + resource,
			strings.Replace(sectionDocument, "%", "\"\n"+seed+"\"", 1) + "---\n" + resource,
			"{\"x-a\": 1,\n" + seed + "---\n" + resource,
		} {
			checkSections(t, text)
		}
	}
}

// TestSectionsAliases reads a file whose aliases stand for more than a file's may, in sections that each do not.
func TestSectionsAliases(t *testing.T) {
	resource := "x-a: &a \"" + strings.Repeat("a", 1<<20) + "\"\nx-b: [" + strings.Repeat("*a, ", 20) + "]\n" +
		strings.Replace(sectionDocument, "%", "any", 1)
	for _, tt := range []struct {
		name, text string
		want       bool
	}{
		{"few", resource, true},
		{"too many", resource + "---\n" + resource, false},
	} {
		r, errs := newReader("x.yaml", []byte(tt.text))
		if r == nil {
			t.Fatal(errs)
		}
		if sections, good := r.good("x", sectionSize); good != tt.want {
			t.Errorf("%s: good = %t of %d sections, want %t", tt.name, good, len(sections), tt.want)
		}
	}
}

func FuzzSections(f *testing.F) {
	resource := strings.Replace(sectionDocument, "%", "any", 1)
	for _, seed := range sectionSeeds() {
		f.Add(seed)
		f.Add(resource + "---\n" + seed)
	}
	f.Fuzz(checkSections)
}
