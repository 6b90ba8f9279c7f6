// Worker calls an API that takes 10 calls a second and 6 at a time, from several processes together.
//
//	cd examples/worker
//	go run .
//
// It starts an agent and three workers, which are processes of their own. Then it kills one of them, and later it has the
// agent start again. A witness, which stands for the API, prints each second what is in flight. It takes some 25 s.
//
// Without an agent, the limits can be in a store, which is a server of Redis or Valkey. The program starts one if it gets the name of
// its program, kills it, and starts it again. It leaves one alone that it gets the URL of:
//
//	go run . -store redis-server
//	go run . -store redis://localhost:6379
//
// Limits.go, worker.go, and agent.go or store.go are the parts to copy. To play with them, give each part a terminal:
//
//	go build && mkdir jobs && touch jobs/{1..500}.job
//	./worker -witness 127.0.0.1:8090
//	./worker -serve 127.0.0.1:8089 -hold-off 10s
//	./worker -agent 127.0.0.1:8089 -api http://127.0.0.1:8090 -jobs jobs
//
// The last one can run in any number of terminals. Kill what you like. With a store, the last two are:
//
//	redis-server --appendonly yes
//	./worker -store redis://localhost:6379 -api http://127.0.0.1:8090 -jobs jobs
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, os.Args[1:], os.Stdout)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "worker:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("worker", flag.ContinueOnError)
	address := flags.String("serve", "", "be the agent, at this `address`")
	state := flags.String("state", "worker.state", "`file` in which the agent remembers what limits hold")
	holdOff := flags.Duration("hold-off", 0, "`time` in which the agent admits no calls after it was killed, because calls of before may still run")
	agent := flags.String("agent", "", "be a worker, whose agent is at this `address`")
	store := flags.String("store", "", "keep the limits in the store at this `URL`, without an agent: be a worker if there is an -api. "+
		"Otherwise show all, and start the server if this is its program, such as redis-server")
	api := flags.String("api", "", "`URL` of the API that the worker calls")
	jobs := flags.String("jobs", "jobs", "`directory` that the worker takes jobs from")
	witness := flags.String("witness", "", "be the API, at this `address`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("what is %q?", flags.Arg(0))
	case *address != "":
		return serve(ctx, *address, *state, *holdOff, stdout)
	case *agent != "":
		client, err := dial(*agent)
		if err != nil {
			return err
		}
		return work(ctx, client, *api, *jobs)
	case *store != "" && *api != "":
		client, stop, err := embed(ctx, *store)
		if err != nil {
			return err
		}
		return errors.Join(work(ctx, client, *api, *jobs), stop())
	case *witness != "":
		w, stop, err := newWitness(ctx, *witness, stdout)
		if err != nil {
			return err
		}
		w.say("Calls take 1 s at %s.", w.url)
		w.slow(time.Second)
		<-ctx.Done()
		return stop()
	default:
		return show(ctx, *store, stdout)
	}
}
