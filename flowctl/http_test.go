package flowctl_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/baggage"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/labels"
)

// patient is a client that waits for a busy machine.
func patient(agent *flowtest.Agent, opts ...flowctl.Option) *flowctl.Client {
	return agent.Client(append(opts, flowctl.WithCheckTimeout(time.Minute))...)
}

// get is an HTTP request with these headers.
func get(headers map[string]string) *flowctl.HTTPRequest {
	return &flowctl.HTTPRequest{Method: "GET", Path: "/orders/7", Host: "shop.example", Scheme: "https", Protocol: "HTTP/1.1", Size: -1, Headers: headers}
}

// parsed is a context with OpenTelemetry baggage.
func parsed(t *testing.T, header string) context.Context {
	t.Helper()
	bag, err := baggage.Parse(header)
	if err != nil {
		t.Fatal(err)
	}
	return baggage.ContextWithBaggage(t.Context(), bag)
}

func TestCheckHTTPRequest(t *testing.T) {
	long := strings.Repeat("v", 5000)
	for _, tt := range []struct {
		name    string
		params  flowctl.Params
		request *flowctl.HTTPRequest
		want    *checkhttpv1.CheckHTTPRequest
	}{
		{
			name:   "all of it",
			params: flowctl.Params{Labels: map[string]string{"user_id": "u:1"}, RampMode: true},
			request: &flowctl.HTTPRequest{
				Method: "POST", Path: "/a%20b?q=1", Host: "shop.example:8443", Scheme: "https", Protocol: "HTTP/2.0", Size: 12,
				Headers: map[string]string{"x-tenant": "acme", "Accept": "*/*"},
				Source:  netip.MustParseAddrPort("[::ffff:10.0.0.1]:4711"), Destination: netip.MustParseAddrPort("[fe80::1%eth0]:443"),
			},
			want: &checkhttpv1.CheckHTTPRequest{
				Source: &checkhttpv1.SocketAddress{Address: "10.0.0.1", Port: 4711}, Destination: &checkhttpv1.SocketAddress{Address: "fe80::1", Port: 443},
				RampMode: true, Labels: map[string]string{"user_id": "u:1"},
				Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
					Method: "POST", Path: "/a%20b?q=1", Host: "shop.example:8443", Scheme: "https", Protocol: "HTTP/2", Size: 12,
					Headers: map[string]string{"x-tenant": "acme", "accept": "*/*", "baggage": "user_id=u:1"},
				},
			},
		},
		{
			name: "nothing", request: &flowctl.HTTPRequest{},
			want: &checkhttpv1.CheckHTTPRequest{Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{}},
		},
		{
			name: "A18 credentials",
			request: &flowctl.HTTPRequest{Headers: map[string]string{
				"authorization": "secret", "Cookie": "secret", "X-API-KEY": "secret", "x_auth_token": "secret", "x-user": "42",
			}},
			want: &checkhttpv1.CheckHTTPRequest{Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: map[string]string{"x-user": "42"}}},
		},
		{
			name: "what no agent would take",
			request: &flowctl.HTTPRequest{
				Method: "G\xffT", Path: "/" + long, Host: strings.Repeat("ü", 3000), Scheme: "\xff", Protocol: "HTTP/3.0", Size: -7,
				Headers: map[string]string{"": "x", strings.Repeat("k", 256): "x", "k\xff": "x", "long": long, "bad": "x\xff"},
			},
			want: &checkhttpv1.CheckHTTPRequest{Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
				Method: "G\uFFFDT", Path: "/" + long[:4095], Host: strings.Repeat("ü", 2048), Scheme: "\uFFFD", Protocol: "HTTP/3", Size: -1,
				Headers: map[string]string{"k\uFFFD": "x", "long": long[:4096], "bad": "x\uFFFD"},
			}},
		},
		{
			name: "spellings of one label",
			request: &flowctl.HTTPRequest{Headers: map[string]string{
				"X_User": "peer", "x-user": "proxy", "a_b-c": "1", "a-b_c": "2", "a_b_c": "3", "x_plan": "alone",
			}},
			want: &checkhttpv1.CheckHTTPRequest{Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
				Headers: map[string]string{"x-user": "proxy", "a-b_c": "2", "x_plan": "alone"},
			}},
		},
		{
			name:    "many headers",
			request: &flowctl.HTTPRequest{Headers: many("k", 90)},
			want:    &checkhttpv1.CheckHTTPRequest{Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: many("k", 90)}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			tt.params.HTTP, tt.params.CheckTimeout = tt.request, time.Minute
			if flow := agent.Client().Start(t.Context(), "point", tt.params); flow.Decision() != flowctl.Accepted {
				t.Fatalf("%v, %v want accepted", flow.Decision(), flow.Err())
			}
			tt.want.ControlPoint, tt.want.ExpectEnd = "point", true
			check := agent.Checks()[0]
			if diff := cmp.Diff(tt.want, check.HTTP, protocmp.Transform()); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			if check.Timeout <= 0 || check.Timeout > time.Minute {
				t.Errorf("the agent was given %v want up to a minute", check.Timeout)
			}
		})
	}
}

// The labels that an agent gets besides the request. The transport layer is the request itself.
func TestHTTPLabels(t *testing.T) {
	for _, tt := range []struct {
		name    string
		ctx     func(*testing.T) context.Context
		opts    []flowctl.Option
		labels  map[string]string
		headers map[string]string
		want    map[string]string
	}{
		{name: "none"},
		{
			name: "the order",
			ctx: func(t *testing.T) context.Context {
				ctx := labels.WithTransport(parsed(t, "a=baggage,b=baggage,c=baggage"), map[string]string{"a": "transport", "e": "transport"})
				return labels.With(ctx, "a", "context", "b", "context")
			},
			opts:   []flowctl.Option{flowctl.WithLabels(map[string]string{"a": "default", "c": "default", "d": "default"}), flowctl.WithBaggage()},
			labels: map[string]string{"a": "params"},
			want:   map[string]string{"a": "params", "b": "context", "c": "baggage", "d": "default"},
		},
		{
			name:    "A18 baggage of a peer",
			ctx:     func(t *testing.T) context.Context { return parsed(t, "tier=platinum") },
			headers: map[string]string{"baggage": "tier=platinum,plan=gold", "Baggage": "tier=platinum"},
			labels:  map[string]string{"tier": "free"},
			want:    map[string]string{"tier": "free"},
		},
		{
			name:    "A18 baggage of a peer that is wanted",
			opts:    []flowctl.Option{flowctl.WithBaggage("tier", "plan")},
			headers: map[string]string{"baggage": "tier=platinum,plan=gold,=,other=1"},
			labels:  map[string]string{"tier": "free"},
			want:    map[string]string{"tier": "free", "plan": "gold"},
		},
		{
			name:    "baggage in the context and in the request",
			ctx:     func(t *testing.T) context.Context { return parsed(t, "a=context") },
			opts:    []flowctl.Option{flowctl.WithBaggage()},
			headers: map[string]string{"baggage": "a=header,b=header,authorization=secret,http.method=PUT"},
			want:    map[string]string{"a": "context", "b": "header"},
		},
		{
			name:   "A23 nothing is lost or decoded twice",
			labels: map[string]string{"a b": "50%", "c=": "x+y", "d": "1,2;3", "ключ": "значение", "api_key": ""},
			want:   map[string]string{"a b": "50%", "c=": "x+y", "d": "1,2;3", "ключ": "значение", "api_key": ""},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			ctx := t.Context()
			if tt.ctx != nil {
				ctx = tt.ctx(t)
			}
			flow := patient(agent, tt.opts...).Start(ctx, "point", flowctl.Params{Labels: tt.labels, HTTP: get(tt.headers)})
			if flow.Decision() != flowctl.Accepted {
				t.Fatalf("%v, %v want accepted", flow.Decision(), flow.Err())
			}
			if diff := cmp.Diff(tt.want, agent.Checks()[0].Request.GetLabels()); diff != "" {
				t.Errorf("labels (-want +got):\n%s", diff)
			}
		})
	}
}

// A header holds fewer labels than a check. What the application names does not give way: the flow is Invalid. Other
// members of baggage are left out of the header, and not of what agents of Headgate read.
func TestHTTPLabelsBounds(t *testing.T) {
	value := strings.Repeat("v", 4000)
	large := map[string]string{"l1": value, "l2": value}
	huge := map[string]string{"l1": value, "l2": value, "l3": value}
	invalid := map[string]string(nil)
	for _, tt := range []struct {
		name     string
		defaults map[string]string
		named    []string // members of baggage
		baggage  string
		explicit map[string]string
		want     map[string]string // in the header
		left     bool
	}{
		{name: "all fit", defaults: map[string]string{"d": "1"}, baggage: "b=1", explicit: large, want: map[string]string{"l1": value, "l2": value, "b": "1", "d": "1"}},
		{name: "baggage gives way", defaults: map[string]string{"d": "1"}, baggage: "b=" + value, explicit: large, want: map[string]string{"l1": value, "l2": value, "d": "1"}, left: true},
		{name: "the largest of baggage gives way", baggage: "a=" + value + ",b=1", explicit: large, want: map[string]string{"l1": value, "l2": value, "b": "1"}, left: true},
		{name: "named members do not", named: []string{"b"}, baggage: "b=" + value, explicit: large, want: invalid},
		{name: "named members go before others", named: []string{"b"}, baggage: "a=1,b=2", explicit: large, want: map[string]string{"l1": value, "l2": value, "b": "2"}},
		{name: "defaults do not", defaults: map[string]string{"d": value}, baggage: "b=1", explicit: large, want: invalid},
		{name: "nor does what replaces one", defaults: map[string]string{"d": "1"}, baggage: "d=" + value, explicit: large, want: invalid},
		{name: "a small default does not", defaults: map[string]string{"d": "1"}, explicit: map[string]string{"l1": value, "l2": strings.Repeat("v", 4083), "l3": strings.Repeat("v", 8192-4003-1-4086-1-3-3)}, want: invalid},
		{name: "explicit ones do not", explicit: huge, want: invalid},
		{name: "a member of 4096 bytes", explicit: map[string]string{"m": strings.Repeat("v", 4094)}, want: map[string]string{"m": strings.Repeat("v", 4094)}},
		{name: "a member of 4097 bytes", explicit: map[string]string{"m": strings.Repeat("v", 4095)}, want: invalid},
		{name: "a member of 4097 bytes with its escapes", explicit: map[string]string{"m": strings.Repeat("v", 4092) + " "}, want: invalid},
		{name: "most", explicit: many("k", 64), want: many("k", 64)},
		{name: "most members", explicit: many("k", 64), baggage: members(many("b", 150)), want: joined(many("k", 64), many("b", 116)), left: true},
		{name: "too many", explicit: many("k", 65), want: invalid},
		{name: "too large ones of peers", baggage: members(many("b", 30_000)), want: invalid},
		{name: "a named one among them", named: []string{"b77"}, baggage: members(many("b", 30_000)), want: map[string]string{"b77": many("b", 78)["b77"]}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			var log bytes.Buffer
			client := patient(agent, flowctl.WithLabels(tt.defaults), flowctl.WithBaggage(tt.named...), logTo(&log))
			flow := client.Start(w3cbaggage.With(t.Context(), tt.baggage), "point", flowctl.Params{Labels: tt.explicit, HTTP: get(nil)})
			if tt.want == nil {
				if flow.Decision() != flowctl.Invalid || flow.ShouldRun() || !errors.Is(flow.Err(), flowctl.ErrInvalid) || strings.Contains(flow.Err().Error(), "vvv") {
					t.Errorf("%v, %v want invalid, and no label in the error", flow.Decision(), flow.Err())
				}
				return
			}
			if flow.Decision() != flowctl.Accepted {
				t.Fatalf("%v, %v want accepted", flow.Decision(), flow.Err())
			}
			if logged := strings.Contains(log.String(), "labels were left out of the baggage header"); logged != tt.left {
				t.Errorf("the log has %q", log.String())
			}
			header := agent.Checks()[0].HTTP.GetRequest().GetHeaders()["baggage"]
			if diff := cmp.Diff(tt.want, w3cbaggage.Read(header)); diff != "" {
				t.Errorf("labels in the header (-want +got):\n%s", diff)
			}
			all := joined(tt.explicit, tt.defaults)
			for key, value := range w3cbaggage.All(tt.baggage) {
				if tt.named == nil || slices.Contains(tt.named, key) {
					all[key] = value
				}
			}
			if diff := cmp.Diff(all, agent.Checks()[0].HTTP.GetLabels()); diff != "" {
				t.Errorf("labels (-want +got):\n%s", diff)
			}
		})
	}
}

// members is a baggage header.
func members(labels map[string]string) string {
	var all []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		all = append(all, key+"="+labels[key])
	}
	return strings.Join(all, ",")
}

func joined(of ...map[string]string) map[string]string {
	all := make(map[string]string)
	for _, m := range of {
		maps.Copy(all, m)
	}
	return all
}

// Headers beyond 1 MiB make a flow Invalid, because a stranger could choose which of them are left out.
func TestHTTPHeadersBounds(t *testing.T) {
	agent := flowtest.NewAgent(t)
	client := patient(agent)
	for n, want := range map[int]flowctl.Decision{200: flowctl.Accepted, 300: flowctl.Invalid} {
		headers := make(map[string]string)
		for i := range n {
			headers[fmt.Sprint("x-", i)] = strings.Repeat("v", 4096)
		}
		if flow := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(headers)}); flow.Decision() != want {
			t.Errorf("%d headers: %v, %v want %v", n, flow.Decision(), flow.Err(), want)
		}
	}
}

// A default does not take the place of a label that the request has, in the header either. Labels whose keys a header
// cannot have take no place of others.
func TestHTTPLabelsInTheHeader(t *testing.T) {
	agent := flowtest.NewAgent(t)
	client := patient(agent, flowctl.WithBaggage("http.host", "a%20b"), flowctl.WithLabels(map[string]string{
		"http.method": "default", "http.target": "default", "http.host": "default", "http.scheme": "default", "http.flavor": "default",
		"http.request_content_length": "default", "http.request.header.x_a": "default", "http.request.header.x_b": "default",
	}))
	ctx := labels.With(parsed(t, "http.host=baggage,a%20b=member"), "http.scheme", "", "a b", "with")
	flow := client.Start(ctx, "point", flowctl.Params{HTTP: get(map[string]string{"x-a": "1"}), Labels: map[string]string{"http.request.header.x_a": "params", "c d": "params"}})
	if flow.Decision() != flowctl.Accepted {
		t.Fatalf("%v, %v want accepted", flow.Decision(), flow.Err())
	}
	m := agent.Checks()[0].HTTP
	want := map[string]string{
		"http.host": "baggage", "http.scheme": "", "http.request_content_length": "default", "http.request.header.x_a": "params",
		"http.request.header.x_b": "default", "a b": "with", "a%20b": "member", "c d": "params",
	}
	if diff := cmp.Diff(want, m.GetLabels()); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	delete(want, "a b")
	delete(want, "c d")
	want["c%20d"] = "params"
	if diff := cmp.Diff(want, w3cbaggage.Read(m.GetRequest().GetHeaders()["baggage"])); diff != "" {
		t.Errorf("labels in the header (-want +got):\n%s", diff)
	}
	if got := m.GetRequest(); got.GetMethod() != "GET" || got.GetHost() != "shop.example" || got.GetHeaders()["x-a"] != "1" {
		t.Errorf("the request was not described as it is: %v", got)
	}
}

// The context's baggage is read as by Check: a header of the request replaces none of it, unless it is what
// OpenTelemetry has not read to its end.
func TestHTTPBaggageOfTheContext(t *testing.T) {
	for _, tt := range []struct{ name, context, header, want string }{
		{"none in the context", "", "tenant=acme,tenant=evil", "evil"},
		{"that of the header", "tenant=acme", "tenant=acme", "acme"},
		{"one of the header's", "tenant=acme", "tenant=acme,tenant=evil", "acme"},
		{"another", "tenant=acme", "tenant=evil", "acme"},
		{"another, of a long header", "tenant=acme", members(many("k", 70)) + ",tenant=evil", "acme"},
		{"the first of a long header", "tenant=evil", "tenant=evil," + members(many("k", 70)) + ",tenant=acme", "acme"},
		{"an escaped key", "tenant=acme", "tenant=acme,%74enant=evil", "acme"},
		{"a bad member", "", `tenant=acme,tenant="x`, "acme"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			client := patient(agent, flowctl.WithBaggage("tenant"))
			client.Start(parsed(t, tt.context), "point", flowctl.Params{HTTP: get(map[string]string{"baggage": tt.header})})
			if got := agent.Checks()[0].Request.GetLabels(); got["tenant"] != tt.want || len(got) != 1 {
				t.Errorf("labels %v want the tenant %s", got, tt.want)
			}
		})
	}
}

// CheckHTTP looks up no cache entries. A flow that wants both is Invalid, also with an engine.
func TestHTTPWithCacheKeys(t *testing.T) {
	for name, params := range map[string]flowctl.Params{
		"result": {ResultCacheKey: "k"},
		"global": {GlobalCacheKeys: []string{"k"}},
	} {
		t.Run(name, func(t *testing.T) {
			overAll(t, func(t *testing.T, client *flowctl.Client) {
				params.HTTP = get(nil)
				flow := client.Start(t.Context(), "point", params)
				if flow.Decision() != flowctl.Invalid || !errors.Is(flow.Err(), flowctl.ErrInvalid) || !strings.Contains(flow.Err().Error(), "cache keys") {
					t.Errorf("%v, %v want invalid, because of the cache keys", flow.Decision(), flow.Err())
				}
			})
		})
	}
}

// Who asks no agent about the request has no answer about it.
func TestHTTPAnswerNone(t *testing.T) {
	agent := flowtest.NewAgent(t)
	agent.AnswerAt("down", flowtest.Answer{Fail: status.Error(codes.Unavailable, "gone")})
	var off *flowctl.Client
	for name, flow := range map[string]*flowctl.Flow{
		"off":         off.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)}),
		"engine":      noPolicies(t).Start(labels.WithTransport(t.Context(), map[string]string{"k": "v"}), "point", flowctl.Params{HTTP: get(nil)}),
		"check":       agent.Client().Start(t.Context(), "point", flowctl.Params{}),
		"unreachable": agent.Client().Start(t.Context(), "down", flowctl.Params{HTTP: get(nil)}),
		"invalid":     agent.Client().Start(t.Context(), "", flowctl.Params{HTTP: get(nil)}),
	} {
		if answer, ok := flow.HTTPAnswer(); ok || answer.Status != 0 || answer.Header != nil || answer.Body != "" {
			t.Errorf("%s: HTTPAnswer() = %+v, %v want none", name, answer, ok)
		}
		if name == "engine" {
			if got := flow.CheckResponse().GetFlowLabelKeys(); len(got) != 1 || got[0] != "k" {
				t.Errorf("an engine was asked with labels %v want those of the transport", got)
			}
		}
	}
}

// A27: what the agent wants set in the request was never applied. The flow's own labels are not part of it: they would
// go on to whoever gets the request next.
func TestA27HeadersOfTheAnswer(t *testing.T) {
	const ours = "plan=gold,user_id=42"
	for _, tt := range []struct {
		name      string
		own       string // the request's baggage
		key, want string
		sent      string // by the agent
		other     string
	}{
		{name: "as it was sent", key: "baggage", sent: ours},
		{name: "as it was sent, and the request's own", own: "trace=1", key: "baggage", sent: ours},
		{name: "with what the agent found", key: "baggage", sent: ours + ",bot=yes", want: "bot=yes"},
		{name: "with what the agent found, and the request's own", own: "trace=1;p", key: "baggage", sent: ours + ",bot=yes,kind=%2C", want: "trace=1;p,bot=yes,kind=%2C"},
		{name: "in another order and case", own: "trace=1", key: "Baggage", sent: " user_id=42 , bot=yes,, plan=gold ", want: "trace=1,bot=yes"},
		{name: "what the agent changed", key: "baggage", sent: "plan=silver,user_id=42", want: "plan=silver"},
		{name: "others", key: "baggage", sent: ours, other: "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			headers := map[string]string{tt.key: tt.sent}
			want := map[string]string{}
			if tt.want != "" {
				want[tt.key] = tt.want
			}
			if tt.other != "" {
				headers["x-other"], want["x-other"] = tt.other, tt.other
			}
			agent.Answer(flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
				Status:       &rpcstatus.Status{},
				HttpResponse: &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{Headers: headers}},
			}})
			r := get(nil)
			if tt.own != "" {
				r.Headers = map[string]string{"baggage": tt.own}
			}
			flow := patient(agent).Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "42", "plan": "gold"}, HTTP: r})
			answer, ok := flow.HTTPAnswer()
			if !ok || answer.Status != 0 || answer.Body != "" || !maps.Equal(answer.Header, want) {
				t.Errorf("HTTPAnswer() = %+v, %v want the headers %v", answer, ok, want)
			}
			answer.Header["x-mine"] = "1"
			if again, _ := flow.HTTPAnswer(); !maps.Equal(again.Header, want) {
				t.Error("the answer is not the caller's own")
			}
		})
	}
}

// A denied response, and what a flow makes of it.
func TestHTTPRejected(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer flowtest.Answer
		want   flowctl.HTTPAnswer
		wait   time.Duration
	}{
		{
			name:   "by a reason",
			answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 1500 * time.Millisecond},
			want:   flowctl.HTTPAnswer{Status: 429, Header: map[string]string{"retry-after": "2"}},
			wait:   2 * time.Second,
		},
		{name: "no tokens", answer: flowtest.Answer{Reason: flowctl.ReasonNoTokens}, want: flowctl.HTTPAnswer{Status: 503}},
		{name: "by a policy's status", answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited, HTTPStatus: 418}, want: flowctl.HTTPAnswer{Status: 418}},
		{
			name: "in full",
			answer: flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
				Status: &rpcstatus.Status{Code: int32(codes.Unavailable)},
				HttpResponse: &checkhttpv1.CheckHTTPResponse_DeniedResponse{DeniedResponse: &checkhttpv1.DeniedHttpResponse{
					Status: 402, Headers: map[string]string{"Retry-After": "7", "x-plan": "free"}, Body: "pay first",
				}},
			}},
			want: flowctl.HTTPAnswer{Status: 402, Header: map[string]string{"Retry-After": "7", "x-plan": "free"}, Body: "pay first"},
			wait: 7 * time.Second,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			agent.Answer(tt.answer)
			flow := patient(agent).Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)})
			if flow.Decision() != flowctl.Rejected || flow.ShouldRun() {
				t.Fatalf("%v, %v want rejected", flow.Decision(), flow.Err())
			}
			answer, ok := flow.HTTPAnswer()
			if diff := cmp.Diff(tt.want, answer); !ok || diff != "" {
				t.Errorf("HTTPAnswer(): %v (-want +got):\n%s", ok, diff)
			}
			rejected, _ := errors.AsType[*flowctl.RejectedError](flow.Err())
			if rejected == nil || rejected.HTTPStatus != answer.Status || flow.HTTPStatus() != answer.Status {
				t.Errorf("%+v, HTTPStatus() = %d want the answer's status %d", rejected, flow.HTTPStatus(), answer.Status)
			}
			if flow.RetryAfter() != tt.wait {
				t.Errorf("RetryAfter() = %v want %v", flow.RetryAfter(), tt.wait)
			}
		})
	}
}

// Answers that are not what they should be give a decision all the same. A21: one without a status was a panic.
func TestA21MalformedHTTPAnswers(t *testing.T) {
	type message = checkhttpv1.CheckHTTPResponse
	ok := func(m *message) { m.HttpResponse = &checkhttpv1.CheckHTTPResponse_OkResponse{} }
	denied := func(code int32) func(*message) {
		return func(m *message) {
			m.HttpResponse = &checkhttpv1.CheckHTTPResponse_DeniedResponse{DeniedResponse: &checkhttpv1.DeniedHttpResponse{
				Status: code, Headers: map[string]string{"retry-after": "soon", "": "\r\n"},
			}}
		}
	}
	code := func(c int32) func(*message) {
		return func(m *message) { m.Status = &rpcstatus.Status{Code: c} }
	}
	decided := func(c *checkv1.CheckResponse) func(*message) {
		return func(m *message) { m.CheckResponse = c }
	}
	yes := func() *checkv1.CheckResponse { return new(checkv1.CheckResponse) }
	no := func() *checkv1.CheckResponse {
		return &checkv1.CheckResponse{
			DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED, RejectReason: checkv1.CheckResponse_REJECT_REASON_RATE_LIMITED,
			DeniedResponseStatusCode: 430, WaitTime: durationpb.New(time.Second),
		}
	}
	for _, tt := range []struct {
		name   string
		parts  []func(*message)
		want   flowctl.Decision
		status int // of a rejection
	}{
		{"empty", nil, flowctl.Rejected, 403},
		{"no status, a check response", []func(*message){decided(yes())}, flowctl.Accepted, 0},
		{"no status, a check response that rejects", []func(*message){decided(no())}, flowctl.Rejected, 430},
		{"no status, a check response that rejects, an OK response", []func(*message){decided(no()), ok}, flowctl.Rejected, 430},
		{"no status, an OK response", []func(*message){ok}, flowctl.Accepted, 0},
		{"no status, a denied response", []func(*message){denied(451)}, flowctl.Rejected, 451},
		{"no status, a denied response, a check response that accepts", []func(*message){denied(451), decided(yes())}, flowctl.Rejected, 451},
		{"OK, nothing else", []func(*message){code(0)}, flowctl.Accepted, 0},
		{"OK, a denied response", []func(*message){code(0), denied(451)}, flowctl.Accepted, 0},
		{"OK, a check response that rejects", []func(*message){code(0), decided(no())}, flowctl.Accepted, 0},
		{"not OK, nothing else", []func(*message){code(14)}, flowctl.Rejected, 403},
		{"not OK, an OK response", []func(*message){code(14), ok}, flowctl.Rejected, 403},
		{"not OK, a check response that accepts", []func(*message){code(-1), decided(yes())}, flowctl.Rejected, 403},
		{"denied without a status", []func(*message){code(14), denied(0), decided(no())}, flowctl.Rejected, 430},
		{"denied with 200", []func(*message){code(14), denied(200), decided(no())}, flowctl.Rejected, 430},
		{"denied with 700", []func(*message){code(14), denied(700)}, flowctl.Rejected, 403},
		{"denied with less than nothing", []func(*message){code(14), denied(-429)}, flowctl.Rejected, 403},
		{"nil parts", []func(*message){code(14), denied(429), decided(&checkv1.CheckResponse{
			LimiterDecisions: []*checkv1.LimiterDecision{{}, {Dropped: true}}, RejectReason: 300, WaitTime: &durationpb.Duration{Seconds: -1, Nanos: 5},
		})}, flowctl.Rejected, 429},
		{"invalid UTF-8", []func(*message){code(0), decided(&checkv1.CheckResponse{ControlPoint: "\xff"})}, flowctl.Unreachable, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			m := new(message)
			for _, part := range tt.parts {
				part(m)
			}
			agent.Answer(flowtest.Answer{HTTPResponse: m})
			client := patient(agent)
			flow := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)})
			if flow.Decision() != tt.want {
				t.Fatalf("%v, %v want %v", flow.Decision(), flow.Err(), tt.want)
			}
			if flow.ShouldRun() == (tt.want == flowctl.Rejected) {
				t.Errorf("ShouldRun() = %v", flow.ShouldRun())
			}
			answer, answered := flow.HTTPAnswer()
			if answered != flow.Success() || answer.Status != tt.status || tt.status != 0 && flow.HTTPStatus() != tt.status {
				t.Errorf("HTTPAnswer() = %+v, %v, HTTPStatus() = %d want %d", answer, answered, flow.HTTPStatus(), tt.status)
			}
			if c := flow.CheckResponse(); flow.Success() && (c.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_REJECTED) != (tt.want == flowctl.Rejected) {
				t.Errorf("CheckResponse() = %v want what was decided", c)
			}
			if flow.RetryAfter() < 0 {
				t.Errorf("RetryAfter() = %v", flow.RetryAfter())
			}
			if _, err := flow.End(t.Context()); err != nil {
				t.Errorf("End() = %v", err)
			}
			if err := client.Close(t.Context()); err != nil {
				t.Errorf("Close() = %v", err)
			}
		})
	}
}

// Waits are read from headers.
func TestHTTPRetryAfter(t *testing.T) {
	agent := flowtest.NewAgent(t)
	client := patient(agent)
	for header, want := range map[string]time.Duration{
		"0": 0, "1": time.Second, "86400": 24 * time.Hour, "-1": 0, "1.5": 0, "": 0, "1576799999": 1576799999 * time.Second,
		"1576800000": 0, "4294967295": 0, "99999999999999999999": 0, // half a century and more "Wed, 21 Oct 2026 07:28:00 GMT": 0,
	} {
		agent.Answer(flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
			HttpResponse: &checkhttpv1.CheckHTTPResponse_DeniedResponse{DeniedResponse: &checkhttpv1.DeniedHttpResponse{
				Status: 429, Headers: map[string]string{"retry-after": header},
			}},
		}})
		if got := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)}).RetryAfter(); got != want {
			t.Errorf("retry-after %q: RetryAfter() = %v want %v", header, got, want)
		}
	}
}

// Slots, their end, and the flow's record are those of any other flow.
func TestHTTPFlowEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{Slots: 2, Delay: 100 * time.Millisecond})
		client := agent.Client()
		flow := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(map[string]string{"x-user": "42"}), Labels: map[string]string{"user_id": "42"}})
		flow.SetStatus(flowctl.StatusError)
		if got, err := flow.End(t.Context()); got != (flowctl.EndResponse{Held: 2, Returned: 2}) || err != nil {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if agent.Held() != 0 || len(agent.Ends()) != 1 {
			t.Errorf("%d slots are held after %d calls", agent.Held(), len(agent.Ends()))
		}
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		span := agent.Spans()[0]
		if span.Status != flowctl.StatusError || span.WorkloadStart.Sub(span.Start) != 100*time.Millisecond {
			t.Errorf("record: %v, work began after %v", span.Status, span.WorkloadStart.Sub(span.Start))
		}
		if diff := cmp.Diff(flow.CheckResponse(), span.Response, protocmp.Transform()); diff != "" {
			t.Errorf("check response (-flow +span):\n%s", diff)
		}
		if got := span.Response.GetTelemetryFlowLabels(); got["aperture.control_point_type"] != "http" || got["user_id"] != "42" {
			t.Errorf("telemetry labels = %v", got)
		}
	})
}

// An agent that hangs costs a request its timeout, and then nothing.
func TestHTTPAgentBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		client.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)})
		synctest.Wait() // for what else the agent has to send, which would be a sign of life
		agent.Freeze()
		start := func() time.Duration {
			begin := time.Now()
			if flow := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)}); flow.Decision() != flowctl.Unreachable || !flow.ShouldRun() {
				t.Fatalf("%v, ShouldRun() = %v", flow.Decision(), flow.ShouldRun())
			}
			return time.Since(begin)
		}
		for i := range 5 {
			if took := start(); took != 200*time.Millisecond {
				t.Errorf("flow %d took %v want its timeout", i, took)
			}
		}
		if took := start(); took != 0 {
			t.Errorf("a flow took %v while the breaker was open", took)
		}
		closed := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil), OnUnreachable: flowctl.FailClosed})
		if closed.ShouldRun() || closed.HTTPStatus() != 503 {
			t.Errorf("fail closed: ShouldRun() = %v, HTTPStatus() = %d", closed.ShouldRun(), closed.HTTPStatus())
		}
	})
}

// An agent that does not know CheckHTTP is one that refuses to decide, and the operator gets to know.
func TestHTTPUnimplemented(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bufconn.Listen(1 << 16)
		server := grpc.NewServer(grpc.WaitForHandlers(true))
		checkv1.RegisterFlowControlServiceServer(server, new(acceptAll))
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		defer func() {
			server.Stop()
			if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				t.Error(err)
			}
		}()
		var log bytes.Buffer
		client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithoutTelemetry(), logTo(&log),
			flowctl.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close(t.Context())
		for range 10 {
			flow := client.Start(t.Context(), "point", flowctl.Params{HTTP: get(nil)})
			if flow.Decision() != flowctl.Unreachable {
				t.Fatalf("%v, %v want unreachable", flow.Decision(), flow.Err())
			}
		}
		if got := client.Start(t.Context(), "point", flowctl.Params{}).Decision(); got != flowctl.Accepted {
			t.Errorf("a check = %v: the breaker must not open for an agent that answers", got)
		}
		if got := strings.Count(log.String(), "refuses to decide"); got != 1 {
			t.Errorf("logged %d times want once:\n%s", got, log.String())
		}
	})
}

// told is a connection to an agent that accepts every request, and keeps the last one.
type told struct {
	grpc.ClientConnInterface
	request *checkhttpv1.CheckHTTPRequest
}

func (c *told) Invoke(_ context.Context, _ string, req, reply any, _ ...grpc.CallOption) error {
	c.request, _ = req.(*checkhttpv1.CheckHTTPRequest)
	if m, ok := reply.(*checkhttpv1.CheckHTTPResponse); ok {
		m.Status = new(rpcstatus.Status)
	}
	_, err := proto.Marshal(c.request)
	return err
}

func (c *told) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "it knows no sessions")
}

// Whatever a peer puts into a request, the agent can be asked about it, with the application's labels and without
// credentials.
func FuzzHTTPRequest(f *testing.F) {
	f.Add("GET", "/orders/7", "x-user", "42", "a=1")
	f.Add("\xff", strings.Repeat("ü", 3000), "Authorization", "secret", "user_id=spoofed,,;=")
	f.Add("", "", strings.Repeat("k", 300), strings.Repeat("\xff", 5000), strings.Repeat("a=b,", 3000))
	conn := new(told)
	client, err := flowctl.Dial("", flowctl.WithConn(conn), flowctl.WithoutTelemetry(), flowctl.WithBaggage())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, method, path, name, value, bag string) {
		flow := client.Start(t.Context(), "point", flowctl.Params{
			Labels: map[string]string{"user_id": "42"},
			HTTP: &flowctl.HTTPRequest{
				Method: method, Path: path, Host: value, Scheme: method, Protocol: value, Size: int64(len(path)),
				Headers: map[string]string{name: value, "baggage": bag},
			},
		})
		if flow.Decision() != flowctl.Accepted {
			t.Fatalf("%v, %v want accepted", flow.Decision(), flow.Err())
		}
		headers := conn.request.GetRequest().GetHeaders()
		if members := strings.Split(headers["baggage"], ","); !slices.Contains(members, "user_id=42") {
			t.Errorf("baggage = %q want the user in it", headers["baggage"])
		}
		for key := range headers {
			if labels.IsCredential(key) || key != strings.ToLower(key) {
				t.Errorf("header %q was sent", key)
			}
		}
	})
}
