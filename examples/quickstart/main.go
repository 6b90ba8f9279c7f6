// Quickstart guards one function, and lets three users call it more often than two of them may.
//
//	go run ./examples/quickstart
//
// Look at bob: his rejection says when to retry, and then he gets through. Carol need not retry: beyond her limit she
// gets a fallback. The limits are in policy.yaml beside this file. Change one and run it again, or take the limits from
// elsewhere:
//
//	go run ./examples/quickstart -policies my-policies/
//
// An engine in this process decides. The same code can ask an agent that speaks the Aperture protocol, and that has
// policies of its own:
//
//	go run ./examples/quickstart -agent localhost:8089
//
// It asks in plaintext on this machine, and by TLS elsewhere. The agent must be there when the program starts. For an
// agent that wants a key, set APERTURE_AGENT_ADDRESS and APERTURE_API_KEY instead of the flag, and
// APERTURE_AGENT_INSECURE=true for plaintext: see flowctl.DialEnv.
package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

type user struct{ name, tier string }

// recommend is the work to protect: imagine that it is slow. It returns why it ran, which this program prints:
// "accepted", or "unreachable" if no agent answered. In that case it runs too, unless its Params say otherwise.
func recommend(ctx context.Context, _ user) (string, error) {
	flow, _ := flowctl.FromContext(ctx)
	return flow.Decision().String(), nil
}

// describe tells the policies whose call it is.
func describe(_ context.Context, u user) flowctl.Params {
	return flowctl.Params{Labels: map[string]string{"user_id": u.name, "user_tier": u.tier}}
}

// instead is what users get if recommend may not run. Paying users get the error, which says when to retry. The others
// get something that is ready.
func instead(ctx context.Context, u user, err error) (string, error) {
	if u.tier == "free" {
		return bestsellers(ctx, err)
	}
	return "", err
}

// bestsellers would be a list that is the same for everybody; here it is the word to print.
var bestsellers = fallback.Value("fallback")

// demonstrate makes three users call recommend in two bursts. Between the bursts their limits recover.
func demonstrate(ctx context.Context, client headgate.Starter, out io.Writer) error {
	guarded := headgate.GuardFunc(client, "recommend", describe, recommend, instead)

	users := []user{{"alice", "gold"}, {"bob", "silver"}, {"carol", "free"}}
	headings := []any{""}
	counts := make(map[user]map[string]int)
	for _, u := range users {
		headings = append(headings, u.name+" ("+u.tier+")")
		counts[u] = make(map[string]int)
	}
	defer summarize(out, users, counts) // also if Ctrl-C ends it early

	const row = "%-7s%-26s%-26s%s\n"
	start := time.Now()
	for _, burst := range []time.Duration{0, 2 * time.Second} {
		fmt.Fprintf(out, "\n"+row, headings...)
		for n := range 8 {
			due := burst + time.Duration(n)*100*time.Millisecond
			if err := sleep(ctx, due-time.Since(start)); err != nil {
				return err
			}
			cells := []any{fmt.Sprintf("%.2fs", time.Since(start).Seconds())}
			for _, u := range users {
				outcome, detail, err := classify(guarded(ctx, u))
				if err != nil {
					return err
				}
				counts[u][outcome]++
				cells = append(cells, outcome+detail)
			}
			fmt.Fprintf(out, row, cells...)
		}
	}
	return nil
}

// classify says in a word what became of a call, and what there is to add.
func classify(result string, err error) (outcome, detail string, _ error) {
	if !errors.Is(err, flowctl.ErrRejected) {
		return result, "", err
	}
	if wait, ok := fallback.RetryAfter(err); ok {
		detail = ", retry in " + wait.Round(time.Millisecond).String()
	}
	return "rejected", detail, nil
}

func summarize(out io.Writer, users []user, counts map[user]map[string]int) {
	fmt.Fprintf(out, "\n%-8s%-8s%10s%10s%10s\n", "user", "tier", "accepted", "rejected", "fallback")
	unanswered := 0
	for _, u := range users {
		c := counts[u]
		fmt.Fprintf(out, "%-8s%-8s%10d%10d%10d\n", u.name, u.tier, c["accepted"], c["rejected"], c["fallback"])
		unanswered += c["unreachable"]
	}
	if unanswered > 0 {
		fmt.Fprintf(out, "\n%d calls ran although no agent answered: flows fail open by default.\n", unanswered)
	}
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// run makes the client, of an agent or an engine, and demonstrates.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("quickstart", flag.ExitOnError)
	agent := flags.String("agent", "", "ask the agent at `host:port`, in plaintext if that is this machine")
	policies := flags.String("policies", "", "take the limits from this `file` or directory")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	if *agent != "" && *policies != "" {
		return errors.New("-agent and -policies exclude each other: an agent has policies of its own")
	}

	// The client logs an agent that does not answer, or refuses to.
	logger := flowctl.WithLogger(slog.New(slog.NewTextHandler(stderr, nil)))
	var client *flowctl.Client
	var decider string
	switch address := cmp.Or(*agent, os.Getenv("APERTURE_AGENT_ADDRESS")); {
	case address != "" && *policies == "":
		var err error
		if client, err = dial(*agent, logger); err != nil {
			return err
		}
		decider = "the policies of the agent at " + address
	default:
		e, err := load(*policies)
		if err != nil {
			return err
		}
		defer e.Close()
		for _, warning := range e.Warnings() {
			fmt.Fprintln(stderr, "warning:", warning)
		}
		if client, err = flowctl.New(e, logger); err != nil {
			return err
		}
		decider = cmp.Or(*policies, "examples/quickstart/policy.yaml") + ": change a limit and run this again"
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		client.Close(ctx) // the client logs what it can no longer send
	}()

	fmt.Fprintf(stdout, `Three users call one function ten times a second. The limits come from
%s.
A rejected call of a free user gets a fallback. Others get the time to retry.
`, decider)
	ready, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := client.Ready(ready); err != nil {
		return err
	}
	return demonstrate(ctx, client, stdout)
}

// dial connects to the agent at the address, or else to the one that the environment names.
func dial(address string, opts ...flowctl.Option) (*flowctl.Client, error) {
	if address == "" {
		return flowctl.DialEnv(opts...)
	}
	// Agents beside the program seldom have a certificate.
	host, _, _ := net.SplitHostPort(address)
	if host == "localhost" || net.ParseIP(host).IsLoopback() {
		opts = append(opts, flowctl.WithInsecure())
	}
	return flowctl.Dial(address, opts...)
}

//go:embed policy.yaml
var defaultPolicy []byte

// load makes an engine of the policies at the path, or else of the one that comes with this program.
func load(path string) (*engine.Engine, error) {
	if path != "" {
		return engine.Load(path)
	}
	policies, err := policy.Parse("policy.yaml", defaultPolicy)
	if err != nil {
		return nil, err
	}
	return engine.New(policies)
}
