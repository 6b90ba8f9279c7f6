package wfq

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// claims are of workloads a, b, …, whose priorities are given, and of fairness values.
func claims(priorities []float64, values int) []Claim {
	var all []Claim
	for i, p := range priorities {
		for v := range values {
			all = append(all, Claim{Workload: string(rune('a' + i)), Priority: p, Fairness: fmt.Sprint(v)})
		}
	}
	return all
}

func newQueue() *Queue[float64] { return New[float64](NewRoom(1<<40, false), nil) }

func push(q *Queue[float64], c Claim, tokens float64) *Waiter[float64] {
	w := &Waiter[float64]{Flow: tokens, Cost: tokens, Deadline: NoDeadline}
	q.Push(w, c)
	return w
}

func TestQueueOrder(t *testing.T) {
	// A flow is its workload and fairness value, and after "*" what it wants, other than 1; "-" serves the first, and
	// "!3" makes the third that came leave.
	priorities := map[byte]float64{'a': 1, 'b': 1, 'c': 1, 'h': 4, 'H': 1000}
	for _, tt := range []struct{ name, flows, served string }{
		{"first come, first served", "a1 a1 a1", "1 2 3"},
		{"equal workloads take turns", "a1 a1 a1 b1 b1", "1 4 2 5 3"},
		{"in proportion to priority", "a1 a1 a1 h1 h1 h1 h1 h1 h1", "4 5 6 1 7 8 9 2 3"},
		{"a late one of higher priority", "a1 a1 - a1 H1", "1 4 2 3"},
		{"fairness values take turns", "a1 a1 a1 a1 a2 a2 a3", "1 5 7 2 6 3 4"},
		{"many fairness values are one workload", "a1 a2 a3 a4 b1 b1", "1 5 2 6 3 4"},
		{"who was idle has saved nothing up", "a1 a1 a1 a1 a1 - - - b1 b1", "1 2 3 4 6 5 7"},
		{"who left is not charged", "a1 b1 b1 b1 !4 a1", "1 2 3 5"},
		{"who left keeps nobody's place", "a1 !1 b1 a1", "2 3"},
		{"a large one that left does not set the clock back", "a1*9 a1 b1 b1 b1 b1 b1 b1 - - - - - !1 - c1", "3 4 5 6 7 2 8 9"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := newQueue()
			var came []*Waiter[float64]
			var served []string
			serve := func() {
				served = append(served, strconv.Itoa(1+slices.Index(came, q.First())))
				q.Pop()
			}
			for flow := range strings.FieldsSeq(tt.flows) {
				switch text, number, _ := strings.Cut(flow, "*"); {
				case flow == "-":
					serve()
				case flow[0] == '!':
					n, _ := strconv.Atoi(flow[1:])
					q.Remove(came[n-1])
				default:
					n, err := strconv.Atoi(number)
					if err != nil {
						n = 1
					}
					c := Claim{Workload: text[:1], Priority: priorities[text[0]], Fairness: text[1:]}
					came = append(came, push(q, c, float64(n)))
				}
			}
			for q.length > 0 {
				serve()
			}
			if got := strings.Join(served, " "); got != tt.served {
				t.Errorf("served %s want %s", got, tt.served)
			}
			checkEmpty(t, q)
		})
	}
}

func checkEmpty(t rapid.TB, q *Queue[float64]) {
	t.Helper()
	if q.length != 0 || len(q.shares) != 0 || len(q.root.below) != 0 || q.root.clock != 0 || q.First() != nil {
		t.Errorf("an empty queue holds %d waiters, %d shares, clock %v", q.length, len(q.shares), q.root.clock)
	}
}

// A workload whose flows give up before their turn comes keeps its turn: it waits all the while.
func TestQueueImpatientWorkload(t *testing.T) {
	q := newQueue()
	low, high := Claim{Workload: "low", Priority: 1}, Claim{Workload: "high", Priority: 100}
	served := 0
	last := push(q, low, 1)
	for i := range 10_000 {
		push(q, high, 1)
		if i%10 == 0 { // far less than the 100 that go before it
			next := push(q, low, 1)
			q.Remove(last)
			last = next
		}
		if q.First() == last {
			served++
			last = push(q, low, 1)
		}
		q.Pop()
	}
	if served < 98 || served > 101 {
		t.Errorf("%d of 10 000 were of priority 1 beside 100 want 99", served)
	}
}

// naive is the queue without its heaps: slow, and plain to see.
type naive struct {
	clock     float64
	workloads map[Claim]*naiveWorkload
	number    int
}

type naiveWorkload struct {
	start, clock float64
	values       map[Claim]*naiveValue
}

type naiveValue struct {
	start   float64
	waiting []naiveWaiter
}

type naiveWaiter struct {
	number int
	tokens float64
}

func (n *naive) push(c Claim, tokens float64) (number int) {
	w := n.workloads[c.ofWorkload()]
	if w == nil {
		w = &naiveWorkload{start: n.clock, values: make(map[Claim]*naiveValue)}
		n.workloads[c.ofWorkload()] = w
	}
	v := w.values[c]
	if v == nil {
		v = &naiveValue{start: w.clock}
		w.values[c] = v
	}
	n.number++
	v.waiting = append(v.waiting, naiveWaiter{n.number, tokens})
	return n.number
}

func (w *naiveWorkload) first() (at Claim, finish float64, first naiveWaiter) {
	finish = math.Inf(1)
	for c, v := range w.values {
		f := v.start + v.waiting[0].tokens
		if f < finish || f == finish && v.waiting[0].number < first.number {
			at, finish, first = c, f, v.waiting[0]
		}
	}
	return at, finish, first
}

func (n *naive) pop() (number int) {
	finish := math.Inf(1)
	var first naiveWaiter
	var at Claim
	for c, w := range n.workloads {
		_, _, head := w.first()
		f := w.start + head.tokens/c.Priority
		if f < finish || f == finish && head.number < first.number {
			at, finish, first = c, f, head
		}
	}
	w := n.workloads[at]
	w.start, n.clock = finish, max(n.clock, finish)
	c, f, _ := w.first()
	w.values[c].start, w.clock = f, max(w.clock, f)
	n.remove(c, first.number)
	return first.number
}

func (n *naive) remove(c Claim, number int) {
	w := n.workloads[c.ofWorkload()]
	v := w.values[c]
	v.waiting = slices.DeleteFunc(v.waiting, func(w naiveWaiter) bool { return w.number == number })
	if len(v.waiting) == 0 {
		delete(w.values, c)
	}
	if len(w.values) == 0 {
		delete(n.workloads, c.ofWorkload())
	}
	if len(n.workloads) == 0 {
		n.clock = 0
	}
}

// The heaps and lists serve the same flows in the same order as a queue that looks at every waiter.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := newQueue()
		n := &naive{workloads: make(map[Claim]*naiveWorkload)}
		all := claims([]float64{1, 1, 3, 0.1}, 3)
		type place struct {
			w *Waiter[float64]
			c Claim
		}
		waiting := make(map[int]place)
		pop := func(t *rapid.T) {
			if q.length == 0 {
				t.Skip("nobody waits")
			}
			w := q.First()
			q.Pop()
			if number := n.pop(); w != waiting[number].w {
				t.Fatalf("served another than the %dth that came", number)
			} else {
				delete(waiting, number)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				c := rapid.SampledFrom(all).Draw(t, "claim")
				tokens := rapid.Float64Range(0.1, 10).Draw(t, "tokens")
				waiting[n.push(c, tokens)] = place{push(q, c, tokens), c}
			},
			"pop": pop,
			"remove": func(t *rapid.T) {
				if q.length == 0 {
					t.Skip("nobody waits")
				}
				number := rapid.SampledFrom(slices.Sorted(maps.Keys(waiting))).Draw(t, "who")
				q.Remove(waiting[number].w)
				n.remove(waiting[number].c, number)
				delete(waiting, number)
			},
			"": func(t *rapid.T) {
				if q.length != len(waiting) {
					t.Fatalf("%d wait want %d", q.length, len(waiting))
				}
			},
		})
		for q.length > 0 {
			pop(t)
		}
		checkEmpty(t, q)
	})
}

// fluid is what the queue comes close to: generalized processor sharing, which serves all waiters at once, drop by
// drop, each workload by its priority and each value of it alike.
type fluid struct{ backlog, served map[Claim]float64 }

func (f *fluid) serve(amount float64) {
	for amount > 1e-9 {
		weights, values := 0.0, make(map[Claim]float64)
		for c := range f.backlog {
			if values[c.ofWorkload()]++; values[c.ofWorkload()] == 1 {
				weights += c.Priority
			}
		}
		// All are served at their speeds until the first of them runs dry.
		speed := func(c Claim) float64 { return c.Priority / weights / values[c.ofWorkload()] }
		step := amount
		for c, b := range f.backlog {
			step = min(step, b/speed(c))
		}
		for c := range f.backlog {
			f.served[c] += step * speed(c)
			if f.backlog[c] -= step * speed(c); f.backlog[c] < 1e-9 {
				delete(f.backlog, c)
			}
		}
		amount -= step
	}
}

// No share is ever further behind the fluid, or ahead of it, than one flow of each share beside it.
func TestQueueFluid(t *testing.T) {
	worst := 0.0
	rapid.Check(t, func(t *rapid.T) {
		const largest = 8
		priorities := rapid.SliceOfN(rapid.SampledFrom([]float64{1, 2, 5, 50}), 1, 4).Draw(t, "priorities")
		values := rapid.IntRange(1, 4).Draw(t, "values")
		all := claims(priorities, values)
		bound := float64(largest * (len(priorities) + values))
		q := newQueue()
		f := &fluid{backlog: make(map[Claim]float64), served: make(map[Claim]float64)}
		served := make(map[Claim]float64)
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				c := rapid.SampledFrom(all).Draw(t, "claim")
				for range rapid.IntRange(1, 30).Draw(t, "flows") {
					tokens := float64(rapid.IntRange(1, largest).Draw(t, "tokens"))
					push(q, c, tokens)
					f.backlog[c] += tokens
				}
			},
			"pop": func(t *rapid.T) {
				for range min(rapid.IntRange(1, 30).Draw(t, "flows"), q.length) {
					w := q.First()
					served[w.Claim()] += w.Flow
					f.serve(w.Flow)
					q.Pop()
				}
			},
			"": func(t *rapid.T) {
				for _, c := range all {
					lag := f.served[c] - served[c]
					worst = max(worst, math.Abs(lag)/bound)
					if math.Abs(lag) > bound {
						t.Fatalf("%+v has had %v want %v ± %v", c, served[c], f.served[c], bound)
					}
				}
			},
		})
	})
	t.Logf("at worst %.0f %% of the bound", 100*worst)
}

// If all want the same, the forecast of how many flows go before one is exact.
func TestQueueAhead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := newQueue()
		all := claims([]float64{1, 1, 2, 64}, 3)
		var waiting []*Waiter[float64]
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				c := rapid.SampledFrom(all).Draw(t, "claim")
				want := q.Ahead(c, 1)
				w := push(q, c, 1)
				waiting = append(waiting, w)
				if again := q.Ahead(c, 1); again.Least < want.Least {
					t.Fatalf("%v are ahead with one more, before %v", again, want)
				}
			},
			"pop": func(t *rapid.T) {
				if q.length > 0 {
					w := q.First()
					q.Pop()
					waiting = slices.DeleteFunc(waiting, func(x *Waiter[float64]) bool { return x == w })
				}
			},
			"remove": func(t *rapid.T) {
				if q.length > 0 {
					i := rapid.IntRange(0, len(waiting)-1).Draw(t, "who")
					q.Remove(waiting[i])
					waiting = slices.Delete(waiting, i, i+1)
				}
			},
		})
		c := rapid.SampledFrom(all).Draw(t, "claim")
		want := q.Ahead(c, 1)
		w := push(q, c, 1)
		got := 0.0
		for ; q.First() != w; q.Pop() {
			got++
		}
		if want != (Ahead{Least: got, Likely: got}) {
			t.Fatalf("%v went before it, %v were told", got, want)
		}
	})
}

// Whatever flows want, the least of what goes before a flow never rejects it if it would have been served in time.
func TestQueueAheadAtLeast(t *testing.T) {
	exact, all := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		q, claims := newQueue(), claims([]float64{1, 1, 2, 64}, 3)
		claim := func() Claim { return rapid.SampledFrom(claims).Draw(t, "claim") }
		cost := func() float64 { return rapid.SampledFrom([]float64{0.5, 1, 5, 100}).Draw(t, "cost") }
		for range rapid.IntRange(0, 40).Draw(t, "waiting") {
			push(q, claim(), cost())
		}
		t.Repeat(map[string]func(*rapid.T){
			"push": func(*rapid.T) { push(q, claim(), cost()) },
			"pop": func(*rapid.T) {
				if q.length > 0 {
					q.Pop()
				}
			},
		})
		c, own := claim(), cost()
		told := q.Ahead(c, own)
		w := push(q, c, own)
		got := 0.0
		for ; q.First() != w; q.Pop() {
			got += q.First().Cost
		}
		if told.Least > got+1e-6 || told.Likely < told.Least {
			t.Fatalf("%v went before it, %v were told", got, told)
		}
		if all++; told.Least == got {
			exact++
		}
	})
	t.Logf("exact %d times of %d", exact, all)
}

// A flow that cost as much as any flow may, at the lowest priority, leaves the clock where the others still move it.
// A preview serves in the order of the queue, also where finishes differ only by rounding, and where clocks are set
// back.
func TestQueueCostBefore(t *testing.T) {
	ties, setBack := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		q, claims := newQueue(), claims([]float64{1, 5, 3, 0.1, MinPriority}, 2)
		costs := rapid.SampledFrom([][]float64{{1}, {1, 0.1, 1.25}, {1, 7e8, 1e9}}).Draw(t, "costs") // the last set clocks back
		claim := func() Claim { return rapid.SampledFrom(claims).Draw(t, "claim") }
		cost := func() float64 { return rapid.SampledFrom(costs).Draw(t, "cost") }
		waiting := make(map[*Waiter[float64]]bool)
		add := func(*rapid.T) { waiting[push(q, claim(), cost())] = true }
		pop := func() {
			delete(waiting, q.First())
			before := q.root.clock
			if q.Pop(); q.root.clock < before && q.length > 0 {
				setBack++
			}
		}
		for range rapid.IntRange(0, 40).Draw(t, "waiting") {
			add(t)
		}
		t.Repeat(map[string]func(*rapid.T){
			"push": add,
			"pop": func(*rapid.T) {
				if q.length > 0 {
					pop()
				}
			},
			"remove": func(t *rapid.T) {
				byNumber := func(a, b *Waiter[float64]) int { return cmp.Compare(a.number, b.number) }
				if all := slices.SortedFunc(maps.Keys(waiting), byNumber); len(all) > 0 {
					w := rapid.SampledFrom(all).Draw(t, "leaves")
					delete(waiting, w)
					q.Remove(w)
				}
			},
		})
		c, own := claim(), cost()
		told, first, formula := q.CostBefore(c, own, nil, 1<<20), q.firstTurns(c, own), q.Ahead(c, own)
		cut := q.CostBefore(c, own, nil, 50)
		w, got := push(q, c, own), 0.0
		for q.First() != w {
			got += q.First().Cost
			pop()
		}
		if told != got || first > got+1e-3 || cut > got {
			t.Fatalf("%v went before it, %v were told, %v at once and %v of few visits", got, told, first, cut)
		}
		if formula.Largest == 0 && formula.Least > got+0.01 {
			ties++
		}
	})
	t.Logf("the formula counted too many %d times, clocks were set back %d times", ties, setBack)
}

func TestQueueClockIsSetBack(t *testing.T) {
	q := newQueue()
	extreme := Claim{Workload: "extreme", Priority: MinPriority}
	for range 2 { // one is served, and one goes on to wait
		push(q, extreme, 1e9)
	}
	q.Pop()
	high, low := Claim{Workload: "high", Priority: 50}, Claim{Workload: "low", Priority: 1}
	for range 1000 {
		push(q, high, 1)
		push(q, low, 1)
	}
	served := make(map[Claim]int)
	for range 510 {
		served[q.First().Claim()]++
		q.Pop()
	}
	if got := served[low]; got < 9 || got > 11 {
		t.Errorf("served %v want 10 of the low priority", served)
	}
}

// When costs change, a queue is as if the new costs had been there from the beginning, except for what it has served.
func TestQueueReprice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prices := []float64{1, 5, 2}
		kinds := make(map[*Waiter[float64]]int)
		q, all := newQueue(), claims([]float64{1, 3, 64}, 3)
		for range rapid.IntRange(1, 40).Draw(t, "waiting") {
			kind := rapid.IntRange(0, len(prices)-1).Draw(t, "price")
			kinds[push(q, rapid.SampledFrom(all).Draw(t, "claim"), prices[kind])] = kind
		}
		for range rapid.IntRange(0, q.length-1).Draw(t, "served") {
			q.Pop()
		}
		prices[0] = rapid.SampledFrom([]float64{0.1, 1, 300}).Draw(t, "new price")
		q.Reprice(func(w *Waiter[float64]) float64 { return prices[kinds[w]] })
		sum := 0.0
		for c, s := range q.shares {
			if s.finish != s.start+s.head().Cost/s.weight {
				t.Fatalf("%v: finish %v want start %v and the first's cost %v", c, s.finish, s.start, s.head().Cost)
			}
			of := 0.0
			for w := s.first; w != nil; w = w.next {
				if w.Cost != prices[kinds[w]] {
					t.Fatalf("%v: a waiter costs %v want %v", c, w.Cost, prices[kinds[w]])
				}
				of += w.Cost
			}
			if sum += of; !c.whole && math.Abs(s.backlog-of) > 1e-9 {
				t.Fatalf("%v: backlog %v want %v", c, s.backlog, of)
			}
			for i, o := range s.parent.below {
				if o.index != i || i > 0 && s.parent.below.Less(i, (i-1)/2) {
					t.Fatalf("%v: the heap is out of order", c)
				}
			}
		}
		for q.length > 0 {
			w := q.First()
			if w.share.backlog < w.Cost-1e-9 || q.root.largest < w.Cost || q.root.smallest > w.Cost {
				t.Fatalf("backlog %v, smallest %v, largest %v at a cost of %v", w.share.backlog, q.root.smallest, q.root.largest, w.Cost)
			}
			sum -= w.Cost
			q.Pop()
		}
		if math.Abs(sum) > 1e-9 {
			t.Fatalf("%v is left of what all wanted", sum)
		}
	})
}

// The cost of a flow that waits grows with the logarithm of how many others wait.
func BenchmarkQueue(b *testing.B) {
	for _, waiting := range []int{1, 100, 10_000} {
		for _, values := range []int{1, 100} {
			b.Run(fmt.Sprintf("waiting=%d/shares=%d", waiting, values), func(b *testing.B) {
				q, all := newQueue(), claims([]float64{1}, values)
				for i := range waiting {
					push(q, all[i%values], 1)
				}
				i := 0
				for b.Loop() {
					push(q, all[i%values], 1)
					q.Pop()
					i++
				}
			})
		}
	}
}

// A share that is charged waits for its turn as if it had been served so much more, and nobody else does.
func TestQueueCharge(t *testing.T) {
	ann, bob, cid := Claim{Priority: 1, Fairness: "ann"}, Claim{Priority: 1, Fairness: "bob"}, Claim{Workload: "other", Priority: 2}
	for _, tt := range []struct {
		name    string
		charge  Claim
		by      float64
		waiting []Claim
		want    string // whose flows are served
	}{
		{"nobody", Claim{Workload: "unknown", Priority: 1}, 5, []Claim{ann, bob}, "abababab"},
		{"a fairness value", ann, 2, []Claim{ann, bob}, "bbababaa"},
		{"a workload, by its priority", cid, 4, []Claim{ann, cid}, "aaccacac"},
		{"a value that does not wait, whose workload does", bob, 2, []Claim{ann, cid}, "ccccaaaa"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := newQueue()
			for range 8 / len(tt.waiting) {
				for _, c := range tt.waiting {
					push(q, c, 1)
				}
			}
			version := q.Version()
			q.Charge(tt.charge, tt.by, tt.by)
			if changed := q.Version() != version; changed != (tt.name != "nobody") {
				t.Errorf("changed = %v", changed)
			}
			names := map[Claim]string{ann: "a", bob: "b", cid: "c"}
			got := ""
			for q.Len() > 0 {
				got += names[q.First().Claim()]
				q.Pop()
			}
			if got != tt.want {
				t.Errorf("served %s want %s", got, tt.want)
			}
		})
	}
}

// After any charges, a preview serves in the order of the queue, and no flow sees more cost ahead than there is, except by rounding.
func TestQueueChargeAndPreview(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q, all := newQueue(), claims([]float64{1, 5, 0.1}, 2)
		claim := func() Claim { return rapid.SampledFrom(all).Draw(t, "claim") }
		cost := func() float64 { return rapid.SampledFrom([]float64{1, 0.5, 8}).Draw(t, "cost") }
		for range rapid.IntRange(1, 30).Draw(t, "waiting") {
			push(q, claim(), cost())
		}
		t.Repeat(map[string]func(*rapid.T){
			"push":   func(*rapid.T) { push(q, claim(), cost()) },
			"charge": func(*rapid.T) { q.Charge(claim(), 3*cost(), 2*cost()) },
			"pop": func(*rapid.T) {
				if q.length > 0 {
					q.Pop()
				}
			},
		})
		c, own := claim(), cost()
		told, least := q.CostBefore(c, own, nil, 1<<20), q.Ahead(c, own).Least
		just := q.root.largest // of a waiter whose turn comes just after, which the formula may count
		w, got := push(q, c, own), 0.0
		for ; q.First() != w; q.Pop() {
			got += q.First().Cost
		}
		if told != got || least > got+just+1e-6 {
			t.Fatalf("%v went before it, %v were told, %v by formula", got, told, least)
		}
	})
}
