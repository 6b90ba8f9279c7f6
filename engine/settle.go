package engine

import (
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
)

// What is counted of a component's settlements.
const (
	settlementsTaken   = iota
	settlementsMissed  // those that the entry which spilled keys share did not take
	tokensForgiven     // a float64: the cost that no bucket was charged with
	settlementCounters // how many there are
)

// This does not compile when there are too many to count.
const _ = uint(counters - settlementCounters)

// settles has the component correct what it took by the label, when the cost of a flow is known. With an empty label, and
// without a source that can, nothing is corrected.
func (k *keyed[S, R]) settles(label string, can bool) {
	if label != "" && can {
		k.component.TokensLabel, k.settlements = label, new(counts)
	}
}

// settled is what the flow has cost by the label of the component; ok is false if nothing is to be corrected.
func (k *keyed[S, R]) settled(d *agentapi.LimiterDecision, o agentapi.Outcome) (cost float64, ok bool) {
	if k.settlements == nil || o.Ended == agentapi.EndedUnused || d.DryRun || d.Scope == agentapi.ScopeNone {
		return 0, false
	}
	return o.Costs.By(k.component.TokensLabel)
}

// owing locks the entry that a settlement corrects. It is nil if there is none. A key that was forgotten, because nobody
// could tell it from a new one, is made again for a debt, and has no room for a refund. What spilled is not corrected: the keys
// that share an entry would pay for each other.
func (k *keyed[S, R]) owing(d *agentapi.LimiterDecision, labels *agentapi.Labels, now int64, debt bool) *keys.Entry[S] {
	switch {
	case k.table == nil:
		k.single.Lock()
		return k.single
	case d.Spilled:
		return nil
	}
	if e := k.table.LockKnown(d.Label); e != nil || !debt {
		return e
	}
	return k.table.LockOwn(d.Label, now, k.fresh(labels, d.Label))
}

// countSettlement counts a settlement, by what it has forgiven. Taken is false if the entry that spilled keys share was to take it.
func (k *keyed[S, R]) countSettlement(d *agentapi.LimiterDecision, taken bool, forgiven float64) {
	what := settlementsTaken
	if !taken {
		what = settlementsMissed
	}
	count(k.settlements, d, what)
	if forgiven > 0 {
		addFloat(k.settlements, d, tokensForgiven, min(forgiven, source.MaxCost))
	}
}

// correct has the source of a limiter correct what the flow took, if its cost is known.
func (l *limiter[S]) correct(d *agentapi.LimiterDecision, o agentapi.Outcome) {
	cost, ok := l.settled(d, o)
	if !ok {
		return
	}
	now, debt := l.engine.now(), max(cost-d.Consumed, 0)
	e := l.owing(d, o.Labels, now, debt > 0)
	if e == nil {
		l.countSettlement(d, !d.Spilled && debt == 0, debt)
		return
	}
	forgiven := l.of(e).rule.(source.Settler[S]).Settle(&e.State, now, d.Consumed, cost, d.Slot())
	e.Unlock()
	l.countSettlement(d, true, forgiven)
}

// correct is that of a limiter. The flow's workload learns what its flows cost. If the flow's share waits, it is charged with
// what the flow cost beyond the estimate.
func (s *scheduler[S]) correct(d *agentapi.LimiterDecision, o agentapi.Outcome) {
	cost, ok := s.settled(d, o)
	if !ok {
		return
	}
	var of *workload
	if o.Labels != nil {
		of, _ = s.workloads.of(o.Labels)
		of.ratio.learn(d.Consumed, cost)
	}
	now, debt := s.engine.now(), max(cost-d.Consumed, 0)
	e := s.owing(d, o.Labels, now, debt > 0)
	if e == nil {
		s.countSettlement(d, !d.Spilled && debt == 0, debt)
		return
	}
	waiting := e.State.waiting()
	if waiting {
		s.catchUp(e, now)
	}
	forgiven := s.of(e).rule.(source.Settler[S]).Settle(&e.State.tokens, now, d.Consumed, cost, d.Slot())
	if waiting {
		if debt -= forgiven; of != nil && debt > 0 {
			s.charge(e, of, o.Labels, d.Consumed, debt)
		}
		e.State.queue.changes++
		s.serve(e, now)
	}
	e.Unlock()
	s.countSettlement(d, true, forgiven)
}

// charge charges the shares of a flow with what it cost beyond the estimate. A fairness value counts by the workload's ratio, as its
// flows do. The workload itself has the ratio, and is charged with what that leaves out. One that a label names shares
// the ratio with others, and counts as a fairness value does.
func (s *scheduler[S]) charge(e *keys.Entry[line[S]], of *workload, labels *agentapi.Labels, estimated, debt float64) {
	claim := s.workloads.claim(of, labels)
	from := s.of(e).rule
	fairness := from.Cost(of.ratio.of(debt))
	workload := fairness
	if claim.Workload == of.label {
		workload = from.Cost(max(debt-(mostRatio-1)*estimated, 0))
	}
	e.State.queue.Charge(claim, workload, fairness)
}
