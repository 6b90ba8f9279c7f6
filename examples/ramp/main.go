// Ramp lets more and more users into something new, and takes some of them out again.
//
//	go run ./examples/ramp
//
// Each column is a user. If the user's flow was accepted, it has the first letter of the name. The name decides whether
// a user is in. So users who are in stay in while the ramp goes up, and the last to come in are the first to go out
// when it goes down. The ramp is that of a policy. This program moves it, as an operator would.
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
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "ramp:", err)
		os.Exit(1)
	}
}

// newPage lets everybody in four seconds after it has begun. Tester is in from the start.
var newPage = policy.Policy{Name: "new-page", Components: []policy.Component{policy.LoadRamp{
	Selectors: policy.At("page"), SessionLabel: "user_id", PassThroughValues: []string{"tester"},
	Steps: []policy.RampStep{{Target: 0}, {Target: 100, Duration: 4 * time.Second}},
}}}

var users = strings.Fields("alice bob carol dave erin frank grace heidi ivan judy ken leo mallory niaj olivia peggy " +
	"quentin rupert sybil tester ursula victor walter xavier yves zoe")

// A move is what the operator does with the ramp, and how long it goes on.
type move struct {
	name string
	do   func(*engine.Ramp, context.Context) error
	last time.Duration
}

var moves = []move{
	{"forward", (*engine.Ramp).Forward, 2400 * time.Millisecond},
	{"hold", (*engine.Ramp).Hold, 800 * time.Millisecond},
	{"backward", (*engine.Ramp).Backward, 1200 * time.Millisecond},
	{"forward", (*engine.Ramp).Forward, 2800 * time.Millisecond},
}

const every = 400 * time.Millisecond // a row

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("ramp", flag.ContinueOnError)
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	e, err := engine.New([]policy.Policy{newPage})
	if err != nil {
		return err
	}
	defer e.Close()
	component, err := e.Component("new-page", "load_ramp.0")
	if err != nil {
		return err
	}
	ramp, ok := component.Ramp()
	if !ok {
		return errors.New("the component is not a load ramp")
	}
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	// In ramp mode only users that a ramp lets in get the new page. If there is no answer, no user gets it.
	page := headgate.GuardFunc(client, "page",
		func(_ context.Context, user string) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"user_id": user}, RampMode: true}
		},
		func(_ context.Context, user string) (string, error) { return user[:1], nil },
		fallback.For[string](fallback.Value("·"))) // the old page

	fmt.Fprintf(stdout, "%-10s%6s\n", "the ramp", "at")
	for _, m := range moves {
		if err := m.do(ramp, ctx); err != nil {
			return err
		}
		for range m.last / every {
			select {
			case <-time.After(every):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			fmt.Fprintf(stdout, "%-10s%4.0f %%  ", m.name, ramp.Percentage())
			for _, user := range users {
				cell, err := page(ctx, user)
				if err != nil {
					return err
				}
				fmt.Fprint(stdout, " "+cell)
			}
			fmt.Fprintln(stdout)
		}
	}
	return nil
}
