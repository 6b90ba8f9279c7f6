package wire

import (
	"maps"
	"net/url"
	"slices"
	"strings"
)

// HeaderBaggage is the header by which CheckHTTP carries labels, as requests have it.
const HeaderBaggage = "baggage"

// MaxBaggage is the longest baggage header that agents read, in bytes: of a longer one they read nothing.
const MaxBaggage = 8192

// Baggage is the labels as a W3C baggage header; "" for none. Keys that a header cannot hold are escaped as values are,
// which the W3C does not know: others than [ReadBaggage] see them escaped.
func Baggage(labels map[string]string) string {
	var b strings.Builder
	for i, key := range slices.Sorted(maps.Keys(labels)) {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(escapeKey(key))
		b.WriteByte('=')
		b.WriteString(url.PathEscape(labels[key]))
	}
	return b.String()
}

// escapeKey leaves of what url.PathEscape leaves just what a token may hold.
func escapeKey(key string) string {
	return strings.NewReplacer("=", "%3D", ":", "%3A", "@", "%40").Replace(url.PathEscape(key))
}

// ReadBaggage is the labels of a W3C baggage header, of any length and with any number of members: who adds members must
// not hide those of others. Members that are none are left out. Of several with one key the last one counts.
func ReadBaggage(header string) map[string]string {
	labels := make(map[string]string)
	EachBaggage(header, func(key, value string) { labels[key] = value })
	return labels
}

// EachBaggage calls visit with each label of a header, as [ReadBaggage] reads it.
func EachBaggage(header string, visit func(key, value string)) {
	for member := range strings.SplitSeq(header, ",") {
		member, _, _ = strings.Cut(member, ";") // properties
		key, value, ok := strings.Cut(member, "=")
		key, value = trimBlanks(key), trimBlanks(value)
		if !ok || key == "" {
			continue
		}
		if plain, err := url.PathUnescape(key); err == nil {
			key = plain
		}
		plain, err := url.PathUnescape(value)
		if err != nil {
			continue
		}
		visit(strings.ToValidUTF8(key, "\uFFFD"), strings.ToValidUTF8(plain, "\uFFFD"))
	}
}

// trimBlanks is strings.Trim(s, " \t"). It costs less, and a header can have a million members.
func trimBlanks(s string) string {
	for s != "" && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for s != "" && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}

// addedBaggage is the members of a header that are not in another. It decodes none, so that what others wrote stays as
// it is.
func addedBaggage(header, other string) []string {
	known := make(map[string]bool)
	for member := range strings.SplitSeq(other, ",") {
		known[strings.TrimSpace(member)] = true
	}
	var added []string
	for member := range strings.SplitSeq(header, ",") {
		if member = strings.TrimSpace(member); member != "" && !known[member] {
			added = append(added, member)
		}
	}
	return added
}
