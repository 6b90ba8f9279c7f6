package retries_test

import (
	"context"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/retries"
)

const forever = time.Duration(math.MaxInt64)

// A wait is never shorter than what was asked for, and jitter makes no wait too long that fits.
func TestWait(t *testing.T) {
	for _, tt := range []struct {
		name     string
		policy   retries.Policy
		after    time.Duration
		deadline time.Duration // zero: none
		left     time.Duration
		most     time.Duration // zero: no wait
	}{
		{name: "nothing asked for", left: forever},
		{name: "asked for a time that has passed", after: -time.Second, left: forever},
		{name: "jitter", after: time.Second, left: forever, most: 1200 * time.Millisecond},
		{name: "much jitter", policy: retries.Policy{Jitter: 3}, after: time.Second, left: forever, most: 4 * time.Second},
		{name: "no jitter", policy: retries.Policy{Jitter: -1}, after: time.Second, left: forever, most: time.Second},
		{name: "jitter that is no number", policy: retries.Policy{Jitter: math.NaN()}, after: time.Second, left: forever, most: time.Second},
		{name: "more than the policy's MaxWait", policy: retries.Policy{MaxWait: time.Second}, after: time.Second + 1, left: forever},
		{name: "the policy's MaxWait", policy: retries.Policy{MaxWait: time.Second}, after: time.Second, left: forever, most: 1200 * time.Millisecond},
		{name: "more than is left", after: time.Second, left: time.Second - 1},
		{name: "just what is left", after: time.Second, left: time.Second, most: time.Second},
		{name: "little is left", policy: retries.Policy{Jitter: 10}, after: time.Second, left: 1100 * time.Millisecond, most: 1037500 * time.Microsecond},
		{name: "nothing is left", after: time.Second, left: -time.Second},
		{name: "after the deadline", after: time.Second, deadline: time.Second, left: forever},
		{name: "before the deadline", after: time.Second, deadline: 1100 * time.Millisecond, left: forever, most: 1037500 * time.Microsecond},
		{name: "for ever", policy: retries.Policy{Jitter: -1}, after: forever, left: forever, most: forever},
		{name: "for ever, with jitter", after: forever, left: forever, most: forever},
		{name: "at least a millisecond", policy: retries.Policy{Jitter: -1}, after: 1, left: forever, most: time.Millisecond},
		{name: "a millisecond that is not left", policy: retries.Policy{Jitter: -1}, after: 1, left: 101, most: 51},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx := t.Context()
				if tt.deadline > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.deadline)
					defer cancel()
				}
				rules := retries.New(tt.policy)
				longest := time.Duration(0)
				for range 1000 {
					wait, ok := rules.Wait(ctx, tt.after, tt.left)
					if ok != (tt.most > 0) || ok && (wait < tt.after || wait > tt.most) {
						t.Fatalf("Wait(%s, %s) = %s, %t want up to %s", tt.after, tt.left, wait, ok, tt.most)
					}
					longest = max(longest, wait)
				}
				if longest < tt.after+(tt.most-tt.after)/2 && tt.most > 0 {
					t.Errorf("the longest wait is %s of up to %s", longest, tt.most)
				}
			})
		})
	}
}

func TestLast(t *testing.T) {
	for attempts, last := range map[int]int{0: 3, 1: 1, 5: 5, -1: 0} {
		rules := retries.New(retries.Policy{Attempts: attempts})
		for attempt := 1; attempt <= 10; attempt++ {
			if got := rules.Last(attempt); got != (attempt == last) {
				t.Errorf("%d attempts: Last(%d) = %t", attempts, attempt, got)
			}
		}
	}
}

func TestBudget(t *testing.T) {
	for _, tt := range []struct {
		name     string
		per      float64
		calls    int
		returned int
		want     int // of 200
	}{
		{name: "new", want: 10},
		{name: "ten calls", calls: 10, want: 11},
		{name: "many calls", calls: 5000, want: 100},
		{name: "a half", per: 0.5, calls: 4, want: 12},
		{name: "given back", returned: 2, want: 12},
		{name: "without limit", per: -1, want: 200},
	} {
		budget := retries.New(retries.Policy{Budget: tt.per}).Budget
		for range tt.calls {
			budget.Deposit()
		}
		for range tt.returned {
			budget.Return()
		}
		got := 0
		for range 200 {
			if budget.Withdraw() {
				got++
			}
		}
		if got != tt.want {
			t.Errorf("%s: %d retries want %d", tt.name, got, tt.want)
		}
	}
}
