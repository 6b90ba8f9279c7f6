package engine

import (
	"math"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A load is what flows ask of a load scheduler, and how much of it is let in: the state of its one bucket. The bucket
// is filled at a share of the rate at which tokens were asked for lately, and holds the tokens of one second.
type load struct {
	asked  *window        // tokens asked for, except by workloads in priced
	given  *window        // tokens given, except to workloads in priced
	priced []*latencyCost // costs that change, with how many flows asked and got in

	learning bool  // the rate is not known yet
	began    int64 // the second of the first flow after a silence
	last     int64 // the second of the latest flow

	multiplier float64 // the share that is let in; NaN means everything
	rate       float64 // tokens each second; not finite while everything is let in
	tokens     float64 // that are left; below 0 after a flow that wanted more than the bucket holds
	at         int64   // the time that tokens is true for
}

const (
	loadSeconds  = 30 // that the rate is the mean of
	learnSeconds = loadSeconds + 1
)

// loadRule is the source that load schedulers have their tokens from. It is a [meter].
type loadRule struct {
	prices []*latencyCost // by the index of the workload; nil where the cost does not go by latency
	priced []*latencyCost // the prices that are not nil
}

// Fresh makes the load one of which nothing is known.
func (r *loadRule) Fresh(l *load, now int64) {
	*l = load{
		priced:     r.priced,
		asked:      newWindow(loadSeconds, int64(time.Second), now),
		given:      newWindow(loadSeconds, int64(time.Second), now),
		learning:   true,
		last:       math.MinInt64 / 2,
		multiplier: math.NaN(),
		rate:       math.NaN(),
	}
	for _, price := range l.priced {
		price.asked, price.given = newWindow(loadSeconds, int64(time.Second), now), newWindow(loadSeconds, int64(time.Second), now)
	}
}

// Idle reports false: there is one load, which is not forgotten.
func (*loadRule) Idle(*load, int64) bool { return false }

// meet counts a flow that comes, whatever is decided about it. It learns the rate of the first flows, and again after a
// silence of learnSeconds; then the bucket starts full. A flow that costs nothing is no load: a rate of 0 would keep
// out the next flow that costs something.
func (r *loadRule) meet(l *load, now int64, want demand) {
	if want.tokens == 0 {
		return
	}
	second := now / int64(time.Second)
	l.relearn(second)
	l.last = max(l.last, second)
	asked := l.asked
	if p := r.priceOf(want.by); p != nil {
		asked = p.asked
	}
	asked.add(now, min(want.tokens, source.MaxCost))
	if l.learning && second-l.began >= learnSeconds {
		l.steer(now, l.multiplier)
		l.learning = false
	}
}

// relearn begins to learn the rate again after a silence, when it is not known any more.
func (l *load) relearn(second int64) {
	if second-l.last >= learnSeconds {
		l.began, l.learning = second, true
	}
}

// steer sets the share that is let in from now on. In a silence everything is let in: otherwise flows that wait would
// wait for new flows, which may never come. A debt is cut to what comes in the time that the rate is the mean of:
// expensive flows must not keep the others out for longer.
func (l *load) steer(now int64, multiplier float64) {
	wasOpen := l.open()
	l.relearn(now / int64(time.Second))
	l.refill(now)
	l.multiplier = max(multiplier, 0)
	come, before := l.come(now)
	l.rate = l.multiplier * come / loadSeconds
	if before > 0 {
		l.tokens *= come / before // what is left or owed stays the same part of the load
	}
	if wasOpen {
		l.tokens = l.rate
	}
	if !l.open() {
		l.tokens = min(max(l.tokens, -loadSeconds*l.rate), l.rate)
	}
}

// come returns the tokens that flows asked for lately: at the prices of now, which the next flows pay, and at the
// prices that the call before noted.
func (l *load) come(now int64) (tokens, before float64) {
	tokens = l.asked.whole(now).sum
	before = tokens
	for _, price := range l.priced {
		count, is := price.asked.whole(now).count, min(price.tokens(), source.MaxCost)
		tokens += is * count
		before += price.noted * count
		price.noted = is
	}
	return tokens, before
}

// setPrices updates the prices, and reports whether any has changed.
func (l *load) setPrices(now int64) (changed bool) {
	for _, price := range l.priced {
		changed = price.set(now) || changed
	}
	return changed
}

// open reports whether everything is let in.
func (l *load) open() bool { return l.learning || !(l.rate <= math.MaxFloat64) }

// letIn is the share of the load that is let in; +Inf where that is everything.
func (*loadRule) letIn(l *load) float64 {
	if l.open() {
		return math.Inf(1)
	}
	return l.multiplier
}

// admitted returns the share of the tokens asked for lately that was given, at the prices of now; NaN if none was asked
// for.
func (l *load) admitted(now int64) float64 {
	given, asked := l.given.total(now).sum, l.asked.total(now).sum
	for _, price := range l.priced {
		tokens := min(price.tokens(), source.MaxCost)
		given += tokens * price.given.total(now).count
		asked += tokens * price.asked.total(now).count
	}
	return min(given/asked, 1)
}

func (l *load) refill(now int64) {
	if now > l.at {
		l.tokens = min(l.tokens+l.rate*float64(now-l.at)/float64(time.Second), l.rate)
		l.at = now
	}
}

// Take lets in a flow that wants more than the bucket holds if the bucket is full: later flows wait until what it took
// has come. If nothing is let in, that may change.
func (*loadRule) Take(l *load, now int64, tokens float64) source.Taken {
	tokens = min(tokens, source.MaxCost)
	if l.open() {
		return source.Taken{OK: true}
	}
	l.refill(now)
	if full := min(tokens, l.rate); tokens > 0 && (l.rate == 0 || l.tokens < full-source.Slack) {
		return source.Taken{Left: max(l.tokens, 0), Wait: max(l.until(full), 0), Later: l.rate == 0}
	}
	l.tokens -= tokens
	return source.Taken{OK: true, Left: max(l.tokens, 0)}
}

// priceOf returns what flows of the workload cost by their latency; nil if their cost does not go by it. The workload
// may be nil.
func (r *loadRule) priceOf(of *workload) *latencyCost {
	if of == nil || of.index >= len(r.prices) {
		return nil
	}
	return r.prices[of.index]
}

// price returns what a flow of the workload costs now.
func (r *loadRule) price(of *workload) float64 {
	if p := r.priceOf(of); p != nil {
		return p.tokens()
	}
	return of.tokens
}

// gave counts a flow that was let in.
func (r *loadRule) gave(l *load, now int64, want demand) {
	given := l.given
	if p := r.priceOf(want.by); p != nil {
		given = p.given
	}
	given.add(now, min(want.tokens, source.MaxCost))
}

// Cost returns the tokens, up to [source.MaxCost].
func (*loadRule) Cost(tokens float64) float64 { return min(tokens, source.MaxCost) }

// Timed reports true. The rate changes from time to time; a forecast takes it as it is.
func (*loadRule) Timed() bool { return true }

// until returns how long it takes until that many tokens are there if none is taken; Never if none come.
func (l *load) until(tokens float64) int64 {
	if l.rate == 0 {
		return source.Never
	}
	return max(source.Nanos(math.Ceil((tokens-l.tokens)/l.rate*float64(time.Second))), 1)
}

// GiveBack undoes a Take. The tokens stay counted as given: a rejection by another component does not mean that this
// load was too much.
func (*loadRule) GiveBack(l *load, _ int64, tokens float64, _ uint64, _ bool) bool {
	l.tokens = min(l.tokens+min(tokens, source.MaxCost), l.rate)
	return true
}

// Settle corrects nothing. A load scheduler lets in a share of what comes, and flows that it keeps out have no cost that
// is known: if only the others were corrected, those would look cheap, and the share would shrink or grow with each error
// of the estimates. Flows that cost more than they said show in the signal by which the share is set. What is learned of
// them is for the queue: see [ratio].
func (*loadRule) Settle(*load, int64, float64, float64, uint64) (forgiven float64) { return 0 }

// Usage returns what is let in during a second, and what is left of it.
func (*loadRule) Usage(l *load, now int64) source.Usage {
	if l.open() {
		return source.Usage{Capacity: math.Inf(1), Remaining: math.Inf(1)}
	}
	l.refill(now)
	return source.Usage{Capacity: l.rate, Remaining: l.tokens}
}

// Forecast goes by the rate as it is. If nothing is let in, that may change, but it is not known when.
func (*loadRule) Forecast(l *load, now int64, ahead source.Ahead, tokens float64) (least, likely int64) {
	if l.open() {
		return 0, 0
	}
	l.refill(now)
	tokens = min(tokens, l.rate)
	return l.until(ahead.Least + tokens), l.until(ahead.Likely + tokens)
}
