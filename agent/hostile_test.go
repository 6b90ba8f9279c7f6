package agent_test

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/baggage"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// many adds headers to some.
func many(some map[string]string) map[string]string {
	for i := range 100 {
		some[fmt.Sprint("a-", i)] = ""
	}
	return some
}

// If it is ambiguous which of several headers counts, the request is rejected with 400, and gets no error.
func TestCheckHTTPRejectsAmbiguousHeaders(t *testing.T) {
	stubs := map[string]checkhttpv1.FlowControlServiceHTTPClient{
		"named": serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
			policy.RateLimiter{Selectors: policy.At("web"), Capacity: 1000, Interval: time.Hour, LimitBy: "http.request.header.x_user"},
		}}}).stubHTTP(t),
		"not named": serve(t, nil).stubHTTP(t),
	}
	for _, tt := range []struct {
		name    string
		headers map[string]string
		ok      bool
	}{
		{"none", nil, true},
		{"one", map[string]string{"X-User": "u"}, true},
		{"case", map[string]string{"x-user": "u", "X-User": "v"}, false},
		{"case of a name with _", map[string]string{"x_user": "u", "X_User": "v"}, false},
		{"case of a name with _, beside one with -", map[string]string{"x-user": "u", "x_user": "v", "X_User": "w"}, false},
		{"case of a header that carries credentials", map[string]string{"authorization": "u", "Authorization": "v"}, false},
		{"case, beside all places of _", map[string]string{"x-a-b": "u", "X-A-B": "v", "x_a_b": "1", "x_a-b": "2", "x-a_b": "3"}, false},
		{"case of baggage, beside many", many(map[string]string{"baggage": "a=b", "Baggage": "a=c"}), false},
		{"case of baggage", map[string]string{"baggage": "a=b", "Baggage": "a=c"}, false},
		{"_ beside -", map[string]string{"x-user": "u", "x_user": "v"}, true},
		{"_ alone", map[string]string{"x_user": "v"}, true},
		{"_ in two places", map[string]string{"x_user-id": "u", "x-user_id": "v"}, false},
		{"_ in two places, beside -", map[string]string{"x_user-id": "u", "x-user_id": "v", "x-user-id": "w"}, true},
	} {
		for named, stub := range stubs {
			t.Run(tt.name+"/"+named, func(t *testing.T) {
				for range 10 { // maps have no order
					m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "web", ExpectEnd: true, Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: tt.headers}})
					if err != nil {
						t.Fatal(err)
					}
					if ok := m.GetStatus().GetCode() == 0; ok != tt.ok {
						t.Fatalf("accepted: %v want %v", ok, tt.ok)
					}
					if !tt.ok && (m.GetDeniedResponse().GetStatus() != http.StatusBadRequest || m.GetCheckResponse().GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED) {
						t.Errorf("answer = %v want rejected by 400", m)
					}
				}
			})
		}
	}
}

// Whatever labels come from, what a proxy set as x-user is not replaced by what a peer sent under a similar name.
func TestPeersCannotReplaceLabels(t *testing.T) {
	const label = "http.request.header.x_user"
	for i, similar := range []string{"x_user", "X_User", "X_USER", "x-user ", "x%2Duser"} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("X-User", "mallory")
		r.Header[similar] = []string{"spoofed"}
		if got := labels.FromRequest(r, "x-user")[label]; got != "mallory" {
			t.Errorf("FromRequest beside %q: %q", similar, got)
		}

		md := metadata.MD{"x-user": {"mallory"}, similar: {"spoofed"}}
		if got := labels.FromMetadata(md, "X-User")["x-user"]; got != "mallory" {
			t.Errorf("FromMetadata beside %q: %q", similar, got)
		}

		member, err := baggage.NewMemberRaw(similar, "spoofed")
		if err == nil {
			own, _ := baggage.NewMemberRaw("x-user", "mallory")
			bag, _ := baggage.New(own, member)
			if got := labels.FromBaggage(baggage.ContextWithBaggage(context.Background(), bag), "x-user")["x-user"]; got != "mallory" {
				t.Errorf("FromBaggage beside %q: %q", similar, got)
			}
		}

		// By CheckHTTP 3 requests of mallory's pass, or they are rejected for their headers.
		stub := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
			policy.RateLimiter{Selectors: policy.At("web"), Capacity: 3, Interval: time.Hour, LimitBy: label},
		}}}).stubHTTP(t)
		passed := 0
		for n := range 20 {
			m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "web", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
				Headers: map[string]string{"x-user": "mallory", similar: fmt.Sprint("v", n)},
			}})
			if err != nil {
				t.Fatal(err)
			}
			if m.GetStatus().GetCode() == 0 {
				passed++
			}
		}
		if passed != 3 {
			t.Errorf("similar name %d: %d requests of mallory's passed want 3", i, passed)
		}
	}
}

// A span counts for an answer that was given, once, and for no longer than since then.
func TestForgedSpans(t *testing.T) {
	const second = int64(time.Second)
	for _, tt := range []struct {
		name    string
		forge   func(m *checkv1.CheckResponse)
		times   int
		latency int64
		want    float64 // hundredths that a scheduler lets in: as many as the mean has milliseconds
	}{
		{"honest", func(*checkv1.CheckResponse) {}, 1, 2 * second / 100, 0.2},
		{"a day long", func(*checkv1.CheckResponse) {}, 1, 86400 * second, 0.4},
		{"of no check", func(m *checkv1.CheckResponse) { m.Start = timestamppb.New(time.Unix(1, 0)) }, 1, second, 1},
		{"without a start", func(m *checkv1.CheckResponse) { m.Start = nil }, 1, second, 1},
		{"again and again", func(*checkv1.CheckResponse) {}, 5, 2 * second / 100, 0.2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serve(t, []policy.Policy{{Name: "load", Components: []policy.Component{policy.LoadScheduler{
					Selectors:      policy.At("point"),
					LoadMultiplier: policy.MeanLatency{Selectors: policy.At("work"), Over: time.Hour, Times: 0.01},
					Scheduler:      policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
				}}}})
				conn := s.conn(t)
				m, err := checkv1.NewFlowControlServiceClient(conn).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "work"})
				if err != nil {
					t.Fatal(err)
				}
				<-time.After(40 * time.Millisecond)
				tt.forge(m)
				for i := range int64(tt.times) {
					span := report{answer: m, status: "OK", begin: second, end: second + tt.latency*(i+1)}.span()
					data := &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{ScopeSpans: []*tracev1.ScopeSpans{{Spans: []*tracev1.Span{span}}}}}}
					if err := conn.Invoke(t.Context(), telemetry.Export, data, new(emptypb.Empty)); err != nil {
						t.Fatal(err)
					}
				}
				here, in, n := clientOf(t, s.engine), 0, 0
				for begin := time.Now(); time.Since(begin) < 50*time.Second; <-time.After(25 * time.Millisecond) {
					flow := here.Start(context.Background(), "point", flowctl.Params{})
					if time.Since(begin) < 40*time.Second {
						continue
					}
					if n++; flow.ShouldRun() {
						in++
					}
				}
				if got := float64(in) / float64(n); math.Abs(got-tt.want) > 0.03 {
					t.Errorf("%v of the flows were accepted want %v", got, tt.want)
				}
			})
		})
	}
}

// A peer sends baggage through a proxy that sets headers. It cannot take the place of what policies limit by.
func TestBaggageReplacesNoLabelOfTheRequest(t *testing.T) {
	for _, label := range []string{"http.request.header.x_user", "http.method", "http.target", "http.host", "http.scheme", "http.flavor", "http.request_content_length"} {
		t.Run(label, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stub := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
					policy.RateLimiter{Selectors: policy.At("point"), Capacity: 3, Fill: 1, Interval: time.Hour, LimitBy: label},
				}}}).stubHTTP(t)
				passed := 0
				for i := range 20 {
					long := ""
					if i%2 == 0 {
						long = strings.Repeat(",a=b", 5000)
					}
					m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "point", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
						Method: "GET", Path: "/", Host: "h", Scheme: "https", Protocol: "HTTP/1.1", Size: 1,
						Headers: map[string]string{"x-user": "victim", "baggage": fmt.Sprintf("%s=other%d%s", label, i, long)},
					}})
					if err != nil {
						t.Fatal(err)
					}
					if m.GetDeniedResponse() == nil {
						passed++
					}
				}
				if passed != 3 {
					t.Errorf("%d of 20 requests pass want 3", passed)
				}
			})
		})
	}
}
