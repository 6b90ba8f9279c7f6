package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(serveVariable) == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := serveAgent(context.Background(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Every row measures something, and every target is judged; how fast things are is not a test's business.
func TestProcessRun(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-rounds", "1", "-time", "1ms", "-keys", "1000"}, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Guard, one keyed rate limiter", "Guard, one keyed rate limiter, 10000 overrides", "local beside a store", "Guard, one keyed quota scheduler", "Guard, one concurrency scheduler", "Guard, one sampler", "Guard, one keyed circuit breaker", "failsafe-go circuit breaker", "Cached, a hit",
		"Guard, queue and wake, 1 waiter", "Guard, queue and wake, 10000 waiters", "failsafe-go bulkhead with queueing", "failsafe-go adaptive limiter", "Do, label maps in turn, 1000 keys", "gobreaker", "x/time/rate",
		"HTTP middleware on the engine", "failsafe-go HTTP handler", "gRPC interceptor on the engine",
		"a key for each caller", "parallel to alone", "floor: clock read", "16 MiB of live objects",
		"Do over gRPC, with a FlowEnd", "the agent breaker open", "checks a second", "slots busy", "bytes a key", "keys in debt",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table does not have %q:\n%s", want, &out)
		}
	}
	if got, want := strings.Count(out.String(), ": met")+strings.Count(out.String(), ": missed"), 34; got != want {
		t.Errorf("%d targets judged want %d:\n%s", got, want, &out)
	}
}
