package telemetry

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

	"github.com/headgate-go/headgate/internal/version"
)

// most is how many bytes flowctl lets a request have.
const most = 3 << 20

func text(key, value string) *commonv1.KeyValue {
	return &commonv1.KeyValue{Key: key, Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_StringValue{StringValue: value}}}
}

func number(key string, value int64) *commonv1.KeyValue {
	return &commonv1.KeyValue{Key: key, Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_IntValue{IntValue: value}}}
}

// The bytes must be what OTLP's own messages say.
func TestBatch(t *testing.T) {
	records := []Record{
		{Start: 1, Work: 2, End: 3, Check: []byte("check"), Status: Error},
		{Start: 1 << 60, Work: -1, End: 1<<63 - 1, Status: OK},
		{Check: bytes.Repeat([]byte{0xff}, 1000), Status: OK, DryRun: true},
		{Start: 4, Work: 5, End: 6, Status: OK, Canceled: true},
	}
	var want []*tracev1.Span
	for _, r := range records {
		attributes := []*commonv1.KeyValue{
			text("aperture.source", "sdk"),
			number("aperture.flow_start_timestamp", r.Start),
			number("aperture.workload_start_timestamp", r.Work),
			number("aperture.flow_end_timestamp", r.End),
			text("aperture.flow.status", r.Status),
		}
		if r.DryRun {
			attributes = append(attributes, text("headgate.dry_run", "true"))
		}
		if r.Canceled {
			attributes = append(attributes, text("headgate.canceled", "true"))
		}
		want = append(want, &tracev1.Span{
			Name: "Aperture Check", Kind: tracev1.Span_SPAN_KIND_INTERNAL,
			StartTimeUnixNano: uint64(r.Start), EndTimeUnixNano: uint64(r.End),
			Attributes: append(attributes, text("aperture.check_response", base64.StdEncoding.EncodeToString(r.Check))),
		})
	}
	var x Batch
	for range 2 { // its buffers are used again
		message, n := x.Encode(records, most)
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
	records := make([]Record, 10)
	for i := range records {
		records[i].Check = make([]byte, 600<<10)
	}
	records[7].Check = make([]byte, 2<<20)
	var x Batch
	var sizes []int
	for rest := records; len(rest) > 0; {
		message, n := x.Encode(rest, most)
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
	records := make([]Record, 100)
	for i := range records {
		records[i].Check = make([]byte, 300)
	}
	var x Batch
	x.Encode(records, most)
	if got := testing.AllocsPerRun(100, func() { x.Encode(records, most) }); got > 8 {
		t.Errorf("%v allocations for 100 records want a few for the request", got)
	}
}

// What the exporter counts on is what spans come to.
func TestSize(t *testing.T) {
	for _, check := range [][]byte{nil, make([]byte, 300), make([]byte, 100<<10)} {
		r := Record{Start: -1, Work: -1, End: -1, Check: check, Status: Error, DryRun: true, Canceled: true} // the longest there are
		span := appendBytes(nil, spans, appendSpan(nil, &r))
		if got, most := len(span), Size(len(check)); got > most || got < most-64 {
			t.Errorf("span with a check of %d bytes: %d bytes want %d or a few less", len(check), got, most)
		}
	}
}

// A record is read as it was written.
func TestReadWritten(t *testing.T) {
	for _, want := range []Record{
		{Start: 1, Work: 2, End: 3, Status: OK, Check: []byte("check")},
		{Start: 1 << 60, Work: -1, End: 1<<63 - 1, Status: Error, DryRun: true, Check: bytes.Repeat([]byte{0xff}, 1000)},
		{Status: OK},
		{Status: OK, Canceled: true},
	} {
		got, err := Read(appendSpan(nil, &want))
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("record (-want +got):\n%s", diff)
		}
	}
}

func TestRead(t *testing.T) {
	for _, tt := range []struct {
		name       string
		attributes []*commonv1.KeyValue
		want       Record
		wantErr    bool
	}{
		{"nothing", nil, Record{}, false},
		{"milliseconds", []*commonv1.KeyValue{
			number("aperture.workload_start_timestamp_ms", 5), number("aperture.flow_end_timestamp_ms", 7),
		}, Record{Work: 5e6, End: 7e6}, false},
		{"milliseconds beyond what there is room for", []*commonv1.KeyValue{
			number("aperture.workload_start_timestamp_ms", 1<<62), number("aperture.flow_end_timestamp_ms", -1),
		}, Record{}, false},
		{"a status in small letters", []*commonv1.KeyValue{text("aperture.flow.status", "ok")}, Record{Status: OK}, false},
		{"a status that is none", []*commonv1.KeyValue{text("aperture.flow.status", "fine")}, Record{Status: Error}, false},
		{"an answer in JSON", []*commonv1.KeyValue{text("aperture.check_response", "{}")}, Record{JSON: []byte("{}")}, false},
		{"an answer that is neither base64 nor JSON", []*commonv1.KeyValue{
			text("aperture.check_response", "?"), text("aperture.flow.status", "OK"),
		}, Record{Status: OK}, true},
		{"others' attributes", []*commonv1.KeyValue{text("http.method", "GET"), number("headgate.dry_run", 1)}, Record{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			span, err := proto.Marshal(&tracev1.Span{Name: "s", Attributes: tt.attributes})
			if err != nil {
				t.Fatal(err)
			}
			got, err := Read(span)
			if (err != nil) != tt.wantErr {
				t.Errorf("Read() error = %v want one: %t", err, tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("record (-want +got):\n%s", diff)
			}
		})
	}
}
