package labels

import (
	"strings"

	"google.golang.org/grpc/metadata"
)

// FromMetadata returns the listed keys of gRPC metadata as labels within the limits, for [WithTransport]; nil when none
// is present. The label key is the metadata key in lower case, so x-user and x_user are two labels; repeated values are joined with ",". Keys may be listed
// in any case. Binary values (keys that end in "-bin") and credentials never become labels; see the package
// documentation.
func FromMetadata(md metadata.MD, keys ...string) map[string]string {
	if len(md) == 0 || len(keys) == 0 {
		return nil
	}
	m := make(map[string]string, len(keys))
	for _, key := range keys {
		if key = strings.ToLower(key); !IsCredential(key) && !strings.HasSuffix(key, "-bin") {
			addField(m, key, md[key])
		}
	}
	return repair(m)
}

// addField adds the label of a header or of metadata, if it was sent.
func addField(m map[string]string, key string, values []string) {
	if len(values) > 0 {
		m[key] = strings.Join(values, ",")
	}
}
