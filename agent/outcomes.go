package agent

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// maxAwaited is how many decisions an agent remembers until it hears how their flows have ended. It forgets the oldest first.
const maxAwaited = 1 << 16

// outcomes are the decisions of components that go by how flows end, by the times at which they were asked for. A session says how
// its own flows have ended, else a span says it. A span says what its sender likes: so it settles only decisions of an answer that was
// given, and its labels settle none of another value. Each decision is settled once, by whichever comes first. Then forged spans and
// settlements say no more than what flows of the sender's own could. The zero value is ready.
type outcomes struct {
	mu    sync.Mutex
	asked map[int64][]*awaited // by Unix nanoseconds
	order []*awaited           // a ring, once it is full
	next  int
}

// awaited is a decision of which the outcome is awaited.
type awaited struct {
	at       int64
	decision agentapi.LimiterDecision // has no component once it is forgotten
}

// add remembers what the flow of the verdict has of components that go by outcomes, and returns it.
func (o *outcomes) add(v *agentapi.Verdict) (added []*awaited) {
	for i := range v.Len() {
		if d := v.At(i); d.Component.Outcomes && !d.Dropped && d.Slot() != 0 {
			added = append(added, o.await(v.Start, *d))
		}
	}
	return added
}

func (o *outcomes) await(at int64, d agentapi.LimiterDecision) *awaited {
	d.Label = strings.Clone(d.Label) // of a request, which may be large
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.asked == nil {
		o.asked = make(map[int64][]*awaited)
	}
	a := &awaited{at, d}
	o.asked[at] = append(o.asked[at], a)
	if len(o.order) < maxAwaited {
		o.order = append(o.order, a)
		return a
	}
	o.forget(o.order[o.next])
	o.order[o.next] = a
	o.next = (o.next + 1) % maxAwaited
	return a
}

// any reports whether an outcome is awaited.
func (o *outcomes) any() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.asked) > 0
}

// settle ends the decisions that the answer to a check of that time told of.
func (o *outcomes) settle(ctx context.Context, start time.Time, told []*checkv1.LimiterDecision, outcome agentapi.Outcome) {
	for _, m := range told {
		if m.GetDropped() { // it holds nothing, and a flow of the same time may
			continue
		}
		if d, ok := o.take(start.UnixNano(), m); ok {
			d.Component.Settler.Settle(ctx, &d, outcome)
		}
	}
}

// end ends those of the decisions that are still awaited.
func (o *outcomes) end(ctx context.Context, of []*awaited, outcome agentapi.Outcome) {
	for _, a := range of {
		o.mu.Lock()
		d := a.decision
		if d.Component != nil {
			o.forget(a)
		}
		o.mu.Unlock()
		if d.Component != nil {
			d.Component.Settler.Settle(ctx, &d, outcome)
		}
	}
}

// take finds the decision that the message tells of, and forgets it. It reports false if none is remembered.
func (o *outcomes) take(at int64, m *checkv1.LimiterDecision) (agentapi.LimiterDecision, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, a := range o.asked[at] {
		d := a.decision
		if c := d.Component; c.ID == m.GetComponentId() && c.Policy == m.GetPolicyName() && c.Hash == m.GetPolicyHash() &&
			wire.Label(&d) == m.GetRateLimiterInfo().GetLabel() {
			o.forget(a)
			return d, true
		}
	}
	return agentapi.LimiterDecision{}, false
}

// forget forgets the decision, if it is remembered. It keeps its place in the ring, and its time.
func (o *outcomes) forget(a *awaited) {
	rest := slices.DeleteFunc(o.asked[a.at], func(other *awaited) bool { return other == a })
	if len(rest) > 0 {
		o.asked[a.at] = rest
	} else {
		delete(o.asked, a.at)
	}
	*a = awaited{at: a.at}
}
