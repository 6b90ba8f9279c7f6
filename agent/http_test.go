package agent_test

import (
	"encoding/base64"
	"fmt"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// stubHTTP is a client of the bare protocol.
func (s *served) stubHTTP(t testing.TB) checkhttpv1.FlowControlServiceHTTPClient {
	t.Helper()
	return checkhttpv1.NewFlowControlServiceHTTPClient(s.conn(t))
}

// What labels a request comes to.
func TestCheckHTTPLabels(t *testing.T) {
	stub := serve(t, nil).stubHTTP(t)
	type request = checkhttpv1.CheckHTTPRequest_HttpRequest
	numbered := func(n int) map[string]string {
		m := make(map[string]string, n)
		for i := range n {
			m[fmt.Sprintf("a-%03d", i)] = "v"
		}
		return m
	}
	long := strings.Repeat("v", 5000)
	for _, tt := range []struct {
		name    string
		request *request
		labels  map[string]string
		want    map[string]string // those that telemetry has
		more    string            // those that it does not, by their keys
	}{
		{name: "none"},
		{
			name: "all",
			request: &request{
				Method: "POST", Path: "/a%20b?token=secret", Host: "shop.example:8443", Scheme: "https", Protocol: "HTTP/2", Size: 12,
				Headers: map[string]string{"x-tenant": "acme", ":authority": "shop.example", "authorization": "secret", "X-API-Key": "secret"},
			},
			want: map[string]string{
				"http.method": "POST", "http.target": "/a%20b?token=secret", "http.host": "shop.example:8443", "http.scheme": "https", "http.flavor": "2.0",
			},
			more: "http.request.header.x_tenant http.request_content_length",
		},
		{
			name:    "what is not known",
			request: &request{Method: "OPTIONS", Path: "*", Protocol: "HTTP/1.1", Size: -1},
			want:    map[string]string{"http.method": "OPTIONS", "http.target": "*", "http.flavor": "1.1"},
		},
		{
			name:    "an absolute target",
			request: &request{Method: "GET", Path: "http://shop.example/a?token=secret", Protocol: "HTTP/3", Scheme: "http", Size: -1},
			want:    map[string]string{"http.method": "GET", "http.target": "http://shop.example/a?token=secret", "http.scheme": "http", "http.flavor": "3.0"},
		},
		{
			name:    "a target that is none",
			request: &request{Method: "GET", Path: "%", Size: -1},
			want:    map[string]string{"http.method": "GET", "http.target": "%"},
		},
		{
			name: "the request goes before baggage",
			request: &request{Method: "GET", Path: "/", Size: -1, Headers: map[string]string{
				"baggage": "user_id=42,http.method=PUT;p=q,a%20b=1%2C2,plan=k,=bad",
			}},
			want: map[string]string{"http.method": "GET", "http.target": "/", "user_id": "42", "a%20b": "1,2", "plan": "k"},
		},
		{
			name: "keys are not decoded, and what is no member replaces none",
			request: &request{Method: "GET", Path: "/", Size: -1, Headers: map[string]string{
				"baggage": `tenant=other,tenant=acme,%74enant=evil,tenant="x,tenant=%,tenant=a b,tenant=c;",user id=1`,
			}},
			want: map[string]string{"http.method": "GET", "http.target": "/", "tenant": "acme", "%74enant": "evil"},
		},
		{
			name: "labels go before the request, and instead of baggage",
			request: &request{Method: "GET", Path: "/", Host: "h", Size: 7, Headers: map[string]string{
				"baggage": "user_id=41,tenant=other,user%20id=41", "x-tenant": "acme",
			}},
			labels: map[string]string{
				"user_id": "42", "user id": "43", "http.method": "", "http.target": "mine", "http.request_content_length": "1000", "http.request.header.x_tenant": "mine",
			},
			want: map[string]string{"http.method": "", "http.target": "mine", "http.host": "h", "user_id": "42", "user id": "43"},
			more: "http.request_content_length http.request.header.x_tenant",
		},
		{
			name: "too long",
			request: &request{Method: long, Path: "/" + long, Host: long, Scheme: long, Protocol: long, Size: -1, Headers: map[string]string{
				"baggage": "user_id=" + long,
			}},
			want: map[string]string{
				"http.method": long[:4096], "http.target": "/" + long[:4095], "http.host": long[:4096], "http.scheme": long[:4096], "http.flavor": long[:4096],
				"user_id": long[:4096],
			},
		},
		{
			name:    "too many headers leave the rest alone",
			request: &request{Method: "GET", Path: "/", Host: "h", Scheme: "https", Protocol: "HTTP/1.1", Size: 1, Headers: numbered(100)},
			want:    map[string]string{"http.method": "GET", "http.target": "/", "http.host": "h", "http.scheme": "https", "http.flavor": "1.1"},
			more: func() string {
				var more string
				for i := range labels.MaxLabels - 6 {
					more += fmt.Sprintf("http.request.header.a_%03d ", i)
				}
				return more + "http.request_content_length"
			}(),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "point", Request: tt.request, Labels: tt.labels})
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{"aperture.control_point_type": "http"}
			keys := make(map[string]bool)
			for k, v := range tt.want {
				want[k], keys[k] = v, true
			}
			for k := range strings.FieldsSeq(tt.more) {
				keys[k] = true
			}
			if diff := cmp.Diff(want, m.GetCheckResponse().GetTelemetryFlowLabels()); diff != "" {
				t.Errorf("telemetry labels (-want +got):\n%s", diff)
			}
			got := make(map[string]bool)
			for _, k := range m.GetCheckResponse().GetFlowLabelKeys() {
				got[k] = true
			}
			if diff := cmp.Diff(keys, got); diff != "" {
				t.Errorf("label keys (-want +got):\n%s", diff)
			}
		})
	}
}

// What the answer looks like on the wire.
func TestCheckHTTPAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const tenant = "http.request.header.x_tenant"
		stub := serve(t, []policy.Policy{{Name: "rate", Components: []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Fill: 2, Interval: 3 * time.Second, LimitBy: tenant},
			policy.RateLimiter{Selectors: policy.At("teapot"), Capacity: 0, Fill: 0, Interval: time.Second, DeniedStatus: 418},
		}}}).stubHTTP(t)
		check := func(req *checkhttpv1.CheckHTTPRequest) *checkhttpv1.CheckHTTPResponse {
			t.Helper()
			m, err := stub.CheckHTTP(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			// Proxies report the check response from the metadata.
			data, err := base64.StdEncoding.DecodeString(m.GetDynamicMetadata().GetFields()["aperture.check_response"].GetStringValue())
			if err != nil {
				t.Fatal(err)
			}
			inner := new(checkv1.CheckResponse)
			if err := proto.Unmarshal(data, inner); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(m.GetCheckResponse(), inner, protocmp.Transform()); diff != "" {
				t.Errorf("metadata (-check response +metadata):\n%s", diff)
			}
			return m
		}
		request := func(point string, ramp bool) *checkhttpv1.CheckHTTPRequest {
			return &checkhttpv1.CheckHTTPRequest{ControlPoint: point, RampMode: ramp, ExpectEnd: true, Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
				Method: "GET", Path: "/", Headers: map[string]string{"x-tenant": "acme", "baggage": "b=2;p, a=1"},
			}}
		}
		unavailable := &rpcstatus.Status{Code: int32(codes.Unavailable)}
		denied := func(status int32, headers map[string]string) *checkhttpv1.CheckHTTPResponse {
			return &checkhttpv1.CheckHTTPResponse{Status: unavailable, HttpResponse: &checkhttpv1.CheckHTTPResponse_DeniedResponse{
				DeniedResponse: &checkhttpv1.DeniedHttpResponse{Status: status, Headers: headers},
			}}
		}
		for _, tt := range []struct {
			name string
			req  *checkhttpv1.CheckHTTPRequest
			want *checkhttpv1.CheckHTTPResponse
		}{
			{"accepted", request("point", false), &checkhttpv1.CheckHTTPResponse{
				Status: &rpcstatus.Status{},
				HttpResponse: &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{
					Headers: map[string]string{"baggage": "a=1,b=2"},
				}},
			}},
			{"rejected, by a reason", request("point", false), denied(429, map[string]string{"retry-after": "2"})}, // 1.5 s
			{"rejected, by a policy's status", request("teapot", false), denied(418, nil)},
			{"rejected in ramp mode", request("elsewhere", true), denied(403, nil)},
			{"no labels", &checkhttpv1.CheckHTTPRequest{ControlPoint: "elsewhere"}, &checkhttpv1.CheckHTTPResponse{
				Status:       &rpcstatus.Status{},
				HttpResponse: &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{}},
			}},
		} {
			got := check(tt.req)
			inner := got.GetCheckResponse()
			if inner.GetControlPoint() != tt.req.GetControlPoint() || inner.GetExpectEnd() != tt.req.GetExpectEnd() || inner.GetWaitTime() != nil {
				t.Errorf("%s: check response = %v want the request's control point and no wait", tt.name, inner)
			}
			got.CheckResponse, got.DynamicMetadata = nil, nil
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Errorf("%s: answer (-want +got):\n%s", tt.name, diff)
			}
		}
	})
}

// Only a request that says nothing of where it is from is refused.
func TestCheckHTTPInvalidArgument(t *testing.T) {
	stub := serve(t, nil).stubHTTP(t)
	for point, want := range map[string]codes.Code{"": codes.InvalidArgument, strings.Repeat("p", 256): codes.OK} {
		if _, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: point}); status.Code(err) != want {
			t.Errorf("control point of %d bytes: error = %v want %v", len(point), err, want)
		}
	}
}

// A flow is decided about the same way whether the agent gets its labels by Check or makes them of the request.
func TestCheckHTTPDecidesAsCheck(t *testing.T) {
	const tenant = "http.request.header.x_tenant"
	at := policy.At("point")
	for _, tt := range []struct {
		name      string
		component policy.Component
		params    flowctl.Params
	}{
		{"no limit", nil, flowctl.Params{}},
		{"rate, for all", policy.RateLimiter{Selectors: at, Capacity: 2, Fill: 1, Interval: time.Second}, flowctl.Params{}},
		{"rate, by a header", policy.RateLimiter{Selectors: at, Capacity: 2, Fill: 1, Interval: 10 * time.Second, LimitBy: tenant}, flowctl.Params{}},
		{"rate, by the target", policy.RateLimiter{Selectors: at, Capacity: 2, Fill: 1, Interval: 10 * time.Second, LimitBy: "http.target"}, flowctl.Params{}},
		{"rate, by a label", policy.RateLimiter{Selectors: at, Capacity: 2, Fill: 1, Interval: 10 * time.Second, LimitBy: "user id"}, flowctl.Params{Labels: map[string]string{"user id": "50% + ü"}}},
		{"rate, by a label that is not there", policy.RateLimiter{Selectors: at, LimitBy: "other", Interval: time.Second}, flowctl.Params{}},
		{"rate, at a cost", policy.RateLimiter{Selectors: at, Capacity: 5, Fill: 1, Interval: time.Second, TokensLabel: "cost"}, flowctl.Params{Labels: map[string]string{"cost": "2.5"}}},
		{"a status", policy.RateLimiter{Selectors: at, Capacity: 1, Interval: time.Second, DeniedStatus: 402}, flowctl.Params{}},
		{"slots", policy.ConcurrencyLimiter{Selectors: at, Max: 2, MaxInflight: time.Hour, LimitBy: tenant}, flowctl.Params{}},
		{"ramp mode", nil, flowctl.Params{RampMode: true}},
		{"the target that the application sets itself", policy.RateLimiter{Selectors: at, Capacity: 2, Fill: 1, Interval: time.Second, LimitBy: "http.target"}, flowctl.Params{Labels: map[string]string{"http.target": "mine"}}},
		{"a label that the application sets itself", policy.RateLimiter{Selectors: at, Capacity: 2, Fill: 1, Interval: time.Second, LimitBy: tenant}, flowctl.Params{Labels: map[string]string{tenant: "mine"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var components []policy.Component
				if tt.component != nil {
					components = append(components, tt.component)
				}
				policies := []policy.Policy{{Name: "p", Components: append(components, policy.RateLimiter{Selectors: policy.At("elsewhere"), Interval: time.Second})}}
				asked, askedHTTP := serve(t, policies).client(t), serve(t, policies).client(t)
				ctx := labels.WithTransport(t.Context(), map[string]string{
					"http.method": "GET", "http.target": "/orders", "http.host": "shop.example", "http.scheme": "https", "http.flavor": "2.0", tenant: "acme",
				})
				withHTTP := tt.params
				withHTTP.HTTP = &flowctl.HTTPRequest{
					Method: "GET", Path: "/orders", Host: "shop.example", Scheme: "https", Protocol: "HTTP/2.0", Size: -1,
					Headers: map[string]string{"x-tenant": "acme"},
				}
				var flows [2][]*flowctl.Flow
				for i := range 4 {
					flows[0] = append(flows[0], asked.Start(ctx, "point", tt.params))
					flows[1] = append(flows[1], askedHTTP.Start(ctx, "point", withHTTP))
					a, b := flows[0][i], flows[1][i]
					if a.Decision() != b.Decision() || a.ShouldRun() != b.ShouldRun() || a.RejectReason() != b.RejectReason() || a.HTTPStatus() != b.HTTPStatus() {
						t.Fatalf("flow %d: %v, %v want %v, %v", i, b, b.Err(), a, a.Err())
					}
					if wait, want := b.RetryAfter(), a.RetryAfter(); wait < want || wait >= want+time.Second || wait%time.Second != 0 {
						t.Errorf("flow %d: RetryAfter() = %v want %v in whole seconds", i, wait, want)
					}
					want, got := a.CheckResponse(), b.CheckResponse()
					for _, m := range []*checkv1.CheckResponse{want, got} {
						maps.DeleteFunc(m.TelemetryFlowLabels, func(k, _ string) bool { return k == "aperture.control_point_type" || k == tenant })
						// Compared above: the one is in whole seconds, the other there for every rejection.
						m.WaitTime, m.DeniedResponseStatusCode = nil, checkv1.StatusCode_Empty
						m.AgentId, m.SettlementId = 0, 0 // one of two agents, and random
					}
					slotID := protocmp.IgnoreFields(&checkv1.LimiterDecision_ConcurrencyLimiterInfo{}, "request_id")
					if diff := cmp.Diff(want, got, protocmp.Transform(), slotID); diff != "" {
						t.Errorf("flow %d: answers (-Check +CheckHTTP):\n%s", i, diff)
					}
					if answer, ok := b.HTTPAnswer(); !ok || len(answer.Header["baggage"]) > 0 || answer.Status != 0 && answer.Status != b.HTTPStatus() {
						t.Errorf("flow %d: HTTPAnswer() = %+v, %v", i, answer, ok)
					}
				}
				for i := range flows[0] {
					want, err1 := flows[0][i].End(ctx)
					got, err2 := flows[1][i].End(ctx)
					if want != got || err1 != nil || err2 != nil {
						t.Errorf("flow %d: End() = %+v, %v want %+v, %v", i, got, err2, want, err1)
					}
				}
			})
		})
	}
}

// Whatever a client sends, it gets an answer, unless it names no control point, and holds nothing when it has ended.
func FuzzCheckHTTP(f *testing.F) {
	type request = checkhttpv1.CheckHTTPRequest_HttpRequest
	for _, m := range []*checkhttpv1.CheckHTTPRequest{
		{},
		{ControlPoint: "point"},
		{ControlPoint: "point", RampMode: true, Request: &request{}},
		{ControlPoint: "point", ExpectEnd: true, Request: &request{Headers: map[string]string{"baggage": "user_id=u", "x-user": "1"}}},
		{ControlPoint: "point", Request: &request{
			Method: "GET", Path: "//a?b#c", Host: ":", Scheme: "wss", Protocol: "HTTP/9", Size: -1 << 63,
			Headers: map[string]string{"": "", ":path": "/", "Cookie": "secret", "baggage": "=,a=%ff,b;c"},
		}, Source: &checkhttpv1.SocketAddress{Protocol: 7, Address: "nowhere", Port: 1 << 31}},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	e, err := engine.New(slots(2))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = e.Close() })
	var service checkhttpv1.FlowControlServiceHTTPServer
	var ends checkv1.FlowControlServiceServer
	agent.Register(registrar(func(impl any) {
		if s, ok := impl.(checkhttpv1.FlowControlServiceHTTPServer); ok {
			service = s
		}
		if s, ok := impl.(checkv1.FlowControlServiceServer); ok {
			ends = s
		}
	}), e)
	f.Fuzz(func(t *testing.T, data []byte) {
		req := new(checkhttpv1.CheckHTTPRequest)
		if proto.Unmarshal(data, req) != nil {
			return
		}
		m, err := service.CheckHTTP(t.Context(), req)
		if err != nil {
			if req.GetControlPoint() != "" || status.Code(err) != codes.InvalidArgument {
				t.Fatalf("CheckHTTP() = %v", err)
			}
			return
		}
		if _, err := proto.Marshal(m); err != nil {
			t.Fatalf("the answer cannot be sent: %v", err)
		}
		for key := range m.GetCheckResponse().GetTelemetryFlowLabels() {
			if name, ok := strings.CutPrefix(key, "http.request.header."); ok {
				t.Fatalf("the header %q is reported", name)
			}
		}
		endAll(t, ends, req.GetControlPoint(), m.GetCheckResponse())
	})
}
