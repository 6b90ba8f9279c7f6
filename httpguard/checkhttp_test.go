package httpguard_test

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

// posted is a request with all that an agent may be told of it, and more.
func posted() *http.Request {
	r := httptest.NewRequest(http.MethodPost, "http://shop.example/orders/7?secret=1", http.NoBody)
	r.ContentLength = 12
	r.RemoteAddr = "192.0.2.1:1234"
	r.Header.Add("X-Tenant", "acme")
	r.Header.Add("X-Tenant", "globex")
	r.Header.Set("X-Other", "not listed")
	r.Header.Set("Authorization", "Bearer secret")
	r.Header.Set("Cookie", "secret=1")
	r.Header.Set("Baggage", "tier=platinum")
	return r
}

func TestCheckHTTP(t *testing.T) {
	agent := flowtest.NewAgent(t)
	client := agent.Client(flowctl.WithCheckTimeout(10 * time.Second))
	guard := httpguard.Middleware(client, point, httpguard.WithCheckHTTP(), httpguard.WithHeaders("X-Tenant", "Authorization"),
		httpguard.WithParams(func(*http.Request) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"tier": "free"}}
		}))
	ran := false
	w := httptest.NewRecorder()
	guard(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		ran = true
		flowOf(t, r)
	})).ServeHTTP(w, posted())
	if !ran || w.Code != http.StatusOK {
		t.Fatalf("status %d, handler called: %v", w.Code, ran)
	}
	checks := agent.Checks()
	if len(checks) != 1 || checks[0].HTTP == nil {
		t.Fatalf("the agent was asked %v, want once and about HTTP", checks)
	}
	m := checks[0].HTTP
	type request struct{ method, path, host, scheme, protocol, source string }
	got := request{
		m.GetRequest().GetMethod(), m.GetRequest().GetPath(), m.GetRequest().GetHost(), m.GetRequest().GetScheme(),
		m.GetRequest().GetProtocol(), m.GetSource().GetAddress(),
	}
	want := request{http.MethodPost, "/orders/7", "shop.example", "http", "HTTP/1.1", "192.0.2.1"}
	if got != want {
		t.Errorf("the agent was asked about %+v want %+v", got, want)
	}
	if got := m.GetRequest().GetSize(); got != 12 {
		t.Errorf("size = %d want 12", got)
	}
	// The application's word on labels, not the peer's, and no credentials.
	wantHeaders := map[string]string{"x-tenant": "acme,globex", "baggage": "tier=free"}
	if diff := cmp.Diff(wantHeaders, m.GetRequest().GetHeaders()); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}

func TestCheckHTTPAnswers(t *testing.T) {
	rejected := &checkv1.CheckResponse{
		DecisionType: checkv1.CheckResponse_DECISION_TYPE_REJECTED, RejectReason: checkv1.CheckResponse_REJECT_REASON_RATE_LIMITED,
	}
	denied := func(status_ int32, headers map[string]string, body string) *checkhttpv1.CheckHTTPResponse {
		return &checkhttpv1.CheckHTTPResponse{
			Status: &status.Status{Code: int32(codes.Unavailable)}, CheckResponse: rejected,
			HttpResponse: &checkhttpv1.CheckHTTPResponse_DeniedResponse{DeniedResponse: &checkhttpv1.DeniedHttpResponse{
				Status: status_, Headers: headers, Body: body,
			}},
		}
	}
	accepted := &checkhttpv1.CheckHTTPResponse{
		Status: &status.Status{}, CheckResponse: new(checkv1.CheckResponse),
		HttpResponse: &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{
			Headers: map[string]string{"x-class": "bulk", "content-length": "3"},
		}},
	}
	for _, tt := range []struct {
		name   string
		answer *checkhttpv1.CheckHTTPResponse
		opts   []httpguard.MiddlewareOption
		status int
		header map[string]string
		body   string
		class  string // what the handler sees
	}{
		{name: "accepted", answer: accepted, status: 200, body: "done", class: "bulk"},
		{
			name: "A14 denied with headers and a body", answer: denied(418, map[string]string{"retry-after": "7", "x-why": "quota", "transfer-encoding": "chunked"}, "later"),
			status: 418, body: "later",
			header: map[string]string{"Retry-After": "7", "X-Why": "quota", "Content-Type": "text/plain; charset=utf-8", "Transfer-Encoding": ""},
		},
		{
			name: "denied with a type", answer: denied(429, map[string]string{"content-type": "application/json"}, "{}"),
			status: 429, body: "{}", header: map[string]string{"Content-Type": "application/json"},
		},
		{
			name: "denied without a body", answer: denied(429, nil, ""), status: 429,
			body: `{"title":"Too Many Requests","status":429,"detail":"rate limited"}` + "\n", header: map[string]string{"Content-Type": "application/problem+json"},
		},
		{name: "A15 denied without a status", answer: denied(0, nil, "later"), status: 429, body: "later"},
		{name: "denied with a status that is none", answer: denied(200, nil, "later"), status: 429, body: "later"},
		{
			name: "answered by the application", answer: denied(429, map[string]string{"x-why": "quota"}, "later"),
			opts: []httpguard.MiddlewareOption{httpguard.WithOnReject(httpguard.PlainText)}, status: 429, body: "Too Many Requests\n",
			header: map[string]string{"X-Why": "quota"},
		},
		{name: "an empty answer", answer: new(checkhttpv1.CheckHTTPResponse), status: 403, body: `{"title":"Forbidden","status":403,"detail":"no reason given"}` + "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			agent.Answer(flowtest.Answer{HTTPResponse: tt.answer})
			client := agent.Client(flowctl.WithCheckTimeout(10 * time.Second))
			guard := httpguard.Middleware(client, point, append(tt.opts, httpguard.WithCheckHTTP())...)
			var class, length string
			h := guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				class, length = r.Header.Get("X-Class"), r.Header.Get("Content-Length")
				_, _ = w.Write([]byte("done"))
			}))
			w, r := httptest.NewRecorder(), posted()
			h.ServeHTTP(w, r)
			if w.Code != tt.status || w.Body.String() != tt.body {
				t.Errorf("answer %d %q want %d %q", w.Code, w.Body, tt.status, tt.body)
			}
			for name, want := range tt.header {
				if got := w.Header().Get(name); got != want {
					t.Errorf("%s: %q want %q", name, got, want)
				}
			}
			if class != tt.class || length != "" || r.Header.Get("X-Class") != "" {
				t.Errorf("the handler saw X-Class %q and Content-Length %q, the caller's request has %q; want %q and nothing", class, length, r.Header.Get("X-Class"), tt.class)
			}
		})
	}
}

// An engine is asked as always, by the labels that the request has.
func TestCheckHTTPEmbedded(t *testing.T) {
	client := newEngine(t, policy.RateLimiter{
		Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Hour, LimitBy: "http.request.header.x_tenant",
	})
	h := httpguard.Middleware(client, point, httpguard.WithCheckHTTP(), httpguard.WithHeaders("X-Tenant"))(
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	for _, want := range []int{http.StatusOK, http.StatusTooManyRequests} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, posted())
		if w.Code != want {
			t.Errorf("status %d want %d", w.Code, want)
		}
	}
}

// The headers that an agent adds to an accepted request reach the handler, but not in a dry run.
func TestCheckHTTPAddsNothingInADryRun(t *testing.T) {
	for _, dry := range []bool{false, true} {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
			HttpResponse:  &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{Headers: map[string]string{"x-added": "1"}}},
			CheckResponse: new(checkv1.CheckResponse),
		}})
		opts := []flowctl.Option{flowctl.WithCheckTimeout(time.Minute)}
		if dry {
			opts = append(opts, flowctl.WithDryRun())
		}
		var got string
		h := httpguard.Middleware(agent.Client(opts...), "point", httpguard.WithCheckHTTP())(http.HandlerFunc(
			func(_ http.ResponseWriter, r *http.Request) { got = r.Header.Get("X-Added") }))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
		if (got == "1") == dry {
			t.Errorf("dry run %v: the handler's request has the header %q", dry, got)
		}
	}
}
