//go:build unix

package redisstore_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// asAgent is the URL of the store of which this test's process is an agent.
const asAgent = "HEADGATE_TEST_AGENT"

// serveAgent is an agent until standard input ends. It prints its address.
func serveAgent(t *testing.T, url string) {
	t.Helper()
	m := join(t, url, []policy.Component{oneSlot()})
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, m.engine)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		server.Stop()
	}()
	fmt.Println("agent at", l.Addr())
	if err := server.Serve(l); err != nil {
		t.Error(err)
	}
}

func oneSlot() policy.Component {
	return policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user"}
}

// startAgent starts an agent in a process of its own.
func startAgent(t *testing.T, url string) (cmd *exec.Cmd, address string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.CommandContext(t.Context(), exe, "-test.run=^TestFleetAgents$")
	cmd.Env = append(os.Environ(), asAgent+"="+url)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait() // it may have been killed
	})
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if _, address, found := strings.Cut(lines.Text(), "agent at "); found {
			return cmd, address
		}
	}
	t.Fatal("the agent does not say where it is")
	return nil, ""
}

// dialAgent returns a client of an agent.
func dialAgent(t *testing.T, address string, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	opts = append(opts, flowctl.WithInsecure(), flowctl.WithCheckTimeout(patient), flowctl.WithEndTimeout(patient), flowctl.WithoutTelemetry())
	client, err := flowctl.Dial(address, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	if err := client.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	return client
}

// Agents behind one address are one: a flow keeps its slot when its agent is killed, for as long as its client lives, and ends at
// another agent.
func TestFleetAgents(t *testing.T) {
	if url := os.Getenv(asAgent); url != "" {
		serveAgent(t, url)
		return
	}
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	first, firstAddress := startAgent(t, server.URL())
	_, secondAddress := startAgent(t, server.URL())
	var to atomic.Pointer[string]
	to.Store(&firstAddress)
	balancer := redistest.StartRelay(t, func() string { return *to.Load() })
	client, other := dialAgent(t, balancer.Addr()), dialAgent(t, secondAddress)
	start := func(client *flowctl.Client) *flowctl.Flow {
		return client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "u"}, OnUnreachable: flowctl.FailClosed})
	}
	flow := start(client)
	if flow.Decision() != flowctl.Accepted {
		t.Fatal(flow.Err())
	}
	held := func(when string) {
		t.Helper()
		if other := start(other); other.Decision() != flowctl.Rejected {
			t.Fatalf("%v %s, while the slot is held; want it rejected", other, when)
		}
	}
	held("at another agent")
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	to.Store(&secondAddress)
	balancer.Close()
	for end := time.Now().Add(wire.SessionLasts + wire.SessionLasts/2); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
		held("after the flow's agent was killed")
	}
	if _, err := flow.End(t.Context()); err != nil {
		t.Fatalf("End at another agent: %v", err)
	}
	if flow := start(other); flow.Decision() != flowctl.Accepted {
		t.Errorf("%v, %v after the slot was given back", flow, flow.Err())
	}
}

// A client knows that its slots are lost before a client of another agent gets them, when its agent is killed, is stopped, or is cut off
// from the store.
func TestFleetLostSlotsOfAgents(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	_, otherAddress := startAgent(t, server.URL())
	other := dialAgent(t, otherAddress)
	var all sync.WaitGroup
	defer all.Wait()
	for name, fails := range map[string]func(cmd *exec.Cmd, way *redistest.Proxy){
		"killed":  func(cmd *exec.Cmd, _ *redistest.Proxy) { _ = cmd.Process.Kill() },
		"stopped": func(cmd *exec.Cmd, _ *redistest.Proxy) { _ = redistest.StopProcess(cmd.Process) },
		"cut off": func(_ *exec.Cmd, way *redistest.Proxy) { way.Close() },
	} {
		var gone atomic.Bool
		way := redistest.StartRelay(t, func() string {
			if gone.Load() {
				return "127.0.0.1:1"
			}
			return server.Addr()
		})
		cmd, address := startAgent(t, "redis://"+way.Addr())
		client := dialAgent(t, address, flowctl.WithCancelOnLostSlot())
		start := func(client *flowctl.Client) *flowctl.Flow {
			return client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": name}, OnUnreachable: flowctl.FailClosed})
		}
		flow := start(client)
		if flow.Decision() != flowctl.Accepted {
			t.Fatalf("%s: %v", name, flow.Err())
		}
		all.Go(func() {
			<-time.After(wire.SessionLasts + rand.N(5*time.Second)) // renewals come every few seconds
			if err := flow.Context().Err(); err != nil {
				t.Errorf("%s: %v while all is well", name, context.Cause(flow.Context()))
			}
			gone.Store(true)
			fails(cmd, way)
			failed := time.Now()
			for next := start(other); next.Decision() != flowctl.Accepted; next = start(other) {
				if time.Since(failed) > time.Minute {
					t.Errorf("%s: the slot does not come back", name)
					return
				}
				<-time.After(5 * time.Millisecond)
			}
			t.Logf("%s: another client has the slot after %v", name, time.Since(failed))
			if err := context.Cause(flow.Context()); !errors.Is(err, flowctl.ErrSlotLost) {
				t.Errorf("%s: another client has the slot, and the flow that had it is not canceled: %v", name, err)
			}
		})
	}
}
