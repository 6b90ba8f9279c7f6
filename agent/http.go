package agent

import (
	"context"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

func (s service) CheckHTTP(ctx context.Context, m *checkhttpv1.CheckHTTPRequest) (*checkhttpv1.CheckHTTPResponse, error) {
	carried := labels.Repair(wire.ReadBaggage(m.GetRequest().GetHeaders()[wire.HeaderBaggage]))
	req := seam.Request{
		ControlPoint: m.GetControlPoint(),
		Labels: seam.Labels{
			Params: carried,
			Base:   &seam.Base{Transport: requestLabels(m.GetRequest()), RampMode: m.GetRampMode()},
		},
	}
	response, err := s.decide(ctx, &req)
	if err != nil {
		return nil, err
	}
	response.ExpectEnd = m.GetExpectEnd()
	return wire.HTTPResponse(response, wire.Baggage(carried)), nil
}

// ownLabels is how many labels a request has without its headers.
const ownLabels = 6

// requestLabels are the labels that a request has by itself. Headers are cut off before the others: it is a peer who
// says how many there are.
func requestLabels(m *checkhttpv1.CheckHTTPRequest_HttpRequest) map[string]string {
	if m == nil {
		return nil
	}
	r := &http.Request{
		Method:        m.GetMethod(),
		RequestURI:    m.GetPath(),
		Host:          m.GetHost(),
		Proto:         m.GetProtocol(),
		ContentLength: m.GetSize(),
		Header:        make(http.Header, len(m.GetHeaders())),
	}
	r.URL, _ = url.ParseRequestURI(m.GetPath()) // nil if it is none
	// The versions as net/http writes them.
	switch r.Proto {
	case "HTTP/2":
		r.Proto = "HTTP/2.0"
	case "HTTP/3":
		r.Proto = "HTTP/3.0"
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(m.GetHeaders())) {
		if len(names) == labels.MaxLabels-ownLabels {
			break
		}
		if !strings.EqualFold(name, wire.HeaderBaggage) && !strings.HasPrefix(name, ":") && !labels.IsCredential(name) {
			names = append(names, name)
			r.Header.Add(name, m.GetHeaders()[name])
		}
	}
	derived := labels.FromRequest(r, names...)
	delete(derived, "http.scheme") // which is that of a connection
	if scheme := m.GetScheme(); scheme != "" {
		derived["http.scheme"] = scheme
	}
	return labels.Repair(derived)
}
