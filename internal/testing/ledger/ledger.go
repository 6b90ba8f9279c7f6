// Package ledger is the fair order in which a store hands out the tokens or slots of one key to flows that wait in several
// engines: see Draw of internal/shared. It is a model: a store in memory uses it, and what other stores do is compared with it.
package ledger

import (
	"cmp"
	"slices"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// The bounds of a ledger.
const (
	// TTL is how long a ledger believes an instance that does not call. After that nothing waits there, and what lies in its
	// box goes to others.
	TTL = time.Second

	// MaxFlows is how many flows of a workload an instance lists.
	MaxFlows = 32

	// MaxWorkloads is how many workloads wait at a key. Those with new names beyond it are one, named Others.
	MaxWorkloads = 64
	Others       = "\x00others"

	// Early is how much earlier than it was told an instance's turn must be for it to be woken.
	Early = 5 * time.Millisecond

	maxSteps  = 256  // of a look ahead
	maxLooks  = 8    // at how many other instances' turns a call looks, because its own flows are gone
	slack     = 1e-9 // what floating point may lose
	lateClock = 1e9  // when the clock is set back: a float that shows more does not move by small costs of large weights
)

// A Ledger is what is known of the flows that wait at one key, over all instances. Its zero value is an empty one. It is not safe
// for concurrent use.
//
// The workloads share in proportion to their weights by self-clocked fair queueing (Golestani, "A self-clocked fair queueing
// scheme for broadband applications", INFOCOM 1994), as in the queue of one engine. A workload that begins to wait starts at the
// clock. It finishes at its start plus what its next flow costs divided by its weight. The smallest finish is served first, and the
// workload starts at it again. The clock shows the largest finish that was served.
//
// Within a workload the instances take turns, whatever their flows cost.
//
// Each call hands out all that there is in that order, to all instances. What falls to another instance than
// the caller lies in the other's box until it calls. So the shares are those of one queue although the instances call at
// different times. An instance lists the first [MaxFlows] flows of each workload anew in each call. The first of them get
// what its box holds for their workload. What is left in the box, because flows have gone, goes back. So does what lies in the box
// of an instance that has not called for the TTL.
//
// An instance calls when its turn is due. If something falls to it much earlier, or is going to because another one has left,
// it is woken, once until it calls.
type Ledger struct {
	clock     float64
	workloads []*workload // that wait, in the order in which they began to
	instances []*instance
	woken     []string

	// Lives is how long an instance is believed that does not call; 0 is TTL.
	Lives time.Duration
}

type workload struct {
	name          string
	weight, start float64
	lists         []*list // of the instances where it waits, by turns; none is empty
}

type list struct {
	of    *instance
	flows []flow
	more  bool // more flows may wait there than are listed
}

type flow struct {
	cost float64
	at   int // its place among the workloads that the caller lists
}

type instance struct {
	id      string
	expires time.Duration
	due     time.Duration // when it was told that its turn is; 0 if that is not known
	woken   bool
	box     box
}

// A box is what has fallen to an instance since its last call.
type box []*pile

// A pile is what a box holds for a workload.
type pile struct {
	workload string
	tokens   float64
}

func (b *box) add(workload string, tokens float64) {
	for _, p := range *b {
		if p.workload == workload {
			p.tokens += tokens
			return
		}
	}
	*b = append(*b, &pile{workload, tokens})
}

// spend gives the first of the flows what the box holds for the workload, and returns the other flows.
func (b box) spend(workload string, flows []flow, give func(flow)) []flow {
	for _, p := range b {
		if p.workload != workload {
			continue
		}
		for ; len(flows) > 0 && p.tokens >= flows[0].cost-slack; flows = flows[1:] {
			p.tokens = max(p.tokens-flows[0].cost, 0)
			give(flows[0])
		}
	}
	return flows
}

func (b box) total() (sum float64) {
	for _, p := range b {
		sum += p.tokens
	}
	return sum
}

// Tokens are what a ledger hands out, at the time of the call.
type Tokens interface {
	// Take takes what a flow costs, all or nothing.
	Take(cost float64) bool

	// Never reports whether a flow never gets what it costs.
	Never(cost float64) bool

	// Return gives back what Take has taken.
	Return(tokens float64)

	// Until returns how long it takes until so many have come, beyond what was taken. It is 0 if that is not known, and negative for
	// never.
	Until(tokens float64) time.Duration
}

// Draw notes what waits at an instance, hands out what there is, and returns what fell to the instance. Next is when its next
// turn is due. It is 0 if that is not known or nothing waits there, and negative for never. If once is set, the flows that get
// nothing do not wait.
func (l *Ledger) Draw(now time.Duration, id string, waiting []shared.Waiting, once bool, t Tokens) (grants []shared.Grant, next time.Duration) {
	l.expire(now, t)
	caller := l.instance(id)
	had := l.waits(caller)
	caller.expires, caller.due, caller.woken = now+cmp.Or(l.Lives, TTL), 0, false
	got := make([][]float64, len(waiting))
	give := func(f flow) { got[f.at] = append(got[f.at], f.cost) }

	held := caller.box
	caller.box = nil
	rest := make([][]flow, len(waiting))
	for i, w := range waiting {
		for _, cost := range w.Costs[:min(len(w.Costs), MaxFlows)] {
			rest[i] = append(rest[i], flow{cost, i})
		}
		rest[i] = held.spend(w.Workload, rest[i], give)
	}
	l.list(caller, waiting, rest, func(flows []flow) []flow { return held.spend(Others, flows, give) })
	if back := held.total(); back > slack {
		t.Return(back)
	}
	l.hand(t, func(at *list, w *workload, f flow) {
		if at.of == caller {
			give(f)
		} else {
			l.fill(now, at.of, w, f)
		}
	})
	if next = l.turn(caller, t); next > 0 {
		caller.due = now + next
	}
	if once {
		l.leave(caller)
	}
	l.tidy()
	if had && !l.waits(caller) {
		l.look(now, t)
	}
	for i, tokens := range got {
		if len(tokens) > 0 {
			grants = append(grants, shared.Grant{Workload: waiting[i].Workload, Tokens: tokens})
		}
	}
	return grants, next
}

// Serve hands out what has come back to the key. All of it falls into boxes. It reports whether any did.
func (l *Ledger) Serve(now time.Duration, t Tokens) (served bool) {
	l.expire(now, t)
	l.hand(t, func(at *list, w *workload, f flow) {
		l.fill(now, at.of, w, f)
		served = true
	})
	l.tidy()
	return served
}

// Woken returns the instances that are to be woken since it was called last.
func (l *Ledger) Woken() (ids []string) {
	ids, l.woken = l.woken, nil
	return ids
}

// fill puts into the box of an instance what has fallen to it.
func (l *Ledger) fill(now time.Duration, to *instance, w *workload, f flow) {
	to.box.add(w.name, f.cost)
	l.wake(now, to)
}

func (l *Ledger) wake(now time.Duration, i *instance) {
	if !i.woken && (i.due == 0 || i.due > now+Early) {
		i.woken = true
		l.woken = append(l.woken, i.id)
	}
}

// look wakes the instances whose turns are much earlier now than they were told.
func (l *Ledger) look(now time.Duration, t Tokens) {
	looks := maxLooks
	for _, i := range l.instances {
		if looks > 0 && !i.woken && i.due > now+Early && l.waits(i) {
			looks--
			if now+l.turn(i, t) < i.due-Early {
				l.wake(now, i)
			}
		}
	}
}

// waits reports whether anything waits at the instance.
func (l *Ledger) waits(i *instance) bool {
	return slices.ContainsFunc(l.workloads, func(w *workload) bool {
		return slices.ContainsFunc(w.lists, func(o *list) bool { return o.of == i })
	})
}

// Boxed returns what lies in boxes.
func (l *Ledger) Boxed() (sum float64) {
	for _, i := range l.instances {
		sum += i.box.total()
	}
	return sum
}

// Empty reports whether nothing waits, and nothing lies in boxes.
func (l *Ledger) Empty() bool { return len(l.instances) == 0 }

// expire forgets the instances that have not called lately.
func (l *Ledger) expire(now time.Duration, t Tokens) {
	for _, i := range l.instances {
		if i.expires > now {
			continue
		}
		if back := i.box.total(); back > slack {
			t.Return(back)
		}
		i.box = nil
		l.leave(i)
	}
	l.tidy()
}

// leave has nothing wait at the instance.
func (l *Ledger) leave(of *instance) {
	for _, w := range l.workloads {
		w.lists = slices.DeleteFunc(w.lists, func(o *list) bool { return o.of == of })
	}
}

func (l *Ledger) instance(id string) *instance {
	for _, i := range l.instances {
		if i.id == id {
			return i
		}
	}
	i := &instance{id: id}
	l.instances = append(l.instances, i)
	return i
}

// list notes what waits at the instance in place of what waited there before. Workloads that are listed as one alternate.
func (l *Ledger) list(of *instance, waiting []shared.Waiting, rest [][]flow, others func([]flow) []flow) {
	under := make([]*workload, len(rest))
	for i, flows := range rest {
		if len(flows) > 0 {
			under[i] = l.find(waiting[i].Workload)
			under[i].weight = waiting[i].Weight
		}
	}
	listed := make(map[*workload][]flow)
	more := make(map[*workload]bool)
	for n := range MaxFlows {
		for i, flows := range rest {
			if n >= len(flows) {
				continue
			}
			w := under[i]
			more[w] = more[w] || len(waiting[i].Costs) >= MaxFlows || len(listed[w]) >= MaxFlows
			if len(listed[w]) < MaxFlows {
				listed[w] = append(listed[w], flows[n])
			}
		}
	}
	for _, w := range l.workloads {
		flows := listed[w]
		if w.name == Others {
			flows = others(flows)
		}
		at := slices.IndexFunc(w.lists, func(o *list) bool { return o.of == of })
		switch {
		case at < 0 && len(flows) > 0:
			w.lists = append(w.lists, &list{of, flows, more[w]})
		case len(flows) > 0:
			w.lists[at].flows, w.lists[at].more = flows, more[w]
		case at >= 0:
			w.lists = slices.Delete(w.lists, at, at+1)
		}
	}
}

// find returns the workload of the name, or that of all others if there is no room for one more.
func (l *Ledger) find(name string) *workload {
	for _, w := range l.workloads {
		if w.name == name {
			return w
		}
	}
	if len(l.workloads) >= MaxWorkloads-1 && name != Others {
		return l.find(Others)
	}
	w := &workload{name: name, start: l.clock}
	l.workloads = append(l.workloads, w)
	return w
}

// hand hands out what there is. A flow that never gets what it costs, by numbers that have changed, is in nobody's way.
func (l *Ledger) hand(t Tokens, give func(*list, *workload, flow)) {
	for {
		w, finish := first(l.workloads)
		if w == nil {
			return
		}
		at := w.lists[0]
		f := at.flows[0]
		if !t.Never(f.cost) {
			if !t.Take(f.cost) {
				return
			}
			w.start, l.clock = finish, max(l.clock, finish)
			give(at, w, f)
		}
		w.lists = w.lists[1:]
		if at.flows = at.flows[1:]; len(at.flows) > 0 {
			w.lists = append(w.lists, at)
		}
	}
}

// first returns the workload that is served next, and its finish.
func first(workloads []*workload) (best *workload, finish float64) {
	for _, w := range workloads {
		if len(w.lists) == 0 {
			continue
		}
		if f := w.start + w.lists[0].flows[0].cost/w.weight; best == nil || f < finish {
			best, finish = w, f
		}
	}
	return best, finish
}

// turn returns when something falls to the instance if nothing changes but the time. Where an instance lists all that it may, it
// is taken to have any number of flows more.
func (l *Ledger) turn(of *instance, t Tokens) time.Duration {
	if !l.waits(of) {
		return 0
	}
	ahead := make([]*workload, 0, len(l.workloads))
	for _, w := range l.workloads {
		c := *w
		c.lists = make([]*list, 0, len(w.lists))
		for _, o := range w.lists {
			c.lists = append(c.lists, &list{o.of, o.flows, o.more})
		}
		ahead = append(ahead, &c)
	}
	sum := 0.0
	for range maxSteps {
		w, finish := first(ahead)
		at := w.lists[0]
		if sum += at.flows[0].cost; at.of == of {
			break
		}
		w.start = finish
		w.lists = w.lists[1:]
		if len(at.flows) > 1 || !at.more {
			at.flows = at.flows[1:]
		}
		if len(at.flows) > 0 {
			w.lists = append(w.lists, at)
		}
	}
	return t.Until(sum)
}

// tidy forgets what does not wait any more, and sets the clock back: to 0 when nothing waits, and when it shows too much.
func (l *Ledger) tidy() {
	l.workloads = slices.DeleteFunc(l.workloads, func(w *workload) bool { return len(w.lists) == 0 })
	l.instances = slices.DeleteFunc(l.instances, func(i *instance) bool {
		return i.box.total() <= slack && !l.waits(i)
	})
	switch {
	case len(l.workloads) == 0:
		l.clock = 0
	case l.clock >= lateClock:
		for _, w := range l.workloads {
			w.start -= l.clock
		}
		l.clock = 0
	}
}
