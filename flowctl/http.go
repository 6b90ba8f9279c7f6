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

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

// HTTPRequest describes an HTTP request to an agent, see [Params]. All of it may come from a peer: what an agent would
// not take is repaired or left out, and never makes a flow Invalid. Start keeps nothing of it.
type HTTPRequest struct {
	Method string

	// Path is as it was sent, still escaped. With the query, the agent sees that too.
	Path string

	Host     string
	Scheme   string // http or https
	Protocol string // HTTP/1.1, HTTP/2

	// Size is the bytes of the body; negative when nobody knows.
	Size int64

	// Headers are what the agent may see, by names in lower case, repeated values joined with ",". Those that carry
	// credentials are never sent, see package labels. Of more than 64 those with the smallest names are: send what
	// policies need, because otherwise a peer can send so many that others are left out. A header baggage is a peer's word on
	// labels, which counts for clients with [WithBaggage].
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

// HTTPAnswer is what an agent wants done with an HTTP request. Names of headers are as the agent writes them, which is
// in lower case as a rule.
type HTTPAnswer struct {
	// Status is what to answer a rejected request with, within 400 to 599 and the same as [Flow.HTTPStatus] says; 0
	// for one that was accepted.
	Status int

	// Header is to be set in the response to a rejected request, or in an accepted request before it is handled. A
	// baggage header in it has the request's own members and those that the agent added, and not the flow's labels,
	// which were sent to the agent in it.
	Header map[string]string

	// Body is for the answer to a rejected request.
	Body string
}

// HTTPAnswer is what the agent says of the flow's [HTTPRequest]; ok is false when no agent was told of one, or none
// answered. It is the caller's own copy. Whether it is about an accepted request or a rejected one is Decision's to say.
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
		answer.Status = f.deniedStatus()
	}
	return answer, true
}

var errHTTPCache = errors.New("the parameters have both an HTTP request and cache keys, which its check cannot look up")

// describe has the agent asked about an HTTP request, which goes into the options, which are the flow's own. The agent makes
// labels of the request; the flow's others travel in the baggage header, which is where agents look for labels that go
// before those.
func (c *Client) describe(ctx context.Context, l *agentapi.Labels, of *HTTPRequest) error {
	r := of.bounded()
	l.Shared.HTTP = r
	if c.baggage {
		l.Shared.Baggage = c.httpBaggage(ctx, r.Own)
	}
	carried, err := labelsHeader(l)
	if carried != "" {
		r.Headers[wire.HeaderBaggage] = carried
	}
	return err
}

// httpBaggage is the labels in the context's baggage and in that which the request brought, in case nobody has put it
// into the context.
func (c *Client) httpBaggage(ctx context.Context, own string) map[string]string {
	known := labels.FromBaggage(ctx, c.baggageKeys...)
	bag, _ := baggage.Parse(own) // what is good of it
	m := labels.FromBaggage(baggage.ContextWithBaggage(ctx, bag), c.baggageKeys...)
	if m == nil {
		return known
	}
	maps.Copy(m, known)
	return m
}

// labelsHeader is the flow's labels as a header. Explicit ones that do not fit are an error; the others give way, those
// of peers first.
func labelsHeader(l *agentapi.Labels) (string, error) {
	var problem error
	for _, others := range []agentapi.Layers{l.Shared.Layers, {Defaults: l.Shared.Defaults}, {}} {
		kept := agentapi.Labels{Params: l.Params, Context: l.Context, Shared: &agentapi.Shared{Layers: others}}
		m := kept.Merged()
		if len(m) > labels.MaxLabels {
			problem = tooManyLabels(len(m))
			continue
		}
		h := wire.Baggage(m)
		if len(h) <= wire.MaxBaggage {
			return h, nil
		}
		problem = fmt.Errorf("the labels make a header of %d bytes for the check of an HTTP request, more than %d", len(h), wire.MaxBaggage)
	}
	return "", problem
}

// bounded is the request as an agent takes it.
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
		case len(b.Headers) == labels.MaxLabels, key == "", len(key) > labels.MaxKeyLen, !utf8.ValidString(key), labels.IsCredential(key):
		default:
			b.Headers[key] = boundedText(r.Headers[name])
		}
	}
	return b
}

// boundedText makes a text of a peer's fit what labels may be.
func boundedText(s string) string {
	if len(s) <= labels.MaxValueLen && utf8.ValidString(s) {
		return s
	}
	return wire.Cut(strings.ToValidUTF8(s, "\uFFFD"), labels.MaxValueLen)
}
