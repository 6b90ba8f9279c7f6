package wire

import (
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
)

// HeaderBaggage is the header by which CheckHTTP carries labels, as requests have it.
const HeaderBaggage = "baggage"

// What Aperture's agents read of a baggage header, which is what OpenTelemetry's package read then. Of a header that is
// beyond one of these they read nothing.
const (
	MaxBaggage        = 8192 // bytes
	MaxBaggageMember  = 4096 // bytes of a member
	MaxBaggageMembers = 180
)

// Baggage returns the labels as a W3C baggage header; "" for none.
func Baggage(labels map[string]string) string {
	var b strings.Builder
	for i, key := range slices.Sorted(maps.Keys(labels)) {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(BaggageMember(key, labels[key]))
	}
	return b.String()
}

// BaggageMember returns a label as a member of a baggage header. The W3C's format has no escapes in keys. A key that
// could be none is written with some all the same, so that the header stays one, and who reads it finds the label by
// the escaped key.
func BaggageMember(key, value string) string { return BaggageKey(key) + "=" + url.PathEscape(value) }

// BaggageKey is the key by which who reads a baggage header finds the label.
func BaggageKey(key string) string {
	if w3cbaggage.IsToken(key) {
		return key
	}
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
