package httpguard_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// slots is a client whose flows hold a slot each, and how to see that all came back.
type slots struct {
	*flowctl.Client
	side *sides.Side
}

func (s slots) held() int { return s.side.Held() }

// ended checks that so many flows were ended, each once.
func (s slots) ended(t *testing.T, n int) {
	t.Helper()
	if calls, returned := s.side.Returned(); calls != n || returned != n {
		t.Errorf("%d calls gave %d slots back, want %d", calls, returned, n)
	}
}

// overServers runs a test over both versions of HTTP, which is spoken over real connections, and over all kinds of
// agents. Of slots there are n.
func overServers(t *testing.T, n int, test func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server)) {
	t.Helper()
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		serve := func(t *testing.T) func(http.Handler) *httptest.Server {
			return func(h http.Handler) *httptest.Server {
				server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Proto != version {
						t.Errorf("the request is %s, want %s", r.Proto, version)
					}
					h.ServeHTTP(w, r)
				}))
				if version == "HTTP/2.0" {
					server.EnableHTTP2 = true
					server.StartTLS()
				} else {
					server.Start()
				}
				t.Cleanup(server.Close)
				return server
			}
		}
		for _, kind := range sides.All {
			t.Run(version+"/"+string(kind), func(t *testing.T) {
				limit := policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: float64(n), MaxInflight: time.Hour}
				setup := sides.Setup{Policies: sides.Policies(limit), Answers: []flowtest.Answer{{Slots: 1}}}
				if kind != sides.Embedded {
					setup.Options = []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), flowctl.WithEndTimeout(time.Minute)}
				}
				side := setup.New(t, kind)
				test(t, slots{side.Client, side}, serve(t))
			})
		}
	}
}

func get(ctx context.Context, server *httptest.Server) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, http.NoBody)
	if err != nil {
		return nil, err
	}
	return server.Client().Do(r)
}

// guarded wraps a handler, and closes done when its first request is over.
func guarded(client *flowctl.Client, h http.HandlerFunc) (guarded http.Handler, done <-chan struct{}) {
	over := make(chan struct{})
	var once sync.Once
	inner := httpguard.Middleware(client, point)(h)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer once.Do(func() { close(over) })
		inner.ServeHTTP(w, r)
	}), over
}

// A flow lasts as long as its handler: while that streams, and until a slow client has taken all.
func TestServerStreams(t *testing.T) {
	const size = 16 << 20 // more than the server's system and HTTP/2 buffer, which is some 4 MiB each
	overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		heard := make(chan struct{})
		h, done := guarded(s.Client, func(w http.ResponseWriter, _ *http.Request) {
			for i := range 3 {
				fmt.Fprintln(w, i)
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Error(err)
				}
				<-heard // each line arrives before the next is written
			}
			_, _ = w.Write(make([]byte, size))
		})
		server := serve(h)
		server.Client().Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if tcp, ok := conn.(*net.TCPConn); ok {
				err = tcp.SetReadBuffer(1 << 16)
			}
			return conn, err
		}
		resp, err := get(t.Context(), server)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body := bufio.NewReader(resp.Body)
		for i := range 3 {
			if line, err := body.ReadString('\n'); line != fmt.Sprintln(i) {
				t.Errorf("line %d: %q, %v", i, line, err)
			}
			if held := s.held(); held != 1 {
				t.Errorf("%d slots held, want 1", held)
			}
			heard <- struct{}{}
		}
		// The client is slow, and the handler has to wait for it.
		if _, err := io.CopyN(io.Discard, body, 1<<20); err != nil {
			t.Fatal(err)
		}
		select {
		case <-done:
			t.Error("the flow has ended before all was written")
		default:
		}
		if held := s.held(); held != 1 {
			t.Errorf("%d slots held, want 1", held)
		}
		if n, err := io.Copy(io.Discard, body); n != size-1<<20 || err != nil {
			t.Errorf("the rest has %d bytes, %v", n, err)
		}
		<-done
		if held := s.held(); held != 0 {
			t.Errorf("%d slots held, want 0", held)
		}
		s.ended(t, 1)
	})
}

// A client that leaves ends the flow by way of the handler, and not before.
func TestServerClientLeaves(t *testing.T) {
	overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		ctx, leave := context.WithCancel(t.Context())
		defer leave()
		h, done := guarded(s.Client, func(w http.ResponseWriter, r *http.Request) {
			gone := w.(http.CloseNotifier).CloseNotify() //nolint:staticcheck // some handlers still ask
			if held := s.held(); held != 1 {
				t.Errorf("%d slots held, want 1", held)
			}
			leave()
			<-gone
			<-r.Context().Done()
			w.WriteHeader(http.StatusInternalServerError)
		})
		server := serve(h)
		if _, err := get(ctx, server); !errors.Is(err, context.Canceled) {
			t.Errorf("get = %v, want that it was canceled", err)
		}
		<-done
		if held := s.held(); held != 0 {
			t.Errorf("%d slots held, want 0", held)
		}
		s.ended(t, 1)
	})
}

// A panic reaches the server, which cuts the response off, and the slot comes back.
func TestServerPanics(t *testing.T) {
	for name, value := range map[string]any{"ErrAbortHandler": http.ErrAbortHandler, "other": "oops"} {
		t.Run(name, func(t *testing.T) {
			overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
				server := serve(httpguard.Middleware(s.Client, point)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					_, _ = w.Write([]byte("half"))
					w.(http.Flusher).Flush()
					panic(value)
				})))
				server.Config.ErrorLog = discard()
				for range 3 {
					resp, err := get(t.Context(), server)
					if err != nil {
						t.Fatal(err)
					}
					if text, err := io.ReadAll(resp.Body); string(text) != "half" || err == nil {
						t.Errorf("got %q, %v; want that it was cut off", text, err)
					}
					_ = resp.Body.Close()
				}
				if held := s.held(); held != 0 {
					t.Errorf("%d slots held, want 0", held)
				}
				s.ended(t, 3)
			})
		})
	}
}

// An upload goes through as it comes, however slowly: the handler answers what it has got before the rest is sent.
func TestServerSlowUpload(t *testing.T) {
	overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		server := serve(httpguard.Middleware(s.Client, point)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c := http.NewResponseController(w)
			if err := c.EnableFullDuplex(); err != nil && r.ProtoMajor == 1 {
				t.Error(err)
			}
			lines := bufio.NewScanner(r.Body)
			for lines.Scan() {
				fmt.Fprintln(w, lines.Text())
				_ = c.Flush()
			}
		})))
		body, upload := io.Pipe()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, body)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.WriteString(upload, "line 0\n") }()
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		echo := bufio.NewReader(resp.Body)
		for i := range 3 {
			if line, err := echo.ReadString('\n'); line != fmt.Sprintf("line %d\n", i) {
				t.Fatalf("%q, %v", line, err)
			}
			if _, err := fmt.Fprintf(upload, "line %d\n", i+1); err != nil {
				t.Fatal(err)
			}
		}
		_ = upload.Close()
		if _, err := io.Copy(io.Discard, echo); err != nil {
			t.Error(err)
		}
		s.ended(t, 1)
	})
}

// TestA16UploadsAreNotBuffered is bug A16: each upload was kept in memory as a whole.
func TestA16UploadsAreNotBuffered(t *testing.T) {
	const size = 1 << 20
	uploads := race.Pick(8, 32)
	payload := bytes.Repeat([]byte("a"), size)
	count := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprint(w, n)
	})
	overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		allocated := func(h http.Handler) uint64 {
			server := serve(h)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range uploads {
				r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, bytes.NewReader(payload))
				if err != nil {
					t.Fatal(err)
				}
				resp, err := server.Client().Do(r)
				if err != nil {
					t.Fatal(err)
				}
				if text, _ := io.ReadAll(resp.Body); string(text) != fmt.Sprint(size) {
					t.Errorf("%s bytes arrived, want %d", text, size)
				}
				_ = resp.Body.Close()
			}
			runtime.ReadMemStats(&after)
			return after.TotalAlloc - before.TotalAlloc
		}
		bare, guarded := allocated(count), allocated(httpguard.Middleware(s.Client, point)(count))
		if guarded > bare+uint64(uploads)*size*3/4 { // less than kept uploads would, and more than buffers vary
			t.Errorf("%d uploads of %d bytes allocate %d bytes, and bare %d", uploads, size, guarded, bare)
		}
		s.ended(t, uploads)
	})
}

// Each of many requests, 64 of them at a time, is answered, and its flow ended once.
func TestServerManyRequests(t *testing.T) {
	const inFlight = 64
	overServers(t, inFlight, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		requests := race.Pick(2*inFlight, 10_000)
		if strings.Contains(t.Name(), "HTTP/2.0") {
			requests = max(requests/10, 2*inFlight) // whose encryption takes most of the time
		}
		var came atomic.Int64
		second := make(chan struct{})
		server := serve(httpguard.Middleware(s.Client, point)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch came.Add(1) { // the first waits for the second, so that there are two at once
			case 1:
				<-second
			case 2:
				close(second)
			}
			_, _ = io.Copy(w, r.Body)
		})))
		if transport, ok := server.Client().Transport.(*http.Transport); ok {
			transport.MaxIdleConnsPerHost = inFlight
		}
		var ok atomic.Int64
		group, ctx := errgroup.WithContext(t.Context())
		group.SetLimit(inFlight)
		for range requests {
			group.Go(func() error {
				r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL, strings.NewReader("body"))
				if err != nil {
					return err
				}
				resp, err := server.Client().Do(r)
				if err != nil {
					return err
				}
				defer resp.Body.Close()
				if text, err := io.ReadAll(resp.Body); err != nil || string(text) != "body" {
					return fmt.Errorf("%s: %q, %w", resp.Status, text, err)
				}
				ok.Add(1)
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
		server.Close()
		if ok.Load() != int64(requests) {
			t.Errorf("%d requests were answered want %d", ok.Load(), requests)
		}
		if held := s.held(); held != 0 {
			t.Errorf("%d slots held, want 0", held)
		}
		s.ended(t, requests)
	})
}

// Files still go out as the server sends them.
func TestServerFiles(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	content := strings.Repeat("0123456789", 100_000)
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		server := serve(httpguard.Middleware(s.Client, point)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.ServeFile(w, r, name)
		})))
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Range", "bytes=5-899999")
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusPartialContent || string(text) != content[5:900_000] {
			t.Errorf("%s with %d bytes, %v", resp.Status, len(text), err)
		}
	})
}

// watched says when it has been closed.
type watched struct {
	io.ReadWriteCloser
	once   sync.Once
	closed chan struct{}
}

func (w *watched) Close() error {
	defer w.once.Do(func() { close(w.closed) })
	return w.ReadWriteCloser.Close()
}

// An upgrade, through a reverse proxy whose transport is guarded too: bytes pass unchanged in both directions, and both
// flows end.
func TestServerUpgrade(t *testing.T) {
	back := flowtest.NewAgent(t)
	front := flowtest.NewAgent(t)
	out := flowtest.NewAgent(t)
	for _, agent := range []*flowtest.Agent{back, front, out} {
		agent.Answer(flowtest.Answer{Slots: 1})
	}
	var handlers sync.WaitGroup
	serve := func(agent *flowtest.Agent, h http.Handler) *httptest.Server {
		inner := httpguard.Middleware(agent.Client(), point)(h)
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handlers.Add(1)
			defer handlers.Done()
			inner.ServeHTTP(w, r)
		}))
		t.Cleanup(server.Close)
		return server
	}

	backend := serve(back, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "echo" {
			t.Errorf("header %v", r.Header)
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		for {
			line, err := rw.ReadString('\n')
			if err != nil {
				return
			}
			_, _ = rw.WriteString(line)
			_ = rw.Flush()
		}
	}))
	target, err := url.Parse(backend.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	guarded := httpguard.NewTransport(out.Client(), point, transport)
	closed := make(chan struct{}) // by the proxy, which does so when its handler has returned
	proxy := serve(front, &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: base(func(r *http.Request) (*http.Response, error) {
			resp, err := guarded.RoundTrip(r)
			if err != nil {
				return nil, err
			}
			body, ok := resp.Body.(io.ReadWriteCloser)
			if !ok {
				return nil, fmt.Errorf("a %T cannot be written to", resp.Body)
			}
			resp.Body = &watched{ReadWriteCloser: body, closed: closed}
			return resp, nil
		}),
		ErrorLog: discard(),
	})

	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", proxy.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: example\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	rw := bufio.NewReader(conn)
	resp, err := http.ReadResponse(rw, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", resp, err)
	}
	for _, line := range []string{"one\n", "two\n"} {
		if _, err := io.WriteString(conn, line); err != nil {
			t.Fatal(err)
		}
		if got, err := rw.ReadString('\n'); got != line {
			t.Errorf("echo of %q: %q, %v", line, got, err)
		}
	}
	for name, agent := range map[string]*flowtest.Agent{"backend": back, "proxy": front, "transport": out} {
		if agent.Held() != 1 {
			t.Errorf("%s: %d slots held while the connection is open, want 1", name, agent.Held())
		}
	}
	_ = conn.Close()
	handlers.Wait()
	<-closed
	for name, agent := range map[string]*flowtest.Agent{"backend": back, "proxy": front, "transport": out} {
		if agent.Held() != 0 || len(agent.Ends()) != 1 {
			t.Errorf("%s: %d slots held, %d ends, want 0 and 1", name, agent.Held(), len(agent.Ends()))
		}
	}
}

// What the upstream does to a guarded client over a real connection, and its flows all end.
func TestTransportOverServers(t *testing.T) {
	var leave atomic.Pointer[context.CancelFunc] // of the request under way
	upstream := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/abort":
			_, _ = io.WriteString(w, "half")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case "/reset":
			panic(http.ErrAbortHandler)
		case "/busy":
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(http.StatusServiceUnavailable)
		case "/leave":
			_, _ = io.Copy(io.Discard, r.Body) // else the server does not see the client leave
			(*leave.Load())()
			<-r.Context().Done()
		default:
			_, _ = io.Copy(w, r.Body)
		}
	})
	overServers(t, 1, func(t *testing.T, s slots, serve func(http.Handler) *httptest.Server) {
		server := serve(upstream)
		server.Config.ErrorLog = discard()
		client := &http.Client{Transport: httpguard.NewTransport(s.Client, point, server.Client().Transport)}
		ended := 0
		for _, tt := range []struct {
			path   string
			status int  // 0: none comes
			cut    bool // the body breaks off
		}{
			{path: "/echo", status: 200},
			{path: "/abort", status: 200, cut: true},
			{path: "/reset"},
			{path: "/leave"},
			{path: "/busy", status: 503},
			{path: "/echo"}, // during the pause, so without a flow
		} {
			ctx, cancel := context.WithCancel(t.Context())
			leave.Store(&cancel)
			r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL+tt.path, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(r)
			if !errors.Is(err, flowctl.ErrRejected) {
				ended++
			}
			if (err == nil) != (tt.status > 0) {
				t.Fatalf("%s: %v", tt.path, err)
			}
			if err == nil {
				if held := s.held(); held != 1 && tt.path != "/busy" {
					t.Errorf("%s: %d slots held, want 1", tt.path, held)
				}
				_, err = io.ReadAll(resp.Body)
				if resp.StatusCode != tt.status || (err != nil) != tt.cut {
					t.Errorf("%s: %s, %v", tt.path, resp.Status, err)
				}
				if held := s.held(); held != 0 {
					t.Errorf("%s: %d slots held before the body is closed, want 0", tt.path, held)
				}
				_ = resp.Body.Close()
			}
			if held := s.held(); held != 0 {
				t.Errorf("%s: %d slots held, want 0", tt.path, held)
			}
			cancel()
		}
		s.ended(t, ended)
	})
}
