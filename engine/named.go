package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/components"
	"github.com/headgate-go/headgate/internal/credential"
	"github.com/headgate-go/headgate/internal/slip"
	"github.com/headgate-go/headgate/policy"
)

// name adds the labels that a component reads, and warns of those that hardly arrive.
func (r *rules) name(id *agentapi.Component, reads func(func(components.Role, string))) {
	roles := make(map[string]components.Role)
	reads(func(of components.Role, key string) {
		if key == "" {
			return
		}
		r.named[key] = r.named[key] || of == components.MeasuresBy
		if known, ok := roles[key]; !ok || of < known {
			roles[key] = of
		}
	})
	for key, of := range roles {
		if why := neverComes(key); why != "" {
			r.warnings.missing = append(r.warnings.missing, missing{of, fmt.Sprintf("policy %q: component %q %v the label %q: %s", id.Policy, id.ID, of, key, why)})
		}
	}
}

// missing is a warning of a label that does not arrive, or of a control point that hardly any flow has.
type missing struct {
	role components.Role
	text string
}

// compare puts the most important first.
func (m missing) compare(other missing) int {
	return cmp.Or(cmp.Compare(m.role, other.role), strings.Compare(m.text, other.text))
}

const headerPrefix = "http.request.header."

// neverComes returns why no label has the key unless an application sets it itself, or why applications hardly set it
// either; "" if a label may have it.
func neverComes(key string) string {
	lower := strings.ToLower(key)
	if name, ok := strings.CutPrefix(lower, headerPrefix); ok {
		right := headerPrefix + strings.ReplaceAll(name, "-", "_")
		switch {
		case name == "" || name[0] == ':':
			return "no header has this label"
		case right == headerPrefix+"baggage":
			return "the members of this header become labels, and not the header"
		case key != right:
			return fmt.Sprintf("the label of a header is in lower case and has _ for -: it is %q", right)
		case strings.ContainsFunc(name, notInHeader):
			return "no header has a name with such characters"
		case credential.Named(name):
			return "Headgate's clients make no label of this header, because it carries credentials: it arrives where the " +
				"application sets the label itself, and where a proxy asks about the request by CheckHTTP"
		}
		return ofMessage(name)
	}
	if key != lower && ofRequest(lower) {
		return fmt.Sprintf("the labels of requests and calls are in lower case: it is %q", lower)
	}
	if credential.Named(key) && (strings.Contains(key, "-") || lower == "authorization" || lower == "cookie") {
		return "Headgate's clients make no label of metadata or baggage of this name, because it carries credentials: it " +
			"arrives where the application sets the label itself"
	}
	if why := ofMetadata(lower); why != "" {
		return why
	}
	if right := misspelt(lower); right != "" {
		return fmt.Sprintf("no adaptor sets this label; it may be misspelt %q", right)
	}
	return slip.InName(key)
}

// ofMessage returns why Headgate's clients make no label of a header that net/http takes out of the others; "" if it does not.
func ofMessage(name string) string {
	const taken = "Go's net/http keeps this header apart, so Headgate's clients make no label of it"
	switch name {
	case "host":
		return taken + `: use "http.host"`
	case "transfer_encoding", "trailer":
		return taken + ": it says how the body is sent, and no label has that"
	}
	return ""
}

// ofMetadata returns why no label of metadata has the key; "" if one may have it.
func ofMetadata(key string) string {
	switch key {
	case "grpc-timeout", "grpc-encoding", "grpc-message", "grpc-message-type", "grpc-status", "te":
		return "gRPC keeps this key for itself, and it is not in the metadata of a call"
	}
	if strings.HasSuffix(key, "-bin") {
		return "Headgate's clients make no label of binary metadata, which a key that ends in -bin has: send the value under another key, " +
			"or set the label in the application"
	}
	return ""
}

// misspelt returns the label of an adaptor from which a key in lower case differs by one letter; "" if there is none. In the label of a
// header, each part of the prefix may differ so, and one part may be missing.
func misspelt(key string) string {
	for _, label := range ofRequests {
		if d := len(key) - len(label); max(d, -d) <= 1 && slip.Distance(key, label) == 1 {
			return label
		}
	}
	parts := strings.SplitN(key, ".", 4)
	near := func(part, right string) bool { return slip.Distance(part, right) <= 1 }
	name := parts[len(parts)-1]
	switch {
	case len(parts) == 4 && near(parts[0], "http") && near(parts[1], "request") && near(parts[2], "header"):
	case len(parts) == 3 && (parts[0] == "http" || parts[0] == "request") && near(parts[1], "header"):
	default:
		return ""
	}
	return headerPrefix + strings.ReplaceAll(name, "-", "_")
}

// notInHeader reports whether no name of a header has the character (RFC 9110, section 5.6.2).
func notInHeader(r rune) bool {
	letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
	return !letter && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
}

// ofRequests are the labels that adaptors set, besides those of headers.
var ofRequests = [...]string{ //nolint:gochecknoglobals // a table, never written to
	"http.method", "http.target", "http.host", "http.scheme", "http.flavor", "http.request_content_length", "rpc.service", "rpc.method",
}

// ofRequest reports whether adaptors set the label, besides those of headers.
func ofRequest(key string) bool { return slices.Contains(ofRequests[:], key) }

// acts warns of control points that hardly any flow has: those of a component's selectors, and those whose flows it measures. It warns of
// services in the same way.
func (r *rules) acts(id *agentapi.Component, selectors []policy.Selector, measured map[string][]latencySink) {
	warned := make(map[string]bool)
	warn := func(does, name, why string) {
		if why == "" {
			return
		}
		if text := fmt.Sprintf("policy %q: component %q %s %q: %s", id.Policy, id.ID, does, name, why); !warned[text] {
			warned[text] = true
			r.warnings.missing = append(r.warnings.missing, missing{components.ActsAt, text})
		}
	}
	for _, s := range selectors {
		warn("acts at the control point", s.ControlPoint, slip.InName(s.ControlPoint))
		switch {
		case s.Service != "any" && strings.EqualFold(s.Service, "any"):
			warn("acts at the service", s.Service, `only "any", in lower case, is every service`)
		case slip.In(s.Service) == "": // else the policy's file was warned about
			warn("acts at the service", s.Service, slip.InName(s.Service))
		}
	}
	for controlPoint := range measured {
		warn("measures the control point", controlPoint, slip.InName(controlPoint))
	}
}
