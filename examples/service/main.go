// Service is a service that is guarded wherever work gets in or out: a feature, HTTP handlers, gRPC methods, and
// requests to a third party's API.
//
//	go run ./examples/service
//
// It serves HTTP on port 8080 and gRPC on port 8081, of this machine alone unless -host says otherwise. An engine in
// the process decides, by the limits of policy.yaml beside this file. Try, in another terminal:
//
//	curl -i http://127.0.0.1:8080/health                     # Healthy, guarded by nothing
//	curl -i http://127.0.0.1:8080/connected                  # 200: flows can be decided
//	for i in 1 2 3 4 5 6; do curl -i http://127.0.0.1:8080/super; done
//	for i in 1 2 3 4 5 6; do curl -i -H 'X-API-Key: key-of-acme' http://127.0.0.1:8080/orders; done
//	for i in 1 2 3; do curl -i http://127.0.0.1:8080/report & done; wait
//	for i in 1 2 3 4; do curl -i http://127.0.0.1:8080/weather; done
//
// The last answer of each row is a refusal, and says when to retry if that is known. Each tenant has a limit of its own
// for orders: try key-of-globex, or no key. A gRPC client can have words counted, and curl can be one:
//
//	printf '\0\0\0\0\013\012\011two words' | curl -i --http2-prior-knowledge --data-binary @- --output - \
//		-H 'Content-Type: application/grpc' -H 'TE: trailers' http://127.0.0.1:8081/headgate.examples.Words/Count
//
// With -i it shows grpc-status: 0, which is OK, after the answer. From the sixth call on it shows 8, ResourceExhausted.
// Orders without a key count too.
//
// On Ctrl-C and SIGTERM what has begun is finished before the program ends.
//
// # Configuration
//
//	APERTURE_AGENT_ADDRESS   host:port of an agent that decides instead of the engine, by policies of its own
//	APERTURE_API_KEY         is sent to the agent
//	APERTURE_AGENT_INSECURE  true: the agent is asked in plaintext and not by TLS
//	APERTURE_APP_PORT        of HTTP, 8080 by default
//	APERTURE_APP_GRPC_PORT   of gRPC, 8081 by default
//
// To see both ends, have an agent serve the same limits:
//
//	go run ./examples/agent -policies examples/service/policy.yaml
//	APERTURE_AGENT_ADDRESS=localhost:8089 APERTURE_AGENT_INSECURE=true go run ./examples/service
//
// Then stop the agent, and look at /connected, and at what still runs. load.sh beside this file measures how much the
// service can do.
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
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "service:", err)
		os.Exit(1)
	}
}

// grace is how long the work under way may take when the program is to end, and then how long the last telemetry may
// take.
const grace = 15 * time.Second

// run serves until ctx ends.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("service", flag.ContinueOnError)
	flags.SetOutput(stderr)
	host := flags.String("host", "127.0.0.1", "serve at this `address`; an empty one is all that the machine has")
	policies := flags.String("policies", "", "take the engine's limits from this `file` or directory")
	checkTimeout := flags.Duration("check-timeout", 200*time.Millisecond, "how long an agent may take to decide")
	reportTime := flags.Duration("report-time", time.Second, "how long a report takes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}

	// Deferred calls run backwards, which is the order to stop in: servers first, then the client whose flows they end,
	// then the engine that it asks.
	opts := []flowctl.Option{
		flowctl.WithLogger(slog.New(slog.NewTextHandler(stderr, nil))), flowctl.WithCheckTimeout(*checkTimeout),
	}
	decider := "the agent at " + os.Getenv("APERTURE_AGENT_ADDRESS")
	var client *flowctl.Client
	var err error
	if os.Getenv("APERTURE_AGENT_ADDRESS") != "" {
		if *policies != "" {
			return errors.New("-policies and APERTURE_AGENT_ADDRESS exclude each other: an agent has policies of its own")
		}
		client, err = flowctl.DialEnv(append(opts, flowctl.WithDialOptions(grpc.WithConnectParams(soon())))...)
	} else {
		var limits *engine.Engine
		if limits, err = load(*policies); err != nil {
			return err
		}
		defer limits.Close()
		for _, warning := range limits.Warnings() {
			fmt.Fprintln(stderr, "warning:", warning)
		}
		decider = "the engine in this process"
		client, err = flowctl.New(limits, opts...)
	}
	if err != nil {
		return err
	}
	defer func() {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		client.Close(last) // all flows have ended, and what they report is sent; if not, the client logs it
	}()

	upstream, closeUpstream, err := serveUpstream(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = closeUpstream() }() // its callers have ended
	forecasts := newForecasts(client, upstream)
	defer forecasts.client.CloseIdleConnections()

	web, err := listen(ctx, *host, "APERTURE_APP_PORT", "8080")
	if err != nil {
		return err
	}
	rpc, err := listen(ctx, *host, "APERTURE_APP_GRPC_PORT", "8081")
	if err != nil {
		return errors.Join(err, web.Close())
	}
	fmt.Fprintf(stdout, "HTTP at http://%s\ngRPC at %s\ndecided by %s\n", web.Addr(), rpc.Addr(), decider)

	// When one server fails the other one stops too.
	servers, ctx := errgroup.WithContext(ctx)
	servers.Go(func() error { return serveHTTP(ctx, web, newHandler(client, forecasts, *reportTime)) })
	servers.Go(func() error { return serveGRPC(ctx, rpc, newGRPCServer(client)) })
	return servers.Wait()
}

// soon bounds the pauses between attempts to connect to the agent. With gRPC's own, of up to two minutes, /connected
// would learn late that the agent is back.
func soon() grpc.ConnectParams {
	pauses := backoff.DefaultConfig
	pauses.MaxDelay = 5 * time.Second
	return grpc.ConnectParams{Backoff: pauses, MinConnectTimeout: 5 * time.Second}
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

// listen opens the port that the variable of the environment names, or else the usual one.
func listen(ctx context.Context, host, variable, usual string) (net.Listener, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(host, cmp.Or(os.Getenv(variable), usual)))
	if err != nil {
		return nil, fmt.Errorf("-host and %s: %w", variable, err)
	}
	return listener, nil
}

// serveHTTP serves until ctx ends, and then what has begun by then.
func serveHTTP(ctx context.Context, listener net.Listener, handler http.Handler) error {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	stopped := make(chan error, 1)
	defer context.AfterFunc(ctx, func() {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		err := server.Shutdown(limit)
		if err != nil { // some take too long
			err = errors.Join(err, server.Close())
		}
		stopped <- err
	})()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped // Serve returns when the shutdown begins
}

// serveGRPC serves until ctx ends, and then what has begun by then.
func serveGRPC(ctx context.Context, listener net.Listener, server *grpc.Server) error {
	defer context.AfterFunc(ctx, func() {
		late := time.AfterFunc(grace, server.Stop)
		defer late.Stop()
		server.GracefulStop()
	})()
	err := server.Serve(listener)              // which returns when the stop is complete
	if errors.Is(err, grpc.ErrServerStopped) { // before it began to serve
		return nil
	}
	return err
}
