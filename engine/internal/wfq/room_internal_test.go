package wfq

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestRoomFindsTheLongest(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := NewRoom(1<<40, true)
		queues, asked := make([]*Queue[float64], 10), -1
		for i := range queues {
			queues[i] = New[float64](r, func(int) bool { asked = i; return true })
		}
		for range 5000 {
			q := queues[rng.IntN(len(queues))]
			if rng.IntN(5) < 3-int(seed%2) || q.length == 0 {
				push(q, Claim{Priority: 1}, 1)
			} else {
				q.Pop()
			}
			most := 0
			for _, q := range queues {
				most = max(most, q.length)
			}
			if r.Longest(most) != nil {
				t.Fatalf("seed %d: a queue is longer than %d", seed, most)
			}
			if most == 0 {
				continue
			}
			if turnOut := r.Longest(most - 1); turnOut == nil || !turnOut(0) || queues[asked].length != most {
				t.Fatalf("seed %d: Longest() is not the queue of %d", seed, most)
			}
		}
		for _, q := range queues {
			for q.length > 0 {
				q.Pop()
			}
		}
		if len(r.ofLen) != 0 {
			t.Errorf("%d lengths are left of no flows", len(r.ofLen))
		}
	}
}

func TestRoom(t *testing.T) {
	r := NewRoom(1, false)
	if !r.Take() || r.Take() || r.Used() != 1 || r.Longest(0) != nil {
		t.Errorf("want room for one flow, of which %d is used", r.Used())
	}
	r.Return()
	if r.Used() != 0 || !r.Take() {
		t.Error("room that was returned is not there")
	}
	q := New[float64](r, nil)
	w := &Waiter[float64]{Cost: 1, Deadline: NoDeadline, Placed: true}
	q.Push(w, Claim{Priority: 1})
	q.Evict(w)
	if r.Used() != 1 || !w.Evicted() {
		t.Error("the room of an evicted flow goes to another")
	}
	w = &Waiter[float64]{Cost: 1, Deadline: NoDeadline, Placed: true}
	q.Push(w, Claim{Priority: 1})
	q.Pop()
	if r.Used() != 0 || w.Evicted() || !w.Served() {
		t.Error("a flow that was served keeps its room")
	}
}

// To show the room how many flows wait costs the same, however many queues there are.
func BenchmarkRoom(b *testing.B) {
	for _, keys := range []int{0, 1, 10_000} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			r := NewRoom(1<<40, keys > 0)
			for range keys {
				push(New[float64](r, nil), Claim{Priority: 1}, 1)
			}
			q := New[float64](r, nil)
			push(q, Claim{Priority: 1}, 1)
			for b.Loop() {
				push(q, Claim{Priority: 1}, 1)
				q.Pop()
			}
		})
	}
}
