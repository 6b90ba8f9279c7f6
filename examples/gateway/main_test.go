package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A fixture is a gateway and its upstream in a bubble, in which waits take no time and are exact.
type fixture struct {
	limits *engine.Engine
	vendor *upstream
	client *http.Client // finds both
}

const gatewayURL, vendorURL = "http://gateway", "http://vendor"

// inBubble runs a test. A nil handler is the upstream's own.
func inBubble(t *testing.T, handler http.Handler, test func(*testing.T, *fixture)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		limits, err := engine.New(limits)
		if err != nil {
			t.Fatal(err)
		}
		defer limits.Close()
		client, err := flowctl.New(limits)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close(t.Context())
		listeners := map[string]*pipes{"gateway:80": newPipes(), "vendor:80": newPipes()}
		base := &http.Transport{DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return listeners[address].dial(ctx)
		}}
		f := &fixture{limits: limits, vendor: newUpstream(), client: &http.Client{Transport: base}}
		if handler == nil {
			handler = f.vendor.handler()
		}
		for address, h := range map[string]http.Handler{"gateway:80": newGateway(client, base, vendorURL), "vendor:80": handler} {
			server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
			go func() { _ = server.Serve(listeners[address]) }()
			defer server.Close()
		}
		defer func() {
			base.CloseIdleConnections()
			<-time.After(time.Second) // a server lets half a second pass before it closes a connection with a body that is too long
		}()
		test(t, f)
	})
}

// pipes is a listener without a network. The deadlines of its connections hold, which servers need to use them again.
type pipes struct {
	conns  chan net.Conn
	closed context.Context
	close  context.CancelFunc
}

func newPipes() *pipes {
	l := &pipes{conns: make(chan net.Conn)}
	l.closed, l.close = context.WithCancel(context.Background())
	return l
}

func (l *pipes) dial(ctx context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.closed.Done():
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed.Done():
		return nil, net.ErrClosed
	}
}

func (l *pipes) Addr() net.Addr { return new(net.UnixAddr) }

func (l *pipes) Close() error {
	l.close()
	return nil
}

// ask sends a prompt, and says what the answer is.
func (f *fixture) ask(t *testing.T, tenant, text string) string {
	t.Helper()
	return ask(t.Context(), f.client, gatewayURL, tenant, "", text)
}

// begin sends a prompt, and returns when its answer has begun.
func (f *fixture) begin(ctx context.Context, t *testing.T, tenant, text string) io.ReadCloser {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, gatewayURL+"/chat", strings.NewReader(`{"prompt": "`+text+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-API-Key", "key-of-"+tenant)
	resp, err := f.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Body
}

// usage is what one component of the tenants' policy has for a tenant.
func (f *fixture) usage(t *testing.T, component, tenant string) engine.Usage {
	t.Helper()
	c, err := f.limits.Component("tenants", component)
	if err != nil {
		t.Fatal(err)
	}
	usage, err := c.Peek(t.Context(), tenant)
	if err != nil {
		t.Fatal(err)
	}
	return usage
}

// wantTokens checks what is left of a tenant's minute, to a token, because tokens come back all the time.
func (f *fixture) wantTokens(t *testing.T, tenant string, want float64, after time.Duration) {
	t.Helper()
	want += 10 * after.Seconds()
	if got := f.usage(t, "tokens", tenant).Remaining; got < want-1 || got > want+1 {
		t.Errorf("%v tokens are left of %s, want %v", got, tenant, want)
	}
}

// wantCalls checks what the upstream was asked.
func (f *fixture) wantCalls(t *testing.T, want string) {
	t.Helper()
	if got := f.vendor.String(); got != want {
		t.Errorf("%s; want %s", got, want)
	}
}

const output = `what happens                    answers                                               after
acme asks                       200 from large, 24 tokens                             0.1 s
acme asks the same              200 from large, 24 tokens                             0.0 s
acme wants long answers         200 from large, 252 tokens                            0.6 s
                                200 from large, 253 tokens                            0.6 s
                                200 from large, 254 tokens                            0.6 s
and has used up its minute      429, again in 22 s                                    0.0 s
initech asks                    200 from large, 24 tokens                             0.1 s
initech sends a batch of 8      6 × 200 from large, 24 tokens; 2 × 429, again in 1 s  2.0 s
globex asks 3 times meanwhile   3 × 200 from large, 25 tokens                         0.7 s
the large model pauses for 1 s  200 from large, 22 tokens                             1.n s
it pauses for a minute          200 from small, 22 tokens                             0.1 s
globex asks again               200 from small, 24 tokens                             0.1 s
calls of the large model: 17, of the small one: 2, refused: 2
`

// Requests wait longer for a pause by a random part.
var pause = regexp.MustCompile(`(pauses for 1 s .*)1\.[1-4] s`)

func TestShow(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		var stdout strings.Builder
		if err := show(t.Context(), &stdout, f.client, gatewayURL, f.vendor); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(output, pause.ReplaceAllString(stdout.String(), "${1}1.n s")); diff != "" {
			t.Errorf("stdout (-want +got):\n%s", diff)
		}
	})
}

// The recipe of this program shows its output, and says how long it is.
func TestRecipe(t *testing.T) {
	recipe, err := os.ReadFile("../../docs/recipes/gateway.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(pause.ReplaceAllString(string(recipe), "${1}1.n s"), output) {
		t.Errorf("the recipe has another output than this:\n%s", output)
	}
	program, err := os.ReadFile("gateway.go")
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
		t.Errorf("the recipe's table does not end with the %d lines that gateway.go has", lines)
	}
}

func TestAnswers(t *testing.T) {
	status := func(code int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
	}
	for _, tt := range []struct {
		name         string
		vendor       http.Handler
		tenant, text string
		want         string
	}{
		{name: "no tenant", tenant: "nobody", text: "hello", want: "401"},
		{name: "a prompt that is too long", tenant: "acme", text: strings.Repeat("a", 1<<20), want: "400"},
		{name: "a prompt that costs more than a minute has", tenant: "acme", text: strings.Repeat("a ", 600), want: "429"},
		{name: "both models are used up", vendor: status(http.StatusTooManyRequests), tenant: "acme", text: "hello", want: "429"},
		{name: "both models are overloaded", vendor: status(http.StatusServiceUnavailable), tenant: "acme", text: "hello", want: "503"},
		{name: "a model fails", vendor: status(http.StatusInternalServerError), tenant: "acme", text: "hello", want: "502"},
		{name: "an answer without usage", vendor: status(http.StatusOK), tenant: "acme", text: "hello", want: "502"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, tt.vendor, func(t *testing.T, f *fixture) {
				if got := f.ask(t, tt.tenant, tt.text); got != tt.want {
					t.Errorf("got %s, want %s", got, tt.want)
				}
			})
		})
	}
}

// The second request meets the pauses that the first one has begun, and learns when they end.
func TestBothPause(t *testing.T) {
	refuse := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusTooManyRequests)
	}
	inBubble(t, http.HandlerFunc(refuse), func(t *testing.T, f *fixture) {
		for i, want := range []string{"429", "429, again in 30 s"} {
			if got := f.ask(t, "acme", "hello"); got != want {
				t.Errorf("request %d: got %s, want %s", i+1, got, want)
			}
		}
	})
}

// People who would wait for longer than a second are answered by the small model. Batches wait.
func TestQueue(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		people := request{tenant: "acme", prompt: "What is in chapter", times: 6}
		if got := people.send(t.Context(), f.client, gatewayURL); !strings.Contains(got, "6 × 200 from large") {
			t.Errorf("6 requests: %s", got)
		}
		more := request{tenant: "acme", prompt: "What is in verse", times: 6}
		if got := more.send(t.Context(), f.client, gatewayURL); !strings.Contains(got, "from small") {
			t.Errorf("6 more requests: %s", got)
		}
		batch := request{tenant: "globex", kind: "batch", prompt: "Sum up document", times: 6}
		if got := batch.send(t.Context(), f.client, gatewayURL); !strings.Contains(got, "6 × 200 from large") {
			t.Errorf("a batch: %s", got)
		}
	})
}

// An answer that is cut is cut for the caller too, costs what it was taken for, and is not kept.
func TestCut(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		for range 2 {
			if got := f.ask(t, "acme", "cut"); got != io.ErrUnexpectedEOF.Error() {
				t.Errorf("got %s, want %v", got, io.ErrUnexpectedEOF)
			}
		}
		f.wantTokens(t, "acme", 600-2*51, 200*time.Millisecond)
		f.wantCalls(t, "calls of the large model: 2, of the small one: 0, refused: 0")
	})
}

// A caller that leaves ends the call of the model, gives its slot back, and pays what its flow was taken for.
func TestLeave(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		ctx, leave := context.WithCancel(t.Context())
		body := f.begin(ctx, t, "acme", "say 10000")
		defer body.Close()
		if got := f.usage(t, "requests", "acme").InFlight; got != 1 {
			t.Errorf("%v requests in flight, want 1", got)
		}
		leave()
		synctest.Wait()
		if got := f.usage(t, "requests", "acme").InFlight; got != 0 {
			t.Errorf("%v requests in flight after its caller has left, want 0", got)
		}
		f.wantTokens(t, "acme", 600-52, 100*time.Millisecond)
	})
}

// Callers of a tenant with the same prompt share a run. It goes on for the second when the first leaves, and costs once.
func TestShared(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		ctx, leave := context.WithCancel(t.Context())
		body := f.begin(ctx, t, "acme", "say 200")
		defer body.Close()
		second := make(chan string)
		go func() { second <- f.ask(t, "acme", "say 200") }()
		synctest.Wait()
		leave()
		if got, want := <-second, "200 from large, 202 tokens"; got != want {
			t.Errorf("the second: %s, want %s", got, want)
		}
		f.wantTokens(t, "acme", 600-202, 500*time.Millisecond)
		f.wantCalls(t, "calls of the large model: 1, of the small one: 0, refused: 0")
	})
}

// Neither the answers of a tenant nor its empty minute are another's. A prompt does not wait for tokens, however few it lacks.
func TestTenants(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		for _, ask := range []struct {
			after                time.Duration
			tenant, prompt, want string
		}{
			{0, "acme", "say 598", "200 from large, 600 tokens"},
			{0, "acme", "hello", "429, again in 4 s"},
			{3750 * time.Millisecond, "acme", "hello", "429, again in 1 s"},
			{0, "globex", "say 598", "200 from large, 600 tokens"},
		} {
			<-time.After(ask.after)
			if got := f.ask(t, ask.tenant, ask.prompt); got != ask.want {
				t.Errorf("%s, %q: got %s, want %s", ask.tenant, ask.prompt, got, ask.want)
			}
		}
	})
}

// The first answer begins with its first word, and has each word once. The second comes from the cache, with all words in a piece.
func TestStream(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, f *fixture) {
		for _, want := range []struct {
			begins, ends time.Duration
			pieces       int
		}{
			{100 * time.Millisecond, 298 * time.Millisecond, 100},
			{0, 0, 1},
		} {
			start := time.Now()
			body := f.begin(t.Context(), t, "acme", "say 100")
			begins := time.Since(start)
			text, err := io.ReadAll(body)
			if err != nil {
				t.Fatal(err)
			}
			_ = body.Close()
			if ends := time.Since(start); begins != want.begins || ends != want.ends {
				t.Errorf("the answer came from %v to %v, want from %v to %v", begins, ends, want.begins, want.ends)
			}
			words, pieces := strings.Count(string(text), "word "), strings.Count(string(text), `"text"`)
			if words != 100 || pieces != want.pieces || !strings.HasSuffix(string(text), "data: [DONE]\n\n") {
				t.Errorf("%d words in %d pieces, want 100 in %d, and an end:\n%s", words, pieces, want.pieces, text)
			}
		}
	})
}

// Of the program itself, over TCP.
func TestListen(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout, printed := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, []string{"-listen", "127.0.0.1:0"}, printed) }()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	_, url, _ := strings.Cut(strings.TrimSpace(line), "listening on ")
	transport := new(http.Transport)
	defer transport.CloseIdleConnections()
	if got, want := ask(t.Context(), &http.Client{Transport: transport}, url, "acme", "", "hello"), "200 from large, 21 tokens"; got != want {
		t.Errorf("got %s, want %s", got, want)
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
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "acme asks") {
			cancel()
		}
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("run = %v, want %v", err, context.Canceled)
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{{"now"}, {"-listen", "nowhere"}} {
		if err := run(t.Context(), args, io.Discard); err == nil {
			t.Errorf("run(%q) = nil, want an error", args)
		}
	}
}
