// Package credential names what carries credentials.
package credential

import "strings"

// headerPrefix is what the label of a header begins with.
const headerPrefix = "http.request.header."

// Named reports whether a header, metadata key, baggage member or label of that name carries credentials. The name may come in
// any case, and as the label that a header becomes. An application's own label of such a name counts too. "_" counts as "-", because some servers and proxies take the two for
// one.
func Named(name string) bool {
	name = strings.TrimPrefix(strings.ToLower(name), headerPrefix)
	switch strings.ReplaceAll(name, "_", "-") {
	case "authorization", "proxy-authorization", "x-forwarded-authorization", "x-original-authorization",
		"cookie", "set-cookie",
		"api-key", "apikey", "x-api-key", "x-goog-api-key", "ocp-apim-subscription-key",
		"x-auth-token", "x-session-token", "x-access-token", "x-forwarded-access-token", "x-amz-security-token",
		"x-vault-token", "x-gitlab-token", "private-token",
		"x-csrf-token", "x-csrftoken", "x-xsrf-token",
		"x-goog-iap-jwt-assertion", "cf-access-jwt-assertion":
		return true
	}
	return false
}
