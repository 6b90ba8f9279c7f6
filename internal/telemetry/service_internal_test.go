package telemetry

import (
	"testing"

	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	resourcev1 "go.opentelemetry.io/proto/otlp/resource/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
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
			got, err := each(message, func(b []byte) {
				if proto.Unmarshal(b, new(tracev1.Span)) == nil {
					visited++
				}
			}, resourceSpans, scopeSpans, spans)
			if visited != tt.want {
				t.Errorf("%d spans were visited want %d", visited, tt.want)
			}
			if err != nil || got != tt.want {
				t.Errorf("each() = %d, %v want %d", got, err, tt.want)
			}
			for cut := range message { // an error or fewer, and no panic
				if got, err := each(message[:cut], func([]byte) {}, resourceSpans, scopeSpans, spans); err == nil && got > tt.want {
					t.Errorf("each() = %d for %d bytes of the message want %d at the most", got, cut, tt.want)
				}
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
		got, err := each(message, func([]byte) {}, resourceSpans, scopeSpans, spans)
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
