// Web is a service that counts words. It lets each user ask 5 times at once, and then once a second.
//
//	go run ./examples/web
//	for i in 1 2 3 4 5 6; do curl -i -H 'X-User: alice' -d 'four words are counted' http://127.0.0.1:8080/words; done
//
// Look at the sixth answer: 429 Too Many Requests, with a Retry-After that is exact. Bob has 5 of his own. On Ctrl-C
// the requests that have begun are answered before the program ends.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "web:", err)
		os.Exit(1)
	}
}

// wordCounts lets each user count 5 times at once, and once more each second.
var wordCounts = policy.Policy{Name: "word-counts", Components: []policy.Component{policy.RateLimiter{
	Selectors: policy.At("count-words"), Capacity: 5, Fill: 1, Interval: time.Second, LimitBy: "user_id",
}}}

// run serves until ctx ends.
func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("web", flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "`address` to serve on")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("what is %q?", flags.Arg(0))
	}

	// Deferred calls run backwards: the client closes before the engine that it asks, and both after the server, whose
	// last requests still need them.
	e, err := engine.New([]policy.Policy{wordCounts})
	if err != nil {
		return err
	}
	defer e.Close()
	client, err := flowctl.New(e)
	if err != nil {
		return err
	}
	defer client.Close(context.WithoutCancel(ctx))

	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", *listen)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "listening on http://%s\n", listener.Addr())

	server := &http.Server{Handler: newHandler(client), ReadTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	shutdown, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer cancel()
	return server.Shutdown(shutdown)
}

// newHandler serves the word counts, guarded by client.
func newHandler(client headgate.Starter) http.Handler {
	guard := httpguard.Middleware(client, "count-words", httpguard.WithParams(byUser))

	mux := http.NewServeMux()
	mux.Handle("POST /words", identified(guard(http.HandlerFunc(countWords))))
	return http.MaxBytesHandler(mux, 1<<20)
}

// byUser labels the flow with the user.
func byUser(r *http.Request) flowctl.Params {
	return flowctl.Params{
		Labels: map[string]string{"user_id": r.Header.Get("X-User")},
		// By default flows run if no agent can be asked. This service answers 503 rather than be overrun.
		OnUnreachable: flowctl.FailClosed,
	}
}

// identified lets requests pass that name their user, because a flow without the label would pass unlimited. A real
// service must check that the name is true.
func identified(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user := r.Header.Get("X-User")
		if user == "" || labels.Check(map[string]string{"user_id": user}) != nil {
			http.Error(w, "who are you? send an X-User header", http.StatusBadRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// countWords is the work: it takes as long as the request's body takes to arrive.
func countWords(w http.ResponseWriter, r *http.Request) {
	words := bufio.NewScanner(r.Body)
	words.Split(bufio.ScanWords)
	n := 0
	for words.Scan() {
		n++
	}
	if words.Err() != nil { // the body broke off, or is too long
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	fmt.Fprintln(w, n)
}
