// Fleet has several processes share one limit of 10 calls a second. Start a Redis server, and run this in two terminals:
//
//	redis-server --maxmemory-policy noeviction --save ""
//	go run ./redisstore/examples/fleet redis://localhost:6379
//
// Each process calls as fast as it can, and prints each second how many of its calls ran. Together they are 10. Stop the server to
// see what a process does alone: its part of the limit.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
)

// limits hold for all processes together.
var limits = []policy.Policy{{Name: "api", Components: []policy.Component{policy.RateLimiter{
	Selectors: policy.At("call"), Capacity: 10, Fill: 10, Interval: time.Second,
}}}}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	url := "redis://localhost:6379"
	if len(os.Args) > 1 {
		url = os.Args[1]
	}
	if err := run(ctx, url, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// run calls until ctx ends.
func run(ctx context.Context, url string, stdout io.Writer) error {
	store, err := redisstore.Open(ctx, url, redisstore.WithLogger(slog.Default()))
	if err != nil {
		return err
	}
	defer store.Close()
	e, err := engine.New(limits, engine.WithStore(store), engine.WithLogger(slog.Default()))
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close(context.WithoutCancel(ctx)) }()

	ran := 0
	call := headgate.Guard(client, "call", flowctl.Params{}, func(context.Context) (int, error) {
		ran++
		return ran, nil
	}, nil)
	report := time.NewTicker(time.Second)
	defer report.Stop()
	for ctx.Err() == nil {
		if _, err := call(ctx); err != nil && !errors.Is(err, flowctl.ErrRejected) && ctx.Err() == nil {
			return err
		}
		select {
		case <-report.C:
			fmt.Fprintf(stdout, "%d calls of this process ran\n", ran)
			ran = 0
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}
