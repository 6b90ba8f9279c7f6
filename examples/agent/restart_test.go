package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
)

// asAgent is the variable of the environment that makes this test's program the agent.
const asAgent = "HEADGATE_TEST_AS_AGENT"

// A process is an agent in a process of its own.
type process struct {
	cmd     *exec.Cmd
	address string
	begun   time.Time // before it was
}

// startAgent starts an agent. It returns when it serves.
func startAgent(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.CommandContext(t.Context(), os.Args[0], args...), begun: time.Now()}
	p.cmd.Env = append(os.Environ(), asAgent+"=1")
	p.cmd.Stderr = t.Output()
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var policies string
	if _, err := fmt.Fscanf(out, "serving %s at %s until interrupted\n", &policies, &p.address); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	return p
}

// signal ends the process, and waits for its end.
func (p *process) signal(t *testing.T, s os.Signal, wantOK bool) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); (err == nil) != wantOK {
		t.Errorf("after %v: %v want a good end: %v", s, err, wantOK)
	}
}

// A witness counts flows in flight by itself, whatever the agent says.
type witness struct {
	inFlight, most, accepted atomic.Int64

	mu    sync.Mutex
	times []time.Time // of the decisions
}

// see counts a flow until the function that it returns is called.
func (w *witness) see() (gone func()) {
	n := w.inFlight.Add(1)
	most := w.most.Load()
	for n > most && !w.most.CompareAndSwap(most, n) {
		most = w.most.Load()
	}
	w.accepted.Add(1)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.times = append(w.times, time.Now())
	return func() { w.inFlight.Add(-1) }
}

// The agent that was interrupted and starts again has forgotten nothing: buckets, and flows in flight, which end at the new one. The
// agent that was killed under load admits no flow before the hold-off is over, and never are there more flows in flight than slots.
func TestProcessRestart(t *testing.T) {
	const slots, holdOff = 5, 3 * time.Second
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	folder := t.TempDir()
	policies, state := filepath.Join(folder, "policies.yaml"), filepath.Join(folder, "state")
	if err := os.WriteFile(policies, []byte(`circuit:
  components:
    - flow_control:
        rate_limiter:
          selectors: [{control_point: rate}]
          in_ports: {bucket_capacity: {constant_signal: {value: 10}}, fill_amount: {constant_signal: {value: 1}}}
          parameters: {interval: 1h, limit_by_label_key: user_id}
    - flow_control:
        concurrency_limiter:
          selectors: [{control_point: slots}]
          in_ports: {max_concurrency: {constant_signal: {value: 5}}}
          parameters: {max_inflight_duration: 30s}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	agent := startAgent(t, "-listen", "127.0.0.1:0", "-policies", policies, "-state", state)
	address := agent.address
	again := []string{"-listen", address, "-policies", policies, "-state", state, "-hold-off", holdOff.String()}
	dial := func(opts ...flowctl.Option) *flowctl.Client {
		client, err := flowctl.Dial(address, append(opts, flowctl.WithInsecure())...)
		if err != nil {
			t.Error(err)
			stop()
		}
		return client
	}
	start := func(client *flowctl.Client, point string, n int) (accepted []*flowctl.Flow) {
		for range n {
			flow := client.Start(t.Context(), point, flowctl.Params{Labels: map[string]string{"user_id": "carol"}})
			if !flow.Success() {
				t.Errorf("%v: %v", flow, flow.Err())
			}
			if flow.Decision() == flowctl.Accepted {
				accepted = append(accepted, flow)
			}
		}
		return accepted
	}
	closeClient := func(client *flowctl.Client) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Second)
		defer cancel()
		if err := client.Close(ctx); err != nil {
			t.Logf("telemetry: %v", err) // that of the time without an agent is lost, as it may be
		}
	}

	client := dial(flowctl.WithCheckTimeout(time.Minute), flowctl.WithEndTimeout(time.Minute))
	defer closeClient(client)
	start(client, "rate", 7)
	held := start(client, "slots", 2)
	agent.signal(t, syscall.SIGTERM, true)
	agent = startAgent(t, again...)
	if err := client.Ready(t.Context()); err != nil { // the connection is there again
		t.Fatal(err)
	}
	if got := len(start(client, "rate", 10)); got != 3 {
		t.Errorf("%d flows were accepted after the restart want the 3 that were left", got)
	}
	more := start(client, "slots", 10)
	if len(more) != slots-len(held) {
		t.Errorf("%d flows got slots after the restart want %d", len(more), slots-len(held))
	}
	for _, flow := range append(held, more...) {
		if r, err := flow.End(t.Context()); err != nil || r.Returned != 1 {
			t.Errorf("End = %+v, %v want the slot back, also of the flow from before the restart", r, err)
		}
	}

	var seen witness
	var load sync.WaitGroup
	for i := range 16 {
		load.Go(func() {
			var client *flowctl.Client
			for ctx.Err() == nil {
				if client == nil {
					// On a busy machine, an answer that does not come in time would keep a slot until it lapses.
					client = dial(flowctl.WithCheckTimeout(5*time.Second), flowctl.WithEndTimeout(100*time.Millisecond))
				}
				flow := client.Start(ctx, "slots", flowctl.Params{})
				if flow.Decision() == flowctl.Accepted {
					gone := seen.see()
					pause(ctx, time.Duration(50+rand.IntN(1850))*time.Millisecond)
					gone()
				}
				_, _ = flow.End(ctx)
				if i%2 == 0 { // it does not wait for its connection to come back
					closeClient(client)
					client = nil
				}
				pause(ctx, 20*time.Millisecond)
			}
			if client != nil {
				closeClient(client)
			}
		})
	}
	await := func(what string, enough func() bool) {
		t.Helper()
		for limit := time.Now().Add(time.Minute); !enough(); pause(ctx, time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("no %s within a minute", what)
			}
		}
	}
	await("load", func() bool { return seen.accepted.Load() > 10 && seen.inFlight.Load() == slots })
	agent.signal(t, syscall.SIGKILL, false)
	before := seen.accepted.Load()
	agent = startAgent(t, again...)
	await("load after the kill", func() bool { return seen.accepted.Load() > before+10 })
	stop()
	load.Wait()
	for _, at := range seen.times {
		// Answers of the agent that was killed can be read a little later.
		if after := at.Sub(agent.begun); after > holdOff/4 && after < holdOff {
			t.Errorf("a flow got a slot %v after the new agent had begun want %v at the least", after, holdOff)
		}
	}
	if got := seen.most.Load(); got != slots {
		t.Errorf("there were %d flows in flight want %d", got, slots)
	}
	t.Logf("%d flows, of which %d before the kill; at most %d in flight", seen.accepted.Load(), before, seen.most.Load())
	agent.signal(t, syscall.SIGTERM, true)
}

// pause waits for a time, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
