// Cache lets many callers ask for a report that takes a second to make, and makes it as seldom as it can.
//
//	go run ./examples/cache
//
// The limit is two runs an hour. Twenty callers come at once: they share one run, which is one flow to the limit. The next
// twenty find its result in the cache, and cost the limit nothing. When the result has expired, one run serves the twenty
// after them. Then the limit is reached, and callers get the last report, though it has expired.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cache:", err)
		os.Exit(1)
	}
}

const (
	callers = 20
	ttl     = time.Second
)

// runs lets two runs an hour in. A quota scheduler does not count flows that find their result in the cache.
var runs = policy.Policy{Name: "report-runs", Components: []policy.Component{policy.QuotaScheduler{
	Selectors: policy.At("report"), Capacity: 2, Fill: 2, Interval: time.Hour,
}}}

func run(ctx context.Context, out io.Writer) error {
	limits, err := engine.New([]policy.Policy{runs})
	if err != nil {
		return err
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	var made atomic.Int64
	report := headgate.Cached(client, "report", flowctl.Params{},
		func(ctx context.Context) (string, error) {
			n := made.Add(1)
			select { // it takes so long to make
			case <-time.After(time.Second):
				return fmt.Sprintf("report %d", n), nil
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}, fallback.Stale[string](time.Hour), headgate.CachePolicy[string]{TTL: ttl})

	fmt.Fprintf(out, "%-30s%8s%10s  %s\n", "callers", "runs", "took", "got")
	for _, round := range []string{"20 at once", "20 more", "20 after it has expired", "20 after two runs"} {
		if round == "20 after it has expired" || round == "20 after two runs" {
			select {
			case <-time.After(ttl + 100*time.Millisecond):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		before, start := made.Load(), time.Now()
		var got [callers]string
		group, ctx := errgroup.WithContext(ctx)
		for i := range got {
			group.Go(func() error {
				var err error
				got[i], err = report(ctx)
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		fmt.Fprintf(out, "%-30s%8d%9.1fs  %s\n", round, made.Load()-before, time.Since(start).Seconds(), tally(got[:]))
	}
	return nil
}

// tally counts equal reports, in the order of their first callers.
func tally(got []string) string {
	counts := make(map[string]int)
	var order []string
	for _, g := range got {
		if counts[g]++; counts[g] == 1 {
			order = append(order, g)
		}
	}
	for i, g := range order {
		order[i] = fmt.Sprintf("%d × %s", counts[g], g)
	}
	return strings.Join(order, ", ")
}
