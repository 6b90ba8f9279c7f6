package httpguard_test

import (
	"bytes"
	"errors"
	"io"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

// The files that a form was spilled into are the server's to remove, also when the handler panics.
func TestMiddlewareLeavesNoFormFiles(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	part, err := form.CreateFormFile("file", "name")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = part.Write(make([]byte, 1<<20))
	_ = form.Close()
	spilled := make(chan int, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /upload/{id}", func(_ http.ResponseWriter, r *http.Request) {
		if err := r.ParseMultipartForm(1); err != nil {
			t.Error(err)
		}
		files, _ := os.ReadDir(os.TempDir())
		spilled <- len(files)
		panic(http.ErrAbortHandler)
	})
	pattern := make(chan string, 1)
	guarded := httpguard.Middleware(newEngine(t), point)(mux)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { pattern <- r.Pattern }()
		guarded.ServeHTTP(w, r)
	}))
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/upload/1", &body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", form.FormDataContentType())
	if resp, err := server.Client().Do(r); err == nil {
		_ = resp.Body.Close()
		t.Errorf("status %s, want the connection to break", resp.Status)
	}
	server.Close()
	if n := <-spilled; n == 0 {
		t.Fatal("the form was not spilled, which the test is about")
	}
	if got, want := <-pattern, "POST /upload/{id}"; got != want {
		t.Errorf("outside the middleware, Pattern = %q want %q", got, want)
	}
	// After a panic net/http itself removes nothing: without one it must.
	calm := httptest.NewServer(httpguard.Middleware(newEngine(t), point)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_ = r.ParseMultipartForm(1)
	})))
	before, _ := os.ReadDir(os.TempDir())
	body.Reset()
	form = multipart.NewWriter(&body)
	part, _ = form.CreateFormFile("file", "name")
	_, _ = part.Write(make([]byte, 1<<20))
	_ = form.Close()
	resp, err := calm.Client().Post(calm.URL, form.FormDataContentType(), &body)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	calm.Close()
	if after, _ := os.ReadDir(os.TempDir()); len(after) != len(before) {
		t.Errorf("%d files are left behind", len(after)-len(before))
	}
}

// sent is a base that answers by a function.
type sent func(*http.Request) (*http.Response, error)

func (f sent) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Requests that wait for their flows while the upstream asks for a pause are not sent.
func TestTransportPausesThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newEngine(t, policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour})
		asked := 0
		transport := httpguard.NewTransport(client, point, sent(func(*http.Request) (*http.Response, error) {
			asked++
			<-time.After(time.Second) // in which the others come
			return &http.Response{
				StatusCode: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"60"}}, Body: http.NoBody,
			}, nil
		}), httpguard.WithParams(func(*http.Request) flowctl.Params { return flowctl.Params{CheckTimeout: time.Minute} }))
		errs := make(chan error)
		for range 3 {
			go func() {
				_, err := transport.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
				errs <- err
			}()
		}
		paused := 0
		for range 3 {
			if _, ok := errors.AsType[*httpguard.PausedError](<-errs); ok {
				paused++
			}
		}
		if asked != 1 || paused != 2 {
			t.Errorf("%d requests were sent, and %d paused want 1 and 2", asked, paused)
		}
	})
}

// A request that a reverse proxy passes on is labelled as what is sent, not as what came.
func TestTransportOfAReverseProxy(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer upstream.Close()
	target, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]string
	client := newEngine(t)
	transport := httpguard.NewTransport(client, point, sent(func(r *http.Request) (*http.Response, error) {
		got = labelsOf(t, r)
		return http.DefaultTransport.RoundTrip(r)
	}))
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	proxy := httptest.NewTLSServer(&httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.URL.Path = "/new"
		},
	})
	defer proxy.Close()
	resp, err := proxy.Client().Get(proxy.URL + "/old?q=1")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if got["http.target"] != "/new" || got["http.scheme"] != "http" {
		t.Errorf("http.target = %q, http.scheme = %q want /new, http", got["http.target"], got["http.scheme"])
	}
}
