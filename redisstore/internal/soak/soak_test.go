//go:build unix

package soak_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/internal/testing/witness"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

const (
	// asWorker is the URL of the store that this test's process uses as a worker.
	asWorker = "HEADGATE_TEST_SOAK_WORKER"

	// length is how long the soak takes. See make soak-fleet.
	length = "HEADGATE_SOAK"
)

func TestMain(m *testing.M) {
	url := os.Getenv(asWorker)
	if url == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := work(context.Background(), url); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// workers is how many there are.
const workers = 4

// A soak is what the workers have seen.
type soak struct {
	t   *testing.T
	url string

	mu       sync.Mutex
	admitted map[string][]witness.Admission // by control point
	held     map[string][]hold
	counted  [4]int64
}

// A hold is a slot that a worker held.
type hold struct {
	witness.Hold
	worker *worker
}

// A worker is one process.
type worker struct {
	cmd   *exec.Cmd
	stdin io.Closer
	done  chan error // gets how it ended, after its output was read
	works chan struct{}

	// cutOff are the times when it was stopped for longer than its lease lasts: its slots are others' from then on.
	cutOff []time.Duration
}

// start starts a worker, and waits until it works.
func (s *soak) start() *worker {
	s.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	w := &worker{cmd: exec.CommandContext(s.t.Context(), exe), done: make(chan error, 1), works: make(chan struct{})}
	w.cmd.Env = append(os.Environ(), asWorker+"="+s.url)
	w.cmd.Stderr = os.Stderr
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if w.stdin, err = w.cmd.StdinPipe(); err != nil {
		s.t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		lines := bufio.NewReader(out)
		for {
			line, err := lines.ReadString('\n')
			if err != nil { // a worker that was killed may leave a part of a line
				break
			}
			s.read(w, line)
		}
		w.done <- w.cmd.Wait()
	}()
	select {
	case <-w.works:
	case err := <-w.done:
		s.t.Fatalf("a worker ended: %v", err)
	case <-time.After(time.Minute):
		s.t.Fatal("a worker does not work")
	}
	return w
}

// read takes in a line of a worker.
func (s *soak) read(w *worker, line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var point string
	var from, to time.Duration
	var counted [4]int64
	switch kind, rest, _ := strings.Cut(strings.TrimSpace(line), " "); kind {
	case "works":
		close(w.works)
	case "admitted":
		if _, err := fmt.Sscan(rest, &point, &from, &to); err == nil {
			s.admitted[point] = append(s.admitted[point], witness.Admission{Asked: from, Told: to, Tokens: 1})
		}
	case "held":
		if _, err := fmt.Sscan(rest, &point, &from, &to); err == nil {
			s.held[point] = append(s.held[point], hold{witness.Hold{From: from, To: to}, w})
		}
	case "counted":
		if _, err := fmt.Sscan(rest, &counted[0], &counted[1], &counted[2], &counted[3]); err == nil {
			for i, n := range counted {
				s.counted[i] += n
			}
		}
	default:
		s.t.Errorf("a worker says %q", line)
	}
}

// kill kills a worker.
func (w *worker) kill() {
	_ = w.cmd.Process.Kill()
	<-w.done
	_ = w.stdin.Close()
}

// TestFleetSoak has workers share limits for as long as HEADGATE_SOAK says, or for some seconds. Meanwhile it kills, stops and restarts
// their server and workers. It fails if more was let in within any span than the limits allow, or if limits let in too little.
func TestFleetSoak(t *testing.T) {
	lasts := 8 * time.Second
	if text := os.Getenv(length); text != "" {
		var err error
		if lasts, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", length, err)
		}
	}
	server := redistest.Start(t, redistest.Options{AOF: true})
	s := &soak{t: t, url: server.URL(), admitted: map[string][]witness.Admission{}, held: map[string][]hold{}}
	all := make([]*worker, workers)
	for i := range all {
		all[i] = s.start()
	}
	defer func() {
		for _, w := range all {
			if w != nil {
				w.kill()
			}
		}
	}()

	// Not all of the time is chaos: a limit that lets nothing in holds, too.
	wait := func(most time.Duration) { <-time.After(time.Duration(rand.Int64N(int64(most)))) }
	var down time.Duration
	outage := func(begin, end func(), most time.Duration) {
		begun := time.Now()
		begin()
		wait(most)
		end()
		down += time.Since(begun)
	}
	signal := func(w *worker, send func(*os.Process) error) {
		if err := send(w.cmd.Process); err != nil {
			t.Fatal(err)
		}
	}
	faults := []struct {
		name string
		do   func()
	}{
		{"the server is killed", func() { outage(server.Kill, server.Restart, 2*time.Second) }},
		{"the server is stopped", func() { outage(server.Stop, server.Continue, 2*time.Second) }},
		{"the server forgets its scripts", func() { server.Text("SCRIPT", "FLUSH") }},
		{"all connections are closed", func() { server.Text("CLIENT", "KILL", "TYPE", "normal") }},
		{"a worker is killed", func() {
			i := rand.IntN(workers)
			all[i].kill()
			wait(time.Second)
			all[i] = s.start()
		}},
		{"a worker is stopped", func() {
			w := all[rand.IntN(workers)]
			signal(w, redistest.StopProcess)
			wait(lease / 4)
			signal(w, redistest.ContinueProcess)
		}},
		{"a worker is stopped for longer than its lease", func() {
			w := all[rand.IntN(workers)]
			s.mu.Lock()
			w.cutOff = append(w.cutOff, time.Duration(time.Now().UnixNano()))
			s.mu.Unlock()
			signal(w, redistest.StopProcess)
			<-time.After(lease + lease/2)
			signal(w, redistest.ContinueProcess)
		}},
	}
	did := make([]int, len(faults))
	begun := time.Now()
	for n := 0; time.Since(begun) < lasts; n++ {
		i := rand.IntN(len(faults))
		if lasts < time.Minute { // each of the short ones
			i = n % (len(faults) - 1)
		}
		wait(2 * time.Second)
		faults[i].do()
		did[i]++
	}
	wait(2 * time.Second)
	lasted := time.Since(begun)
	for i, f := range faults {
		t.Logf("%s: %d times", f.name, did[i])
	}
	for i, w := range all {
		_ = w.stdin.Close()
		select {
		case err := <-w.done:
			all[i] = nil
			if err != nil {
				t.Errorf("a worker ended: %v", err)
			}
		case <-time.After(time.Minute):
			t.Fatal("a worker does not end")
		}
	}
	s.judge(lasted, down)
}

// judge says whether the limits held.
func (s *soak) judge(lasted, down time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.t.Logf("%v, of which the server was away for %v; of workers that were not killed %d flows were let in, %d rejected, %d rejected without the store",
		lasted.Round(time.Millisecond), down.Round(time.Millisecond), s.counted[0], s.counted[1], s.counted[2])
	for _, l := range loads() {
		if l.slots > 0 {
			s.judgeSlots(l)
			continue
		}
		admitted := s.admitted[l.point]
		worst := l.bound.Worst(admitted)
		most := l.bound.Capacity + l.bound.Rate*lasted.Seconds()
		s.t.Logf("%s: %d let in, %.1f %% of what the limit allows; closest to its bound, %.0f of %.1f within %v",
			l.point, len(admitted), 100*float64(len(admitted))/most, worst.Tokens, worst.Allowed, worst.To-worst.From)
		if worst.Broken() {
			s.t.Errorf("%s: %.3f were let in within %v; the bound is %.3f", l.point, worst.Tokens, worst.To-worst.From, worst.Allowed)
		}
		if len(admitted) == 0 {
			s.t.Errorf("%s: nothing was let in", l.point)
		}
	}
}

func (s *soak) judgeSlots(l load) {
	holds := make([]witness.Hold, 0, len(s.held[l.point]))
	for _, h := range s.held[l.point] {
		for _, at := range h.worker.cutOff {
			if h.From < at {
				h.To = min(h.To, at)
			} else if h.From < at+2*lease {
				h.To = h.From // it was told of it when it was others' already
			}
		}
		holds = append(holds, h.Hold)
	}
	most, _ := witness.AtOnce(holds)
	s.t.Logf("%s: held %d times, at most %d of %d at once", l.point, len(holds), most, l.slots)
	if most > l.slots {
		s.t.Errorf("%s: %d were held at once; there are %d", l.point, most, l.slots)
	}
	if most == 0 {
		s.t.Errorf("%s: none was held", l.point)
	}
}
