package httpguard_test

import (
	"bytes"
	"errors"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/status"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
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

// What routing and parsing behind the guard put into a request, middleware around it sees as without the guard.
func TestMiddlewareHandsBackWhatRoutingFound(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders/{id}/{rest...}", func(_ http.ResponseWriter, r *http.Request) {
		r.SetPathValue("set", "by the handler")
		_ = r.ParseForm()
	})
	mux.HandleFunc("POST /upload/{id}", func(_ http.ResponseWriter, r *http.Request) { _ = r.ParseMultipartForm(1 << 20) })
	mux.HandleFunc("POST /panics/{id}", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	mux.HandleFunc("/{$}", func(http.ResponseWriter, *http.Request) {})
	client := newEngine(t)
	rejecting := newEngine(t, policy.Sampler{Selectors: policy.At(point)})
	guard := httpguard.Middleware(client, point)
	type seen struct {
		Pattern, ID, Rest, Set string
		Form, PostForm         url.Values
		Files                  map[string][]string
	}
	see := func(h http.Handler, target string) seen {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, target, bytes.NewReader([]byte("a=1")))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if target == "/upload/7" {
			var body bytes.Buffer
			form := multipart.NewWriter(&body)
			_ = form.SetBoundary("boundary")
			_ = form.WriteField("b", "2")
			_ = form.Close()
			r.Body = io.NopCloser(&body)
			r.Header.Set("Content-Type", form.FormDataContentType())
		}
		r.SetPathValue("set", "before")
		ctx := r.Context()
		serve(h, httptest.NewRecorder(), r)
		if r.Context() != ctx {
			t.Errorf("%s: the context was handed back", target)
		}
		got := seen{Pattern: r.Pattern, ID: r.PathValue("id"), Rest: r.PathValue("rest"), Set: r.PathValue("set"), Form: r.Form, PostForm: r.PostForm}
		if r.MultipartForm != nil {
			got.Files = r.MultipartForm.Value
		}
		return got
	}
	for _, target := range []string{"/orders/7/a/b?q=2", "/upload/7", "/panics/7", "/", "/unknown"} {
		bare := see(mux, target)
		if target == "/orders/7/a/b?q=2" && (bare.ID != "7" || bare.Rest != "a/b" || bare.Set != "by the handler" || bare.PostForm.Get("a") != "1") {
			t.Fatalf("the bare mux: %+v", bare)
		}
		for name, h := range map[string]http.Handler{
			"guarded": guard(mux), "guarded twice": guard(guard(mux)), "off": httpguard.Middleware(nil, point)(mux),
			"by CheckHTTP": httpguard.Middleware(client, point, httpguard.WithCheckHTTP())(mux),
		} {
			if got := see(h, target); !reflect.DeepEqual(got, bare) {
				t.Errorf("%s, %s: got %+v want %+v", target, name, got, bare)
			}
		}
		if got := see(httpguard.Middleware(rejecting, point)(mux), target); got.Pattern != "" || got.Set != "before" {
			t.Errorf("%s, rejected: got %+v want nothing that routing found", target, got)
		}
	}
}

// Headers that an agent adds for the handler do not get out, and trailers that net/http finds later are not lost.
func TestMiddlewareHandsBackNoHeaders(t *testing.T) {
	agent := flowtest.NewAgent(t)
	agent.Answer(flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
		Status: &status.Status{}, CheckResponse: new(checkv1.CheckResponse),
		HttpResponse: &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{
			Headers: map[string]string{"x-added": "by the agent"},
		}},
	}})
	trailer := make(chan http.Header, 1)
	guarded := httpguard.Middleware(agent.Client(), point, httpguard.WithCheckHTTP())(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Added") == "" {
			t.Error("the handler does not see the agent's header")
		}
		_, _ = io.Copy(io.Discard, r.Body)
	}))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		guarded.ServeHTTP(w, r)
		if r.Header.Get("X-Added") != "" {
			t.Error("the agent's header got out")
		}
		trailer <- r.Trailer
	}))
	defer server.Close()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\na\r\n0\r\nChecksum: 7\r\n\r\n")
	if got := (<-trailer).Get("Checksum"); got != "7" {
		t.Errorf("the trailer is %q want 7", got)
	}
}
