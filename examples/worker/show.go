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

// show starts all parts, ends some of them, and has the witness print what it sees.
func show(ctx context.Context, stdout io.Writer) error {
	folder, err := os.MkdirTemp("", "worker")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	for i := range 500 { // more than will be done
		if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("%03d.job", i)), nil, 0o600); err != nil {
			return err
		}
	}
	w, stop, err := newWitness(ctx, "127.0.0.1:0", stdout)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute) // only a mistake takes that long
	defer cancel()
	parts := &parts{ctx: ctx}
	err = play(ctx, w, parts, folder)
	cancel()
	parts.wait()
	return errors.Join(err, stop())
}

// play goes through the scenes.
func play(ctx context.Context, w *witness, parts *parts, folder string) error {
	state := filepath.Join(folder, "agent.state")
	agent, address, err := parts.startAgent("127.0.0.1:0", state)
	if err != nil {
		return err
	}
	begin := time.Now()
	workers := make(map[string]*exec.Cmd) // by process
	for range 3 {
		c, err := parts.start(parts.command("-agent", address, "-api", w.url, "-jobs", folder))
		if err != nil {
			return err
		}
		workers[pid(c)] = c
	}

	w.slow(100 * time.Millisecond)
	w.say("Calls take 0.1 s. The agent allows %d a second.", perSecond)
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}
	calls, _ := w.seen()
	w.say("There were %d in %.1f s. Now calls take 1 s. The agent allows %d at once.", calls, time.Since(begin).Seconds(), atOnce)
	w.slow(time.Second)
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}

	inFlight := w.now()
	victim := slices.MaxFunc(slices.Collect(maps.Keys(workers)), func(a, b string) int { return inFlight[a] - inFlight[b] })
	begin = time.Now()
	if err := end(syscall.SIGKILL, workers[victim]); err != nil {
		return err
	}
	delete(workers, victim)
	w.say("Worker %s is killed. It had %d calls in flight.", victim, inFlight[victim])
	if err := putBack(folder, victim); err != nil {
		return err
	}
	if err := w.await(ctx, func(inFlight map[string]int, _, _ int) bool { return inFlight[victim] == 0 }); err != nil {
		return err
	}
	if err := w.await(ctx, func(_ map[string]int, sum, _ int) bool { return sum == atOnce }); err != nil {
		return err
	}
	w.say("The other workers have its slots, after %.1f s. Now calls take 4 s.", time.Since(begin).Seconds())
	w.slow(4 * time.Second) // so that calls are in flight when the next agent begins
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}

	w.say("The agent is stopped, and started again.")
	begin = time.Now()
	if err := end(syscall.SIGTERM, agent); err != nil {
		return err
	}
	if agent, _, err = parts.startAgent(address, state); err != nil {
		return err
	}
	before, _ := w.seen()
	w.slow(time.Second)
	if err := w.await(ctx, func(_ map[string]int, _, calls int) bool { return calls >= before+atOnce }); err != nil {
		return err
	}
	w.say("It has admitted %d more calls, after %.1f s.", atOnce, time.Since(begin).Seconds())
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}

	if err := end(syscall.SIGTERM, slices.Collect(maps.Values(workers))...); err != nil {
		return err
	}
	if err := end(syscall.SIGTERM, agent); err != nil {
		return err
	}
	calls, most := w.seen()
	w.say("The witness has seen %d calls, at most %d at once.", calls, most)
	return nil
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
