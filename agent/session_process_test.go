//go:build unix

package agent_test

import (
	"bufio"
	"context"
	"errors"
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
	"github.com/headgate-go/headgate/policy"
)

// sessionRole makes this test's process one of another's: "agent", or "hold" or "load" with the addresses of the agent
// and the witness.
const sessionRole = "HEADGATE_TEST_SESSION_ROLE"

const sessionSlots = 8

// Clients that are killed or stopped give their slots up, and so do those of an agent that is stopped. A witness, to which
// every flow reports before and after its work, never counts more of them than the limit, without those of a stopped
// client.
func TestProcessSessions(t *testing.T) {
	if role := os.Getenv(sessionRole); role != "" {
		playRole(t, strings.Fields(role))
		return
	}
	w := newWitness(t)
	served := startRole(t, "agent")
	address := served.line(t)
	client := func(mode string) *role { return startRole(t, mode+" "+address+" "+w.listener.Addr().String()) }
	load := client("load")
	w.await(t, "the load", func() bool { return w.flows[load.pid()] > 0 })

	holder := client("hold")
	w.await(t, "a client that holds half of the slots", func() bool { return w.flows[holder.pid()] == sessionSlots/2 })
	holder.signal(t, syscall.SIGKILL)
	took := w.await(t, "the slots of a client that was killed", func() bool { return w.flows[load.pid()] > sessionSlots/2 })
	t.Logf("slots of a client that was killed were back after %v", took)

	holder = client("hold")
	w.await(t, "another client that holds half of the slots", func() bool { return w.flows[holder.pid()] == sessionSlots/2 })
	w.except(holder.pid())
	holder.signal(t, syscall.SIGSTOP)
	took = w.await(t, "the slots of a client that was stopped", func() bool { return w.flows[load.pid()] > sessionSlots/2 })
	t.Logf("slots of a client that was stopped were back after %v", took)
	holder.signal(t, syscall.SIGCONT)
	took = w.await(t, "the end of the flows that have lost their slots", func() bool { return w.flows[holder.pid()] == 0 || w.excepted == 0 })
	t.Logf("its flows were canceled %v after it went on", took)

	w.await(t, "the same client to hold half of the slots", func() bool { return w.flows[holder.pid()] == sessionSlots/2 })
	served.signal(t, syscall.SIGSTOP)
	took = w.await(t, "the flows of an agent that was stopped", func() bool { return w.flows[holder.pid()] == 0 })
	t.Logf("flows of an agent that was stopped were canceled after %v", took)
	<-time.After(3 * time.Second)
	served.signal(t, syscall.SIGCONT)
	took = w.await(t, "the agent to go on", func() bool { return w.flows[holder.pid()] == sessionSlots/2 && w.flows[load.pid()] > 0 })
	t.Logf("slots were back %v after it went on", took)

	w.mu.Lock()
	defer w.mu.Unlock()
	t.Logf("%d flows, at most %d in flight; with those of a stopped client, %d", w.seen, w.most, w.mostOfAll)
	if w.most > sessionSlots {
		t.Errorf("%d flows were in flight at a time want at most %d", w.most, sessionSlots)
	}
}

// A witness counts the flows in flight of each process. A flow waits until it has been counted.
type witness struct {
	listener net.Listener
	running  sync.WaitGroup

	mu        sync.Mutex
	changed   chan struct{} // receives when anything has
	flows     map[int]int   // by process
	excepted  int           // the process that was stopped, until all its flows have ended
	seen      int
	most      int
	mostOfAll int
}

func newWitness(t *testing.T) *witness {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &witness{listener: l, changed: make(chan struct{}, 1), flows: make(map[int]int)}
	w.running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.running.Go(func() { w.listen(conn) })
		}
	})
	t.Cleanup(func() { // after the processes have ended
		_ = l.Close()
		w.running.Wait()
	})
	return w
}

// listen counts the flows that a process reports one after the other on a connection.
func (w *witness) listen(conn net.Conn) {
	defer conn.Close()
	pid, running := 0, 0
	if _, err := fmt.Fscanf(conn, "%d\n", &pid); err != nil {
		return
	}
	defer func() { w.count(pid, -running) }() // it was killed
	var one [1]byte
	for {
		if _, err := io.ReadFull(conn, one[:]); err != nil {
			return
		}
		more := 1
		if one[0] == '-' {
			more = -1
		}
		running += more
		w.count(pid, more)
		if _, err := conn.Write(one[:]); err != nil {
			return
		}
	}
}

func (w *witness) count(pid, more int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flows[pid] += more
	if more > 0 {
		w.seen++
	}
	if pid == w.excepted && w.flows[pid] == 0 {
		w.excepted = 0
	}
	all, others := 0, 0
	for of, n := range w.flows {
		all += n
		if of != w.excepted {
			others += n
		}
	}
	w.most, w.mostOfAll = max(w.most, others), max(w.mostOfAll, all)
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// except does not count flows of the process for the limit, until all have ended.
func (w *witness) except(pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.excepted = pid
}

// await waits for something to happen, within a time that only a hang takes.
func (w *witness) await(t *testing.T, what string, happened func() bool) time.Duration {
	t.Helper()
	begin, limit := time.Now(), time.After(time.Minute)
	for {
		w.mu.Lock()
		ok := happened()
		w.mu.Unlock()
		if ok {
			return time.Since(begin).Round(time.Millisecond)
		}
		select {
		case <-w.changed:
		case <-limit:
			t.Fatalf("%s: nothing happened for a minute", what)
		}
	}
}

// A role is a process that plays one.
type role struct {
	cmd *exec.Cmd
	out *bufio.Scanner
}

func startRole(t *testing.T, name string) *role {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestProcessSessions$", "-test.v")
	cmd.Env = append(os.Environ(), sessionRole+"="+name)
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
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != -1 { // which a killed one has
			t.Errorf("%s: %v", name, err)
		}
	})
	return &role{cmd, bufio.NewScanner(out)}
}

func (r *role) pid() int { return r.cmd.Process.Pid }

func (r *role) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// line is the address that an agent prints.
func (r *role) line(t *testing.T) string {
	t.Helper()
	for r.out.Scan() {
		if _, address, ok := strings.Cut(r.out.Text(), "agent at "); ok {
			return address
		}
	}
	t.Fatal("the agent has no address")
	return ""
}

// playRole plays the role until the standard input ends.
func playRole(t *testing.T, role []string) {
	ctx, end := context.WithCancel(t.Context())
	defer end()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		end()
	}()
	if role[0] == "agent" {
		serveSlots(ctx, t)
		return
	}
	client, err := flowctl.Dial(role[1], flowctl.WithInsecure(), flowctl.WithCancelOnLostSlot())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close(context.WithoutCancel(ctx)) }()
	if err := client.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	<-time.After(500 * time.Millisecond) // for the session
	many, work := sessionSlots/2, time.Hour
	if role[0] == "load" {
		many, work = 2*sessionSlots, 10*time.Millisecond
	}
	var flows sync.WaitGroup
	for range many {
		flows.Go(func() {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", role[2])
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "%d\n", os.Getpid())
			for ctx.Err() == nil {
				if err := reportFlow(ctx, client, conn, work); err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	flows.Wait()
}

// reportFlow runs one flow, and reports it to the witness.
func reportFlow(ctx context.Context, client *flowctl.Client, witness io.ReadWriter, work time.Duration) error {
	flow := client.Start(ctx, "point", flowctl.Params{
		MaxWait: time.Hour, CheckTimeout: 3 * time.Second, OnUnreachable: flowctl.FailClosed,
	})
	defer func() { _, _ = flow.End(ctx) }()
	if !flow.ShouldRun() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
		return nil
	}
	tell := func(what byte) error {
		one := [1]byte{what}
		_, err := witness.Write(one[:])
		if err == nil {
			_, err = io.ReadFull(witness, one[:])
		}
		return err
	}
	if err := tell('+'); err != nil {
		return err
	}
	timer := time.NewTimer(work)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-flow.Context().Done():
		if cause := context.Cause(flow.Context()); ctx.Err() == nil && !errors.Is(cause, flowctl.ErrSlotLost) {
			return cause
		}
	}
	return tell('-')
}

func serveSlots(ctx context.Context, t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.ConcurrencyScheduler{
		Selectors: policy.At("point"), Max: sessionSlots, MaxInflight: time.Hour,
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, e)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	fmt.Printf("agent at %v\n", l.Addr()) // the parent reads it
	<-ctx.Done()
	server.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
