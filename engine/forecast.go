package engine

import (
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/engine/internal/wfq"
)

// How long will a flow wait? A scheduler asks before it puts a flow into a queue: a flow that is sure to wait in vain
// is rejected at once, with a time to retry. There are two answers, a cheap one first.
//
// The first goes by sums. The queue says what the flows cost that are served before the new one, and the source how long it
// takes until so many tokens have come: see the methods Forecast in packages bucket and slots. It assumes that all
// flows that wait will be served.
//
// The second is made where the first would reject the flow, because the first may say too much. A flow that waits may
// give up before its turn, so that the new one is served earlier. If the queue is full, the new one may displace one that
// the sums count. If two turns come at about the same time, the sums do not show which is first. If tokens come by themselves, a look ahead plays what the queue will do on a copy of the
// source's state. If they come back with flows that end, only the flows count that are sure to be served before. If
// none of them gives up, a preview of the queue finds them.
//
// An example. A bucket of one token is empty and gets one each second. A and B wait for a token each, one after the other;
// B gives up after 1.5 s. Now N comes, of the same workload, which can wait for 2.5 s. By the sums, three tokens must come,
// and N is served after 3 s: too late. The look ahead serves A after 1 s, drops B after 1.5 s, and serves N after 2 s. So N
// waits.

// A wish is what a flow wants, and the claim that it waits by.
type wish struct {
	claim  wfq.Claim
	tokens float64
	cost   float64 // what the tokens count for in the queue
}

// An outlook is when a flow would be served if it waited from now on, no other flow came and none left before its time.
type outlook struct {
	at     int64 // when the flow is served, or the earliest time
	known  bool
	before float64 // cost of the flows before it; only of a source that is not timed
}

// A forecastKey is what an outlook depends on besides the queue and what the source has.
type forecastKey struct {
	wish
	but    *waiter // that the flow displaces; nil for none
	visits int
}

const (
	mostVisits = wfq.MaxVisits // of a look ahead, before a flow is rejected because the queue is too long
	fewVisits  = 1024          // for an estimate only
	mostKnown  = 64            // outlooks that a queue remembers until something changes
)

// forecast returns how long the flow would wait, by sums.
func forecast[S any](from source.Source[S], l *line[S], now int64, w wish) (least, likely int64) {
	return from.Forecast(&l.tokens, now, l.ahead(w), w.tokens)
}

// ahead returns the cost of the flows that are served before this one.
func (l *line[S]) ahead(w wish) source.Ahead {
	if !l.waiting() {
		return source.Ahead{}
	}
	return source.Ahead(l.queue.Ahead(w.claim, w.cost)) // package wfq has a type of its own
}

// rethink corrects a forecast for a flow that can wait until the deadline: flows before it may give up, and in a full queue it may
// displace one.
func rethink[S any](from source.Source[S], l *line[S], now, deadline int64, w wish, but *waiter, least, likely int64) (atLeast, likeliest int64) {
	switch {
	case !l.waiting():
		return least, likely
	case !from.Timed():
		cost, all := l.queue.Outlast(w.claim, deadline)
		if all {
			cost = costBefore(l, w, but)
		}
		ahead := l.ahead(w)
		ahead.Least = cost
		sure, _ := from.Forecast(&l.tokens, now, ahead, w.tokens)
		return min(least, sure), likely
	}
	o := outlookOf(from, l, now, forecastKey{w, but, mostVisits})
	wait := max(o.at-now, 0)
	if o.known {
		likely = min(likely, max(wait, 1))
	}
	return min(least, wait), likely
}

// estimate returns how long a rejected flow would likely wait if it came back now.
func estimate[S any](from source.Source[S], l *line[S], now int64, w wish) int64 {
	_, likely := forecast(from, l, now, w)
	if likely > 0 && l.waiting() && l.queue.HasDeadlines() && from.Timed() {
		if o := outlookOf(from, l, now, forecastKey{w, nil, fewVisits}); o.known {
			likely = min(likely, max(o.at-now, 1))
		}
	}
	return likely
}

// outlookOf returns the look ahead for a flow, which is made anew only after a change.
func outlookOf[S any](from source.Source[S], l *line[S], now int64, key forecastKey) outlook {
	return l.queue.remembered(key, func() outlook { return lookAhead(from, l.tokens, l.queue.Queue, now, key) })
}

// costBefore returns the cost of the flows that are served before this one if none gives up, without the one that it displaces. It
// is computed anew only after a change.
func costBefore[S any](l *line[S], w wish, but *waiter) float64 {
	return l.queue.remembered(forecastKey{w, but, mostVisits}, func() outlook {
		return outlook{before: l.queue.CostBefore(w.claim, w.cost, but, mostVisits)}
	}).before
}

// remembered returns the outlook for the key: a remembered one if nothing has changed since, otherwise that of find.
func (q *queue) remembered(key forecastKey, find func() outlook) outlook {
	if q.madeAt != q.version() {
		q.madeAt = q.version()
		clear(q.forecasts)
	}
	o, ok := q.forecasts[key]
	if !ok {
		o = find()
		if q.forecasts == nil {
			q.forecasts = make(map[forecastKey]outlook)
		}
		if len(q.forecasts) < mostKnown {
			q.forecasts[key] = o
		}
	}
	return o
}

// lookAhead plays what the queue does from now on with a copy of the state of a source. It stops after key.visits
// visits.
func lookAhead[S any](from source.Source[S], state S, q *wfq.Queue[pending], now int64, key forecastKey) outlook {
	self := &waiter{Flow: pending{demand: demand{tokens: key.tokens}}, Cost: key.cost, Deadline: wfq.NoDeadline}
	p, ok := q.Preview(self, key.but, key.claim, now, key.visits)
	if !ok {
		return outlook{at: now}
	}
	at := now
	for w := p.First(); w != nil; w = p.First() {
		got := from.Take(&state, at, w.Flow.tokens)
		if got.OK {
			if w == self {
				return outlook{at: at, known: true}
			}
			p.Serve(at)
			continue
		}
		due := wfq.NoDeadline
		if got.Wait > 0 {
			due = at + got.Wait
		}
		// A flow may give up meanwhile, and another one be first then.
		next := p.NextExpiry(due)
		if next == wfq.NoDeadline {
			return outlook{at: next}
		}
		if at = next; at != due {
			p.Expire(at)
		}
	}
	return outlook{at: at}
}
