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

// Baggage returns the labels as a W3C baggage header; "" for none. Keys that a header cannot hold are escaped like
// values. The W3C's format has no such escapes, so only package w3cbaggage reads them.
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

// escapeKey escapes all that a token may not hold, which is more than url.PathEscape does.
func escapeKey(key string) string {
	return strings.NewReplacer("=", "%3D", ":", "%3A", "@", "%40").Replace(url.PathEscape(key))
}

// addedBaggage returns the members of a header that are not in another. It does not decode them, so they stay as they
// were written.
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
