package agent

import (
	"cmp"
	"context"
	"net/http"
	"strconv"
	"strings"

	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

func (s service) CheckHTTP(ctx context.Context, m *checkhttpv1.CheckHTTPRequest) (*checkhttpv1.CheckHTTPResponse, error) {
	carried := wire.ReadBaggage(m.GetRequest().GetHeaders()[wire.HeaderBaggage])
	named := s.server.engine.NamedLabels()
	req := seam.Request{
		ControlPoint: m.GetControlPoint(),
		Labels: seam.Labels{
			Params: carried,
			Base:   &seam.Base{Transport: requestLabels(m.GetRequest(), named), RampMode: m.GetRampMode(), DryRun: m.GetDryRun()},
		},
	}
	response, err := s.decide(ctx, &req)
	if err != nil {
		return nil, err
	}
	response.ExpectEnd = m.GetExpectEnd()
	return wire.HTTPResponse(response, wire.Baggage(carried), named), nil
}

const headerLabel = "http.request.header."

// requestLabels are the labels that a request has by itself. Headers that carry credentials become labels only if a
// policy names them.
func requestLabels(m *checkhttpv1.CheckHTTPRequest_HttpRequest, named map[string]bool) map[string]string {
	if m == nil {
		return nil
	}
	derived := make(map[string]string, 6+len(m.GetHeaders()))
	set := func(key, value string) {
		if value != "" {
			derived[key] = value
		}
	}
	set("http.method", cmp.Or(m.GetMethod(), http.MethodGet))
	set("http.target", m.GetPath()) // as it was sent, with the query
	set("http.host", m.GetHost())
	set("http.scheme", m.GetScheme())
	set("http.flavor", flavor(m.GetProtocol()))
	if size := m.GetSize(); size >= 0 {
		set("http.request_content_length", strconv.FormatInt(size, 10))
	}
	for label, header := range headersOf(m.GetHeaders()) {
		if _, wanted := named[label]; wanted || !labels.IsCredential(header) {
			derived[label] = m.GetHeaders()[header]
		}
	}
	return derived
}

// flavor is the version of HTTP as labels have it.
func flavor(protocol string) string {
	switch version := strings.TrimPrefix(protocol, "HTTP/"); version {
	case "2", "3":
		return version + ".0"
	default:
		return version
	}
}

// headersOf gives the header that each label is made of. A proxy sets x-user, and passes on what else came: neither x_user
// nor X-User may take the place of what it set, though all three would become one label.
func headersOf(headers map[string]string) map[string]string {
	// Smaller is preferred: as HTTP/2 has it, then without "_".
	rank := func(name string) int {
		r := 0
		if name != strings.ToLower(name) {
			r = 1
		}
		if strings.Contains(name, "_") {
			r += 2
		}
		return r
	}
	chosen := make(map[string]string, len(headers))
	for name := range headers {
		if strings.EqualFold(name, wire.HeaderBaggage) || strings.HasPrefix(name, ":") || name == "" {
			continue
		}
		label := headerLabel + strings.ReplaceAll(strings.ToLower(name), "-", "_")
		if other, taken := chosen[label]; !taken || cmp.Or(cmp.Compare(rank(name), rank(other)), cmp.Compare(name, other)) < 0 {
			chosen[label] = name
		}
	}
	return chosen
}
