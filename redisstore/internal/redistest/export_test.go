//go:build unix

package redistest

import "syscall"

// Alive reports whether a process is there, for tests.
func Alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

// PID returns the number of the server's process.
func (s *Server) PID() int { return s.process.cmd.Process.Pid }
