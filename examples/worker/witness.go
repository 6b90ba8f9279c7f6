package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// A witness stands for the API, so that this program needs none. It counts the calls of all workers, and prints each second what
// it has seen. It asks no agent.
type witness struct {
	url string
	out io.Writer

	mu       sync.Mutex
	takes    time.Duration  // one call
	inFlight map[string]int // by process
	sum      int            // of inFlight
	calls    int
	most     int // of sum
	second   struct{ number, calls, most int }
}

// newWitness serves the API until stop is called.
func newWitness(ctx context.Context, address string, out io.Writer) (w *witness, stop func() error, err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	w = &witness{url: "http://" + listener.Addr().String(), out: out, inFlight: make(map[string]int)}
	server := &http.Server{Handler: w, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan struct{})
	var running sync.WaitGroup
	var served error
	running.Go(func() { served = server.Serve(listener) })
	running.Go(func() { w.report(ended) })
	return w, func() error {
		close(ended)
		err := server.Close()
		running.Wait()
		if !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		return err
	}, nil
}

// ServeHTTP is a call of the API.
func (w *witness) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	pid := r.FormValue("pid")
	takes := w.count(pid, 1)
	defer w.count(pid, -1)
	select {
	case <-time.After(takes):
	case <-r.Context().Done(): // the worker was killed, or has canceled the call
	}
}

func (w *witness) count(pid string, more int) (takes time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inFlight[pid] += more
	w.sum += more
	if more > 0 {
		w.calls++
		w.second.calls++
		w.most, w.second.most = max(w.most, w.sum), max(w.second.most, w.sum)
	}
	return w.takes
}

// slow has calls take that long from now on.
func (w *witness) slow(takes time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takes = takes
}

// seen is how many calls there were, and how many at once.
func (w *witness) seen() (calls, most int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls, w.most
}

// now returns the calls in flight by process.
func (w *witness) now() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.inFlight)
}

// await waits until the calls in flight, by process and in all, and those that there ever were, are as wanted.
func (w *witness) await(ctx context.Context, wanted func(inFlight map[string]int, sum, calls int) bool) error {
	for {
		w.mu.Lock()
		so := wanted(w.inFlight, w.sum, w.calls)
		w.mu.Unlock()
		if so {
			return nil
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

func (w *witness) say(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fmt.Fprintf(w.out, format+"\n", args...)
}

// report prints a line each second.
func (w *witness) report(ended <-chan struct{}) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ended:
			return
		}
		w.mu.Lock()
		w.second.number++
		var each []string
		for _, pid := range slices.Sorted(maps.Keys(w.inFlight)) {
			each = append(each, fmt.Sprintf("%d of %s", w.inFlight[pid], pid))
		}
		fmt.Fprintf(w.out, "%4d s  %2d calls, at most %d at once  in flight now: %s\n",
			w.second.number, w.second.calls, w.second.most, strings.Join(each, ", "))
		w.second.calls, w.second.most = 0, w.sum
		w.mu.Unlock()
	}
}
