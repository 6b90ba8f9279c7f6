// Overload asks a service for twice as much as it can do.
//
//	go run ./examples/overload
//
// The service serves one call after the other. Callers give up after a quarter of a second, but the service still does
// their work. So when it admits everything, no caller gets an answer in time any more. When it admits a share that it
// can bear, most of the admitted callers do. A fixed share is a guess, and rejects calls when there is no need. With
//
//	go run ./examples/overload -aimd
//
// which takes two minutes, a load scheduler finds the share. It knows only how many calls are waiting in the service.
// While there are more than five, it admits less. Otherwise it admits more, by steps that grow until it is too much
// again. So the share goes up and down, and small steps keep it from going far. The scheduler looks every ten seconds.
// In the first half minute, when callers ask for less than the service can do, it learns what is usual.
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
		fmt.Fprintln(os.Stderr, "overload:", err)
		os.Exit(1)
	}
}

const (
	takes    = 20 * time.Millisecond // a call, of the service's time: it can do 50 a second
	patience = 250 * time.Millisecond
	usual    = 25 * time.Millisecond // between calls
	rush     = 10 * time.Millisecond
)

// A service works off one call after the other.
type service struct {
	mu    sync.Mutex
	ready time.Time // when all calls so far are served
}

// backlog is how many calls wait to be served.
func (s *service) backlog() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(time.Until(s.ready).Seconds()/takes.Seconds(), 0)
}

var errLate = errors.New("no answer in time")

// serve answers a call when those before it have been served. A caller that gives up does not save the service the
// work.
func (s *service) serve(ctx context.Context) (string, error) {
	s.mu.Lock()
	if now := time.Now(); s.ready.Before(now) {
		s.ready = now
	}
	s.ready = s.ready.Add(takes)
	wait := time.Until(s.ready)
	s.mu.Unlock()
	select {
	case <-time.After(min(wait, patience)):
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if wait > patience {
		return "", errLate
	}
	return "answer", nil
}

// A lane is a service of its own behind its own guard.
type lane struct {
	title string
	service
	call   func(context.Context) (string, error)
	inTime atomic.Int64
}

func policies(aimd *lane) []policy.Policy {
	list := []policy.Policy{{Name: "fixed-share", Components: []policy.Component{
		policy.Sampler{Selectors: policy.At("40 % let in"), AcceptPercentage: 40},
	}}}
	if aimd != nil {
		list = append(list, policy.Policy{Name: "protect-service", Components: []policy.Component{policy.AIMDLoadScheduler{
			Selectors: policy.At(aimd.title), Signal: policy.Named("backlog"), Setpoint: policy.Constant(5), LinearIncrement: 0.01,
			Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}}, // waiting is the service's
		}}})
	}
	return list
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("overload", flag.ContinueOnError)
	find := flags.Bool("aimd", false, "show a load scheduler too, which takes two minutes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	lanes := []*lane{{title: "all let in"}, {title: "40 % let in"}}
	quiet, last, row := time.Duration(0), 6*time.Second, time.Second
	var opts []engine.Option
	var aimd *lane
	if *find {
		aimd = &lane{title: "load scheduler"}
		lanes = append(lanes, aimd)
		opts = append(opts, engine.WithSignal("backlog", aimd.backlog))
		quiet, last, row = 35*time.Second, 120*time.Second, 5*time.Second
	}
	e, err := engine.New(policies(aimd), opts...)
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	fmt.Fprintf(stdout, "A service can do %d calls a second. So many are answered in time:\n\n", time.Second/takes)
	var header strings.Builder
	fmt.Fprintf(&header, "%6s%9s", "", "asked/s")
	for _, l := range lanes {
		l.call = headgate.Guard(client, l.title, flowctl.Params{}, l.serve, nil)
		fmt.Fprintf(&header, "  %-20s", l.title)
	}
	fmt.Fprintln(stdout, strings.TrimRight(header.String(), " "))

	var calls sync.WaitGroup
	defer calls.Wait()
	tick := time.NewTicker(row)
	defer tick.Stop()
	asked := 0
	start := time.Now()
	for next := start; next.Before(start.Add(last)); {
		for _, l := range lanes {
			calls.Go(func() {
				if _, err := l.call(ctx); err == nil {
					l.inTime.Add(1)
				}
			})
		}
		asked++
		if next.Before(start.Add(quiet)) {
			next = next.Add(usual)
		} else {
			next = next.Add(rush)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Until(next)):
		}
		select {
		case <-tick.C:
			var line strings.Builder
			fmt.Fprintf(&line, "%5.0fs%9.0f", time.Since(start).Seconds(), float64(asked)/row.Seconds())
			for _, l := range lanes {
				rate := float64(l.inTime.Swap(0)) / row.Seconds()
				fmt.Fprintf(&line, "  %3.0f %-16s", rate, strings.Repeat("█", int(rate/4+0.5)))
			}
			fmt.Fprintln(stdout, strings.TrimRight(line.String(), " "))
			asked = 0
		default:
		}
	}
	return nil
}
