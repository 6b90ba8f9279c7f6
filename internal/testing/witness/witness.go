// Package witness judges by what several processes have seen whether a limit has held for all of them together.
//
// A process knows when it asked, and when it was told, but not when the limiter decided in between. So the witness counts what has
// certainly happened within a span, and is never wrong when it says that a limit was broken. All times are those of one clock.
package witness

import (
	"cmp"
	"slices"
	"time"
)

// An Admission is a flow that was let in: between Asked and Told its tokens were taken.
type Admission struct {
	Asked, Told time.Duration
	Tokens      float64
}

// A Bound is what may be let in within any span: capacity + rate × span.
type Bound struct {
	Capacity float64
	Rate     float64 // a second
}

// A Span is how much was certainly let in within some time.
type Span struct {
	From, To time.Duration
	Tokens   float64
	Allowed  float64
}

// Broken reports whether more was let in than the bound allows. Sums of many parts may differ in their last digits.
func (s Span) Broken() bool { return s.Tokens > s.Allowed*(1+1e-9)+1e-6 }

// Worst returns the span in which the most was let in beyond the bound, or, if the bound holds, in which it came closest. It is the
// zero Span without admissions.
func (b Bound) Worst(admissions []Admission) Span {
	if len(admissions) == 0 {
		return Span{}
	}
	byTold := slices.Clone(admissions)
	slices.SortFunc(byTold, func(x, y Admission) int { return cmp.Compare(x.Told, y.Told) })
	from := make([]time.Duration, len(byTold)) // where the worst span may begin
	for i, a := range byTold {
		from[i] = a.Asked
	}
	slices.Sort(from)
	from = slices.Compact(from)

	// For each beginning, what was let in since, plus what the rate would have brought until it.
	sums := newSums(len(from), func(i int) float64 { return b.Rate * from[i].Seconds() })
	var worst Span
	most := 0.0
	for i, a := range byTold {
		begins, _ := slices.BinarySearch(from, a.Asked)
		sums.add(begins+1, a.Tokens)
		if i+1 < len(byTold) && byTold[i+1].Told == a.Told {
			continue
		}
		began, _ := slices.BinarySearch(from, a.Told+1)
		at, sum := sums.max(began)
		beyond := sum - b.Rate*a.Told.Seconds()
		if worst == (Span{}) || beyond > most {
			span := (a.Told - from[at]).Seconds()
			worst, most = Span{From: from[at], To: a.Told, Tokens: beyond + b.Rate*span, Allowed: b.Capacity + b.Rate*span}, beyond
		}
	}
	return worst
}

// Since returns the span since the first was asked in which the most was let in beyond the bound, or came closest to it. It is the zero
// Span without admissions.
func (b Bound) Since(admissions []Admission) Span {
	if len(admissions) == 0 {
		return Span{}
	}
	byTold := slices.Clone(admissions)
	slices.SortFunc(byTold, func(x, y Admission) int { return cmp.Compare(x.Told, y.Told) })
	from := slices.MinFunc(byTold, func(x, y Admission) int { return cmp.Compare(x.Asked, y.Asked) }).Asked
	var worst Span
	sum := 0.0
	for i, a := range byTold {
		sum += a.Tokens
		if i+1 < len(byTold) && byTold[i+1].Told == a.Told {
			continue
		}
		span := Span{From: from, To: a.Told, Tokens: sum, Allowed: b.Capacity + b.Rate*(a.Told-from).Seconds()}
		if worst == (Span{}) || span.Tokens-span.Allowed > worst.Tokens-worst.Allowed {
			worst = span
		}
	}
	return worst
}

// sums are numbers of which the first may grow together, and the largest of the first is known. It is a tree: each node has the
// largest number below it, without what was added to the nodes above.
type sums struct {
	size  int // a power of 2
	most  []float64
	at    []int
	added []float64
}

func newSums(n int, number func(i int) float64) *sums {
	size := 1
	for size < n {
		size *= 2
	}
	s := &sums{size: size, most: make([]float64, 2*size), at: make([]int, 2*size), added: make([]float64, 2*size)}
	for i := range size {
		s.at[size+i] = i
		s.most[size+i] = number(min(i, n-1))
	}
	for node := size - 1; node > 0; node-- {
		s.update(node)
	}
	return s
}

func (s *sums) update(node int) {
	better := 2 * node
	if s.most[better+1] > s.most[better] {
		better++
	}
	s.most[node], s.at[node] = s.most[better]+s.added[node], s.at[better]
}

// add adds to the first n numbers.
func (s *sums) add(n int, number float64) { s.addBelow(1, s.size, n, number) }

func (s *sums) addBelow(node, size, n int, number float64) {
	if n <= 0 {
		return
	}
	if n >= size {
		s.most[node] += number
		s.added[node] += number
		return
	}
	s.addBelow(2*node, size/2, n, number)
	s.addBelow(2*node+1, size/2, n-size/2, number)
	s.update(node)
}

// max returns the largest of the first n numbers, of which there is at least one, and its index.
func (s *sums) max(n int) (at int, most float64) { return s.maxBelow(1, s.size, n) }

func (s *sums) maxBelow(node, size, n int) (at int, most float64) {
	if n >= size {
		return s.at[node], s.most[node]
	}
	at, most = s.maxBelow(2*node, size/2, n)
	if n > size/2 {
		if other, more := s.maxBelow(2*node+1, size/2, n-size/2); more > most {
			at, most = other, more
		}
	}
	return at, most + s.added[node]
}

// A Hold is a time within which a slot was certainly held: from when its holder was told to when it began to give it back.
type Hold struct{ From, To time.Duration }

// AtOnce returns how many slots were certainly held at once, and when.
func AtOnce(holds []Hold) (most int, at time.Duration) {
	type change struct {
		at   time.Duration
		more int
	}
	changes := make([]change, 0, 2*len(holds))
	for _, h := range holds {
		if h.From < h.To {
			changes = append(changes, change{h.From, 1}, change{h.To, -1})
		}
	}
	slices.SortFunc(changes, func(x, y change) int {
		if x.at != y.at {
			return cmp.Compare(x.at, y.at)
		}
		return x.more - y.more // what ends is not held together with what begins then
	})
	held := 0
	for _, c := range changes {
		if held += c.more; held > most {
			most, at = held, c.at
		}
	}
	return most, at
}
