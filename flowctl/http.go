package flowctl

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

// HTTPRequest describes an HTTP request to an agent, see [Params]. All of it may come from a peer: text that an agent would
// refuse is repaired or left out. Only headers of more than 1 MiB make a flow Invalid. Start keeps nothing of the request.
//
// The agent makes labels of the request, such as http.method. They are in the layer of the transport's labels, see package
// labels. [WithLabels] does not replace them, and all other sources do.
//
// The flow's other labels travel beside the request to agents of Headgate, and in a baggage header to all others. The header has
// at most 8192 bytes and 180 labels. A label in it has at most 4096 bytes, with its key and its escapes. If labels of Params,
// labels.With or WithLabels do not fit, or members that [WithBaggage] names, the flow is Invalid, whatever the agent is. Other
// members of baggage that do not fit are left out of the header, the largest first, and the client logs that.
type HTTPRequest struct {
	Method string

	// Path is the path as it was sent, still escaped. If it includes the query, the agent sees the query too.
	Path string

	Host     string
	Scheme   string // http or https
	Protocol string // HTTP/1.1, HTTP/2

	// Size is the bytes of the body; negative if unknown.
	Size int64

	// Headers are the headers that the agent may see, by names in lower case. Repeated values are joined with ",".
	// Headers that carry credentials are never sent, see package labels. Of several headers of one label, such as x-user and x_user,
	// one is sent, as labels.FromRequest chooses. Give only those that policies need. Clients with
	// [WithBaggage] take labels of the peer from a baggage header.
	Headers map[string]string

	// Source and Destination are the ends of the connection; the zero value when unknown.
	Source, Destination netip.AddrPort
}

// equal reports whether two requests tell an agent the same.
func (r *HTTPRequest) equal(q *HTTPRequest) bool {
	if r == nil || q == nil {
		return r == q
	}
	return r.Method == q.Method && r.Path == q.Path && r.Host == q.Host && r.Scheme == q.Scheme && r.Protocol == q.Protocol &&
		r.Size == q.Size && maps.Equal(r.Headers, q.Headers) && r.Source == q.Source && r.Destination == q.Destination
}

// HTTPAnswer is what an agent wants done with an HTTP request. Names of headers are as the agent writes them, usually
// in lower case.
type HTTPAnswer struct {
	// Status is the status to answer a rejected request with, within 400 to 599; 0 if the request was accepted. Outside
	// a dry run it is what [Flow.HTTPStatus] returns.
	Status int

	// Header is to be set in the response to a rejected request, or in an accepted request before it is handled. A
	// baggage header in it has the request's own members and those that the agent added. It does not have the flow's
	// labels, which were sent to the agent in that header.
	Header map[string]string

	// Body is for the answer to a rejected request.
	Body string
}

// HTTPAnswer returns what the agent wants done with the flow's [HTTPRequest]. It is a copy. ok is false if the flow has
// no HTTPRequest, or if no remote agent answered. [Flow.Decision] is the decision about the request.
func (f *Flow) HTTPAnswer() (answer HTTPAnswer, ok bool) {
	remote := f.remoteAnswer()
	if remote == nil {
		return HTTPAnswer{}, false
	}
	said := remote.HTTP(f.req.Labels.HTTP())
	if said == nil {
		return HTTPAnswer{}, false
	}
	answer = HTTPAnswer{Header: said.Header, Body: said.Body}
	if f.decision == Rejected {
		answer.Status = deniedStatus(f.verdict.Rejection())
	}
	return answer, true
}

var errHTTPCache = errors.New("the parameters have both an HTTP request and cache keys, which its check cannot look up")

// describe puts an HTTP request into the flow's own Shared, for the agent to be asked about. The agent makes labels of
// the request. The flow's other labels travel beside it, and once more in the baggage header, for agents that are not
// Headgate's. Aperture's let the header's labels replace those of the request.
func (c *Client) describe(ctx context.Context, l *agentapi.Labels, of *HTTPRequest) error {
	r := of.bounded()
	l.Shared.HTTP = r
	l.Shared.Defaults = besides(l.Shared.Defaults, r)
	if c.baggage {
		l.Shared.Baggage = c.httpBaggage(ctx, r.Own)
	}
	if labelsSize(r.Headers) > maxPeerLabels {
		return errPeerLabels
	}
	if err := c.fit(l); err != nil {
		return err
	}
	header, left, err := c.labelsHeader(l)
	if err != nil {
		return err
	}
	if left > 0 {
		c.labelLog.warn(c.logger, "headgate: labels were left out of the baggage header of a check", "left_out", left)
	}
	if header != "" {
		r.Headers[wire.HeaderBaggage] = header
	}
	return nil
}

// besides returns the defaults without those that the request has a label for.
func besides(defaults map[string]string, r *agentapi.HTTPRequest) map[string]string {
	var taken map[string]bool
	for key := range defaults {
		if !strings.HasPrefix(key, "http.") {
			continue
		}
		if taken == nil {
			taken = map[string]bool{
				"http.method":                 true, // GET if the request does not say
				"http.target":                 r.Path != "",
				"http.host":                   r.Host != "",
				"http.scheme":                 r.Scheme != "",
				"http.flavor":                 r.Protocol != "",
				"http.request_content_length": r.Size >= 0,
			}
			for name := range r.Headers {
				taken[wire.HeaderLabel+strings.ReplaceAll(name, "-", "_")] = true
			}
		}
	}
	if taken == nil {
		return defaults
	}
	rest := make(map[string]string, len(defaults))
	for key, value := range defaults {
		if !taken[key] {
			rest[key] = value
		}
	}
	return rest
}

// httpBaggage returns the labels of the context's baggage, and of the request's own members that are not in the
// context.
func (c *Client) httpBaggage(ctx context.Context, own string) map[string]string {
	if own == "" || own == w3cbaggage.From(ctx) {
		return labels.FromBaggage(ctx, c.baggageKeys...)
	}
	all := labels.FromBaggage(w3cbaggage.With(ctx, own), c.baggageKeys...)
	if len(all) > 0 && !w3cbaggage.Exceeds(own) {
		maps.Copy(all, labels.FromBaggage(ctx, c.baggageKeys...))
	}
	return all
}

// labelsHeader returns the flow's labels as a header, and how many were left out of it. What the application's code
// names goes first, and is an error if it does not fit. Of the rest, which comes from peers, the largest are left out.
func (c *Client) labelsHeader(l *agentapi.Labels) (header string, left int, err error) {
	layers := []map[string]string{l.Params, l.Context, l.Shared.Defaults}
	var others []string
	if len(c.baggageKeys) > 0 {
		layers = append(layers, l.Shared.Baggage)
	} else {
		others = bySize(l.Shared.Baggage)
	}
	named := make(map[string]bool)
	for _, layer := range layers {
		for key := range layer {
			named[key] = true
		}
	}
	h := headerOf{labels: l}
	for _, key := range slices.Sorted(maps.Keys(named)) {
		if value, _ := l.Lookup(key); !h.add(key, value) {
			return "", 0, errLabelsHeader
		}
	}
	for _, key := range slices.Backward(others) {
		if !named[key] && !h.add(key, l.Shared.Baggage[key]) {
			left++
		}
	}
	return h.String(), left, nil
}

var errLabelsHeader = fmt.Errorf("the labels do not fit into the header for the check of an HTTP request, of %d bytes, %d labels and %d bytes for each",
	wire.MaxBaggage, wire.MaxBaggageMembers, wire.MaxBaggageMember)

// headerOf is a baggage header with some of the labels.
type headerOf struct {
	strings.Builder
	labels *agentapi.Labels // all of the flow
	n      int
}

// add adds a label, and reports whether it fits.
func (h *headerOf) add(key, value string) bool {
	if written := wire.BaggageKey(key); written != key {
		if _, taken := h.labels.Lookup(written); taken {
			return true // the header cannot tell one from the other
		}
	}
	if h.n == wire.MaxBaggageMembers || len(key)+len(value) > wire.MaxBaggageMember {
		return false
	}
	member := wire.BaggageMember(key, value)
	size := len(member)
	if h.n > 0 {
		size += len(",")
	}
	if len(member) > wire.MaxBaggageMember || h.Len()+size > wire.MaxBaggage {
		return false
	}
	if h.n > 0 {
		h.WriteByte(',')
	}
	h.WriteString(member)
	h.n++
	return true
}

// bounded returns the request as an agent takes it.
func (r *HTTPRequest) bounded() *agentapi.HTTPRequest {
	b := &agentapi.HTTPRequest{
		Method:      boundedText(r.Method),
		Path:        boundedText(r.Path),
		Host:        boundedText(r.Host),
		Scheme:      boundedText(r.Scheme),
		Protocol:    boundedText(r.Protocol),
		Size:        max(r.Size, -1),
		Headers:     make(map[string]string),
		Source:      r.Source,
		Destination: r.Destination,
	}
	// The versions that net/http writes otherwise.
	switch b.Protocol {
	case "HTTP/2.0":
		b.Protocol = "HTTP/2"
	case "HTTP/3.0":
		b.Protocol = "HTTP/3"
	}
	for _, name := range slices.Sorted(maps.Keys(r.Headers)) {
		key := strings.ToValidUTF8(wire.LowerHeader(name), "\uFFFD")
		switch {
		case key == wire.HeaderBaggage:
			b.Own = r.Headers[name] // a peer's labels, which must not replace the application's: that is bug A18
		case key == "", len(key) > labels.MaxKeyLen, !utf8.ValidString(key), labels.IsCredential(key):
		default:
			b.Headers[key] = boundedText(r.Headers[name])
		}
	}
	spelledOnce(b.Headers)
	return b
}

// spelledOnce keeps one header for each label, as labels.FromRequest does. That is the header with "-" in all places, or else the first
// by name. If several were sent, each agent could choose another.
func spelledOnce(headers map[string]string) {
	var kept map[string]string // with "_", by the name with "-" in all places
	for name := range headers {
		if !strings.Contains(name, "_") {
			continue
		}
		plain := strings.ReplaceAll(name, "_", "-")
		if _, ok := headers[plain]; ok {
			delete(headers, name)
			continue
		}
		if kept == nil {
			kept = make(map[string]string)
		}
		if other, ok := kept[plain]; ok {
			delete(headers, max(name, other))
			name = min(name, other)
		}
		kept[plain] = name
	}
}

// boundedText makes a text of a peer's fit what labels may be.
func boundedText(s string) string {
	if len(s) <= labels.MaxValueLen && utf8.ValidString(s) {
		return s
	}
	return wire.Cut(strings.ToValidUTF8(s, "\uFFFD"), labels.MaxValueLen)
}
