package headgate_test

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var documents = []string{"README.md", "docs/guide.md"}

// TestSnippets keeps the documents' code from going stale: each block of Go is a piece of an Example function or of an
// example program, each block of YAML a piece of a policy file that one of them loads. Indentation and empty lines do
// not count.
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
	for _, document := range documents {
		for _, b := range blocks(t, document) {
			switch b.lang {
			case "go", "yaml":
				if !contained(b.text, sources[b.lang]) {
					t.Errorf("%s:%d: no example has this piece of %s", document, b.line, b.lang)
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
	for _, document := range documents {
		for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(read(t, document), ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			target, anchor, _ := strings.Cut(m[1], "#")
			file := document
			if target != "" {
				file = filepath.Join(filepath.Dir(document), filepath.FromSlash(target))
			}
			if err := resolve(file, anchor); err != nil {
				t.Errorf("%s: the link %s leads nowhere: %v", document, m[1], err)
			}
		}
	}
}

// resolve looks for a file and, where an anchor is given, for the heading that makes it.
func resolve(file, anchor string) error {
	if anchor == "" {
		_, err := os.Stat(file)
		return err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for _, m := range heading.FindAllStringSubmatch(string(text), -1) {
		slug := noSlug.ReplaceAllString(strings.ToLower(m[1]), "")
		if strings.ReplaceAll(slug, " ", "-") == anchor {
			return nil
		}
	}
	return fmt.Errorf("no heading makes #%s", anchor)
}
