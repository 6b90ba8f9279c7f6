package redisstore

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// A fakeServer is a server of any kind that answers as a test wants it.
type fakeServer struct {
	host, port string
	answers    atomic.Pointer[func(args []string) string]
	commands   atomic.Int64
}

// startFake starts a server that is honest.
func startFake(tb testing.TB) *fakeServer {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s := &fakeServer{}
	if s.host, s.port, err = net.SplitHostPort(l.Addr().String()); err != nil {
		tb.Fatal(err)
	}
	s.answer(s.honest)
	var done sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // it is closed
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			done.Go(func() {
				defer func() { _ = conn.Close() }()
				s.serve(conn)
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, conn := range conns {
			_ = conn.Close()
		}
		mu.Unlock()
		done.Wait()
	})
	return s
}

func (s *fakeServer) answer(how func(args []string) string) { s.answers.Store(&how) }

func (s *fakeServer) serve(conn net.Conn) {
	in := bufio.NewReader(conn)
	number := func() int {
		line, err := in.ReadString('\n')
		if err != nil {
			return -1
		}
		n, err := strconv.Atoi(strings.TrimSpace(line[1:]))
		if err != nil {
			return -1
		}
		return n
	}
	for {
		var args []string
		for range max(number(), 0) {
			arg := make([]byte, max(number(), 0)+2)
			if _, err := io.ReadFull(in, arg); err != nil {
				return
			}
			args = append(args, string(arg[:len(arg)-2]))
		}
		if args == nil {
			return
		}
		s.commands.Add(1)
		if _, err := io.WriteString(conn, (*s.answers.Load())(args)); err != nil {
			return
		}
	}
}

// honest answers as a server does that is alone, the one server of a cluster, and the Sentinel of itself.
func (s *fakeServer) honest(args []string) string {
	switch args[0] {
	case "HELLO":
		return "%3\r\n+server\r\n+redis\r\n+version\r\n+7.2.0\r\n+proto\r\n:" + args[1] + "\r\n"
	case "INFO":
		return "=38\r\ntxt:aof_enabled:1\r\nmaxmemory_policy:x\r\n"
	case "EVALSHA", "EVAL":
		now := binary.LittleEndian.AppendUint64(nil, math.Float64bits(float64(time.Now().UnixMicro())))
		return fmt.Sprintf("$8\r\n%s\r\n", now)
	case "ROLE":
		return listOf("*", "master")
	case "PING":
		return "+PONG\r\n"
	case "SENTINEL":
		if args[1] == "SENTINELS" {
			return "*0\r\n"
		}
		return listOf("*", s.host, s.port)
	case "CLUSTER":
		return "*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$" + strconv.Itoa(len(s.host)) + "\r\n" + s.host + "\r\n:" + s.port + "\r\n"
	case "SUBSCRIBE", "UNSUBSCRIBE":
		all := ""
		for _, channel := range args[1:] {
			all += listOf(">", strings.ToLower(args[0]), channel, "1")
		}
		return all
	case "PUBLISH", "ZREM", "DEL":
		return ":1\r\n"
	case "GET":
		return "_\r\n"
	default:
		return "+OK\r\n"
	}
}

// urls are those of the server, in each of its parts.
func (s *fakeServer) urls() map[string]string {
	at := net.JoinHostPort(s.host, s.port)
	return map[string]string{
		"alone":    "redis://" + at,
		"cluster":  "redis://" + at + "?cluster=true",
		"Sentinel": "redis+sentinel://" + at + "/p",
	}
}

// hostile are replies that a client of Redis has trouble with.
func hostile() map[string]string {
	return map[string]string{
		"longest string":       "$9223372036854775807\r\n",
		"negative string":      "$-9223372036854775807\r\n",
		"long string":          "$1099511627776\r\nx",
		"longest list":         "*9223372036854775807\r\n",
		"long list":            "*1000000000\r\n",
		"null map":             "%-1\r\n",
		"negative chunk":       "$?\r\n;-5\r\n",
		"lists in lists":       strings.Repeat("*1\r\n", 1e6) + ":1\r\n",
		"two replies":          "+OK\r\n+OK\r\n",
		"subscription":         listOf(">", "subscribe", "x", "1"),
		"redirection":          "-MOVED\r\n",
		"redirection once":     "-ASK 1\r\n",
		"empty list":           "*0\r\n",
		"Sentinel":             listOf(">", "message", "+sentinel", "x") + "+OK\r\n",
		"failover":             listOf(">", "message", "+switch-master", "p") + "+OK\r\n",
		"queued":               "+QUEUED\r\n",
		"garbage":              "\x00\x01GET / HTTP/1.1\r\n",
		"endless line":         "+" + strings.Repeat("x", 8<<20),
		"endless stream":       "*?\r\n" + strings.Repeat(":1\r\n", 1e6),
		"numbers":              ":-1\r\n",
		"map":                  "%1\r\n$1\r\na\r\n:1\r\n",
		"string that is short": "$3\r\nabc\r\n",
		"nothing":              "",
	}
}

// Whatever a server sends, the process lives, callers get errors within their bound, and the store can be closed.
func TestHostileServer(t *testing.T) {
	for name, reply := range hostile() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startFake(t)
			for kind, url := range server.urls() {
				server.answer(server.honest)
				s, err := Open(t.Context(), url, WithTimeout(20*time.Millisecond))
				if err != nil {
					t.Fatalf("%s: %v", kind, err)
				}
				s.Wake(one.Key, func() {}) // so it listens
				server.answer(func([]string) string { return reply })
				for began := time.Now(); !s.Down() && time.Since(began) < 2*time.Second; {
					if err := takeOne(t.Context(), s); err == nil {
						t.Errorf("%s: a call succeeded", kind)
					}
					if values, err := s.Get(t.Context(), []shared.CacheKey{{Key: "k"}}); err == nil && len(values[0]) > len("QUEUED") { // a short text is a value like any other
						t.Errorf("%s: a value of %d bytes", kind, len(values[0]))
					}
				}
				if err := s.Close(); err != nil {
					t.Errorf("%s: %v", kind, err)
				}
			}
		})
	}
}

// The client does not panic, whatever comes after some replies that are honest.
func FuzzClient(f *testing.F) {
	for _, reply := range hostile() {
		if len(reply) > 1000 {
			continue
		}
		for kind := range byte(3) {
			for _, after := range []byte{0, 3, 4, 6} {
				f.Add(kind, after, []byte(reply))
			}
		}
	}
	f.Fuzz(func(t *testing.T, kind, after byte, reply []byte) {
		server := startFake(t)
		var n atomic.Int64
		server.answer(func(args []string) string {
			if n.Add(1) <= int64(after) {
				return server.honest(args)
			}
			return string(reply)
		})
		o, err := parseURL(server.urls()[[]string{"alone", "cluster", "Sentinel"}[kind%3]])
		if err != nil {
			t.Fatal(err)
		}
		const bound = 30 * time.Millisecond
		o.Dialer.Timeout, o.Dialer.KeepAlive, o.ConnWriteTimeout = bound, bound, bound
		o.Sentinel.Dialer = o.Dialer
		o.DialCtxFn = (&link{}).dial
		client, err := rueidis.NewClient(o)
		if err != nil {
			if client != nil {
				client.Close()
			}
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), bound)
		defer cancel()
		var done sync.WaitGroup
		done.Go(func() {
			_ = client.Receive(ctx, client.B().Subscribe().Channel("c", "d").Build(), func(rueidis.PubSubMessage) {})
		})
		for range 3 {
			_ = client.Do(unbounded{ctx}, client.B().Get().Key("k").Build()).Error()
		}
		done.Wait()
		client.Close()
	})
}
