package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// show starts all parts, ends some of them, and has the witness print what it sees. Store is empty for an agent. Otherwise it is the URL of
// the workers' store, or the program of its server, which is a part then.
func show(ctx context.Context, store string, stdout io.Writer) error {
	folder, err := os.MkdirTemp("", "worker")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	if err := writeJobs(folder); err != nil {
		return err
	}
	w, stop, err := newWitness(ctx, "127.0.0.1:0", stdout)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute) // only a mistake takes that long
	defer cancel()
	parts := &parts{ctx: ctx}
	err = (&play{witness: w, parts: parts, folder: folder}).run(ctx, store)
	cancel()
	parts.wait()
	return errors.Join(err, stop())
}

// A play is what show shows.
type play struct {
	*witness
	parts   *parts
	folder  string
	workers map[string]*exec.Cmd // by process
}

func (p *play) run(ctx context.Context, store string) error {
	var err error
	switch {
	case store == "":
		err = p.withAgent(ctx)
	case strings.Contains(store, "://"):
		err = p.withStore(ctx, store)
	default:
		err = p.withServer(ctx, store)
	}
	if err != nil {
		return err
	}
	calls, most := p.seen()
	p.say("The witness has seen %d calls, at most %d at once.", calls, most)
	return nil
}

// withAgent has an agent, which starts again.
func (p *play) withAgent(ctx context.Context) error {
	state := filepath.Join(p.folder, "agent.state")
	agent, address, err := p.parts.startAgent("127.0.0.1:0", state)
	if err != nil {
		return err
	}
	if err := p.first(ctx, "agent", "-agent", address); err != nil {
		return err
	}
	err = p.restart(ctx, "The agent is stopped, and started again.", func() error {
		if err := end(syscall.SIGTERM, agent); err != nil {
			return err
		}
		agent, _, err = p.parts.startAgent(address, state)
		return err
	})
	if err != nil {
		return err
	}
	return errors.Join(p.endWorkers(), end(syscall.SIGTERM, agent))
}

// withStore has a store whose server others may use, so it goes on.
func (p *play) withStore(ctx context.Context, url string) error {
	if err := p.first(ctx, "store", "-store", url); err != nil {
		return err
	}
	return p.endWorkers()
}

// withServer has a store whose server is killed, starts again, and is away for a while.
func (p *play) withServer(ctx context.Context, program string) error {
	server, err := p.parts.startServer(program, p.folder)
	if err != nil {
		return err
	}
	if err := p.first(ctx, "store", "-store", server.url()); err != nil {
		return err
	}
	err = p.restart(ctx, "The store's server is killed, and started again.", func() error {
		return errors.Join(server.end(syscall.SIGKILL), server.start())
	})
	if err != nil {
		return err
	}
	if err := p.away(ctx, server); err != nil {
		return err
	}
	return errors.Join(p.endWorkers(), server.end(syscall.SIGTERM))
}

// first shows the limits, and what becomes of the slots of a worker that is killed. The workers find what has the limits by the arguments.
func (p *play) first(ctx context.Context, what string, args ...string) error {
	begin := time.Now()
	p.workers = make(map[string]*exec.Cmd)
	for range 3 {
		c, err := p.parts.start(p.parts.command(append(slices.Clip(args), "-api", p.url, "-jobs", p.folder)...))
		if err != nil {
			return err
		}
		p.workers[pid(c)] = c
	}

	p.slow(100 * time.Millisecond)
	p.say("Calls take 0.1 s. The %s allows %d a second.", what, perSecond)
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}
	calls, _ := p.seen()
	p.say("There were %d in %.1f s. Now calls take 1 s. The %s allows %d at once.", calls, time.Since(begin).Seconds(), what, atOnce)
	p.slow(time.Second)
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}

	inFlight := p.now()
	victim := slices.MaxFunc(slices.Collect(maps.Keys(p.workers)), func(a, b string) int { return inFlight[a] - inFlight[b] })
	begin = time.Now()
	if err := end(syscall.SIGKILL, p.workers[victim]); err != nil {
		return err
	}
	delete(p.workers, victim)
	p.say("Worker %s is killed. It had %d calls in flight.", victim, inFlight[victim])
	if err := putBack(p.folder, victim); err != nil {
		return err
	}
	if err := p.await(ctx, func(inFlight map[string]int, _, _ int) bool { return inFlight[victim] == 0 }); err != nil {
		return err
	}
	if err := p.await(ctx, func(_ map[string]int, sum, _ int) bool { return sum == atOnce }); err != nil {
		return err
	}
	p.say("The other workers have its slots, after %.1f s.", time.Since(begin).Seconds())
	return nil
}

// restart shows what becomes of calls in flight when what has the limits starts again.
func (p *play) restart(ctx context.Context, announcement string, again func() error) error {
	p.say("Now calls take 4 s.")
	p.slow(4 * time.Second) // so that calls are in flight then
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}
	p.say("%s", announcement)
	begin := time.Now()
	if err := again(); err != nil {
		return err
	}
	before, _ := p.seen()
	p.slow(time.Second)
	if err := p.await(ctx, func(_ map[string]int, _, calls int) bool { return calls >= before+atOnce }); err != nil {
		return err
	}
	p.say("It has admitted %d more calls, after %.1f s.", atOnce, time.Since(begin).Seconds())
	return pause(ctx, 2*time.Second)
}

// away shows what workers do while there is no server.
func (p *play) away(ctx context.Context, server *server) error {
	if err := server.end(syscall.SIGTERM); err != nil {
		return err
	}
	p.say("The server is stopped.")
	if err := pause(ctx, time.Second); err != nil { // calls that it has admitted begin
		return err
	}
	before, _ := p.seen()
	if err := pause(ctx, 4*time.Second); err != nil {
		return err
	}
	calls, _ := p.seen()
	p.say("The workers have begun %d calls in 4 s without it. It is started again.", calls-before)
	begin := time.Now()
	if err := server.start(); err != nil {
		return err
	}
	if err := p.await(ctx, func(_ map[string]int, sum, _ int) bool { return sum == atOnce }); err != nil {
		return err
	}
	p.say("There are %d calls at once again, after %.1f s.", atOnce, time.Since(begin).Seconds())
	return pause(ctx, 2*time.Second)
}

func (p *play) endWorkers() error {
	return end(syscall.SIGTERM, slices.Collect(maps.Values(p.workers))...)
}

// writeJobs makes more jobs than will be done.
func writeJobs(folder string) (err error) {
	for i := range 500 {
		err = errors.Join(err, os.WriteFile(filepath.Join(folder, fmt.Sprintf("%03d.job", i)), nil, 0o600))
	}
	return err
}

// putBack does for the jobs of a worker that was killed what a queue does after some time.
func putBack(folder, pid string) error {
	claimed, err := filepath.Glob(filepath.Join(folder, "*.job."+pid))
	for _, file := range claimed {
		err = errors.Join(err, os.Rename(file, strings.TrimSuffix(file, "."+pid)))
	}
	return err
}

// parts are this program's processes. All are killed when ctx ends.
type parts struct {
	ctx     context.Context
	started []*exec.Cmd
}

func (p *parts) command(args ...string) *exec.Cmd {
	c := exec.CommandContext(p.ctx, os.Args[0], args...)
	c.Stderr = os.Stderr
	return c
}

func (p *parts) start(c *exec.Cmd) (*exec.Cmd, error) {
	if err := c.Start(); err != nil {
		return nil, err
	}
	p.started = append(p.started, c)
	return c, nil
}

// startAgent starts the agent. It returns when the agent serves, and where that is.
func (p *parts) startAgent(at, state string) (c *exec.Cmd, address string, err error) {
	c = p.command("-serve", at, "-state", state)
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if _, err := p.start(c); err != nil {
		return nil, "", err
	}
	if _, err := fmt.Fscanf(out, "serving at %s\n", &address); err != nil {
		return nil, "", fmt.Errorf("the agent does not serve: %w", err)
	}
	return c, address, nil
}

// wait waits for the processes that end has not ended.
func (p *parts) wait() {
	for _, c := range p.started {
		if c.ProcessState == nil {
			_ = c.Wait() // it was killed
		}
	}
}

// end ends processes, and waits for that.
func end(by syscall.Signal, processes ...*exec.Cmd) (err error) {
	for _, c := range processes {
		err = errors.Join(err, c.Process.Signal(by))
	}
	for _, c := range processes {
		if ended := c.Wait(); by != syscall.SIGKILL {
			err = errors.Join(err, ended)
		}
	}
	return err
}

func pid(c *exec.Cmd) string { return strconv.Itoa(c.Process.Pid) }

// pause waits. It is too late for that if ctx has ended.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
