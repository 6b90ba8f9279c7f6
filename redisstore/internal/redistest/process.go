package redistest

import (
	"context"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
)

// watch kills the process whose number it was given when its standard input ends, which it does when this process dies.
const watch = `read -r _; kill -KILL "$1" 2>/dev/null`

// A process is a child of this process, which ends no later than this one.
type process struct {
	cmd      *exec.Cmd
	done     chan struct{} // closed when it has ended
	watchdog *exec.Cmd
	lifeline io.Closer // the watchdog's standard input
}

// run starts a process and its watchdog.
func run(tb TB, path, dir string, args ...string) *process {
	tb.Helper()
	// The processes end by kill, which the test's cleanup calls.
	ctx := context.Background()
	p := &process{cmd: exec.CommandContext(ctx, path, args...), done: make(chan struct{})}
	p.cmd.Dir = dir
	if err := p.cmd.Start(); err != nil {
		tb.Fatalf("redistest: %v", err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // it is killed
	}()
	p.watchdog = exec.CommandContext(ctx, "/bin/sh", "-c", watch, "sh", strconv.Itoa(p.cmd.Process.Pid))
	lifeline, err := p.watchdog.StdinPipe()
	if err == nil {
		err = p.watchdog.Start()
	}
	if err != nil {
		_ = p.cmd.Process.Kill()
		<-p.done
		tb.Fatalf("redistest: %v", err)
	}
	p.lifeline = lifeline
	return p
}

// ended reports whether the process has ended.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// kill ends the process, and then its watchdog: the process's number is another's afterwards.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
	_ = p.watchdog.Process.Kill()
	_ = p.lifeline.Close()
	_ = p.watchdog.Wait()
}

func (p *process) stop() error   { return StopProcess(p.cmd.Process) }
func (p *process) resume() error { return ContinueProcess(p.cmd.Process) }

// StopProcess stops a process as a machine that has no time for it does.
func StopProcess(p *os.Process) error { return p.Signal(stopSignal) }

// ContinueProcess has a process that was stopped go on.
func ContinueProcess(p *os.Process) error { return p.Signal(continueSignal) }

// anyPort returns one of the ports below those that Linux, macOS and Windows give to outgoing connections.
func anyPort() int { return 20_000 + rand.IntN(12_000) }
