package flowctl

import (
	"context"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/version"
)

const scope = "github.com/headgate-go/headgate/flowctl"

// An observer shows flows to the application: a span each, and a count of decisions. It counts the pauses of Transports
// too.
type observer struct {
	tracer trace.Tracer

	decisions, pauses, paused metric.Int64Counter // nil without a meter

	// Sets of attributes are expensive to make, and there are few: control points times outcomes.
	sets  sync.Map // outcome → metric.AddOption
	count atomic.Int64
}

// maxOutcomes bounds the sets that are kept, for programs that make up control points.
const maxOutcomes = 4096

type outcome struct {
	controlPoint string
	decision     Decision // 0: of a pause, which is about no flow
	reason       RejectReason
}

func newObserver(tracers trace.TracerProvider, meters metric.MeterProvider) (*observer, error) {
	if tracers == nil && meters == nil {
		return nil, nil
	}
	o := &observer{}
	if tracers != nil {
		o.tracer = tracers.Tracer(scope, trace.WithInstrumentationVersion(version.Version))
	}
	if meters != nil {
		meter := meters.Meter(scope, metric.WithInstrumentationVersion(version.Version))
		var err error
		if o.decisions, err = meter.Int64Counter("flowcontrol_decisions_total", metric.WithUnit("{flow}"),
			metric.WithDescription("Flows by what was decided about them.")); err != nil {
			return nil, err
		}
		if o.pauses, err = meter.Int64Counter("flowcontrol_pauses_total", metric.WithUnit("{pause}"),
			metric.WithDescription("Pauses that upstreams asked for, by Retry-After.")); err != nil {
			return nil, err
		}
		if o.paused, err = meter.Int64Counter("flowcontrol_paused_requests_total", metric.WithUnit("{request}"),
			metric.WithDescription("Requests that were not sent because of a pause.")); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// start opens the flow's span, which becomes part of the flow's context.
func (o *observer) start(f *Flow) {
	if o.tracer == nil || bounds.CheckControlPoint(f.req.ControlPoint) != nil {
		return
	}
	ctx, s := o.tracer.Start(f.parent, "headgate "+f.req.ControlPoint,
		trace.WithAttributes(attribute.String("headgate.control_point", f.req.ControlPoint)))
	if s != nil { // the span is taken from the context again, so it must be there, whatever the tracer has done
		f.parent, f.traced = trace.ContextWithSpan(ctx, s), true
	}
}

func (o *observer) decided(f *Flow) {
	if f.traced {
		attrs := []attribute.KeyValue{
			attribute.String("headgate.decision", f.decision.String()),
			attribute.Bool("headgate.should_run", f.run),
		}
		if f.decision == Rejected {
			attrs = append(attrs, attribute.String("headgate.reject_reason", f.RejectReason().String()))
		}
		trace.SpanFromContext(f.parent).AddEvent("decided", trace.WithAttributes(attrs...))
	}
	if o.decisions != nil {
		key := outcome{f.req.ControlPoint, f.decision, f.RejectReason()}
		if f.decision == Invalid {
			key.controlPoint = "" // it may be what is invalid
		}
		o.decisions.Add(f.parent, 1, o.set(key))
	}
}

// ending puts the flow's span into the context of its end.
func (o *observer) ending(ctx context.Context, f *Flow) context.Context {
	if !f.traced {
		return ctx
	}
	return trace.ContextWithSpan(ctx, trace.SpanFromContext(f.parent))
}

func (o *observer) end(f *Flow, s Status) {
	if !f.traced {
		return
	}
	span := trace.SpanFromContext(f.parent)
	if s == StatusError {
		why := "the work failed"
		if !f.run {
			why = f.decision.String()
		}
		span.SetStatus(codes.Error, why)
	}
	span.End()
}

func (o *observer) set(key outcome) metric.AddOption {
	if s, ok := o.sets.Load(key); ok {
		if add, ok := s.(metric.AddOption); ok {
			return add
		}
	}
	attrs := []attribute.KeyValue{attribute.String("control_point", key.controlPoint)}
	if key.decision != 0 {
		attrs = append(attrs, attribute.String("decision_type", key.decision.String()))
	}
	if key.decision == Rejected {
		attrs = append(attrs, attribute.String("reject_reason", key.reason.String()))
	}
	add := metric.WithAttributeSet(attribute.NewSet(attrs...))
	if o.count.Add(1) <= maxOutcomes {
		o.sets.Store(key, add)
	}
	return add
}
