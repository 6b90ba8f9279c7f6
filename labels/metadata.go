package labels

import (
	"net/http"
	"strings"

	"google.golang.org/grpc/metadata"
)

// FromMetadata returns the listed keys of gRPC metadata as labels within the limits, for [WithTransport]; nil when none
// is present. The label key is the metadata key in lower case; repeated values are joined with ",". Keys may be listed
// in any case. Binary values (keys that end in "-bin") and credentials never become labels; see the package
// documentation.
func FromMetadata(md metadata.MD, keys ...string) map[string]string {
	return fromMetadata(md, strings.ToLower, keys)
}

// FromHeader is [FromMetadata] for protocols whose metadata is an http.Header, such as Connect. It returns the labels
// that FromMetadata returns for the same metadata over gRPC: the label key is the name in lower case, with its "-". The
// names of the header must be in the canonical form of package net/http. They may be listed in any case. For an HTTP
// request use [FromRequest], whose labels of headers have other keys.
func FromHeader(h http.Header, names ...string) map[string]string {
	return fromMetadata(h, http.CanonicalHeaderKey, names)
}

// fromMetadata returns the labels of metadata whose keys have the given form.
func fromMetadata(md map[string][]string, form func(string) string, names []string) map[string]string {
	if len(md) == 0 || len(names) == 0 {
		return nil
	}
	m := make(map[string]string, len(names))
	for _, name := range names {
		if key := strings.ToLower(name); !IsCredential(key) && !strings.HasSuffix(key, "-bin") {
			addField(m, key, md[form(name)])
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
