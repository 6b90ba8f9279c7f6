//go:build unix

package redistest_test

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func want(t *testing.T, s *redistest.Server, answer string, args ...string) {
	t.Helper()
	if got := s.Text(args...); got != answer {
		t.Errorf("%v = %q want %q", args, got, answer)
	}
}

// A server has its address and its password again after it was killed, and what it was to keep.
func TestFleetServer(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		options redistest.Options
		kept    string
	}{
		{"in memory", redistest.Options{}, ""},
		{"AOF", redistest.Options{AOF: true}, "v"},
		{"password", redistest.Options{Password: "sesame: /1@", AOF: true}, "v"},
		{"directives", redistest.Options{Args: []string{"--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, tt.options)
			want(t, s, "OK", "SET", "k", "v")
			want(t, s, "v", "GET", "k")
			want(t, s, "", "GET", "none")
			want(t, s, "v\n\nv", "MGET", "k", "none", "k")
			want(t, s, "7", "EVAL", "return 7", "0")
			if answer, err := s.Do("INCR", "k"); err == nil || !strings.HasPrefix(err.Error(), "ERR ") {
				t.Errorf("INCR of a text = %v, %v want an error", answer, err)
			}
			if tt.options.Password == "" {
				want(t, s, "maxmemory-policy\n"+map[bool]string{true: "allkeys-lru", false: "noeviction"}[tt.options.Args != nil], "CONFIG", "GET", "maxmemory-policy")
			} else if !strings.HasPrefix(s.URL(), "redis://:sesame%3A%20%2F1%40@127.0.0.1:") {
				t.Errorf("URL() = %q has not the password", s.URL())
			}
			url := s.URL()
			s.Kill()
			if answer, err := s.Do("PING"); err == nil {
				t.Errorf("PING = %v from a server that was killed", answer)
			}
			s.Restart()
			if s.URL() != url {
				t.Errorf("URL() = %q after a restart, want %q", s.URL(), url)
			}
			want(t, s, tt.kept, "GET", "k")
		})
	}
}

// A server that is stopped does not answer, and answers what it was sent when it goes on.
func TestFleetStop(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Options{})
	s.Stop()
	if answer, err := s.Do("PING"); err == nil {
		t.Errorf("PING = %v from a server that is stopped", answer)
	}
	s.Continue()
	want(t, s, "PONG", "PING")
	s.Stop()
	s.Kill()
	s.Restart()
	want(t, s, "PONG", "PING")
	s.Stop() // the test's end kills it
}

// Servers of several tests do not meet.
func TestFleetMany(t *testing.T) {
	addresses := map[string]bool{}
	for range 5 {
		s := redistest.Start(t, redistest.Options{})
		addresses[s.Addr()] = true
		want(t, s, "0", "DBSIZE")
		want(t, s, "OK", "SET", "k", "v")
	}
	if len(addresses) != 5 {
		t.Errorf("addresses %v of 5 servers", addresses)
	}
}

func TestFleetCluster(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, redistest.Options{Password: "p"})
	if hosts := strings.Count(c.URL(), "127.0.0.1:"); hosts != 3 || !strings.HasPrefix(c.URL(), "redis://:p@") {
		t.Errorf("URL() = %q has %d hosts want 3", c.URL(), hosts)
	}
	slot := c.Slot("{tag}:a")
	owner := c.Owner(slot)
	other := c.Other(owner)
	want(t, owner, "OK", "SET", "{tag}:a", "v")
	want(t, owner, "OK", "SET", "{tag}:b", "v")
	if _, err := other.Do("GET", "{tag}:a"); err == nil || err.Error() != fmt.Sprintf("MOVED %d %s", slot, owner.Addr()) {
		t.Errorf("GET at another server: %v want where the slot is", err)
	}

	m := c.Begin(slot, other)
	if !m.Key() {
		t.Fatal("no key moved")
	}
	if _, err := owner.Do("MGET", "{tag}:a", "{tag}:b"); err == nil || !strings.HasPrefix(err.Error(), "TRYAGAIN ") {
		t.Errorf("MGET in the middle of a move: %v want TRYAGAIN", err)
	}
	if !m.Key() || m.Key() {
		t.Error("not exactly two keys moved")
	}
	m.End()
	if got := c.Owner(slot); got != other {
		t.Errorf("the owner of the slot is %s want %s", got.Addr(), other.Addr())
	}
	want(t, other, "v\nv", "MGET", "{tag}:a", "{tag}:b")

	c.Move(slot, owner)
	want(t, owner, "v\nv", "MGET", "{tag}:a", "{tag}:b")

	other.Kill()
	other.Restart()
	c.Await()
	want(t, owner, "v", "GET", "{tag}:a")
}

func TestFleetFailover(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name      string
		sentinels int
		gone      func(*redistest.Server)
	}{
		{"one Sentinel, killed", 1, (*redistest.Server).Kill},
		{"three Sentinels, stopped", 3, (*redistest.Server).Stop},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := redistest.StartReplicated(t, redistest.Options{Password: "p"}, tt.sentinels)
			if hosts := strings.Count(r.URL(), "127.0.0.1:"); hosts != tt.sentinels || !strings.HasSuffix(r.URL(), "/"+redistest.Primary) {
				t.Errorf("URL() = %q has %d hosts want %d", r.URL(), hosts, tt.sentinels)
			}
			primary, replica := r.Primary()
			want(t, primary, "OK", "SET", "k", "v")
			r.InStep()
			if _, err := replica.Do("SET", "k", "other"); err == nil || !strings.HasPrefix(err.Error(), "READONLY ") {
				t.Errorf("SET at the replica: %v want READONLY", err)
			}
			tt.gone(primary)
			next := r.Failover(primary)
			if next != replica {
				t.Fatal("the primary is what it was")
			}
			want(t, next, "v", "GET", "k")
			want(t, next, "OK", "SET", "k", "w")
			if got, _ := r.Primary(); got != next {
				t.Error("the Sentinels name another primary")
			}
		})
	}
}

// A proxy passes on what it is to, and nothing else.
func TestFleetProxy(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Options{Password: "p"})
	p := redistest.StartProxy(t, s)
	ping := func() (string, error) {
		t.Helper()
		answer, err := redistest.DoAt(p.Addr(), "p", time.Second, "SET", "k", "v")
		return fmt.Sprint(answer), err
	}
	if answer, err := ping(); err != nil || answer != "OK" {
		t.Errorf("through the proxy: %v, %v", answer, err)
	}
	p.Cut(len("+OK\r\n") + 2) // AUTH passes
	if _, err := ping(); err == nil {
		t.Error("a reply that was cut is an answer")
	}
	if answer, err := ping(); err != nil || answer != "OK" {
		t.Errorf("after the cut: %v, %v", answer, err)
	}
	p.Hold()
	replied := make(chan error)
	go func() {
		_, err := redistest.DoAt(p.Addr(), "p", time.Minute, "SET", "held", "v")
		replied <- err
	}()
	select {
	case err := <-replied:
		t.Errorf("a reply that is held has come: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	p.Release()
	if err := <-replied; err != nil {
		t.Errorf("a reply that was held: %v", err)
	}
	p.Lose()
	if _, err := ping(); err == nil {
		t.Error("a reply that was lost is an answer")
	}
	p.Close()
	if answer, err := ping(); err != nil || answer != "OK" {
		t.Errorf("after the loss: %v, %v", answer, err)
	}
}

// asDying makes this test's program one that dies with a server.
const asDying = "HEADGATE_TEST_DYING"

// A server does not outlive a test that dies without cleaning up.
func TestFleetPanic(t *testing.T) {
	if os.Getenv(asDying) != "" {
		s := redistest.Start(t, redistest.Options{})
		fmt.Printf("server %d.\n", s.PID())
		done := make(chan struct{})
		go func() {
			defer close(done)
			panic("a goroutine of the test")
		}()
		<-done
	}
	redistest.Find(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestFleetPanic$")
	cmd.Env = append(os.Environ(), asDying+"=1", "TMPDIR="+t.TempDir()) // for it leaves its folder
	out, err := cmd.CombinedOutput()
	_, after, found := strings.Cut(string(out), "server ")
	number, _, _ := strings.Cut(after, ".")
	pid, convErr := strconv.Atoi(number)
	if err == nil || !found || convErr != nil {
		t.Fatalf("%v, %s want a panic after a server's number", err, out)
	}
	for end := time.Now().Add(time.Minute); redistest.Alive(pid); <-time.After(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the server lives")
		}
	}
}

// Without a server, a test is skipped, or fails where servers are required.
func TestMissing(t *testing.T) {
	for _, tt := range []struct{ name, required, want string }{
		{"skip", "", "skip: redistest: no redis-server: nothing is tested with real servers"},
		{"required", "required", "fail: redistest: no redis-server, but HEADGATE_TEST_REDIS=required"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("PATH", "")
			t.Setenv("HEADGATE_TEST_REDIS", tt.required)
			tb := &recorder{}
			redistest.Find(tb)
			if !strings.HasPrefix(tb.said, tt.want) {
				t.Errorf("%q want %q", tb.said, tt.want)
			}
		})
	}
}

// A recorder is a test that records how it ends.
type recorder struct {
	redistest.TB
	said string
}

func (r *recorder) Helper() {}

func (r *recorder) Skipf(format string, args ...any) { r.end("skip: "+format, args...) }

func (r *recorder) Fatalf(format string, args ...any) { r.end("fail: "+format, args...) }

func (r *recorder) end(format string, args ...any) {
	if r.said == "" {
		r.said = fmt.Sprintf(format, args...)
	}
}

// A monitor has what the server ran, by clients and by scripts.
func TestFleetMonitor(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Options{})
	m := redistest.StartMonitor(t, s)
	want(t, s, "OK", "SET", "a \"b\"\r\n", "v")
	want(t, s, "v", "EVAL", "return redis.call('GET', KEYS[1])", "1", "a \"b\"\r\n")
	var got []string
	for _, c := range m.Commands() {
		got = append(got, fmt.Sprintf("%v %q", c.Lua, c.Args))
	}
	wanted := []string{
		`false ["SET" "a \"b\"\r\n" "v"]`,
		`false ["EVAL" "return redis.call('GET', KEYS[1])" "1" "a \"b\"\r\n"]`,
		`true ["GET" "a \"b\"\r\n"]`,
	}
	if !slices.Equal(got, wanted) {
		t.Errorf("Commands() = %q want %q", got, wanted)
	}
}

// A server asks for another password when it is changed, and is known by it.
func TestFleetPassword(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Options{Password: "p"})
	s.SetPassword("other")
	want(t, s, "PONG", "PING")
	if _, err := redistest.DoAt(s.Addr(), "p", time.Minute, "PING"); err == nil || !strings.HasPrefix(err.Error(), "WRONGPASS ") {
		t.Errorf("PING with the old password: %v want WRONGPASS", err)
	}
	if got := s.Info("redis_mode"); got != "standalone" {
		t.Errorf("Info(redis_mode) = %q", got)
	}
}
