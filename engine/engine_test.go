package engine

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/seam"
	"github.com/headgate-go/headgate/policy"
)

func TestIdleKeysAreForgotten(t *testing.T) {
	for _, tt := range []struct {
		name    string
		maxIdle time.Duration
		after   time.Duration
		kept    int64
	}{
		{"by default not before 2 h", 0, 119 * time.Minute, 20},
		{"by default after 2 h", 0, 122 * time.Minute, 10},
		{"after a while", 5 * time.Minute, 7 * time.Minute, 10},
		{"never", policy.KeepIdle, 10 * time.Hour, 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{
					Selectors: policy.At("point"), Capacity: 1000, Fill: 1, Interval: time.Minute, LimitBy: "user", TokensLabel: "cost", MaxIdle: tt.maxIdle,
				}}}})
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = e.Close() }()
				e.results.close() // their clocks tick every second, and this is not about them
				e.globals.close()
				limiter, ok := e.rules.Load().parts[0].component.(*limiter[bucket])
				if !ok {
					t.Fatalf("component is a %T", e.rules.Load().parts[0].component)
				}
				for i := range 20 {
					cost := "1"
					if i%2 == 0 {
						cost = "1000" // takes hours to fill again: a debt, which is not forgotten
					}
					var v seam.Verdict
					if err := e.Check(t.Context(), &seam.Request{
						ControlPoint: "point",
						Labels:       seam.Labels{Params: map[string]string{"user": fmt.Sprint(i), "cost": cost}},
					}, &v); err != nil || v.Rejected() {
						t.Fatal(v, err)
					}
				}
				<-time.After(tt.after)
				synctest.Wait()
				if got := limiter.table.size.Load(); got != tt.kept {
					t.Errorf("%d keys are kept want %d", got, tt.kept)
				}
			})
		})
	}
}
