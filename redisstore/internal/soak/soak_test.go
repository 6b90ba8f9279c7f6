//go:build unix

package soak_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
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
	t    *testing.T
	url  string
	down time.Duration // of servers

	mu       sync.Mutex
	admitted map[string][]witness.Admission // by control point and user
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
	<-w.done //nolint:errcheck // it was killed
	_ = w.stdin.Close()
}

// A fault is what happens to servers or workers.
type fault struct {
	name string
	do   func()
}

// wait waits for some time.
func wait(most time.Duration) { <-time.After(time.Duration(rand.Int64N(int64(most)))) }

// TestFleetSoak has workers share limits for as long as HEADGATE_SOAK says, or for some seconds. Meanwhile it kills, stops and restarts
// their servers and workers. It fails if more was let in within any span than the limits allow.
func TestFleetSoak(t *testing.T) {
	t.Run("server", func(t *testing.T) {
		t.Parallel()
		server := redistest.Start(t, redistest.Options{AOF: true})
		s := &soak{t: t, url: server.URL()}
		s.run(s.outages(server))
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		cluster := redistest.StartCluster(t, redistest.Options{AOF: true})
		s := &soak{t: t, url: cluster.URL()}
		faults := []fault{{"slots move in the cluster", func() {
			user := users()[rand.IntN(len(users()))]
			slot := cluster.Slot("{headgate:user=" + user + "}")
			cluster.Move(slot, cluster.Other(cluster.Owner(slot)))
		}}}
		for _, server := range cluster.Servers {
			for _, f := range s.outages(server) {
				faults = append(faults, fault{f.name, func() {
					f.do()
					cluster.Await()
				}})
			}
		}
		s.run(faults)
	})
}

// outages are the faults of a server.
func (s *soak) outages(server *redistest.Server) []fault {
	outage := func(begin, end func()) {
		begun := time.Now()
		begin()
		wait(2 * time.Second)
		end()
		s.down += time.Since(begun)
	}
	return []fault{
		{"a server is killed", func() { outage(server.Kill, server.Restart) }},
		{"a server is stopped", func() { outage(server.Stop, server.Continue) }},
		{"a server forgets its scripts", func() { server.Text("SCRIPT", "FLUSH") }},
		{"all connections are closed", func() { server.Text("CLIENT", "KILL", "TYPE", "normal") }},
	}
}

// run has workers share limits while the faults happen, and faults of the workers.
func (s *soak) run(faults []fault) {
	t := s.t
	t.Helper()
	lasts := 8 * time.Second
	if text := os.Getenv(length); text != "" {
		var err error
		if lasts, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", length, err)
		}
	}
	s.admitted, s.held = map[string][]witness.Admission{}, map[string][]hold{}
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
	signal := func(w *worker, send func(*os.Process) error) {
		if err := send(w.cmd.Process); err != nil {
			t.Fatal(err)
		}
	}
	faults = append(faults, fault{"a worker is killed", func() {
		i := rand.IntN(workers)
		all[i].kill()
		wait(time.Second)
		all[i] = s.start()
	}}, fault{"a worker is stopped", func() {
		w := all[rand.IntN(workers)]
		signal(w, redistest.StopProcess)
		wait(lease / 4)
		signal(w, redistest.ContinueProcess)
	}})
	if lasts >= time.Minute {
		faults = append(faults, fault{"a worker is stopped for longer than its lease", func() {
			w := all[rand.IntN(workers)]
			s.mu.Lock()
			w.cutOff = append(w.cutOff, time.Duration(time.Now().UnixNano()))
			s.mu.Unlock()
			signal(w, redistest.StopProcess)
			<-time.After(lease + lease/2)
			signal(w, redistest.ContinueProcess)
		}})
	}
	did := map[string]int{}
	begun := time.Now()
	// Not all of the time is chaos: a limit that lets nothing in holds, too.
	between := min(2*time.Second, lasts/time.Duration(2*len(faults)))
	for time.Since(begun) < lasts {
		for _, i := range rand.Perm(len(faults)) {
			wait(between)
			if time.Since(begun) >= lasts {
				break
			}
			faults[i].do()
			did[faults[i].name]++
		}
	}
	wait(2 * time.Second)
	lasted := time.Since(begun)
	for _, name := range slices.Sorted(maps.Keys(did)) {
		t.Logf("%s: %d times", name, did[name])
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
	s.judge(lasted)
}

// judge fails the test if a limit did not hold.
func (s *soak) judge(lasted time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.t.Logf("%v, of which servers were away for %v; of workers that were not killed %d flows were let in, %d rejected, %d rejected without the store",
		lasted.Round(time.Millisecond), s.down.Round(time.Millisecond), s.counted[0], s.counted[1], s.counted[2])
	for _, l := range loads() {
		for _, user := range users() {
			if l.slots > 0 {
				s.judgeSlots(l, l.point+"/"+user)
			} else {
				s.judgeTokens(l, l.point+"/"+user, lasted)
			}
		}
	}
}

func (s *soak) judgeTokens(l load, key string, lasted time.Duration) {
	admitted := s.admitted[key]
	worst := l.bound.Worst(admitted)
	most := l.bound.Capacity + l.bound.Rate*lasted.Seconds()
	s.t.Logf("%s: %d let in, %.1f %% of what the limit allows; closest to its bound, %.0f of %.1f within %v",
		key, len(admitted), 100*float64(len(admitted))/most, worst.Tokens, worst.Allowed, worst.To-worst.From)
	if worst.Broken() {
		s.t.Errorf("%s: %.3f were let in within %v; the bound is %.3f", key, worst.Tokens, worst.To-worst.From, worst.Allowed)
	}
	if l.since != (witness.Bound{}) {
		since := l.since.Since(admitted)
		s.t.Logf("%s: closest to the bound since the beginning, %.0f of %.1f within %v", key, since.Tokens, since.Allowed, since.To-since.From)
		if since.Broken() {
			s.t.Errorf("%s: %.3f were let in within %v since the beginning; the bound is %.3f", key, since.Tokens, since.To-since.From, since.Allowed)
		}
	}
	if len(admitted) == 0 {
		s.t.Errorf("%s: nothing was let in", key)
	}
}

func (s *soak) judgeSlots(l load, key string) {
	holds := make([]witness.Hold, 0, len(s.held[key]))
	for _, h := range s.held[key] {
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
	s.t.Logf("%s: held %d times, at most %d of %d at once", key, len(holds), most, l.slots)
	if most > l.slots {
		s.t.Errorf("%s: %d were held at once; there are %d", key, most, l.slots)
	}
	if most == 0 {
		s.t.Errorf("%s: none was held", key)
	}
}
