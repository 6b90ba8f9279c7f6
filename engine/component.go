package engine

import (
	"context"
	"time"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/decimal"
	"github.com/headgate-go/headgate/internal/statefile"
	"github.com/headgate-go/headgate/policy"
)

// A component is a policy's component at work. The interfaces below are for what only some components have.
type component interface {
	// refuse fills the decision without asking: the flow is dropped for the cause if the component limits it.
	refuse(req *agentapi.Request, d *agentapi.LimiterDecision, cause agentapi.Cause)

	// Settle is called for each decision that did not drop its flow, when the flow has ended or was rejected by another
	// component. In the process it is called once. Over the network it is called for each piece that the client tells of the end: for
	// a slot, for costs, and for the outcome if the component goes by outcomes.
	agentapi.Settler

	// stats returns what the component has decided, and its usage now. It does not wait: a component that has its state
	// outside the process returns the usage that it last learned.
	stats(now int64) ComponentStats

	// identity names the component to others.
	identity() *agentapi.Component
}

// A decider is a component that is asked by itself: all but those that are sharers.
type decider interface {
	component

	// ask fills the decision, which has the component and the dry run already. If it admits the flow, it
	// takes the flow's tokens or slots. It may have the flow wait if asking allows it. In a dry run it decides the
	// same, and the caller lets the flow pass. It returns the time of the decision. An error means that it did not
	// decide. With errRetired the component is no longer in force, and the engine asks those that are. With any other error nobody
	// has decided: the flow is Canceled if its caller has gone, and Unreachable if not. Only the caller bounds ctx. The check timeout
	// is req.Timeout.
	ask(ctx context.Context, req *agentapi.Request, a asking, d *agentapi.LimiterDecision) (now int64, err error)
}

// asking says how a component is asked. It is passed by value, and the time is returned: through an interface, a
// pointer would escape and cost each flow a second allocation.
type asking struct {
	start int64 // when the flow began to ask
	now   int64
	wait  bool // the flow may wait
}

// A keeper is a component that keeps a state for each value of a label.
type keeper interface {
	// sweep forgets idle keys. If a key did not fit since the last sweep, it forgets all whose state is as good as new.
	// If full is set, it does nothing else.
	sweep(now int64, full bool)

	// overflow returns how many decisions went by the shared state, because there were too many keys.
	overflow() uint64
}

// A retiree is a component for which flows may wait, or of which they may hold something, after it is no longer in
// force.
type retiree interface {
	// retire sends away the flows that wait: the component is no longer in force. It is called once.
	retire()

	// vacant reports whether no flow holds anything of it.
	vacant(now int64) bool
}

// A moved component has a percentage that the engine's host may move.
type moved interface {
	course() *ramp
}

// An inspected component has a state that the engine's host may look at and reset. A component that has its state in memory
// does not look at ctx, and does not fail.
type inspected interface {
	peek(ctx context.Context, value string, now int64) (Usage, error)
	reset(ctx context.Context, value string, now int64) error

	// gone reports whether neither the component nor one that has followed it is in force.
	gone() bool
}

// A lasting component has a state that can outlive the process.
type lasting interface {
	// lasts says what the state means besides the component's kind and label. Ok is false if there is nothing to write: see
	// source.Lasting.
	lasts() (mode string, ok bool)

	// save writes the state as it is at the time now. It returns how many states it wrote.
	save(w *statefile.Writer, now int64) int

	// restore takes a state that save has written. It returns how many slots it took; ok is false if it could not take it.
	restore(r *statefile.Record, at source.Restoring) (slots int, ok bool)
}

// A binder is a source whose slots can run out with the session of the flow that holds them.
type binder[S any] interface {
	Bind(state *S, slot uint64, session [16]byte)
}

// bind has the slot that a flow was given run out with the flow's session, if both are there.
func bind[S any](by source.Source[S], state *S, slot uint64, session [16]byte) {
	if slot == 0 || session == ([16]byte{}) {
		return
	}
	if b, ok := by.(binder[S]); ok {
		b.Bind(state, slot, session)
	}
}

// keyed is what components have in common: a state for each value of a label, or one for all flows. Keys go by rules of type R.
// What it has of its own is configured. What it keeps is in kept, which it shares with the component that follows it when a policy
// changes its numbers: flows of before end here, at the same states.
type keyed[S, R any] struct {
	component   agentapi.Component
	passThrough bool
	maxIdle     time.Duration // 0: forever
	settlements *counts       // nil where nothing is settled
	engine      *Engine
	mode        any       // what must not change if another component is to follow; nil if none can
	next        *terms[R] // to be put into force
	asking      bool      // the host's function is asked about keys

	*kept[S, R]
}

// A config is how a keyed component is configured.
type config[S, R any] struct {
	component agentapi.Component
	maxIdle   time.Duration
	mode      any // see keyed
	ruling    ruling[S, R]
	names     *keys.Secret // that names of credentials are made with; nil for the engine's own

	own       *numbers[R]
	with      func(policy.Override) (*numbers[R], error) // nil if numbers are the same for all values
	overrides map[string]policy.Override
}

func newKeyed[S, R any](e *Engine, c config[S, R]) (keyed[S, R], error) {
	label, names := c.component.LabelKey, &e.secret
	if c.names != nil {
		names = c.names
	}
	k := keyed[S, R]{component: c.component, maxIdle: c.maxIdle, engine: e, mode: c.mode, asking: e.overrides != nil && label != "" && c.with != nil, kept: &kept[S, R]{
		ruling: c.ruling, retired: make(chan struct{}), counts: new(counts), namer: keys.NewNamer(label, names),
	}}
	switch {
	case c.maxIdle == 0:
		k.maxIdle = policy.DefaultMaxIdle
	case c.maxIdle < 0:
		k.maxIdle = 0
	}
	t, err := newTerms(c.own, c.with, c.overrides, k.namer)
	if err != nil {
		return k, err
	}
	k.terms.Store(t)
	if label != "" {
		unasked := func(e *keys.Entry[S], now int64) { k.kept.begin(e, now, policy.Override{}) }
		k.table, k.tops = keys.New(e.keyCap, unasked, k.kept.forget, e.full), new(top)
	} else {
		k.single = new(keys.Entry[S])
		c.ruling.fresh(c.own.rule, &k.single.State, 0)
	}
	return k, nil
}

func (k *keyed[S, R]) identity() *agentapi.Component { return &k.component }

// scope notes in d which state decides, and reports whether one does. If not, the flow passes, or is dropped because
// its value is too long.
func (k *keyed[S, R]) scope(labels *agentapi.Labels, d *agentapi.LimiterDecision) bool {
	if k.passThrough {
		return false
	}
	if k.table == nil {
		d.Scope = agentapi.ScopeDefault
		return true
	}
	value, ok := labels.Lookup(k.component.LabelKey)
	switch {
	case !ok:
		return false
	case len(value) > keys.MaxValue:
		d.Scope = agentapi.ScopeLabel
		k.drop(d, agentapi.CauseLongLabel, 0)
		return false
	}
	d.Scope, d.Label = agentapi.ScopeLabel, k.namer.Name(value)
	return true
}

// lock returns the entry that decides, locked. The labels are those of the flow; nil if they are not known any more.
func (k *keyed[S, R]) lock(labels *agentapi.Labels, d *agentapi.LimiterDecision, now int64) *keys.Entry[S] {
	if k.table == nil {
		k.single.Lock()
		return k.single
	}
	var e *keys.Entry[S]
	if !k.asking {
		e = k.table.Lock(d.Label, now)
	} else {
		e = k.lockAsking(labels, d, now)
	}
	d.Spilled = e == k.table.Spill()
	return e
}

// returned calls give with the entry that decided, locked. Give returns something to the entry, and reports whether it
// came from there.
func (k *keyed[S, R]) returned(d *agentapi.LimiterDecision, unused bool, give func(*keys.Entry[S]) bool) bool {
	if d.Scope == agentapi.ScopeNone || d.Consumed == 0 && d.Slot() == 0 {
		return false
	}
	if unused {
		count(k.counts, d, decisionsRefunded)
	}
	switch {
	case k.table == nil:
		return locked(k.single, give)
	case d.Spilled:
		return locked(k.table.Spill(), give)
	}
	if e := k.table.LockKnown(d.Label); e != nil {
		ok := give(e)
		e.Unlock()
		if ok {
			return true
		}
	}
	// A slot's name over the wire does not distinguish the spill, so the spill is tried too. Tokens are different: their
	// key was forgotten, and its next bucket is full.
	return k.component.Slots && d.Slot() != 0 && locked(k.table.Spill(), give)
}

// locked calls the function with the entry locked.
func locked[S any](e *keys.Entry[S], f func(*keys.Entry[S]) bool) bool {
	e.Lock()
	defer e.Unlock()
	return f(e)
}

func (k *keyed[S, R]) sweep(now int64, full bool) {
	if k.table == nil || full && !k.table.Crowded() {
		return
	}
	select {
	case <-k.retired:
		k.table.Forget(now, 0)
	default:
		k.table.Sweep(now, k.maxIdle)
	}
}

func (k *keyed[S, R]) vacant(now int64) bool {
	e := k.single
	if k.table != nil {
		if k.table.Len() > 0 {
			return false
		}
		e = k.table.Spill()
	}
	return locked(e, func(e *keys.Entry[S]) bool { return k.idle(e, now) })
}

func (k *keyed[S, R]) gone() bool {
	select {
	case <-k.retired:
		return true
	default:
		return false
	}
}

func (k *keyed[S, R]) retire() { close(k.retired) }

func (k *keyed[S, R]) overflow() uint64 {
	if k.table == nil {
		return 0
	}
	return k.table.Spilled()
}

// drop turns the decision into a refusal.
func (k *keyed[S, R]) drop(d *agentapi.LimiterDecision, cause agentapi.Cause, wait int64) {
	d.Consumed = 0
	d.Cause = cause
	d.Drop(time.Duration(wait))
}

// heldOff counts a flow that was rejected while no flow gets slots.
func (k *keyed[S, R]) heldOff(d *agentapi.LimiterDecision, now int64) {
	if k.component.Slots && !d.Passed() {
		k.engine.hold.Reject(now)
	}
}

// tokensOf returns how many tokens the flow's label says, or 1 if it says no number of tokens.
func tokensOf(labels *agentapi.Labels, label string) float64 {
	if tokens, ok := tokensSaid(labels, label); ok {
		return tokens
	}
	return 1
}

// tokensSaid returns how many tokens the flow's label says; ok is false if it says no number of tokens.
func tokensSaid(labels *agentapi.Labels, label string) (tokens float64, ok bool) {
	if label == "" {
		return 0, false
	}
	text, ok := labels.Lookup(label)
	if !ok {
		return 0, false
	}
	tokens, ok = decimal.Parse(text)
	return tokens, ok && tokens >= 0
}
