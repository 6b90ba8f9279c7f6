package engine

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func TestIdleKeysAreForgotten(t *testing.T) {
	for _, tt := range []struct {
		name    string
		maxIdle time.Duration
		after   time.Duration
		kept    int
	}{
		{"by default not before 2 h", 0, 119 * time.Minute, 20},
		{"by default after 2 h", 0, 122 * time.Minute, 10},
		{"after a while", 5 * time.Minute, 7 * time.Minute, 10},
		{"source.Never", policy.KeepIdle, 10 * time.Hour, 20},
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
				limiter, ok := e.rules.Load().installed[0].component.(*limiter[bucket.State])
				if !ok {
					t.Fatalf("component is a %T", e.rules.Load().installed[0].component)
				}
				for i := range 20 {
					cost := "1"
					if i%2 == 0 {
						cost = "1000" // takes hours to fill again: a debt, which is not forgotten
					}
					var v agentapi.Verdict
					if err := e.Check(t.Context(), &agentapi.Request{
						ControlPoint: "point",
						Labels:       agentapi.Labels{Params: map[string]string{"user": fmt.Sprint(i), "cost": cost}},
					}, &v); err != nil || v.Rejected() {
						t.Fatal(v, err)
					}
				}
				<-time.After(tt.after)
				synctest.Wait()
				if got := limiter.table.Len(); got != tt.kept {
					t.Errorf("%d keys are kept want %d", got, tt.kept)
				}
			})
		})
	}
}

// What was taken from the bucket that unknown keys share goes back there, and what a key that is forgotten took goes
// nowhere: its next bucket is full.
func TestGiveBackSpilled(t *testing.T) {
	const hour = int64(time.Hour)
	e, err := New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: 4, Fill: 4, Interval: time.Hour, LimitBy: "user",
	}}}}, WithKeyCap(1))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	l := e.rules.Load().installed[0].component.(*limiter[bucket.State])
	decide := func(user string, now int64) *agentapi.LimiterDecision {
		d := &agentapi.LimiterDecision{Component: l.identity()}
		l.decide(&agentapi.Request{Labels: agentapi.Labels{Params: map[string]string{"user": user}}}, now, d)
		if d.Dropped {
			t.Fatalf("%s was dropped", user)
		}
		return d
	}
	check := func(when string, own, spill float64) {
		t.Helper()
		gotOwn, gotSpill := -1.0, l.source.Usage(&l.table.Spill().State, 0).Remaining
		if u := l.table.LockKnown("b"); u != nil {
			gotOwn = l.source.Usage(&u.State, 0).Remaining
			u.Unlock()
		}
		if gotOwn != own || gotSpill != spill {
			t.Errorf("%s: b has %v tokens, and those who share %v want %v and %v", when, gotOwn, gotSpill, own, spill)
		}
	}
	const none = -1
	known := decide("a", 0)
	shared := []*agentapi.LimiterDecision{decide("b", 0), decide("b", 0), decide("b", 0)}
	check("while a has the only bucket", none, 1)
	l.giveBack(0, shared[0], true)
	check("after b gave back", none, 2)

	l.table.Forget(hour, 0) // a has got its token back by then
	decide("b", hour)
	check("with a bucket of its own", 3, 2)
	l.giveBack(hour, shared[1], true)
	check("after b gave back what it had before", 3, 3)
	l.giveBack(hour, known, true)
	check("after a, which is forgotten, gave back", 3, 3)
}
