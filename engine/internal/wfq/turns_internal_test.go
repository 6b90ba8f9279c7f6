package wfq

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// Turns says of each workload in which order its waiters are served, whichever workloads are served meanwhile.
func TestTurns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q, all := newQueue(), claims([]float64{1, 5, 0.1}, rapid.SampledFrom([]int{1, 3, 20}).Draw(t, "values"))
		for range rapid.IntRange(1, 60).Draw(t, "waiting") {
			push(q, rapid.SampledFrom(all).Draw(t, "claim"), rapid.SampledFrom([]float64{1, 0.5, 8}).Draw(t, "cost"))
		}
		for range rapid.IntRange(0, q.length-1).Draw(t, "served") {
			q.Pop()
		}
		const most = 7
		turns := q.Turns(most)
		if turns[0].Waiters[0] != q.First() {
			t.Fatalf("first comes %v want %v", turns[0].Waiters[0], q.First())
		}
		left := make(map[Claim]Turns[float64])
		for _, of := range turns {
			left[of.Claim] = of
		}
		served := make(map[Claim]int)
		own := rapid.Bool().Draw(t, "by the queue's own order")
		for q.length > 0 {
			w := q.First()
			if !own {
				open := q.Turns(1)
				w = open[rapid.IntRange(0, len(open)-1).Draw(t, "workload")].Waiters[0]
			}
			c := w.Claim()
			c.Fairness = ""
			if n := served[c]; n < most && w != left[c].Waiters[n] {
				t.Fatalf("%v: the waiter %d differs", c, n)
			}
			served[c]++
			q.Serve(w)
			if w.Waits() || !w.Served() {
				t.Fatal("a waiter that was served waits")
			}
		}
		for c, of := range left {
			if want := served[c] > most; of.More != want || len(of.Waiters) != min(served[c], most) {
				t.Fatalf("%v: %d waiters, more %v of %d", c, len(of.Waiters), of.More, served[c])
			}
		}
	})
}

// What a look at the turns of a workload costs grows with how many it returns, and not with how many wait.
func BenchmarkTurns(b *testing.B) {
	for _, values := range []int{1, 10, 10_000} {
		b.Run(fmt.Sprintf("shares=%d", values), func(b *testing.B) {
			q, all := newQueue(), claims([]float64{1}, values)
			for _, c := range slices.Repeat(all, 2) {
				push(q, c, 1)
			}
			for b.Loop() {
				q.Turns(32)
			}
		})
	}
}
