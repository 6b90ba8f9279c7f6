package labels

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/baggage"
)

// FromBaggage returns members of the OpenTelemetry baggage in ctx as labels within the limits: those with these keys,
// or when no key is given all but those that begin with "http." or "rpc.", which are for what a server sees for itself;
// nil when there are none. Keys are case-sensitive; properties of members are ignored. Members named like a header with
// credentials never become labels; see the package documentation.
//
// Baggage travels with requests: unless a gateway strips it, its values are whatever a peer says.
func FromBaggage(ctx context.Context, keys ...string) map[string]string {
	bag := baggage.FromContext(ctx)
	if bag.Len() == 0 {
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
			if key := member.Key(); !strings.HasPrefix(key, httpPrefix) && !strings.HasPrefix(key, "rpc.") {
				add(member)
			}
		}
	}
	for _, key := range keys {
		add(bag.Member(key))
	}
	return Repair(m)
}
