package engine

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/components"
	"github.com/headgate-go/headgate/policy"
)

// numbers are what keys of a component go by: a rule of type R, and the most that it gives.
type numbers[R any] struct {
	rule     R
	capacity float64
}

// terms are the numbers of a component that are in force: its own, and others for single values. The mark of an entry says by which
// of them its key goes, so that a check needs no look-up for it. When a policy changes numbers, other terms replace these.
type terms[R any] struct {
	turn  uint32 // 0 or 1, by turns: the lowest bit in the marks of the entries that go by these terms; the others are a place
	own   *numbers[R]
	with  func(policy.Override) (*numbers[R], error) // nil for a component without a state for each value of a label
	named atomic.Pointer[map[string]uint32]          // the places of the policy's overrides, by the names of values
	plain map[string]uint32                          // the same by values; nil where names tell the value
	fixed uint32                                     // how many places are never given up: of own, and of the policy's overrides

	list atomic.Pointer[[]*numbers[R]] // by place; own is the first

	mu    sync.Mutex                 // guards the rest
	asked map[policy.Override]uint32 // places of what the host's function returned
	given []given                    // by place, without the fixed ones
	free  []uint32                   // places

	// While keys move here, the terms that they come from, and when that began.
	before atomic.Pointer[terms[R]]
	at     int64
}

// given is a place of an override that the host's function returned.
type given struct {
	override policy.Override
	keys     int // how many go by it
}

// ownPlace is that of the component's own numbers.
const ownPlace = 0

// newTerms makes the terms of a component. Overrides are valid, and name says by which name an entry knows a value.
func newTerms[R any](own *numbers[R], with func(policy.Override) (*numbers[R], error), overrides map[string]policy.Override,
	namer keys.Namer,
) (*terms[R], error) {
	t := &terms[R]{own: own, with: with}
	list := []*numbers[R]{own}
	named := make(map[string]uint32, len(overrides))
	if namer.Hides() && len(overrides) > 0 {
		t.plain = make(map[string]uint32, len(overrides))
	}
	places := make(map[policy.Override]uint32)
	for value, o := range overrides {
		place, ok := places[o]
		if !ok {
			n, err := with(o)
			if err != nil {
				return nil, err // it was good when the policy was checked
			}
			place = uint32(len(list))
			places[o] = place
			list = append(list, n)
		}
		if len(value) <= keys.MaxValue { // flows with longer ones are rejected
			named[namer.Name(value)] = place
			if t.plain != nil {
				t.plain[value] = place
			}
		}
	}
	t.fixed = uint32(len(list))
	t.list.Store(&list)
	t.named.Store(&named)
	return t, nil
}

// rename names the values of overrides again, because the secret of their names is another one.
func (t *terms[R]) rename(namer keys.Namer) {
	if t.plain == nil {
		return
	}
	named := make(map[string]uint32, len(t.plain))
	for value, place := range t.plain {
		named[namer.Name(value)] = place
	}
	t.named.Store(&named)
}

// placed returns the place of the policy's override for the value with the name; ok is false if there is none.
func (t *terms[R]) placed(name string) (place uint32, ok bool) {
	place, ok = (*t.named.Load())[name]
	return place, ok
}

// withNumbers returns the function that gives a component, which is a P, the numbers of an override.
func withNumbers[P policy.Component, R any](in *installed, of func(P) *numbers[R]) func(policy.Override) (*numbers[R], error) {
	with := in.override // not all of what is installed is kept for it
	if with == nil {
		return nil
	}
	return func(o policy.Override) (*numbers[R], error) {
		c, err := with(o)
		if err != nil {
			return nil, err
		}
		p, ok := components.Value[P](c)
		if !ok {
			return nil, fmt.Errorf("the engine cannot run a %T", c)
		}
		return of(p), nil
	}
}

// number returns the numbers at a place.
func (t *terms[R]) number(place uint32) *numbers[R] { return (*t.list.Load())[place] }

// register returns the place of an override that the host's function returned, for one key more.
func (t *terms[R]) register(o policy.Override) (uint32, error) {
	if o == (policy.Override{}) || t.with == nil {
		return ownPlace, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if place, ok := t.asked[o]; ok {
		t.given[place-t.fixed].keys++
		return place, nil
	}
	n, err := t.with(o)
	if err != nil {
		return ownPlace, err
	}
	if t.asked == nil {
		t.asked = make(map[policy.Override]uint32)
	}
	list := *t.list.Load()
	var place uint32
	if last := len(t.free) - 1; last >= 0 {
		place, t.free = t.free[last], t.free[:last]
		list[place] = n // nobody reads it: no key goes by it
		t.given[place-t.fixed] = given{o, 1}
	} else {
		place = uint32(len(list))
		list = append(list, n)
		t.list.Store(&list)
		t.given = append(t.given, given{o, 1})
	}
	t.asked[o] = place
	return place, nil
}

// release notes that a key does not go by the numbers at the place any more.
func (t *terms[R]) release(place uint32) {
	if place < t.fixed {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	g := &t.given[place-t.fixed]
	if g.keys--; g.keys == 0 {
		delete(t.asked, g.override)
		t.free = append(t.free, place)
	}
}

// override returns what the host's function returned for the keys of the place; zero if it was not asked.
func (t *terms[R]) override(place uint32) policy.Override {
	if place < t.fixed {
		return policy.Override{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.given[place-t.fixed].override
}

// A ruling is how rules of type R go about the states of keys. It is called with the entry locked.
type ruling[S, R any] struct {
	fresh   func(rule R, state *S, now int64)
	idle    func(rule R, state *S, now int64) bool
	inherit func(rule R, state *S, before R, now int64) // nil if the rule never changes
}

// kept is what remains of a component when a policy changes its numbers.
type kept[S, R any] struct {
	table   *keys.Table[S] // nil without a label
	single  *keys.Entry[S] // the state of all flows, without a label
	terms   atomic.Pointer[terms[R]]
	ruling  ruling[S, R]
	retired chan struct{} // closed when the component is
	counts  *counts       // of a limiter; a scheduler's workloads have their own
	beyond  atomic.Uint64 // flows of a limiter that entries admitted beyond what their counts hold
	namer   keys.Namer    // of buckets
	tops    *top          // values that are rejected; nil without a label

	invalid atomic.Uint64         // overrides that the host's function returned and the component cannot have
	wrong   atomic.Pointer[error] // what was wrong with the last of them
}

// of returns the numbers that the entry, which is locked, goes by.
func (k *kept[S, R]) of(e *keys.Entry[S]) *numbers[R] {
	t := k.terms.Load()
	if e.Mark() == t.turn {
		return t.own
	}
	return k.others(e, t)
}

// others is of for an entry with numbers that are not the component's own, or are not in force any more.
func (k *kept[S, R]) others(e *keys.Entry[S], t *terms[R]) *numbers[R] {
	if e.Gone() { // a flow that has waited there was slow to notice; nobody else comes there, and it is not moved any more
		return t.own
	}
	if e.Mark()&1 != t.turn {
		k.move(e, t)
	}
	return t.number(e.Mark() >> 1)
}

// move has the entry go by other terms than before. The host's function is not asked, because the entry is locked: what it said is
// kept until it is asked again.
func (k *kept[S, R]) move(e *keys.Entry[S], t *terms[R]) {
	before := t.before.Load()
	was := e.Mark() >> 1
	place, _ := k.placeOf(e, t, before.override(was))
	k.ruling.inherit(t.number(place).rule, &e.State, before.number(was).rule, t.at)
	e.SetMark(place<<1 | t.turn)
}

// placeOf returns the place of the entry's numbers: those of the policy's override for its key, or of the other one. The error is what
// is wrong with that.
func (k *kept[S, R]) placeOf(e *keys.Entry[S], t *terms[R], other policy.Override) (uint32, error) {
	if k.table == nil || e == k.table.Spill() {
		return ownPlace, nil
	}
	name, _ := e.Key()
	if place, ok := t.placed(name); ok {
		return place, nil
	}
	return t.register(other)
}

// begin makes the state of a key that is new, with the override that the host's function returned.
func (k *kept[S, R]) begin(e *keys.Entry[S], now int64, asked policy.Override) {
	t := k.terms.Load()
	place, err := k.placeOf(e, t, asked)
	k.refuse(err)
	e.SetMark(place<<1 | t.turn)
	k.ruling.fresh(t.number(place).rule, &e.State, now)
}

// refuse notes that the host's function returned an override that the component cannot have, if the error is not nil.
func (k *kept[S, R]) refuse(err error) {
	if err != nil {
		k.invalid.Add(1)
		k.wrong.Store(&err)
	}
}

// idle reports whether the entry's state is as good as new.
func (k *kept[S, R]) idle(e *keys.Entry[S], now int64) bool {
	return k.ruling.idle(k.of(e).rule, &e.State, now)
}

// forget reports whether the entry may be forgotten, and takes it for forgotten then.
func (k *kept[S, R]) forget(e *keys.Entry[S], now int64) bool {
	if !k.idle(e, now) {
		return false
	}
	if place := e.Mark() >> 1; place != ownPlace {
		k.terms.Load().release(place)
	}
	return true
}

// rename has overrides found by the names that values have by the engine's secret.
func (k *kept[S, R]) rename() { k.terms.Load().rename(k.namer) }

// each calls f with each entry, locked.
func (k *kept[S, R]) each(f func(*keys.Entry[S])) {
	if k.table != nil {
		k.table.Each(f)
		return
	}
	k.single.Lock()
	defer k.single.Unlock()
	f(k.single)
}

// ask asks the host's function about a value, unless the policy has an override for it. No lock is held.
func (k *keyed[S, R]) ask(value, name string) policy.Override {
	if _, ok := k.terms.Load().placed(name); ok {
		return policy.Override{}
	}
	if o, ok := k.engine.overrides(k.component.ID, value); ok {
		return o
	}
	return policy.Override{}
}

// fresh returns the function that makes the state of the key. If the host's function is to be asked, it has been. The value is that of
// the labels, if there are any. A name may not tell it.
func (k *keyed[S, R]) fresh(labels *agentapi.Labels, name string) func(*keys.Entry[S], int64) {
	if !k.asking {
		return nil
	}
	value, known := name, k.namer.IsValue(name)
	if labels != nil && !known {
		value, known = labels.Lookup(k.component.LabelKey)
	}
	if !known {
		return nil
	}
	o := k.ask(value, name)
	return func(e *keys.Entry[S], now int64) { k.begin(e, now, o) }
}

// lockAsking returns the entry of the decision's key, locked, and drops the flow if the host's function panics when it is asked about a new
// key: the flow has taken nothing then.
func (k *keyed[S, R]) lockAsking(labels *agentapi.Labels, d *agentapi.LimiterDecision, now int64) *keys.Entry[S] {
	name, asked := d.Label, false
	defer func() {
		if !asked {
			k.drop(d, agentapi.CauseNone, 0)
		}
	}()
	e := k.lockNew(labels, name, now)
	asked = true
	return e
}

// lockNew returns the entry of a name, locked: its own, which it makes with the numbers that the host's function returns if the name is new
// and has room, or the one that keys beyond the cap share.
func (k *keyed[S, R]) lockNew(labels *agentapi.Labels, name string, now int64) *keys.Entry[S] {
	if e := k.table.LockKnown(name); e != nil {
		e.Use(now)
		return e
	}
	if k.table.HasRoom(name, now) {
		if e := k.table.LockOwn(name, now, k.fresh(labels, name)); e != nil {
			return e
		}
	}
	return k.table.LockSpill()
}

// A successor is a component that can take over what another one keeps, whose numbers differ.
type successor interface {
	// follow prepares that, and reports whether it can. It changes nothing of the other component yet.
	follow(other component) bool

	// takeOver puts the numbers into force. It is called after follow, once.
	takeOver()

	// oldest returns when the slot was taken that is held the longest, of all keys; ok is false if none is.
	oldest(now int64) (since int64, ok bool)

	// keeps identifies what the component has in common with those that it follows.
	keeps() any
}

// An asker is a component whose keys the host's function may have numbers for.
type asker interface {
	// askAgain asks about each key that there is.
	askAgain()

	// invalidOverrides returns how many answers the component could not use, and what was wrong with the last.
	invalidOverrides() (n uint64, last error)
}

// followed makes k the successor of the other one.
func (k *keyed[S, R]) followed(other *keyed[S, R]) {
	k.next = k.terms.Load()
	k.kept = other.kept
	if other.settlements != nil && k.settlements != nil {
		k.settlements = other.settlements
	}
}

// change puts the next terms into force, and moves all keys there. It calls then with each entry, if that is not nil.
func (k *keyed[S, R]) change(then func(*keys.Entry[S])) {
	t, before := k.next, k.terms.Load()
	t.turn, t.at = 1-before.turn, k.engine.now()
	t.before.Store(before)
	k.terms.Store(t)
	// From here on, whoever locks an entry moves it. After the loop none is left to move, so a turn is one of two.
	k.each(func(e *keys.Entry[S]) {
		k.of(e)
		if then != nil {
			then(e)
		}
	})
	t.before.Store(nil)
	k.next = nil
}

// reconsider asks the host's function about each key, and calls then with each entry whose numbers it changes, if that is not nil.
// A name may not tell the value; such keys keep their numbers.
func (k *keyed[S, R]) reconsider(then func(*keys.Entry[S])) {
	if !k.asking {
		return
	}
	for e := range k.table.Entries {
		name, _ := e.Key()
		if !k.namer.IsValue(name) {
			continue
		}
		o := k.ask(name, name)
		e := k.table.LockKnown(name)
		if e == nil {
			continue
		}
		if k.assign(e, o) && then != nil {
			then(e)
		}
		e.Unlock()
	}
}

// assign gives the entry the numbers of the override, and reports whether they are others than before.
func (k *keyed[S, R]) assign(e *keys.Entry[S], o policy.Override) bool {
	is, t := k.of(e), k.terms.Load()
	was := e.Mark() >> 1
	place, err := k.placeOf(e, t, o)
	k.refuse(err)
	if place != was {
		k.ruling.inherit(t.number(place).rule, &e.State, is.rule, k.engine.now())
		e.SetMark(place<<1 | t.turn)
	}
	t.release(was) // either it is left, or it was counted twice
	return place != was
}

func (k *keyed[S, R]) invalidOverrides() (n uint64, last error) {
	if err := k.wrong.Load(); err != nil {
		last = *err
	}
	return k.invalid.Load(), last
}

func (k *keyed[S, R]) keeps() any { return k.kept }
