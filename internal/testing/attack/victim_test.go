//go:build linux

package attack_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/internal/testing/attack"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// length is how long an attack lasts. The tests are skipped where none is set.
func length(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("HEADGATE_ATTACK")
	if text == "" {
		t.Skip("takes minutes: make attack")
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("HEADGATE_ATTACK: %v", err)
	}
	return d
}

// holdsTimes is how long attacks have to last for the bounds of times to be held. Shorter runs, such as CI's, show the
// times and hold all other bounds: a few seconds on a shared machine say more about the machine than about a victim.
const holdsTimes = 10 * time.Second

// build makes the victims' program.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "victim")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./victim").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}

// A victim is a process.
type victim struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// How often the machine may let a call wait, by the longest that it lets work wait: to send and to receive on both sides,
// and to handle it; and where 64 flows get their answers at once, each time that the client's turn on a processor ends before it has read them.
const (
	starvations      = 5
	starvationsMixed = 40
	quiet            = 5 * time.Millisecond // on a machine that has no other work
)

// memoryLimit is the victim's GOMEMLIMIT, in MiB: at it the garbage collector works harder, and nothing else happens.
const memoryLimit = 512

func start(t *testing.T, program string, args ...string) *victim {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("GOMEMLIMIT=%dMiB", memoryLimit), "GOTRACEBACK=all")
	cmd.Stderr = t.Output()
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
	return &victim{cmd, in, bufio.NewScanner(out)}
}

// read reads the next line that the victim prints.
func (v *victim) read(t *testing.T, into any) {
	t.Helper()
	if !v.out.Scan() {
		t.Fatalf("the victim says nothing: %v, %v", v.out.Err(), v.cmd.Wait())
	}
	if err := json.Unmarshal(v.out.Bytes(), into); err != nil {
		t.Fatalf("%s: %v", v.out.Bytes(), err)
	}
}

// stats asks a server.
func (v *victim) stats(t *testing.T) (s attack.Stats) {
	t.Helper()
	if _, err := io.WriteString(v.in, "\n"); err != nil {
		t.Fatal(err)
	}
	v.read(t, &s)
	return s
}

// peak is the most memory that the victim has had, in MiB.
func (v *victim) peak(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatal("the system does not tell how much memory the victim has had")
	return 0
}

// processor is the processor time that the victim has had.
func (v *victim) processor(t *testing.T) time.Duration {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", v.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest) // of proc(5), from the third on
	user, err := strconv.Atoi(fields[14-3])
	if err != nil {
		t.Fatal(err)
	}
	system, err := strconv.Atoi(fields[15-3])
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// stop ends the victim, and gives the processor time that it has had.
func (v *victim) stop(t *testing.T) time.Duration {
	t.Helper()
	_ = v.in.Close()
	if err := v.cmd.Wait(); err != nil {
		t.Errorf("the victim: %v", err)
	}
	return v.cmd.ProcessState.UserTime() + v.cmd.ProcessState.SystemTime()
}
