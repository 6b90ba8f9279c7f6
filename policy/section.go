package policy

import (
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
)

// A section is a part of a file that is read on its own, in parallel with others: the documents from the line first to
// the one before end. Documents do not depend on each other, except by the names of policies, and by how much aliases
// may stand for in the whole file.
type section struct {
	first, end int
	policies   []Policy
	names      []position // where the policies have them
	aliased    int        // bytes that its aliases stand for
}

// sectionSize is how many bytes a section has, and more until its last document ends.
const sectionSize = 128 << 10

// sections divides the file into sections of about the size.
func (r *yamlReader) sections(size int) []section {
	var sections []section
	first := 0
	for i, begins := range r.lines {
		if begins-r.lines[first] >= size && startsDocument(r.text[begins:]) {
			sections = append(sections, section{first: first, end: i})
			first = i
		}
	}
	return append(sections, section{first: first, end: len(r.lines)})
}

// startsDocument reports whether the line that text begins with starts a document wherever it stands in YAML: in quotes,
// brackets and block scalars too, which it breaks.
func startsDocument(text string) bool {
	behind, found := strings.CutPrefix(text, "---")
	return found && (behind == "" || strings.IndexByte(" \t\r\n", behind[0]) >= 0)
}

// good reads the file on all processors. It reports whether it has found nothing wrong: what is wrong, and in which
// order, is known only if the file is read from its beginning.
func (r *yamlReader) good(plain string, size int) ([]section, bool) {
	sections := r.sections(size)
	var taken atomic.Int64
	var bad atomic.Bool
	work := func() {
		for !bad.Load() {
			i := int(taken.Add(1)) - 1
			if i >= len(sections) {
				return
			}
			if !sections[i].read(*r, plain) {
				bad.Store(true)
			}
		}
	}
	var others sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(sections)) - 1 {
		others.Go(work)
	}
	work()
	others.Wait()
	aliased := 0
	for _, s := range sections {
		aliased += s.aliased
	}
	return sections, !bad.Load() && aliased <= maxAlias
}

// read reads the policies of the section and reports whether it has found nothing wrong. Each document is decoded as
// soon as it is read, so that only one is in memory at a time, in the memory of the one before.
func (s *section) read(r yamlReader, plain string) bool {
	good := true
	var kept slab[value]
	err := r.documents(s.first, s.end, func(doc *node, failed bool) bool {
		if failed || len(r.errs) > 0 {
			good = false
		} else if doc.kind != null {
			d := newDecoder(r.file)
			d.hasty, d.kept = true, &kept
			s.policies = append(s.policies, d.policies(doc, plain)...)
			for _, name := range d.names {
				s.names = append(s.names, position{name.line, name.column})
			}
			good = !d.invalid
		}
		r.nodes.reset()
		r.entries.reset()
		kept.reset()
		return good
	})
	s.aliased = maxAlias - r.left
	return good && err == nil && r.left >= 0
}
