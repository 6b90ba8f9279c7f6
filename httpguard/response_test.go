package httpguard_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/httpguard"
)

// below is a ResponseWriter that can do what it is made of, and notes its calls.
type below struct {
	http.ResponseWriter
	calls *[]string
}

func (b below) note(call string) { *b.calls = append(*b.calls, call) }

type (
	flusher  struct{ below }
	taker    struct{ below }
	pusher   struct{ below }
	receiver struct{ below }
	deadline struct{ below }
)

func (f flusher) Flush() { f.note("Flush") }

func (h taker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	h.note("Hijack")
	return nil, nil, nil
}

func (p pusher) Push(target string, _ *http.PushOptions) error {
	p.note("Push " + target)
	return nil
}

func (r receiver) ReadFrom(src io.Reader) (int64, error) {
	r.note("ReadFrom " + reflect.TypeOf(src).String())
	return io.Copy(io.Discard, src)
}

func (d deadline) SetReadDeadline(time.Time) error {
	d.note("SetReadDeadline")
	return nil
}

func (d deadline) SetWriteDeadline(time.Time) error {
	d.note("SetWriteDeadline")
	return nil
}

func (d deadline) EnableFullDuplex() error {
	d.note("EnableFullDuplex")
	return nil
}

// Type assertions find what the ResponseWriter below has, and nothing that it has not: handlers decide by them whether
// they can stream.
func TestResponseWriterIsWhatIsBelow(t *testing.T) {
	var calls []string
	b := below{httptest.NewRecorder(), &calls}
	for _, tt := range []struct {
		name                string
		w                   http.ResponseWriter
		flush, hijack, push bool
	}{
		{name: "none", w: b},
		{name: "Flusher", w: flusher{b}, flush: true},
		{name: "Hijacker", w: taker{b}, hijack: true},
		{name: "Pusher", w: pusher{b}, push: true},
		{name: "Flusher, Hijacker", w: struct {
			below
			http.Flusher
			http.Hijacker
		}{b, flusher{b}, taker{b}}, flush: true, hijack: true},
		{name: "Flusher, Pusher", w: struct {
			below
			http.Flusher
			http.Pusher
		}{b, flusher{b}, pusher{b}}, flush: true, push: true},
		{name: "Hijacker, Pusher", w: struct {
			below
			http.Hijacker
			http.Pusher
		}{b, taker{b}, pusher{b}}, hijack: true, push: true},
		{name: "all", w: struct {
			below
			http.Flusher
			http.Hijacker
			http.Pusher
		}{b, flusher{b}, taker{b}, pusher{b}}, flush: true, hijack: true, push: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				calls = nil
				var want []string
				f, ok := w.(http.Flusher)
				if ok != tt.flush {
					t.Errorf("is a Flusher: %v, want %v", ok, tt.flush)
				}
				if ok {
					f.Flush()
					want = append(want, "Flush")
				}
				h, ok := w.(http.Hijacker)
				if ok != tt.hijack {
					t.Errorf("is a Hijacker: %v, want %v", ok, tt.hijack)
				}
				if ok {
					if _, _, err := h.Hijack(); err != nil {
						t.Error(err)
					}
					want = append(want, "Hijack")
				}
				p, ok := w.(http.Pusher)
				if ok != tt.push {
					t.Errorf("is a Pusher: %v, want %v", ok, tt.push)
				}
				if ok {
					if err := p.Push("/app.css", nil); err != nil {
						t.Error(err)
					}
					want = append(want, "Push /app.css")
				}
				if err := http.NewResponseController(w).Flush(); (err == nil) != tt.flush || err != nil && !errors.Is(err, http.ErrNotSupported) {
					t.Errorf("the controller's Flush = %v", err)
				}
				if tt.flush {
					want = append(want, "Flush")
				}
				if !reflect.DeepEqual(calls, want) {
					t.Errorf("below: %q, want %q", calls, want)
				}
			}))
			h.ServeHTTP(tt.w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
		})
	}
}

func TestResponseController(t *testing.T) {
	var calls []string
	h := httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c := http.NewResponseController(w)
		if err := errors.Join(c.SetReadDeadline(time.Time{}), c.SetWriteDeadline(time.Time{}), c.EnableFullDuplex()); err != nil {
			t.Error(err)
		}
	}))
	h.ServeHTTP(deadline{below{httptest.NewRecorder(), &calls}}, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if want := []string{"SetReadDeadline", "SetWriteDeadline", "EnableFullDuplex"}; !reflect.DeepEqual(calls, want) {
		t.Errorf("below: %q, want %q", calls, want)
	}
}

// What is copied goes to the ReaderFrom below as it is, so that it may be a file that the kernel sends; where there is
// none it is written.
func TestReaderFrom(t *testing.T) {
	name := filepath.Join(t.TempDir(), "page.html")
	if err := os.WriteFile(name, []byte("<p>page"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, name)
	}))
	var calls []string
	h.ServeHTTP(receiver{below{httptest.NewRecorder(), &calls}}, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if want := []string{"ReadFrom *io.LimitedReader"}; !reflect.DeepEqual(calls, want) {
		t.Errorf("below: %q, want %q", calls, want)
	}

	w := httptest.NewRecorder()
	h.ServeHTTP(struct{ http.ResponseWriter }{w}, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if w.Body.String() != "<p>page" {
		t.Errorf("got %q", w.Body)
	}
}

// A string is written as one where that is possible.
func TestWriteString(t *testing.T) {
	h := httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if n, err := io.WriteString(w, "text"); n != 4 || err != nil {
			t.Errorf("WriteString = %d, %v", n, err)
		}
	}))
	var text strings.Builder
	var plain bytes.Buffer
	h.ServeHTTP(struct {
		http.ResponseWriter
		io.StringWriter
	}{httptest.NewRecorder(), &text}, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	w := httptest.NewRecorder()
	w.Body = &plain
	h.ServeHTTP(struct{ http.ResponseWriter }{w}, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if text.String() != "text" || plain.String() != "text" {
		t.Errorf("got %q and %q", text.String(), plain.String())
	}
}
