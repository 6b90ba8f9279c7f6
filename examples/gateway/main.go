// Gateway stands between the tenants of a service and a vendor's language models.
//
//	go run ./examples/gateway
//
// It shows in some seconds what happens to requests, and ends. These are its limits, which are at the top of gateway.go:
//
//   - Each tenant has 600 tokens a minute, and 6 requests at once. Tokens are those that the models say an answer has cost.
//   - The large model allows 4 calls a second. People are served before batches.
//   - If the large model is used up, the small one answers. If the vendor asks for a short pause, the request waits.
//   - The same prompt is answered once an hour for each tenant.
//
// The vendor's models are in upstream.go, so that the program needs no other. To ask for yourself:
//
//	go run ./examples/gateway -listen 127.0.0.1:8080
//	curl -iN -H 'X-API-Key: key-of-acme' -d '{"prompt": "say 200"}' http://127.0.0.1:8080/chat
//
// Ask for some other numbers than 200, until the tokens of the minute are used up. With the prompt "pause 2" the large model
// refuses calls for 2 seconds, and with "pause 30" for so long that the small one answers. Add -H 'X-Kind: batch' for batches.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	err := run(ctx, os.Args[1:], os.Stdout)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) (err error) {
	flags := flag.NewFlagSet("gateway", flag.ContinueOnError)
	listen := flags.String("listen", "", "serve on this `address` until Ctrl-C, and show nothing")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}

	// Deferred calls run backwards: the client closes before the engine that it asks, and both after the servers, whose
	// last requests still need them.
	e, err := engine.New(limits)
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	vendor := newUpstream()
	vendorURL, stopVendor, err := serve(ctx, "127.0.0.1:0", vendor.handler())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopVendor()) }()
	base := &http.Transport{MaxIdleConnsPerHost: 64}
	defer base.CloseIdleConnections()
	address := *listen
	if address == "" {
		address = "127.0.0.1:0"
	}
	url, stopGateway, err := serve(ctx, address, newGateway(client, base, vendorURL))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopGateway()) }()

	if *listen == "" {
		return show(ctx, stdout, &http.Client{Transport: base}, url, vendor)
	}
	fmt.Fprintf(stdout, "listening on %s\n", url)
	<-ctx.Done()
	return nil
}

// serve serves until stop is called, which lets requests end that have begun.
func serve(ctx context.Context, address string, h http.Handler) (url string, stop func() error, err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
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
