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
// which the W3C does not know: others than package w3cbaggage see them escaped.
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
