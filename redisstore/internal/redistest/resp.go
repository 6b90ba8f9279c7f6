package redistest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// An answerError is what a server answers that refuses a command, such as "MOVED 3999 127.0.0.1:6381".
type answerError string

func (e answerError) Error() string { return string(e) }

// DoAt sends a command to an address on a connection of its own, after the password if there is one. See [Server.Do] for the answer.
func DoAt(addr, password string, bound time.Duration, args ...string) (any, error) {
	conn, err := net.DialTimeout("tcp", addr, bound) //nolint:noctx // the dialer's own bound is enough
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(bound)); err != nil {
		return nil, err
	}
	in := bufio.NewReader(conn)
	send := func(args ...string) (any, error) {
		command := fmt.Appendf(nil, "*%d\r\n", len(args))
		for _, arg := range args {
			command = fmt.Appendf(command, "$%d\r\n%s\r\n", len(arg), arg)
		}
		if _, err := conn.Write(command); err != nil {
			return nil, err
		}
		return read(in)
	}
	if password != "" {
		if _, err := send("AUTH", password); err != nil {
			return nil, err
		}
	}
	return send(args...)
}

// read reads one answer of the protocol's version 2.
func read(in *bufio.Reader) (any, error) {
	line, err := in.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if line == "" {
		return nil, errors.New("an empty line for an answer")
	}
	kind, line := line[0], line[1:]
	if kind == '+' {
		return line, nil
	}
	if kind == '-' {
		return nil, answerError(line)
	}
	n, err := strconv.ParseInt(line, 10, 64)
	if err != nil {
		return nil, err
	}
	switch {
	case kind == ':':
		return n, nil
	case n < 0:
		return nil, nil
	case kind == '$':
		text := make([]byte, n+2)
		if _, err := io.ReadFull(in, text); err != nil {
			return nil, err
		}
		return string(text[:n]), nil
	case kind == '*':
		list := make([]any, 0, n)
		for range n {
			element, err := read(in)
			if refused, ok := errors.AsType[answerError](err); ok {
				element, err = refused, nil
			}
			if err != nil {
				return nil, err
			}
			list = append(list, element)
		}
		return list, nil
	default:
		return nil, fmt.Errorf("an answer of kind %q", kind)
	}
}

// text returns an answer as text, that of a list by line.
func text(answer any) string {
	switch a := answer.(type) {
	case nil:
		return ""
	case []any:
		lines := make([]string, len(a))
		for i, element := range a {
			lines[i] = text(element)
		}
		return strings.Join(lines, "\n")
	default:
		return fmt.Sprint(a)
	}
}
