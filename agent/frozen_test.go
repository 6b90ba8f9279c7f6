//go:build unix

package agent_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
)

// frozenAgent makes this test's process the agent of another.
const frozenAgent = "HEADGATE_TEST_FROZEN_AGENT"

// A process that is stopped while flows wait in its queue is found, and one that lives is waited for.
func TestProcessFrozenAgent(t *testing.T) {
	if os.Getenv(frozenAgent) != "" {
		serveUntilStdinEnds(t)
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestProcessFrozenAgent$", "-test.v")
	cmd.Env = append(os.Environ(), frozenAgent+"=1")
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
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	var address string
	for lines := bufio.NewScanner(out); address == "" && lines.Scan(); {
		_, address, _ = strings.Cut(lines.Text(), "agent at ")
	}
	client, err := flowctl.Dial(address, flowctl.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close(context.WithoutCancel(t.Context())) }()
	if err := client.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	holder := client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute})
	if holder.Decision() != flowctl.Accepted {
		t.Fatal(holder.Err())
	}
	decided := make(chan flowctl.Decision, 8)
	var flows sync.WaitGroup
	defer flows.Wait()
	for range cap(decided) {
		flows.Go(func() {
			// A slow machine may take a while to answer.
			flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: time.Hour, CheckTimeout: 3 * time.Second})
			decided <- flow.Decision()
			_, _ = flow.End(t.Context())
		})
	}
	select {
	case d := <-decided:
		t.Errorf("%v while the agent lives", d)
	case <-time.After(5 * time.Second): // longer than a silence may be
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	for range cap(decided) {
		if d := <-decided; d != flowctl.Unreachable {
			t.Errorf("%v want unreachable", d)
		}
	}
	t.Logf("found after %v", time.Since(stopped).Round(time.Millisecond))
	if flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: time.Hour}); flow.Decision() != flowctl.Unreachable {
		t.Errorf("%v want unreachable", flow)
	}
}

// serveUntilStdinEnds serves one slot.
func serveUntilStdinEnds(t *testing.T) {
	t.Helper()
	e, err := engine.New(scheduler())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, e)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	fmt.Printf("agent at %v\n", l.Addr()) // the parent reads it
	_, _ = io.Copy(io.Discard, os.Stdin)
	server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
