package flowctl_test

import (
	"context"
	"errors"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/policy"
)

// tracers is a tracer provider that keeps its spans.
type tracers struct {
	tracenoop.TracerProvider
	spans   []*span
	forgets bool // to put them into the context
}

// tracer makes the spans of its provider.
type tracer struct {
	tracenoop.Tracer
	p *tracers
}

type span struct {
	tracenoop.Span
	name   string
	attrs  []string
	status otelcodes.Code
	ended  int
}

func (p *tracers) Tracer(string, ...trace.TracerOption) trace.Tracer { return tracer{p: p} }

func (t tracer) Start(ctx context.Context, name string, opts ...trace.SpanStartOption) (context.Context, trace.Span) {
	cfg := trace.NewSpanStartConfig(opts...)
	s := &span{name: name, attrs: texts(cfg.Attributes())}
	t.p.spans = append(t.p.spans, s)
	if t.p.forgets {
		return ctx, s
	}
	return trace.ContextWithSpan(ctx, s), s
}

func (s *span) AddEvent(_ string, opts ...trace.EventOption) {
	cfg := trace.NewEventConfig(opts...)
	s.attrs = append(s.attrs, texts(cfg.Attributes())...)
}

func (s *span) SetStatus(code otelcodes.Code, _ string) { s.status = code }
func (s *span) End(...trace.SpanEndOption)              { s.ended++ }

func texts(attrs []attribute.KeyValue) []string {
	var out []string
	for _, a := range attrs {
		out = append(out, string(a.Key)+"="+a.Value.String())
	}
	return out
}

func limitedEngine(t *testing.T) *engine.Engine {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: "user_id"},
		policy.RateLimiter{ID: "dry", Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, DryRun: true},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func TestTracerProvider(t *testing.T) {
	p := &tracers{}
	client, err := flowctl.New(limitedEngine(t), flowctl.WithTracerProvider(p))
	if err != nil {
		t.Fatal(err)
	}
	params := flowctl.Params{Labels: map[string]string{"user_id": "sesame"}}
	for _, workErr := range []error{nil, nil} {
		flow := client.Start(t.Context(), "point", params)
		if got := trace.SpanFromContext(flow.Context()); got != p.spans[len(p.spans)-1] {
			t.Error("the flow's context lacks its span")
		}
		flow.SetError(workErr)
		_, _ = flow.End(t.Context())
		_, _ = flow.End(t.Context())
	}
	client.Start(t.Context(), strings.Repeat("p", 256), params).EndWith(nil) // no name for a span
	want := []span{
		{
			name: "headgate point", ended: 1,
			attrs: []string{"headgate.control_point=point", "headgate.decision=accepted", "headgate.should_run=true"},
		},
		{
			name: "headgate point", ended: 1, status: otelcodes.Error,
			attrs: []string{"headgate.control_point=point", "headgate.decision=rejected", "headgate.should_run=false", "headgate.reject_reason=rate limited"},
		},
	}
	if len(p.spans) != len(want) {
		t.Fatalf("%d spans want %d", len(p.spans), len(want))
	}
	for i := range want {
		if diff := cmp.Diff(&want[i], p.spans[i], cmp.AllowUnexported(span{}), cmpopts.IgnoreFields(span{}, "Span")); diff != "" {
			t.Errorf("span %d (-want +got):\n%s", i, diff)
		}
	}
}

// The span of the caller is the caller's, though a tracer puts none of its own into the context.
func TestTracerThatForgetsItsSpans(t *testing.T) {
	p, callers := &tracers{forgets: true}, new(span)
	client, err := flowctl.New(limitedEngine(t), flowctl.WithTracerProvider(p))
	if err != nil {
		t.Fatal(err)
	}
	flow := client.Start(trace.ContextWithSpan(t.Context(), callers), "point", flowctl.Params{})
	_, _ = flow.End(t.Context())
	if callers.ended != 0 || len(callers.attrs) != 0 || p.spans[0].ended != 1 {
		t.Errorf("the caller's span has ended %d times with %v, the flow's %d times want not, and once",
			callers.ended, callers.attrs, p.spans[0].ended)
	}
}

// Decisions are counted without a label's value, and as often as they were made: in a dry run too.
func TestMeterProvider(t *testing.T) {
	p := new(metertest.Provider)
	client, err := flowctl.New(limitedEngine(t), flowctl.WithMeterProvider(p), flowctl.WithDryRun())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "sesame"}})
		if !flow.ShouldRun() {
			t.Error("a dry run rejected a flow")
		}
		_, _ = flow.End(t.Context())
	}
	client.Start(t.Context(), "", flowctl.Params{}).EndWith(nil)
	_ = client.Close(t.Context())
	client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil)
	got := p.Read(t.Context())
	maps.DeleteFunc(got, func(name string, _ float64) bool { return !strings.HasPrefix(name, "flowcontrol_d") })
	want := map[string]float64{
		"flowcontrol_decisions_total control_point=point decision_type=accepted":                            1,
		"flowcontrol_decisions_total control_point=point decision_type=rejected reject_reason=rate limited": 2,
		"flowcontrol_decisions_total control_point= decision_type=invalid":                                  1,
		"flowcontrol_decisions_total control_point=point decision_type=unreachable":                         1,
	}
	for name := range got {
		if strings.HasPrefix(name, "flowcontrol_dry_run_drops_total component_id=") { // each of both, and a hash
			want[name] = 2
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

// A remote agent shows whether its breaker is open, until its client is closed.
func TestAgentBreakerIsShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent, p := flowtest.NewAgent(t), new(metertest.Provider)
		client := agent.Client(flowctl.WithMeterProvider(p))
		breaker := func() (open float64, shown bool) {
			for name, n := range p.Read(t.Context()) {
				if strings.HasPrefix(name, "flowcontrol_gate_open server_address=") {
					return n, true
				}
			}
			return 0, false
		}
		client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil)
		if open, shown := breaker(); open != 0 || !shown {
			t.Errorf("while the agent answers, the breaker is %v, %v want 0 and shown", open, shown)
		}
		agent.Freeze()
		for range 5 {
			client.Start(t.Context(), "point", flowctl.Params{}).EndWith(nil)
		}
		if open, _ := breaker(); open != 1 {
			t.Errorf("after five checks in vain the breaker is %v want 1", open)
		}
		agent.Thaw()
		_ = client.Close(t.Context())
		if _, shown := breaker(); shown {
			t.Error("the breaker of a closed client is shown")
		}
	})
}

func TestMeterProviderFails(t *testing.T) {
	broken := errors.New("broken")
	if _, err := flowctl.New(limitedEngine(t), flowctl.WithMeterProvider(&metertest.Provider{Err: broken})); !errors.Is(err, broken) {
		t.Errorf("New() = %v want the provider's error", err)
	}
}
