package flowctl

import (
	"cmp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/wire"
)

// What waits for an agent is bounded by count and time. The oldest go first.
func TestReturnsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSession(&remote{})
		for range maxReturns + 100 {
			s.giveUp(1)
		}
		if len(s.returns) != maxReturns || s.returns[100] != nil || s.returns[101] == nil || s.returns[maxReturns+100] == nil {
			t.Errorf("%d returns wait want the newest %d", len(s.returns), maxReturns)
		}
		<-time.After(givenUpBy)
		s.giveBack(7, []*checkv1.InflightRequestRef{{RequestId: "1"}})
		l := &line{session: s, told: true, agent: 7}
		l.takeReturns(time.Now())
		if len(l.returns) != 1 || len(s.returns) != 1 || !s.brings(7) {
			t.Errorf("%d returns, of %d that wait want the one that is not too old", len(l.returns), len(s.returns))
		}
		<-time.After(returnedBy)
		l.takeReturns(time.Now())
		if len(l.returns)+len(s.returns) != 0 || s.brings(7) {
			t.Errorf("%d returns wait for too long", len(s.returns))
		}
		s.close()
		s.giveUp(1)
		if len(s.returns) != 0 {
			t.Error("a return waits in a session that is closed")
		}
	})
}

// Each batch fits into a message, with a heartbeat, and all slots come that fit into any.
func TestBatchesOfReturns(t *testing.T) {
	for _, tt := range []struct {
		name  string
		slots int // of a flow
		label int // bytes
		flows int
		gone  int // returns, the first, that have come back on another stream
		want  int // slots that come
	}{
		{"small", 1, 0, 1000, 0, 1000},
		{"many slots", 4096, 100, 1, 0, 4096},
		{"long labels", 3, 8 << 10, 10, 0, 30},
		{"a label that fits into no message", 1, wire.MaxSessionMessage, 3, 0, 0},
		{"small, and many have come back", 1, 0, 1000, 900, 100},
		{"long labels, and many have come back", 3, 8 << 10, 100, 270, 30},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSession(&remote{})
			defer s.close()
			for range tt.flows {
				var refs []*checkv1.InflightRequestRef
				for range tt.slots {
					refs = append(refs, &checkv1.InflightRequestRef{
						PolicyName: "policy", PolicyHash: "0123", ComponentId: "root.0", Label: strings.Repeat("x", tt.label), RequestId: "0123456789abcdef",
					})
				}
				s.giveBack(7, refs)
			}
			l := &line{session: s, told: true, agent: 7}
			l.takeReturns(time.Now())
			slices.SortFunc(l.returns, func(a, b *returning) int { return cmp.Compare(a.message.GetId(), b.message.GetId()) })
			for id := range tt.gone {
				delete(s.returns, uint64(id+1))
			}
			got := 0
			for len(l.returns) > 0 {
				m := &sessionv1.SessionRequest{Returns: l.batchReturns(), Heartbeat: &sessionv1.Heartbeat{Number: 1 << 62, Acknowledges: 1 << 62}}
				slots := 0
				for _, one := range m.GetReturns() {
					slots += len(one.GetSlots())
				}
				if size := proto.Size(m); size > wire.MaxSessionMessage || slots == 0 || slots > wire.MostSettlements {
					t.Fatalf("a message of %d bytes has %d slots", size, slots)
				}
				got += slots
			}
			if got != tt.want {
				t.Errorf("%d slots come want %d", got, tt.want)
			}
		})
	}
}
