package policy

import (
	"slices"
	"time"
)

// An Escalation gives a limiter other numbers while a load scheduler of its policy lets in too little of the load. So the limiter
// rejects less important flows before other flows have to wait. The zero value does nothing.
//
// The engine looks at the scheduler each second. When a lower capacity comes into force, tokens beyond it are lost. A higher
// capacity brings no tokens. So a bucket never grants more than the numbers that were in force at each time. A new limiter begins
// with its own numbers. If it replaces a limiter of the same policy and ID, it continues the escalation of that limiter. Answers
// always have the limiter's own capacity, or that of an [Override].
//
// If a waiting flow can get its tokens by the limiter's own numbers, but never by the other ones, it continues to wait for as
// long as it may. A flow that comes meanwhile is rejected.
//
// A value with an [Override] has the lesser of its own Capacity and the one here, and likewise of Fill. It keeps its Interval and
// MaxDebt.
type Escalation struct {
	// Load is the ID, own or default, of a [LoadScheduler] or an [AIMDLoadScheduler] of the same policy. Required.
	Load string

	// Below is the load multiplier below which the scheduler lets in too little: with 1, whenever it keeps flows out. It does not
	// let in too little while it accepts every flow, while its multiplier is not known, or in dry run. The same holds while it
	// learns how many flows come, for 31 s after its first flow and after each silence of 31 s. Flows of a client in dry run
	// count for the scheduler as other flows do. Required, positive.
	Below float64

	// For is how long the multiplier must have been less than Below, without a break, before the other numbers are in force. They
	// are no longer in force as soon as it is not less. Zero means no time. Not negative.
	For time.Duration

	// Capacity and Fill are the limiter's numbers meanwhile. A Capacity of zero rejects every flow, and a Fill of zero never
	// refills. Not negative.
	Capacity, Fill float64
}

// An escalating component has other numbers while a load scheduler lets in too little. Its field is called When.
type escalating interface {
	Component
	escalation() Escalation
}

// A shedding component lets in a part of the load, by a load multiplier that an Escalation may go by.
type shedding interface {
	Component
	sheds()
}

// check reports what is wrong with an escalation, except its Load.
func (e Escalation) check(wrong report) {
	if e == (Escalation{}) {
		return
	}
	if e.Load == "" {
		wrong(".Load", "is required")
	}
	checkAmount(wrong.sub(".Below"), e.Below)
	if e.Below == 0 {
		wrong(".Below", "must be positive, is 0: no multiplier is below")
	}
	checkNotNegative(wrong.sub(".For"), e.For)
	checkAmount(wrong.sub(".Capacity"), e.Capacity)
	checkAmount(wrong.sub(".Fill"), e.Fill)
}

// checkEscalations reports the escalations of a policy that go by no load scheduler of its.
func checkEscalations(wrong report, components []Component) {
	var ids identifier
	var loads []string
	for _, c := range components {
		if c, why := asValue(c); why == "" {
			id := ids.id(c)
			if _, ok := c.(shedding); ok {
				loads = append(loads, id)
			}
		}
	}
	for i, c := range components {
		c, _ := asValue(c)
		l, ok := c.(escalating)
		if !ok {
			continue
		}
		if e := l.escalation(); e.Load != "" && !slices.Contains(loads, e.Load) {
			wrong.at("components", i)(".When.Load", "no load scheduler of the policy has the ID %s%s", quote(e.Load), suggest(e.Load, loads))
		}
	}
}
