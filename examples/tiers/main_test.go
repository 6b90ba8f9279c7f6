package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A fixture is a service in a bubble, in which waits take no time and are exact.
type fixture struct {
	*shower
	*service
	printed strings.Builder
}

// inBubble runs a test with limits.yaml, in which one text is replaced by another.
func inBubble(t *testing.T, from, to string, test func(*testing.T, *fixture)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "limits.yaml")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(limits), from, to)), 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		reloads := make(chan error, len(changes))
		watch := engine.WatchParams{OnReload: func(err error) { reloads <- err }}
		keys := maps.Clone(keys)
		keys["key-of-eve"] = key{"eve", "gold"} // no tier of the file
		s, err := newService(t.Context(), newAPI(), keys, path, watch, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := s.close(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		s.rpc.RegisterService(&orders, nil)
		listener := bufconn.Listen(1 << 16)
		go func() { _ = s.rpc.Serve(listener) }()
		defer s.rpc.Stop()
		conn, err := grpc.NewClient("passthrough:", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()

		f := &fixture{service: s}
		f.shower = &shower{
			out: &f.printed, client: &http.Client{Transport: handlers{"api": s.api, "admin": s.admin}}, conn: conn,
			api: "http://api", admin: "http://admin", limitsFile: path, reloads: reloads,
		}
		test(t, f)
	})
}

// handlers are those of hosts.
type handlers map[string]http.Handler

func (h handlers) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	h[r.URL.Host].ServeHTTP(w, r)
	return w.Result(), nil
}

// hash is that of a component's configuration, which may change with any field that components get.
var hash = regexp.MustCompile(`policy_hash="[0-9a-f]+"`)

const output = `
The first day is a dry run
  ann (free) asks 5 times                 5 × 200
  mallory (free, shut off) asks           1 × 200
  globex (paid) asks 15 times             15 × 200
  and 2 times by gRPC                     2 × OK
  acme (paid, with more) asks 15 times    15 × 200
  initech (paid): 4 reports at once       4 × 200

Who would have been limited, by /limited
  free      ann       2
  free      mallory   1
  paid      globex    7
  at-once   initech   2

The same in numbers, by /metrics
  flowcontrol_dry_run_drops_total{component_id="at-once",policy_hash="…",policy_name="api"} 2
  flowcontrol_dry_run_drops_total{component_id="free",policy_hash="…",policy_name="api"} 3
  flowcontrol_dry_run_drops_total{component_id="paid",policy_hash="…",policy_name="api"} 7

The limits come into force
  ann (free) asks 5 times                 3 × 200, 2 × 429 again in 1 s
  mallory (free, shut off) asks           1 × 429
  globex (paid) asks 15 times             10 × 200, 5 × 429 again in 1 s
  and 2 times by gRPC                     2 × ResourceExhausted again in 1 s
  acme (paid, with more) asks 15 times    15 × 200
  initech (paid): 4 reports at once       2 × 200, 2 × 429 again in 1 s

Globex gets an exception
  globex (paid) asks 15 times             15 × 200
  and 2 times by gRPC                     2 × OK

A mistake changes nothing
  limits.yaml:32:9: policies[0].components[2].concurrency_limiter.max: is required
  limits.yaml:36:11: policies[0].components[2].concurrency_limiter.mix: unknown key; did you mean "max"?
  ann (free) asks 5 times                 3 × 200, 2 × 429 again in 1 s
`

func TestShow(t *testing.T) {
	inBubble(t, "", "", func(t *testing.T, f *fixture) {
		if err := f.show(t.Context()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(output, hash.ReplaceAllString(f.printed.String(), `policy_hash="…"`)); diff != "" {
			t.Errorf("output (-want +got):\n%s", diff)
		}
	})
}

// The recipe of this program shows its output, and says how long it is.
func TestRecipe(t *testing.T) {
	recipe, err := os.ReadFile("../../docs/recipes/tiers.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(recipe), strings.TrimPrefix(output, "\n")) {
		t.Errorf("the recipe has another output than this:\n%s", output)
	}
	program, err := os.ReadFile("tiers.go")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for line := range strings.Lines(string(program)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
			lines++
		}
	}
	if sum := fmt.Sprintf("| **%d** |\n", lines); !strings.Contains(string(recipe), sum) {
		t.Errorf("the recipe's table does not end with the %d lines that tiers.go has", lines)
	}
}

// Nobody gets in without a key, and nobody can claim a tier or the key of somebody else.
func TestKeys(t *testing.T) {
	inBubble(t, "&dry-run true", "&dry-run false", func(t *testing.T, f *fixture) {
		for _, path := range []string{"/orders", ""} {
			got, want := f.ask(t.Context(), path, "key-of-nobody"), "401"
			if path == "" {
				want = "Unauthenticated"
			}
			if got != want {
				t.Errorf("%q without a key: %s, want %s", path, got, want)
			}
		}
		for i := range 4 {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/orders", http.NoBody)
			r.Header.Set("X-API-Key", "key-of-ann")
			r.Header.Set("baggage", "tier=paid,key_id=acme")
			w := httptest.NewRecorder()
			f.service.api.ServeHTTP(w, r)
			if want := []int{200, 200, 200, 429}[i]; w.Code != want {
				t.Errorf("request %d that claims to be another's: %d, want %d", i+1, w.Code, want)
			}
		}
	})
}

// A key whose tier the file does not name is limited, too.
func TestUnknownTier(t *testing.T) {
	inBubble(t, "&dry-run true", "&dry-run false", func(t *testing.T, f *fixture) {
		if err := f.send(t.Context(), []requests{{key: "key-of-eve", path: "/orders", times: 4}}); err != nil {
			t.Fatal(err)
		}
		if got, want := strings.TrimSpace(f.printed.String()), "3 × 200, 1 × 429 again in 1 s"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

// Who has used up a limit gets no other one because the file changes. More of it is more.
func TestChangeKeepsState(t *testing.T) {
	inBubble(t, "interval: 1s", "interval: 1h", func(t *testing.T, f *fixture) {
		steps := []struct {
			old, new, want string
			times          int
		}{
			{"&dry-run true", "&dry-run false", "3 × 200, 2 × 429 again in 1200 s", 5},
			{"acme: {capacity: 20, fill: 20}", "acme: {capacity: 25, fill: 25}", "1 × 429 again in 1196 s", 1},
			{"mallory: {capacity: 0, fill: 0}", "ann: {capacity: 5, fill: 3}", "2 × 200, 1 × 429 again in 1192 s", 3},
		}
		for _, step := range steps {
			if err := f.change(t.Context(), change{old: step.old, new: step.new}); err != nil {
				t.Fatal(err)
			}
			f.printed.Reset()
			if err := f.send(t.Context(), []requests{{key: "key-of-ann", path: "/orders", times: step.times}}); err != nil {
				t.Fatal(err)
			}
			if got := strings.TrimSpace(f.printed.String()); got != step.want {
				t.Errorf("after %q: %s, want %s", step.new, got, step.want)
			}
		}
	})
}

func TestNoLimits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "limits.yaml")
	if _, err := newService(t.Context(), newAPI(), keys, path, engine.WatchParams{}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("newService without a file: %v, want %v", err, os.ErrNotExist)
	}
}

// Of the program itself, over TCP.
func TestListen(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout, printed := io.Pipe()
	ended := make(chan error, 1)
	args := []string{"-listen", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-grpc", "127.0.0.1:0"}
	go func() { ended <- run(ctx, args, printed) }()
	lines, at := bufio.NewScanner(stdout), make(map[string]string)
	for len(at) < 4 && lines.Scan() {
		what, where, _ := strings.Cut(lines.Text(), ":")
		at[what] = strings.TrimSpace(where)
	}
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	conn, err := grpc.NewClient(at["gRPC"], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := &shower{client: &http.Client{Transport: transport}, conn: conn, api: at["API"], admin: at["admins"]}
	for path, want := range map[string]string{"/orders": "200", "": "OK"} {
		if got := s.ask(t.Context(), path, "key-of-acme"); got != want {
			t.Errorf("%q: %s, want %s", path, got, want)
		}
	}
	for _, path := range []string{"/limited", "/metrics"} {
		resp, err := s.get(t.Context(), s.admin+path, "")
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s, want 200", path, resp.Status)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("run = %v, want nil", err)
	}
}

func TestInterrupt(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout, printed := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, printed)
		_ = printed.Close()
	}()
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "The limits come into force") {
			cancel()
		}
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("run = %v, want %v", err, context.Canceled)
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{
		{"now"},
		{"-listen", "nowhere"},
		{"-limits", "limits.yaml"},
		{"-listen", "127.0.0.1:0", "-limits", "nowhere.yaml"},
		{"-listen", "127.0.0.1:0", "-admin", "nowhere"},
		{"-listen", "127.0.0.1:0", "-admin", "127.0.0.1:0", "-grpc", "nowhere"},
	} {
		if err := run(t.Context(), args, io.Discard); err == nil {
			t.Errorf("run(%q) = nil, want an error", args)
		}
	}
}
