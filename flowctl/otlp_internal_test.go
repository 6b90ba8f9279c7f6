package flowctl

import (
	"bytes"
	"encoding/base64"
	"testing"

	"github.com/google/go-cmp/cmp"
	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	resourcev1 "go.opentelemetry.io/proto/otlp/resource/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/headgate-go/headgate/internal/collector"
	"github.com/headgate-go/headgate/internal/version"
)

func text(key, value string) *commonv1.KeyValue {
	return &commonv1.KeyValue{Key: key, Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_StringValue{StringValue: value}}}
}

func number(key string, value int64) *commonv1.KeyValue {
	return &commonv1.KeyValue{Key: key, Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_IntValue{IntValue: value}}}
}

// The bytes must be what OTLP's own messages say.
func TestBatch(t *testing.T) {
	records := []record{
		{start: 1, workload: 2, end: 3, check: []byte("check"), failed: true},
		{start: 1 << 60, workload: -1, end: 1<<63 - 1},
		{check: bytes.Repeat([]byte{0xff}, 1000)},
	}
	var want []*tracev1.Span
	for _, r := range records {
		status := "OK"
		if r.failed {
			status = "Error"
		}
		want = append(want, &tracev1.Span{
			Name: "Aperture Check", Kind: tracev1.Span_SPAN_KIND_INTERNAL,
			StartTimeUnixNano: uint64(r.start), EndTimeUnixNano: uint64(r.end),
			Attributes: []*commonv1.KeyValue{
				text("aperture.source", "sdk"),
				number("aperture.flow_start_timestamp", r.start),
				number("aperture.workload_start_timestamp", r.workload),
				number("aperture.flow_end_timestamp", r.end),
				text("aperture.flow.status", status),
				text("aperture.check_response", base64.StdEncoding.EncodeToString(r.check)),
			},
		})
	}
	var x batch
	for range 2 { // its buffers are used again
		message, n := x.encode(records)
		if n != len(records) {
			t.Fatalf("%d records were encoded want %d", n, len(records))
		}
		got := new(tracev1.TracesData)
		if err := proto.Unmarshal(message, got); err != nil {
			t.Fatal(err)
		}
		ids := make(map[string]bool)
		for _, s := range got.GetResourceSpans()[0].GetScopeSpans()[0].GetSpans() {
			if len(s.GetTraceId()) != 16 || len(s.GetSpanId()) != 8 {
				t.Errorf("ids = %x, %x", s.GetTraceId(), s.GetSpanId())
			}
			ids[string(s.GetTraceId())] = true
			s.TraceId, s.SpanId = nil, nil
		}
		if len(ids) != len(records) {
			t.Errorf("%d trace ids want %d", len(ids), len(records))
		}
		data := &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{
			Resource:   &resourcev1.Resource{Attributes: []*commonv1.KeyValue{text("service.name", "headgate-go"), text("service.version", version.Version)}},
			ScopeSpans: []*tracev1.ScopeSpans{{Spans: want}},
		}}}
		if diff := cmp.Diff(data, got, protocmp.Transform()); diff != "" {
			t.Errorf("request (-want +got):\n%s", diff)
		}
	}
}

// A request stays below the 4 MiB that a server takes, and holds one record at least.
func TestBatchIsCut(t *testing.T) {
	records := make([]record, 10)
	for i := range records {
		records[i].check = make([]byte, 600<<10)
	}
	records[7].check = make([]byte, 2<<20)
	var x batch
	var sizes []int
	for rest := records; len(rest) > 0; {
		message, n := x.encode(rest)
		if len(message) > 4<<20 {
			t.Errorf("a request has %d bytes", len(message))
		}
		if err := proto.Unmarshal(message, new(tracev1.TracesData)); err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, n)
		rest = rest[n:]
	}
	if diff := cmp.Diff([]int{3, 3, 1, 1, 2}, sizes); diff != "" {
		t.Errorf("records to a request (-want +got):\n%s", diff)
	}
}

func TestBatchAllocations(t *testing.T) {
	records := make([]record, 100)
	for i := range records {
		records[i].check = make([]byte, 300)
	}
	var x batch
	x.encode(records)
	if got := testing.AllocsPerRun(100, func() { x.encode(records) }); got > 8 {
		t.Errorf("%v allocations for 100 records want a few for the request", got)
	}
}

// What the exporter counts on is what spans come to.
func TestSpanBytes(t *testing.T) {
	for _, check := range [][]byte{nil, make([]byte, 300), make([]byte, 100<<10)} {
		r := record{start: -1, workload: -1, end: -1, check: check, failed: true, dryRun: true} // the longest there are
		span := appendBytes(nil, collector.Spans, appendSpan(nil, &r))
		if got, most := len(span), base64.StdEncoding.EncodedLen(len(check))+spanBytes; got > most || got < most-64 {
			t.Errorf("span with a check of %d bytes: %d bytes want %d or a few less", len(check), got, most)
		}
	}
}
