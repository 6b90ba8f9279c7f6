package agent_test

import (
	"testing"
	"testing/synctest"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/policy"
)

// A circuit breaker of an engine that is served learns from spans how flows end, of whatever SDK. One says no more than that of a
// flow of its own: two flows were admitted here, to the upstream a, and two failures there open the breaker of an upstream.
func TestOutcomes(t *testing.T) {
	failed := func(m *checkv1.CheckResponse) report { return report{answer: m, status: "Error"} }
	elsewhere := func(change func(*checkv1.CheckResponse)) func(*checkv1.CheckResponse) report {
		return func(m *checkv1.CheckResponse) report {
			m = proto.CloneOf(m)
			change(m)
			return failed(m)
		}
	}
	took := func(took time.Duration) func(*checkv1.CheckResponse) report {
		return func(m *checkv1.CheckResponse) report {
			begin := time.Now().UnixNano()
			return report{answer: m, status: "OK", begin: begin, end: begin + int64(took)}
		}
	}
	for _, tt := range []struct {
		name   string
		report func(*checkv1.CheckResponse) report
		times  int  // that each is sent; 0 is 1
		only   bool // of the first flow
		want   string
	}{
		{name: "errors", report: failed, want: "open"},
		{name: "errors in JSON", report: func(m *checkv1.CheckResponse) report { return report{answer: m, json: true, status: "Error"} }, want: "open"},
		{name: "successes", report: func(m *checkv1.CheckResponse) report { return report{answer: m, status: "OK"} }, want: "closed"},
		{name: "slow flows", report: took(2 * time.Second), want: "open"},
		{name: "flows that are not slow", report: took(time.Second), want: "closed"},
		{name: "flows that took longer than since they began", report: took(time.Hour), want: "open"},
		{name: "one error, again and again", report: failed, times: 9, only: true, want: "closed"},
		{name: "of another upstream", report: elsewhere(func(m *checkv1.CheckResponse) {
			m.GetLimiterDecisions()[0].GetRateLimiterInfo().Label = "upstream:b"
		}), want: "closed"},
		{name: "of another component", report: elsewhere(func(m *checkv1.CheckResponse) { m.LimiterDecisions[0].ComponentId = "other" }), want: "closed"},
		{name: "of another time", report: elsewhere(func(m *checkv1.CheckResponse) {
			m.Start = timestamppb.New(m.GetStart().AsTime().Add(1))
		}), want: "closed"},
		{name: "of no time", report: elsewhere(func(m *checkv1.CheckResponse) { m.Start = nil }), want: "closed"},
		{name: "dropped", report: elsewhere(func(m *checkv1.CheckResponse) { m.LimiterDecisions[0].Dropped = true }), want: "closed"},
		{name: "rejected", report: elsewhere(func(m *checkv1.CheckResponse) { m.DecisionType = checkv1.CheckResponse_DECISION_TYPE_REJECTED }), want: "closed"},
		{name: "with a cached result", report: elsewhere(func(m *checkv1.CheckResponse) {
			m.CacheLookupResponse = &checkv1.CacheLookupResponse{ResultCacheResponse: &checkv1.KeyLookupResponse{}}
		}), want: "closed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{policy.CircuitBreaker{
					ID: "breaker", Selectors: policy.At("point"), LimitBy: "upstream", FailureCount: 2, SlowAfter: 1500 * time.Millisecond,
					Window: time.Hour, OpenDuration: time.Hour,
				}}}})
				conn := s.conn(t)
				var spans []*tracev1.Span
				for i := range 2 {
					<-time.After(time.Microsecond) // two flows of one time are the same to an agent
					m, err := s.stub(t).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"upstream": "a"}, ExpectEnd: true})
					if err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
						t.Fatal(m, err)
					}
					for range max(tt.times, 1) {
						if i == 0 || !tt.only {
							spans = append(spans, tt.report(m).span())
						}
					}
				}
				<-time.After(2 * time.Second)
				data := &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{ScopeSpans: []*tracev1.ScopeSpans{{Spans: spans}}}}}
				if err := conn.Invoke(t.Context(), telemetry.Export, data, new(emptypb.Empty)); err != nil {
					t.Fatal(err)
				}
				c, err := s.engine.Component("p", "breaker")
				if err != nil {
					t.Fatal(err)
				}
				for upstream, want := range map[string]string{"a": tt.want, "b": "closed"} {
					if got, err := c.Peek(t.Context(), upstream); err != nil || got.State != want {
						t.Errorf("Peek(%s) = %+v, %v want it %s", upstream, got, err, want)
					}
				}
			})
		})
	}
}
