package agent

import (
	"sync/atomic"
	"time"
)

// starts are the times at which checks began, as their answers have them. No two checks have the same one: a span names the flow that it
// reports by it. Clients of any SDK repeat it, and some repeat nothing else that tells two flows apart.
type starts struct {
	epoch time.Time    // which the monotonic clock goes on from
	last  atomic.Int64 // in Unix nanoseconds
}

// next returns the start of a check that began at the time, in Unix nanoseconds. It is later, by a nanosecond for each, if checks of
// that moment have it already.
func (s *starts) next(at time.Time) int64 {
	start := s.epoch.UnixNano() + int64(at.Sub(s.epoch))
	for {
		last := s.last.Load()
		if start <= last {
			start = last + 1
		}
		if s.last.CompareAndSwap(last, start) {
			return start
		}
	}
}
