package engine

import (
	"cmp"
	"math"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

// newAIMDLoadScheduler makes a load scheduler that computes its load multiplier itself.
func newAIMDLoadScheduler(e *Engine, in *installed, p policy.AIMDLoadScheduler, c agentapi.Component) (component, error) {
	s, err := newLoad(e, in, policy.LoadScheduler{
		Selectors:             p.Selectors,
		WorkloadLatencyTokens: p.WorkloadLatencyTokens,
		Scheduler:             p.Scheduler,
		DryRun:                p.DryRun,
	}, c)
	if err != nil {
		return nil, err
	}
	signal, err := e.signalOf(in, "Signal", p.Signal)
	if err != nil {
		return nil, err
	}
	setpoint, err := e.signalOf(in, "Setpoint", p.Setpoint)
	if err != nil {
		return nil, err
	}
	if p.OverloadConfirmation == nil {
		p.OverloadConfirmation = policy.Constant(1)
	}
	confirmation, err := e.signalOf(in, "OverloadConfirmation", p.OverloadConfirmation)
	if err != nil {
		return nil, err
	}
	controller := newAIMD(p)
	in.controls = append(in.controls, func(now int64) {
		is, should, confirmed := signal(now), setpoint(now), confirmation(now) != 0
		steer(s, func(l *load, now int64) float64 {
			return controller.step(is, should, confirmed, l.admitted(now))
		})
	})
	return s, nil
}

func warnAIMDLoadScheduler(w *warnings, of string, p policy.AIMDLoadScheduler) {
	w.scheduler(of, &p.Scheduler, p.DryRun)
}

// aimd is the controller of an AIMD load scheduler: additive increase, multiplicative decrease (Chiu and Jain, "Analysis
// of the increase and decrease algorithms for congestion avoidance in computer networks", 1989).
type aimd struct {
	gradient  policy.Gradient
	most      float64 // from this multiplier on, everything is accepted
	increment float64
	added     float64 // since the last overload
}

func newAIMD(p policy.AIMDLoadScheduler) *aimd {
	c := &aimd{most: cmp.Or(p.MaxLoadMultiplier, 2), increment: cmp.Or(p.LinearIncrement, 0.025)}
	c.gradient = policy.Gradient{
		Slope: cmp.Or(p.Gradient.Slope, -1),
		Min:   cmp.Or(p.Gradient.Min, 0.1),
		Max:   cmp.Or(p.Gradient.Max, 1),
	}
	c.added = c.most
	return c
}

// step returns the next load multiplier; NaN means "accept everything". The signal is how loaded the service is, the
// setpoint how loaded it should be, and admitted the share of the load that was let in lately.
func (c *aimd) step(signal, setpoint float64, confirmed bool, admitted float64) float64 {
	if setpoint == 0 || math.IsNaN(signal) || math.IsNaN(setpoint) || math.IsNaN(admitted) {
		return math.NaN()
	}
	overload := signal > setpoint
	if c.gradient.Slope > 0 {
		overload = signal < setpoint
	}
	if overload && confirmed {
		c.added = 0
		factor := math.Pow(signal/setpoint, c.gradient.Slope)
		if math.IsNaN(factor) { // of a negative signal and a slope that is not whole
			factor = c.gradient.Min
		}
		return admitted * min(max(factor, c.gradient.Min), c.gradient.Max)
	}
	c.added = min(c.added+c.increment, c.most)
	if multiplier := admitted + c.added; multiplier < c.most {
		return multiplier
	}
	return math.NaN()
}
