package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// post asks the handler to count the words of a body for a user.
func post(t *testing.T, h http.Handler, user, body string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/words", strings.NewReader(body))
	r.Header.Set("X-User", user)
	w := &statuses{ResponseRecorder: httptest.NewRecorder()}
	h.ServeHTTP(w, r)
	if w.n > 1 {
		t.Errorf("%d statuses were written want one", w.n)
	}
	return w.ResponseRecorder
}

// statuses counts the statuses that a handler writes.
type statuses struct {
	*httptest.ResponseRecorder
	n int
}

func (s *statuses) WriteHeader(code int) {
	s.n++
	s.ResponseRecorder.WriteHeader(code)
}

func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{wordCounts})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		h := newHandler(client)

		for i := range 5 {
			if w := post(t, h, "alice", "one two"); w.Code != http.StatusOK || w.Body.String() != "2\n" {
				t.Errorf("request %d: %d %q, want 200 and 2 words", i, w.Code, w.Body)
			}
		}
		if w := post(t, h, "alice", "one two"); w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "1" {
			t.Errorf("request 5: %d %v, want 429 and Retry-After: 1", w.Code, w.Header())
		}
		if w := post(t, h, "bob", "one two"); w.Code != http.StatusOK {
			t.Errorf("bob's first request: %d, want 200", w.Code)
		}
		<-time.After(time.Second)
		if w := post(t, h, "alice", "one two"); w.Code != http.StatusOK {
			t.Errorf("after a second: %d, want 200", w.Code)
		}
	})
}

// A30: an example answered 202 after 500. Each request here gets one status, whatever becomes of it.
func TestA30Answers(t *testing.T) {
	for _, tt := range []struct {
		name       string
		agent      flowtest.Answer
		user, body string
		want       int
		retryAfter string
	}{
		{name: "accepted", user: "alice", body: "one two", want: http.StatusOK},
		{name: "no user", body: "one two", want: http.StatusBadRequest},
		{name: "a user that is no label", user: strings.Repeat("a", 5000), want: http.StatusBadRequest},
		{name: "a body that is too long", user: "alice", body: strings.Repeat("a ", 1<<20), want: http.StatusBadRequest},
		{
			name:  "a part of a second is a second",
			agent: flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Millisecond},
			user:  "alice", want: http.StatusTooManyRequests, retryAfter: "1",
		},
		{
			name:  "seconds are rounded up",
			agent: flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 1100 * time.Millisecond},
			user:  "alice", want: http.StatusTooManyRequests, retryAfter: "2",
		},
		{
			name:  "nobody knows when",
			agent: flowtest.Answer{Reason: flowctl.ReasonRateLimited},
			user:  "alice", want: http.StatusTooManyRequests,
		},
		{
			name:  "the policy's status",
			agent: flowtest.Answer{Reason: flowctl.ReasonRateLimited, HTTPStatus: http.StatusServiceUnavailable},
			user:  "alice", want: http.StatusServiceUnavailable,
		},
		{
			name:  "unreachable",
			agent: flowtest.Answer{Fail: status.Error(codes.Unavailable, "down")},
			user:  "alice", want: http.StatusServiceUnavailable,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(tt.agent)
				w := post(t, newHandler(agent.Client()), tt.user, tt.body)
				if got := w.Header().Get("Retry-After"); w.Code != tt.want || got != tt.retryAfter {
					t.Errorf("got %d, Retry-After %q; want %d, %q", w.Code, got, tt.want, tt.retryAfter)
				}
			})
		})
	}
}

// A30: an example shut its client down while requests ran. Here a request that has begun before the service stops
// gets its answer, and then nothing listens any more.
func TestA30Shutdown(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout, printed := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, []string{"-listen", "127.0.0.1:0"}, printed) }()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	_, address, _ := strings.Cut(strings.TrimSpace(line), "http://")

	// With Expect, the body is read when the handler asks for it: then the flow has started.
	body, words := io.Pipe()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+address+"/words", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-User", "alice")
	r.Header.Set("Expect", "100-continue")
	transport := &http.Transport{ExpectContinueTimeout: time.Minute}
	defer transport.CloseIdleConnections()
	go func() {
		_, _ = io.WriteString(words, "before ")
		cancel()
		for {
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
			if err != nil {
				break
			}
			_ = conn.Close()
		}
		_, _ = io.WriteString(words, "after")
		_ = words.Close()
	}()
	response, err := transport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK || string(text) != "2\n" {
		t.Errorf("got %d %q, %v; want 200 and 2 words", response.StatusCode, text, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("run = %v, want nil", err)
	}
}

func TestAddressInUse(t *testing.T) {
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := run(t.Context(), []string{"-listen", listener.Addr().String()}, io.Discard); err == nil {
		t.Error("run = nil, want an error")
	}
}
