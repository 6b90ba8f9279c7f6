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

// HTTPRequest describes an HTTP request to an agent, see [Params]. All of it may come from a peer: what an agent would
// not take is repaired or left out, and never makes a flow Invalid. Start keeps nothing of it.
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
	// Headers that carry credentials are never sent, see package labels. If all exceed 1 MiB, the largest are left out,
	// so give only those that policies need. Clients with [WithBaggage] take labels of the peer from a baggage header.
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
// the request; the flow's other labels travel in the baggage header. Agents differ in which of the two wins. So if the
// application sets one of the request's labels, the value goes into the request as well.
func (c *Client) describe(ctx context.Context, l *agentapi.Labels, of *HTTPRequest) error {
	r, lost := of.bounded()
	l.Shared.HTTP = r
	if c.baggage {
		l.Shared.Baggage = c.httpBaggage(ctx, r.Own)
	}
	for _, layer := range []map[string]string{l.Shared.Baggage, l.Context, l.Params} {
		for key, value := range layer {
			replace(r, key, value)
		}
	}
	carried, left, err := labelsHeader(l)
	if left += lost; left > 0 {
		c.labelLog.warn(c.logger, "headgate: labels were left out of a flow", "left_out", left)
	}
	if carried != "" {
		r.Headers[wire.HeaderBaggage] = carried
	}
	return err
}

// replace puts a label of the flow into the request, if agents make that label of it.
func replace(r *agentapi.HTTPRequest, key, value string) {
	switch key {
	case "http.method":
		r.Method = value
	case "http.target":
		r.Path = value
	case "http.host":
		r.Host = value
	case "http.scheme":
		r.Scheme = value
	case "http.flavor":
		r.Protocol = value
	default:
		label, ok := strings.CutPrefix(key, wire.HeaderLabel)
		if !ok {
			return
		}
		for name := range r.Headers {
			if strings.ReplaceAll(name, "-", "_") == label {
				r.Headers[name] = value
			}
		}
	}
}

// httpBaggage returns the labels of the context's baggage and of the request's own, which may not be in the context.
func (c *Client) httpBaggage(ctx context.Context, own string) map[string]string {
	if own != "" {
		ctx = w3cbaggage.With(ctx, own)
	}
	return labels.FromBaggage(ctx, c.baggageKeys...)
}

// labelsHeader returns the flow's labels as a header, and how many were left out of it. Explicit ones that do not fit
// are an error. Of the others the largest are left out first, and those of peers before defaults.
func labelsHeader(l *agentapi.Labels) (header string, left int, err error) {
	explicit := agentapi.Labels{Params: l.Params, Context: l.Context}
	kept := maps.Clone(explicit.Merged())
	if len(kept) > labels.MaxLabels {
		return "", 0, tooManyLabels(len(kept))
	}
	size := len(wire.Baggage(kept))
	if size > wire.MaxBaggage {
		return "", 0, fmt.Errorf("the labels make a header of %d bytes for the check of an HTTP request, more than %d", size, wire.MaxBaggage)
	}
	if kept == nil {
		kept = make(map[string]string)
	}
	const comma = len(",") // after each member, and so one too many
	if size > 0 {
		size += comma
	}
	for _, layer := range []map[string]string{l.Shared.Defaults, l.Shared.Baggage} {
		keys := bySize(layer)
		slices.Reverse(keys)
		for _, key := range keys {
			// The layers come here in the order in which they are given up, which is not their precedence.
			value, _ := l.Lookup(key)
			if _, known := kept[key]; known {
				continue
			}
			member := len(key) + len("=") + len(value) + comma // or more, where it is escaped
			if size+member <= wire.MaxBaggage+comma {
				member = len(wire.Baggage(map[string]string{key: value})) + comma
			}
			if size+member > wire.MaxBaggage+comma {
				left++
				continue
			}
			size += member
			kept[key] = value
		}
	}
	return wire.Baggage(kept), left, nil
}

// bounded returns the request as an agent takes it, and how many headers were left out because they are too large
// together.
func (r *HTTPRequest) bounded() (b *agentapi.HTTPRequest, left int) {
	b = &agentapi.HTTPRequest{
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
	b.Headers, left = shed(b.Headers, maxPeerLabels)
	return b, left
}

// boundedText makes a text of a peer's fit what labels may be.
func boundedText(s string) string {
	if len(s) <= labels.MaxValueLen && utf8.ValidString(s) {
		return s
	}
	return wire.Cut(strings.ToValidUTF8(s, "\uFFFD"), labels.MaxValueLen)
}
