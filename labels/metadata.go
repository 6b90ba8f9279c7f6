package labels

import (
	"strings"

	"google.golang.org/grpc/metadata"
)

// FromMetadata returns the listed keys of gRPC metadata as labels within the limits, for [WithTransport]; nil when none
// is present. The label key is the metadata key in lower case; repeated values are joined with ",". Keys may be listed
// in any case. Binary values (keys that end in "-bin") and credentials never become labels; see the package
// documentation.
func FromMetadata(md metadata.MD, keys ...string) map[string]string {
	m := make(map[string]string, len(keys))
	for _, key := range keys {
		key = strings.ToLower(key)
		if values := md[key]; len(values) > 0 && !IsCredential(key) && !strings.HasSuffix(key, "-bin") {
			m[key] = strings.Join(values, ",")
		}
	}
	return repair(m)
}
