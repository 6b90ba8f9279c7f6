package agent_test

import (
	"context"
	"encoding/base64"
	"math"
	"testing"
	"testing/synctest"
	"time"

	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/policy"
)

// A report is what a client's telemetry says about a flow.
type report struct {
	answer     *checkv1.CheckResponse
	json       bool
	dryRun     bool
	check      string // instead of the answer
	status     string
	start      int64 // of the flow; 0: not told
	begin, end int64 // of the work
	unit       string
}

func (r report) span() *tracev1.Span {
	text := func(key, value string) *commonv1.KeyValue {
		return &commonv1.KeyValue{Key: key, Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_StringValue{StringValue: value}}}
	}
	number := func(key string, value int64) *commonv1.KeyValue {
		return &commonv1.KeyValue{Key: key, Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_IntValue{IntValue: value}}}
	}
	check := r.check
	switch {
	case r.answer == nil:
	case r.json:
		check = protojson.Format(r.answer)
	default:
		data, _ := proto.Marshal(r.answer)
		check = base64.StdEncoding.EncodeToString(data)
	}
	span := &tracev1.Span{Name: "Aperture Check", StartTimeUnixNano: 1, Attributes: []*commonv1.KeyValue{
		text("aperture.source", "sdk"),
		text("aperture.flow.status", r.status),
		text("aperture.check_response", check),
	}}
	if r.dryRun {
		span.Attributes = append(span.Attributes, text("headgate.dry_run", "true"))
	}
	if r.start != 0 {
		span.Attributes = append(span.Attributes, number("aperture.flow_start_timestamp"+r.unit, r.start))
	}
	if r.begin != 0 {
		span.Attributes = append(span.Attributes, number("aperture.workload_start_timestamp"+r.unit, r.begin), number("aperture.flow_end_timestamp"+r.unit, r.end))
	}
	return span
}

// The engine of a server learns from its clients' telemetry how long flows take. It is read off a load scheduler here,
// which lets in as many hundredths as the mean has milliseconds.
func TestLatencies(t *testing.T) {
	const ms, second = int64(time.Millisecond), int64(time.Second)
	read := &checkv1.CheckResponse{ControlPoint: "work", TelemetryFlowLabels: map[string]string{"kind": "read"}}
	hit := proto.CloneOf(read)
	hit.CacheLookupResponse = &checkv1.CacheLookupResponse{ResultCacheResponse: &checkv1.KeyLookupResponse{}}
	miss := proto.CloneOf(hit)
	miss.CacheLookupResponse.ResultCacheResponse.LookupStatus = checkv1.CacheLookupStatus_MISS
	rejected := proto.CloneOf(read)
	rejected.DecisionType = checkv1.CheckResponse_DECISION_TYPE_REJECTED
	waited := proto.CloneOf(read)
	waited.Start, waited.End = timestamppb.New(time.Unix(50, 0)), timestamppb.New(time.Unix(51, 0))
	for _, tt := range []struct {
		name   string
		report report // beside one of 30 ms
		want   float64
	}{
		{"base64", report{answer: read, status: "OK", begin: second, end: second + 90*ms}, 0.6},
		{"JSON", report{answer: read, json: true, status: "OK", begin: second, end: second + 90*ms}, 0.6},
		{"milliseconds", report{answer: read, status: "Ok", begin: 1000, end: 1090, unit: "_ms"}, 0.6},
		{"a miss", report{answer: miss, status: "OK", begin: second, end: second + 90*ms}, 0.6},
		{"a hit", report{answer: hit, status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"the work starts with the flow, and waits a second", report{answer: waited, status: "OK", start: second, begin: second, end: 2*second + 90*ms}, 0.6},
		{"the work starts after the wait", report{answer: waited, status: "OK", start: second, begin: 2 * second, end: 2*second + 90*ms}, 0.6},
		{"rejected", report{answer: rejected, status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"rejected in a dry run", report{answer: rejected, dryRun: true, status: "OK", begin: second, end: second + 90*ms}, 0.6},
		{"a hit in a dry run", report{answer: hit, dryRun: true, status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"failed in a dry run", report{answer: rejected, dryRun: true, status: "Error", begin: second, end: second + 90*ms}, 0.3},
		{"failed", report{answer: read, status: "Error", begin: second, end: second + 90*ms}, 0.3},
		{"ended before it began", report{answer: read, status: "OK", begin: second, end: second - 90*ms}, 0.3},
		{"took for ever", report{answer: read, status: "OK", begin: second, end: 1 << 60}, 0.3},
		{"no times", report{answer: read, status: "OK"}, 0.3},
		{"no answer", report{status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"no answer in base64", report{check: "?", status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"no answer in JSON", report{check: "{", status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"elsewhere", report{answer: &checkv1.CheckResponse{ControlPoint: "other"}, status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"elsewhere, in JSON", report{answer: &checkv1.CheckResponse{ControlPoint: "other"}, json: true, status: "OK", begin: second, end: second + 90*ms}, 0.3},
		{"not selected", report{answer: &checkv1.CheckResponse{ControlPoint: "work"}, status: "OK", begin: second, end: second + 90*ms}, 0.3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serve(t, []policy.Policy{{Name: "load", Components: []policy.Component{policy.LoadScheduler{
					Selectors: policy.At("point"),
					LoadMultiplier: policy.MeanLatency{
						Selectors: []policy.Selector{{ControlPoint: "work", Labels: policy.LabelMatcher{Equal: map[string]string{"kind": "read"}}}},
						Over:      time.Hour, Times: 0.01,
					},
					Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
				}}}})
				c := s.client(t)
				flow := c.Start(t.Context(), "work", flowctl.Params{Labels: map[string]string{"kind": "read"}})
				<-time.After(30 * time.Millisecond)
				_, _ = flow.End(t.Context())
				_ = c.Close(t.Context())

				conn, err := grpc.NewClient("passthrough:///localhost", s.dialer, grpc.WithTransportCredentials(insecure.NewCredentials()))
				if err != nil {
					t.Fatal(err)
				}
				asked, err := checkv1.NewFlowControlServiceClient(conn).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "work"})
				if err != nil {
					t.Fatal(err)
				}
				<-time.After(3 * time.Second)
				r := tt.report
				if r.answer != nil {
					took := r.answer.GetEnd().AsTime().Sub(r.answer.GetStart().AsTime())
					r.answer = proto.CloneOf(r.answer)
					r.answer.Start, r.answer.End = asked.GetStart(), timestamppb.New(asked.GetStart().AsTime().Add(took))
				}
				data := &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{ScopeSpans: []*tracev1.ScopeSpans{{Spans: []*tracev1.Span{r.span()}}}}}}
				if err := conn.Invoke(t.Context(), telemetry.Export, data, new(emptypb.Empty)); err != nil {
					t.Fatal(err)
				}
				_ = conn.Close()
				if got := s.server.Spans(); got != 2 {
					t.Errorf("%d records of flows want 2", got)
				}

				here, err := flowctl.New(s.engine)
				if err != nil {
					t.Fatal(err)
				}
				in, n := 0, 0
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
