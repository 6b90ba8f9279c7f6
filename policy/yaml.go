package policy

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"github.com/headgate-go/headgate/internal/policyfiles"
)

// Bounds of what is read.
const (
	maxSize  = policyfiles.MaxSize
	maxAlias = 32 << 20 // bytes that its aliases stand for, 32 more for each value
	maxDepth = 64       // mappings and sequences in each other; errors have paths as long as that
	maxFlow  = 300_000  // indicators in a list or mapping in brackets; see checkFlow
)

// kind is what a node is; it reads as in "want a string, have a number".
type kind string

const (
	null     kind = "nothing"
	boolean  kind = "a boolean"
	number   kind = "a number"
	text     kind = "a string"
	sequence kind = "a sequence"
	mapping  kind = "a mapping"
)

// A node is a value of a YAML document. Aliases share the node that they stand for, so nodes do not change.
type node struct {
	kind         kind
	line, column int
	text         string  // of text
	number       float64 // of number; of boolean, 1 for true
	items        []*node // of sequence
	entries      []entry // of mapping, in the file's order; keys are unique
	index        map[string]int
	size         int   // bytes of it and below, aliases expanded
	height       int32 // levels of it and below, aliases expanded
	goesOn       int32 // of text, the line after a line break in the file that is part of it; 0 if there is none
	block        bool  // text after | or >
	bare         bool  // text without quotes, in a list in brackets
}

type entry struct {
	key          string
	line, column int // of the key
	value        *node
}

// find returns the entry of a key.
func (n *node) find(key string) (entry, bool) {
	if n.index != nil {
		i, ok := n.index[key]
		if !ok {
			return entry{}, false
		}
		return n.entries[i], true
	}
	for _, e := range n.entries {
		if e.key == key {
			return e, true
		}
	}
	return entry{}, false
}

// A yamlReader reads the documents of a file.
type yamlReader struct {
	file    string
	text    string
	lines   []int  // offsets in text
	flows   []int  // lines that begin a document in brackets; see readHeads
	placed  placed // what place looked up last
	found   found  // what rest looked up last
	errs    []*Error
	left    int // bytes that aliases may still stand for
	nodes   slab[node]
	entries slab[entry]
}

// placed is a line and whether it is one of flows.
type placed struct {
	line int
	flow bool
}

// found is a position and its offset in its line.
type found struct {
	position
	offset int
}

// newReader returns the reader of a file, or nil and what keeps the file from being read.
func newReader(file string, data []byte) (*yamlReader, []*Error) {
	if len(data) > maxSize {
		message := fmt.Sprintf("is larger than %d MiB; split it into several files", maxSize>>20)
		return nil, []*Error{{File: file, Line: 1, Column: 1, Message: message}}
	}
	r := &yamlReader{file: file, text: withoutMarks(string(data)), left: maxAlias}
	r.lines = lines(r.text)
	if problem, at := checkSource(r.text); problem != "" {
		r.fail(r.position(at), problem)
		return nil, r.errs
	}
	if at := checkFlow(r.text); at >= 0 {
		message := fmt.Sprintf("bad YAML: more than %d commas, colons and the like in these brackets; "+
			`write each item in a line of its own, after "- "`, maxFlow)
		if closing(r.text[at]) == 0 {
			message = fmt.Sprintf("bad YAML: more than %d anchors, tags and quotes in this line", maxFlow)
		}
		r.fail(r.position(at), message)
		return nil, r.errs
	}
	r.readHeads()
	return r, nil
}

// withoutMarks returns the text without the byte order marks at the beginning of its documents. Files that are put together have
// them there. A mark anywhere else stays.
func withoutMarks(text string) string {
	const mark = "\ufeff"
	text = strings.TrimPrefix(text, mark)
	if !strings.Contains(text, mark) {
		return text
	}
	var b strings.Builder
	offsets := append(lines(text), len(text))
	begins := false // the line before is the first or the last of a document
	for i, at := range offsets[:len(offsets)-1] {
		line := text[at:offsets[i+1]]
		if bare := strings.TrimPrefix(line, mark); begins || startsDocument(bare) {
			line = bare
		}
		b.WriteString(line)
		behind, ended := strings.CutPrefix(line, "...")
		if startsDocument(line) {
			behind, ended = line[len("---"):], true
		}
		behind = strings.TrimSpace(behind)
		begins = ended && (behind == "" || behind[0] == '#')
	}
	return b.String()
}

// all yields the documents that are not empty and not broken, for as long as yield returns true, and notes what is wrong with the
// others.
func (r *yamlReader) all(yield func(doc *node) bool) {
	for first := 0; first < len(r.lines) && len(r.errs) < mostErrors; {
		err := r.documents(first, len(r.lines), func(doc *node, failed bool) bool {
			if !failed && doc.kind != null && !yield(doc) {
				return false
			}
			return len(r.errs) < mostErrors
		})
		if err == nil {
			break
		}
		first = max(first, r.broken(err, first)-1) + 1
		for first < len(r.lines) && !strings.HasPrefix(r.text[r.lines[first]:], "---") {
			first++
		}
	}
}

// documents yields the documents in the lines from first up to end, for as long as yield returns true. It stops at a
// broken one. A document that failed is not broken: it is YAML, but makes no sense.
func (r *yamlReader) documents(first, end int, yield func(doc *node, failed bool) bool) error {
	loader, err := yaml.NewLoader(r.opened(first, end), yaml.WithPlugin(depthLimit{}))
	for err == nil {
		var n yaml.Node
		if err = loader.Load(&n); err != nil {
			break
		}
		c := converter{r: r, base: first}
		if doc := c.node(n.Content[0], 0); !yield(doc, c.failed) {
			return nil
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// depthLimit has the library refuse what is nested deeper than maxDepth.
type depthLimit struct{}

const tooDeep = "is nested more than 64 levels deep" // maxDepth

func (depthLimit) CheckDepth(depth int, _ *yaml.DepthContext) error {
	if depth > maxDepth {
		return errors.New(tooDeep)
	}
	return nil
}

// CheckAlias is not called: documents are read as nodes, in which aliases stay what they are.
func (depthLimit) CheckAlias(_, _ int) error { return nil }

// broken notes the error that keeps the library from reading on, and returns its line.
func (r *yamlReader) broken(err error, first int) int {
	var e *yaml.LoadError
	if !errors.As(err, &e) {
		at := position{first + 1, 1}
		r.fail(at, "bad YAML: "+err.Error())
		return len(r.lines)
	}
	at, opened := r.mark(e.Mark, first), r.mark(e.ContextMark, first)
	at.line = max(at.line, 1) // an error without a position is possible
	rest := r.rest(at)
	if tab := strings.IndexByte(indentation(r.line(at.line)), '\t'); tab >= 0 && e.Message != tooDeep {
		r.fail(position{at.line, tab + 1}, "bad YAML: tab in the indentation; indent with spaces")
		return at.line
	}
	for _, line := range []int{at.line, opened.line} {
		if column, message := oddIndentation(r.line(line)); column > 0 && e.Message != tooDeep {
			r.fail(position{line, column}, message)
			return at.line
		}
	}
	have := "the end of the file"
	if rest != "" {
		c, _ := utf8.DecodeRuneInString(rest)
		have = strconv.Quote(string(c))
		if c == '\n' || c == '\r' {
			have = "the end of the line"
		}
	}
	message := "bad YAML: "
	from := r.quoteInto(at, first)
	switch m := e.Message; {
	case m == tooDeep:
		message = tooDeep
	case from != (position{}):
		message += fmt.Sprintf("the text that begins with this quote ends in line %d, and more follows; is the quote that closes it missing?", at.line)
		at = from
	case strings.HasPrefix(m, "did not find expected ',' or "):
		bracket := strings.Trim(strings.TrimPrefix(m, "did not find expected ',' or "), "'")
		if rest == "" || r.unclosed(opened, at.line) {
			at, message = opened, message+notClosed(bracket)
			break
		}
		message += fmt.Sprintf(`want "," or %q, have %s`, bracket, have)
		if rest[0] == ':' {
			message += "; is a comma missing?"
		} else if opened.line != at.line {
			message += fmt.Sprintf("; the bracket to close is in line %d", opened.line)
		}
	case strings.HasPrefix(m, "mapping values are not allowed"):
		message += "a colon is not allowed here; quote the text if it is part of one, otherwise look at the indentation"
	case m == "found character that cannot start any token" && strings.HasPrefix(rest, "\t"):
		message += "tab before a value or a key; use spaces"
	case m == "found character that cannot start any token":
		message += fmt.Sprintf("text cannot begin with %s; quote it", have)
	case strings.HasPrefix(m, "could not find expected ':'"):
		at, message = opened, message+"a line that is no \"key: value\"; is a colon or a space behind it missing?"
	case m == "did not find expected key":
		message += fmt.Sprintf("want a key, have %s; look at the quotes and the indentation", have)
	case m == "did not find expected '-' indicator":
		message += fmt.Sprintf(`want "- " as in the items before, have %s; look at the indentation`, have)
	case m == "block sequence entries are not allowed in this context":
		message += `a list that begins with "- " needs a line of its own`
	case m == "did not find expected node content":
		if rest == "" || at.column == 1 && startsDocument(rest) {
			if bracket, open := r.openBracket(at, first); open != (position{}) {
				at, message = open, message+notClosed(bracket)
				break
			}
		}
		message += "want a value, have " + have
	case strings.HasPrefix(m, "found unexpected ") && e.ContextMsg == "while scanning a quoted scalar": // the end of the file or the document
		at, message = opened, message+"the quote that closes this text is missing"
	case m == "found unknown escape character":
		message += `unknown escape in double quotes; write \\ for a backslash, or use single quotes`
	case m == "found invalid Unicode character escape code":
		at.column = max(at.column-len(`\u`), 1)
		message += "this escape is no character of YAML"
		if pair, ok := surrogates(r.rest(at)); ok {
			message = fmt.Sprintf(`JSON's escapes of two surrogates are not supported; write the character itself, or \U%08X`, pair)
		}
	case strings.HasPrefix(m, "unknown anchor '"):
		message = "unknown alias " + quote(strings.TrimSuffix(strings.TrimPrefix(m, "unknown anchor '"), "' referenced"))
	case m == "did not find expected <document end> before directive":
		message += `text cannot begin with "%"; quote it`
	case m == "did not find expected <document start>":
		message += "want the end of the document, have " + have
	default:
		message += m
		if e.ContextMsg != "" {
			message += " " + e.ContextMsg
		}
	}
	r.fail(at, message)
	return max(r.mark(e.Mark, first).line, at.line)
}

// notClosed is what is wrong with a bracket that this one would close.
func notClosed(closes string) string {
	opens := "["
	if closes == "}" {
		opens = "{"
	}
	return fmt.Sprintf("%q is not closed; %q is missing", opens, closes)
}

// closing returns the bracket that closes another one, and 0 for what opens none.
func closing(bracket byte) byte {
	switch bracket {
	case '[':
		return ']'
	case '{':
		return '}'
	default:
		return 0
	}
}

// marks yields where brackets and texts in quotes begin and end, and the "---" of documents, from an offset up to another. Those in
// plain text and in comments are none. It reads block scalars as if they were YAML.
func marks(text string, from, to int) iter.Seq2[int, int] {
	return func(yield func(begin, end int) bool) {
		depth := 0    // of brackets
		token := true // what comes next may begin a token
		for i := from; i < to; i++ {
			begin := i
			switch c := text[i]; c {
			case '\n', '\r':
				token = true
				continue
			case ' ', '\t':
				token = token || i > 0 && strings.IndexByte(":-?,", text[i-1]) >= 0
				continue
			case '#':
				if i == 0 || strings.IndexByte(" \t\n\r", text[i-1]) >= 0 {
					for i+1 < to && text[i+1] != '\n' && text[i+1] != '\r' {
						i++
					}
				}
				continue
			case '-':
				if (i == 0 || text[i-1] == '\n' || text[i-1] == '\r') && startsDocument(text[i:]) {
					depth, token = 0, true
					i += len("--")
					break
				}
				continue
			case '"', '\'':
				if !token {
					continue
				}
				for i++; i < to && text[i] != c; i++ {
					if c == '"' && text[i] == '\\' {
						i++
					}
				}
				if i >= to {
					return
				}
				token = false
			case '[', '{':
				if !token && depth == 0 {
					continue
				}
				depth++
				token = true
			case ']', '}':
				if depth == 0 {
					token = false
					continue
				}
				depth--
				token = false
			default:
				token = depth > 0 && (c == ',' || c == ':')
				continue
			}
			if !yield(begin, i+1) {
				return
			}
		}
	}
}

// offset returns the offset of a position in the file.
func (r *yamlReader) offset(at position) int {
	_ = r.rest(at) // finds the offset in the line
	return r.lines[at.line-1] + r.found.offset
}

// quoteInto returns where a text in quotes begins that goes on into the line of a position, and ends before it. A quote that
// closes it in an earlier line may be missing: then the text ends at the next quote, which would open another one. Only
// plain text may stand between its end and the position. The document begins in the line after first, or later. Without such a
// text, it returns no position.
func (r *yamlReader) quoteInto(at position, first int) position {
	to := r.offset(at)
	line := r.text[r.lines[at.line-1]:to]
	if !strings.ContainsAny(line, `"'`) {
		return position{}
	}
	begin, end := -1, -1
	for from, until := range marks(r.text, r.lines[first], to) {
		begin, end = from, until
	}
	if begin < 0 || r.text[begin] != '"' && r.text[begin] != '\'' || begin >= r.lines[at.line-1] || strings.ContainsAny(r.text[end:to], ",[]{}") {
		return position{}
	}
	return r.position(begin)
}

// openBracket returns the bracket that would close the innermost one that is open at the end of a document, and where that is. The
// document begins in the line after first, or later. If none is open, it returns no position.
func (r *yamlReader) openBracket(end position, first int) (closes string, at position) {
	var open []int
	for begin := range marks(r.text, r.lines[first], r.offset(end)) {
		switch c := r.text[begin]; {
		case c == '-':
			open = open[:0]
		case closing(c) != 0:
			open = append(open, begin)
		case len(open) > 0 && (c == ']' || c == '}'):
			open = open[:len(open)-1]
		}
	}
	if len(open) == 0 {
		return "", position{}
	}
	last := open[len(open)-1]
	return string(closing(r.text[last])), r.position(last)
}

// unclosed reports whether the bracket at a position is not closed. Otherwise something is wrong within the brackets, in the line
// where the library gave up. A bracket is not closed if no other closes it. It is not closed either if that line is indented no
// further than what the bracket is the value of: then the bracket that would close it belongs to something else.
func (r *yamlReader) unclosed(at position, line int) bool {
	if line <= at.line {
		return false
	}
	begins := r.offset(at)
	if !r.closes(begins) {
		return true
	}
	if r.inBrackets(at.line) { // indentation means nothing
		return false
	}
	before, indent := r.text[r.lines[at.line-1]:begins], len(indentation(r.line(line)))
	switch key := strings.TrimLeft(before, " -?"); {
	case key != "":
		return indent <= len(before)-len(key)
	case strings.ContainsAny(before, "-?"):
		return indent <= strings.LastIndexAny(before, "-?")
	default:
		return indent < len(before)
	}
}

// closes reports whether the bracket at an offset is closed, and all in it.
func (r *yamlReader) closes(offset int) bool {
	var open []byte // what closes those that are open
	for begin := range marks(r.text, offset, len(r.text)) {
		switch c := r.text[begin]; {
		case closing(c) != 0:
			open = append(open, closing(c))
		case c == '-', (c == ']' || c == '}') && c != open[len(open)-1]:
			return false
		case c == ']', c == '}':
			if open = open[:len(open)-1]; len(open) == 0 {
				return true
			}
		}
	}
	return false
}

// inBrackets reports whether the document of a line is a list or mapping in brackets.
func (r *yamlReader) inBrackets(line int) bool {
	next, _ := slices.BinarySearch(r.flows, line+1)
	if next == 0 {
		return false
	}
	for i := r.flows[next-1]; i < line; i++ {
		if startsDocument(r.text[r.lines[i]:]) {
			return false
		}
	}
	return true
}

// surrogates returns the character that text begins with as JSON escapes it: by two halves in UTF-16.
func surrogates(text string) (rune, bool) {
	const half = len(`\ud83d`)
	if len(text) < 2*half || !strings.HasPrefix(text, `\u`) || !strings.HasPrefix(text[half:], `\u`) {
		return 0, false
	}
	high, err := strconv.ParseUint(text[2:half], 16, 16)
	low, err2 := strconv.ParseUint(text[half+2:2*half], 16, 16)
	pair := utf16.DecodeRune(rune(high), rune(low))
	return pair, err == nil && err2 == nil && pair != utf8.RuneError
}

func indentation(line string) string { return line[:len(line)-len(strings.TrimLeft(line, " \t"))] }

// position is a line and a column, both from 1.
type position struct{ line, column int }

// fail notes what is wrong at a position.
func (r *yamlReader) fail(at position, message string) {
	if len(r.errs) >= mostErrors {
		return
	}
	r.errs = append(r.errs, &Error{File: r.file, Line: max(at.line, 1), Column: max(at.column, 1), Message: clip(printable(clip(message, 200)), 250)})
}

// lines returns the offsets at which lines begin.
func lines(text string) []int {
	offsets := make([]int, 1, 2+strings.Count(text, "\n"))
	for i := 0; i < len(text); i++ {
		if text[i] == '\n' || text[i] == '\r' && !strings.HasPrefix(text[i+1:], "\n") {
			offsets = append(offsets, i+1)
		}
	}
	return offsets
}

// position returns where an offset is.
func (r *yamlReader) position(offset int) position {
	line, begins := slices.BinarySearch(r.lines, offset)
	if begins {
		line++
	}
	return position{line, utf8.RuneCountInString(r.text[r.lines[line-1]:offset]) + 1}
}

// mark returns where the library says that something is.
func (r *yamlReader) mark(m yaml.Mark, first int) position {
	return r.place(m.Line, m.Column, first)
}

// place returns where in the file a line and a column of what opened has returned are.
func (r *yamlReader) place(line, column, first int) position {
	at := position{line + first, column}
	if at.line > len(r.lines) { // the library ends the last line
		at.line = len(r.lines)
		at.column = utf8.RuneCountInString(r.line(at.line)) + 1
		return at
	}
	if at.line != r.placed.line { // most calls are about the line of the call before
		_, flow := slices.BinarySearch(r.flows, at.line)
		r.placed = placed{at.line, flow}
	}
	if r.placed.flow {
		at.column = max(at.column-len(openingFlow), 1)
	}
	return at
}

// line returns a line, with its end.
func (r *yamlReader) line(n int) string {
	if n < 1 || n > len(r.lines) {
		return ""
	}
	if n == len(r.lines) {
		return r.text[r.lines[n-1]:]
	}
	return r.text[r.lines[n-1]:r.lines[n]]
}

// rest returns what stands in a line from a position on; nothing at the end of the file.
func (r *yamlReader) rest(at position) string {
	line := r.line(at.line)
	from := r.found // most calls are about a position behind that of the call before
	if from.line != at.line || from.column > at.column {
		from = found{position: position{at.line, 1}}
	}
	for ; from.column < at.column; from.column++ {
		_, size := utf8.DecodeRuneInString(line[from.offset:])
		from.offset += size
	}
	r.found = from
	line = line[from.offset:]
	if line == "" && at.line < len(r.lines) {
		return "\n"
	}
	return line
}

// checkSource returns what keeps text from being read, and at which offset.
func checkSource(source string) (problem string, at int) {
	switch {
	case strings.HasPrefix(source, "\xff\xfe"), strings.HasPrefix(source, "\xfe\xff"):
		return "is UTF-16; save it as UTF-8", 0
	case !utf8.ValidString(source):
		return "is not UTF-8", validUTF8(source)
	}
	for i, r := range source {
		switch {
		case ' ' <= r && r <= '~', r == '\n', r == '\r', r == '\t':
			continue
		case r == 0:
			return "holds a zero byte; is it text, saved as UTF-8?", i
		case r == 0x85, r == 0x2028, r == 0x2029:
			// YAML 1.1 takes these for line ends, YAML 1.2 for text, and editors show either.
			return fmt.Sprintf(`holds U+%04X, which may be a line end or text; write it as \u%04x in double quotes`, r, r), i
		case r == '\ufeff':
			return `holds a byte order mark that is not at its beginning; remove it, or write it as \ufeff in double quotes`, i
		case r < 0xa0, r == 0xfffe, r == 0xffff:
			return fmt.Sprintf(`holds the control character U+%04X; write it as \u%04x in double quotes`, r, r), i
		}
	}
	return "", 0
}

// oddIndentation returns the column of a blank that is no space, or of an invisible character, in the indentation of a line, or behind the
// dashes of items. It returns 0 if there is none. YAML takes such a character for text.
func oddIndentation(line string) (column int, message string) {
	rest := strings.TrimLeft(line, dashes)
	r, _ := utf8.DecodeRuneInString(rest)
	if !unicode.In(r, unicode.Zs, unicode.Cf) {
		return 0, ""
	}
	return len(line) - len(rest) + 1, fmt.Sprintf("bad YAML: U+%04X in the indentation, which is no space; indent with spaces", r)
}

// dashes are what the indentation of a line consists of, with those of items.
const dashes = " \t-"

// validUTF8 returns how many bytes there are before the first that is no UTF-8.
func validUTF8(source string) int {
	for i, r := range source {
		if r == utf8.RuneError && !strings.HasPrefix(source[i:], "\uFFFD") {
			return i
		}
	}
	return len(source)
}

// openingFlow is what opened adds.
const openingFlow = "--- "

// readHeads reads how documents begin. It notes the lines at which they begin if they are a list or mapping in brackets, as
// JSON is. It refuses directives and turns them into comments: the library takes quadratic time in them.
func (r *yamlReader) readHeads() {
	start := true    // the document has not begun
	refused := false // its directives
	var text []byte  // without directives; nil if there are none
	for i, begins := range r.lines {
		if rest := r.text[begins:]; strings.HasPrefix(rest, "---") || strings.HasPrefix(rest, "...") {
			behind := strings.TrimSpace(r.line(i + 1)[3:])
			start, refused = behind == "" || behind[0] == '#', false
			continue
		}
		if !start {
			continue
		}
		if strings.HasPrefix(r.text[begins:], "%") {
			if !refused {
				r.fail(position{i + 1, 1}, "YAML directives are not supported")
			}
			if text == nil {
				text = []byte(r.text)
			}
			text[begins], refused = '#', true
			continue
		}
		line := strings.TrimSpace(r.line(i + 1))
		if line == "" || line[0] == '#' {
			continue
		}
		start = false
		if line[0] == '{' || line[0] == '[' {
			r.flows = append(r.flows, i+1)
		}
	}
	if text != nil {
		r.text = string(text)
	}
}

// opened returns the lines from first up to end, counted from 0, with "--- " before those of flows. Without it, such a
// document could turn out to be a key, so the library keeps all tokens of it until it ends: 16 MiB of JSON took 27 s
// and 3.4 GB, and take 1.2 s and 0.5 GB now.
func (r *yamlReader) opened(first, end int) *openedText {
	o := &openedText{r: r, from: r.lines[first], to: len(r.text)}
	if end < len(r.lines) {
		o.to = r.lines[end]
	}
	o.next, _ = slices.BinarySearch(r.flows, first+1)
	return o
}

// An openedText reads what opened returns. It copies nothing in advance: after each broken document another one begins.
type openedText struct {
	r        *yamlReader
	from, to int    // offsets of what is still to be read
	next     int    // index in flows of the next that may be in it
	piece    string // being read, before from
}

// Read implements [io.Reader].
func (o *openedText) Read(p []byte) (int, error) {
	for o.piece == "" {
		until := o.to
		if o.next < len(o.r.flows) {
			until = min(until, o.r.lines[o.r.flows[o.next]-1])
		}
		switch {
		case o.from == o.to:
			return 0, io.EOF
		case o.from == until:
			o.piece = openingFlow
			o.next++
		default:
			o.piece, o.from = o.r.text[o.from:until], until
		}
	}
	n := copy(p, o.piece)
	o.piece = o.piece[n:]
	return n, nil
}

// checkFlow returns the offset of a list or mapping in brackets that has more than maxFlow indicators and stands where
// a key may stand, or -1. The library keeps all tokens of one until it ends, at least 150 bytes for each, and takes
// quadratic time in them. What begins a line may be a key, too, so checkFlow also returns the offset of an anchor, an alias, a tag or
// a quote that has more than maxFlow others before it in its line. It reads block scalars as if they were YAML, which matters only if one has a line that begins
// with a bracket that the next 300,000 indicators do not close.
func checkFlow(source string) (offset int) {
	if len(source) <= maxFlow {
		return -1
	}
	depth := 0       // of brackets that are open
	var key struct { // the outermost of them that may be a key, and all in it with it
		depth, offset, indicators int // depth is 0 if there is none
	}
	indicators, inLine := 0, 0 // inLine counts those outside of brackets, in a line
	token, value := true, true // what comes next may begin a token, and cannot be a key
	begun := false             // a document has begun; readHeads sees to one that is in brackets
	for i := 0; i < len(source); i++ {
		c := source[i]
		switch c {
		case '\n', '\r':
			token, inLine = true, 0
			if strings.HasPrefix(source[i+1:], "---") {
				depth, key.depth, begun = 0, 0, false
				i += 3
			}
			if depth == 0 {
				value = !begun
			}
			continue
		case ' ', '\t':
			if i > 0 && strings.IndexByte(":-?", source[i-1]) >= 0 {
				token = true
			}
			continue
		case '#':
			if i > 0 && strings.IndexByte(" \t\n\r", source[i-1]) >= 0 {
				for i+1 < len(source) && source[i+1] != '\n' && source[i+1] != '\r' {
					i++
				}
				continue
			}
		case '"', '\'':
			if token {
				for i++; i < len(source) && source[i] != c; i++ {
					if c == '"' && source[i] == '\\' {
						i++
					}
				}
			}
		case '[', '{':
			if token || depth > 0 {
				depth++
				if !value && key.depth == 0 {
					key.depth, key.offset, key.indicators = depth, i, indicators
				}
				token, value, begun = true, false, true
				continue
			}
		case ']', '}':
			if depth > 0 && depth == key.depth {
				key.depth = 0
			}
			depth = max(depth-1, 0)
		}
		begun = true
		if depth > 0 {
			switch c {
			case ',', ':', '-', '?', '&', '*', '!', '"', '\'':
				indicators++
				if key.depth > 0 && indicators-key.indicators > maxFlow {
					return key.offset
				}
			}
		}
		if depth == 0 && i > 0 && source[i-1] == ' ' && strings.IndexByte("&*!\"'", c) >= 0 {
			if inLine++; inLine > maxFlow {
				return i
			}
		}
		value = c == ':'
		token = depth > 0 && (c == ',' || c == ':') || depth == 0 && token && (c == '-' || c == '?' || c == ':')
	}
	return -1
}

// A converter turns the library's nodes of a document into ours.
type converter struct {
	r       *yamlReader
	base    int // lines before what the library has read
	failed  bool
	anchors map[*yaml.Node]*node
	indent  int // least spaces before the lines of a value, in the innermost block mapping
}

func (c *converter) node(in *yaml.Node, depth int) *node {
	at := c.r.place(in.Line, in.Column, c.base)
	n := &c.r.nodes.take(1)[0]
	*n = node{line: at.line, column: at.column, size: 32 + len(in.Value), height: 1}
	c.untagged(in, at)
	switch in.Kind {
	case yaml.AliasNode:
		return c.alias(in, at, depth)
	case yaml.SequenceNode:
		n.kind = sequence
		n.items = make([]*node, len(in.Content))
		for i, value := range in.Content {
			n.items[i] = c.node(value, depth+1)
			if in.Style&yaml.FlowStyle != 0 && value.Kind == yaml.ScalarNode && value.Style&^yaml.TaggedStyle == 0 { // an alias is another's node
				n.items[i].bare = true
			}
			n.hold(n.items[i])
		}
	case yaml.MappingNode:
		c.mapping(n, in, depth)
	default:
		c.scalar(n, in)
	}
	if in.Anchor != "" {
		if c.anchors == nil {
			c.anchors = map[*yaml.Node]*node{}
		}
		c.anchors[in] = n
	}
	return n
}

func (c *converter) untagged(in *yaml.Node, at position) {
	if in.Style&yaml.TaggedStyle != 0 || in.Tag == "!" {
		c.failf(at, "YAML tags are not supported")
	}
}

// key returns the kind of a mapping's key, and its text. Most keys need no node: only one that an alias may stand for
// does.
func (c *converter) key(in *yaml.Node, at position, depth int) (kind, string) {
	if in.Kind != yaml.ScalarNode || in.Anchor != "" {
		n := c.node(in, depth)
		return n.kind, n.text
	}
	n := node{line: at.line, column: at.column}
	c.untagged(in, at)
	c.scalar(&n, in)
	return n.kind, n.text
}

// hold notes a part of a node.
func (n *node) hold(part *node) {
	n.size += part.size
	n.height = max(n.height, part.height+1)
}

// alias returns what an alias stands for, unless that is too much: a few lines of aliases of aliases can stand for more
// than memory or patience holds.
func (c *converter) alias(in *yaml.Node, at position, depth int) *node {
	none := &node{kind: null, line: at.line, column: at.column, size: 32, height: 1}
	target, ok := c.anchors[in.Alias]
	switch {
	case !ok:
		c.failf(at, "alias %s stands within what it stands for", quote(in.Value))
		return none
	case depth+int(target.height) > maxDepth:
		c.failf(at, tooDeep)
		return none
	case c.r.left >= 0 && c.r.left < target.size:
		c.failf(at, "aliases stand for more than %d MiB", maxAlias>>20)
	}
	if c.r.left -= target.size; c.r.left < 0 {
		return none
	}
	return target
}

// The numbers of YAML. An exponent needs a sign and a point in YAML 1.1, but JSON has numbers such as 1e3.
var (
	decimal     = regexp.MustCompile(`^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$`)
	hexadecimal = regexp.MustCompile(`^0x[0-9a-fA-F]+$`)
	octal       = regexp.MustCompile(`^[-+]?0[0-9]+$`)

	// disputed is what one of YAML 1.1 and 1.2 takes for a number, and the other for text.
	disputed = regexp.MustCompile(`^[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|` +
		`(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?)$`)
)

// scalar reads unquoted text as YAML 1.2 does. A number that YAML 1.1 takes for another one, or for text, is an error,
// and so is text that YAML 1.1 takes for a number in digits. The library's own tags are those of YAML 1.1 in part: 010
// is 8, and 1e999 is text. Errors do not show the text, which may be a value of a label.
func (c *converter) scalar(n *node, in *yaml.Node) {
	n.kind, n.text = text, in.Value
	if in.Style&^yaml.TaggedStyle != 0 {
		n.block = in.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0
		switch {
		case !strings.ContainsAny(in.Value, " \n"):
		case n.block:
			n.goesOn = c.secondLine(n, in)
		default:
			n.goesOn = c.foldedQuotes(c.begins(n, in))
		}
		return
	}
	switch in.Value {
	case "", "~", "null", "Null", "NULL":
		n.kind = null
	case "true", "True", "TRUE":
		n.kind, n.number = boolean, 1
	case "false", "False", "FALSE":
		n.kind = boolean
	case ".nan", ".NaN", ".NAN":
		n.kind, n.number = number, math.NaN()
	case ".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF":
		n.kind, n.number = number, math.Inf(1)
	case "-.inf", "-.Inf", "-.INF":
		n.kind, n.number = number, math.Inf(-1)
	default:
		if strings.IndexByte("+-.0123456789", in.Value[0]) < 0 {
			break
		}
		at := position{n.line, n.column}
		switch {
		case isInteger(in.Value): // most numbers are, and expressions take longer
			n.kind = number
			n.number, _ = strconv.ParseFloat(in.Value, 64)
		case octal.MatchString(in.Value) && strings.Trim(in.Value, "+-0") != "":
			c.failf(at, "is octal to some readers of YAML and decimal to others; write it without the leading zero, or quote it")
			n.kind, n.number = number, 1
		case decimal.MatchString(in.Value):
			n.kind = number
			n.number, _ = strconv.ParseFloat(in.Value, 64) // infinite, or 0, if it is out of range
		case hexadecimal.MatchString(in.Value):
			n.kind = number
			n.number, _ = strconv.ParseFloat(in.Value+"p0", 64)
		case disputed.MatchString(in.Value):
			c.failf(at, "is a number to some readers of YAML and text to others; write it in decimal digits without _, or quote it")
		}
	}
	c.oddlyIndented(n)
	c.severalLines(n, in)
}

// oddlyIndented refuses unquoted text that begins with what looks like indentation and is none. Quotes and blocks may hold it.
func (c *converter) oddlyIndented(n *node) {
	column, message := oddIndentation(n.text) // mostly 0, and found without a look at the line, which may be long
	if n.kind != text || column == 0 {
		return
	}
	line, rest := c.r.line(n.line), c.r.rest(position{n.line, n.column})
	if !strings.HasPrefix(rest, n.text[:column]) || strings.Trim(line[:len(line)-len(rest)], dashes) != "" { // behind an anchor, or within the line
		return
	}
	c.failf(position{n.line, n.column + column - 1}, "%s", message)
}

// begins returns the line in which a scalar's text begins, behind its anchor if it has one, and what stands there.
func (c *converter) begins(n *node, in *yaml.Node) (line int, rest string) {
	line, rest = n.line, c.r.rest(position{n.line, n.column})
	if in.Anchor == "" {
		return line, rest
	}
	rest = strings.TrimLeft(strings.TrimPrefix(rest, "&"+in.Anchor), " \t\r\n")
	for ; (rest == "" || rest[0] == '#') && line < len(c.r.lines); line++ {
		rest = strings.TrimLeft(c.r.line(line+1), " \t\r\n")
	}
	return line, rest
}

// foldedQuotes returns the line in which a text in quotes goes on behind a line break that is part of it; 0 if there is none. The
// text begins in the line with rest.
func (c *converter) foldedQuotes(line int, rest string) int32 {
	if rest == "" {
		return 0
	}
	quote := rest[0]
	for rest = rest[1:]; ; rest = c.r.line(line) {
		escaped := false // the line break is
		for i := 0; i < len(rest); i++ {
			switch {
			case rest[i] == '\\' && quote == '"':
				i++
				escaped = i < len(rest) && (rest[i] == '\n' || rest[i] == '\r')
			case rest[i] != quote:
			case quote == '\'' && strings.HasPrefix(rest[i+1:], "'"):
				i++
			default:
				return 0
			}
		}
		if line++; line > len(c.r.lines) {
			return 0
		}
		if !escaped {
			return c.filled(line)
		}
	}
}

// secondLine returns the second line of a block that is not empty; 0 if there is none.
func (c *converter) secondLine(n *node, in *yaml.Node) int32 {
	header, _ := c.begins(n, in)
	first := c.filled(header + 1)
	if strings.TrimSpace(c.r.line(int(first))) == strings.TrimSpace(in.Value) {
		return 0
	}
	return c.filled(int(first) + 1)
}

// filled returns the first line, from a line on, that is not empty.
func (c *converter) filled(line int) int32 {
	for line < len(c.r.lines) && strings.TrimSpace(c.r.line(line)) == "" {
		line++
	}
	return int32(line) //nolint:gosec // files are smaller
}

// isInteger reports whether s consists of digits, without a leading 0.
func isInteger(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != "" && (s[0] != '0' || len(s) == 1)
}

// severalLines refuses unquoted text of several lines that is hardly meant as such: a line that begins with "- " is an
// item of a list, indented too far, and one that is indented less than what it is part of has been broken by accident.
func (c *converter) severalLines(n *node, in *yaml.Node) {
	value := in.Value
	if n.kind != text || !strings.Contains(value, " ") && !strings.Contains(value, "\n") {
		return
	}
	first, rest := c.begins(n, in)
	if strings.HasPrefix(rest, value) {
		return
	}
	n.goesOn = c.filled(first + 1)
	// Each line is part of the value, without the space around it.
	for line, read := first+1, len(strings.TrimSpace(rest)); read < len(value) && line <= len(c.r.lines); line++ {
		have := c.r.line(line)
		if column, message := oddIndentation(have); column > 0 {
			c.failf(position{line, column}, "%s", message)
			return
		}
		indent := len(indentation(have))
		have = strings.TrimSpace(have)
		read += len(have) + 1
		switch {
		case have == "":
		case strings.HasPrefix(have, "- "):
			c.failf(position{line, indent + 1}, `"- " continues the text of line %d; is it indented too far? If not, quote the text`, first)
			return
		case indent < c.indent:
			c.failf(position{line, indent + 1}, "continues the text of line %d and is indented less; put the text in one line, or quote it", first)
			return
		}
	}
}

func (c *converter) mapping(n *node, in *yaml.Node, depth int) {
	n.kind = mapping
	n.entries = c.r.entries.take(len(in.Content) / 2)[:0]
	if in.Style&yaml.FlowStyle == 0 && len(in.Content) > 0 {
		at := c.r.place(in.Content[0].Line, in.Content[0].Column, c.base)
		n.line, n.column = at.line, at.column // not where an anchor is
		defer func(indent int) { c.indent = indent }(c.indent)
		c.indent = at.column
	}
	var merged []*node
	var merges position // of the first key that merges
	for i := 0; i+1 < len(in.Content); i += 2 {
		name := in.Content[i]
		at := c.r.place(name.Line, name.Column, c.base)
		kind, key := c.key(name, at, depth+1)
		value := c.node(in.Content[i+1], depth+1)
		n.hold(value)
		switch {
		case name.Kind == yaml.AliasNode:
			c.failf(at, "want a plain key, have an alias")
			continue
		case kind != text:
			hint := ""
			if name.Kind == yaml.ScalarNode && name.Value != "" {
				hint = "; quote it"
			}
			c.failf(at, "want a string for a key, have %s%s", kind, hint)
			continue
		case name.Value == "<<" && name.Style == 0:
			if merges != (position{}) {
				c.duplicate(at, merges)
				continue
			}
			merges = at
			if value.kind == sequence {
				merged = append(merged, value.items...)
			} else {
				merged = append(merged, value)
			}
			continue
		}
		if first, ok := n.find(key); ok {
			c.duplicate(at, position{first.line, first.column})
			continue
		}
		n.add(entry{key: key, line: at.line, column: at.column, value: value})
	}
	// The mapping's own keys win over merged ones, and earlier merged mappings over later ones.
	for _, from := range merged {
		if from.kind != mapping {
			c.failf(position{from.line, from.column}, "want a mapping to merge, have %s", from.kind)
			continue
		}
		if c.r.left -= len(from.entries); c.r.left < 0 {
			continue // alias has reported it
		}
		for _, e := range from.entries {
			if _, ok := n.find(e.key); !ok {
				n.add(e)
			}
		}
	}
}

// duplicate reports a key that a mapping has already. The rest of the document still makes sense, so this does not fail it. The error
// does not show the key, which may be a value of a label, such as the name of a customer.
func (c *converter) duplicate(at, first position) {
	if len(c.r.errs) >= mostErrors {
		return
	}
	c.r.fail(at, fmt.Sprintf("duplicate key, first at line %d, column %d", first.line, first.column))
}

// add appends an entry.
func (n *node) add(e entry) {
	const few = 16 // up to so many, a search is as fast as the index
	n.entries = append(n.entries, e)
	switch {
	case n.index != nil:
		n.index[e.key] = len(n.entries) - 1
	case len(n.entries) > few:
		n.index = make(map[string]int, 2*few)
		for i, e := range n.entries {
			n.index[e.key] = i
		}
	}
}

func (c *converter) failf(at position, format string, args ...any) {
	c.failed = true
	if len(c.r.errs) >= mostErrors {
		return
	}
	c.r.fail(at, fmt.Sprintf(format, args...))
}
