package agent

import (
	"bytes"
	"cmp"
	"context"
	"net/http"
	"strconv"
	"strings"

	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

func (s handler) CheckHTTP(ctx context.Context, m *checkhttpv1.CheckHTTPRequest) (*checkhttpv1.CheckHTTPResponse, error) {
	named := s.service.engine.NamedLabels()
	chosen, ok := headersOf(m.GetRequest().GetHeaders())
	if !ok && m.GetControlPoint() != "" {
		denied := rejection(m.GetControlPoint(), agentapi.ReasonNone, http.StatusBadRequest)
		denied.ExpectEnd = m.GetExpectEnd()
		return wire.HTTPResponse(denied, "", named), nil
	}
	derived := requestLabels(m.GetRequest(), chosen, named)
	carried, baggage := m.GetLabels(), ""
	if len(carried) == 0 {
		carried, baggage = carriedLabels(baggageOf(m.GetRequest().GetHeaders()), named)
		for key := range carried {
			// A peer can add baggage to a request through a proxy. It must not replace headers that the proxy sets.
			if _, taken := derived[key]; taken {
				delete(carried, key)
			}
		}
	}
	req := agentapi.Request{
		ControlPoint: m.GetControlPoint(),
		Labels: agentapi.Labels{
			Params: carried,
			Shared: &agentapi.Shared{
				Layers: agentapi.Layers{Transport: derived},
				Options: agentapi.Options{
					RampMode: m.GetRampMode(), DryRun: m.GetDryRun(), Waiting: wire.Waiting(m.GetMaxWait()),
				},
			},
		},
	}
	response, err := s.decide(ctx, &req, m.GetSessionCheck(), wire.MaxHTTPDecisions)
	if err != nil {
		return nil, err
	}
	response.ExpectEnd = m.GetExpectEnd()
	return wire.HTTPResponse(response, baggage, named), nil
}

// requestLabels are the labels that a request has by itself. Headers that carry credentials become labels only if a
// policy names them.
func requestLabels(m *checkhttpv1.CheckHTTPRequest_HttpRequest, chosen map[string]string, named map[string]bool) map[string]string {
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
	for label, header := range chosen {
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

// headersOf returns the header that each label is made of. If a proxy sets x-user and passes on the other headers, none
// of these may replace it. So x_user does not count if there is x-user. ok is false if headers are ambiguous: two that
// differ only by case, or two that differ only in the places of "_".
func headersOf(headers map[string]string) (chosen map[string]string, ok bool) {
	chosen = make(map[string]string, len(headers))
	var beside map[string]string  // headers with "_"
	var ambiguous map[string]bool // labels of several headers with "_"
	carries := false
	for name := range headers {
		if wire.LowerHeader(name) == wire.HeaderBaggage {
			if carries {
				return nil, false
			}
			carries = true
			continue
		}
		if strings.HasPrefix(name, ":") || name == "" {
			continue
		}
		label := wire.HeaderLabel + strings.ReplaceAll(wire.LowerHeader(name), "-", "_")
		of := chosen
		if strings.Contains(name, "_") {
			if beside == nil {
				beside, ambiguous = make(map[string]string), make(map[string]bool)
			}
			of = beside
		}
		if other, taken := of[label]; taken {
			if wire.LowerHeader(name) == wire.LowerHeader(other) {
				return nil, false
			}
			ambiguous[label] = true // only names with "_" differ in more than case
		}
		of[label] = name
	}
	for label, name := range beside {
		if _, taken := chosen[label]; taken {
			continue
		}
		if ambiguous[label] {
			return nil, false
		}
		chosen[label] = name
	}
	return chosen, true
}

// baggageOf is the baggage header, in whichever case; "" if there is none. headersOf refuses several.
func baggageOf(headers map[string]string) string {
	for name, value := range headers {
		if wire.LowerHeader(name) == wire.HeaderBaggage {
			return value
		}
	}
	return ""
}

// carriedLabels returns the labels in the baggage header, and the header to pass on. If the header is longer than
// others read, it returns only the labels that are needed, and no header.
func carriedLabels(header string, named map[string]bool) (carried map[string]string, baggage string) {
	if len(header) <= wire.MaxBaggage {
		carried = w3cbaggage.Read(header)
		return carried, wire.Baggage(carried)
	}
	members := []byte(header)
	labels := picked{named: named, escaped: bytes.IndexByte(members, '%') >= 0}
	for m, rest := w3cbaggage.NextMember(members, 0); rest > 0; m, rest = w3cbaggage.NextMember(members, rest) {
		labels.add(members[m.KeyFrom:m.KeyTo], members[m.ValueFrom:m.ValueTo])
	}
	return labels.labels(), ""
}
