//go:build unix

package engine_test

import (
	"context"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/policy"
)

// A FIFO is no file of policies. Nothing waits for its writer.
func TestWatchOfAFIFO(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "a.yaml"), limitText(1))
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := e.Watch(ctx, dir, engine.WatchParams{Interval: time.Millisecond, OnReload: func(err error) { failed <- err }}); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "b.yaml")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Skip("no FIFO:", err)
	}
	if err := <-failed; err == nil || !strings.Contains(err.Error(), fifo+": it is not a regular file") {
		t.Errorf("OnReload(%v) want the FIFO", err)
	}
	if _, err := policy.Load(dir); err == nil || !strings.Contains(err.Error(), fifo) {
		t.Errorf("Load() = %v want the FIFO", err)
	}
	_ = e.Close() // which must return
}
