package wire

import (
	"cmp"
	"encoding/base64"
	"maps"
	"net/netip"
	"strconv"
	"strings"
	"time"

	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
)

const (
	typeHTTP = "http"

	// HeaderLabel is what the label of a header begins with. Such labels are not reported for a request, and neither is
	// the one of its length.
	HeaderLabel = "http.request.header."
	lengthLabel = "http.request_content_length"

	headerRetryAfter = "retry-after"

	// metadataResponse is where proxies look for the check response that they are to report.
	metadataResponse = "aperture.check_response"
)

// HTTPRequest is the message that asks about a flow that is an HTTP request. The request is in the place of the
// transport's layer, so no default is among the labels that the request has by itself.
func HTTPRequest(req *agentapi.Request) *checkhttpv1.CheckHTTPRequest {
	r := req.Labels.HTTP()
	return &checkhttpv1.CheckHTTPRequest{
		Source:      socket(r.Source),
		Destination: socket(r.Destination),
		Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
			Method:   r.Method,
			Headers:  r.Headers,
			Path:     r.Path,
			Host:     r.Host,
			Scheme:   r.Scheme,
			Size:     r.Size,
			Protocol: r.Protocol,
		},
		ControlPoint: req.ControlPoint,
		RampMode:     req.RampMode(),
		ExpectEnd:    true,
		DryRun:       req.DryRun(),
		MaxWait:      maxWait(req),
		Labels:       req.Labels.Merged(),
	}
}

func socket(a netip.AddrPort) *checkhttpv1.SocketAddress {
	if !a.IsValid() {
		return nil
	}
	return &checkhttpv1.SocketAddress{Address: a.Addr().Unmap().WithZone("").String(), Port: uint32(a.Port())}
}

// HTTPResponse is the answer to CheckHTTP with a check response, which becomes part of it. An accepted request gets its
// baggage header back, unless the header is longer than others read. Telemetry has labels of headers only if they are
// wanted.
func HTTPResponse(c *checkv1.CheckResponse, baggage string, wanted map[string]bool) *checkhttpv1.CheckHTTPResponse {
	if c.GetTelemetryFlowLabels() == nil {
		c.TelemetryFlowLabels = make(map[string]string)
	}
	maps.DeleteFunc(c.GetTelemetryFlowLabels(), func(key, _ string) bool {
		return (key == lengthLabel || strings.HasPrefix(key, HeaderLabel)) && !wanted[key]
	})
	c.TelemetryFlowLabels[typeLabel] = typeHTTP

	m := &checkhttpv1.CheckHTTPResponse{CheckResponse: c}
	if c.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		ok := new(checkhttpv1.OkHttpResponse)
		if baggage != "" && len(baggage) <= MaxBaggage {
			ok.Headers = map[string]string{HeaderBaggage: baggage}
		}
		m.Status = &rpcstatus.Status{Code: int32(codes.OK)}
		m.HttpResponse = &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: ok}
	} else {
		denied := &checkhttpv1.DeniedHttpResponse{Status: deniedHTTPStatus(c)}
		if wait := c.GetWaitTime().AsDuration(); wait > 0 {
			denied.Headers = map[string]string{headerRetryAfter: retryAfter(wait)}
		}
		c.WaitTime = nil // its place is the header
		m.Status = &rpcstatus.Status{Code: int32(codes.Unavailable)}
		m.HttpResponse = &checkhttpv1.CheckHTTPResponse_DeniedResponse{DeniedResponse: denied}
	}
	if data, err := proto.Marshal(c); err == nil {
		m.DynamicMetadata = &structpb.Struct{Fields: map[string]*structpb.Value{
			metadataResponse: structpb.NewStringValue(base64.StdEncoding.EncodeToString(data)),
		}}
	}
	return m
}

// deniedHTTPStatus is the rejection's status, or one by its reason.
func deniedHTTPStatus(c *checkv1.CheckResponse) int32 {
	byReason := statusByReason(agentapi.Reason(c.GetRejectReason()))
	return int32(cmp.Or(c.GetDeniedResponseStatusCode(), byReason, checkv1.StatusCode_Forbidden))
}

// retryAfter is the wait in seconds. It is rounded up, because an earlier retry would be rejected.
func retryAfter(wait time.Duration) string {
	seconds := int64(wait / time.Second)
	if wait%time.Second > 0 {
		seconds++
	}
	return strconv.FormatInt(seconds, 10)
}

// ReadHTTP fills the verdict from an agent's answer to CheckHTTP, as [Read] does. It copies the decision, and the
// status and wait of a rejection, into the answer's check response. If there is no check response, it makes one.
func ReadHTTP(req *agentapi.Request, m *checkhttpv1.CheckHTTPResponse, v *agentapi.Verdict) {
	accepted := isAccepted(m)
	if m.GetCheckResponse() == nil {
		m.CheckResponse = &checkv1.CheckResponse{ControlPoint: req.ControlPoint, ExpectEnd: true}
	}
	c := m.GetCheckResponse()
	noRamp := matchedNoRamp(c) // before it gets a status
	c.DecisionType = checkv1.CheckResponse_DECISION_TYPE_ACCEPTED
	if !accepted {
		c.DecisionType = checkv1.CheckResponse_DECISION_TYPE_REJECTED
		if s := m.GetDeniedResponse().GetStatus(); s >= 400 && s <= 599 {
			c.DeniedResponseStatusCode = checkv1.StatusCode(s)
		}
		if wait := readRetryAfter(m.GetDeniedResponse().GetHeaders()); wait > 0 && c.GetWaitTime() == nil {
			c.WaitTime = durationpb.New(wait)
		}
	}
	read(req, c, v, noRamp)
}

// readRetryAfter is the wait that the headers have in seconds; 0 if they have none.
func readRetryAfter(headers map[string]string) time.Duration {
	seconds, err := strconv.ParseUint(header(headers, headerRetryAfter), 10, 32)
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// isAccepted reports whether the answer accepts the request, by its status. Without a status it does so only if the
// rest of the answer leaves no doubt.
func isAccepted(m *checkhttpv1.CheckHTTPResponse) bool {
	if m.GetStatus() != nil {
		return m.GetStatus().GetCode() == int32(codes.OK)
	}
	return m.GetDeniedResponse() == nil && (m.GetCheckResponse() != nil || m.GetOkResponse() != nil) &&
		m.GetCheckResponse().GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED
}

// LowerHeader returns a header's name in lower case. Only ASCII letters change. If others did, a header could count as
// another one.
func LowerHeader(name string) string {
	for i := range len(name) {
		if b := name[i]; b >= 'A' && b <= 'Z' {
			lower := []byte(name)
			for ; i < len(lower); i++ {
				if lower[i] >= 'A' && lower[i] <= 'Z' {
					lower[i] += 'a' - 'A'
				}
			}
			return string(lower)
		}
	}
	return name
}

// header finds a header by its name in lower case, which the agent may have written otherwise.
func header(headers map[string]string, name string) string {
	if v, ok := headers[name]; ok {
		return v
	}
	for key, v := range headers {
		if LowerHeader(key) == name {
			return v
		}
	}
	return ""
}

// OKHeaders returns the headers that the agent wants set in the accepted request. A baggage header among them has the
// request's own members and those that the agent added. The flow's labels in it were for the agent alone.
func OKHeaders(r *agentapi.HTTPRequest, m *checkhttpv1.CheckHTTPResponse) map[string]string {
	headers := maps.Clone(m.GetOkResponse().GetHeaders())
	for key, value := range headers {
		if LowerHeader(key) != HeaderBaggage {
			continue
		}
		added := addedBaggage(value, r.Headers[HeaderBaggage])
		if len(added) == 0 {
			delete(headers, key)
			continue
		}
		if r.Own != "" {
			added = append([]string{r.Own}, added...)
		}
		headers[key] = strings.Join(added, ",")
	}
	return headers
}
