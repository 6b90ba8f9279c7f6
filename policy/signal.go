package policy

import (
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// A Signal is a number that may change while an engine runs: a [Constant], a [Named] one or a [MeanLatency]. A signal
// that is not known yet is not a number (NaN). The interface is sealed.
type Signal interface {
	signal()
}

type (
	// Constant is a signal that does not change: a finite number.
	Constant float64

	// Named is a signal that the engine's host provides under this name, by the engine's WithSignal. Not empty.
	Named string

	// MeanLatency is how long the work of flows takes on average, in milliseconds, from the answer to their check until
	// they end. Only flows that ran and ended well count, without those whose result was in the cache.
	MeanLatency struct {
		// Selectors say which flows count. Required.
		Selectors []Selector

		// Over is the time over which the mean is taken: the flows that ended within it count. Required, positive, at
		// most 24 hours.
		Over time.Duration

		// Times multiplies the mean. Zero means 1. Not negative.
		Times float64
	}
)

func (Constant) signal()    {}
func (Named) signal()       {}
func (MeanLatency) signal() {}

func checkSignal(wrong report, s Signal) {
	switch s := s.(type) {
	case Constant:
		checkNumber(wrong, float64(s))
	case Named:
		if s == "" {
			wrong("", "needs a name")
		}
	case MeanLatency:
		checkSelectors(wrong.sub(".Selectors"), s.Selectors)
		if s.Over <= 0 || s.Over > maxOver {
			wrong(".Over", "must be positive and at most %s, is %s", maxOver, s.Over)
		}
		checkAmount(wrong.sub(".Times"), s.Times)
	case nil:
		wrong("", "is required")
	default:
		wrong("", "is a %T; want a Constant, a Named or a MeanLatency", s)
	}
}

// maxOver is the most time that a mean latency is taken over.
const maxOver = 24 * time.Hour

// signalReads calls read with the labels by which the signal tells latencies apart.
func signalReads(s Signal, read func(components.Role, string)) {
	if m, ok := s.(MeanLatency); ok {
		selectorsRead(m.Selectors, components.MeasuresBy, read)
	}
}
