package flowctl

import (
	"math"
	"sync/atomic"
)

// A progress is whether a flow has ended, and the two statuses that it may end with. It is one word, because a flow is as
// large as its size class allows. The zero value is that of a flow which has just begun. It is safe for concurrent use.
type progress struct{ word atomic.Uint32 }

// Where the parts of the word are. The status that was set is in the lowest bits.
const (
	derivedShift = 8
	hasEnded     = 1 << 16
)

func (p *progress) ended() bool { return p.word.Load()&hasEnded != 0 }

// end notes the end, and reports whether it was noted already.
func (p *progress) end() (again bool) { return p.word.Or(hasEnded)&hasEnded != 0 }

// set is the status that SetStatus was given.
func (p *progress) set() Status { return Status(p.word.Load()) }

// derived is the status that SetError came to.
func (p *progress) derived() Status { return Status(p.word.Load() >> derivedShift) }

func (p *progress) setStatus(s Status)  { p.replace(s, 0) }
func (p *progress) setDerived(s Status) { p.replace(s, derivedShift) }

func (p *progress) replace(s Status, shift int) {
	for {
		old := p.word.Load()
		if p.word.CompareAndSwap(old, old&^(math.MaxUint8<<shift)|uint32(s)<<shift) {
			return
		}
	}
}
