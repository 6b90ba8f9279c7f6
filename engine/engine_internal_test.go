package engine

import (
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/bucket"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

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
		req := &agentapi.Request{Labels: agentapi.Labels{Params: map[string]string{"user": user}}}
		if _, err := l.ask(t.Context(), req, asking{now: now}, d); err != nil {
			t.Fatal(err)
		}
		if d.Dropped {
			t.Fatalf("%s was dropped", user)
		}
		return d
	}
	check := func(when string, own, spill float64) {
		t.Helper()
		gotOwn, gotSpill := -1.0, l.terms.Load().own.rule.Usage(&l.table.Spill().State, 0).Remaining
		if u := l.table.LockKnown("b"); u != nil {
			gotOwn = l.terms.Load().own.rule.Usage(&u.State, 0).Remaining
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
