package redistest

import (
	"bufio"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// A Command is what a server ran.
type Command struct {
	Lua  bool // a script did it
	Args []string
}

// A Monitor collects what a server runs.
type Monitor struct {
	server *Server

	mu       sync.Mutex
	commands []Command
	marks    map[string]bool
	marked   int
}

// StartMonitor has a server tell from now on what it runs.
func StartMonitor(tb TB, server *Server) *Monitor {
	tb.Helper()
	conn, err := net.Dial("tcp", server.Addr()) //nolint:noctx // to the loopback interface
	if err != nil {
		tb.Fatalf("redistest: %v", err)
	}
	in := bufio.NewReader(conn)
	if _, err = fmt.Fprint(conn, "MONITOR\r\n"); err == nil {
		_, err = in.ReadString('\n')
	}
	if err != nil {
		tb.Fatalf("redistest: %v", err)
	}
	m := &Monitor{server: server, marks: map[string]bool{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return // the connection is closed
			}
			m.add(line)
		}
	}()
	tb.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return m
}

// Quoted arguments of a line such as `+1339518083.107412 [0 127.0.0.1:60866] "keys" "*"`.
func (m *Monitor) add(line string) {
	head, rest, _ := strings.Cut(line, "] ")
	c := Command{Lua: strings.HasSuffix(head, " lua")}
	for _, quoted := range regexp.MustCompile(`"(?:[^"\\]|\\.)*"`).FindAllString(rest, -1) {
		arg, err := strconv.Unquote(quoted)
		if err != nil {
			arg = quoted
		}
		c.Args = append(c.Args, arg)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case len(c.Args) == 0:
	case c.Args[0] == "ECHO" && strings.HasPrefix(c.Args[1], "monitor-mark-"):
		m.marks[c.Args[1]] = true
	default:
		m.commands = append(m.commands, c)
	}
}

// Commands returns what the server has run until now.
func (m *Monitor) Commands() []Command {
	m.server.tb.Helper()
	m.mu.Lock()
	m.marked++
	mark := "monitor-mark-" + strconv.Itoa(m.marked)
	m.mu.Unlock()
	m.server.Text("ECHO", mark)
	m.server.await("mark in what the server runs", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.marks[mark]
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.commands
}
