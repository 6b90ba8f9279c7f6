// Agent serves an engine to other processes, so that they share one set of limits.
//
//	go run ./examples/agent
//
// Then, in two more terminals, start this at about the same time:
//
//	go run ./examples/quickstart -agent localhost:8089
//
// Compare what bob gets with what he gets when quickstart runs alone: both programs share his limit.
//
// A hangup signal (kill -HUP) makes it read the policies again. It serves gRPC's health service, by which a balancer
// learns that it serves, or that it has begun to stop. It also serves gRPC's reflection, by which tools such as grpcurl
// find its methods.
//
// With -keys it answers only clients that have an API key. The keys are in a file, because everybody on the machine can
// see a command line. Each line has a name and a key.
//
// With -state it keeps what its limits hold in a file, and goes on from there when it starts again. With -hold-off it admits no
// flows to concurrency limits for that long after it was killed, because flows of before may still run.
//
// It listens on this machine only, in plaintext. To serve other machines, also give agent.WithCredentials.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	err := run(ctx, policy.Load, os.Args[1:], hangup, os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// A reader reads policies, as policy.Load does.
type reader func(paths ...string) ([]policy.Policy, error)

// run serves until ctx ends, and reads the policies again at each hangup.
func run(ctx context.Context, read reader, args []string, hangup <-chan os.Signal, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	listen := flags.String("listen", "127.0.0.1:8089", "`address` to serve at")
	policies := flags.String("policies", "examples/quickstart/policy.yaml", "`file` or directory of policies")
	keyFile := flags.String("keys", "", "`file` of API keys, in lines of a name and a key; none for an agent that asks for no key")
	state := flags.String("state", "", "`file` for what limits hold, to go on from after a restart; none to start afresh")
	holdOff := flags.Duration("hold-off", 0, "`time` in which concurrency limits admit no flows, unless the agent before was stopped in good order and wrote the file of -state")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}

	var opts []agent.Option
	if *keyFile != "" {
		keys, err := readKeys(*keyFile)
		if err != nil {
			return err
		}
		opts = append(opts, agent.WithKeys(func(key string) (string, bool) {
			name, ok := keys[sha256.Sum256([]byte(key))]
			return name, ok
		}))
	}
	// Warnings are printed anyway.
	logger := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	first, err := read.until(ctx, *policies)
	if err != nil {
		return err
	}
	limits, err := engine.New(first, engine.WithLogger(logger))
	if err != nil {
		return err
	}
	defer limits.Close()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", *listen)
	if err != nil {
		return err
	}

	kept := []agent.ServiceOption{agent.WithHoldOff(*holdOff)}
	if *state != "" {
		kept = append(kept, agent.WithState(*state))
	}
	served, err := agent.New(limits, kept...)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	defer func() { // last, so that nothing is admitted that the file does not have
		if closed := errors.Join(limits.Close(), served.Close()); err == nil {
			err = closed
		}
	}()
	server := grpc.NewServer(agent.ServerOptions(opts...)...)
	served.Register(server)
	healthy := health.NewServer() // SERVING from the start: the policies are in force
	healthv1.RegisterHealthServer(server, healthy)
	reflection.Register(server)
	warn(stderr, limits, served)
	stopped := context.AfterFunc(ctx, func() {
		healthy.Shutdown() // NOT_SERVING, so that balancers send no more checks here
		served.Drain()     // flows that wait in queues come back to another agent
		// Clients whose flows hold slots keep their sessions for 2 s. One that just holds its connection loses it after 3 s.
		end := time.AfterFunc(2*time.Second, func() { _ = limits.Close() })
		defer end.Stop()
		late := time.AfterFunc(3*time.Second, server.Stop)
		defer late.Stop()
		server.GracefulStop()
	})
	defer stopped()
	serving, endServing := context.WithCancel(ctx)
	var reloading sync.WaitGroup
	defer reloading.Wait()
	defer endServing()
	reloading.Go(func() {
		for {
			select {
			case <-serving.Done():
				return
			case <-hangup:
				err := reload(serving, read, limits, *policies)
				if serving.Err() != nil {
					return
				}
				if err != nil {
					fmt.Fprintln(stderr, "the policies stay as they are:", err)
					continue
				}
				warn(stderr, limits, served)
				fmt.Fprintf(stderr, "%s has been read again\n", *policies)
			}
		}
	})
	fmt.Fprintf(stdout, "serving %s at %s until interrupted\n", *policies, listener.Addr())
	if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) { // by a Ctrl-C before it began
		return err
	}
	fmt.Fprintf(stdout, "clients reported %d flows\n", served.Spans())
	return nil
}

// readKeys returns the owners of keys, by the hashes of the keys. So the time of a look-up reveals nothing of a key.
func readKeys(file string) (map[[sha256.Size]byte]string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	keys := make(map[[sha256.Size]byte]string)
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
		case len(fields) != 2:
			return nil, fmt.Errorf("%s:%d: want a name and a key", file, n)
		default:
			keys[sha256.Sum256([]byte(fields[1]))] = fields[0]
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s: no keys", file)
	}
	return keys, nil
}

// warn prints what has no effect in the policies in force, the most important first.
func warn(stderr io.Writer, limits *engine.Engine, served *agent.Service) {
	for _, warning := range slices.Concat(served.Warnings(), limits.Warnings()) {
		fmt.Fprintln(stderr, "warning:", warning)
	}
}

// until reads policies, and waits for them until ctx ends. A large file takes seconds, and a file system that does not answer takes
// forever. Nothing ends such a read, so it may go on until the process ends, and its result is dropped.
func (read reader) until(ctx context.Context, path string) ([]policy.Policy, error) {
	done := make(chan struct{})
	var have []policy.Policy
	var failed error
	go func() {
		defer close(done)
		have, failed = read(path)
	}()
	select {
	case <-done:
		return have, failed
	case <-ctx.Done():
		return nil, fmt.Errorf("reading %s: %w", path, ctx.Err())
	}
}

// reload puts the policies into force that are in the files now, or leaves everything as it is.
func reload(ctx context.Context, read reader, limits *engine.Engine, path string) error {
	policies, err := read.until(ctx, path)
	if err != nil {
		return err
	}
	return limits.Apply(policies)
}
