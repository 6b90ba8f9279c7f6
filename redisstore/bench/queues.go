package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// The quota scheduler that two workloads share, of which all flows come to one instance each.
const (
	queued   = "queue"
	refill   = 1000 // tokens a second
	waiters  = 32   // flows of each workload at a time
	smallest = 25.0 // percent for the workload of priority 1, beside one of 3
)

func queuePolicy() policy.Policy {
	workload := func(name string, priority float64) policy.Workload {
		return policy.Workload{
			Name: name, Labels: policy.LabelMatcher{Equal: map[string]string{"class": name}},
			WorkloadParameters: policy.WorkloadParameters{Priority: priority},
		}
	}
	return policy.Policy{Name: queued, Components: []policy.Component{policy.QuotaScheduler{
		Selectors: policy.At(queued), Capacity: refill / 10, Fill: refill, Interval: time.Second,
		Scheduler: policy.Scheduler{Workloads: []policy.Workload{workload("small", 1), workload("large", 3)}},
	}}}
}

// measureQueues prints how two workloads share tokens whose flows wait at two instances, and how often these ask the store.
func measureQueues(ctx context.Context, stdout io.Writer, server *redistest.Server, engines [instances]*guarded, lasts, warm time.Duration) error {
	renewed := scripts(server)
	<-time.After(lasts)
	idle := scripts(server) - renewed

	var counted, ended atomic.Bool
	var admitted [2]atomic.Int64
	var flows sync.WaitGroup
	failures := make(chan error, 2*waiters)
	for i, class := range []string{"small", "large"} {
		params := flowctl.Params{
			Labels: map[string]string{"class": class}, CheckTimeout: patient, MaxWait: time.Minute, OnUnreachable: flowctl.FailClosed,
		}
		for range waiters {
			flows.Go(func() {
				for !ended.Load() {
					flow := engines[i].client.Start(ctx, queued, params)
					err := flow.Err()
					_, endErr := flow.End(ctx)
					if err := errors.Join(err, endErr); err != nil {
						failures <- err
						return
					}
					if counted.Load() {
						admitted[i].Add(1)
					}
				}
			})
		}
	}
	<-time.After(warm) // a full bucket is used up
	asked, begun := scripts(server), time.Now()
	counted.Store(true)
	<-time.After(lasts)
	counted.Store(false)
	calls, took := scripts(server)-asked-idle, time.Since(begun)
	ended.Store(true)
	flows.Wait()
	close(failures)
	for err := range failures {
		return err
	}
	small, large := float64(admitted[0].Load()), float64(admitted[1].Load())
	share, use, perFlow := 100*small/(small+large), 100*(small+large)/(refill*took.Seconds()), calls/(small+large)
	fmt.Fprintf(stdout, "queue, two instances, one workload at each, 1 : 3: %.2f %% for the small one; target within 1 point of %.0f: %s\n",
		share, smallest, benchtable.Verdict(math.Abs(share-smallest) <= 1))
	fmt.Fprintf(stdout, "queue, the same: %.1f %% of the tokens used; target ≥ 98 %%: %s; %.2f calls of the store a flow; target ≤ 2: %s\n",
		use, benchtable.Verdict(use >= 98), perFlow, benchtable.Verdict(perFlow <= 2))
	return nil
}
