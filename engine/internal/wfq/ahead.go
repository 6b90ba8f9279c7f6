package wfq

import "math"

// An Ahead is the cost of the waiters that are served before another flow: at the least, if no other flow comes, and
// likely. The least is by formula, and may count a waiter whose turn comes just after; see [Queue.CostBefore]. If they
// do not all cost the same as that flow, Largest is the most that one of them may cost; otherwise it is 0.
type Ahead struct{ Least, Likely, Largest float64 }

// Ahead returns the cost of the waiters that would be served before a new one of the claim with the given cost. It is
// exact if all cost the same. If a great many share the queue, it does not look at all of them, and returns too little.
func (q *Queue[T]) Ahead(c Claim, cost float64) Ahead {
	all := Ahead{Least: cost, Likely: cost} // the flow itself, too
	begin := q.root.clock
	workload := q.shares[c.ofWorkload()]
	if workload != nil {
		own, fairBegin := q.shares[c], workload.clock
		if own != nil {
			fairBegin = own.start
			all = Ahead{Least: cost + own.backlog, Likely: cost + own.backlog}
		}
		others := workload.others(own, Ahead{Least: fairBegin + all.Least, Likely: fairBegin + all.Likely})
		all = Ahead{Least: all.Least + others.Least, Likely: all.Likely + others.Likely}
		begin = workload.start
	}
	others := q.root.others(workload, Ahead{Least: begin + all.Least/c.Priority, Likely: begin + all.Likely/c.Priority})
	all = Ahead{Least: all.Least + others.Least - cost, Likely: all.Likely + others.Likely - cost}
	if q.length > 0 && (q.root.smallest != cost || q.root.largest != cost) {
		all.Largest = max(cost, q.root.largest)
	}
	return all
}

// mostOthers bounds what a look at the other shares may cost a flow.
const mostOthers = 128

// others returns what all shares below except one get until the clock shows the given times.
func (s *share[T]) others(but *share[T], clock Ahead) (sum Ahead) {
	for _, o := range s.below[:min(len(s.below), mostOthers)] {
		if o == but || o.finish > clock.Likely {
			continue
		}
		least, likely := o.served(clock.Likely)
		if clock.Least < clock.Likely { // which is rare
			if least = 0; o.finish <= clock.Least {
				least, _ = o.served(clock.Least)
			}
		}
		sum.Least += least
		sum.Likely += likely
	}
	return sum
}

// served returns what the share gets until the clock shows that time, which is not before its finish. It looks only at
// the cost of the first waiter: the one that comes too late may cost as much as any.
func (s *share[T]) served(clock float64) (least, likely float64) {
	cost, first := (clock-s.start)*s.weight, s.head().Cost
	if s.smallest == s.largest {
		cost = first * math.Floor(cost/first+1e-9)
		least = cost
	} else {
		least = cost - s.largest
	}
	return min(max(least, first), s.backlog), min(max(cost, first), s.backlog)
}

// CostBefore returns the cost of the waiters that are served before a new one of the claim with the given cost, if no other
// flow comes and no waiter leaves, except the waiter but; see [Queue.Preview]. It serves them in a preview of so many visits: rounding
// decides the order of two shares that finish about the same time, and no formula shows it. If the visits do not
// suffice, it returns less: the cost of waiters that are sure to be served before.
func (q *Queue[T]) CostBefore(c Claim, cost float64, but *Waiter[T], visits int) (sum float64) {
	const begin = math.MinInt64 // no waiter has given up
	self := &Waiter[T]{Cost: cost, Deadline: NoDeadline}
	p, ok := q.Preview(self, but, c, begin, visits)
	if !ok {
		return q.firstTurns(c, cost)
	}
	for w := p.First(); w != nil && w != self; w = p.First() {
		sum += w.Cost
		p.Serve(begin)
	}
	return sum
}

// firstTurns returns the cost of the waiters in a new waiter's share, and of the first waiters of other shares of its
// workload whose turns come before.
func (q *Queue[T]) firstTurns(c Claim, cost float64) (sum float64) {
	workload := q.shares[c.ofWorkload()]
	if workload == nil {
		return 0
	}
	finish, own := workload.clock+cost, q.shares[c]
	if own != nil {
		finish, sum = own.finish, own.backlog
	}
	for _, o := range workload.below[:min(len(workload.below), mostOthers)] {
		if o != own && o.finish <= finish {
			sum += o.first.Cost
		}
	}
	return sum
}

// Outlast returns the cost of the waiters that are sure to be served before a new one of the claim with that deadline,
// whenever anything is served: they are of its own share, and have more time. All reports whether no waiter has less
// time; then none gives up before the new one does.
func (q *Queue[T]) Outlast(c Claim, deadline int64) (cost float64, all bool) {
	if q.deadlines == 0 {
		return 0, true
	}
	visits := MaxVisits
	all = true
	for _, w := range q.root.below {
		for _, s := range w.below {
			for at := s.first; at != nil && all; at = at.next {
				visits--
				all = at.Deadline >= deadline && visits > 0
			}
		}
	}
	if own := q.shares[c]; own != nil && !all {
		visits = MaxVisits
		for at := own.first; at != nil && visits > 0; at = at.next {
			if visits--; at.Deadline >= deadline {
				cost += at.Cost
			}
		}
	}
	return cost, all
}
