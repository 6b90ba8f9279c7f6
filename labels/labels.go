// Package labels says where the labels of a flow come from, and how long and how many they may be.
//
// A label is a key and a value that policies match, limit and prioritise by. The labels of a flow come from five layers. If
// several layers have a key, the last one wins:
//
//	layer               set by                                       controlled by    beyond the limits
//	1 client defaults   an option of the client                      the application  the client is refused
//	2 transport         WithTransport (FromRequest, FromMetadata),   the peer         repaired or dropped
//	                    RequestLabeler
//	3 baggage           FromBaggage, in clients that opted in        the peer         repaired or dropped
//	4 labels.With       With                                         the application  the flow is Invalid
//	5 Params.Labels     the call that starts the flow                the application  the flow is Invalid
//
// The number of labels from peers has no limit, so that a stranger's labels cannot push out a label that a gateway adds. A flow
// carries up to 1 MiB of them. Each label counts as its key, its value and 32 bytes. With more than 1 MiB the flow is Invalid.
// Leaving out some of the labels would be unsafe, because a limit may depend on one of them.
//
// So a label from a peer never replaces a label that the application sets for a flow. It may replace a default. If a label
// decides what a caller is allowed to do, set it in layer 4 or 5.
//
// Baggage does not replace labels that a server sets itself: members whose names begin with "http." or "rpc." become labels only
// if they are listed. Labels of metadata have no such prefix. To keep baggage from replacing them, list the members to take.
//
// Headers and metadata become labels only when they are listed. Those that carry credentials never become labels, even if they
// are listed. This holds in upper and lower case, and for names that are
// written with "-" or "_": Authorization, Proxy-Authorization,
// X-Forwarded-Authorization, X-Original-Authorization, Cookie, Set-Cookie, Api-Key, Apikey, X-Api-Key, X-Goog-Api-Key,
// Ocp-Apim-Subscription-Key, X-Auth-Token, X-Session-Token, X-Access-Token, X-Forwarded-Access-Token, X-Amz-Security-Token,
// X-Vault-Token, X-Gitlab-Token, Private-Token, X-Csrf-Token, X-Csrftoken, X-Xsrf-Token, X-Goog-Iap-Jwt-Assertion and
// Cf-Access-Jwt-Assertion. Neither do baggage members of these names, or of the labels that the headers would be.
//
// All functions are safe for concurrent use as long as their arguments do not change meanwhile. Only WithTransport
// keeps a map or slice that it is given. The contexts that the functions return show no label when printed.
package labels

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/credential"
)

// What a flow may carry. Keys are not empty; keys and values are valid UTF-8.
const (
	MaxLabels   = 64                   // Labels that the application sets for one flow: layers 4 and 5; layer 1 has as many.
	MaxKeyLen   = 255                  // Bytes of a key.
	MaxValueLen = bounds.MaxLabelValue // Bytes of a value, which may be empty: 4096.
)

// Check returns an error if labels that the application sets are beyond the limits. The error says that there are too many
// labels, or what is wrong with the smallest bad key. Its text shows neither keys nor values, because it may reach strangers. Its
// method LabelKey() string gives the bad key, cut short if it is long, and log/slog shows it. Valid labels cost no allocation.
func Check(m map[string]string) error {
	if len(m) > MaxLabels {
		return fmt.Errorf("%d labels are more than %d", len(m), MaxLabels)
	}
	var first error
	var firstKey string
	for key, value := range m {
		if first != nil && key > firstKey {
			continue
		}
		if err := checkLabel(key, value); err != nil {
			first, firstKey = err, key
		}
	}
	return first
}

func checkLabel(key, value string) error {
	switch {
	case key == "":
		return labelError(key, "empty key")
	case len(key) > MaxKeyLen:
		return labelError(key, fmt.Sprintf("key longer than %d bytes", MaxKeyLen))
	case !utf8.ValidString(key):
		return labelError(key, "key is not valid UTF-8")
	case len(value) > MaxValueLen:
		return labelError(key, fmt.Sprintf("value longer than %d bytes", MaxValueLen))
	case !utf8.ValidString(value):
		return labelError(key, "value is not valid UTF-8")
	}
	return nil
}

// keyError is what is wrong with the label of a key.
type keyError struct{ *keyProblem }

// keyProblem is behind a pointer, because a verb that fits no pointer, such as %s, prints the fields of an error in an
// unexported field of a struct, and calls none of its methods.
type keyProblem struct {
	key     string
	problem string
}

func labelError(key, problem string) error {
	const shown = 64 // bytes of a key; enough to find it, and a log line stays a line
	if short := cut(key, shown); short != key {
		key = short + "…"
	}
	return &keyError{&keyProblem{key, problem}}
}

func (e *keyError) Error() string { return "label: " + e.problem }

// LabelKey is the key, cut short when it is long.
func (e *keyError) LabelKey() string { return e.key }

// Format keeps the key out of what is printed, whatever the verb.
func (e *keyError) Format(s fmt.State, verb rune) {
	_, _ = fmt.Fprintf(s, fmt.FormatString(s, verb), e.Error())
}

// LogValue has the key.
func (e *keyError) LogValue() slog.Value {
	return slog.GroupValue(slog.String("problem", e.problem), slog.String("label_key", e.key))
}

// Repair makes labels of a peer fit the limits of labels that the application sets, in place. It drops labels with a
// bad key, makes values valid UTF-8, cuts long values, and keeps the MaxLabels smallest keys. It returns m, or nil if
// nothing is left. Labels from this package's own functions are repaired already, but there may be more of them.
func Repair(m map[string]string) map[string]string {
	m = repair(m)
	if len(m) > MaxLabels {
		for _, key := range slices.Sorted(maps.Keys(m))[MaxLabels:] {
			delete(m, key)
		}
	}
	return m
}

// inOrder reports whether there is nothing to repair.
func inOrder(m map[string]string) bool {
	for key, value := range m {
		if checkLabel(key, value) != nil {
			return false
		}
	}
	return true
}

// repair is Repair for any number of labels.
func repair(m map[string]string) map[string]string {
	for key, value := range m {
		switch err := checkLabel(key, ""); {
		case err != nil:
			delete(m, key)
		case len(value) > MaxValueLen || !utf8.ValidString(value):
			m[key] = cut(strings.ToValidUTF8(value, "\uFFFD"), MaxValueLen)
		}
	}
	if len(m) == 0 {
		return nil
	}
	return m
}

// cut returns the longest prefix of s that has at most n bytes and splits no rune.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// What [FromRequest] puts before all its labels, and before the name of a header.
const (
	httpPrefix   = "http."
	headerPrefix = httpPrefix + "request.header."
)

// IsCredential reports whether a header, metadata key or baggage member of that name carries credentials, and so never
// becomes a label. The name may come in any case, and as the label that a header becomes. "_" counts as "-", because
// some servers and proxies take the two for one. The values of an application's own label of such a name are not shown either:
// the text of matchers, the engine's statistics and what agents report hide them.
func IsCredential(name string) bool { return credential.Named(name) }
