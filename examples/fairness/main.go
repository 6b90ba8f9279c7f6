// Fairness lets tenants of very unequal demand share a few slots.
//
//	go run ./examples/fairness
//
// Each caller of a tenant makes one call after the other, and there are more callers than slots. Without fairness,
// tenants with more callers get more. With the tenant as the fairness label all get the same, and no slot is idle.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "fairness:", err)
		os.Exit(1)
	}
}

const (
	slots = 4
	takes = 20 * time.Millisecond // a call
)

// The control points: at one all calls wait in one queue, at the other each tenant has its share.
var points = []string{"query-in-order", "query"}

func policies() []policy.Policy {
	var list []policy.Policy
	for i, fairness := range []string{"", "tenant"} {
		list = append(list, policy.Policy{Name: points[i], Components: []policy.Component{policy.ConcurrencyScheduler{
			Selectors: policy.At(points[i]), Max: slots, MaxInflight: time.Minute,
			Scheduler: policy.Scheduler{FairnessLabel: fairness},
		}}})
	}
	return list
}

// A tenant has so many callers.
type tenant struct {
	name    string
	callers int
}

var tenants = []tenant{{"small", 2}, {"medium", 4}, {"large", 8}, {"huge", 16}, {"greedy", 32}}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("fairness", flag.ContinueOnError)
	last := flags.Duration("for", 3*time.Second, "how long they call")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	if *last < time.Second {
		return fmt.Errorf("-for %v: less than a second shows nothing", *last)
	}
	e, err := engine.New(policies())
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	fmt.Fprintf(stdout, "%d slots for calls of %v, during %v\n\n", slots, takes, *last)
	calls := make([][]int64, len(points))
	var calling sync.WaitGroup // at both control points at once: they have slots each
	for i, point := range points {
		calling.Go(func() { calls[i] = demand(ctx, client, point, *last) })
	}
	calling.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	fmt.Fprintf(stdout, "%-8s%8s  %-32s%s\n", "tenant", "callers", "first come, first served", "fair")
	for k, t := range tenants {
		fmt.Fprintf(stdout, "%-8s%8d  %-32s%s\n", t.name, t.callers, bar(share(calls[0], k)), bar(share(calls[1], k)))
	}
	fmt.Fprintf(stdout, "slots were busy   %-32s%s\n", busy(calls[0], *last), busy(calls[1], *last))
	return nil
}

// demand makes all tenants call for a while, and counts the calls of each.
func demand(ctx context.Context, client headgate.Starter, point string, last time.Duration) []int64 {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	end := time.AfterFunc(last, cancel)
	defer end.Stop()
	counts := make([]atomic.Int64, len(tenants))
	var callers sync.WaitGroup
	for k, t := range tenants {
		params := flowctl.Params{
			Labels:  map[string]string{"tenant": t.name},
			MaxWait: -1, // they wait as long as it takes
		}
		call := headgate.Guard(client, point, params, func(ctx context.Context) (int64, error) {
			select {
			case <-time.After(takes):
				return counts[k].Add(1), nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}, nil)
		for range t.callers {
			callers.Go(func() {
				for ctx.Err() == nil {
					_, _ = call(ctx) // it fails only when the time is up
				}
			})
		}
	}
	callers.Wait()
	calls := make([]int64, len(tenants))
	for k := range calls {
		calls[k] = counts[k].Load()
	}
	return calls
}

func sum(calls []int64) (all int64) {
	for _, n := range calls {
		all += n
	}
	return all
}

// share is the percentage of all calls that one tenant made.
func share(calls []int64, tenant int) float64 {
	return 100 * float64(calls[tenant]) / float64(max(sum(calls), 1))
}

func bar(percentage float64) string {
	return fmt.Sprintf("%3.0f %% %s", percentage, strings.Repeat("█", int(percentage/2.5+0.5)))
}

// busy is how much of the slots' time the calls took.
func busy(calls []int64, last time.Duration) string {
	return fmt.Sprintf("%3.0f %%", 100*float64(sum(calls))*takes.Seconds()/(slots*last.Seconds()))
}
