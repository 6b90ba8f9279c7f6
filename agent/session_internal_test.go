package agent

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/race"
)

// Sessions are bounded by owner and in all, and those that have run out leave their room.
func TestSessionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		all := newSessions(e.Agent())
		var open []*line
		for owner := range 5 {
			for i := range maxSessionsByOne + 1 {
				one, err := all.open([16]byte{byte(owner), 1, byte(i), byte(i >> 8)}, string(rune('a'+owner)), nil)
				if errors.Is(err, errSessions) != (owner == 4 || i == maxSessionsByOne) {
					t.Fatalf("session %d of owner %d: %v", i, owner, err)
				}
				if err == nil {
					open = append(open, one)
				}
			}
		}
		for _, one := range open {
			all.close(one)
		}
		left := func() (sessions, owners int) {
			all.mu.RLock()
			defer all.mu.RUnlock()
			return len(all.by), len(all.owners)
		}
		<-time.After(9 * time.Second)
		if sessions, _ := left(); sessions != maxSessions {
			t.Errorf("%d sessions are left after 9s want all", sessions)
		}
		<-time.After(time.Second)
		synctest.Wait()
		if sessions, owners := left(); sessions+owners != 0 {
			t.Errorf("%d sessions of %d owners are left after 10s", sessions, owners)
		}
	})
}

// A session that a check renews while its last stream ends is forgotten too.
func TestSessionsThatAreRenewedAtTheirEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		all := newSessions(e.Agent())
		stream, err := all.open([16]byte{1}, "a", nil)
		if err != nil {
			t.Fatal(err)
		}
		one := stream.session
		<-time.After(3 * time.Second)
		all.close(stream)
		all.renew(one) // by a check that has seen the stream
		left := func() int {
			all.mu.RLock()
			defer all.mu.RUnlock()
			return len(all.by) + len(all.owners)
		}
		<-time.After(9 * time.Second)
		if left() == 0 {
			t.Error("the session was forgotten before it ran out")
		}
		<-time.After(2 * time.Second)
		if n := left(); n != 0 {
			t.Errorf("%d of the session are left after it has run out", n)
		}
	})
}

// A leaseholder runs a function when a session is renewed at the engine.
type leaseholder struct {
	agentapi.Local
	renewed func()
}

func (l leaseholder) Renew([16]byte, time.Duration) (leased time.Duration) {
	l.renewed()
	return 0
}

// Checks take a session that was heard of lately for one that the engine knows. So the engine is renewed first. Otherwise the slot
// of a check at the same time is bound to a session that has run out, and others take it while its flow runs.
func TestSessionsAreRenewedAtTheEngineFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var one *session
		renewals := 0
		all := newSessions(leaseholder{renewed: func() {
			renewals++
			if one != nil && time.Since(one.began)-time.Duration(one.heard.Load()) < time.Minute {
				t.Error("checks take the session for renewed before the engine does")
			}
		}})
		stream, err := all.open([16]byte{1}, "a", nil)
		if err != nil {
			t.Fatal(err)
		}
		one = stream.session
		<-time.After(time.Minute)
		all.renew(one)
		if renewals != 2 {
			t.Errorf("%d renewals want one by the stream and another one", renewals)
		}
	})
}

// What is remembered of flows is bounded by number and by size. The oldest go first.
func TestChargesAreBounded(t *testing.T) {
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	all := newSessions(e.Agent())
	component := &agentapi.Component{TokensLabel: "tokens"}
	add := func(one *session, label string) uint64 {
		var v agentapi.Verdict
		d := v.Add(component)
		d.Scope, d.Label = agentapi.ScopeLabel, label
		return all.charge(one, new(agentapi.Request), &v, nil)
	}
	known := func(one *session, id uint64) bool {
		one.charges.mu.Lock()
		defer one.charges.mu.Unlock()
		return one.charges.by[id] != nil
	}
	small, large, other := new(session), new(session), new(session)
	for _, tt := range []struct {
		name  string
		one   *session
		label int
		most  int
	}{
		{"by number", small, 0, maxCharges},
		{"by size", large, 1 << 20, 15},
	} {
		if race.Enabled && tt.most > 1000 {
			continue
		}
		var ids []uint64
		for range tt.most + 3 {
			ids = append(ids, add(tt.one, string(make([]byte, tt.label))))
		}
		for i, id := range ids {
			if known(tt.one, id) != (i >= 3) {
				t.Fatalf("%s: flow %d of %d is remembered: %v", tt.name, i, len(ids), i < 3)
			}
		}
		if tt.one.charges.bytes > maxChargesBytes {
			t.Errorf("%s: %d bytes", tt.name, tt.one.charges.bytes)
		}
	}
	all.charged.Store(maxCharged) // by others
	for range 100 {
		add(other, "")
	}
	if got := other.charges.bytes; got > ownCharged || got < ownCharged/2 {
		t.Errorf("a session has %d bytes where others leave no room want about %d", got, ownCharged)
	}
	all.charged.Store(maxCharged)
	for range 2 { // with and without flows that could be forgotten
		if id := add(other, string(make([]byte, ownCharged))); id == 0 || other.charges.count != 0 || other.charges.bytes != 0 {
			t.Errorf("flow %d, which is larger than the room that a session always has, is remembered: %d flows", id, other.charges.count)
		}
	}
	all.charged.Store(int64(small.charges.bytes)) // which is all there is
	all.charged.Add(-small.charges.drop())
	if id := add(small, ""); all.charged.Load() != 0 || small.charges.count != 0 || id == 0 {
		t.Errorf("a session that has run out takes room, or says that flow %d cannot be settled", id)
	}
}
