package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/flowctl"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, printed := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := run(ctx, []string{"-listen", "127.0.0.1:0", "-policies", "../quickstart/policy.yaml"}, printed, io.Discard)
		printed.Close()
		done <- err
	}()
	var policies, address string
	if _, err := fmt.Fscanf(out, "serving %s at %s until interrupted\n", &policies, &address); err != nil {
		t.Fatal(err)
	}

	params := flowctl.Params{
		Labels:       map[string]string{"user_id": "carol", "user_tier": "free"}, // one call a second
		CheckTimeout: 10 * time.Second,
	}
	var accepted int
	for range 2 { // of two processes, as it were
		client, err := flowctl.Dial(address, flowctl.WithInsecure())
		if err != nil {
			t.Fatal(err)
		}
		flow := client.Start(t.Context(), "recommend", params)
		if !flow.Success() {
			t.Errorf("%v: %v", flow, flow.Err())
		}
		if flow.ShouldRun() {
			accepted++
		}
		_, _ = flow.End(t.Context())
		if err := client.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if accepted != 1 {
		t.Errorf("%d of two calls were accepted want one: the limit is shared", accepted)
	}

	cancel()
	rest, err := io.ReadAll(out)
	if err != nil || !strings.Contains(string(rest), "clients reported 2 flows") {
		t.Errorf("last words = %q, %v", rest, err)
	}
	if err := <-done; err != nil {
		t.Errorf("run = %v", err)
	}
}

func TestRunErrors(t *testing.T) {
	for name, args := range map[string][]string{
		"no such file":  {"-policies", "no-such-file.yaml"},
		"no such flag":  {"-nonsense"},
		"an argument":   {"argument"},
		"a bad address": {"-policies", "../quickstart/policy.yaml", "-listen", "nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			var stderr bytes.Buffer
			if err := run(t.Context(), args, io.Discard, &stderr); err == nil {
				t.Error("run = nil")
			}
		})
	}
}
