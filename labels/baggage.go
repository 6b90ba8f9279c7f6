package labels

import (
	"context"
	"maps"
	"slices"
	"strings"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
)

// FromBaggage returns members of the OpenTelemetry baggage in ctx as labels within the limits; nil if there are none. It takes
// the members with these keys. If no key is given, it takes all except those that begin with "http." or "rpc.", which are for
// labels that a server sets itself. Keys are case-sensitive and are not decoded. Properties of members are ignored. Text that is
// no member by the W3C's format is left out. If several members have one key, the last one counts. Members named like a header
// with credentials never become labels; see the package documentation.
//
// Packages httpguard and grpcguard put the whole baggage of a call into the context. A member is then found behind any
// number of others. OpenTelemetry itself reads only 64 members and 8192 bytes.
//
// Baggage travels with requests. Unless a gateway strips it, a peer decides its values.
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

// isServers reports whether a key is for labels that a server sets itself.
func isServers(key string) bool {
	return strings.HasPrefix(key, httpPrefix) || strings.HasPrefix(key, "rpc.")
}

// addSent adds the members of a header to those of a context, which may come from it. OpenTelemetry reads only the
// beginning of a long header, and a gateway adds its member at the end. So the last member with a key counts. If the
// context has a value that is none of the header's, it is the application's own, and stays.
func addSent(m map[string]string, header string, keys []string) {
	inContext := maps.Clone(m) // which has few, while the header may have a hundred thousand
	sent := make(map[string]string)
	fromHeader := make(map[string]bool)
	for key, value := range w3cbaggage.All(header) {
		if IsCredential(key) || len(keys) == 0 && isServers(key) || len(keys) > 0 && !slices.Contains(keys, key) {
			continue
		}
		known, ok := inContext[key]
		if !ok {
			m[key] = value
			continue
		}
		sent[key] = value
		if known == value {
			fromHeader[key] = true
		}
	}
	for key := range fromHeader {
		m[key] = sent[key]
	}
}
