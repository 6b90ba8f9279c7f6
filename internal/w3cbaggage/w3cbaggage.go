// Package w3cbaggage reads W3C baggage headers of any length, with any number of members. OpenTelemetry's package has
// limits for both, by which a peer that adds members could hide those of others. Within these limits both read the same.
package w3cbaggage

import (
	"context"
	"iter"
	"maps"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What OpenTelemetry's package reads of a header. Of a longer one it reads nothing, and of more members the first.
const (
	otelBytes   = 8192
	otelMembers = 64
)

// Exceeds reports whether OpenTelemetry's package may read less of the header than there is. It counts the bytes of
// members as it would write them: an escaped byte that is no UTF-8 takes three times as many.
func Exceeds(header string) bool {
	return len(header) > otelBytes || strings.Count(header, ",") >= otelMembers || len(header)+6*strings.Count(header, "%") > otelBytes
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

// All gives the keys and values of a header's members. Keys are as they are written, because the W3C's format does not
// escape them. Values are decoded and valid UTF-8. What is no member by the W3C's format is left out, as OpenTelemetry's
// package leaves it out: which of several members counts must not depend on who reads them.
func All(header string) iter.Seq2[string, string] {
	return func(yield func(key, value string) bool) {
		for m, rest := NextMember(header, 0); rest > 0; m, rest = NextMember(header, rest) {
			value := header[m.ValueFrom:m.ValueTo]
			if strings.Contains(value, "%") {
				value = string(Decode(value))
			}
			if !yield(header[m.KeyFrom:m.KeyTo], value) {
				return
			}
		}
	}
}

// A Member is where the key and the value of a member are in a baggage header, as they are written, without blanks.
type Member struct{ KeyFrom, KeyTo, ValueFrom, ValueTo int }

// NextMember finds the next member, from a place in the header on. The rest of the header is where it says, or there is
// none, and it says -1. A header can have a million members, so the answer fits into registers.
func NextMember[T string | []byte](header T, from int) (m Member, rest int) {
	for from < len(header) {
		end := from
		for end < len(header) && header[end] != ',' {
			end++
		}
		if m, ok := memberOf(header, from, end); ok {
			return m, end + 1
		}
		from = end + 1
	}
	return Member{}, -1
}

// memberOf reads header[from:end], and reports whether that is a member.
func memberOf[T string | []byte](header T, from, end int) (m Member, ok bool) {
	equals := from
	for equals < end && header[equals] != '=' {
		if header[equals] == ';' {
			return m, false
		}
		equals++
	}
	if equals == end {
		return m, false
	}
	value := equals + 1
	for value < end && header[value] != ';' {
		value++
	}
	m.KeyFrom, m.KeyTo = trimSpace(header, from, equals)
	m.ValueFrom, m.ValueTo = trimSpace(header, equals+1, value)
	ok = m.KeyFrom < m.KeyTo && skipToken(header, m.KeyFrom, m.KeyTo) == m.KeyTo &&
		skipValue(header, m.ValueFrom, m.ValueTo) == m.ValueTo && escapesWell(header, m.ValueFrom, m.ValueTo)
	for ok && value < end { // properties
		begin := value + 1
		for value = begin; value < end && header[value] != ';'; {
			value++
		}
		ok = begin == value || isProperty(header, begin, value)
	}
	return m, ok
}

// isProperty reports whether header[from:end] is a property of a member: a key, and perhaps a value.
func isProperty[T string | []byte](header T, from, end int) bool {
	key := skipBlanks(header, from, end)
	i := skipToken(header, key, end)
	if i == key {
		return false
	}
	if i = skipBlanks(header, i, end); i == end {
		return true
	}
	if header[i] != '=' {
		return false
	}
	value := skipBlanks(header, i+1, end)
	i = skipValue(header, value, end)
	return escapesWell(header, value, i) && skipBlanks(header, i, end) == end
}

// skipToken returns the first place in header[from:end] that no key has, see RFC 9110, section 5.6.2, or end.
func skipToken[T string | []byte](header T, from, end int) int {
	for ; from < end; from++ {
		switch b := header[from]; {
		case 'a' <= b|0x20 && b|0x20 <= 'z', '0' <= b && b <= '9':
		case b == '!', '#' <= b && b <= '\'', b == '*', b == '+', b == '-', b == '.', '^' <= b && b <= '`', b == '|', b == '~':
		default:
			return from
		}
	}
	return end
}

// skipValue returns the first place in header[from:end] that no value has, or end.
func skipValue[T string | []byte](header T, from, end int) int {
	for ; from < end; from++ {
		if b := header[from]; b <= ' ' || b > '~' || b == '"' || b == ',' || b == ';' || b == '\\' {
			return from
		}
	}
	return end
}

func skipBlanks[T string | []byte](header T, from, end int) int {
	for from < end && (header[from] == ' ' || header[from] == '\t') {
		from++
	}
	return from
}

// IsToken reports whether a text can be the key of a member.
func IsToken(s string) bool { return s != "" && skipToken(s, 0, len(s)) == len(s) }

// escapesWell reports whether all escapes in header[from:end] are some.
func escapesWell[T string | []byte](header T, from, end int) bool {
	for i := from; i < end; i++ {
		if header[i] != '%' {
			continue
		}
		if end-i < 3 {
			return false
		}
		if _, ok := hex(header[i+1]); !ok {
			return false
		}
		if _, ok := hex(header[i+2]); !ok {
			return false
		}
		i += 2
	}
	return true
}

// trimSpace leaves out what strings.TrimSpace(header[from:to]) does. That is more than blanks, as OpenTelemetry does.
func trimSpace[T string | []byte](header T, from, to int) (trimmedFrom, trimmedTo int) {
	for from < to {
		b := header[from]
		size := 1
		if b >= utf8.RuneSelf {
			var r rune
			if r, size = utf8.DecodeRuneInString(string(header[from:min(from+utf8.UTFMax, to)])); !unicode.IsSpace(r) {
				break
			}
		} else if b != ' ' && (b < '\t' || b > '\r') {
			break
		}
		from += size
	}
	for from < to {
		b := header[to-1]
		size := 1
		if b >= utf8.RuneSelf {
			var r rune
			if r, size = utf8.DecodeLastRuneInString(string(header[max(to-utf8.UTFMax, from):to])); !unicode.IsSpace(r) {
				break
			}
		} else if b != ' ' && (b < '\t' || b > '\r') {
			break
		}
		to -= size
	}
	return from, to
}

// Decode returns the value of a member without escapes. Each byte that is no UTF-8 becomes U+FFFD, as in
// OpenTelemetry's package. A place that only looks like an escape, which no member has, stays.
func Decode[T string | []byte](value T) []byte {
	plain := make([]byte, 0, len(value))
	for i := 0; i < len(value); i++ {
		b := value[i]
		if b == '%' && len(value)-i >= 3 {
			high, ok1 := hex(value[i+1])
			low, ok2 := hex(value[i+2])
			if ok1 && ok2 {
				b = high<<4 | low
				i += 2
			}
		}
		plain = append(plain, b)
	}
	if utf8.Valid(plain) {
		return plain
	}
	valid := make([]byte, 0, len(plain)+2*utf8.UTFMax)
	for _, r := range string(plain) {
		valid = utf8.AppendRune(valid, r)
	}
	return valid
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
