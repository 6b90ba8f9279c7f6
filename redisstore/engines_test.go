package redisstore_test

import (
	"context"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
)

// newEngine returns a client of an engine with a store of its own.
func newEngine(t *testing.T, address string, components ...policy.Component) *flowctl.Client {
	t.Helper()
	s, err := redisstore.New(newClient(t, address), redisstore.WithNamespace(t.Name()), redisstore.WithTimeout(5*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	e, err := engine.New([]policy.Policy{{Name: "test", Components: components}}, engine.WithStore(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	c, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func classes(weights map[string]float64) policy.Scheduler {
	var s policy.Scheduler
	for name, weight := range weights {
		s.Workloads = append(s.Workloads, policy.Workload{
			Name: name, Labels: policy.LabelMatcher{Equal: map[string]string{"class": name}},
			WorkloadParameters: policy.WorkloadParameters{Priority: weight},
		})
	}
	return s
}

// Flows of one workload come to one engine, those of the other to the other. Both get their shares, of tokens and of slots.
func TestFleetEnginesShare(t *testing.T) {
	at := policy.At("point")
	weights := map[string]float64{"small": 1, "large": 3}
	for name, c := range map[string]policy.Component{
		"tokens": policy.QuotaScheduler{Selectors: at, Capacity: 40, Fill: 400, Interval: time.Second, Scheduler: classes(weights)},
		"slots":  policy.ConcurrencyScheduler{Selectors: at, Max: 4, MaxInflight: time.Minute, Scheduler: classes(weights)},
	} {
		t.Run(name, func(t *testing.T) {
			address := startServer(t)
			// A machine with too few processors for all these flows may keep one of the engines from asking for a while. So one of several
			// spans has to show the shares.
			const early, enough, spans = 200, 1200, 5 // the first are those of a full bucket
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var mu sync.Mutex
			got, seen := make(map[string]float64), 0
			var shares []float64
			var wg sync.WaitGroup
			for class := range weights {
				client := newEngine(t, address, c)
				for range 20 {
					wg.Go(func() {
						for ctx.Err() == nil {
							flow := client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"class": class}, MaxWait: time.Minute})
							if flow.Decision() == flowctl.Accepted {
								mu.Lock()
								if seen++; seen > early {
									got[class]++
								}
								if seen == early+enough {
									share := got["small"] / enough * 100
									shares = append(shares, share)
									if math.Abs(share-25) <= 2 || len(shares) == spans {
										cancel()
									}
									clear(got)
									seen = early
								}
								mu.Unlock()
								if name == "slots" {
									<-time.After(2 * time.Millisecond)
								}
							}
							if _, err := flow.End(t.Context()); err != nil {
								t.Error(err)
							}
						}
					})
				}
			}
			wg.Wait()
			t.Logf("the small workload got, in %%: %.2f", shares)
			if share := shares[len(shares)-1]; math.Abs(share-25) > 2 {
				t.Errorf("the small workload got %.1f %% want 25 %%", share)
			}
		})
	}
}
