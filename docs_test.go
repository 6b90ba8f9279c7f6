package headgate_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// documents gives all documents: those in the root, those in docs, the recipes, those for contributors, and the list of examples.
func documents(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/recipes/*.md", "docs/contributing/*.md", "examples/*.md"} {
		names, err := filepath.Glob(filepath.FromSlash(pattern))
		if err != nil || len(names) == 0 {
			t.Fatalf("no documents match %s: %v", pattern, err)
		}
		for _, name := range names {
			found = append(found, filepath.ToSlash(name))
		}
	}
	return found
}

// TestSnippets keeps the documents' code from going stale: each block of Go is a piece of an Example function or of an
// example program, each block of YAML a piece of a policy file that one of them loads. A block of Go that has a package
// clause is a whole program from there on, so that it can be pasted. Indentation and empty lines do not count.
func TestSnippets(t *testing.T) {
	sources := map[string][]string{"go": nil, "yaml": nil}
	root := os.DirFS(".")
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		in := func(dir string) bool { return strings.HasPrefix(name, dir+"/") || strings.Contains(name, "/"+dir+"/") }
		lang := ""
		switch {
		case path.Base(name) == "example_test.go", in("examples") && path.Ext(name) == ".go":
			lang = "go"
		case (in("examples") || in("testdata")) && path.Ext(name) == ".yaml":
			lang = "yaml"
		default:
			return nil
		}
		text, err := fs.ReadFile(root, name)
		sources[lang] = append(sources[lang], squeeze(string(text)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range documents(t) {
		for _, b := range blocks(t, document) {
			switch b.lang {
			case "go", "yaml":
				if !contained(b.text, sources[b.lang]) {
					t.Errorf("%s:%d: no example has this piece of %s", document, b.line, b.lang)
				}
				if strings.HasPrefix(b.text, "package ") && !endsOne(b.text, sources[b.lang]) {
					t.Errorf("%s:%d: a part of the program is missing", document, b.line)
				}
			case "sh", "text":
			default:
				t.Errorf("%s:%d: a block of %q; want go, yaml, sh or text", document, b.line, b.lang)
			}
		}
	}
}

func contained(text string, in []string) bool {
	for _, source := range in {
		if strings.Contains(source, squeeze(text)) {
			return true
		}
	}
	return false
}

// endsOne reports whether the text is the end of one of the sources.
func endsOne(text string, sources []string) bool {
	return slices.ContainsFunc(sources, func(source string) bool { return strings.HasSuffix(source, squeeze(text)) })
}

// squeeze makes texts comparable that differ in white space only. Lines stay lines.
func squeeze(text string) string {
	squeezed := "\n"
	for line := range strings.Lines(text) {
		if words := strings.Fields(line); len(words) > 0 {
			squeezed += strings.Join(words, " ") + "\n"
		}
	}
	return squeezed
}

// A block is a piece of code in a document.
type block struct {
	lang, text string
	line       int // where it begins
}

func blocks(t *testing.T, document string) []block {
	t.Helper()
	const fence = "```"
	var found []block
	inside := false
	n := 0
	for line := range strings.Lines(read(t, document)) {
		n++
		lang, isFence := strings.CutPrefix(strings.TrimSpace(line), fence)
		switch {
		case isFence && !inside:
			inside = true
			found = append(found, block{lang: lang, line: n})
		case isFence:
			inside = false
		case inside:
			found[len(found)-1].text += line
		}
	}
	if inside {
		t.Errorf("%s: a block has no end", document)
	}
	return found
}

func read(t *testing.T, document string) string {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	code    = regexp.MustCompile("(?s)```.*?```|`[^`]*`")
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	noSlug  = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// TestLinks checks that what the documents link to is in the repository.
func TestLinks(t *testing.T) {
	anchors := make(map[string]map[string]bool) // of each file that a link with an anchor leads to
	for _, document := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(read(t, document), ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			target, anchor, _ := strings.Cut(m[1], "#")
			file := document
			if target != "" {
				file = filepath.Join(filepath.Dir(document), filepath.FromSlash(target))
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: the link %s leads nowhere: %v", document, m[1], err)
				continue
			}
			if anchor == "" {
				continue
			}
			if anchors[file] == nil {
				anchors[file] = anchorsOf(read(t, file))
			}
			if !anchors[file][anchor] {
				t.Errorf("%s: the link %s leads nowhere: no heading makes #%s", document, m[1], anchor)
			}
		}
	}
}

// TestReadmeLinks checks that README.md leads to every other document, and CONTRIBUTING.md to those for contributors.
func TestReadmeLinks(t *testing.T) {
	for _, document := range documents(t) {
		from := "README.md"
		if path.Dir(document) == "docs/contributing" {
			from = "CONTRIBUTING.md"
		}
		if document != from && !strings.Contains(read(t, from), "("+document+")") {
			t.Errorf("%s has no link to %s", from, document)
		}
	}
}

// TestAdaptorsAreListed checks that each adaptor is in the lists that docs/contributing/adaptors.md names, and has a name by
// which the linter knows it.
func TestAdaptorsAreListed(t *testing.T) {
	found := 0
	for _, dir := range directories(t) {
		if !imports(t, dir, "github.com/headgate-go/headgate/internal/adaptor") {
			continue
		}
		found++
		if !strings.HasSuffix(dir, "guard") {
			t.Errorf("the adaptor %s is not called …guard", dir)
		}
		lists := []string{"README.md"}
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil { // tests of this module can import it
			lists = append(lists, "dryrun_test.go", "errors_test.go", "retrying_test.go",
				"bench/adaptors.go", "internal/testing/attack/victim/main.go")
		}
		for _, list := range lists {
			if !strings.Contains(read(t, list), dir) {
				t.Errorf("%s does not list the adaptor %s", list, dir)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, "peers_test.go")); err != nil {
			t.Errorf("the adaptor %s does not run internal/testing/adaptortest: %v", dir, err)
		}
	}
	if found < 2 {
		t.Errorf("%d adaptors were found", found)
	}
}

// directories gives the directories in the root.
func directories(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, entry := range entries {
		if entry.IsDir() {
			found = append(found, entry.Name())
		}
	}
	return found
}

// imports reports whether a source file in dir, which is no test, imports the package.
func imports(t *testing.T, dir, pkg string) bool {
	t.Helper()
	for _, file := range sources(t, dir) {
		for _, spec := range parse(t, file).Imports {
			if spec.Path.Value == strconv.Quote(pkg) {
				return true
			}
		}
	}
	return false
}

// TestReadmeFigures keeps README.md from quoting other figures than docs/benchmarks.md has.
func TestReadmeFigures(t *testing.T) {
	type figures struct{ time, bytes, allocs string }
	measured := make(map[string]figures)
	row := regexp.MustCompile(`(?m)^(\S.*?) {2,}(\d+) +\d+ +(\d+) +(\d+)\b`)
	for _, m := range row.FindAllStringSubmatch(read(t, "docs/benchmarks.md"), -1) {
		measured[m[1]] = figures{m[2], m[3], m[4]}
	}
	quoted := regexp.MustCompile(`(?m)^\| (.+) \| (\d+) \| (\d+) \| (\d+) \|$`).FindAllStringSubmatch(read(t, "README.md"), -1)
	if len(quoted) == 0 {
		t.Error("README.md has no figures")
	}
	for _, m := range quoted {
		if got := (figures{m[2], m[3], m[4]}); got != measured[m[1]] {
			t.Errorf("README.md: %s: %v; docs/benchmarks.md has %v", m[1], got, measured[m[1]])
		}
	}
}

// anchorsOf gives the anchors that a document's headings make.
func anchorsOf(text string) map[string]bool {
	made := make(map[string]bool)
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		slug := noSlug.ReplaceAllString(strings.ToLower(m[1]), "")
		made[strings.ReplaceAll(slug, " ", "-")] = true
	}
	return made
}

var (
	codeSpan = regexp.MustCompile("`[^`]+`")
	word     = regexp.MustCompile(`\w+`)
)

// codeSpans gives what stands between single backticks.
func codeSpans(text string) []string {
	return codeSpan.FindAllString(strings.ReplaceAll(text, "```", ""), -1)
}

// TestPolicyKeys keeps docs/policies.md complete: it names each key, component, blueprint and status that package policy
// knows. What its tables call keys and Go fields are such.
func TestPolicyKeys(t *testing.T) {
	known := policyKeys(t)
	fields := policyNames(t)
	const document = "docs/policies.md"
	text := read(t, document)

	told := make(map[string]bool)
	for _, span := range codeSpans(text) {
		told[strings.Trim(span, "`")] = true
		for _, w := range word.FindAllString(span, -1) {
			told[w] = true
		}
	}
	for key := range known {
		if !told[key] {
			t.Errorf("%s does not name %s", document, key)
		}
	}

	// Other tables are written by a test of package policy.
	if before, rest, found := strings.Cut(text, "<!-- generated: keys -->"); found {
		_, after, _ := strings.Cut(rest, "<!-- /generated -->")
		text = before + after
	}
	var header []string
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch {
		case !strings.HasPrefix(line, "|"):
			header = nil
		case header == nil:
			header = cells
		}
		for i, cell := range cells[:min(len(cells), len(header))] {
			names := map[string]map[string]bool{"key": known, "Go field": fields}[header[i]]
			for _, span := range codeSpans(cell) {
				for _, w := range word.FindAllString(span, -1) {
					if names != nil && !names[w] && !isNumber(w) {
						t.Errorf("%s: in %q, %s is no %s", document, cell, w, header[i])
					}
				}
			}
		}
	}
}

func isNumber(w string) bool { return w[0] >= '0' && w[0] <= '9' }

// TestOperatingNames keeps docs/operating.md complete: it has every message that is logged, every metric, and all that
// metrics and spans carry.
func TestOperatingNames(t *testing.T) {
	const document = "docs/operating.md"
	spans := codeSpans(read(t, document))
	// The last five are OpenTelemetry's.
	calls := []string{"warn", "log", "Warn", "Info", "Int64Counter", "Int64ObservableGauge", "String", "Bool", "AddEvent"}
	found := 0
	files, err := filepath.Glob("flowctl/*.go")
	if err != nil {
		t.Fatal(err)
	}
	files = slices.DeleteFunc(files, func(file string) bool {
		return strings.HasSuffix(file, "_test.go") || file == "flowctl/errors.go" // whose text is its own documentation's
	})
	for _, file := range append(files, "engine/engine.go", "engine/watch.go") {
		ast.Inspect(parse(t, file), func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if f, ok := call.Fun.(*ast.SelectorExpr); !ok || !slices.Contains(calls, f.Sel.Name) {
				return true
			}
			for _, arg := range call.Args {
				if lit, ok := arg.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					found++
					if name := "`" + strings.Trim(lit.Value, `"`) + "`"; !slices.Contains(spans, name) {
						t.Errorf("%s does not have %s", document, name)
					}
					break // the others are attributes of the message
				}
			}
			return true
		})
	}
	name := regexp.MustCompile(`^"[a-z]+(_[a-z]+)+"$`) // the engine's are in tables
	for _, file := range []string{"engine/metrics.go", "engine/kinds.go"} {
		ast.Inspect(parse(t, file), func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && name.MatchString(lit.Value) {
				found++
				if name := "`" + strings.Trim(lit.Value, `"`) + "`"; !slices.Contains(spans, name) {
					t.Errorf("%s does not have %s", document, name)
				}
			}
			return true
		})
	}
	if found < 50 {
		t.Errorf("%d names: where are the others?", found)
	}
}

// policyKeys gives the words that package policy reads files by: those in the calls that take a mapping apart or ask for
// a setting, in the lists of keys, and in the tables of components, blueprints and statuses.
func policyKeys(t *testing.T) map[string]bool {
	t.Helper()
	keys := make(map[string]bool)
	add := func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			text, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Error(err)
			}
			if strings.Contains(text, `"`) {
				return true // a message
			}
			for key := range strings.FieldsSeq(text) {
				keys[key] = true
			}
		}
		return true
	}
	for _, file := range sources(t, "policy") {
		if file == filepath.Join("policy", "yaml.go") { // its words are about YAML, whatever a file is about
			continue
		}
		ast.Inspect(parse(t, file), func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GenDecl:
				if n.Tok == token.CONST {
					ast.Inspect(n, add)
				}
			case *ast.CompositeLit:
				for _, cell := range n.Elts {
					if _, ok := cell.(*ast.BasicLit); ok && n.Type == nil { // of a row
						add(cell)
					}
				}
			case *ast.KeyValueExpr:
				ast.Inspect(n.Key, add)
				if row, ok := n.Value.(*ast.CompositeLit); ok && row.Type == nil { // of a table
					ast.Inspect(row, add)
				}
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.SelectorExpr); ok && slices.Contains([]string{"fields", "one", "setting"}, f.Sel.Name) {
					ast.Inspect(n, add)
				}
			}
			return true
		})
	}
	if len(keys) < 100 {
		t.Fatalf("%d keys: where are the others?", len(keys))
	}
	return keys
}

// policyNames gives the names that policies in Go are made of: types, fields and constants.
func policyNames(t *testing.T) map[string]bool {
	t.Helper()
	names := make(map[string]bool)
	add := func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.TypeSpec:
			names[n.Name.Name] = true
		case *ast.Field:
			for _, name := range n.Names {
				names[name.Name] = true
			}
		case *ast.ValueSpec:
			for _, name := range n.Names {
				names[name.Name] = true
			}
		}
		return true
	}
	for _, file := range sources(t, "policy") {
		ast.Inspect(parse(t, file), add)
	}
	return names
}

// sources lists the files of a package that are no tests.
func sources(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(dir + "/*.go")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(files, func(file string) bool { return strings.HasSuffix(file, "_test.go") })
}

func parse(t *testing.T, file string) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}
