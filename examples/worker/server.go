package main

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// A server is a redis-server, or another program with the same arguments, such as valkey-server. What it keeps is in a folder.
type server struct {
	parts                 *parts
	program, folder, port string
	process               *exec.Cmd
}

// startServer starts a server.
func (p *parts) startServer(program, folder string) (s *server, err error) {
	for range 10 { // ports, in case one is taken
		// Systems give connections ports from 32768 on. So no connection has this one when the server starts again.
		s = &server{parts: p, program: program, folder: folder, port: strconv.Itoa(10_000 + rand.IntN(20_000))}
		if err = s.start(); err == nil || s.process == nil {
			return s, err
		}
	}
	return nil, err
}

func (s *server) url() string { return "redis://127.0.0.1:" + s.port }

// start starts the server, or starts it again. It returns when the server answers. All that it has answered is in its file, also after
// a kill; only if the machine dies, the last second is not.
func (s *server) start() error {
	c := exec.CommandContext(s.parts.ctx, s.program, "--bind", "127.0.0.1", "--port", s.port, "--dir", s.folder,
		"--maxmemory-policy", "noeviction", "--save", "", "--appendonly", "yes", "--appendfsync", "everysec")
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if _, err := s.parts.start(c); err != nil {
		return fmt.Errorf("no server (Debian: apt-get install redis-server): %w", err)
	}
	s.process = c
	last := ""
	for lines := bufio.NewScanner(out); lines.Scan(); last = lines.Text() {
		if strings.Contains(lines.Text(), "Ready to accept connections") {
			return nil
		}
	}
	return fmt.Errorf("the server has ended: %s", last)
}

// end ends the server's process.
func (s *server) end(by syscall.Signal) error { return end(by, s.process) }
