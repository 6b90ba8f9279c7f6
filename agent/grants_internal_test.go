package agent

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// backs notes which slots come back.
type backs struct{ slots []uint64 }

func (s *backs) Settle(_ context.Context, d *agentapi.LimiterDecision, _ agentapi.Outcome) bool {
	s.slots = append(s.slots, d.Slot())
	return true
}

// What is remembered of checks is bounded: by count, by time, by bytes, and by those of all sessions. The oldest go first, and what a
// session took is free when it has run out.
func TestGrantsAreBounded(t *testing.T) {
	const long = 64 << 10
	for _, tt := range []struct {
		name   string
		checks int
		label  int           // bytes of its value
		every  time.Duration // between checks
		others int64         // bytes that other sessions take
		want   int           // checks that can be given up
	}{
		{"few", 100, 0, 0, 0, 100},
		{"many", maxGrants + 100, 0, 0, 0, maxGrants},
		{"for long", 100, 0, time.Second, 0, 20},
		{"large", 400, long, 0, 0, maxChargesBytes / (long + grantSize)},
		{"beside other sessions", 1000, 0, 0, maxCharged, ownCharged / grantSize},
		{"larger than there is room", 3, maxChargesBytes, 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, err := engine.New(nil)
				if err != nil {
					t.Fatal(err)
				}
				defer e.Close()
				all := newSessions(e.Agent())
				all.charged.Store(tt.others)
				stream, err := all.open([16]byte{1}, "", nil)
				if err != nil {
					t.Fatal(err)
				}
				one := stream.session
				component := new(backs)
				label := string(make([]byte, tt.label))
				for i := range tt.checks {
					var v agentapi.Verdict
					d := v.Add(&agentapi.Component{Slots: true, Settler: component})
					d.Scope, d.Label = agentapi.ScopeLabel, label
					d.Hold(uint64(i + 1))
					if !all.grant(one, uint64(i+1), &v) {
						t.Errorf("check %d was given up", i+1)
					}
					<-time.After(tt.every)
				}
				if got := one.grants.count; got < tt.want || got > tt.want+1 {
					t.Errorf("%d checks are remembered want %d", got, tt.want)
				}
				for i := range tt.checks { // the newest first
					before := len(component.slots)
					e.Agent().Settle(t.Context(), all.giveUp(one, uint64(tt.checks-i), nil))
					if got := len(component.slots) > before; i < tt.want && !got || i > tt.want && got {
						t.Errorf("a slot of the check before %d others came back: %v", i, got)
					}
				}
				all.close(stream)
				<-time.After(time.Hour)
				synctest.Wait()
				if got := all.charged.Load(); got != tt.others {
					t.Errorf("%d bytes are taken after the session's end want %d", got, tt.others)
				}
			})
		})
	}
}

// A number that a client uses again is that of its newest check.
func TestNumbersThatAreUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		all := newSessions(e.Agent())
		stream, err := all.open([16]byte{1}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		one := stream.session
		component := new(backs)
		for i := range uint64(1000) {
			var v agentapi.Verdict
			v.Add(&agentapi.Component{Slots: true, Settler: component}).Hold(i + 1)
			all.grant(one, 1+i%2, &v)
			<-time.After(time.Second / 10)
		}
		e.Agent().Settle(t.Context(), all.giveUp(one, 1, nil))
		e.Agent().Settle(t.Context(), all.giveUp(one, 1, nil))
		if len(component.slots) != 1 || component.slots[0] != 999 {
			t.Errorf("slots %v came back want 999", component.slots)
		}
		if n := len(one.grants.by); n != 2 || one.grants.count > 201 {
			t.Errorf("%d numbers, %d checks are remembered", n, one.grants.count)
		}
		all.close(stream)
	})
}
