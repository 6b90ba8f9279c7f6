package engine

import (
	"cmp"
	"fmt"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// A signal reads a number that changes, NaN while it is not known. Only the controller reads signals.
type signal func(now int64) float64

// signalOf finds what a component's signal is read from.
func (e *Engine) signalOf(of *installed, field string, s policy.Signal) (signal, error) {
	switch s := s.(type) {
	case policy.Constant:
		return func(int64) float64 { return float64(s) }, nil
	case policy.Named:
		f, ok := e.signals[string(s)]
		if !ok {
			return nil, fmt.Errorf("%s: no WithSignal(%q, …) says what it is", field, string(s))
		}
		return func(int64) float64 { return f() }, nil
	case policy.MeanLatency:
		m, times := newMean(s.Over, e.now()), cmp.Or(s.Times, 1)
		if err := of.measure(s.Selectors, func(_ *agentapi.Labels, now int64, latency float64) { m.add(now, latency) }); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		return func(now int64) float64 { return times * m.at(now) }, nil
	default:
		return nil, fmt.Errorf("%s: the engine cannot read a %T", field, s)
	}
}

// A mean is the mean of a number over the last while. It is safe for concurrent use.
type mean struct {
	mu     sync.Mutex
	window *window
}

// meanSlots is how many slots the time of a mean is cut into, including the current one.
const meanSlots = 60

func newMean(over time.Duration, now int64) *mean {
	return &mean{window: newWindow(meanSlots-1, max(int64(over)/meanSlots, 1), now)}
}

func (m *mean) add(now int64, x float64) {
	m.mu.Lock()
	m.window.add(now, x)
	m.mu.Unlock()
}

// at returns the mean; NaN if there was nothing.
func (m *mean) at(now int64) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.window.total(now)
	return t.sum / t.count
}

// A latencySink gets the latencies of the flows of one control point.
type latencySink struct {
	selectors selectors
	note      note
}

// A note records a flow's latency in milliseconds.
type note func(labels *agentapi.Labels, now int64, latency float64)

// measure calls n with the latency of each flow that is selected, once.
func (p *installed) measure(list []policy.Selector, n note) error {
	points := make(map[string]selectors)
	for _, s := range list {
		compiled, err := compileSelector(s)
		if err != nil {
			return err
		}
		points[s.ControlPoint] = append(points[s.ControlPoint], compiled)
	}
	if p.sinks == nil {
		p.sinks = make(map[string][]latencySink)
	}
	for name, s := range points {
		p.sinks[name] = append(p.sinks[name], latencySink{selectors: s, note: n})
	}
	return nil
}

// recordLatency notes the latency of a flow that has just ended well. A flow with a value that is too long to match is
// not selected.
func (e *Engine) recordLatency(sinks []latencySink, labels *agentapi.Labels, now int64, latency time.Duration) {
	for i := range sinks {
		if g := &sinks[i]; g.selectors.selects(labels) == yes {
			g.note(labels, now, float64(latency)/float64(time.Millisecond))
		}
	}
}

// How often load schedulers look at their signals, and limiters with an escalation at load schedulers.
const (
	controlEvery = 10 * time.Second
	lookEvery    = time.Second
)

// control steers the load schedulers until the engine is closed, and has limiters look at them. One goroutine does both, so
// that no limiter looks at what is about to change.
func (e *Engine) control() {
	due := e.now() + int64(controlEvery)
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-e.done:
			return
		case <-tick.C:
			installed := e.rules.Load().installed
			if now := e.now(); now >= due {
				if due += int64(controlEvery); due <= now { // the machine has slept
					due = now + int64(controlEvery)
				}
				for _, p := range installed {
					for _, steer := range p.controls {
						steer(e.now())
					}
				}
			}
			for _, p := range installed {
				for _, look := range p.looks {
					look(e.now())
				}
			}
		}
	}
}
