package policy

import (
	"slices"
	"time"
)

// An Escalation gives a limiter other numbers while a load scheduler of its policy lets in too little of the load. So
// it rejects less important flows before the others have to wait. The zero value does nothing.
//
// The engine looks at the scheduler each second. Tokens beyond a capacity are lost when it comes into force, and a capacity
// that grows brings none, so a bucket never grants more than the numbers of each time. A limiter that is new has its own numbers. One
// that replaces another of its policy and ID goes on with the escalation of that one. Answers have the limiter's own capacity, or
// that of an [Override], at all times.
//
// A flow that waits goes on waiting, for as long as it may, if the other numbers never give it its tokens and the own ones do. A flow
// that comes meanwhile is rejected then.
//
// A value with an [Override] has the lesser of its own Capacity and those here, and so with Fill. It keeps its Interval and MaxDebt.
type Escalation struct {
	// Load is the ID, own or default, of a [LoadScheduler] or an [AIMDLoadScheduler] of the same policy. Required.
	Load string

	// Below is the load multiplier below which the scheduler lets in too little: 1 for whenever it keeps flows out. A scheduler
	// that accepts every flow, or whose multiplier is not known, does not. So does none while it learns how many flows come, for 31 s
	// after its first flow and after each silence of 31 s, and none in dry run. Flows of a client in dry run count for the scheduler as
	// any. Required, positive.
	Below float64

	// For is how long the multiplier must have been below, without a break, before the other numbers are in force. They end
	// as soon as it is not. Zero means no time. Not negative.
	For time.Duration

	// Capacity and Fill are those of the limiter meanwhile. Zero refuses every flow, and never refills. Not negative.
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
