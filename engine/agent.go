package engine

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// An agent is the engine as clients of package flowctl and package agent see it.
type agent Engine

// Agent is for flowctl.New and package agent, which take an engine and call it.
func (e *Engine) Agent() agentapi.Local { return (*agent)(e) }

var _ agentapi.Closer = (*agent)(nil)

func (a *agent) engine() *Engine { return (*Engine)(a) }

// Closed returns a channel that is closed when the engine is. Calls that wait for a retry listen to it.
func (a *agent) Closed() <-chan struct{} { return a.done }

// Check asks the components of the flow's control point, which may have it wait. If the engine is closed meanwhile, the flow is
// rejected. If it was closed before, the error is agentapi.ErrClosed. Any other error is that of ctx, or of a component that could
// not decide. The flow holds nothing then, nor if a function of the program's panics.
func (a *agent) Check(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) error {
	e := a.engine()
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	start := e.now()
	now := start
	decided := false
	defer func() { // a function of the program's panicked
		if !decided {
			e.undo(ctx, v)
			*v = agentapi.Verdict{}
		}
	}()
	for {
		v.Start = e.epoch.UnixNano() + start
		p := e.controlPoint(req.ControlPoint)
		err := e.decide(ctx, p, req, &now, v)
		if err == nil {
			p.count(req, v)
			break
		}
		e.undo(ctx, v)
		*v = agentapi.Verdict{}
		if !errors.Is(err, errRetired) {
			if decided = true; ctx.Err() != nil {
				count(p.counts, req, flowsCanceled)
			}
			return err
		}
	}
	if now != start {
		v.More().Waited = time.Duration(now - start)
	}
	decided = true
	return nil
}

// End settles the flow with the components that admitted it, which gives back its slots and corrects its costs. If a policy
// asks for it, End measures how long the flow's work took.
func (a *agent) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, o agentapi.Outcome) (agentapi.Returns, error) {
	e := a.engine()
	if over := a.unwatch(v); over != nil {
		defer over(false)
	}
	if sinks := e.rules.Load().sinks[req.ControlPoint]; len(sinks) > 0 && !o.Failed() {
		e.measure(sinks, req, v)
	}
	if v.Details != nil {
		o.Waited = v.Details.Waited
		if v.Details.Result.Hit { // a hit spared the work, so the end says nothing about it
			o.Ended = agentapi.EndedUnknown
		}
	}
	if e.overrides != nil && o.Labels == nil { // a key may be made again, and its value may be longer than its name
		o.Labels = &req.Labels
	}
	var r agentapi.Returns
	if v.Rejected() && !req.DryRun() { // it was undone when it was rejected
		return r, nil
	}
	r.Settled = o.Costs != nil && !req.DryRun()
	r.Held, r.Returned = e.settleFrom(ctx, v, 0, o)
	return r, nil
}

// measure records the latency of a flow that has just ended well. It skips a flow whose result was in the cache.
func (e *Engine) measure(sinks []latencySink, req *agentapi.Request, v *agentapi.Verdict) {
	var waited time.Duration
	if v.Details != nil {
		if v.Details.Result.Hit {
			return
		}
		waited = v.Details.Waited
	}
	now := e.now()
	e.recordLatency(sinks, &req.Labels, now, time.Duration(e.epoch.UnixNano()+now-v.Start)-waited)
}

// Revert undoes what Check did for a flow that does not run.
func (a *agent) Revert(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) {
	if over := a.unwatch(v); over != nil {
		defer over(false)
	}
	if !v.Rejected() || req.DryRun() { // any other rejected flow holds nothing
		a.engine().undo(ctx, v)
	}
}

// EndSlots asks all components with the slots' names, retired ones included. One of them may know the slot.
func (a *agent) EndSlots(ctx context.Context, slots []agentapi.SlotName) []agentapi.SlotEnd {
	e := a.engine()
	ends := make([]agentapi.SlotEnd, len(slots))
	var far []agentapi.Settling
	var of []int // the slots
	for i := range slots {
		name := &slots[i]
		for _, h := range e.holdersOf(name) {
			ends[i].Known = true
			d := &agentapi.LimiterDecision{Scope: agentapi.ScopeDefault}
			d.Hold(name.Slot)
			if key := h.identity().LabelKey; key != "" {
				value, ok := strings.CutPrefix(name.Label, key+":")
				if !ok {
					continue
				}
				d.Scope, d.Label = agentapi.ScopeLabel, value
			}
			o := agentapi.Outcome{Ended: agentapi.EndedOK}
			if _, ok := h.(returner); ok {
				far, of = append(far, agentapi.Settling{By: h, Decision: d, Outcome: o}), append(of, i)
			} else if h.Settle(ctx, d, o) {
				ends[i].Returned = true
				break
			}
		}
	}
	e.settle(ctx, far)
	for i := range far {
		ends[of[i]].Returned = ends[of[i]].Returned || far[i].Done
	}
	return ends
}

// holdersOf returns the components that may have granted the slot. A slot of the store may be that of an engine with another version of
// the policy, so the hash does not matter there.
func (e *Engine) holdersOf(name *agentapi.SlotName) []component {
	e.mu.RLock()
	holders := e.holders[identity{name.Policy, name.Hash, name.Component}]
	e.mu.RUnlock()
	if in := e.rules.Load().byName[componentName{name.Policy, name.Component}]; len(holders) == 0 && in != nil && in.shared && in.kind.slots {
		holders = append(holders, in.component)
	}
	return holders
}

// Settle does what agentapi.Local says.
func (a *agent) Settle(ctx context.Context, all []agentapi.Settling) { a.engine().settle(ctx, all) }

// Renew does what agentapi.Local says.
func (a *agent) Renew(session [16]byte, lasts time.Duration) (leased time.Duration) {
	e := a.engine()
	now := e.now()
	e.leases.Renew(session, now, now+int64(lasts))
	if e.store == nil {
		return 0
	}
	return min(max(time.Until(e.store.Renew(session, lasts)), 0), lasts)
}

// Lookup finds values in the caches, as a flow's check does.
func (a *agent) Lookup(ctx context.Context, keys []agentapi.CacheKey, room func(size int) bool) []agentapi.CacheAnswer {
	e := a.engine()
	answers := make([]agentapi.CacheAnswer, len(keys))
	var asked []agentapi.CacheKey
	var at []int
	for i, key := range keys {
		switch {
		case e.closed.Load():
			answers[i].Err = agentapi.ErrClosed
		case key.Key == "":
			answers[i].Err = errNoCacheKey
		case e.store != nil:
			asked, at = append(asked, key), append(at, i)
		case key.Global:
			answers[i] = e.memory.globals.lookup(cacheKey{key: key.Key}, room)
		default:
			answers[i] = e.memory.results.lookup(cacheKey{key.ControlPoint, key.Key}, room)
			e.controlPoint(key.ControlPoint).looked(&answers[i])
		}
	}
	if len(asked) > 0 {
		for i, answer := range e.lookupShared(ctx, asked, room) {
			answers[at[i]] = answer
			if !asked[i].Global {
				e.controlPoint(asked[i].ControlPoint).looked(&answers[at[i]])
			}
		}
	}
	return answers
}

// Store puts a value into a cache.
func (a *agent) Store(ctx context.Context, key agentapi.CacheKey, value []byte, ttl time.Duration) error {
	e := a.engine()
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	c, k := e.cache(key)
	return c.store(ctx, k, value, ttl)
}

// Delete removes a value from a cache.
func (a *agent) Delete(ctx context.Context, key agentapi.CacheKey) error {
	e := a.engine()
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	c, k := e.cache(key)
	return c.remove(ctx, k)
}

// Ready returns an error if the engine is closed.
func (a *agent) Ready(context.Context) error {
	e := a.engine()
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	return nil
}

// Expect notes the check timeout of a client until forget is called. It logs the waits that the timeout cuts short, if it is the
// shortest of all clients.
func (a *agent) Expect(timeout time.Duration) (forget func()) {
	e := a.engine()
	if timeout <= 0 {
		return func() {}
	}
	e.applying.Lock() // so that each warning is logged once
	defer e.applying.Unlock()
	if e.checkTimeouts == nil {
		e.checkTimeouts = make(map[time.Duration]int)
	}
	e.checkTimeouts[timeout]++
	if old := time.Duration(e.checkTimeout.Load()); old == 0 || timeout < old {
		e.checkTimeout.Store(int64(timeout))
		e.warn(e.cutShort())
	}
	return sync.OnceFunc(func() { e.unexpect(timeout) })
}

// unexpect forgets the check timeout of one client.
func (e *Engine) unexpect(timeout time.Duration) {
	e.applying.Lock()
	defer e.applying.Unlock()
	if e.checkTimeouts[timeout]--; e.checkTimeouts[timeout] > 0 {
		return
	}
	delete(e.checkTimeouts, timeout)
	shortest := time.Duration(0)
	for of := range e.checkTimeouts {
		if shortest == 0 || of < shortest {
			shortest = of
		}
	}
	e.checkTimeout.Store(int64(shortest))
}

// Measures reports whether a policy measures latencies at the control point or, for "", at any.
func (a *agent) Measures(controlPoint string) bool {
	e := a.engine()
	if controlPoint == "" {
		return len(e.rules.Load().sinks) > 0
	}
	return len(e.rules.Load().sinks[controlPoint]) > 0
}

// Observe notes a latency that a client reports.
func (a *agent) Observe(controlPoint string, labels map[string]string, latency time.Duration) {
	e := a.engine()
	e.recordLatency(e.rules.Load().sinks[controlPoint], &agentapi.Labels{Params: labels}, e.now(), latency)
}

// NamedLabels returns the labels that the policies in force read; see rules.name.
func (a *agent) NamedLabels() map[string]bool { return a.engine().rules.Load().named }

// ServiceWarnings lists the selectors that name a service. Components that have only such selectors at a control point
// come first.
func (a *agent) ServiceWarnings() []string {
	e := a.engine()
	var never, warnings []string
	points := e.rules.Load().controlPoints
	for _, at := range slices.Sorted(maps.Keys(points)) {
		for _, placements := range points[at].stages {
			for _, m := range placements {
				acts := slices.ContainsFunc(m.selectors, func(s *selector) bool { return s.service == "" })
				for _, s := range m.selectors {
					if s.service == "" {
						continue
					}
					warning := fmt.Sprintf("policy %q: component %q: control point %q: the selector picks nothing: "+
						"flows from the network have no service, and it wants %q", m.id.Policy, m.id.ID, at, s.service)
					if acts {
						warnings = append(warnings, warning)
					} else {
						never = append(never, warning+", as all its selectors there do")
					}
				}
			}
		}
	}
	return append(never, warnings...)
}

// Acting yields each control point, in alphabetical order, with the components that act there on flows without a
// service, in the order in which they are asked.
func (a *agent) Acting() iter.Seq2[string, []*agentapi.Component] {
	points := a.engine().rules.Load().controlPoints
	return func(yield func(string, []*agentapi.Component) bool) {
		for _, at := range slices.Sorted(maps.Keys(points)) {
			var acting []*agentapi.Component
			for _, placements := range points[at].stages {
				for _, m := range placements {
					if slices.ContainsFunc(m.selectors, func(s *selector) bool { return s.service == "" }) {
						acting = append(acting, m.id)
					}
				}
			}
			if !yield(at, acting) {
				return
			}
		}
	}
}

// Instrument calls [Engine.Instrument].
func (a *agent) Instrument(provider metric.MeterProvider) error {
	return a.engine().Instrument(provider)
}

// lookup fills the cache part of the verdict. A global key that the cache does not have gets no place there, because the flow may
// wait in a queue afterwards, and may have asked for many.
func (e *Engine) lookup(ctx context.Context, p *controlPoint, req *agentapi.Request, now *int64, v *agentapi.Verdict) {
	x, asked := v.More(), req.Lookup()
	if e.store != nil {
		e.lookupTogether(ctx, p, req, x)
		*now = e.now()
		return
	}
	if asked.Result != "" {
		x.Result = e.memory.results.lookup(cacheKey{req.ControlPoint, asked.Result}, asked.Room)
		p.looked(&x.Result)
	}
	for _, key := range asked.Global {
		if key == "" {
			continue
		}
		if _, found := x.Global[key]; !found {
			keepGlobal(x, key, e.memory.globals.lookup(cacheKey{key: key}, asked.Room))
		}
	}
}

// keepGlobal notes the answer for a global key unless it is a plain miss.
func keepGlobal(x *agentapi.VerdictDetails, key string, answer agentapi.CacheAnswer) {
	if !answer.Hit && answer.Err == nil {
		return
	}
	if x.Global == nil {
		x.Global = make(map[string]agentapi.CacheAnswer)
	}
	x.Global[key] = answer
}

// lookupTogether is lookup in the store, by one call.
func (e *Engine) lookupTogether(ctx context.Context, p *controlPoint, req *agentapi.Request, x *agentapi.VerdictDetails) {
	asked := req.Lookup()
	var keys []agentapi.CacheKey
	if asked.Result != "" {
		keys = append(keys, agentapi.CacheKey{ControlPoint: req.ControlPoint, Key: asked.Result})
	}
	for _, key := range asked.Global {
		if key != "" {
			keys = append(keys, agentapi.CacheKey{Key: key, Global: true})
		}
	}
	if len(keys) == 0 {
		return
	}
	for i, answer := range e.lookupShared(ctx, keys, asked.Room) {
		if !keys[i].Global {
			x.Result = answer
			p.looked(&x.Result)
			continue
		}
		keepGlobal(x, keys[i].Key, answer)
	}
}

// looked counts a lookup in the result cache.
func (p *controlPoint) looked(a *agentapi.CacheAnswer) {
	what := cacheMisses
	if a.Hit {
		what = cacheHits
	}
	count(p.counts, a, what)
}

func (e *Engine) cache(key agentapi.CacheKey) (cache, cacheKey) {
	if key.Global {
		return e.globals, cacheKey{key: key.Key}
	}
	return e.results, cacheKey{key.ControlPoint, key.Key}
}
