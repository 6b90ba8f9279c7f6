// Tiers is an API whose callers have keys. Each key is limited by its tier, and some have limits of their own.
//
//	go run ./examples/tiers
//
// It shows in some seconds what happens to requests while the file of limits changes, and ends. The limits are those of
// limits.yaml, and the service is in tiers.go. Its first day is a dry run, which rejects nothing and says who would have been
// limited.
//
// To ask for yourself:
//
//	go run ./examples/tiers -listen 127.0.0.1:8080 -limits examples/tiers/limits.yaml
//	for i in 1 2 3 4 5; do curl -i -H 'X-API-Key: key-of-ann' http://127.0.0.1:8080/orders; done
//	curl http://127.0.0.1:8081/limited
//	curl http://127.0.0.1:8081/metrics
//
// Write "&dry-run false" into limits.yaml, wait for 4 seconds, and ask again. There are keys of ann, mallory, globex, acme and
// initech. A report, which is at /reports, takes a while.
package main

import (
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
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/headgate-go/headgate/engine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, os.Args[1:], os.Stdout)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "tiers:", err)
		os.Exit(1)
	}
}

// keys would be in a database.
var keys = map[string]key{
	"key-of-ann":     {"ann", "free"},
	"key-of-mallory": {"mallory", "free"},
	"key-of-globex":  {"globex", "paid"},
	"key-of-acme":    {"acme", "paid"},
	"key-of-initech": {"initech", "paid"},
}

//go:embed limits.yaml
var limits []byte

func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("tiers", flag.ContinueOnError)
	listen := flags.String("listen", "", "serve on this `address` until Ctrl-C, and show nothing")
	admin := flags.String("admin", "127.0.0.1:8081", "with -listen: serve /metrics and /limited on this `address`")
	rpc := flags.String("grpc", "127.0.0.1:8082", "with -listen: serve gRPC on this `address`")
	limitsFile := flags.String("limits", "", "with -listen: take the limits from this `file`, and not from a copy of limits.yaml")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	if *listen == "" && *limitsFile != "" {
		return errors.New("-limits needs -listen: without it the file is changed")
	}

	path, watch, reloads := *limitsFile, engine.WatchParams{}, make(chan error, len(changes))
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	apiAddress, adminAddress, rpcAddress := *listen, *admin, *rpc
	if path == "" {
		dir, err := os.MkdirTemp("", "tiers")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		path = filepath.Join(dir, "limits.yaml")
		if err := os.WriteFile(path, limits, 0o600); err != nil {
			return err
		}
	}
	if *listen == "" {
		watch = engine.WatchParams{Interval: 250 * time.Millisecond, OnReload: func(err error) { reloads <- err }}
		logger = nil // its lines would stand between those of the show
		apiAddress, adminAddress, rpcAddress = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	}

	s, err := newService(ctx, newAPI(), keys, path, watch, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close(context.WithoutCancel(ctx))) }()
	apiURL, stopAPI, err := serve(ctx, apiAddress, s.api)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopAPI()) }()
	adminURL, stopAdmin, err := serve(ctx, adminAddress, s.admin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopAdmin()) }()
	s.rpc.RegisterService(&orders, nil)
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", rpcAddress)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- s.rpc.Serve(listener) }()
	defer func() {
		s.rpc.GracefulStop()
		err = errors.Join(err, <-served)
	}()

	if *listen == "" {
		transport := &http.Transport{MaxIdleConnsPerHost: 8}
		defer transport.CloseIdleConnections()
		conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		show := &shower{
			out: stdout, client: &http.Client{Transport: transport}, conn: conn, api: apiURL, admin: adminURL,
			limitsFile: path, reloads: reloads,
		}
		return show.show(ctx)
	}
	fmt.Fprintf(stdout, "API:    %s\ngRPC:   %s\nadmins: %s\nlimits: %s\n", apiURL, listener.Addr(), adminURL, path)
	<-ctx.Done()
	return nil
}

// serve serves until stop is called, which lets requests end that have begun.
func serve(ctx context.Context, address string, h http.Handler) (url string, stop func() error, err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: h, ReadTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return "http://" + listener.Addr().String(), func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
		defer cancel()
		err := server.Shutdown(ctx)
		if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
			err = errors.Join(err, serveErr)
		}
		return err
	}, nil
}
