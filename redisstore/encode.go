package redisstore

import (
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
	returnedSize = 1 + 8
)

// An encoder makes the call of a script: the names of its keys, and its numbers.
type encoder struct {
	keys    []string
	indexes map[string]int // of keys, from 1 on

	rules   []byte
	count   int
	known   map[*shared.Rule]int
	written map[string]int // rules by what they are written as

	leases string
	body   []byte
}

func newEncoder() *encoder {
	return &encoder{indexes: make(map[string]int, 8), known: make(map[*shared.Rule]int, 4), written: make(map[string]int, 4)}
}

// key returns the index of a key's states. Slots have two.
func (e *encoder) key(n name, kind shared.Kind) int {
	first := n.all
	if kind == shared.Slots {
		first += suffixSlots
	}
	if i, ok := e.indexes[first]; ok {
		return i
	}
	e.keys = append(e.keys, first)
	i := len(e.keys)
	e.indexes[first] = i
	if kind == shared.Slots {
		e.keys = append(e.keys, n.all+suffixEnds)
	}
	return i
}

// rule returns the index of a rule. At is the server's time, around which a quota's periods are.
func (e *encoder) rule(r *shared.Rule, at time.Time) int {
	if i, ok := e.known[r]; ok {
		return i
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
		interval = math.Round(interval/1000) * 1000
		interval = max(interval, 1000)
	}
	e.rules = append(e.rules, flags)
	e.rules = appendFloats(e.rules, r.Capacity, r.Fill, max(interval, 1), lowest(r))
	if r.Kind == shared.Quota {
		for _, t := range r.Periods(at) {
			e.rules = appendFloats(e.rules, float64(t.UnixMicro()))
		}
	}
	one := string(e.rules[from:])
	if i, ok := e.written[one]; ok {
		e.rules = e.rules[:from]
		e.known[r] = i
		return i
	}
	e.count++
	e.known[r], e.written[one] = e.count, e.count
	return e.count
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
		e.index(a.name, a.Rule, at)
		e.body = append(e.body, flags)
		e.body = appendFloats(e.body, a.Tokens)
		if extra {
			e.body = appendFloats(e.body, a.Ahead, a.Reserve, a.Owed, float64(instances))
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

// index adds the index of a key, and that of a rule.
func (e *encoder) index(n name, r *shared.Rule, at time.Time) {
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
	e.index(r.name, r.Rule, at)
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
	arg = binary.LittleEndian.AppendUint16(arg, uint16(e.count))
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
