package engine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
)

// limitText is a policy of so many flows at the control point "point", which is named like its file.
func limitText(capacity int) string {
	return fmt.Sprintf(`circuit:
  components:
    - flow_control:
        rate_limiter:
          in_ports: {bucket_capacity: {constant_signal: {value: %d}}, fill_amount: {constant_signal: {value: %d}}}
          parameters: {interval: 3600s}
          selectors: [{control_point: point}]
`, capacity, capacity)
}

// namedText is the same as a resource, which has its name.
func namedText(name string, capacity int) string {
	indented := strings.ReplaceAll(strings.TrimSuffix(limitText(capacity), "\n"), "\n", "\n  ")
	return "apiVersion: fluxninja.com/v1alpha1\nkind: Policy\nmetadata: {name: " + name + "}\nspec:\n  " + indented + "\n"
}

const brokenText = "circuit:\n  components: [\n"

// watched is an engine that watches a path, in a bubble.
type watched struct {
	*engine.Engine
	t *testing.T

	mu       sync.Mutex // a bubble's time orders the reads of the test and the writes of the watch, but not for the race detector
	outcomes []error
	log      bytes.Buffer
}

// Write writes to the log.
func (w *watched) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(line)
}

func (w *watched) reloaded(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.outcomes = append(w.outcomes, err)
}

// watchPath begins to watch.
func watchPath(t *testing.T, path string) *watched {
	t.Helper()
	w := &watched{t: t}
	var err error
	if w.Engine, err = engine.New(nil, engine.WithLogger(slog.New(slog.NewTextHandler(w, nil)))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	if err := w.Watch(t.Context(), path, engine.WatchParams{OnReload: w.reloaded}); err != nil {
		t.Fatal(err)
	}
	return w
}

// after looks at what is in force after some more looks at the files: each policy and the capacity of its limiter.
func (w *watched) after(looks int, want string) {
	w.t.Helper()
	<-time.After(time.Duration(looks) * engine.DefaultWatchInterval)
	synctest.Wait()
	var got []string
	for _, c := range w.Stats().Components {
		got = append(got, fmt.Sprint(c.Policy, " ", c.Usage.Capacity))
	}
	if text := strings.Join(got, ", "); text != want {
		w.t.Errorf("in force: %s want %s", text, want)
	}
}

// reloads checks what was reported so far.
func (w *watched) reloads(applied, failed int, problem string) {
	w.t.Helper()
	got := w.Stats().Reloads
	w.mu.Lock()
	defer w.mu.Unlock()
	if got.Applied != uint64(applied) || got.Failed != uint64(failed) || (got.Error == "") != (problem == "") || !strings.Contains(got.Error, problem) {
		w.t.Errorf("Reloads = %+v want %d applied, %d failed, %q", got, applied, failed, problem)
	}
	good, bad := 0, 0
	for _, err := range w.outcomes {
		if err == nil {
			good++
		} else {
			bad++
		}
	}
	if good != applied-1 || bad != failed { // the first is what Watch returned
		w.t.Errorf("the callback got %v want %d good ones and %d errors", w.outcomes, applied-1, failed)
	}
	if n, m := strings.Count(w.log.String(), "level=INFO"), strings.Count(w.log.String(), "are not in force"); n != applied-1 || m != failed {
		w.t.Errorf("%d changes and %d errors are logged want %d and %d:\n%s", n, m, applied-1, failed, w.log.String())
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Skip("no symbolic links:", err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// A changed file is in force after two looks, and nothing happens while it stays the same. What did not change keeps its
// state.
func TestWatchFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "limits.yaml")
	writeFile(t, path, limitText(5))
	synctest.Test(t, func(t *testing.T) {
		w := watchPath(t, path)
		w.after(0, "limits 5")
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, limitText(7))
		if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil { // only the content tells
			t.Fatal(err)
		}
		w.after(1, "limits 5")
		w.after(1, "limits 7")
		w.reloads(2, 0, "")
		client, err := flowctl.New(w.Engine)
		if err != nil {
			t.Fatal(err)
		}
		end(client.Start(t.Context(), "point", flowctl.Params{}))
		writeFile(t, path, limitText(7)+"x-note: no change of a component\n")
		w.after(2, "limits 7")
		w.after(10, "limits 7")
		w.reloads(3, 0, "")
		if u := w.Stats().Components[0].Usage; u.Remaining >= 6.5 {
			t.Errorf("%v tokens remain want one taken", u.Remaining)
		}
	})
}

// Kubernetes swaps the directory behind a mounted config map by a symbolic link. Some programs mount its one file.
func TestWatchConfigMap(t *testing.T) {
	for _, name := range []string{"", "limits.yaml"} {
		dir := t.TempDir()
		version := func(name string, capacity int) {
			t.Helper()
			if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, name, "limits.yaml"), limitText(capacity))
		}
		version("..1", 5)
		symlink(t, "..1", filepath.Join(dir, "..data"))
		symlink(t, filepath.Join("..data", "limits.yaml"), filepath.Join(dir, "limits.yaml"))
		synctest.Test(t, func(t *testing.T) {
			w := watchPath(t, filepath.Join(dir, name))
			w.after(0, "limits 5")
			version("..2", 7)
			symlink(t, "..2", filepath.Join(dir, "..data_tmp"))
			rename(t, filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data"))
			if err := os.RemoveAll(filepath.Join(dir, "..1")); err != nil {
				t.Fatal(err)
			}
			w.after(2, "limits 7")
			w.reloads(2, 0, "")
		})
	}
}

// What is wrong is reported once, and what was in force stays, until the file is good again: also where that is what is
// in force.
func TestWatchKeepsTheOld(t *testing.T) {
	for _, tt := range []struct {
		name    string
		spoil   func(t *testing.T, path string)
		problem string
	}{
		{"broken", func(t *testing.T, path string) { writeFile(t, path, brokenText) }, "limits.yaml:"},
		{"empty", func(t *testing.T, path string) { writeFile(t, path, "") }, "holds no policy"},
		{"a number that is none", func(t *testing.T, path string) { writeFile(t, path, strings.Replace(limitText(7), "7", "-7", 1)) }, "must be a number from 0 up"},
		{"too large", func(t *testing.T, path string) { writeFile(t, path, limitText(7)+strings.Repeat("#", 16<<20)) }, "larger than 16 MiB"},
		{"gone", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, "limits.yaml"},
		{"unknown to the engine", func(t *testing.T, path string) {
			writeFile(t, path, `circuit:
  components:
    - flow_control:
        load_scheduler:
          in_ports: {load_multiplier: {signal_name: NOBODY}}
          parameters: {selectors: [{control_point: point}]}
`)
		}, "WithSignal"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "limits.yaml")
			writeFile(t, path, limitText(5))
			synctest.Test(t, func(t *testing.T) {
				w := watchPath(t, path)
				tt.spoil(t, path)
				w.after(10, "limits 5")
				w.reloads(1, 1, tt.problem)
				writeFile(t, path, limitText(5))
				w.after(10, "limits 5")
				w.reloads(2, 1, "")
				tt.spoil(t, path)
				w.after(2, "limits 5")
				w.reloads(2, 2, tt.problem)
				writeFile(t, path, limitText(7))
				w.after(2, "limits 7")
				w.reloads(3, 2, "")
			})
		})
	}
}

// A file that is being written is left alone, even where the part that is there would be a good one. A file that is
// missing for a moment is no error.
func TestWatchHalfWritten(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "limits.yaml")
	both := namedText("first", 5) + "---\n" + namedText("second", 6)
	writeFile(t, path, both)
	synctest.Test(t, func(t *testing.T) {
		w := watchPath(t, path)
		w.after(0, "first 5, second 6")
		half, _, _ := strings.Cut(both, "---\n")
		writeFile(t, path, half)
		w.after(1, "first 5, second 6")
		writeFile(t, path, strings.ReplaceAll(both, "value: 5", "value: 8"))
		w.after(1, "first 5, second 6")
		w.after(1, "first 8, second 6")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		w.after(1, "first 8, second 6")
		writeFile(t, path, strings.ReplaceAll(both, "value: 5", "value: 9"))
		w.after(2, "first 9, second 6")
		w.reloads(3, 0, "")
	})
}

// A directory is all or nothing, and only its policy files count.
func TestWatchDirectory(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, in("a.yaml"), limitText(1))
	writeFile(t, in("b.yml"), limitText(2))
	synctest.Test(t, func(t *testing.T) {
		w := watchPath(t, dir)
		w.after(0, "a 1, b 2")
		writeFile(t, in("a.yaml"), limitText(3))
		writeFile(t, in("b.yml"), brokenText)
		w.after(2, "a 1, b 2")
		w.reloads(1, 1, "b.yml:")
		writeFile(t, in("b.yml"), limitText(4))
		w.after(2, "a 3, b 4")
		for _, name := range []string{".c.yaml", "c.yaml~", "c.txt"} {
			writeFile(t, in(name), brokenText)
		}
		w.after(5, "a 3, b 4")
		w.reloads(2, 1, "")
		rename(t, in("b.yml"), in("c.yaml"))
		w.after(2, "a 3, c 4")
		if err := os.Remove(in("c.yaml")); err != nil {
			t.Fatal(err)
		}
		w.after(2, "a 3")
		if err := os.Remove(in("a.yaml")); err != nil {
			t.Fatal(err)
		}
		w.after(2, "a 3") // a directory without policies is a mistake
		w.reloads(4, 2, "no .yaml or .yml file")
	})
}

// What cannot be watched is an error, and leaves the engine as it is.
func TestWatchErrors(t *testing.T) {
	dir := t.TempDir()
	good, broken := filepath.Join(dir, "good.yaml"), filepath.Join(dir, "broken.yaml")
	writeFile(t, good, limitText(1))
	writeFile(t, broken, brokenText)
	e, err := engine.Load(good)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name, path string
		ctx        context.Context
		params     engine.WatchParams
		is         error
		want       string
	}{
		{"an interval", good, t.Context(), engine.WatchParams{Interval: -1}, nil, "the interval is negative"},
		{"a context", good, ended, engine.WatchParams{}, context.Canceled, "context canceled"},
		{"a missing file", good + "x", t.Context(), engine.WatchParams{}, fs.ErrNotExist, "good.yamlx"},
		{"a broken file", broken, t.Context(), engine.WatchParams{}, nil, "broken.yaml:"},
		{"a device", os.DevNull, t.Context(), engine.WatchParams{}, nil, os.DevNull},
	} {
		err := e.Watch(tt.ctx, tt.path, tt.params)
		if err == nil || !strings.HasPrefix(err.Error(), fmt.Sprintf("headgate: engine: watch %q: ", tt.path)) || !strings.Contains(err.Error(), tt.want) ||
			tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("%s: Watch() = %v want %s", tt.name, err, tt.want)
		}
	}
	if s := e.Stats(); len(s.Components) != 1 || s.Reloads != (engine.ReloadStats{}) {
		t.Errorf("Stats() = %+v want the one limiter, and nothing reloaded", s)
	}
	if err := e.Watch(t.Context(), good, engine.WatchParams{}); err != nil {
		t.Errorf("after the errors: Watch() = %v", err)
	}
	if err := e.Watch(t.Context(), good, engine.WatchParams{}); err == nil || !strings.Contains(err.Error(), "watches a path already") {
		t.Errorf("a second Watch() = %v", err)
	}
	_ = e.Close()
	if err := e.Watch(t.Context(), good, engine.WatchParams{}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("after Close: Watch() = %v", err)
	}
}

// A watch ends with its context, after which another may begin, and with the engine: the bubble does not end before the
// goroutines in it.
func TestWatchEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "limits.yaml")
	writeFile(t, path, limitText(5))
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.Load(path)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if err := e.Watch(ctx, path, engine.WatchParams{Interval: time.Minute}); err != nil {
			t.Fatal(err)
		}
		cancel()
		synctest.Wait()
		if err := e.Watch(t.Context(), path, engine.WatchParams{Interval: time.Minute}); err != nil {
			t.Errorf("after the first has ended: Watch() = %v", err)
		}
		writeFile(t, path, limitText(7))
		<-time.After(90 * time.Second)
		if got := e.Stats().Components[0].Usage.Capacity; got != 5 {
			t.Errorf("a capacity of %v after one look want 5", got)
		}
		<-time.After(time.Minute)
		if got := e.Stats().Components[0].Usage.Capacity; got != 7 {
			t.Errorf("a capacity of %v after two looks want 7", got)
		}
		_ = e.Close()
	})
}

// The engine logs its warnings when policies change, and not again for policies that it has already. Metrics show what
// became of the files.
func TestWatchIsShown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "limits.yaml")
	writeFile(t, path, strings.ReplaceAll(limitText(5), "fill_amount: {constant_signal: {value: 5}}", "fill_amount: {constant_signal: {value: 0}}"))
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		e, err := engine.Load(path, engine.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = e.Close() }()
		p := new(metertest.Provider)
		if err := e.Instrument(p); err != nil {
			t.Fatal(err)
		}
		for name := range p.Read(t.Context()) {
			if strings.HasPrefix(name, "policy_") {
				t.Errorf("%s is shown although nothing is watched", name)
			}
		}
		if err := e.Watch(t.Context(), path, engine.WatchParams{}); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(log.String(), "never refills"); n != 1 {
			t.Errorf("the warning is logged %d times want once:\n%s", n, log.String())
		}
		read := func(applied, failed, good float64) {
			t.Helper()
			got := p.Read(t.Context())
			if got["policy_reloads_total status=success"] != applied || got["policy_reloads_total status=error"] != failed || got["policy_last_reload_successful"] != good {
				t.Errorf("metrics = %v want %v, %v, %v", got, applied, failed, good)
			}
		}
		read(1, 0, 1)
		writeFile(t, path, brokenText)
		<-time.After(3 * engine.DefaultWatchInterval)
		synctest.Wait()
		read(1, 1, 0)
		writeFile(t, path, limitText(5))
		<-time.After(3 * engine.DefaultWatchInterval)
		synctest.Wait()
		read(2, 1, 1)
	})
}
