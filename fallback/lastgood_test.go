package fallback_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/fallback"
)

func TestLastGoodAge(t *testing.T) {
	tests := []struct {
		name         string
		maxAge, took time.Duration
		wait         time.Duration // after the call returned
		good         bool
	}{
		{name: "at once", maxAge: time.Minute, good: true},
		{name: "young", maxAge: time.Minute, wait: time.Minute - 1, good: true},
		{name: "too old", maxAge: time.Minute, wait: time.Minute},
		{name: "age counts from the call's beginning", maxAge: time.Minute, took: time.Second, wait: 59 * time.Second},
		{name: "zero is no limit", wait: 1000 * time.Hour, good: true},
		{name: "negative is no limit", maxAge: -1, wait: 1000 * time.Hour, good: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lastGood := fallback.NewLastGood[string](tt.maxAge)
				watched := lastGood.Watch(func(context.Context) (string, error) {
					<-time.After(tt.took)
					return "good", nil
				})
				if v, err := watched(t.Context()); v != "good" || err != nil {
					t.Fatalf("watched = %q, %v want good", v, err)
				}
				<-time.After(tt.wait)
				expect(t, lastGood, "good", tt.good)
			})
		})
	}
}

func TestLastGoodZeroValue(t *testing.T) {
	var lastGood fallback.LastGood[string]
	expect(t, &lastGood, "", false)
	if _, err := lastGood.Watch(returning("good", nil))(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect(t, &lastGood, "good", true)
}

func TestLastGoodRemembersOnlyGoodResults(t *testing.T) {
	lastGood := fallback.NewLastGood[string](0)
	if v, err := lastGood.Watch(returning("bad", errBusy))(t.Context()); v != "bad" || !errors.Is(err, errBusy) {
		t.Errorf("watched = %q, %v want what the function returned", v, err)
	}
	expect(t, lastGood, "", false)

	func() {
		defer func() {
			if r := recover(); r != "boom" {
				t.Errorf("recovered %v want the function's panic", r)
			}
		}()
		_, _ = lastGood.Watch(func(context.Context) (string, error) { panic("boom") })(t.Context())
	}()
	expect(t, lastGood, "", false)

	_, _ = lastGood.Watch(returning("good", nil))(t.Context())
	_, _ = lastGood.Watch(returning("bad", errBusy))(t.Context())
	expect(t, lastGood, "good", true)
}

func TestLastGoodKeepsTheCallThatBeganLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lastGood := fallback.NewLastGood[string](0)
		call := func(result string, took time.Duration) {
			_, _ = lastGood.Watch(func(context.Context) (string, error) {
				<-time.After(took)
				return result, nil
			})(t.Context())
		}
		var slow sync.WaitGroup
		slow.Go(func() { call("slow and old", time.Minute) })
		<-time.After(time.Second)
		call("new", time.Second)
		expect(t, lastGood, "new", true)
		slow.Wait()
		expect(t, lastGood, "new", true)
		call("newest", 0)
		expect(t, lastGood, "newest", true)
		call("at the same instant", 0)
		expect(t, lastGood, "at the same instant", true)
	})
}

func TestLastGoodConcurrently(t *testing.T) {
	lastGood := fallback.NewLastGood[[2]int](time.Hour)
	var wg sync.WaitGroup
	for i := range 8 {
		watched := lastGood.Watch(func(context.Context) ([2]int, error) { return [2]int{i, i}, nil })
		wg.Go(func() {
			for range 200 {
				if _, err := watched(t.Context()); err != nil {
					t.Error(err)
				}
				if v, err := lastGood.Func(t.Context(), errRejected); v[0] != v[1] || err != nil {
					t.Errorf("Func = %v, %v want one call's result", v, err)
				}
			}
		})
	}
	wg.Wait()
}

func expect(t *testing.T, lastGood *fallback.LastGood[string], want string, good bool) {
	t.Helper()
	got, err := lastGood.Func(t.Context(), errRejected)
	switch {
	case good && (got != want || err != nil):
		t.Errorf("Func = %q, %v want %q, nil", got, err, want)
	case !good && (got != "" || !errors.Is(err, errRejected)):
		t.Errorf("Func = %q, %v want the flow's error", got, err)
	}
}

// returning is a function to watch that always returns the same.
func returning(v string, err error) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return v, err }
}
