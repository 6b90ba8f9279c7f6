package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine/internal/slots"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func TestCrowdFindsTheLongest(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		c := new(crowd)
		queues := make([]*queue, 10)
		for i := range queues {
			queues[i] = newQueue(new(atomic.Int64), nil)
			queues[i].crowd = c
		}
		for range 5000 {
			q := queues[rng.IntN(len(queues))]
			if rng.IntN(5) < 3-int(seed%2) || q.len == 0 {
				push(q, claim{priority: 1}, 1)
			} else {
				q.pop()
			}
			most := 0
			for _, q := range queues {
				most = max(most, q.len)
			}
			if most > 0 && (c.longest(most-1) == nil || c.longest(most-1).len != most) || c.longest(most) != nil {
				t.Fatalf("seed %d: longest() is not the queue of %d", seed, most)
			}
		}
		for _, q := range queues {
			for q.len > 0 {
				q.pop()
			}
		}
		if len(c.ofLen) != 0 {
			t.Errorf("%d lengths are left of no flows", len(c.ofLen))
		}
	}
}

// Flows of many keys that come and go, are evicted, and give up, leave all of the room.
func TestRoomOfManyKeys(t *testing.T) {
	const room, flows = 20, 3000
	synctest.Test(t, func(t *testing.T) {
		e := openEngine(t, policy.ConcurrencyScheduler{
			Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "key",
			Scheduler: policy.Scheduler{FairnessLabel: "user", MaxQueue: room},
		})
		s := e.rules.Load().installed[0].component.(*scheduler[slots.State])
		var wg sync.WaitGroup
		var causes [agentapi.Causes]atomic.Int64
		for i := range flows {
			rng := rand.New(rand.NewPCG(uint64(i), 2))
			wg.Go(func() {
				<-time.After(time.Duration(rng.IntN(flows)) * time.Millisecond)
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+rng.IntN(300))*time.Millisecond)
				defer cancel()
				req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{
					"key": fmt.Sprint(rng.IntN(1 + i%7)), "user": fmt.Sprint(rng.IntN(2)),
				}}, Timeout: time.Duration(rng.IntN(200)) * time.Millisecond}
				var v agentapi.Verdict
				if err := e.Check(ctx, req, &v); err != nil {
					return
				}
				if v.Rejected() {
					causes[v.Rejection().Cause].Add(1)
					return
				}
				<-time.After(time.Duration(rng.IntN(20)) * time.Millisecond)
				if _, err := e.End(t.Context(), req, &v, false); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := s.room.Load(); n != room || len(s.crowd.ofLen) != 0 {
			t.Errorf("room for %d of %d flows is left, and queues of %d lengths", n, room, len(s.crowd.ofLen))
		}
		if causes[agentapi.CauseQueueFull].Load() == 0 || causes[agentapi.CauseTimeout].Load() == 0 {
			t.Errorf("rejections by their causes = %v want some of a full queue, and in vain", &causes)
		}
	})
}

// Showing the crowd how many wait costs as much, however many queues there are.
func BenchmarkCrowd(b *testing.B) {
	for _, keys := range []int{0, 1, 10_000} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			c := new(crowd)
			for range keys {
				q := newQueue(new(atomic.Int64), nil)
				q.crowd = c
				push(q, claim{priority: 1}, 1)
			}
			q := newQueue(new(atomic.Int64), nil)
			if keys > 0 {
				q.crowd = c
			}
			push(q, claim{priority: 1}, 1)
			for b.Loop() {
				push(q, claim{priority: 1}, 1)
				q.pop()
			}
		})
	}
}
