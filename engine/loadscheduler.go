package engine

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// newLoadScheduler makes a scheduler whose tokens come at a share of the load. A signal gives the share.
func newLoadScheduler(e *Engine, in *installed, p policy.LoadScheduler, c agentapi.Component) (component, error) {
	s, err := newLoad(e, in, p, c)
	if err != nil {
		return nil, err
	}
	multiplier, err := e.signalOf(in, "LoadMultiplier", p.LoadMultiplier)
	if err != nil {
		return nil, err
	}
	in.controls = append(in.controls, func(now int64) {
		m := multiplier(now)
		steer(s, func(*load, int64) float64 { return m })
	})
	return s, nil
}

func warnLoadScheduler(w *warnings, of string, p policy.LoadScheduler) {
	w.scheduler(of, &p.Scheduler, p.DryRun)
}

// newLoad makes what the two kinds of load schedulers have in common.
func newLoad(e *Engine, in *installed, p policy.LoadScheduler, c agentapi.Component) (*scheduler[load], error) {
	in.selectors = p.Selectors
	c.DeniedStatus, c.DryRun = p.Scheduler.DeniedStatus, p.DryRun
	rule := new(loadRule)
	s, err := newScheduler(e, limits[load]{component: c, own: numbersOf[load](0, rule)}, &p.Scheduler)
	if err != nil {
		return nil, err
	}
	if !p.WorkloadLatencyTokens {
		return s, nil
	}
	rule.measure(s.workloads, e.now())
	rule.Fresh(&s.single.State.tokens, 0) // with the prices
	return s, in.measure(p.Selectors, func(labels *agentapi.Labels, now int64, latency float64) {
		of, known := s.workloads.of(labels)
		if price := rule.priceOf(of); known && price != nil {
			price.mean.add(now, latency)
		}
	})
}

// steer sets the share of the load that is let in from now on. Flows that wait may be served at once.
func steer(s *scheduler[load], multiplier func(l *load, now int64) float64) {
	e := s.single
	e.Lock()
	defer e.Unlock()
	now, l := s.engine.now(), &e.State
	waiting := l.waiting()
	if waiting {
		s.catchUp(e, now)
	}
	if l.tokens.setPrices(now) && waiting {
		l.queue.Reprice(func(w *waiter) float64 {
			if w.Flow.by == nil {
				return w.Cost // a label says what it takes
			}
			w.Flow.tokens = s.meter.price(w.Flow.by)
			return s.of(e).rule.Cost(w.Flow.by.ratio.of(w.Flow.tokens))
		})
	}
	l.tokens.steer(now, multiplier(&l.tokens, now))
	if waiting {
		l.queue.changes++
		s.serve(e, now)
	}
}

// A latencyCost is what flows of a workload cost by their latency.
type latencyCost struct {
	mean    *mean
	bits    atomic.Uint64 // of a float64, tokens; 0 while they are not known
	unknown float64       // tokens, while they are not known

	// Under the lock of the load.
	asked, given *window // how many flows came, and how many were let in
	noted        float64 // tokens, at most source.MaxCost, when the load was last steered
}

// latencyOver is the time over which the mean latency of a workload is taken.
const latencyOver = 30 * time.Minute

// measure makes flows of the workloads cost their latency, once it is known. Free workloads stay free.
func (r *loadRule) measure(w *workloads, now int64) {
	for of := range w.all {
		var price *latencyCost
		if of.tokens != 0 {
			price = &latencyCost{mean: newMean(latencyOver, now), unknown: of.tokens, noted: min(of.tokens, source.MaxCost)}
			r.priced = append(r.priced, price)
		}
		r.prices = append(r.prices, price)
	}
}

// set takes the mean of now as the cost, and reports whether the cost has changed.
func (c *latencyCost) set(now int64) bool {
	cost := c.mean.at(now)
	if math.IsNaN(cost) {
		cost = 0
	}
	bits := math.Float64bits(cost)
	return c.bits.Swap(bits) != bits
}

func (c *latencyCost) tokens() float64 {
	if bits := c.bits.Load(); bits != 0 {
		return math.Float64frombits(bits)
	}
	return c.unknown
}
