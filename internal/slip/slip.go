// Package slip finds likely mistakes in the names and label values of policies.
package slip

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// In tells what looks like a mistake in a name or a value, as in "it begins or ends with white space". It returns "" if
// nothing does. It repeats at most a mark of the text, because values may be secrets.
func In(text string) string {
	if why := InRegex(text); why != "" {
		return why
	}
	if strings.Contains(text, "${") || strings.Contains(text, "{{") {
		return "it looks like part of a template"
	}
	if !closes(text) || !quotes(text) {
		return "it holds a quote or a bracket by accident, as it seems"
	}
	for _, mark := range []string{" //", " #", " /*"} {
		if strings.Contains(text, mark) {
			return fmt.Sprintf("it holds %q, which begins no comment there", mark[1:])
		}
	}
	return punctuation(text)
}

// InRegex is In for a regular expression, which may hold any mark. A block of text ends with a line end, which then is part of the last
// alternative. In double quotes, "\b" is no edge of a word.
func InRegex(text string) string {
	if strings.TrimSpace(text) != text {
		return "it begins or ends with white space"
	}
	for _, r := range text {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.IsSpace(r) && r != ' ' {
			return fmt.Sprintf("it holds %U, which cannot be seen", r)
		}
	}
	return ""
}

// InName is In for the name of a control point or of a label: why programs hardly give such a name. Files get it by accident, and
// then a limit is missing although the file is well formed: an extra bracket at the end of a line is text, a block of text ends
// with a line end, text copied from a page has spaces that do not look odd, quotes in quotes and a "#" or a "-" without a space are
// text, and a wrong separator makes one name of two.
//
// An ordinary name begins with a letter, a digit, or what begins paths, hosts, addresses and methods of Go: one of /_*.:@~({[. Some names
// that gateways give routes begin with "$". It may hold what the names of functions, calls, routes and hosts do, and single words.
func InName(name string) string {
	if why := In(name); why != "" {
		return why
	}
	if name == "" {
		return ""
	}
	first, size := utf8.DecodeRuneInString(name)
	if first < utf8.RuneSelf && !letterOrDigit(first) && !strings.ContainsRune("/_*.:@~$({[", first) {
		return fmt.Sprintf("it begins with %q", name[:size])
	}
	if wrapped(name) {
		return "it is in brackets"
	}
	path := strings.Contains(name, "/") // may hold a comma
	for i := range len(name) {
		switch c := name[i]; c {
		case ';', '|':
		case ',':
			if path && i+1 < len(name) && strings.IndexByte(" /", name[i+1]) < 0 {
				continue
			}
		case ':':
			if i+1 == len(name) || name[i+1] != ' ' {
				continue
			}
			return `it holds ": ", which separates no key from a value there`
		default:
			continue
		}
		return fmt.Sprintf("it holds %q, which separates no names there", name[i:i+1])
	}
	if last := name[len(name)-1]; strings.IndexByte(".?$", last) >= 0 { // a value may end so: full names of hosts do
		return fmt.Sprintf("it ends with %q", string(last))
	}
	return pattern(name)
}

// pattern tells what looks like a pattern, a variable or a setting in a name. Names are compared as they are. What routes have for a
// segment is no pattern here: a "*" before a word, a "*." that begins the name of a host, and a "/*" that ends a path, as in the routes of
// chi and echo. A path with a dot is an exception, because it mostly has the name of a gRPC service. Neither the "*" of a Go method nor
// a query's "=" is a pattern.
func pattern(name string) string {
	for i := range len(name) {
		rest := name[i+1:]
		next, _ := utf8.DecodeRuneInString(rest)
		switch name[i] {
		case '*':
			host := i == 0 && len(rest) > 1 && rest[0] == '.' && letterOrDigit(rune(rest[1]))
			route := rest == "" && name[0] == '/' && name[i-1] == '/' && !strings.Contains(name, ".")
			if !host && !route && (rest == "" || !letterOrDigit(next) && next != '_') {
				return `it holds "*", which stands for no other names there`
			}
		case '=':
			if !strings.Contains(name[:i], "?") {
				return `it holds "=", which separates no key from a value there`
			}
		case '$':
			if i == 0 && rest != "default" && rest != "connect" && rest != "disconnect" { // which gateways name routes
				return `it begins with "$", and no variable is replaced there`
			}
		}
	}
	return ""
}

func letterOrDigit(r rune) bool { return unicode.IsLetter(r) || unicode.IsDigit(r) }

// wrapped reports whether a text, whose brackets all have counterparts, begins with a bracket that its end closes.
func wrapped(text string) bool {
	depth := 0
	for i := range len(text) {
		switch text[i] {
		case '(', '[', '{':
			depth++
		case ')', ']', '}':
			depth--
		}
		if depth == 0 {
			return i > 0 && i == len(text)-1
		}
	}
	return false
}

// Distance counts the bytes to insert, delete or replace, and the neighbors to swap, to turn a into b.
func Distance(a, b string) int {
	before, row, next := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next[0] = i + 1
		for j := range len(b) {
			replace := row[j]
			if a[i] != b[j] {
				replace++
			}
			next[j+1] = min(replace, next[j]+1, row[j+1]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				next[j+1] = min(next[j+1], before[j-1]+1)
			}
		}
		before, row, next = row, next, before
	}
	return row[len(b)]
}

// punctuation tells what separates items of lists, or ends lines, at the beginning or the end of a text.
func punctuation(text string) string {
	if text == "" {
		return ""
	}
	if strings.IndexByte(",;", text[0]) >= 0 {
		return fmt.Sprintf("it begins with %q", text[:1])
	}
	if last := text[len(text)-1]; strings.IndexByte(`,;:|\`, last) >= 0 {
		return fmt.Sprintf("it ends with %q", string(last))
	}
	return ""
}

// closes reports whether each bracket in a text has a counterpart.
func closes(text string) bool {
	const open, closing = "([{", ")]}"
	var want []byte
	for i := range len(text) {
		if at := strings.IndexByte(open, text[i]); at >= 0 {
			want = append(want, closing[at])
		} else if strings.IndexByte(closing, text[i]) >= 0 {
			if len(want) == 0 || want[len(want)-1] != text[i] {
				return false
			}
			want = want[:len(want)-1]
		}
	}
	return len(want) == 0
}

// quotes reports whether the quotes in a text are in pairs, and of programs. An apostrophe within a word is no quote.
func quotes(text string) bool {
	var double, single, back int
	before := ' '
	for i, r := range text {
		switch r {
		case '"':
			double++
		case '`':
			back++
		case '\'', '\u2019':
			after, _ := utf8.DecodeRuneInString(text[i+utf8.RuneLen(r):])
			switch {
			case unicode.IsLetter(before) && unicode.IsLetter(after):
			case r == '\'':
				single++
			default:
				return false
			}
		case '\u2018', '\u201a', '\u201b', '\u201c', '\u201d', '\u201e', '\u00ab', '\u00bb', '\u2039', '\u203a', '\u00b4':
			return false
		}
		before = r
	}
	return double%2 == 0 && single%2 == 0 && back%2 == 0
}
