package engine

import (
	"cmp"
	"math"

	"github.com/headgate-go/headgate/policy"
)

// aimd is the controller of an AIMD load scheduler: additive increase, multiplicative decrease (Chiu and Jain, "Analysis
// of the increase and decrease algorithms for congestion avoidance in computer networks", 1989).
type aimd struct {
	gradient  policy.Gradient
	most      float64 // the multiplier from which on everything is accepted
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

// step gives the load multiplier for the time to come, NaN for "accept everything", from how loaded the service is and
// should be, and from the share of the load that was let in lately.
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
