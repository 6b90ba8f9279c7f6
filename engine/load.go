package engine

import (
	"math"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
)

// A load is what flows ask of a load scheduler, and how much of it is let in: the state of its one bucket. It is filled
// at a share of the rate at which tokens were asked for lately, and holds what comes in a second.
type load struct {
	asked  *window        // tokens that flows came for,
	given  *window        // and those that they got, but for flows that are priced
	priced []*latencyCost // what flows cost of which it changes, and how many came and got it

	learning bool  // for as long as the rate is not known
	began    int64 // the second of the first flow after a silence
	last     int64 // the second of the latest flow

	multiplier float64 // the share that is let in; NaN for everything
	rate       float64 // tokens each second; not a finite number for everything
	tokens     float64 // that are left; below 0 after a flow that wanted more than the bucket holds
	at         int64   // the time that tokens is true for
}

const (
	loadSeconds  = 30 // that the rate is the mean of
	learnSeconds = loadSeconds + 1
)

// loadRule is the source that load schedulers have their tokens from. It is a [meter].
type loadRule struct {
	prices []*latencyCost // by the index of the workload; nil where flows do not cost by how long they take
	priced []*latencyCost // those that are not nil
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

// meet counts a flow that comes, whatever becomes of it. It learns the rate of the first flows, and of the first after
// as long a silence; then the bucket starts full. What costs nothing is no load: a rate of nothing would keep out the
// next one that costs something.
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

// relearn begins to learn the rate when nobody has come for so long that it is not known any more.
func (l *load) relearn(second int64) {
	if second-l.last >= learnSeconds {
		l.began, l.learning = second, true
	}
}

// steer sets the share that is let in from now on. In a silence that is everything: who waits from before would else
// wait for somebody to come, and may be all there are. What is owed from before is no more than comes in the time that
// the rate is the mean of: flows that cost a great deal must not keep the others out for longer.
func (l *load) steer(now int64, multiplier float64) {
	wasOpen := l.open()
	l.relearn(now / int64(time.Second))
	l.refill(now)
	l.multiplier = max(multiplier, 0)
	come, before := l.come(now)
	l.rate = l.multiplier * come / loadSeconds
	if before > 0 {
		l.tokens *= come / before // what is owed, or left, is as much of the load as it was
	}
	if wasOpen {
		l.tokens = l.rate
	}
	if !l.open() {
		l.tokens = min(max(l.tokens, -loadSeconds*l.rate), l.rate)
	}
}

// come is what flows that came lately ask for: at the prices of now, for those who come next are let in at these, and at
// those that were noted when it was asked before.
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

// setPrices has flows cost what is known by now, and reports whether that has changed.
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

// admitted is the share of the tokens asked for that was given lately, at the prices of now; NaN when none was asked for.
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

// Take lets a flow in that wants more than the bucket holds when that is full: the others wait until what it took has
// come.
func (*loadRule) Take(l *load, now int64, tokens float64) source.Taken {
	tokens = min(tokens, source.MaxCost)
	if l.open() {
		return source.Taken{OK: true}
	}
	l.refill(now)
	if full := min(tokens, l.rate); tokens > 0 && (l.rate == 0 || l.tokens < full-source.Slack) {
		return source.Taken{Left: max(l.tokens, 0), Wait: max(l.until(full), 0)}
	}
	l.tokens -= tokens
	return source.Taken{OK: true, Left: max(l.tokens, 0)}
}

// priceOf is what flows of the workload cost by how long they take, if they do. There may be no workload.
func (r *loadRule) priceOf(of *workload) *latencyCost {
	if of == nil || of.index >= len(r.prices) {
		return nil
	}
	return r.prices[of.index]
}

// price is what flows of the workload cost by now.
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

// Timed reports true. The rate is set anew from time to time, and taken here as it is.
func (*loadRule) Timed() bool { return true }

// until is how long it takes until that many tokens are there, if nobody takes any; never where none come.
func (l *load) until(tokens float64) int64 {
	if l.rate == 0 {
		return source.Never
	}
	return max(source.Nanos(math.Ceil((tokens-l.tokens)/l.rate*float64(time.Second))), 1)
}

// GiveBack undoes a Take. What was given stays counted: that somebody else rejects the flow does not say that this load
// was too much.
func (*loadRule) GiveBack(l *load, _ int64, tokens float64, _ uint64, _ bool) bool {
	l.tokens = min(l.tokens+min(tokens, source.MaxCost), l.rate)
	return true
}

// Usage says what is let in during a second, and what is left of it.
func (*loadRule) Usage(l *load, now int64) source.Usage {
	if l.open() {
		return source.Usage{Capacity: math.Inf(1), Remaining: math.Inf(1)}
	}
	l.refill(now)
	return source.Usage{Capacity: l.rate, Remaining: l.tokens}
}

// Forecast goes by the rate as it is. Where nothing is let in, that may change, but nobody knows when.
func (*loadRule) Forecast(l *load, now int64, ahead source.Ahead, tokens float64) (least, likely int64) {
	if l.open() {
		return 0, 0
	}
	l.refill(now)
	tokens = min(tokens, l.rate)
	return l.until(ahead.Least + tokens), l.until(ahead.Likely + tokens)
}
