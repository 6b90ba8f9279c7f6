package engine

import (
	"math"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// An outlook is when a flow would be served if it waited from now on, no other flow came and none left before its time.
type outlook struct {
	at    int64 // the time; where it is not known, the flow is not served before
	known bool
}

// outlookKey is what an outlook depends on besides the state of the queue.
type outlookKey struct {
	claim        claim
	cost, tokens float64
	visits       int
}

// The bounds of a look ahead. Every step visits the shares that wait, so with more shares it sees less far.
const (
	mostVisits = 8192 // before a flow is rejected because the queue is too long
	fewVisits  = 1024 // for an estimate only
	mostLanes  = 256
	mostKnown  = 64 // outlooks that a queue remembers until something changes

)

// immortal is when a flow gives up that has all the time.
const immortal int64 = math.MaxInt64

// A lane is a share of a workload in a look ahead.
type lane struct {
	next          *waiter
	own           bool // the flow itself comes last
	start, finish float64
}

// lanes are a workload in a look ahead.
type lanes struct {
	all                          []lane
	first                        int // the lane that is served next
	weight, start, finish, clock float64
}

// lookAhead plays what the queue does from now on with a copy of the state of a source: it serves flows in the order in
// which the queue would, and drops those whose time is over. It stops where it has made as many visits as it may.
func lookAhead[S any](from source.Source[S], state S, q *queue, now int64, key outlookKey) outlook {
	if len(q.queueShares) > mostLanes {
		return outlook{at: now}
	}
	self := &waiter{tokens: key.tokens, cost: key.cost, number: q.count + 1, until: immortal}
	groups := q.lanes(key.claim)
	visits := key.visits
	head := func(l *lane) *waiter {
		if l.next == nil && l.own {
			return self
		}
		return l.next
	}
	// settle drops what has given up before the time from a group, and finds the lane that is first.
	settle := func(g *lanes, at int64) {
		g.first = -1
		for i := range g.all {
			l := &g.all[i]
			for l.next != nil && l.next.until < at {
				l.next = l.next.next
				visits--
			}
			w := head(l)
			visits--
			if w == nil {
				continue
			}
			l.finish = l.start + w.cost
			if g.first >= 0 {
				best := &g.all[g.first]
				if l.finish > best.finish || l.finish == best.finish && w.number > head(best).number {
					continue
				}
			}
			g.first = i
		}
		if g.first >= 0 {
			g.finish = g.start + head(&g.all[g.first]).cost/g.weight
		}
	}
	for i := range groups {
		settle(&groups[i], now)
	}
	at := now
	for visits > 0 {
		var g *lanes
		var l *lane
		for i := range groups {
			o := &groups[i]
			visits--
			if o.first < 0 {
				continue
			}
			first := &o.all[o.first]
			if g == nil || o.finish < g.finish || o.finish == g.finish && head(first).number < head(l).number {
				g, l = o, first
			}
		}
		w := head(l) // there is one: the flow itself leaves last
		got := from.Take(&state, at, w.tokens)
		if got.OK {
			if w == self {
				return outlook{at, true}
			}
			l.next = w.next
			l.start, g.start = l.finish, g.finish
			g.clock = max(g.clock, l.finish)
			settle(g, at)
			continue
		}
		due := immortal
		if got.Wait > 0 {
			due = at + got.Wait
		}
		// A flow may give up meanwhile, and another one be first then.
		next := due
		for i := range groups {
			for j := range groups[i].all {
				if w := head(&groups[i].all[j]); w != nil && w.until < next {
					next = w.until + 1
				}
			}
			visits -= len(groups[i].all)
		}
		if next == immortal {
			return outlook{at: immortal}
		}
		at = next
		if at == due {
			continue // none has given up
		}
		for i := range groups {
			settle(&groups[i], at)
		}
	}
	return outlook{at: at}
}

// lanes are the workloads of the queue and their shares, with a place for a flow of the claim.
func (q *queue) lanes(c claim) []lanes {
	groups := make([]lanes, 0, len(q.root.below)+1)
	found := false
	for _, w := range q.root.below {
		g := lanes{all: make([]lane, 0, len(w.below)+1), weight: w.weight, start: w.start, clock: w.clock}
		for _, s := range w.below {
			g.all = append(g.all, lane{next: s.first, own: s.claim == c, start: s.start})
			found = found || s.claim == c
		}
		if !found && w.claim == c.ofWorkload() {
			g.all = append(g.all, lane{own: true, start: w.clock})
			found = true
		}
		groups = append(groups, g)
	}
	if !found {
		groups = append(groups, lanes{all: []lane{{own: true}}, weight: c.priority, start: q.root.clock})
	}
	return groups
}

// outlook is the look ahead for a flow, which is made once until something changes.
func (s *scheduler[S]) outlook(l *line[S], now int64, key outlookKey) outlook {
	q := l.queue
	if q.outlooksOf != q.version {
		q.outlooksOf = q.version
		clear(q.outlooks)
	}
	o, ok := q.outlooks[key]
	if !ok {
		o = lookAhead(s.source, l.tokens, q, now, key)
		if q.outlooks == nil {
			q.outlooks = make(map[outlookKey]outlook)
		}
		if len(q.outlooks) < mostKnown {
			q.outlooks[key] = o
		}
	}
	return o
}

// reconsider corrects a forecast of how long a flow would wait until a time. That takes all that wait for flows that will
// be served. Some may give up before their turn, and the flow comes earlier for it.
func (s *scheduler[S]) reconsider(l *line[S], now, until int64, c claim, cost, tokens float64, least, likely int64) (atLeast, likeliest int64) {
	switch {
	case !l.waiting() || l.queue.mortal == 0:
		return least, likely
	case !s.source.Timed():
		counts, all := l.queue.outlast(c, until)
		if all {
			return least, likely
		}
		ahead := l.queue.ahead(c, cost)
		ahead.Least = counts
		sure, _ := s.source.Forecast(&l.tokens, now, ahead, tokens)
		return min(least, sure), likely
	}
	o := s.outlook(l, now, outlookKey{c, cost, tokens, mostVisits})
	wait := max(o.at-now, 0)
	if o.known {
		likely = min(likely, max(wait, 1))
	}
	return min(least, wait), likely
}

// estimate is how long a flow that is rejected would likely wait if it came back now.
func (s *scheduler[S]) estimate(l *line[S], now int64, c claim, cost, tokens float64) int64 {
	_, likely := s.source.Forecast(&l.tokens, now, l.ahead(c, cost), tokens)
	if likely > 0 && l.waiting() && l.queue.mortal > 0 && s.source.Timed() {
		if o := s.outlook(l, now, outlookKey{c, cost, tokens, fewVisits}); o.known {
			likely = min(likely, max(o.at-now, 1))
		}
	}
	return likely
}

// outlast is what the flows cost that are sure to go before one of the claim which gives up at that time, whatever gives
// slots back, and when: they are of its own share, and have more time. All reports that no flow has less time; then none
// gives up before that flow does.
func (q *queue) outlast(c claim, until int64) (cost float64, all bool) {
	visits := mostVisits
	all = true
	for _, w := range q.root.below {
		for _, s := range w.below {
			for at := s.first; at != nil && all; at = at.next {
				visits--
				all = at.until >= until && visits > 0
			}
		}
	}
	if own := q.queueShares[c]; own != nil && !all {
		visits = mostVisits
		for at := own.first; at != nil && visits > 0; at = at.next {
			if visits--; at.until >= until {
				cost += at.cost
			}
		}
	}
	return cost, all
}
