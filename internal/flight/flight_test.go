package flight_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/internal/flight"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// begin has a run hang until release is called, which ends it with the value.
func begin(ctx context.Context, t *testing.T, runs *flight.Runs, key string, v int) (inside context.Context, release func()) {
	t.Helper()
	run, leads := flight.Join[int](ctx, runs, "point", key)
	if !leads {
		t.Fatalf("a run of %s is under way", key)
	}
	contexts, end := make(chan context.Context), make(chan struct{})
	run.Go(ctx, func(ctx context.Context) (int, func()) {
		contexts <- ctx
		<-end
		return v, nil
	})
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		if got, err := run.Wait(context.WithoutCancel(ctx), true); got != v || err != nil {
			t.Errorf("the leader got %d, %v want %d", got, err, v)
		}
	}()
	return <-contexts, func() { close(end); <-waited }
}

// leads reports whether a call begins a run, and ends that at once.
func leads(ctx context.Context, runs *flight.Runs, key string) bool {
	run, leads := flight.Join[int](ctx, runs, "point", key)
	if leads {
		run.End(0)
		return true
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	_, _ = run.Wait(gone, false)
	return false
}

// A call waits for the runs that were begun inside its own, and outside of all for any.
func TestJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs, others flight.Runs
		a, endA := begin(t.Context(), t, &runs, "a", 1)
		b, endB := begin(a, t, &runs, "b", 2)
		c, endC := begin(b, t, &others, "c", 3) // of another client
		x, endX := begin(t.Context(), t, &runs, "x", 4)
		tests := []struct {
			name  string
			ctx   context.Context
			runs  *flight.Runs
			key   string
			leads bool
		}{
			{"outside for a", t.Context(), &runs, "a", false},
			{"outside for b", t.Context(), &runs, "b", false},
			{"outside for c", t.Context(), &others, "c", false},
			{"outside for another client's c", t.Context(), &runs, "c", true},
			{"a for itself", a, &runs, "a", true},
			{"a for b", a, &runs, "b", false},
			{"a for c", a, &others, "c", false},
			{"a for x", a, &runs, "x", true},
			{"b for a", b, &runs, "a", true},
			{"b for c", b, &others, "c", false},
			{"c for a", c, &runs, "a", true},
			{"c for b", c, &runs, "b", true},
			{"x for a", x, &runs, "a", true},
			{"x for c", x, &others, "c", true},
		}
		for _, tt := range tests {
			if got := leads(tt.ctx, tt.runs, tt.key); got != tt.leads {
				t.Errorf("%s: begins a run: %v want %v", tt.name, got, tt.leads)
			}
		}

		// Calls from within a run share the run that it has of its own, and others do not see that.
		inner, endInner := begin(x, t, &runs, "a", 5)
		if leads(x, &runs, "a") || !leads(inner, &runs, "a") || !leads(b, &runs, "a") || leads(t.Context(), &runs, "a") {
			t.Error("the run inside x is not found by the calls in x alone")
		}
		endInner()

		endC()
		endB()
		if leads(b, &runs, "b") != true || leads(a, &runs, "x") != true {
			t.Error("a run that has ended is still found")
		}
		endA()
		if leads(c, &runs, "x") {
			t.Error("a call in the context of runs that have all ended does not wait as one outside does")
		}
		endX()
	})
}

// Runs of other values, control points and keys are others.
func TestJoinByPlace(t *testing.T) {
	var runs flight.Runs
	run, _ := flight.Join[int](t.Context(), &runs, "point", "key")
	if _, leads := flight.Join[string](t.Context(), &runs, "point", "key"); !leads {
		t.Error("a run of another value is shared")
	}
	if _, leads := flight.Join[int](t.Context(), &runs, "key", "point"); !leads {
		t.Error("a run at another control point is shared")
	}
	if same, leads := flight.Join[int](t.Context(), &runs, "point", "key"); leads || same != run {
		t.Error("the run is not shared")
	}
}

// What a leader gives up is an error for the others, and the next call begins another run.
func TestAbort(t *testing.T) {
	var runs flight.Runs
	run, _ := flight.Join[int](t.Context(), &runs, "point", "key")
	other, _ := flight.Join[int](t.Context(), &runs, "point", "key")
	run.Abort()
	run.Abort()
	if _, err := other.Wait(t.Context(), false); !errors.Is(err, flight.ErrNotReturned) {
		t.Errorf("Wait() = %v want %v", err, flight.ErrNotReturned)
	}
	if !leads(t.Context(), &runs, "key") {
		t.Error("the run is still found")
	}
}

// A run is found until what comes after its end is done, and its work is canceled when all callers have left.
func TestGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs flight.Runs
		run, _ := flight.Join[int](t.Context(), &runs, "point", "key")
		run.Go(t.Context(), func(context.Context) (int, func()) {
			return 42, func() { <-time.After(time.Second) }
		})
		if got, err := run.Wait(t.Context(), true); got != 42 || err != nil {
			t.Errorf("Wait() = %d, %v want 42", got, err)
		}
		late, leads := flight.Join[int](t.Context(), &runs, "point", "key")
		if got, err := late.Wait(t.Context(), false); leads || got != 42 || err != nil {
			t.Errorf("Wait() = %d, %v want 42 until it is stored", got, err)
		}
		<-time.After(2 * time.Second)
		run, leads = flight.Join[int](t.Context(), &runs, "point", "key")
		if !leads {
			t.Fatal("the run is found for ever")
		}
		began, took := time.Now(), time.Duration(0)
		run.Go(t.Context(), func(ctx context.Context) (int, func()) {
			<-ctx.Done()
			took = time.Since(began)
			return 0, nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := run.Wait(ctx, true); !errors.Is(err, flight.ErrLeft) {
				t.Errorf("Wait() = %v want %v", err, flight.ErrLeft)
			}
		})
		other, _ := flight.Join[int](t.Context(), &runs, "point", "key")
		longer, cancelLonger := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancelLonger()
		wg.Go(func() {
			if _, err := other.Wait(longer, false); !errors.Is(err, flight.ErrLeft) {
				t.Errorf("Wait() = %v want %v", err, flight.ErrLeft)
			}
		})
		wg.Wait()
		synctest.Wait()
		if took != 2*time.Second {
			t.Errorf("the work was canceled after %v want 2s, when the last caller left", took)
		}
	})
}
