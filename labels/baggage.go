package labels

import (
	"context"
	"slices"
	"strings"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
)

// FromBaggage returns members of the OpenTelemetry baggage in ctx as labels within the limits: those with these keys,
// or when no key is given all but those that begin with "http." or "rpc.", which are for what a server sees for itself;
// nil when there are none. Packages httpguard and grpcguard put the baggage of a call into the context, whole: members are
// found behind any number of others, where OpenTelemetry itself reads 64 and 8192 bytes. Keys are case-sensitive; properties of members are ignored. Members named like a header with
// credentials never become labels; see the package documentation.
//
// Baggage travels with requests: unless a gateway strips it, its values are whatever a peer says.
func FromBaggage(ctx context.Context, keys ...string) map[string]string {
	bag, header := baggage.FromContext(ctx), w3cbaggage.From(ctx)
	if bag.Len() == 0 && header == "" {
		return nil
	}
	m := make(map[string]string, bag.Len())
	add := func(member baggage.Member) {
		// A member that is missing has no key. The value is decoded already; doing so twice is bug A23.
		if key := member.Key(); key != "" && !IsCredential(key) {
			m[key] = member.Value()
		}
	}
	if len(keys) == 0 {
		for _, member := range bag.Members() {
			if !isServers(member.Key()) {
				add(member)
			}
		}
	}
	for _, key := range keys {
		add(bag.Member(key))
	}
	if header != "" {
		addSent(m, header, keys)
	}
	return repair(m)
}

// isServers reports whether a key is one of those that are for what a server sees for itself.
func isServers(key string) bool {
	return strings.HasPrefix(key, httpPrefix) || strings.HasPrefix(key, "rpc.")
}

// addSent adds what a header has to the members of a context that may come from it: OpenTelemetry reads the beginning of a
// long one, and a gateway adds its member at the end. So the last member with a key counts, unless the context has another
// value than all of the header's, which is the application's own.
func addSent(m map[string]string, header string, keys []string) {
	sent := make(map[string]string)
	fromHeader := make(map[string]bool)
	for key, value := range w3cbaggage.All(header) {
		if IsCredential(key) || len(keys) == 0 && isServers(key) || len(keys) > 0 && !slices.Contains(keys, key) {
			continue
		}
		sent[key] = value
		if known, ok := m[key]; ok && known == value {
			fromHeader[key] = true
		}
	}
	for key, value := range sent {
		if _, known := m[key]; !known || fromHeader[key] {
			m[key] = value
		}
	}
}
