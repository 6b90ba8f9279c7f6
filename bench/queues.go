package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/bulkhead"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/policy"
)

// queues are the rows about flows that wait. Workers take one slot over and over: one has it, and the others wait. A
// row measures the time from one slot holder to the next: one flow gives the slot back and queues again, and another is
// woken and leaves the queue.
type queues struct {
	engine  *engine.Engine
	stop    context.CancelFunc
	running sync.WaitGroup
	list    []*benchtable.Row
}

const (
	oneWaits       = "Guard, queue and wake, 1 waiter"
	aHundredWait   = "Guard, queue and wake, 100 waiters"
	tenThousand    = 10_000
	bulkheadQueues = "failsafe-go bulkhead, queue and wake, 100 waiters"
)

func openQueues(ctx context.Context) (_ *queues, err error) {
	ctx, stop := context.WithCancel(ctx)
	q := &queues{stop: stop}
	defer func() {
		if err != nil {
			err = firstError(err, q.close())
		}
	}()
	guarded := map[int]string{1: oneWaits, 100: aHundredWait, tenThousand: fmt.Sprintf("Guard, queue and wake, %d waiters", tenThousand)}
	var limits []policy.Policy
	for _, name := range guarded {
		limits = append(limits, policy.Policy{Name: name, Components: []policy.Component{policy.ConcurrencyScheduler{
			Selectors: policy.At(name), Max: 1, MaxInflight: time.Hour,
			Scheduler: policy.Scheduler{FairnessLabel: "tenant", MaxQueue: 2 * tenThousand},
		}}})
	}
	if q.engine, err = engine.New(limits); err != nil {
		return nil, err
	}
	client, err := flowctl.New(q.engine)
	if err != nil {
		return nil, err
	}
	guard := func(waiters int, targets ...benchtable.Target) {
		q.add(ctx, guarded[waiters], waiters, targets, func(tenant int, work func() (int, error)) func() error {
			params := flowctl.Params{Labels: map[string]string{"tenant": strconv.Itoa(tenant)}, CheckTimeout: -1, OnUnreachable: flowctl.FailClosed}
			call := headgate.Guard(client, guarded[waiters], params, func(context.Context) (int, error) { return work() }, nil)
			return func() error { _, err := call(ctx); return err }
		})
	}
	// The bounds are the ratios of the logarithms of so many and one.
	guard(1)
	guard(100, benchtable.AtMost(benchtable.InTime, oneWaits, 6.66), benchtable.Beside(benchtable.InTime, bulkheadQueues))
	guard(tenThousand, benchtable.AtMost(benchtable.InTime, aHundredWait, 2))

	peer := failsafe.With[int](bulkhead.NewBuilder[int](1).WithMaxWaitTime(time.Hour).Build()).WithContext(ctx)
	q.add(ctx, bulkheadQueues, 100, nil, func(_ int, work func() (int, error)) func() error {
		return func() error { _, err := peer.Get(work); return err }
	})
	return q, nil
}

// add makes a row with one more worker than waiters, and makes all of them queue.
func (q *queues) add(ctx context.Context, name string, waiters int, targets []benchtable.Target, worker func(i int, work func() (int, error)) func() error) {
	turns := make(chan error)
	tell := func(err error) {
		select {
		case turns <- err:
		case <-ctx.Done():
		}
	}
	for i := range waiters + 1 {
		call := worker(i, func() (int, error) {
			tell(nil)
			return 42, nil
		})
		q.running.Go(func() {
			for ctx.Err() == nil {
				if err := call(); err != nil {
					tell(err)
				}
			}
		})
	}
	turn := func() error { return <-turns }
	begun := false
	q.list = append(q.list, &benchtable.Row{Name: name, Targets: targets, Call: func() func() error {
		if begun {
			return turn
		}
		begun = true
		for range 2 * (waiters + 1) { // until all have had a turn, and so queue
			if err := turn(); err != nil {
				return func() error { return err }
			}
		}
		return turn
	}})
}

func (q *queues) close() error {
	q.stop()
	q.running.Wait()
	if q.engine == nil {
		return nil
	}
	return q.engine.Close()
}
