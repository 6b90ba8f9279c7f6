package flowctl

import (
	"cmp"
	"time"

	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of returns. The oldest go first.
const (
	maxReturns = 1 << 14
	returnedBy = 10 * time.Minute // after which an agent that was restarted is not waited for any more
	givenUpBy  = 30 * time.Second // longer than an agent remembers a check
	returnSize = 32               // bytes of a return on the wire, besides its slots, at the most
)

// A returning is slots that no call has brought back, or a check that was given up, on the way to the agent. Without one, the
// agent would keep the slots for as long as the session lives, up to their max_inflight_duration.
type returning struct {
	message *sessionv1.Return
	agent   uint64 // 0: that of the next stream
	size    int    // on the wire
	ends    time.Time
}

// giveBack has the session bring back the slots of a flow that has ended.
func (s *session) giveBack(agent uint64, refs []*checkv1.InflightRequestRef) {
	ends := time.Now().Add(returnedBy)
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(refs) > 0 {
		n, size := 0, returnSize
		for n < len(refs) && n < wire.MostSettlements {
			need := returnSize + proto.Size(refs[n])
			if size+need > wire.MaxSessionMessage-settlingSize && n > 0 {
				break
			}
			size += need
			n++
		}
		s.comeBack(&returning{message: &sessionv1.Return{Slots: refs[:n]}, agent: agent, size: size, ends: ends})
		refs = refs[n:]
	}
}

// giveUp tells the agents of the session that the answer to a check did not come.
func (s *session) giveUp(number uint64) {
	ends := time.Now().Add(givenUpBy)
	s.mu.Lock()
	defer s.mu.Unlock()
	told := false
	for l := range s.lines {
		if l.told && l.isFirst() {
			told = true
			s.comeBack(&returning{message: &sessionv1.Return{Check: number}, agent: l.agent, size: returnSize, ends: ends})
		}
	}
	if !told {
		s.comeBack(&returning{message: &sessionv1.Return{Check: number}, size: returnSize, ends: ends})
	}
}

// isFirst reports whether the stream is the one of those at its agent that returns go on.
func (l *line) isFirst() bool { return l.session.lineAt(l.agent) == l }

// lineAt returns the newest stream at the agent; nil if there is none.
func (s *session) lineAt(agent uint64) (at *line) {
	for l := range s.lines {
		if l.told && l.agent == agent && (at == nil || l.opened.After(at.opened)) {
			at = l
		}
	}
	return at
}

// comeBack sends the return, now or when there is a stream at the agent.
func (s *session) comeBack(one *returning) {
	if s.isClosed || one.size > wire.MaxSessionMessage-settlingSize {
		return
	}
	for len(s.returns) >= maxReturns {
		s.oldest++
		delete(s.returns, s.oldest)
	}
	s.newest++
	one.message.Id = s.newest
	s.returns[s.newest] = one
	if l := s.lineAt(one.agent); l != nil {
		l.returns = append(l.returns, one)
		l.poke()
	}
}

// takeReturns has the stream bring back all returns. Other streams may have brought some already, which does no harm. Returns for another
// agent come, too: this one may be the same agent after a kill, with slots of its last copy. If it is not, it does not know their names.
func (l *line) takeReturns(now time.Time) {
	l.returns, l.bringing = nil, 0
	for id, one := range l.session.returns {
		if !now.Before(one.ends) {
			delete(l.session.returns, id)
			continue
		}
		one.agent = cmp.Or(one.agent, l.agent)
		l.returns = append(l.returns, one)
	}
}

// batchReturns takes as many returns as fit into one message.
func (l *line) batchReturns() (batch []*sessionv1.Return) {
	size := settlingSize // a heartbeat goes with it
	slots := 0
	for len(l.returns) > 0 && len(batch) < wire.MostSettlements {
		one := l.returns[0]
		if l.session.returns[one.message.GetId()] != one { // it was answered on another stream, or given up
			l.returns = l.returns[1:]
			continue
		}
		slots += len(one.message.GetSlots())
		if size += one.size; size > wire.MaxSessionMessage || slots > wire.MostSettlements {
			break
		}
		l.returns, batch = l.returns[1:], append(batch, one.message)
	}
	return batch
}

// returned notes which returns the agent has carried out.
func (l *line) returned(ids []uint64) {
	s := l.session
	for _, id := range ids {
		if one := s.returns[id]; one != nil && one.agent == l.agent {
			delete(s.returns, id)
		}
		l.bringing = max(l.bringing-1, 0)
	}
}

// brings reports whether there is anything to bring back to the agent.
func (s *session) brings(agent uint64) bool {
	now := time.Now()
	for _, one := range s.returns {
		if one.agent == agent && now.Before(one.ends) {
			return true
		}
	}
	return false
}
