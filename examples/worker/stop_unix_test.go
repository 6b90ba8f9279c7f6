//go:build unix

package main

import (
	"io"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// A server that hangs for longer than a lease has calls in flight end before their slots are others'.
func TestServerHangs(t *testing.T) {
	t.Parallel()
	ctx, folder := t.Context(), t.TempDir()
	if err := writeJobs(folder); err != nil {
		t.Fatal(err)
	}
	program := findServer(t)
	w, stop, err := newWitness(ctx, "127.0.0.1:0", io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	parts := &parts{ctx: ctx}
	t.Cleanup(parts.wait) // after the context has ended
	server, err := parts.startServer(program, folder)
	if err != nil {
		t.Fatal(err)
	}
	w.slow(longest - 500*time.Millisecond)
	var workers []*exec.Cmd
	for range 2 {
		c, err := parts.start(parts.command("-store", server.url(), "-api", w.url, "-jobs", folder))
		if err != nil {
			t.Fatal(err)
		}
		workers = append(workers, c)
	}
	full := func(_ map[string]int, sum, _ int) bool { return sum == atOnce }
	if err := w.await(ctx, full); err != nil {
		t.Fatal(err)
	}
	if err := server.process.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	before, _ := w.seen()
	if err := pause(ctx, 12*time.Second); err != nil {
		t.Fatal(err)
	}
	// Calls whose answer was on its way have begun.
	if calls, _ := w.seen(); calls > before+atOnce {
		t.Errorf("%d calls have begun while the server hung", calls-before)
	}
	if err := server.process.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := w.await(ctx, full); err != nil {
		t.Fatal(err)
	}
	w.slow(100 * time.Millisecond)
	before, _ = w.seen()
	if err := w.await(ctx, func(_ map[string]int, _, calls int) bool { return calls >= before+5*atOnce }); err != nil {
		t.Fatal(err)
	}
	if _, most := w.seen(); most != atOnce {
		t.Errorf("%d calls at once; want %d", most, atOnce)
	}
	if err := end(syscall.SIGTERM, workers...); err != nil {
		t.Error(err)
	}
	if err := server.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
