//go:build unix

package soak_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/witness"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
)

// A load is what all workers do at one control point.
type load struct {
	point     string
	component policy.Component
	flows     int           // of each worker and user at a time
	pause     time.Duration // of each between its flows, in the mean
	work      time.Duration // of a flow that is let in, in the mean
	waits     time.Duration // the longest that a flow waits in a queue; 0 where there is none

	bound witness.Bound // of what all workers together let in for a user; zero for slots
	since witness.Bound // of the same since the beginning; zero where it is no other
	slots int           // of a user; 0 for others
}

// lease is that of the workers' slots. No outage lasts as long, and a worker is stopped for less than a third of it, or for longer.
const lease = 10 * time.Second

// loads are those of all workers. While the store does not answer, only the one that shares its limit lets flows in.
func loads() []load {
	return []load{
		{
			point: "exact", flows: 4, pause: 40 * time.Millisecond,
			component: policy.RateLimiter{Selectors: policy.At("exact"), Capacity: 30, Fill: 100, Interval: time.Second, LimitBy: "user", OnOutage: policy.OutageClosed},
			bound:     witness.Bound{Capacity: 30, Rate: 100},
		},
		{
			point: "small", flows: 2, pause: 20 * time.Millisecond,
			component: policy.RateLimiter{Selectors: policy.At("small"), Capacity: 1, Fill: 7, Interval: time.Second, LimitBy: "user", OnOutage: policy.OutageClosed},
			bound:     witness.Bound{Capacity: 1, Rate: 7},
		},
		{
			point: "leased", flows: 4, pause: 20 * time.Millisecond,
			component: policy.RateLimiter{Selectors: policy.At("leased"), Capacity: 40, Fill: 150, Interval: time.Second, LimitBy: "user", OnOutage: policy.OutageClosed, Share: policy.ShareLeased},
			bound:     witness.Bound{Capacity: 1.5 * 40, Rate: 150},
			since:     witness.Bound{Capacity: 40, Rate: 150},
		},
		{
			point: "slots", flows: 3, pause: 20 * time.Millisecond, work: 20 * time.Millisecond,
			component: policy.ConcurrencyLimiter{Selectors: policy.At("slots"), Max: 5, MaxInflight: time.Hour, LimitBy: "user", OnOutage: policy.OutageClosed},
			slots:     5,
		},
		{
			point: "queue", flows: 3, pause: 10 * time.Millisecond, waits: 500 * time.Millisecond,
			component: policy.QuotaScheduler{Selectors: policy.At("queue"), Capacity: 5, Fill: 40, Interval: time.Second, LimitBy: "user", OnOutage: policy.OutageClosed},
			// What falls to an instance that does not call for it lies in its box for a second, and then goes to others: late.
			bound: witness.Bound{Capacity: 5 + 40, Rate: 40},
		},
		{
			point: "places", flows: 2, pause: 10 * time.Millisecond, work: 20 * time.Millisecond, waits: 500 * time.Millisecond,
			component: policy.ConcurrencyScheduler{Selectors: policy.At("places"), Max: 3, MaxInflight: time.Hour, LimitBy: "user", OnOutage: policy.OutageClosed},
			slots:     3,
		},
	}
}

func policies() (policies []policy.Policy) {
	for _, l := range loads() {
		policies = append(policies, policy.Policy{Name: l.point, Components: []policy.Component{l.component}})
	}
	return policies
}

// users are those whose limits all workers share. In a cluster they are at several servers.
func users() []string { return []string{"ann", "bob", "cid"} }

// work asks at all control points until standard input ends, and prints what it was told: "admitted <point>/<user> <asked> <told>",
// and "held <point>/<user> <told> <returned>", in nanoseconds of the machine's clock, which is that of the server.
func work(ctx context.Context, url string) (err error) {
	store, err := redisstore.Open(ctx, url, redisstore.WithLease(lease))
	for begun := time.Now(); err != nil; store, err = redisstore.Open(ctx, url, redisstore.WithLease(lease)) {
		if time.Since(begun) > time.Minute/2 { // a busy machine may take longer than Open waits
			return err
		}
		pause(ctx, time.Second)
	}
	defer func() { err = firstError(err, store.Close()) }()
	limits, err := engine.New(policies(), engine.WithStore(store))
	if err != nil {
		return err
	}
	defer func() { err = firstError(err, limits.Close()) }()
	client, err := flowctl.New(limits)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	out := &printer{w: bufio.NewWriter(os.Stdout)}
	out.printf("works\n")
	var counts counts
	var flows sync.WaitGroup
	for _, l := range loads() {
		for _, user := range users() {
			for range l.flows {
				flows.Go(func() {
					for pause(ctx, l.pause) {
						l.flow(ctx, client, user, out, &counts)
					}
				})
			}
		}
	}
	flows.Go(func() {
		for pause(ctx, 100*time.Millisecond) {
			out.flush()
		}
	})
	flows.Wait()
	out.printf("counted %d %d %d %d\n", counts.admitted.Load(), counts.rejected.Load(), counts.unanswered.Load(), counts.lost.Load())
	out.flush()
	return nil
}

// counts are what became of a worker's flows.
type counts struct {
	admitted, rejected, unanswered atomic.Int64
	lost                           atomic.Int64 // slots that were not the flow's any more when it ended
}

// flow is one flow of a load.
func (l *load) flow(ctx context.Context, client *flowctl.Client, user string, out *printer, counts *counts) {
	asked := time.Now().UnixNano()
	flow := client.Start(ctx, l.point, flowctl.Params{Labels: map[string]string{"user": user}, CheckTimeout: time.Minute, MaxWait: l.waits, OnUnreachable: flowctl.FailClosed})
	told := time.Now().UnixNano()
	admitted := flow.Decision() == flowctl.Accepted
	switch {
	case admitted:
		counts.admitted.Add(1)
	case unanswered(flow):
		counts.unanswered.Add(1)
	default:
		counts.rejected.Add(1)
	}
	if admitted && l.work > 0 {
		pause(ctx, l.work)
	}
	returned := time.Now().UnixNano()
	// A flow ends also if the worker does.
	_, _ = flow.End(context.WithoutCancel(ctx))
	switch {
	case admitted && l.slots > 0:
		out.printf("held %s/%s %d %d\n", l.point, user, told, returned)
	case admitted:
		out.printf("admitted %s/%s %d %d\n", l.point, user, asked, told)
	}
}

// pause waits for some time around the mean, and reports whether the worker goes on.
func pause(ctx context.Context, mean time.Duration) bool {
	timer := time.NewTimer(time.Duration(rand.Int64N(int64(2*mean) + 1)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// A printer prints whole lines of several goroutines.
type printer struct {
	mu sync.Mutex
	w  *bufio.Writer
}

func (p *printer) printf(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	line := fmt.Appendf(nil, format, args...)
	if p.w.Available() < len(line) { // a worker that is killed has printed whole lines
		_ = p.w.Flush()
	}
	_, _ = p.w.Write(line)
}

func (p *printer) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.w.Flush()
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// unanswered reports whether the flow was rejected because the store did not answer.
func unanswered(flow *flowctl.Flow) bool {
	var rejected *flowctl.RejectedError
	return errors.As(flow.Err(), &rejected) && rejected.Cause() == flowctl.CauseNoStore
}
