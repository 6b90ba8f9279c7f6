package fallback_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/fallback"
)

func TestStaleAge(t *testing.T) {
	const ttl = time.Hour
	tests := []struct {
		name  string
		grace time.Duration
		wait  time.Duration
		good  bool
	}{
		{name: "at once", grace: time.Minute, good: true},
		{name: "not expired", grace: time.Minute, wait: ttl - 1, good: true},
		{name: "expired", grace: time.Minute, wait: ttl, good: true},
		{name: "within the grace period", grace: time.Minute, wait: ttl + time.Minute - 1, good: true},
		{name: "after it", grace: time.Minute, wait: ttl + time.Minute},
		{name: "no grace, not expired", wait: ttl - 1, good: true},
		{name: "no grace, expired", wait: ttl},
		{name: "negative is no grace, not expired", grace: -2 * ttl, wait: ttl - 1, good: true},
		{name: "negative is no grace, expired", grace: -2 * ttl, wait: ttl},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx := fallback.WithLast(t.Context(), "last", time.Now().Add(ttl))
				<-time.After(tt.wait)
				expectStale(ctx, t, fallback.Stale[string](tt.grace), "last", tt.good)
			})
		})
	}
}

func TestStaleFindsTheGuardsOwn(t *testing.T) {
	stale := fallback.Stale[string](math.MaxInt64)
	expectStale(t.Context(), t, stale, "", false)

	outer := fallback.WithLast(t.Context(), "outer", time.Now())
	expectStale(fallback.WithLast(outer, "inner", time.Now()), t, stale, "inner", true)
	expectStale(fallback.WithLast(outer, "", time.Time{}), t, stale, "", false)
	expectStale(fallback.WithLast(outer, 1, time.Now()), t, stale, "outer", true)
	expectStale(outer, t, stale, "outer", true)
}

func expectStale(ctx context.Context, t *testing.T, stale fallback.Func[string], want string, good bool) {
	t.Helper()
	got, err := stale(ctx, errRejected)
	switch {
	case good && (got != want || err != nil):
		t.Errorf("Stale = %q, %v want %q, nil", got, err, want)
	case !good && (got != "" || !errors.Is(err, errRejected)):
		t.Errorf("Stale = %q, %v want the flow's error", got, err)
	}
}

// A result of another type is no result, and the error says so.
func TestStaleOfAnotherType(t *testing.T) {
	expires := time.Now().Add(time.Hour)
	kept := fallback.WithLast(t.Context(), 42, expires) // an int
	for name, ctx := range map[string]context.Context{
		"kept": kept, "kept further out": context.WithValue(kept, lastGoodKey{}, 1),
		"none yet": fallback.WithLast(t.Context(), 0, time.Time{}),
	} {
		got, err := fallback.Stale[int64](time.Minute)(ctx, errRejected)
		if got != 0 || !errors.Is(err, errRejected) {
			t.Errorf("%s: Stale[int64] = %d, %v want the flow's error", name, got, err)
		}
		if text := err.Error(); !strings.Contains(text, "int64") || !strings.Contains(text, "type int") || strings.Contains(text, "42") {
			t.Errorf("%s: the error is %q want it to name both types, and not the value", name, text)
		}
	}
	if got, err := fallback.Stale[int](time.Minute)(kept, errRejected); got != 42 || err != nil {
		t.Errorf("Stale[int] = %d, %v want 42", got, err)
	}
	ctx := fallback.WithLast[int64](kept, 43, expires)
	if got, err := fallback.Stale[int64](time.Minute)(ctx, errRejected); got != 43 || err != nil {
		t.Errorf("Stale[int64] = %d, %v want 43", got, err)
	}
	if got, err := fallback.Stale[int](time.Minute)(ctx, errRejected); got != 42 || err != nil {
		t.Errorf("Stale[int] = %d, %v want 42, which is further out", got, err)
	}
	if text := fmt.Sprint(kept); strings.Contains(text, "42") {
		t.Errorf("the context prints as %s, with the result", text)
	}
}

type lastGoodKey struct{}
