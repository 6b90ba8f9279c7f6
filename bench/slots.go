package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/bulkhead"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/policy"
)

// The flows want a few slots. They work by sleeping, so that the processors are idle when one is woken.
const (
	busySlots = 4
	busyFlows = 64
	busyWork  = time.Millisecond
)

// measureSlots prints how much of the time slots are in use while many flows wait for them, and how long a slot is free
// between two flows.
func measureSlots(ctx context.Context, stdout io.Writer, each time.Duration) (err error) {
	const at = "slots"
	limits, err := engine.New([]policy.Policy{{Name: at, Components: []policy.Component{policy.ConcurrencyScheduler{
		Selectors: policy.At(at), Max: busySlots, MaxInflight: time.Hour,
	}}}})
	if err != nil {
		return err
	}
	defer func() { err = firstError(err, limits.Close()) }()
	client, err := flowctl.New(limits)
	if err != nil {
		return err
	}
	peer := failsafe.With[int](bulkhead.NewBuilder[int](busySlots).WithMaxWaitTime(time.Hour).Build()).WithContext(ctx)

	var busy atomic.Int64
	use := func() { // a slot
		begin := time.Now()
		time.Sleep(busyWork)
		busy.Add(int64(time.Since(begin)))
	}
	guarded := headgate.Guard(client, at, flowctl.Params{CheckTimeout: -1, OnUnreachable: flowctl.FailClosed},
		func(context.Context) (int, error) { use(); return work() }, nil)
	for _, row := range []struct {
		name string
		call func() (int, error)
	}{
		{"concurrency scheduler", func() (int, error) { return guarded(ctx) }},
		{"failsafe-go bulkhead", func() (int, error) { return peer.Get(func() (int, error) { use(); return work() }) }},
	} {
		busy.Store(0)
		turns, elapsed, err := saturate(row.call, each)
		if err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
		all := time.Duration(busySlots) * elapsed
		share := float64(busy.Load()) / float64(all)
		fmt.Fprintf(stdout, "%s, %d slots, %d flows that work %v each: slots busy %.1f %%, free for %v between two flows",
			row.name, busySlots, busyFlows, busyWork, 100*share, (all-time.Duration(busy.Load()))/time.Duration(turns))
		if row.name == "concurrency scheduler" {
			fmt.Fprintf(stdout, "; target ≥ 98 %%: %s", benchtable.Verdict(share >= 0.98))
		}
		fmt.Fprintln(stdout)
	}
	return nil
}

// saturate makes the call from many goroutines at once, over and over for that time. It returns how often it did, and
// how long that took. While the last flows end, slots are free, so few turns would make a wrong measurement.
func saturate(call func() (int, error), each time.Duration) (turns int64, elapsed time.Duration, err error) {
	var flows sync.WaitGroup
	var done atomic.Int64
	failed := make(chan error, busyFlows)
	begin := time.Now()
	for range busyFlows {
		flows.Go(func() {
			for time.Since(begin) < each {
				if _, err := call(); err != nil {
					failed <- err
					return
				}
				done.Add(1)
			}
		})
	}
	flows.Wait()
	elapsed = time.Since(begin)
	select {
	case err = <-failed:
	default:
	}
	return done.Load(), elapsed, err
}
