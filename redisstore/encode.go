package redisstore

import (
	"bytes"
	"encoding/binary"
	"math"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// Flags of rules and asks, and of what scripts reply. See the scripts.
const (
	ruleStep  = 1 << 2
	ruleDelay = 1 << 3

	askDry   = 1 << 0
	askLook  = 1 << 1
	askExtra = 1 << 2
	askSince = 1 << 3

	returnUnused = 1 << 0

	replyOK      = 1 << 0
	replyDiffers = 1 << 1
	replyAgain   = 1 << 2
	replyNewer   = 1 << 3
	replyLate    = 1 << 4
	replyMore    = 1 << 5
)

const (
	takenSize    = 1 + 8   // of an answer
	takenMore    = 1 + 5*8 // with more
	returnedSize = 1 + 2*8
)

// An encoder makes the call of a script: the names of its keys, and its numbers.
type encoder struct {
	keys    []string
	indexes map[string]int // of keys, from 1 on; only if there are many

	rules   []byte
	known   []*shared.Rule
	written []int // where each rule begins that has been written; its index less 1 is that of the call
	index   []int // of known ones

	leases string
	others bool // there are not only buckets
	body   []byte
}

func newEncoder() *encoder { return new(encoder) }

// fewKeys is how many keys are looked for one by one.
const fewKeys = 8

// reset empties the encoder.
func (e *encoder) reset() {
	clear(e.keys)
	clear(e.known)
	e.keys, e.known = e.keys[:0], e.known[:0]
	e.rules, e.written, e.index, e.body = e.rules[:0], e.written[:0], e.index[:0], e.body[:0]
	e.leases, e.others = "", false
	clear(e.indexes)
}

// key returns the index of a key's states. Slots have two.
func (e *encoder) key(n name, kind shared.Kind) int {
	first := n.all
	if kind == shared.Slots {
		first += suffixSlots
	}
	if len(e.keys) <= fewKeys {
		for i, k := range e.keys {
			if k == first {
				return i + 1
			}
		}
	} else if i, ok := e.indexes[first]; ok {
		return i
	}
	e.keys = append(e.keys, first)
	i := len(e.keys)
	if kind == shared.Slots {
		e.keys = append(e.keys, n.all+suffixEnds)
	}
	switch {
	case len(e.keys) <= fewKeys:
	case i <= fewKeys+1: // the first ones that are more than few
		if e.indexes == nil {
			e.indexes = make(map[string]int, maxBatch)
		}
		for j, k := range e.keys {
			e.indexes[k] = j + 1
		}
	default:
		e.indexes[first] = i
	}
	return i
}

// rule returns the index of a rule. At is the server's time, around which a quota's periods are. Rules of different engines that are the
// same count as one.
func (e *encoder) rule(r *shared.Rule, at time.Time) int {
	for i, known := range e.known {
		if known == r {
			return e.index[i]
		}
	}
	from := len(e.rules)
	flags := byte(r.Kind)
	if r.Step {
		flags |= ruleStep
	}
	if r.Delay {
		flags |= ruleDelay
	}
	interval := float64(r.Interval)
	switch {
	case r.Kind == shared.Slots:
		interval = float64(r.MaxInflight.Microseconds())
	case r.Step: // steps are of the clock's unit
		interval = max(math.Round(interval/1000)*1000, 1000)
	}
	e.rules = append(e.rules, flags)
	e.rules = appendFloats(e.rules, r.Capacity, base(r), r.Fill, max(interval, 1), lowest(r))
	e.others = e.others || r.Kind != shared.Bucket
	if r.Kind == shared.Quota {
		for _, t := range r.Periods(at) {
			e.rules = appendFloats(e.rules, float64(t.UnixMicro()))
		}
	}
	is := -1
	for i, start := range e.written {
		end := from
		if i+1 < len(e.written) {
			end = e.written[i+1]
		}
		if bytes.Equal(e.rules[start:end], e.rules[from:]) {
			is = i
			e.rules = e.rules[:from]
			break
		}
	}
	if is < 0 {
		is = len(e.written)
		e.written = append(e.written, from)
	}
	e.known, e.index = append(e.known, r), append(e.index, is+1)
	return is + 1
}

// base is the capacity that what is used is counted from.
func base(r *shared.Rule) float64 {
	if r.Base == 0 {
		return r.Capacity
	}
	return r.Base
}

// lowest is the least that a balance may be.
func lowest(r *shared.Rule) float64 {
	switch {
	case r.MaxDebt < 0:
		return -math.MaxFloat64
	case r.MaxDebt == 0:
		return 0 - r.Capacity
	default:
		return -r.MaxDebt
	}
}

// an asked is an ask of a call, and what the store makes of it.
type asked struct {
	shared.Ask

	name   name
	look   bool
	id     uint64 // of the slot
	leases string // of slots
	queued bool   // it was asked by Draw
}

// flow adds a flow's asks.
func (e *encoder) flow(asks []asked, at time.Time, own shared.Holder, lease func(shared.Holder) time.Duration, instances int) {
	e.body = binary.LittleEndian.AppendUint16(e.body, uint16(len(asks)))
	for i := range asks {
		a := &asks[i]
		flags := byte(0)
		if a.Dry {
			flags |= askDry
		}
		if a.look {
			flags |= askLook
		}
		extra := a.Ahead > 0 || a.Reserve > 0 || a.Owed > 0
		if extra {
			flags |= askExtra
		}
		if a.Since > 0 {
			flags |= askSince
		}
		e.place(a.name, a.Rule, at)
		e.body = append(e.body, flags)
		e.body = appendFloats(e.body, a.Tokens)
		if extra {
			e.body = appendFloats(e.body, a.Ahead, a.Reserve, a.Owed, float64(instances))
		}
		if a.Since > 0 {
			e.body = appendFloats(e.body, math.Round(float64(a.Since)/1000))
		}
		if a.Rule.Kind == shared.Slots {
			e.leases = a.leases
			holder := a.Holder
			if holder == (shared.Holder{}) {
				holder = own
			}
			e.body = binary.LittleEndian.AppendUint64(e.body, a.id)
			e.body = append(e.body, holder[:]...)
			e.body = appendFloats(e.body, float64(lease(a.Holder).Microseconds()))
		}
	}
}

// place adds the index of a key, and that of a rule.
func (e *encoder) place(n name, r *shared.Rule, at time.Time) {
	e.body = binary.LittleEndian.AppendUint16(e.body, uint16(e.key(n, r.Kind)))
	e.body = binary.LittleEndian.AppendUint16(e.body, uint16(e.rule(r, at)))
}

// a returned is a return of a call.
type returned struct {
	shared.Return

	name name
}

// giveBack adds a return.
func (e *encoder) giveBack(r *returned, at time.Time) {
	e.place(r.name, r.Rule, at)
	flags, period := byte(0), 0.0
	if r.Unused {
		flags = returnUnused
	}
	if r.Rule.Kind == shared.Quota {
		period = float64(r.Slot)
	}
	e.body = append(e.body, flags)
	e.body = appendFloats(e.body, r.Tokens, r.Cost, period)
	e.body = binary.LittleEndian.AppendUint64(e.body, r.Slot)
}

// call returns the keys and the numbers of the call. Head is before the rules, and n the number of flows or returns.
func (e *encoder) call(head []byte, n int) (keys []string, arg []byte) {
	arg = make([]byte, 0, len(head)+len(e.rules)+len(e.body)+4)
	arg = append(arg, head...)
	arg = binary.LittleEndian.AppendUint16(arg, uint16(len(e.written)))
	arg = append(arg, e.rules...)
	arg = binary.LittleEndian.AppendUint16(arg, uint16(n))
	arg = append(arg, e.body...)
	if e.leases != "" {
		e.keys = append(e.keys, e.leases)
	}
	return e.keys, arg
}

func appendFloats(b []byte, fs ...float64) []byte {
	for _, f := range fs {
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(f))
	}
	return b
}

func floatAt(b []byte) float64 { return math.Float64frombits(binary.LittleEndian.Uint64(b)) }

// micros returns a duration of a script's, in microseconds. -1 is never, and stays.
func micros(us float64) time.Duration {
	const most = float64(math.MaxInt64 / 1000 / 2)
	if us < 0 {
		return -1
	}
	return time.Duration(math.Ceil(min(us, most) * 1000))
}
