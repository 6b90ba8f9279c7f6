package headgate_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/deadline"
	"github.com/headgate-go/headgate/internal/testing/sharedtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A waiting is an object whose methods with a context wait for something that does not come.
type waiting struct {
	of   any
	late []string // methods that return a deadline then
	args map[string][]any
}

// ifPassed are methods that wait for nothing, and return a deadline if it has passed before.
func ifPassed(methods ...string) (late []string) {
	for _, name := range methods {
		late = append(late, name+" passed")
	}
	return late
}

func waitings(t *testing.T) map[string]waiting {
	store := sharedtest.New().Instance()
	side := sides.Setup{
		Policies: sides.Policies(
			policy.RateLimiter{ID: "limiter", Selectors: policy.At(point), Capacity: 1, Interval: time.Hour},
			policy.ConcurrencyLimiter{ID: "slots", Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour},
			policy.CalendarQuota{ID: "quota", Selectors: policy.At(point), Amount: 1, Period: policy.PeriodDay},
			policy.QuotaScheduler{ID: "scheduler", Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: time.Hour},
			policy.ConcurrencyScheduler{ID: "concurrency", Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour},
			policy.LoadRamp{ID: "ramp", Selectors: policy.At(point), Steps: []policy.RampStep{{Target: 0, Duration: time.Hour}, {Target: 1}}},
		),
		EngineOptions: []engine.Option{engine.WithStore(store)},
	}.New(t, sides.Embedded)
	store.Behave(sharedtest.Behavior{Late: time.Hour})
	agent := flowtest.NewAgent(t)
	agent.AnswerSpans(flowtest.Answer{Hang: true})
	closing := agent.Client()
	_ = sesameFlow(t.Context(), closing, flowctl.Params{})
	nobody := noAgent(t)
	stores := []string{"SetResultCache", "SetGlobalCache", "DeleteResultCache", "DeleteGlobalCache"}
	values := map[string][]any{
		"SetResultCache": {[]byte("value"), time.Hour}, "SetGlobalCache": {"key", []byte("value"), time.Hour}, "DeleteGlobalCache": {"key"},
	}
	cached := flowctl.Params{ResultCacheKey: "key"}
	all := map[string]waiting{
		"Client of nobody":      {nobody, []string{"Ready"}, nil},
		"Client that closes":    {closing, []string{"Close"}, nil},
		"Flow without an agent": {nobody.Start(t.Context(), point, cached), ifPassed(stores...), values},
		"Flow at a store":       {side.Client.Start(t.Context(), "other", cached), stores, values},
		"Engine":                {side.Engine, ifPassed("Watch"), map[string][]any{"Watch": {"/nowhere", engine.WatchParams{}}}},
	}
	for _, id := range []string{"limiter", "slots", "quota", "scheduler", "concurrency", "ramp"} {
		component, err := side.Engine.Component("test", id)
		if err != nil {
			t.Fatal(err)
		}
		late := []string{"Peek", "Reset"}
		if ramp, ok := component.Ramp(); ok {
			late = nil // there is nothing to wait for
			all["Ramp"] = waiting{ramp, []string{"Forward", "Backward", "Hold", "Reset"}, nil}
		}
		all["Component "+id] = waiting{component, late, map[string][]any{"Peek": {""}, "Reset": {""}}}
	}
	return all
}

// All methods with a context return timeouts, to net, net/http and os, when its deadline ends them.
func TestMethodsReturnTimeouts(t *testing.T) {
	contexts := map[string]func(context.Context) (context.Context, context.CancelFunc){
		"passed": func(ctx context.Context) (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, -1) },
		"passes": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, time.Millisecond)
		},
	}
	for name, within := range contexts {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				for what, w := range waitings(t) {
					v := reflect.ValueOf(w.of)
					for i := range v.NumMethod() {
						i = v.NumMethod() - 1 - i // Close comes last
						method, f := v.Type().Method(i), v.Method(i)
						if f.Type().NumIn() == 0 || f.Type().In(0) != reflect.TypeFor[context.Context]() ||
							f.Type().NumOut() == 0 || f.Type().Out(f.Type().NumOut()-1) != reflect.TypeFor[error]() {
							continue
						}
						ctx, cancel := within(t.Context())
						args := []reflect.Value{reflect.ValueOf(ctx)}
						for _, arg := range w.args[method.Name] {
							args = append(args, reflect.ValueOf(arg))
						}
						if len(args) != f.Type().NumIn() {
							t.Fatalf("%s: the test has no arguments for %s", what, method.Name)
						}
						results := f.Call(args)
						cancel()
						err, _ := reflect.TypeAssert[error](results[len(results)-1])
						late := slices.Contains(w.late, method.Name) || slices.Contains(w.late, method.Name+" "+name)
						if late && !deadline.In(err) {
							t.Errorf("%s: %s returns %v want a deadline", what, method.Name, err)
						}
						answersAsDeadline(t, what+": "+method.Name, err)
					}
				}
			})
		})
	}
}

func answersAsDeadline(t *testing.T, what string, err error) {
	t.Helper()
	if !deadline.In(err) {
		return
	}
	e, ok := err.(net.Error) //nolint:errorlint // the error itself is asked
	if !ok || !e.Timeout() || !os.IsTimeout(err) || !(&url.Error{Err: err}).Timeout() {
		t.Errorf("%s returns %v, which is no timeout", what, err)
	}
}

// Errorf is fmt.Errorf, and its error answers for the deadlines that it wraps.
func TestDeadlineErrorf(t *testing.T) {
	for _, of := range []error{
		context.DeadlineExceeded, os.ErrDeadlineExceeded, &fs.PathError{Op: "read", Path: "x", Err: os.ErrDeadlineExceeded},
		errors.Join(errWork, context.DeadlineExceeded), deadline.Errorf("deeper: %w", context.DeadlineExceeded), &net.DNSError{IsTimeout: true},
	} {
		err := deadline.Errorf("headgate: %d: %w", 1, of)
		answersAsDeadline(t, "Errorf", err)
		if want := "headgate: 1: " + of.Error(); err.Error() != want || !errors.Is(err, of) || !deadline.In(err) {
			t.Errorf("%v want %s", err, want)
		}
	}
	for _, of := range []error{errWork, context.Canceled, &net.DNSError{}} {
		if err := deadline.Errorf("headgate: %w", of); os.IsTimeout(err) || !errors.Is(err, of) {
			t.Errorf("%v is a timeout, or does not match", err)
		}
	}
}
