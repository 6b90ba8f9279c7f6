package wfq

// The bounds of a look at many waiters. Every step of a preview visits the shares that wait, so with more shares it
// looks less far ahead.
const (
	MaxVisits = 8192
	maxLanes  = 256
)

// A Preview plays what a queue will do from a time on, with one more flow, and changes nothing of the queue: it serves
// waiters in the order of the queue, and drops those whose deadline has passed. The queue must not change meanwhile.
type Preview[T any] struct {
	self   *Waiter[T]
	but    *Waiter[T]
	groups []group[T]
	clock  float64 // of the root
	visits int

	group *group[T] // of the first waiter
	lane  *lane[T]
}

// A lane is a share of a workload in a preview.
type lane[T any] struct {
	next          *Waiter[T]
	own           bool // the flow itself comes last
	start, finish float64
}

// A group is a workload in a preview.
type group[T any] struct {
	lanes                        []lane[T]
	first                        int // the lane that is served next
	weight, start, finish, clock float64
}

// Preview begins a preview with one more flow, which comes with the claim. The preview leaves out the waiter but, which may be nil:
// one that the flow displaces, as [Queue.Evictable] returned it. It may make so many visits. OK is false if more shares
// wait than a preview looks at.
func (q *Queue[T]) Preview(self, but *Waiter[T], c Claim, now int64, visits int) (p Preview[T], ok bool) {
	if len(q.shares) > maxLanes {
		return p, false
	}
	self.number = q.count + 1
	p = Preview[T]{self: self, but: but, groups: q.groups(c), clock: q.root.clock, visits: visits}
	p.Expire(now)
	return p, true
}

// groups are the workloads of the queue and their shares, with a place for a flow of the claim.
func (q *Queue[T]) groups(c Claim) []group[T] {
	groups := make([]group[T], 0, len(q.root.below)+1)
	found := false
	for _, w := range q.root.below {
		g := group[T]{lanes: make([]lane[T], 0, len(w.below)+1), weight: w.weight, start: w.start, clock: w.clock}
		for _, s := range w.below {
			g.lanes = append(g.lanes, lane[T]{next: s.first, own: s.claim == c, start: s.start})
			found = found || s.claim == c
		}
		if !found && w.claim == c.ofWorkload() {
			g.lanes = append(g.lanes, lane[T]{own: true, start: w.clock})
			found = true
		}
		groups = append(groups, g)
	}
	if !found {
		groups = append(groups, group[T]{lanes: []lane[T]{{own: true}}, weight: c.Priority, start: q.root.clock})
	}
	return groups
}

// First returns the waiter that is served next. It is nil when the preview has made all its visits. The flow itself leaves
// last, so there is one until then.
func (p *Preview[T]) First() *Waiter[T] {
	if p.visits <= 0 {
		return nil
	}
	p.group, p.lane = nil, nil
	for i := range p.groups {
		o := &p.groups[i]
		p.visits--
		if o.first < 0 {
			continue
		}
		first := &o.lanes[o.first]
		g := p.group
		if g == nil || o.finish < g.finish || o.finish == g.finish && p.head(first).number < p.head(p.lane).number {
			p.group, p.lane = o, first
		}
	}
	return p.head(p.lane)
}

// Serve has the first waiter, as [Preview.First] returned it, served at the time. It must not be the flow itself.
func (p *Preview[T]) Serve(at int64) {
	g, l := p.group, p.lane
	l.next = l.next.next
	l.start, g.start = l.finish, g.finish
	g.clock = max(g.clock, l.finish)
	p.clock = max(p.clock, g.finish)
	if g.clock >= lateClock {
		for i := range g.lanes {
			g.lanes[i].start -= g.clock
		}
		g.clock = 0
	}
	p.settle(g, at)
	p.rebase()
}

// rebase sets the clock of the workloads back where the queue does. Serve does so for the clock of one workload. Floats
// round differently from then on, and the order of shares that finish about the same time depends on that.
func (p *Preview[T]) rebase() {
	if p.clock < lateClock {
		return
	}
	for i := range p.groups {
		g := &p.groups[i]
		if g.start -= p.clock; g.first >= 0 {
			g.finish = g.start + p.head(&g.lanes[g.first]).Cost/g.weight
		}
	}
	p.clock = 0
}

// NextExpiry returns the first time before due at which a waiter that could be served has given up, and due when none has.
func (p *Preview[T]) NextExpiry(due int64) int64 {
	next := due
	for i := range p.groups {
		g := &p.groups[i]
		for j := range g.lanes {
			if w := p.head(&g.lanes[j]); w != nil && w.Deadline < next {
				next = w.Deadline + 1
			}
		}
		p.visits -= len(g.lanes)
	}
	return next
}

// Expire drops the waiters that give up before the time.
func (p *Preview[T]) Expire(at int64) {
	for i := range p.groups {
		p.settle(&p.groups[i], at)
	}
}

func (p *Preview[T]) head(l *lane[T]) *Waiter[T] {
	if l.next == nil && l.own {
		return p.self
	}
	return l.next
}

// settle drops the waiters of a group that give up before the time or are left out, and finds its first lane.
func (p *Preview[T]) settle(g *group[T], at int64) {
	g.first = -1
	for i := range g.lanes {
		l := &g.lanes[i]
		for l.next != nil && (l.next.Deadline < at || l.next == p.but) {
			l.next = l.next.next
			p.visits--
		}
		w := p.head(l)
		p.visits--
		if w == nil {
			continue
		}
		l.finish = l.start + w.Cost
		if g.first >= 0 {
			best := &g.lanes[g.first]
			if l.finish > best.finish || l.finish == best.finish && w.number > p.head(best).number {
				continue
			}
		}
		g.first = i
	}
	if g.first >= 0 {
		g.finish = g.start + p.head(&g.lanes[g.first]).Cost/g.weight
	}
}
