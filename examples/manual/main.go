// Manual starts and ends flows by hand, for code that does not fit into a closure for headgate.Guard or headgate.Do.
//
//	go run ./examples/manual
//
// Watch the fourth upload: its flow is rejected, and accepted once the program has waited for exactly the time that the
// rejection says. The limit is a policy written in Go; no file is needed.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "manual:", err)
		os.Exit(1)
	}
}

// uploads lets each user upload 3 files at once, and 2 more each second.
var uploads = policy.Policy{Name: "uploads", Components: []policy.Component{policy.RateLimiter{
	Selectors: policy.At("upload"), Capacity: 3, Fill: 2, Interval: time.Second, LimitBy: "user_id",
}}}

func run(ctx context.Context, out io.Writer) error {
	e, err := engine.New([]policy.Policy{uploads})
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(ctx)

	// Flows that start with this context are alice's, however deep in the calls: no function has to pass her on.
	ctx = labels.With(ctx, "user_id", "alice")

	files := []string{"a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"}
	for len(files) > 0 {
		err := upload(ctx, client, out, files[0])
		if wait, ok := fallback.RetryAfter(err); ok {
			select {
			case <-time.After(wait):
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err != nil {
			return err
		}
		files = files[1:]
	}
	return nil
}

// upload is one flow. Its result has a name for EndWith, which ends the flow however upload ends, and learns from err
// how it went.
func upload(ctx context.Context, client *flowctl.Client, out io.Writer, name string) (err error) {
	flow := client.Start(ctx, "upload", flowctl.Params{})
	defer flow.EndWith(&err)

	if !flow.ShouldRun() {
		fmt.Fprintf(out, "%s  %s, retry after %s\n", name, flow.Decision(), flow.RetryAfter().Round(time.Millisecond))
		return flow.Err()
	}
	// Here goes the work, with flow.Context(). If it fails, return its error: the flow ends as failed.
	fmt.Fprintf(out, "%s  %s, uploaded\n", name, flow.Decision())
	return nil
}
