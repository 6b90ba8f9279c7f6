package agent_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
)

// junk is n labels, before and after all others.
func junk(n int) map[string]string {
	m := make(map[string]string, n)
	for i := range n {
		m[fmt.Sprintf("%c-junk-%04d", 'a'+(i%2)*25, i)] = "v"
	}
	return m
}

// tooMuch is what callers, or strangers by way of baggage, can add to a check of user "u".
func tooMuch() map[string]func(*checkv1.CheckRequest) {
	keys := slices.Collect(maps.Keys(junk(race.Pick(10_000, 100_000))))
	hundreds, thousands := junk(200), junk(5000)
	long := strings.Repeat("x", race.Pick(1<<17, 1<<20)) // longer than any of these may be
	return map[string]func(*checkv1.CheckRequest){
		"nothing":         func(*checkv1.CheckRequest) {},
		"200 labels":      func(m *checkv1.CheckRequest) { maps.Copy(m.Labels, hundreds) },
		"5000 labels":     func(m *checkv1.CheckRequest) { maps.Copy(m.Labels, thousands) },
		"a long value":    func(m *checkv1.CheckRequest) { m.Labels["z"] = long },
		"a long key":      func(m *checkv1.CheckRequest) { m.Labels[long] = "" },
		"an empty key":    func(m *checkv1.CheckRequest) { m.Labels[""] = long },
		"a long user":     func(m *checkv1.CheckRequest) { m.Labels["user_id"] = strings.Repeat("u", 60<<10) },
		"a long cost":     func(m *checkv1.CheckRequest) { m.Labels["cost"] = "1." + strings.Repeat("0", 5000) },
		"a user of 257 B": func(m *checkv1.CheckRequest) { m.Labels["user_id"] = strings.Repeat("ü", 128) + "u" },
		"bad cache keys": func(m *checkv1.CheckRequest) {
			m.CacheLookupRequest = &checkv1.CacheLookupRequest{ResultCacheKey: long, GlobalCacheKeys: []string{"", long, "g"}}
		},
		"many cache keys": func(m *checkv1.CheckRequest) {
			m.CacheLookupRequest = &checkv1.CacheLookupRequest{ResultCacheKey: "r", GlobalCacheKeys: keys}
		},
	}
}

// A limiter holds whatever else the check has in it: an error would let the flow run, and so would an answer that is
// larger than SDKs take.
func TestChecksHoldWhateverTheyCarry(t *testing.T) {
	noQueue := policy.WorkloadParameters{QueueTimeout: policy.NoQueue}
	components := map[string]func(at []policy.Selector) policy.Component{
		"rate limiter": func(at []policy.Selector) policy.Component {
			return policy.RateLimiter{Selectors: at, Capacity: 2, Interval: time.Hour, LimitBy: "user_id", TokensLabel: "cost"}
		},
		"calendar quota": func(at []policy.Selector) policy.Component {
			return policy.CalendarQuota{Selectors: at, Amount: 2, Period: policy.PeriodMonth, LimitBy: "user_id", TokensLabel: "cost"}
		},
		"concurrency limiter": func(at []policy.Selector) policy.Component {
			return policy.ConcurrencyLimiter{Selectors: at, Max: 2, MaxInflight: time.Hour, LimitBy: "user_id", TokensLabel: "cost"}
		},
		"quota scheduler": func(at []policy.Selector) policy.Component {
			return policy.QuotaScheduler{Selectors: at, Capacity: 2, Interval: time.Hour, LimitBy: "user_id", Scheduler: policy.Scheduler{Default: noQueue, WorkloadLabel: "user_id", FairnessLabel: "user_id"}}
		},
		"concurrency scheduler": func(at []policy.Selector) policy.Component {
			return policy.ConcurrencyScheduler{Selectors: at, Max: 2, MaxInflight: time.Hour, LimitBy: "user_id", Scheduler: policy.Scheduler{Default: noQueue, TokensLabel: "cost", PriorityLabel: "user_id"}}
		},
	}
	carried := tooMuch()
	var policies []policy.Policy // one for each subtest, whose control point has its name
	for component, c := range components {
		for name := range carried {
			point := component + "/" + name
			policies = append(policies, policy.Policy{Name: point, Components: []policy.Component{c(policy.At(point))}})
		}
	}
	stub := serve(t, policies).stub(t)
	for component := range components {
		for name, add := range carried {
			point := component + "/" + name
			t.Run(point, func(t *testing.T) {
				var flows []*checkv1.CheckResponse
				for i := range 4 {
					req := &checkv1.CheckRequest{ControlPoint: point, Labels: map[string]string{"user_id": "u"}, ExpectEnd: true}
					add(req)
					m, err := stub.Check(t.Context(), req) // of at most 4 MiB
					if err != nil {
						t.Fatalf("Check() = %v", err)
					}
					if got, want := m.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED, i < 2; got != want {
						t.Fatalf("flow %d accepted: %v want %v", i, got, want)
					}
					if info := m.GetLimiterDecisions()[0]; proto.Size(info) > 1024 {
						t.Errorf("a decision of %d bytes", proto.Size(info))
					}
					flows = append(flows, m)
				}
				for i, m := range flows[:2] { // slots come back by the names in the answer
					ended, err := stub.FlowEnd(t.Context(), &checkv1.FlowEndRequest{ControlPoint: point, InflightRequests: wire.Held(m)})
					if err != nil {
						t.Fatal(err)
					}
					for _, s := range ended.GetTokenReturnStatuses() {
						if !s.GetReturned() {
							t.Errorf("flow %d: %v", i, s.GetError())
						}
					}
				}
			})
		}
	}
}

// Matchers, costs and regular expressions see values whole.
func TestMatchersSeeWholeValues(t *testing.T) {
	long := strings.Repeat("x", 100_000)
	for name, m := range map[string]policy.LabelMatcher{
		"equal":  {Equal: map[string]string{"z": long + "end"}},
		"in":     {Require: []policy.Requirement{{Key: "z", Operator: policy.In, Values: []string{long + "end"}}}},
		"regex":  {Expression: policy.LabelMatches{Label: "z", Regex: "end$"}},
		"exists": {Expression: policy.All{policy.Not{Of: policy.LabelExists("y")}, policy.Any{policy.LabelExists("z")}}},
	} {
		t.Run(name, func(t *testing.T) {
			stub := serve(t, []policy.Policy{{Name: "none", Components: []policy.Component{policy.RateLimiter{
				Selectors: []policy.Selector{{ControlPoint: "point", Labels: m}}, Interval: time.Hour,
			}}}}).stub(t)
			req := &checkv1.CheckRequest{ControlPoint: "point", Labels: junk(200)}
			req.Labels["z"] = long + "end"
			got, err := stub.Check(t.Context(), req)
			if err != nil || got.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED {
				t.Errorf("Check() = %v, %v want rejected", got.GetDecisionType(), err)
			}
		})
	}
}

// Of too many labels an answer reports those that policies name, and is small.
func TestAnswersAreBounded(t *testing.T) {
	stub := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: 1e9, Interval: time.Hour, LimitBy: "zz", TokensLabel: "zzz",
	}}}}).stub(t)
	req := &checkv1.CheckRequest{ControlPoint: "point", Labels: junk(300)}
	for key := range req.Labels {
		req.Labels[key] = strings.Repeat("v", 9000)
	}
	req.Labels["zz"], req.Labels["zzz"] = strings.Repeat("ü", 10_000), "1"
	m, err := stub.Check(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	keys := m.GetFlowLabelKeys()
	if len(keys) != 64 || !slices.Contains(keys, "zz") || !slices.Contains(keys, "zzz") || !slices.Contains(keys, "a-junk-0000") {
		t.Errorf("%d keys: %q", len(keys), keys)
	}
	if got := m.GetTelemetryFlowLabels()["zz"]; got != strings.Repeat("ü", 2048) {
		t.Errorf("a value of %d bytes is reported", len(got))
	}
	if n := proto.Size(m); n > 400<<10 {
		t.Errorf("the answer has %d bytes", n)
	}
}

// A control point that no policy can have is decided about, for what it is worth.
func TestAnyControlPointIsDecided(t *testing.T) {
	s := serve(t, slots(1))
	for _, point := range []string{strings.Repeat("p", 256), strings.Repeat("p", 3<<20)} {
		m, err := s.stub(t).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: point, CacheLookupRequest: &checkv1.CacheLookupRequest{ResultCacheKey: "r"}})
		if err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
			t.Errorf("%d bytes: %v, %v", len(point), m.GetDecisionType(), err)
		}
		if r := m.GetCacheLookupResponse().GetResultCacheResponse(); r.GetLookupStatus() != checkv1.CacheLookupStatus_MISS || r.GetError() == "" {
			t.Errorf("result = %v want a miss and an error", r)
		}
	}
}

// raw sends bytes that Go's own encoder would refuse.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { return proto.Unmarshal(data, v.(proto.Message)) }
func (raw) Name() string                       { return "proto" }

// Text that is not UTF-8 limits as other text does.
func TestTextThatIsNotUTF8(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
			policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user_id"},
			policy.RateLimiter{Selectors: policy.At("web"), Capacity: 1, Interval: time.Hour, LimitBy: "http.request.header.x_user"},
		}}}).conn(t)
		text := func(to []byte, number protowire.Number, s string) []byte {
			return protowire.AppendBytes(protowire.AppendTag(to, number, protowire.BytesType), []byte(s))
		}
		entry := func(key, value string) string { return string(text(text(nil, 1, key), 2, value)) }
		check := text(text(text(nil, 1, "point"), 2, entry("user_id", "\xed\xa0\x80")), 2, entry("\xff", "\xff"))
		checkHTTP := text(text(nil, 4, "web"), 3, string(text(text(nil, 2, entry("x-user", "\xff")), 3, "/\xfe")))
		for i, want := range []checkv1.CheckResponse_DecisionType{checkv1.CheckResponse_DECISION_TYPE_ACCEPTED, checkv1.CheckResponse_DECISION_TYPE_REJECTED} {
			m := new(checkv1.CheckResponse)
			if err := conn.Invoke(t.Context(), "/aperture.flowcontrol.check.v1.FlowControlService/Check", check, m, grpc.ForceCodec(raw{})); err != nil || m.GetDecisionType() != want {
				t.Errorf("check %d: %v, %v want %v", i, m, err, want)
			}
			h := new(checkhttpv1.CheckHTTPResponse)
			if err := conn.Invoke(t.Context(), "/aperture.flowcontrol.checkhttp.v1.FlowControlServiceHTTP/CheckHTTP", checkHTTP, h, grpc.ForceCodec(raw{})); err != nil || h.GetCheckResponse().GetDecisionType() != want {
				t.Errorf("CheckHTTP %d: %v, %v want %v", i, h, err, want)
			}
		}
		if err := conn.Invoke(t.Context(), "/aperture.flowcontrol.check.v1.FlowControlService/Check", []byte("\xff"), new(checkv1.CheckResponse), grpc.ForceCodec(raw{})); err == nil {
			t.Error("what is no message is decided about")
		}
	})
}

// Neither junk headers nor junk members of baggage hide the label that a limiter goes by. A header that carries
// credentials limits if a policy names it, and is not reported.
func TestCheckHTTPLimitsWhateverComesBeside(t *testing.T) {
	const secret = "sesame-1234567890"
	members := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "a%03d=%s,", i, strings.Repeat("v", 100))
		}
		return b.String()
	}
	headers := func(n int) map[string]string {
		m := make(map[string]string, n)
		for i := range n {
			m[fmt.Sprintf("a-%04d", i)] = "v"
		}
		return m
	}
	for _, tt := range []struct {
		name, by string
		headers  func() map[string]string
	}{
		{"60 headers", "http.request.header.x_tenant", func() map[string]string {
			m := headers(60)
			m["x-tenant"] = "acme"
			return m
		}},
		{"5000 headers", "http.request.header.x_tenant", func() map[string]string {
			m := headers(5000)
			m["x-tenant"] = "acme"
			return m
		}},
		{"200 members", "user_id", func() map[string]string {
			return map[string]string{"baggage": members(200) + "user_id=u"}
		}},
		{"members of two megabytes", "user_id", func() map[string]string {
			return map[string]string{"baggage": "z=" + strings.Repeat("v", 2<<20) + ",user_id=u"}
		}},
		{"a key", "http.request.header.x_api_key", func() map[string]string { return map[string]string{"x-api-key": secret} }},
		{"a key among headers", "http.request.header.authorization", func() map[string]string {
			m := headers(100)
			m["Authorization"] = secret
			return m
		}},
		{"a peer's x_user", "http.request.header.x_user", func() map[string]string {
			return map[string]string{"x-user": "mallory", "x_user": fmt.Sprint(rand.Int())}
		}},
		{"a peer's x_user among headers", "http.request.header.x_user", func() map[string]string {
			m := headers(100)
			m["x-user"], m["x_user"] = "mallory", fmt.Sprint(rand.Int())
			return m
		}},
		{"a peer's x_user beside X-User", "http.request.header.x_user", func() map[string]string {
			return map[string]string{"X-User": "mallory", "x_user": fmt.Sprint(rand.Int())}
		}},
		{"the query", "http.target", func() map[string]string { return nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				at := policy.At("web")
				s := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
					policy.ConcurrencyLimiter{Selectors: at, Max: 2, MaxInflight: time.Hour, LimitBy: tt.by},
					policy.Sampler{Selectors: at, AcceptPercentage: 100, SessionLabel: tt.by},
					policy.QuotaScheduler{Selectors: at, Capacity: 100, Interval: time.Hour, LimitBy: tt.by, Scheduler: policy.Scheduler{WorkloadLabel: tt.by}},
				}}})
				stub := s.stubHTTP(t)
				var held []*checkv1.InflightRequestRef
				for i := range 4 {
					m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "web", ExpectEnd: true, Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
						Method: http.MethodGet, Path: "/a?b=c", Headers: tt.headers(),
					}})
					if err != nil {
						t.Fatal(err)
					}
					if got, want := m.GetStatus().GetCode() == int32(codes.OK), i < 2; got != want {
						t.Fatalf("request %d accepted: %v want %v: %v", i, got, want, m.GetCheckResponse().GetLimiterDecisions())
					}
					data, err := base64.StdEncoding.DecodeString(m.GetDynamicMetadata().GetFields()["aperture.check_response"].GetStringValue())
					if err != nil {
						t.Fatal(err)
					}
					if strings.Contains(m.String()+string(data), secret) {
						t.Errorf("the answer tells the key: %v", m)
					}
					if n := proto.Size(m); n > 1<<20 {
						t.Errorf("the answer has %d bytes", n)
					}
					held = append(held, wire.Held(m.GetCheckResponse())...)
				}
				ended, err := s.stub(t).FlowEnd(t.Context(), &checkv1.FlowEndRequest{InflightRequests: held})
				if err != nil || len(held) != 2 {
					t.Fatalf("%d slots, %v", len(held), err)
				}
				for _, one := range ended.GetTokenReturnStatuses() {
					if !one.GetReturned() {
						t.Errorf("not returned: %v", one)
					}
				}
			})
		})
	}
}

// A label that carries credentials is reported by no answer to Check either.
func TestCredentialsAreNotReported(t *testing.T) {
	m, err := serve(t, nil).stub(t).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{
		"http.request.header.authorization": "sesame", "http.request.header.x_user": "u",
		"cookie": "sesame", "X-API-Key": "sesame", "api_key": "sesame",
	}})
	if err != nil || strings.Contains(m.String(), "sesame") || m.GetTelemetryFlowLabels()["http.request.header.x_user"] != "u" {
		t.Errorf("Check() = %v, %v", m, err)
	}
}

// Telemetry reports the labels by which latencies are measured, headers too, and no other headers.
func TestTelemetryHasMeasuredHeaders(t *testing.T) {
	stub := serve(t, []policy.Policy{{Name: "load", Components: []policy.Component{policy.LoadScheduler{
		Selectors: policy.At("db"),
		LoadMultiplier: policy.MeanLatency{Over: time.Minute, Selectors: []policy.Selector{{
			ControlPoint: "web", Labels: policy.LabelMatcher{Equal: map[string]string{"http.request.header.x_kind": "read"}},
		}}},
	}}}}).stubHTTP(t)
	m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "web", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
		Headers: map[string]string{"x-kind": "read", "x-other": "1"},
	}})
	got := m.GetCheckResponse().GetTelemetryFlowLabels()
	if err != nil || got["http.request.header.x_kind"] != "read" || got["http.request.header.x_other"] != "" {
		t.Errorf("telemetry labels = %v, %v", got, err)
	}
}

// http.target is the path as it was sent.
func TestCheckHTTPTarget(t *testing.T) {
	stub := serve(t, nil).stubHTTP(t)
	for _, path := range []string{"/a?b=c", "/a%2Fb?c#d", "*", "%", "//a/../b", "http://h/a?b", "/" + url.QueryEscape("ü")} {
		m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "web", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Path: path}})
		if got := m.GetCheckResponse().GetTelemetryFlowLabels()["http.target"]; err != nil || got != path {
			t.Errorf("http.target = %q, %v want %q", got, err, path)
		}
	}
}

// A bad cache key is answered by itself, in each of the calls, and the good ones are done.
func TestBadCacheKeys(t *testing.T) {
	const missed, failed = checkv1.CacheLookupStatus_MISS, checkv1.CacheOperationStatus_ERROR
	stub := serve(t, nil).stub(t)
	long := strings.Repeat("k", 256)
	global := func(r *checkv1.KeyLookupResponse, text string) {
		t.Helper()
		if r == nil || r.GetLookupStatus() != missed || (r.GetOperationStatus() == failed) != (text != "") || r.GetError() != text {
			t.Errorf("%v want a miss and %q", r, text)
		}
	}
	const tooLong, empty, negative = "cache key of 256 bytes is longer than 255", "cache key cannot be empty", "the time to live is negative"
	up, err := stub.CacheUpsert(t.Context(), &checkv1.CacheUpsertRequest{ // without a control point
		ResultCacheEntry: &checkv1.CacheEntry{Key: "r", Value: []byte("v")},
		GlobalCacheEntries: map[string]*checkv1.CacheEntry{
			"g": {Value: []byte("v"), Ttl: &durationpb.Duration{Seconds: 3600, Nanos: -7}}, "h": {Value: []byte("v"), Ttl: &durationpb.Duration{Seconds: 1 << 62, Nanos: -1}},
			"n": {Value: []byte("v"), Ttl: durationpb.New(-time.Second)}, "malformed": {Value: []byte("v"), Ttl: &durationpb.Duration{Seconds: -5, Nanos: 7}}, "least": {Value: []byte("v"), Ttl: &durationpb.Duration{Seconds: math.MinInt64}},
			"sum": {Value: []byte("v"), Ttl: &durationpb.Duration{Seconds: 1, Nanos: math.MinInt32}}, long: {}, "": {}, "big": {Value: make([]byte, 3<<20+1)},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := up.GetResultCacheResponse(); got.GetOperationStatus() != failed || got.GetError() != "cache control_point cannot be empty" {
		t.Errorf("result = %v", got)
	}
	for key, want := range map[string]string{"g": "", "h": "", "n": negative, "malformed": negative, "least": negative, "sum": negative, long: tooLong, "": empty, "big": "cache entry of 3145729 bytes is larger than 3145728"} {
		if got := up.GetGlobalCacheResponses()[key]; got == nil || got.GetError() != want {
			t.Errorf("entry %.10q: %v want %q", key, got, want)
		}
	}
	asked := &checkv1.CacheLookupRequest{ControlPoint: "point", ResultCacheKey: long, GlobalCacheKeys: []string{"none", long, "g", "h", "", "g"}}
	look, err := stub.CacheLookup(t.Context(), asked)
	if err != nil {
		t.Fatal(err)
	}
	m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", CacheLookupRequest: asked})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*checkv1.CacheLookupResponse{look, m.GetCacheLookupResponse()} {
		global(r.GetResultCacheResponse(), tooLong)
		global(r.GetGlobalCacheResponses()["none"], "")
		global(r.GetGlobalCacheResponses()[long], tooLong)
		global(r.GetGlobalCacheResponses()[""], empty)
		for _, key := range []string{"g", "h"} {
			if got := r.GetGlobalCacheResponses()[key]; string(got.GetValue()) != "v" {
				t.Errorf("%s = %v want the value", key, got)
			}
		}
	}
	del, err := stub.CacheDelete(t.Context(), &checkv1.CacheDeleteRequest{ResultCacheKey: "r", GlobalCacheKeys: []string{long, "g", ""}})
	if err != nil {
		t.Fatal(err)
	}
	if got := del.GetResultCacheResponse(); got.GetOperationStatus() != failed {
		t.Errorf("result = %v want an error", got)
	}
	for key, want := range map[string]string{"g": "", long: tooLong, "": empty} {
		if got := del.GetGlobalCacheResponses()[key]; got == nil || got.GetError() != want {
			t.Errorf("delete of %.10q: %v want %q", key, got, want)
		}
	}
	// Beyond the bound keys are refused one by one, too.
	keys := make([]string, 1030)
	for i := range keys {
		keys[i] = fmt.Sprint(i)
	}
	many, err := stub.CacheLookup(t.Context(), &checkv1.CacheLookupRequest{GlobalCacheKeys: keys})
	if err != nil {
		t.Fatal(err)
	}
	global(many.GetGlobalCacheResponses()["1023"], "")
	global(many.GetGlobalCacheResponses()["1024"], "there are more than 1024 cache keys")
}

// Cached values do not make an answer larger than SDKs take, and a result that has no room is a miss before quotas are
// asked, because its flow will run.
func TestCachedValuesAreBounded(t *testing.T) {
	s := serve(t, []policy.Policy{{Name: "quota", Components: []policy.Component{policy.QuotaScheduler{
		Selectors: policy.At("point"), Interval: time.Hour, Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
	}}}})
	stub := s.stub(t)
	put := func(m *checkv1.CacheUpsertRequest) {
		t.Helper()
		if _, err := stub.CacheUpsert(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	value := make([]byte, 3<<20)
	put(&checkv1.CacheUpsertRequest{ControlPoint: "point", ResultCacheEntry: &checkv1.CacheEntry{Key: "r", Value: value}})
	var keys []string
	for i := range 5 {
		keys = append(keys, fmt.Sprint(i))
		put(&checkv1.CacheUpsertRequest{GlobalCacheEntries: map[string]*checkv1.CacheEntry{keys[i]: {Value: value}}})
	}
	req := &checkv1.CheckRequest{ControlPoint: "point", Labels: junk(64), CacheLookupRequest: &checkv1.CacheLookupRequest{ResultCacheKey: "r", GlobalCacheKeys: keys}}
	for key := range req.Labels {
		req.Labels[key] = strings.Repeat("v", 4096)
	}
	m, err := stub.Check(t.Context(), req)
	if err != nil || len(m.GetCacheLookupResponse().GetResultCacheResponse().GetValue()) != len(value) {
		t.Fatalf("Check() = %v, %v want the result", m.GetDecisionType(), err)
	}
	if got := m.GetCacheLookupResponse().GetGlobalCacheResponses()["0"]; got.GetLookupStatus() != checkv1.CacheLookupStatus_MISS || got.GetError() == "" {
		t.Errorf("an entry without room: %v want a miss and an error", got)
	}
	look, err := stub.CacheLookup(t.Context(), &checkv1.CacheLookupRequest{GlobalCacheKeys: keys})
	if err != nil || len(look.GetGlobalCacheResponses()["0"].GetValue()) != len(value) || look.GetGlobalCacheResponses()["4"].GetError() == "" {
		t.Errorf("CacheLookup() = %v", err)
	}
	// The host of the engine can store what is larger.
	here := clientOf(t, s.engine)
	flow := here.Start(t.Context(), "elsewhere", lookingFor("big"))
	if err := flow.SetResultCache(t.Context(), make([]byte, 5<<20), 0); err != nil {
		t.Fatal(err)
	}
	req = &checkv1.CheckRequest{ControlPoint: "elsewhere", CacheLookupRequest: &checkv1.CacheLookupRequest{ResultCacheKey: "big"}}
	m, err = stub.Check(t.Context(), req)
	if got := m.GetCacheLookupResponse().GetResultCacheResponse(); err != nil || got.GetLookupStatus() != checkv1.CacheLookupStatus_MISS || got.GetError() == "" {
		t.Errorf("a result without room: %v, %v want a miss and an error", got, err)
	}
}

// An SDK that ends many flows at once loses no slot.
func TestFlowEndOfManySlots(t *testing.T) {
	stub := serve(t, slots(300)).stub(t)
	var held []*checkv1.InflightRequestRef
	for range 300 {
		m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}})
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, wire.Held(m)...)
	}
	m, err := stub.FlowEnd(t.Context(), &checkv1.FlowEndRequest{InflightRequests: held})
	if err != nil {
		t.Fatal(err)
	}
	returned := 0
	for _, s := range m.GetTokenReturnStatuses() {
		if s.GetReturned() {
			returned++
		}
	}
	if returned != 300 {
		t.Errorf("%d slots came back want 300", returned)
	}
	if m, err := stub.FlowEnd(t.Context(), &checkv1.FlowEndRequest{InflightRequests: make([]*checkv1.InflightRequestRef, 1<<12+1)}); err != nil || len(m.GetTokenReturnStatuses()) != 1<<12 {
		t.Errorf("FlowEnd() = %d statuses, %v", len(m.GetTokenReturnStatuses()), err)
	}
}

// The span of a flow whose client said that it would not end it frees its slots, once, and no other span does.
func TestSpansEndFlows(t *testing.T) {
	for _, tt := range []struct {
		name   string
		expect bool
		change func(*checkv1.CheckResponse)
		report report
		free   bool
	}{
		{name: "base64", free: true},
		{name: "JSON", report: report{json: true}, free: true},
		{name: "of a flow that failed", report: report{status: "Error"}, free: true},
		{name: "a client that ends its flows", expect: true},
		{name: "a client that ends its flows, in JSON", expect: true, report: report{json: true}},
		{name: "forged slot", change: func(m *checkv1.CheckResponse) {
			m.GetLimiterDecisions()[0].GetConcurrencyLimiterInfo().RequestId = "100000001"
		}},
		{name: "forged limiter", change: func(m *checkv1.CheckResponse) { m.GetLimiterDecisions()[0].PolicyHash = "0" }},
		{name: "no answer", report: report{check: "?"}},
		{name: "no answer in JSON", report: report{check: "{"}},
	} {
		for _, asked := range []string{"Check", "CheckHTTP"} {
			t.Run(tt.name+"/"+asked, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := serve(t, slots(1))
					start := func() *checkv1.CheckResponse {
						t.Helper()
						if asked == "Check" {
							m, err := s.stub(t).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}, ExpectEnd: tt.expect})
							if err != nil {
								t.Fatal(err)
							}
							return m
						}
						m, err := s.stubHTTP(t).CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{
							ControlPoint: "point", ExpectEnd: tt.expect,
							Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: map[string]string{"baggage": "user_id=u"}},
						})
						if err != nil {
							t.Fatal(err)
						}
						return m.GetCheckResponse()
					}
					m := start()
					if tt.change != nil {
						tt.change(m)
					}
					r := tt.report
					if r.check == "" {
						r.answer = m
					}
					export := func() {
						data := &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{ScopeSpans: []*tracev1.ScopeSpans{{Spans: []*tracev1.Span{r.span()}}}}}}
						if err := s.conn(t).Invoke(t.Context(), telemetry.Export, data, new(emptypb.Empty)); err != nil {
							t.Fatal(err)
						}
					}
					export()
					if got := start().GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED; got != tt.free {
						t.Errorf("the slot is free: %v want %v", got, tt.free)
					}
					export() // again: the slot is another flow's now
					if start().GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
						t.Error("a slot was freed twice")
					}
				})
			})
		}
	}
}

// Decisions tell which component would have dropped the flow, had it been for real.
func TestDryRunsAreToldOverTheWire(t *testing.T) {
	stub := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Hour, DryRun: true},
		policy.RateLimiter{Selectors: policy.At("point"), Capacity: 5, Interval: time.Hour, DryRun: true},
	}}}).stub(t)
	m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point"})
	if err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		t.Fatalf("Check() = %v, %v", m, err)
	}
	for i, dropped := range []bool{true, false} {
		if d := m.GetLimiterDecisions()[i]; !d.GetDryRun() || d.GetDropped() != dropped {
			t.Errorf("decision %d = %v want a dry run that drops: %v", i, d, dropped)
		}
	}
}

// No check with a control point is an error, as it comes from the network: by bytes, whatever its text, keys and sizes.
func FuzzNoCheckIsAnError(f *testing.F) {
	f.Add("point", "user_id", "u", "r", "g", 3, uint16(1))
	f.Add("\xff", "", "\xff", strings.Repeat("k", 300), "", 300, uint16(5000))
	f.Add(strings.Repeat("p", 300), strings.Repeat("k", 300), "v", "", "\xfe", -1, uint16(9000))
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Second, LimitBy: "user_id"},
		policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: "http.request.header.x_api_key", TokensLabel: "cost"},
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = e.Close() })
	services := make(methods)
	agent.Register(services, e)
	f.Fuzz(func(t *testing.T, point, key, value, result, global string, n int, size uint16) {
		if point == "" || (len(key)+len(value)+len(global)+int(size)+300)*min(max(n, 1), 300) > 2<<20 {
			return // larger than a server takes, and slow to make
		}
		text := func(to []byte, number protowire.Number, s string) []byte {
			return protowire.AppendBytes(protowire.AppendTag(to, number, protowire.BytesType), []byte(s))
		}
		entry := func(key, value string) string { return string(text(text(nil, 1, key), 2, value)) }
		check, lookup, request := text(nil, 1, point), text(nil, 2, result), []byte(nil)
		value += strings.Repeat("x", int(size))
		for i := range min(max(n, 1), 300) {
			check = text(check, 2, entry(key+strings.Repeat("i", i), value))
			lookup = text(lookup, 3, global+strings.Repeat("i", i))
			request = text(request, 2, entry(key+strings.Repeat("i", i), value))
		}
		check = text(check, 4, string(lookup))
		request = text(text(text(request, 2, entry("baggage", value+"="+key)), 3, result), 4, global)
		m, err := services.call(t.Context(), "Check", check)
		if err != nil {
			t.Fatalf("Check() = %v", err)
		}
		if n := proto.Size(m); n > 4<<20 {
			t.Fatalf("the answer has %d bytes", n)
		}
		if _, err := proto.Marshal(m); err != nil {
			t.Fatalf("the answer cannot be sent: %v", err)
		}
		h, err := services.call(t.Context(), "CheckHTTP", text(text(nil, 4, point), 3, string(request)))
		if err != nil {
			t.Fatalf("CheckHTTP() = %v", err)
		}
		if n := proto.Size(h); n > 4<<20 {
			t.Fatalf("the answer has %d bytes", n)
		}
		if _, err := proto.Marshal(h); err != nil {
			t.Fatalf("the answer cannot be sent: %v", err)
		}
	})
}

// methods are services' methods by name, as a server finds them.
type methods map[string]method

type method struct {
	grpc.MethodDesc
	impl any
}

func (m methods) RegisterService(d *grpc.ServiceDesc, impl any) {
	for _, one := range d.Methods {
		m[one.MethodName] = method{one, impl}
	}
}

func (m methods) call(ctx context.Context, name string, request []byte) (proto.Message, error) {
	one := m[name]
	response, err := one.Handler(one.impl, ctx, func(into any) error {
		if err := proto.Unmarshal(request, into.(proto.Message)); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		return nil
	}, nil)
	if err != nil {
		return nil, err
	}
	return response.(proto.Message), nil
}

// clientOf is a client in the process.
func clientOf(t *testing.T, e *engine.Engine) *flowctl.Client {
	t.Helper()
	c, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func lookingFor(key string) flowctl.Params { return flowctl.Params{ResultCacheKey: key} }
