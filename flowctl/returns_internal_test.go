package flowctl

import (
	"cmp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/heap"
	"github.com/headgate-go/headgate/internal/testing/race"
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
		s.giveBack(7, 1, []*checkv1.InflightRequestRef{{RequestId: "1"}})
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
		{"as many slots as an agent can name", wire.MostDecisions, 100, 1, 0, wire.MostDecisions},
		{"one slot more", wire.MostDecisions + 1, 0, 1, 0, 0},
		{"more bytes than an answer has", wire.MaxDecisions / 8000, 8 << 10, 1, 0, 0},
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
				s.giveBack(7, 1, refs)
			}
			l := &line{session: s, told: true, agent: 7}
			l.takeReturns(time.Now())
			slices.SortFunc(l.returns, func(a, b *returning) int { return cmp.Compare(a.message.GetId(), b.message.GetId()) })
			for id := range tt.gone {
				s.drop(uint64(id + 1))
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

// What waits for an agent that answers nothing is bounded in memory too, whatever it names, and however many streams it ends.
func TestReturnsAreBoundedInMemory(t *testing.T) {
	named := func(slots, label int) []*checkv1.InflightRequestRef {
		refs := make([]*checkv1.InflightRequestRef, slots)
		for i := range refs {
			refs[i] = &checkv1.InflightRequestRef{PolicyName: strings.Repeat("p", 1), Label: strings.Repeat("x", label), RequestId: strings.Repeat("r", 16)}
		}
		return refs
	}
	lineOf := func(s *session) *line {
		l := &line{session: s, opened: time.Now(), told: true, agent: 7, woken: make(chan struct{}, 1)}
		s.lines[l] = struct{}{}
		l.takeReturns(time.Now())
		return l
	}
	costing := func(label int) *agentapi.Cost {
		costs := new(agentapi.Costs)
		costs.Say(strings.Repeat("x", label), 1)
		return costs.Close()
	}
	for _, tt := range []struct {
		name  string
		flows int
		most  int // bytes
		do    func(s *session, l *line, i int)
	}{
		{"many slots", 1000, maxReturnBytes, func(s *session, _ *line, i int) { s.giveBack(7, uint64(i), named(800, 100)) }},
		{"more slots than an agent can name", 1000, maxReturnBytes, func(s *session, _ *line, i int) { s.giveBack(7, uint64(i), named(1300, 100)) }},
		{"long labels", 5000, maxReturnBytes, func(s *session, _ *line, i int) { s.giveBack(7, uint64(i), named(1, 12<<10)) }},
		{"no labels", 30_000, maxReturnBytes, func(s *session, _ *line, i int) { s.giveBack(7, uint64(i), named(8, 0)) }},
		{"some parts of each flow come back", 300, maxReturnBytes, func(s *session, l *line, i int) {
			before := s.newest
			s.giveBack(7, uint64(i), named(800, 100))
			for id := before + 2; id <= s.newest; id++ {
				l.returned([]uint64{id})
			}
		}},
		{"many streams", 5000, maxReturnBytes, func(s *session, _ *line, i int) {
			s.giveBack(7, uint64(i), named(1, 12<<10))
			if i%1000 == 0 && len(s.lines) < maxLines {
				lineOf(s)
			}
		}},
		{"no heartbeat is acknowledged, and checks are given up", 400_000, maxReturnBytes, func(s *session, _ *line, i int) { s.giveUp(uint64(i)) }},
		{"settlements", 12_000, maxPendingBytes, func(s *session, _ *line, i int) { s.settle(7, uint64(i+1), uint64(i), costing(8<<10), nil) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSession(&remote{})
			defer s.close()
			l := lineOf(s)
			before := heap.Live()
			for i := range race.Pick(tt.flows/4, tt.flows) {
				tt.do(s, l, i)
			}
			if got := heap.Live() - before; got > int64(tt.most+tt.most/8) {
				t.Errorf("%d MiB are kept want at most %d", got>>20, tt.most>>20)
			}
			runtime.KeepAlive(s)
			if n := s.unanswered(); n > tt.flows {
				t.Errorf("%d flows wait of %d", n, tt.flows)
			}
		})
	}
}

// A flow is one, however many parts it comes back in, and whether or not it is settled too.
func TestUnansweredFlows(t *testing.T) {
	s := newSession(&remote{})
	defer s.close()
	s.lines[&line{session: s, told: true, agent: 7, woken: make(chan struct{}, 1)}] = struct{}{}
	slots := make([]*checkv1.InflightRequestRef, wire.MostDecisions)
	for i := range slots {
		slots[i] = &checkv1.InflightRequestRef{RequestId: "1"}
	}
	s.giveBack(7, 1, slots)
	s.settle(7, 1, 1, nil, nil)
	s.giveBack(7, 2, slots[:1])
	s.giveBack(8, 3, slots[:1]) // there is no stream at this agent
	if n := s.unanswered(); n != 2 {
		t.Errorf("unanswered() = %d want 2", n)
	}
}
