// Bench measures Headgate beside its peers and beside bare gRPC calls, in one run, and prints one table with each ratio
// that Headgate sets itself as a target, marked met or missed.
//
//	make bench
//
// Machines differ and are noisy, so only ratios of one run are meaningful. All rows take turns, for several rounds. The
// table shows the median over the rounds. A ratio is the median of the ratios of the rounds, which is another number than
// the ratio of two medians. Bench is a module of its own, so that users of Headgate do not get its peers.
package main

import (
	"context"
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
	"unsafe"

	"github.com/headgate-go/headgate/internal/testing/benchtable"
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

// overGRPC is how many times as long the rows over gRPC take. A goroutine's first calls make its stack grow, which
// would dominate a short row of long calls.
const overGRPC = 8

// liveBytes is what all rows, and the agent, have on the heap besides what they measure. Go collects when the heap has
// grown by what is live. A program with nothing on its heap collects every 4 MiB, which no service does.
const liveBytes = 16 << 20

// A live object is one of many that the collector follows.
type live struct {
	next *live
	_    [56]byte
}

// liveHeap makes a list of so many.
func liveHeap() (list *live) {
	for range liveBytes / unsafe.Sizeof(live{}) {
		list = &live{next: list}
	}
	return list
}

func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	rounds := flags.Int("rounds", 15, "how often each row is measured")
	each := flags.Duration("time", 60*time.Millisecond, "how long each row is measured in a round")
	keys := flags.Int("keys", 1_000_000, "how many keys the limiter with many of them has")
	only := flags.String("rows", "", "measure only the rows whose names match this regular expression")
	serve := flags.Bool("serve", false, "be the agent that the rows over gRPC ask")
	if err := flags.Parse(args); err != nil {
		return err
	}
	live := liveHeap()
	defer runtime.KeepAlive(live)
	if *serve {
		return serveAgent(ctx, stdout)
	}
	rows, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-rows: %w", err)
	}
	if flag.Lookup("test.benchtime") == nil {
		testing.Init()
	}

	e, err := openEngines(ctx, *keys)
	if err != nil {
		return err
	}
	defer e.close()
	r, err := openRemotes(ctx)
	if err != nil {
		return err
	}
	defer func() { err = firstError(err, r.close(ctx)) }()

	t := benchtable.Table{Only: rows}
	if err := t.Measure(ctx, *rounds, *each, slices.Concat(e.rows(), e.adaptorRows())); err != nil {
		return err
	}
	if err := t.Measure(ctx, *rounds, overGRPC**each, r.rows()); err != nil {
		return err
	}
	if err := measureQueues(ctx, &t, *rounds, *each); err != nil {
		return err
	}
	if err := e.fill(*keys); err != nil {
		return err
	}
	if err := t.Measure(ctx, *rounds, *each, e.userRows()); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s, %s/%s, %d processors, %s; median of %d rounds of %v a row, %v over gRPC\n\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), benchtable.Processor(), *rounds, *each, overGRPC**each)
	t.Print(stdout)
	fmt.Fprintf(stdout, "\nIn parallel is %d calls in flight over gRPC, and one for each processor elsewhere; ns/op is then the time of the run over its calls.\n", inFlight)
	fmt.Fprintln(stdout, "A ratio is the median of the ratios of the rounds, not the ratio of two medians. It is not clear if the bound is within the middle half of the rounds.")
	fmt.Fprintf(stdout, "All rows, and the agent, have %d MiB of live objects on the heap besides.\n", liveBytes>>20)
	fmt.Fprintln(stdout, "Queue and wake is the time from one flow that gets the only slot to the next.")
	if check := t.Row(bareCheck); check != nil {
		fmt.Fprintf(stdout, "agent, %d in flight: %.0f checks a second, client and agent on the same processors\n",
			inFlight, 1e9/benchtable.Median(check.Parallel))
	}
	if err := measureSlots(ctx, stdout, time.Duration(*rounds)*overGRPC**each); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "limiter with %d keys: %.0f bytes a key beyond its text; target ≤ 96: %s\n",
		*keys, e.bytesPerKey, benchtable.Verdict(e.bytesPerKey <= 96))
	fmt.Fprintf(stdout, "limiter with %d keys in debt: %.0f bytes a key beyond its text; target ≤ 96: %s\n",
		*keys, e.bytesPerDebt, benchtable.Verdict(e.bytesPerDebt <= 96))
	return nil
}

// measureQueues keeps flows waiting only while their rows are measured, because they fill the heap.
func measureQueues(ctx context.Context, t *benchtable.Table, rounds int, each time.Duration) (err error) {
	q, err := openQueues(ctx)
	if err != nil {
		return err
	}
	defer func() { err = firstError(err, q.close()) }()
	return t.Measure(ctx, rounds, each, q.list)
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
