package fallback_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/headgate-go/headgate/fallback"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	errRejected = errors.New("rejected")
	errBusy     = errors.New("busy")
	errReplica  = errors.New("replica down")
	errCause    = errors.New("caller went home")
)

// waitError is a rejection as the fallbacks see it: they know the method, not the type.
type waitError time.Duration

func (e waitError) Error() string             { return "rejected" }
func (e waitError) RetryAfter() time.Duration { return time.Duration(e) }

// guard and guardFunc have the shapes of headgate.Guard and headgate.GuardFunc, with a flow that never runs.
func guard[T any](_ func(context.Context) (T, error), onReject fallback.Func[T]) func(context.Context) (T, error) {
	return func(ctx context.Context) (T, error) {
		if onReject == nil {
			var zero T
			return zero, errRejected
		}
		return onReject(ctx, errRejected)
	}
}

func guardFunc[A, T any](
	_ func(context.Context, A) (T, error), onReject func(context.Context, A, error) (T, error),
) func(context.Context, A) (T, error) {
	return func(ctx context.Context, a A) (T, error) { return onReject(ctx, a, errRejected) }
}

// TestInference is one of compilation above all: what a guard accepts as onReject, and where T need not be written.
func TestInference(t *testing.T) {
	fn := func(context.Context) (int, error) { return 1, nil }
	byID := func(context.Context, string) (int, error) { return 1, nil }
	literal := func(context.Context, error) (int, error) { return 42, nil }
	lastGood := fallback.NewLastGood[int](0)
	if _, err := lastGood.Watch(fn)(t.Context()); err != nil {
		t.Fatal(err)
	}

	guarded := map[string]func(context.Context) (int, error){
		"nil":       guard(fn, nil),
		"literal":   guard(fn, func(context.Context, error) (int, error) { return 42, nil }),
		"variable":  guard(fn, literal),
		"Value":     guard(fn, fallback.Value(42)),
		"Error":     guard(fn, fallback.Error[int](errBusy)),
		"Call":      guard(fn, fallback.Call(fn)),
		"First":     guard(fn, fallback.First(lastGood.Func, literal, fallback.Value(42))),
		"no First":  guard(fn, fallback.First[int]()),
		"LastGood":  guard(lastGood.Watch(fn), lastGood.Func),
		"converted": guard(fn, fallback.Func[int](literal)),
		"For": func(ctx context.Context) (int, error) {
			return guardFunc(byID, fallback.For[string](fallback.Value(42)))(ctx, "id")
		},
		"For method value": func(ctx context.Context) (int, error) {
			return guardFunc(byID, fallback.For[string](lastGood.Func))(ctx, "id")
		},
		"For nil": func(ctx context.Context) (int, error) {
			return guardFunc(byID, fallback.For[string, int](nil))(ctx, "id")
		},
	}
	want := map[string]int{
		"literal": 42, "variable": 42, "Value": 42, "Call": 1, "First": 1, "LastGood": 1, "converted": 42,
		"For": 42, "For method value": 1,
	}
	for name, call := range guarded {
		v, err := call(t.Context())
		if wantV, ok := want[name]; v != wantV || (err == nil) != ok {
			t.Errorf("%s: got %d, %v want %d", name, v, err, wantV)
		}
	}
}

func TestFuncs(t *testing.T) {
	ended, cancel := context.WithCancelCause(t.Context())
	cancel(errCause)
	replica := func(context.Context) (string, error) { return "half an answer", errReplica }

	tests := []struct {
		name    string
		ctx     context.Context // nil: one that is not done
		fn      fallback.Func[string]
		want    string
		message string  // "" is no error
		is      []error // what the error matches
	}{
		{name: "Value", fn: fallback.Value("v"), want: "v"},
		{name: "Value asks no context", ctx: ended, fn: fallback.Value("v"), want: "v"},
		{
			name:    "Error",
			fn:      fallback.Error[string](errBusy),
			message: "busy",
			is:      []error{errBusy, errRejected},
		},
		{
			name:    "Error of nil",
			fn:      fallback.Error[string](nil),
			message: "rejected",
			is:      []error{errRejected},
		},
		{
			name: "Call",
			fn:   fallback.Call(func(context.Context) (string, error) { return "v", nil }),
			want: "v",
		},
		{
			name:    "Call returns everything unchanged",
			fn:      fallback.Call(replica),
			want:    "half an answer",
			message: "replica down",
			is:      []error{errReplica},
		},
		{
			name: "First that succeeds",
			fn:   fallback.First(fallback.Call(replica), fallback.Value("a"), fallback.Value("b")),
			want: "a",
		},
		{
			name:    "First when none succeeds",
			fn:      fallback.First(fallback.Call(replica), fallback.Error[string](errBusy)),
			message: "busy",
			is:      []error{errBusy, errReplica, errRejected},
		},
		{
			name:    "First when an alternative fails last",
			fn:      fallback.First(fallback.Error[string](errBusy), fallback.Call(replica)),
			message: "replica down",
			is:      []error{errBusy, errReplica, errRejected},
		},
		{
			name:    "First of none",
			fn:      fallback.First[string](),
			message: "rejected",
			is:      []error{errRejected},
		},
		{
			name: "First skips nil",
			fn:   fallback.First(nil, fallback.Value("a")),
			want: "a",
		},
		{
			name:    "First with a context that is done",
			ctx:     ended,
			fn:      fallback.First(fallback.Value("a")),
			message: "context canceled",
			is:      []error{context.Canceled, errCause, errRejected},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx := tt.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			got, err := tt.fn(ctx, errRejected)
			if got != tt.want || message(err) != tt.message {
				t.Errorf("got %q, %v want %q, %v", got, err, tt.want, tt.message)
			}
			for _, target := range tt.is {
				if !errors.Is(err, target) {
					t.Errorf("error %v does not match %v", err, target)
				}
			}
		})
	}
}

func TestFirstStopsWhenTheContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	first := fallback.First(
		func(context.Context, error) (int, error) { cancel(); return 0, errReplica },
		func(context.Context, error) (int, error) { t.Error("the second was called"); return 2, nil },
	)
	_, err := first(ctx, errRejected)
	for _, target := range []error{context.Canceled, errReplica, errRejected} {
		if !errors.Is(err, target) {
			t.Errorf("error %v does not match %v", err, target)
		}
	}
}

func TestFirstKeepsItsOwnList(t *testing.T) {
	fns := []fallback.Func[int]{fallback.Value(1)}
	first := fallback.First(fns...)
	fns[0] = fallback.Value(2)
	if v, err := first(t.Context(), errRejected); v != 1 || err != nil {
		t.Errorf("First = %d, %v want 1, nil", v, err)
	}
}

func TestRetryAfter(t *testing.T) {
	_, replaced := fallback.Error[int](errBusy)(t.Context(), waitError(time.Second))
	first := fallback.First(fallback.Error[int](errBusy), fallback.Error[int](errReplica))
	_, tried := first(t.Context(), waitError(time.Second))
	tests := []struct {
		name string
		err  error
		want time.Duration // 0 is false
	}{
		{name: "nil"},
		{name: "no such method", err: errRejected},
		{name: "known", err: waitError(time.Second), want: time.Second},
		{name: "wrapped", err: fmt.Errorf("call: %w", waitError(time.Second)), want: time.Second},
		{name: "behind Error", err: replaced, want: time.Second},
		{name: "behind First", err: tried, want: time.Second},
		{name: "zero", err: waitError(0)},
		{name: "negative", err: waitError(-time.Second)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := fallback.RetryAfter(tt.err)
			if got != tt.want || ok != (tt.want > 0) {
				t.Errorf("RetryAfter = %v, %v want %v", got, ok, tt.want)
			}
		})
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
