// Bench measures the store in Redis beside its peers and beside bare scripts, in one run against one server that it starts, and
// prints one table with each ratio that Headgate sets itself as a target, marked met or missed.
//
//	make bench-fleet
//
// It needs redis-server. Machines differ and are noisy, so only ratios of one run are meaningful. Bench is a module of its own, so
// that users of the store do not get its peers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// inFlight is how many calls are in flight in parallel.
const inFlight = 64

func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	rounds := flags.Int("rounds", 9, "how often each row is measured")
	each := flags.Duration("time", 200*time.Millisecond, "how long each row is measured in a round")
	keys := flags.Int("keys", 100_000, "how many keys the server's memory is measured with")
	saturating := flags.Int("calls", 20_000, "how many calls the server's processor time is measured with")
	only := flags.String("rows", "", "measure only the rows whose names match this regular expression")
	if err := flags.Parse(args); err != nil {
		return err
	}
	rows, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-rows: %w", err)
	}
	if flag.Lookup("test.benchtime") == nil {
		testing.Init()
	}

	var p program
	defer func() { err = errors.Join(err, p.end(recover())) }()
	server := redistest.Start(&p, redistest.Options{})
	peers, err := openPeers(ctx, server)
	if err != nil {
		return err
	}
	defer peers.close()
	ours, err := openOurs(ctx, server, redistest.Start(&p, redistest.Options{}))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ours.close()) }()

	t := benchtable.Table{Only: rows}
	if err := t.Measure(ctx, *rounds, *each, slices.Concat(ours.rows(), peers.rows())); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s, %s/%s, %d processors, %s, redis-server %s on the same processors; median of %d rounds of %v a row\n\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), benchtable.Processor(), server.Info("redis_version"), *rounds, *each)
	t.Print(stdout)
	fmt.Fprintf(stdout, "\nIn parallel is %d calls in flight; ns/op is then the time of the run over its calls. By itself, a row that calls the server is measured by single calls, in turn with the other such rows. A ratio is the median of the ratios of the rounds.\n", inFlight)
	busy := slices.DeleteFunc(slices.Concat(ours.rows(), peers.rows()), func(r *benchtable.Row) bool {
		return !rows.MatchString(r.Name) || r.Name == doLocal || r.Name == doStopped
	})
	if err := measureServer(stdout, server, busy, *saturating); err != nil {
		return err
	}
	if err := measureLeases(ctx, stdout, server, ours.shared[:], 2*time.Duration(*rounds)**each); err != nil {
		return err
	}
	if err := measureQueues(ctx, stdout, server, ours.shared, 2*time.Duration(*rounds)**each, time.Second/2); err != nil {
		return err
	}
	return measureMemory(ctx, stdout, server, *keys)
}

// A program stands for a test to redistest. It fails by a panic, which run turns into an error.
type program struct {
	cleanups []func()
}

// A failure is what a program has failed by.
type failure struct{ error }

func (*program) Helper() {}

func (p *program) TempDir() string {
	dir, err := os.MkdirTemp("", "headgate-bench-")
	if err != nil {
		p.Fatalf("%v", err)
	}
	p.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (p *program) Cleanup(f func()) { p.cleanups = append(p.cleanups, f) }

func (*program) Skipf(format string, args ...any) { panic(failure{fmt.Errorf(format, args...)}) }

func (*program) Fatalf(format string, args ...any) { panic(failure{fmt.Errorf(format, args...)}) }

// end cleans up, and returns what the program has failed by, if that is what it has panicked with.
func (p *program) end(panicked any) error {
	for i := range p.cleanups {
		p.cleanups[len(p.cleanups)-1-i]()
	}
	if f, failed := panicked.(failure); failed {
		return f
	}
	if panicked != nil {
		panic(panicked)
	}
	return nil
}
