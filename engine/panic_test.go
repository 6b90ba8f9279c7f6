package engine_test

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Tracers and meters of the program's that fail when a flow has been decided about.
type (
	failingTracers struct {
		tracenoop.TracerProvider
		fail func()
	}
	failingTracer struct {
		tracenoop.Tracer
		fail func()
	}
	failingSpan struct {
		tracenoop.Span
		fail func()
	}
	failingMeters struct {
		metricnoop.MeterProvider
		fail func()
	}
	failingMeter struct {
		metricnoop.Meter
		fail func()
	}
	failingCounter struct {
		metricnoop.Int64Counter
		fail func()
	}
)

func (p failingTracers) Tracer(string, ...trace.TracerOption) trace.Tracer {
	return failingTracer{fail: p.fail}
}

func (t failingTracer) Start(ctx context.Context, _ string, _ ...trace.SpanStartOption) (context.Context, trace.Span) {
	s := failingSpan{fail: t.fail}
	return trace.ContextWithSpan(ctx, s), s
}

func (s failingSpan) AddEvent(string, ...trace.EventOption) { s.fail() }

func (p failingMeters) Meter(string, ...metric.MeterOption) metric.Meter {
	return failingMeter{fail: p.fail}
}

func (m failingMeter) Int64Counter(string, ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	return failingCounter{fail: m.fail}, nil
}

func (c failingCounter) Add(context.Context, int64, ...metric.AddOption) { c.fail() }

// If a function of the program's panics or calls runtime.Goexit while a flow is being decided about, what the flow has taken goes back.
func TestPanickingFunctions(t *testing.T) {
	components := []policy.Component{
		policy.ConcurrencyLimiter{ID: "local", Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour, Local: true},
		policy.ConcurrencyLimiter{ID: "slots", Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour},
		policy.RateLimiter{ID: "tokens", Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Hour},
		policy.RateLimiter{ID: "by user", Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Hour, LimitBy: "user"},
		policy.RateLimiter{ID: "more tokens", Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Hour},
		policy.ConcurrencyScheduler{ID: "queue", Selectors: policy.At("point"), Max: 2, MaxInflight: time.Hour},
		policy.QuotaScheduler{ID: "queue by team", Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: time.Hour, LimitBy: "team"},
	}
	override := func(id string) func(fail func()) (engine.Option, []flowctl.Option) {
		return func(fail func()) (engine.Option, []flowctl.Option) {
			return engine.WithOverrides(func(component, _ string) (policy.Override, bool) {
				if component == id {
					fail()
				}
				return policy.Override{}, false
			}), nil
		}
	}
	option := func(o func(fail func()) flowctl.Option) func(fail func()) (engine.Option, []flowctl.Option) {
		return func(fail func()) (engine.Option, []flowctl.Option) { return nil, []flowctl.Option{o(fail)} }
	}
	for name, set := range map[string]func(fail func()) (engine.Option, []flowctl.Option){
		"an override at a limiter":   override("by user"),
		"an override at a scheduler": override("queue by team"),
		"a hook": option(func(fail func()) flowctl.Option {
			return flowctl.WithOnDecision(func(context.Context, *flowctl.Flow) { fail() })
		}),
		"a tracer": option(func(fail func()) flowctl.Option { return flowctl.WithTracerProvider(failingTracers{fail: fail}) }),
		"a meter":  option(func(fail func()) flowctl.Option { return flowctl.WithMeterProvider(failingMeters{fail: fail}) }),
	} {
		for how, fail := range map[string]func(){"panic": func() { panic("the program's") }, "Goexit": runtime.Goexit} {
			for _, where := range []string{"in memory", "in a store", "in a store that does not answer"} {
				t.Run(name+"/"+how+"/"+where, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						failing := false
						own, options := set(func() {
							if failing {
								fail()
							}
						})
						store := sharedtest.New().Instance()
						setup := sides.Setup{Policies: sides.Policies(components...), EngineOptions: []engine.Option{own}, Options: options}
						if where != "in memory" {
							setup.EngineOptions = append(setup.EngineOptions, engine.WithStore(store))
						}
						side := setup.New(t, sides.Embedded)
						start := func() {
							flow := side.Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann", "team": "red"}})
							if flow.Decision() != flowctl.Accepted {
								t.Errorf("%v want it accepted", flow.Err())
							}
							end(flow)
						}
						store.Behave(sharedtest.Behavior{Err: map[bool]error{true: errors.New("down")}[where == "in a store that does not answer"]})
						failing = true
						for range 3 {
							done := make(chan any)
							go func() {
								ended := any("Goexit")
								defer func() {
									if p := recover(); p != nil {
										ended = p
									}
									done <- ended
								}()
								start()
								ended = "nothing"
							}()
							if got := <-done; got != map[string]any{"panic": "the program's", "Goexit": "Goexit"}[how] {
								t.Errorf("%v want the %s to go on", got, how)
							}
						}
						failing = false
						start()
						store.Behave(sharedtest.Behavior{})
						<-time.After(time.Second)
						for _, c := range components {
							id := policyID(c)
							if id == "by user" || id == "queue by team" {
								continue
							}
							of, err := side.Engine.Component("test", id)
							if err != nil {
								t.Fatal(err)
							}
							u, err := of.Peek(t.Context(), "")
							if want := u.Capacity - map[string]float64{"tokens": 1, "more tokens": 1}[id]; err != nil || u.InFlight != 0 || u.Remaining < want-0.01 {
								t.Errorf("%s: %+v, %v want %v left", id, u, err, want)
							}
						}
					})
				})
			}
		}
	}
}

// A failingHandler is a handler of log lines that fails.
type failingHandler struct {
	slog.Handler
	fail func()
}

func (failingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h failingHandler) Handle(context.Context, slog.Record) error {
	h.fail()
	return nil
}

// If a function of the program's panics or calls runtime.Goexit while a flow gives back what it took, the flow gives that back once.
func TestPanickingFunctionsWhileGivingBack(t *testing.T) {
	for how, fail := range map[string]func(){"panic": func() { panic("the program's") }, "Goexit": runtime.Goexit} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := sharedtest.New().Instance()
				failing, failed := false, 0
				logger := slog.New(failingHandler{slog.DiscardHandler, func() {
					if failing {
						failed++
						fail()
					}
				}})
				side := sides.Setup{
					Policies: sides.Policies(
						policy.RateLimiter{ID: "local", Selectors: policy.At("point"), Capacity: 5, Fill: 1, Interval: 1e6 * time.Hour, Local: true},
						policy.ConcurrencyLimiter{ID: "shared", Selectors: policy.At("point"), Max: 5, MaxInflight: time.Hour},
						policy.ConcurrencyScheduler{ID: "queue", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, Local: true},
					),
					EngineOptions: []engine.Option{engine.WithStore(store), engine.WithLogger(logger)},
				}.New(t, sides.Embedded)
				first := side.Client.Start(t.Context(), "point", flowctl.Params{})
				defer end(first)
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() {
					defer close(done)
					defer func() { _ = recover() }()
					side.Client.Start(ctx, "point", flowctl.Params{})
				}()
				synctest.Wait()
				store.Behave(sharedtest.Behavior{Err: errors.New("down")})
				failing = true
				cancel()
				<-done
				failing = false
				if failed != 1 {
					t.Errorf("the logger failed %d times want once", failed)
				}
				of, err := side.Engine.Component("test", "local")
				if err != nil {
					t.Fatal(err)
				}
				if u, err := of.Peek(t.Context(), ""); err != nil || u.Remaining > 4.01 {
					t.Errorf("%v, %v left want 4: the first flow has one", err, u.Remaining)
				}
			})
		})
	}
}

func policyID(c policy.Component) string {
	switch c := c.(type) {
	case policy.ConcurrencyLimiter:
		return c.ID
	case policy.RateLimiter:
		return c.ID
	case policy.ConcurrencyScheduler:
		return c.ID
	case policy.QuotaScheduler:
		return c.ID
	}
	return ""
}
