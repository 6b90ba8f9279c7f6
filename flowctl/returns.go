package flowctl

import (
	"cmp"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of returns. The oldest go first.
const (
	maxReturns     = 1 << 14
	maxReturnBytes = 8 << 20 // in memory: as many as there may be, with a slot of little text
	returnKept     = 256     // bytes of a return in memory, besides its slots
	slotKept       = 208     // bytes of a slot in memory, besides those on the wire

	returnedBy = 10 * time.Minute // after which an agent that was restarted is not waited for any more
	givenUpBy  = 30 * time.Second // longer than an agent remembers a check
	returnSize = 32               // bytes of a return on the wire, besides its slots, at the most
)

// A returning is slots that no call has brought back, or a check that was given up, on the way to the agent. Without one, the
// agent would keep the slots for as long as the session lives, up to their max_inflight_duration.
type returning struct {
	message *sessionv1.Return // nil when the session has dropped it, because streams may still have it in their lists
	flow    uint64            // the number of its check
	agent   uint64            // 0: that of the next stream
	size    int               // on the wire
	kept    int               // bytes in memory
	ends    time.Time
}

// giveBack has the session bring back the slots of a flow that has ended. It does nothing if they are more than an agent of Headgate
// can name in an answer: they would take much memory, and be no such agent's.
func (s *session) giveBack(agent, number uint64, refs []*checkv1.InflightRequestRef) {
	if len(refs) > wire.MostDecisions {
		return
	}
	ends := time.Now().Add(returnedBy)
	sizes, all := make([]int, len(refs)), 0
	for i, ref := range refs {
		sizes[i] = proto.Size(ref)
		all += sizes[i]
	}
	if all > wire.MaxDecisions {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(refs) > 0 {
		n, size, kept := 0, returnSize, returnKept
		for n < len(refs) && n < wire.MostSettlements {
			need := returnSize + sizes[n]
			if size+need > wire.MaxSessionMessage-settlingSize && n > 0 {
				break
			}
			size += need
			kept += slotKept + sizes[n]
			n++
		}
		slots := slices.Clone(refs[:n]) // each return lasts for a time of its own, and must not keep the slots of the others
		s.comeBack(&returning{message: &sessionv1.Return{Slots: slots}, flow: number, agent: agent, size: size, kept: kept, ends: ends})
		refs, sizes = refs[n:], sizes[n:]
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
			s.comeBack(&returning{message: &sessionv1.Return{Check: number}, flow: number, agent: l.agent, size: returnSize, kept: returnKept, ends: ends})
		}
	}
	if !told {
		s.comeBack(&returning{message: &sessionv1.Return{Check: number}, flow: number, size: returnSize, kept: returnKept, ends: ends})
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
	for len(s.returns) >= maxReturns || s.returnsKept+one.kept > maxReturnBytes {
		s.oldest++
		s.drop(s.oldest)
	}
	s.newest++
	one.message.Id = s.newest
	s.returns[s.newest] = one
	s.returnsKept += one.kept
	if l := s.lineAt(one.agent); l != nil {
		if len(l.returns) >= 2*len(s.returns) { // an agent may never answer a batch
			l.returns = slices.DeleteFunc(l.returns, func(one *returning) bool { return one.message == nil })
		}
		l.returns = append(l.returns, one)
		l.poke()
	}
}

// drop ends a return, if there is one with the id.
func (s *session) drop(id uint64) {
	if one := s.returns[id]; one != nil {
		delete(s.returns, id)
		s.returnsKept -= one.kept
		one.message = nil
	}
}

// takeReturns has the stream bring back all returns. Other streams may have brought some already, which does no harm. Returns for another
// agent come, too: this one may be the same agent after a kill, with slots of its last copy. If it is not, it does not know their names.
func (l *line) takeReturns(now time.Time) {
	l.returns, l.bringing = nil, 0
	for id, one := range l.session.returns {
		if !now.Before(one.ends) {
			l.session.drop(id)
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
		if one.message == nil { // it was answered on another stream, or given up
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
			s.drop(id)
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
