//go:build unix

package agent_test

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
	"path/filepath"
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

// sessionRole makes this test's process one of another's: "agent", with an address and a state file, or "hold", "finish", "load" or
// "hasty" with the addresses of the agent and the witness.
const sessionRole = "HEADGATE_TEST_SESSION_ROLE"

const (
	sessionSlots = 8
	sessionHalf  = sessionSlots / 2 // which a client holds that plays "hold" or "finish"
)

// Clients that are killed or stopped give their slots up, and so do those of an agent that is stopped. A witness, to which
// every flow reports before and after its work, never counts more of them than the limit, without those of a stopped
// client.
func TestProcessSessions(t *testing.T) {
	if role := os.Getenv(sessionRole); role != "" {
		playRole(t, strings.Fields(role))
		return
	}
	w := newWitness(t)
	served := startRole(t, "agent 127.0.0.1:0 "+filepath.Join(t.TempDir(), "state"))
	address := served.address(t)
	client := func(mode string) *role { return startRole(t, mode+" "+address+" "+w.listener.Addr().String()) }
	killed, stopped := client("hold"), client("hold")
	w.await(t, "two clients that hold all slots", func() bool {
		return w.flows[killed.pid()] == sessionHalf && w.flows[stopped.pid()] == sessionHalf
	})
	load := client("load")
	w.except(stopped.pid())
	killed.signal(t, syscall.SIGKILL)
	stopped.signal(t, syscall.SIGSTOP)
	took := w.await(t, "the slots of a client that was killed, and of one that was stopped", func() bool { return w.flows[load.pid()] == sessionSlots })
	t.Logf("slots were back after %v", took)
	stopped.signal(t, syscall.SIGCONT)
	took = w.await(t, "the end of the flows that have lost their slots", func() bool { return w.excepted == 0 })
	t.Logf("its flows were canceled %v after it went on", took)

	goesOn := func() bool { return w.flows[stopped.pid()] == sessionHalf && w.flows[load.pid()] == sessionHalf }
	w.await(t, "two clients that share all slots", goesOn)
	served.signal(t, syscall.SIGSTOP)
	took = w.await(t, "the flows of an agent that was stopped", func() bool { return w.flows[stopped.pid()] == 0 })
	t.Logf("flows of an agent that was stopped were canceled after %v", took)
	<-time.After(2 * time.Second) // so that the sessions have run out
	served.signal(t, syscall.SIGCONT)
	took = w.await(t, "the agent to go on with all slots", goesOn)
	t.Logf("slots were back %v after it went on", took)
	w.check(t)
}

// Flows that run for longer than a session without an agent outlast an agent that is stopped in good order and started again, twice
// and under load. None loses its slot, there are never more than the limit, and all slots come back.
func TestProcessRestartUnderLoad(t *testing.T) {
	w := newWitness(t)
	agent := "agent 127.0.0.1:0 " + filepath.Join(t.TempDir(), "state")
	served := startRole(t, agent)
	address := served.address(t)
	client := func(mode string) *role { return startRole(t, mode+" "+address+" "+w.listener.Addr().String()) }
	finish := client("finish")
	w.await(t, "a client that holds half of the slots", func() bool { return w.flows[finish.pid()] == sessionHalf })
	load := client("load")
	loaded := func() bool { return w.flows[load.pid()] == sessionHalf }
	w.await(t, "the load", loaded)
	for range 2 {
		before := w.ended(load.pid())
		served.stop(t)
		served = startRole(t, strings.Replace(agent, "127.0.0.1:0", address, 1))
		served.address(t)
		took := w.await(t, "the load after a restart", func() bool { return loaded() && w.gone[load.pid()] > before })
		t.Logf("all slots were back after %v", took)
	}
	w.await(t, "the end of flows of before", func() bool { return w.gone[finish.pid()] == sessionHalf })
	load.stop(t)
	finish.stop(t) // which fails if a flow has lost its slot
	last := client("hold")
	more := client("hold")
	w.await(t, "all slots for others", func() bool { return w.flows[last.pid()] == sessionHalf && w.flows[more.pid()] == sessionHalf })
	w.check(t)
}

// An agent and its clients are stopped for a moment, again and again, while checks are given up soon. So ends and answers get lost. There
// are never more flows than the limit, and no slot stays taken: all are in use again each time.
func TestProcessFreezes(t *testing.T) {
	const rounds = 4
	w := newWitness(t)
	served := startRole(t, "agent 127.0.0.1:0 "+filepath.Join(t.TempDir(), "state"))
	address := served.address(t)
	client := func() *role { return startRole(t, "hasty "+address+" "+w.listener.Addr().String()) }
	one, other := client(), client()
	all := func() bool { return w.flows[one.pid()]+w.flows[other.pid()] == sessionSlots }
	w.await(t, "the load", all)
	for range rounds {
		var frozen sync.WaitGroup
		for _, r := range []*role{served, one, other} {
			begins, lasts := rand.N(time.Second), rand.N(1500*time.Millisecond)
			frozen.Go(func() {
				<-time.After(begins)
				if err := r.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
					t.Error(err)
				}
				<-time.After(lasts)
				if err := r.cmd.Process.Signal(syscall.SIGCONT); err != nil {
					t.Error(err)
				}
			})
		}
		frozen.Wait()
		took := w.await(t, "all slots after some were stopped", all)
		t.Logf("all slots were in use after %v", took)
	}
	w.check(t)
}

// A witness counts the flows in flight of each process. A flow waits until it has been counted.
type witness struct {
	listener net.Listener
	running  sync.WaitGroup

	mu        sync.Mutex
	changed   chan struct{} // receives when anything has
	flows     map[int]int   // by process
	gone      map[int]int   // by process: those that have ended
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
	w := &witness{listener: l, changed: make(chan struct{}, 1), flows: make(map[int]int), gone: make(map[int]int)}
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
	} else {
		w.gone[pid] -= more
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

// ended returns how many flows of the process have ended.
func (w *witness) ended(pid int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.gone[pid]
}

// check wants no more flows than there are slots.
func (w *witness) check(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	t.Logf("%d flows, at most %d in flight; with those of a stopped client, %d", w.seen, w.most, w.mostOfAll)
	if w.most > sessionSlots {
		t.Errorf("%d flows were in flight at a time want at most %d", w.most, sessionSlots)
	}
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
			w.mu.Lock()
			defer w.mu.Unlock()
			t.Fatalf("%s: nothing happened for a minute; flows by process: %v", what, w.flows)
		}
	}
}

// A role is a process that plays one.
type role struct {
	name    string
	cmd     *exec.Cmd
	in      io.Closer
	at      chan string // receives the address that an agent prints
	printed chan string // receives all that the process has printed, at its end
	once    sync.Once
}

// startRole starts a process. If the test fails, its log has what the process printed.
func startRole(t *testing.T, name string) *role {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestProcessSessions$", "-test.v")
	cmd.Env = append(os.Environ(), sessionRole+"="+name)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := &role{name: name, cmd: cmd, in: in, at: make(chan string, 1), printed: make(chan string, 1)}
	go func() {
		var all strings.Builder
		for lines := bufio.NewScanner(out); lines.Scan(); {
			fmt.Fprintln(&all, lines.Text())
			if _, address, ok := strings.Cut(lines.Text(), "agent at "); ok {
				r.at <- address
			}
		}
		close(r.at)
		r.printed <- all.String()
	}()
	t.Cleanup(func() { r.stop(t) })
	return r
}

// stop ends the process in good order, if it has not been killed, and waits for it.
func (r *role) stop(t *testing.T) {
	t.Helper()
	r.once.Do(func() {
		_ = r.cmd.Process.Signal(syscall.SIGCONT)
		_ = r.in.Close()
		printed := <-r.printed
		if err := r.cmd.Wait(); err != nil && r.cmd.ProcessState.ExitCode() != -1 { // which a killed one has
			t.Errorf("%s: %v", r.name, err)
		}
		if t.Failed() {
			t.Logf("%s, process %d, printed:\n%s", r.name, r.pid(), printed)
		}
	})
}

func (r *role) pid() int { return r.cmd.Process.Pid }

func (r *role) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// address is where an agent serves.
func (r *role) address(t *testing.T) string {
	t.Helper()
	address, ok := <-r.at
	if !ok {
		t.Fatal("the agent has no address")
	}
	return address
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
		serveSlots(ctx, t, role[1], role[2])
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
	many, work := sessionHalf, time.Hour
	params := flowctl.Params{MaxWait: time.Hour, CheckTimeout: 3 * time.Second, OnUnreachable: flowctl.FailClosed}
	switch role[0] {
	case "load":
		many, work = 2*sessionSlots, 10*time.Millisecond
	case "hasty":
		many, work = 2*sessionSlots, 10*time.Millisecond
		params.MaxWait, params.CheckTimeout = 0, 100*time.Millisecond
	case "finish":
		work = 15 * time.Second
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
				ran, err := reportFlow(ctx, client, params, conn, work)
				lost := errors.Is(err, flowctl.ErrSlotLost)
				if ctx.Err() == nil && err != nil && (!lost || role[0] == "finish") {
					t.Error(err)
				}
				if err != nil && !lost || ran && role[0] == "finish" {
					return
				}
			}
		})
	}
	flows.Wait()
	<-ctx.Done()
}

// reportFlow runs one flow, and reports it to the witness. It reports whether the flow ran. The error is ErrSlotLost if it lost its
// slot.
func reportFlow(ctx context.Context, client *flowctl.Client, params flowctl.Params, witness io.ReadWriter, work time.Duration) (ran bool, err error) {
	flow := client.Start(ctx, "point", params)
	defer func() { _, _ = flow.End(ctx) }()
	if !flow.ShouldRun() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
		return false, nil
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
		return true, err
	}
	timer := time.NewTimer(work)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-flow.Context().Done():
		err = context.Cause(flow.Context())
	}
	return true, errors.Join(err, tell('-'))
}

// serveSlots serves until ctx ends, and leaves the state to the next agent.
func serveSlots(ctx context.Context, t *testing.T, address, state string) {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{policy.ConcurrencyScheduler{
		Selectors: policy.At("point"), Max: sessionSlots, MaxInflight: time.Hour,
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	service, err := agent.New(e, agent.WithState(state))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(append(agent.ServerOptions(), grpc.WaitForHandlers(true))...)
	service.Register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	fmt.Printf("agent at %v\n", l.Addr()) // the parent reads it
	<-ctx.Done()
	service.Drain()
	late := time.AfterFunc(time.Second, server.Stop)
	server.GracefulStop()
	late.Stop()
	fmt.Printf("%d flows hold slots at the end\n", e.Stats().Components[0].Usage.InFlight)
	if err := errors.Join(<-served, e.Close(), service.Close()); err != nil {
		t.Error(err)
	}
}
