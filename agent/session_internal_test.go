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
		var open []*session
		for owner := range 5 {
			for i := range maxSessionsByOne + 1 {
				one, err := all.open([16]byte{byte(owner), 1, byte(i), byte(i >> 8)}, string(rune('a'+owner)))
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
	all.charged.Store(int64(small.charges.bytes)) // which is all there is
	all.charged.Add(-small.charges.drop())
	if all.charged.Load() != 0 || add(small, "") != 0 {
		t.Error("a session that has run out takes room")
	}
}
