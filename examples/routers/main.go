// Routers serves one shop by several routers, with httpguard's middleware in each: every route is a control point.
//
//	cd examples/routers
//	GOWORK=off go run . -router chi
//	for i in 1 2 3; do curl -i http://127.0.0.1:8080/orders/7; done
//
// The third answer is 429 Too Many Requests. The routers are servemux, chi, gorilla, gin and echo.
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
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

var routers = map[string]func(client headgate.Starter) http.Handler{
	"servemux": newServeMux,
	"chi":      newChi,
	"gorilla":  newGorilla,
	"gin":      newGin,
	"echo":     newEcho,
}

// orders lets two orders through at once, and one more each second. Each router writes the route's pattern in its own
// way, and only ServeMux has the method in it.
var orders = policy.Policy{Name: "orders", Components: []policy.Component{policy.RateLimiter{
	Selectors: policy.At("GET /orders/{id}", "/orders/{id}", "/orders/:id"), Capacity: 2, Fill: 1, Interval: time.Second,
}}}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "routers:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("routers", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "`address` to serve on")
	router := flags.String("router", "servemux", "`name` of the router")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}
	newRouter, ok := routers[*router]
	if !ok {
		return fmt.Errorf("there is no router %q", *router)
	}
	e, err := engine.New([]policy.Policy{orders})
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", *listen)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s at http://%s\n", *router, listener.Addr())
	server := &http.Server{Handler: newRouter(client), ReadTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		return server.Shutdown(context.WithoutCancel(ctx))
	}
}
