package telemetry

import (
	"bytes"
	"errors"
	"testing"

	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	resourcev1 "go.opentelemetry.io/proto/otlp/resource/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEach(t *testing.T) {
	span := &tracev1.Span{Name: "s", Attributes: []*commonv1.KeyValue{{Key: "k"}}}
	scope := func(n int) *tracev1.ScopeSpans {
		s := &tracev1.ScopeSpans{Scope: &commonv1.InstrumentationScope{Name: "lib"}, SchemaUrl: "u"}
		for range n {
			s.Spans = append(s.Spans, span)
		}
		return s
	}
	for _, tt := range []struct {
		name string
		data *tracev1.TracesData
		want int
	}{
		{"nothing", &tracev1.TracesData{}, 0},
		{"a resource without spans", &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{
			Resource: &resourcev1.Resource{Attributes: []*commonv1.KeyValue{{Key: "service.name"}}},
		}}}, 0},
		{"one", &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{ScopeSpans: []*tracev1.ScopeSpans{scope(1)}}}}, 1},
		{"many in many", &tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{
			{ScopeSpans: []*tracev1.ScopeSpans{scope(3), scope(0), scope(4)}},
			{ScopeSpans: []*tracev1.ScopeSpans{scope(5)}, SchemaUrl: "u"},
		}}, 12},
	} {
		t.Run(tt.name, func(t *testing.T) {
			message, err := proto.Marshal(tt.data)
			if err != nil {
				t.Fatal(err)
			}
			visited := 0
			left := maxFields
			got, err := each(message, func(b []byte) {
				if proto.Unmarshal(b, new(tracev1.Span)) == nil {
					visited++
				}
			}, &left, resourceSpans, scopeSpans, spans)
			if visited != tt.want {
				t.Errorf("%d spans were visited want %d", visited, tt.want)
			}
			if err != nil || got != tt.want {
				t.Errorf("each() = %d, %v want %d", got, err, tt.want)
			}
			for cut := range message { // an error or fewer, and no panic
				left := maxFields
				if got, err := each(message[:cut], func([]byte) {}, &left, resourceSpans, scopeSpans, spans); err == nil && got > tt.want {
					t.Errorf("each() = %d for %d bytes of the message want %d at the most", got, cut, tt.want)
				}
			}
		})
	}
}

// Of a message with more fields than there may be, no more are looked at, whatever they are.
func TestEachStops(t *testing.T) {
	of := func(field []byte) []byte { return bytes.Repeat(field, 4<<20/len(field)) }
	in := func(number protowire.Number, data []byte) []byte { return appendBytes(nil, number, data) }
	for name, message := range map[string][]byte{
		"resource spans":         of([]byte{0x0a, 0}),
		"scope spans":            in(resourceSpans, of([]byte{0x12, 0})),
		"spans":                  in(resourceSpans, in(scopeSpans, of([]byte{0x12, 0}))),
		"all three":              of([]byte("\x0a\x04\x12\x02\x12\x00")),
		"numbers":                of([]byte{0x78, 0}),
		"groups":                 of([]byte{0xc3, 0x3e, 0xc4, 0x3e}),
		"groups in groups":       of(append(bytes.Repeat([]byte{0x7b}, 9990), bytes.Repeat([]byte{0x7c}, 9990)...)),
		"fields of a fixed size": of([]byte{0x7d, 0, 0, 0, 0}),
	} {
		t.Run(name, func(t *testing.T) {
			visited, left := 0, maxFields
			_, err := each(message, func([]byte) { visited++ }, &left, resourceSpans, scopeSpans, spans)
			if !errors.Is(err, errFields) || visited > maxFields || left < -1 {
				t.Errorf("each() = %v, with %d spans visited and %d left want %v", err, visited, left, errFields)
			}
		})
	}
}

// What reads as a request has the spans that are counted in it.
func FuzzEach(f *testing.F) {
	message, err := proto.Marshal(&tracev1.TracesData{ResourceSpans: []*tracev1.ResourceSpans{{
		ScopeSpans: []*tracev1.ScopeSpans{{Spans: []*tracev1.Span{{Name: "s"}, {}}}},
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(message)
	f.Fuzz(func(t *testing.T, message []byte) {
		left := maxFields
		got, err := each(message, func([]byte) {}, &left, resourceSpans, scopeSpans, spans)
		data := new(tracev1.TracesData)
		if proto.Unmarshal(message, data) != nil {
			return
		}
		want := 0
		for _, r := range data.GetResourceSpans() {
			for _, s := range r.GetScopeSpans() {
				want += len(s.GetSpans())
			}
		}
		if err != nil || got != want {
			t.Errorf("each(%x) = %d, %v want %d", message, got, err, want)
		}
	})
}
