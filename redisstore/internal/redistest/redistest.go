// Package redistest runs Redis servers for tests: one alone, a cluster, or a primary with its replica and Sentinels. It can stop,
// kill and restart them, move slots of a cluster, and break connections in the middle of a reply.
//
// Servers listen on free loopback ports and write to a folder of the test, so any number of tests and packages may run at once.
// They end with the test. They also end when the test's process dies in any other way.
//
// A test is skipped if there is no redis-server. It fails instead if HEADGATE_TEST_REDIS=required is set, which CI does.
package redistest

import (
	"errors"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// required is the variable of the environment that makes tests fail without servers.
const required = "HEADGATE_TEST_REDIS"

// aHang is how long nothing takes but a hang, and aCommand is that of a command. One may be lost while a server starts.
const (
	aHang    = time.Minute
	aCommand = 10 * time.Second
)

// TB is what a test or benchmark has that runs servers. A [testing.TB] is one.
type TB interface {
	Helper()
	TempDir() string
	Cleanup(f func())
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Options are how a server runs. The zero value keeps all in memory, asks for no password and evicts nothing.
type Options struct {
	// AOF has the server write each command to its file before it answers, and read the file when it restarts.
	AOF bool

	// Password is what clients have to give. Empty is none.
	Password string

	// Args are further directives, such as "--maxmemory", "2mb".
	Args []string
}

// A Server is one server's process. Its methods fail the test if they do not succeed. They may not be called concurrently,
// except Do, Addr and URL among each other.
type Server struct {
	tb   TB
	args []string
	o    Options
	dir  string
	port int
	bus  int // of a cluster's own traffic; 0 without one

	process *process // nil while it does not run
	stopped atomic.Bool
}

// Start starts a server.
func Start(tb TB, o Options) *Server {
	tb.Helper()
	return start(tb, o)
}

// Find returns the path of redis-server. It skips the test if there is none, or fails it if one is required.
func Find(tb TB) string {
	tb.Helper()
	path, err := exec.LookPath("redis-server")
	if err == nil {
		return path
	}
	if os.Getenv(required) == "required" {
		tb.Fatalf("redistest: no redis-server, but %s=required (Debian: apt-get install redis-server)", required)
	}
	tb.Skipf("redistest: no redis-server: nothing is tested with real servers (Debian: apt-get install redis-server)")
	return ""
}

// start starts a server, which has these arguments besides the options'.
func start(tb TB, o Options, args ...string) *Server {
	tb.Helper()
	s := &Server{tb: tb, o: o, dir: tb.TempDir(), args: args}
	tb.Cleanup(s.Kill)
	// Another process may take a port before the server does.
	for range 10 {
		s.port = freePort(tb)
		if s.clustered() {
			s.bus = freePort(tb)
		}
		if s.try() {
			return s
		}
	}
	tb.Fatalf("redistest: the server does not start:\n%s", s.log())
	return nil
}

func (s *Server) clustered() bool { return slices.Contains(s.args, "--cluster-enabled") }

// try starts the process, and reports whether it answers. It does not answer if its port is taken.
func (s *Server) try() bool {
	s.tb.Helper()
	s.process = run(s.tb, Find(s.tb), s.dir, s.arguments()...)
	if s.wait() {
		return true
	}
	s.Kill()
	return false
}

func (s *Server) arguments() []string {
	args := append([]string{}, s.args...) // a file's name comes first
	args = append(args, "--bind", "127.0.0.1", "--port", strconv.Itoa(s.port), "--dir", s.dir, "--logfile", filepath.Join(s.dir, "log"), "--daemonize", "no")
	if slices.Contains(s.args, "--sentinel") {
		return args
	}
	args = append(args, "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
	if s.o.AOF {
		args = append(args, "--appendonly", "yes", "--appendfsync", "always")
	}
	if s.o.Password != "" {
		args = append(args, "--requirepass", s.o.Password, "--masterauth", s.o.Password)
	}
	if s.bus != 0 {
		args = append(args, "--cluster-port", strconv.Itoa(s.bus))
	}
	return append(args, s.o.Args...)
}

// wait waits until the server answers, and reports whether it does so before it ends.
func (s *Server) wait() bool {
	s.tb.Helper()
	var err error
	s.await("answer", func() bool {
		_, err = DoAt(s.Addr(), s.o.Password, time.Second, "PING")
		return err == nil || s.process.ended()
	})
	return err == nil && !s.process.ended()
}

// await waits for a condition.
func (s *Server) await(what string, condition func() bool) {
	s.tb.Helper()
	if !awaited(condition) {
		_, err := s.Do("PING")
		s.tb.Fatalf("redistest: no %s after %v; PING: %v; the last of its log:\n%s", what, aHang, err, s.log())
	}
}

// awaited waits for a condition, and reports whether it has come true.
func awaited(condition func() bool) bool {
	for end := time.Now().Add(aHang); ; <-time.After(5 * time.Millisecond) {
		if condition() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// log returns the end of what the server has logged.
func (s *Server) log() string {
	text, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(string(text), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// Addr returns the server's host and port. They stay the same when it restarts.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// URL returns where the server is, with its password.
func (s *Server) URL() string { return s.at("redis", s.Addr()) }

func (s *Server) at(scheme, hosts string) string {
	u := url.URL{Scheme: scheme, Host: hosts}
	if s.o.Password != "" {
		u.User = url.UserPassword("", s.o.Password)
	}
	return u.String()
}

// Do sends a command on a connection of its own, and returns the answer: a string, an int64, nil or a []any of these.
func (s *Server) Do(args ...string) (any, error) {
	if s.stopped.Load() {
		return nil, errors.New("the server is stopped")
	}
	return DoAt(s.Addr(), s.o.Password, aCommand, args...)
}

// Text is [Server.Do] for a command that must succeed. It returns the answer as text, that of a list by line.
func (s *Server) Text(args ...string) string {
	s.tb.Helper()
	answer, err := s.Do(args...)
	if err != nil {
		s.tb.Fatalf("redistest: %s: %v; the last of its log:\n%s", args[0], err, s.log())
	}
	return text(answer)
}

// Info returns a field of what the server says about itself by INFO, such as "used_memory".
func (s *Server) Info(name string) string {
	s.tb.Helper()
	return strings.TrimSpace(field(s.Text("INFO", "everything"), name+":"))
}

// SetPassword has the server ask for another password from now on. Connections that are there stay.
func (s *Server) SetPassword(password string) {
	s.tb.Helper()
	s.Text("CONFIG", "SET", "requirepass", password)
	s.o.Password = password
}

// Stop stops the server's process: connections stay, and nothing is answered. See [Server.Continue].
func (s *Server) Stop() {
	s.tb.Helper()
	if err := s.process.stop(); err != nil {
		s.tb.Fatalf("redistest: stop: %v", err)
	}
	s.stopped.Store(true)
}

// Continue has a server that was stopped go on.
func (s *Server) Continue() {
	s.tb.Helper()
	if err := s.process.resume(); err != nil {
		s.tb.Fatalf("redistest: continue: %v", err)
	}
	s.stopped.Store(false)
}

// Kill ends the server as if its machine had lost power, except that what it has written is there. It may be stopped, or killed
// before.
func (s *Server) Kill() {
	if s.process != nil {
		s.process.kill()
		s.process = nil
	}
	s.stopped.Store(false)
}

// Restart starts a server again that was killed, at the same address. It waits until it answers.
func (s *Server) Restart() {
	s.tb.Helper()
	// A connection of another process may have the port for a moment.
	for range 10 {
		if s.try() {
			return
		}
	}
	s.tb.Fatalf("redistest: the server does not restart:\n%s", s.log())
}

// freePort returns a port of the loopback interface that nothing listens on. It is none of those that systems give to outgoing
// connections, so none of these takes it while the server does not run.
func freePort(tb TB) int {
	tb.Helper()
	for range 1000 {
		port := anyPort()
		if l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil { //nolint:noctx // it does not block
			if err := l.Close(); err != nil {
				tb.Fatalf("redistest: %v", err)
			}
			return port
		}
	}
	tb.Fatalf("redistest: no port is free")
	return 0
}
