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
				if err := e.Agent().Check(ctx, req, &v); err != nil {
					return
				}
				if v.Rejected() {
					causes[v.Rejection().Cause].Add(1)
					return
				}
				<-time.After(time.Duration(rng.IntN(20)) * time.Millisecond)
				if _, err := e.Agent().End(t.Context(), req, &v, agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := s.room.Used(); n != 0 || s.room.Longest(0) != nil {
			t.Errorf("%d places of %d are taken, and a queue has flows: %v", n, room, s.room.Longest(0) != nil)
		}
		if causes[agentapi.CauseQueueFull].Load() == 0 || causes[agentapi.CauseTimeout].Load() == 0 {
			t.Errorf("rejections by their causes = %v want some of a full queue, and in vain", &causes)
		}
	})
}
