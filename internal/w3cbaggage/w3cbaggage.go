// Package w3cbaggage reads W3C baggage headers of any length, with any number of members. OpenTelemetry's package has
// limits for both, by which a peer that adds members could hide those of others.
package w3cbaggage

import (
	"bytes"
	"context"
	"iter"
	"maps"
	"strings"
)

// What OpenTelemetry's package reads of a header. Of a longer one it reads nothing, and of more members the first.
const (
	otelBytes   = 8192
	otelMembers = 64
)

// Exceeds reports whether OpenTelemetry's package may read less of the header than there is.
func Exceeds(header string) bool {
	return len(header) > otelBytes || strings.Count(header, ",") >= otelMembers
}

type contextKey struct{}

// With returns a context with the header that a call brought.
func With(ctx context.Context, header string) context.Context {
	return context.WithValue(ctx, contextKey{}, &header) // a pointer, which package fmt does not show what is behind
}

// From is the header that [With] put into ctx; "" if there is none.
func From(ctx context.Context) string {
	if header, ok := ctx.Value(contextKey{}).(*string); ok {
		return *header
	}
	return ""
}

// Read is the members of a header. Of several with one key the last one counts.
func Read(header string) map[string]string {
	return maps.Collect(All(header))
}

// All gives the keys and values of a header's members, decoded and as valid UTF-8. Members that are none are left out.
func All(header string) iter.Seq2[string, string] {
	return func(yield func(key, value string) bool) {
		for m, rest := NextMember(header, 0); rest > 0; m, rest = NextMember(header, rest) {
			value, ok := unescape(header[m.ValueFrom:m.ValueTo])
			if !ok {
				continue
			}
			written := header[m.KeyFrom:m.KeyTo]
			key, ok := unescape(written)
			if !ok {
				key = written
			}
			if !yield(strings.ToValidUTF8(key, "\uFFFD"), strings.ToValidUTF8(value, "\uFFFD")) {
				return
			}
		}
	}
}

func unescape(s string) (plain string, ok bool) {
	if !strings.Contains(s, "%") {
		return s, true
	}
	b, ok := Unescape(nil, s)
	return string(b), ok
}

// A Member is where the key and the value of a member are in a baggage header, as they are written, without blanks.
type Member struct{ KeyFrom, KeyTo, ValueFrom, ValueTo int }

// NextMember finds the first member that has a key, from a place in the header on. The rest of the header is where it
// says, or there is none, and it says -1. A header can have a million members, so the answer fits into registers.
func NextMember[T string | []byte](header T, from int) (m Member, rest int) {
	for i := from; i < len(header); i++ {
		switch header[i] {
		case ',':
			from = i + 1
		case ';': // properties
			for i+1 < len(header) && header[i+1] != ',' {
				i++
			}
		case '=':
			end := i + 1
			for end < len(header) && header[end] != ',' && header[end] != ';' {
				end++
			}
			m.KeyFrom, m.KeyTo = trimBlanks(header, from, i)
			m.ValueFrom, m.ValueTo = trimBlanks(header, i+1, end)
			for end < len(header) && header[end] != ',' {
				end++
			}
			if m.KeyFrom < m.KeyTo {
				return m, end + 1
			}
			from, i = end+1, end
		}
	}
	return Member{}, -1
}

// trimBlanks leaves out what strings.Trim(s[from:to], " \t") does.
func trimBlanks[T string | []byte](s T, from, to int) (trimmedFrom, trimmedTo int) {
	for from < to && (s[from] == ' ' || s[from] == '\t') {
		from++
	}
	for from < to && (s[to-1] == ' ' || s[to-1] == '\t') {
		to--
	}
	return from, to
}

// Unescape appends a key or value of a member to a text, as url.PathUnescape reads it. It is not ok, and appends nothing,
// where an escape is none.
func Unescape[T string | []byte](to []byte, escaped T) (plain []byte, ok bool) {
	before := len(to)
	for i := 0; i < len(escaped); i++ {
		b := escaped[i]
		if b == '%' {
			if len(escaped)-i < 3 {
				return to[:before], false
			}
			high, ok1 := hex(escaped[i+1])
			low, ok2 := hex(escaped[i+2])
			if !ok1 || !ok2 {
				return to[:before], false
			}
			b = high<<4 | low
			i += 2
		}
		to = append(to, b)
	}
	return to, true
}

// Unescapes reports whether [Unescape] is ok.
func Unescapes(escaped []byte) bool {
	for {
		i := bytes.IndexByte(escaped, '%')
		if i < 0 {
			return true
		}
		// Escapes follow each other where there are many.
		for ; i < len(escaped) && escaped[i] == '%'; i += 3 {
			if len(escaped)-i < 3 {
				return false
			}
			if _, ok := hex(escaped[i+1]); !ok {
				return false
			}
			if _, ok := hex(escaped[i+2]); !ok {
				return false
			}
		}
		escaped = escaped[i:]
	}
}

func hex(b byte) (digit byte, ok bool) {
	switch {
	case b >= '0' && b <= '9':
		return b - '0', true
	case b|0x20 >= 'a' && b|0x20 <= 'f':
		return b | 0x20 - 'a' + 10, true
	}
	return 0, false
}
