// Quota lets people and a batch job share a language model that allows so many tokens a second.
//
//	go run ./examples/quota
//
// The batch takes whatever it gets, and waits. People wait for a second at most. Without priorities, the batch is
// before them in the queue, and they give up. With priorities they hardly wait, and the batch gets the rest. The tokens
// are used up either way: 1000 a second, and the 1000 that the bucket holds when they begin. Prompts cost what their
// label says. The policies are in policy.yaml beside this file.
package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
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
		fmt.Fprintln(os.Stderr, "quota:", err)
		os.Exit(1)
	}
}

//go:embed policy.yaml
var limits []byte

// A job is a number of equal callers. Each asks for one answer after the other.
type job struct {
	name    string
	callers int
	tokens  int           // that a prompt and its answer take
	pause   time.Duration // before the next prompt
	maxWait time.Duration // that a caller waits; below 0: as long as it takes
}

var jobs = []job{
	{name: "chat", callers: 3, tokens: 100, pause: 500 * time.Millisecond, maxWait: time.Second},
	{name: "batch", callers: 8, tokens: 400, maxWait: -1},
}

// A prompt is one call of the model.
type prompt struct {
	job  *job
	sent time.Time
}

func describe(_ context.Context, p prompt) flowctl.Params {
	return flowctl.Params{
		Labels:        map[string]string{"job": p.job.name, "tokens": strconv.Itoa(p.job.tokens)},
		MaxWait:       p.job.maxWait,
		OnUnreachable: flowctl.FailClosed, // it is the quota of a third party
	}
}

// ask would ask the model. It returns how long the prompt has waited.
func ask(_ context.Context, p prompt) (time.Duration, error) { return time.Since(p.sent), nil }

// A tally is what became of a job's prompts.
type tally struct {
	answered, rejected int
	waited             time.Duration
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("quota", flag.ContinueOnError)
	last := flags.Duration("for", 5*time.Second, "how long they ask")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	if *last < time.Second {
		return fmt.Errorf("-for %v: less than a second shows nothing", *last)
	}
	policies, err := policy.Parse("policy.yaml", limits)
	if err != nil {
		return err
	}
	e, err := engine.New(policies)
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	fmt.Fprintf(stdout, "1000 tokens a second for %d people who chat and a batch, during %v:\n\n", jobs[0].callers, *last)
	points := []string{"model-in-order", "model"}
	tallies := make([][]tally, len(points))
	var asking sync.WaitGroup // at both control points at once: they have a quota each
	for i, point := range points {
		guarded := headgate.GuardFunc(client, point, describe, ask, nil)
		asking.Go(func() { tallies[i] = demand(ctx, guarded, *last) })
	}
	asking.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for i, title := range []string{"first come, first served", "by priority"} {
		fmt.Fprintf(stdout, "%-26s%9s%9s%11s%12s\n", title, "answered", "gave up", "mean wait", "tokens/s")
		for k, t := range tallies[i] {
			rate := float64(t.answered*jobs[k].tokens) / last.Seconds()
			wait := t.waited / time.Duration(max(t.answered, 1))
			fmt.Fprintf(stdout, "  %-24s%9d%9d%10.2fs%12.0f  %s\n", jobs[k].name, t.answered, t.rejected, wait.Seconds(),
				rate, strings.Repeat("█", int(rate/50+0.5)))
		}
	}
	return nil
}

// demand makes the callers of all jobs ask for a while.
func demand(ctx context.Context, ask func(context.Context, prompt) (time.Duration, error), last time.Duration) []tally {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	end := time.AfterFunc(last, cancel) // a deadline would reject flows that cannot be in time
	defer end.Stop()
	var mu sync.Mutex
	tallies := make([]tally, len(jobs))
	var callers sync.WaitGroup
	for i := range jobs {
		for range jobs[i].callers {
			callers.Go(func() {
				for ctx.Err() == nil {
					waited, err := ask(ctx, prompt{&jobs[i], time.Now()})
					mu.Lock()
					switch t := &tallies[i]; {
					case err == nil:
						t.answered++
						t.waited += waited
					case errors.Is(err, flowctl.ErrRejected):
						t.rejected++
					}
					mu.Unlock()
					select {
					case <-time.After(jobs[i].pause):
					case <-ctx.Done():
					}
				}
			})
		}
	}
	callers.Wait()
	return tallies
}
