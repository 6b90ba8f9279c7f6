package httpguard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/google/go-cmp/cmp"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// base is a RoundTripper that is a function. It closes the request's body, as it should.
type base func(*http.Request) (*http.Response, error)

func (b base) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		defer r.Body.Close()
	}
	return b(r)
}

// closes counts how often a body was closed.
type closes struct {
	io.Reader
	n int
}

func (c *closes) Close() error {
	c.n++
	return nil
}

// responding is a base that always gives this response.
func responding(code int, body io.ReadCloser, header ...string) base {
	return func(*http.Request) (*http.Response, error) {
		h := make(http.Header)
		for i := 0; i < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
		return &http.Response{StatusCode: code, Header: h, Body: body}, nil
	}
}

func text(s string) io.ReadCloser { return io.NopCloser(strings.NewReader(s)) }

// errReader fails after what it has.
type errReader struct {
	io.Reader
	err error
}

func (r errReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == io.EOF {
		err = r.err
	}
	return n, err
}

// duplex is the body of a response that switched protocols.
type duplex struct {
	io.Reader
	io.Writer
	closed bool
}

func (d *duplex) Close() error {
	d.closed = true
	return nil
}

// halfDuplex can be closed in one direction.
type halfDuplex struct {
	duplex
	writeClosed bool
}

func (d *halfDuplex) CloseWrite() error {
	d.writeClosed = true
	return nil
}

// TestTransport goes through all that can become of a request: what the caller gets, whether the request's body is
// closed and the flow ended, once, and with what status.
func TestTransport(t *testing.T) {
	errOops := errors.New("oops")
	type outcome struct {
		err    error // that it matches
		status flowctl.Status
		sent   bool
	}
	only := func(status int) func(error) bool {
		return func(err error) bool {
			s, ok := errors.AsType[*httpguard.StatusError](err)
			return ok && s.StatusCode == status
		}
	}
	// use is what the caller does with the response, after which the flow has to be over.
	readAll := func(r *http.Response) { _, _ = io.Copy(io.Discard, r.Body) }
	tests := []struct {
		name   string
		base   base
		answer flowtest.Answer
		params flowctl.Params
		ctx    func(context.Context) (context.Context, context.CancelFunc)
		use    func(*http.Response)
		want   outcome
	}{
		{name: "no body", base: responding(204, http.NoBody), want: outcome{status: flowctl.StatusOK, sent: true}},
		{name: "not even that", base: responding(204, nil), want: outcome{status: flowctl.StatusOK, sent: true}},
		{name: "read to the end", base: responding(200, text("body")), use: readAll, want: outcome{status: flowctl.StatusOK, sent: true}},
		{
			name: "closed",
			base: responding(200, text("body")),
			use:  func(r *http.Response) { _ = r.Body.Close() },
			want: outcome{status: flowctl.StatusOK, sent: true},
		},
		{
			name: "closed twice, and read",
			base: responding(200, text("body")),
			use: func(r *http.Response) {
				_ = r.Body.Close()
				_ = r.Body.Close()
				readAll(r)
			},
			want: outcome{status: flowctl.StatusOK, sent: true},
		},
		{
			name: "breaks off",
			base: responding(200, io.NopCloser(errReader{strings.NewReader("bo"), io.ErrUnexpectedEOF})),
			use:  readAll,
			want: outcome{status: flowctl.StatusError, sent: true},
		},
		{
			name: "an error after it was closed",
			base: responding(200, io.NopCloser(errReader{strings.NewReader(""), http.ErrBodyReadAfterClose})),
			use: func(r *http.Response) {
				_ = r.Body.Close()
				readAll(r)
			},
			want: outcome{status: flowctl.StatusOK, sent: true},
		},
		{name: "404", base: responding(404, text("body")), use: readAll, want: outcome{status: flowctl.StatusOK, sent: true}},
		{name: "429", base: responding(429, text("body")), use: readAll, want: outcome{status: flowctl.StatusError, sent: true}},
		{name: "500", base: responding(500, text("body")), use: readAll, want: outcome{status: flowctl.StatusError, sent: true}},
		{name: "503, no body", base: responding(503, http.NoBody), want: outcome{status: flowctl.StatusError, sent: true}},
		{
			name: "500, and breaks off",
			base: responding(500, io.NopCloser(errReader{strings.NewReader("bo"), context.Canceled})),
			use:  readAll,
			want: outcome{status: flowctl.StatusError, sent: true},
		},
		{
			name:   "judged: 404 is a failure",
			base:   responding(404, http.NoBody),
			params: flowctl.Params{IsFailure: only(404)},
			want:   outcome{status: flowctl.StatusError, sent: true},
		},
		{
			name:   "judged: 500 is none",
			base:   responding(500, http.NoBody),
			params: flowctl.Params{IsFailure: only(404)},
			want:   outcome{status: flowctl.StatusOK, sent: true},
		},
		{
			name: "the trip fails",
			base: func(*http.Request) (*http.Response, error) { return nil, errOops },
			want: outcome{err: errOops, status: flowctl.StatusError, sent: true},
		},
		{
			name:   "judged: that is none",
			base:   func(*http.Request) (*http.Response, error) { return nil, errOops },
			params: flowctl.Params{IsFailure: func(err error) bool { return !errors.Is(err, errOops) }},
			want:   outcome{err: errOops, status: flowctl.StatusOK, sent: true},
		},
		{
			name: "neither a response nor an error",
			base: func(*http.Request) (*http.Response, error) { return nil, nil },
			want: outcome{status: flowctl.StatusError, sent: true},
		},
		{
			name: "canceled on the way",
			ctx:  context.WithCancel,
			base: func(r *http.Request) (*http.Response, error) {
				return nil, r.Context().Value(cancelKey{}).(func() error)()
			},
			want: outcome{err: context.Canceled, status: flowctl.StatusOK, sent: true},
		},
		{
			name: "too late on the way",
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				return context.WithTimeout(ctx, time.Minute)
			},
			base: func(r *http.Request) (*http.Response, error) {
				<-r.Context().Done()
				return nil, r.Context().Err()
			},
			want: outcome{err: context.DeadlineExceeded, status: flowctl.StatusError, sent: true},
		},
		{
			name: "canceled before",
			ctx: func(ctx context.Context) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(ctx)
				cancel()
				return ctx, cancel
			},
			want: outcome{err: context.Canceled},
		},
		{
			name:   "rejected",
			answer: flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Second, Slots: 1},
			want:   outcome{err: flowctl.ErrRejected, status: flowctl.StatusError},
		},
		{
			name:   "fails closed",
			answer: flowtest.Answer{Fail: status.Error(codes.Unavailable, "down")},
			params: flowctl.Params{OnUnreachable: flowctl.FailClosed},
			want:   outcome{err: flowctl.ErrUnreachable},
		},
		{
			name:   "fails open",
			answer: flowtest.Answer{Fail: status.Error(codes.Unavailable, "down")},
			base:   responding(204, http.NoBody),
			want:   outcome{sent: true},
		},
		{
			name:   "invalid",
			params: flowctl.Params{Labels: map[string]string{"": "secret"}},
			want:   outcome{err: flowctl.ErrInvalid},
		},
		{
			name:   "a wait in a queue",
			answer: flowtest.Answer{Delay: 3 * time.Second},
			params: flowctl.Params{CheckTimeout: 10 * time.Second},
			base:   responding(204, http.NoBody),
			want:   outcome{status: flowctl.StatusOK, sent: true},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				if tt.answer.Slots == 0 && tt.answer.Fail == nil {
					tt.answer.Slots = 1
				}
				agent.Answer(tt.answer)
				client := agent.Client()
				sent := false
				rt := httpguard.NewTransport(client, point, base(func(r *http.Request) (*http.Response, error) {
					sent = true
					if flowOf(t, r).ControlPoint() != point {
						t.Error("another flow")
					}
					return tt.base(r)
				}), httpguard.WithParams(func(*http.Request) flowctl.Params { return tt.params }))

				ctx := t.Context()
				if tt.ctx != nil {
					var cancel context.CancelFunc
					ctx, cancel = tt.ctx(ctx)
					defer cancel()
					withCancel := ctx
					ctx = context.WithValue(ctx, cancelKey{}, func() error {
						cancel()
						return withCancel.Err()
					})
				}
				body := &closes{Reader: strings.NewReader("request")}
				r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://pay.example/charges", body)
				if err != nil {
					t.Fatal(err)
				}
				before := *r
				resp, err := rt.RoundTrip(r)
				if !errors.Is(err, tt.want.err) || sent != tt.want.sent {
					t.Errorf("RoundTrip = %v, sent: %v; want %v, %v", err, sent, tt.want.err, tt.want.sent)
				}
				if body.n != 1 {
					t.Errorf("the request's body was closed %d times, want 1", body.n)
				}
				if before.Header == nil || r.Context() != before.Context() || r.Body != before.Body || len(r.Header) != 0 {
					t.Error("the request was changed")
				}
				if tt.use != nil {
					if agent.Held() != 1 {
						t.Errorf("%d slots held while there is a body, want 1", agent.Held())
					}
					tt.use(resp)
				}
				if agent.Held() != 0 {
					t.Errorf("%d slots held, want 0", agent.Held())
				}
				if err := client.Close(context.WithoutCancel(ctx)); err != nil {
					t.Fatal(err)
				}
				var got []flowctl.Status
				for _, s := range agent.Spans() {
					got = append(got, s.Status)
				}
				var want []flowctl.Status
				if tt.want.status != flowctl.StatusUnset { // else no agent answered
					want = append(want, tt.want.status)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("statuses (-want +got):\n%s", diff)
				}
				if ends := len(agent.Ends()); ends != len(want) {
					t.Errorf("ended %d times, want %d", ends, len(want))
				}
			})
		})
	}
}

// cancelKey finds a function that cancels the request.
type cancelKey struct{}

// A base that panics leaves no flow behind, and one that the Params' IsFailure panics on neither.
func TestTransportPanics(t *testing.T) {
	errOops := errors.New("oops")
	for name, tt := range map[string]struct {
		base      base
		isFailure func(error) bool
	}{
		"base":      {base: func(*http.Request) (*http.Response, error) { panic(errOops) }},
		"IsFailure": {base: responding(500, http.NoBody), isFailure: func(error) bool { panic(errOops) }},
		"IsFailure of the body": {
			base:      responding(500, text("body")),
			isFailure: func(error) bool { panic(errOops) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				agent.Answer(flowtest.Answer{Slots: 1})
				client := agent.Client()
				rt := httpguard.NewTransport(client, point, tt.base, httpguard.WithParams(func(*http.Request) flowctl.Params {
					return flowctl.Params{IsFailure: tt.isFailure}
				}))
				func() {
					defer func() {
						if p := recover(); p != any(errOops) {
							t.Errorf("panicked with %v, want %v", p, errOops)
						}
					}()
					resp, err := rt.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
					if err != nil {
						t.Fatal(err)
					}
					_ = resp.Body.Close()
				}()
				if agent.Held() != 0 {
					t.Error("the flow has not ended")
				}
				if err := client.Close(t.Context()); err != nil {
					t.Fatal(err)
				}
				if spans := agent.Spans(); len(spans) != 1 || spans[0].Status != flowctl.StatusError {
					t.Errorf("spans = %v, want one that is Error", spans)
				}
			})
		})
	}
}

// blockingBody is read until it is closed, and closed when that has been noticed.
type blockingBody struct{ closing, noticed chan struct{} }

func (b blockingBody) Read([]byte) (int, error) {
	<-b.closing
	return 0, http.ErrBodyReadAfterClose
}

func (b blockingBody) Close() error {
	close(b.closing)
	<-b.noticed
	return nil
}

// A caller that closes the body to end a read of its own has not seen it break off.
func TestTransportClosedWhileRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client()
		body := blockingBody{make(chan struct{}), make(chan struct{})}
		rt := httpguard.NewTransport(client, point, responding(200, body))
		resp, err := rt.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer close(body.noticed)
			if _, err := io.ReadAll(resp.Body); !errors.Is(err, http.ErrBodyReadAfterClose) {
				t.Errorf("ReadAll = %v", err)
			}
		}()
		if err := resp.Body.Close(); err != nil {
			t.Error(err)
		}
		if err := client.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if spans := agent.Spans(); len(spans) != 1 || spans[0].Status != flowctl.StatusOK {
			t.Errorf("spans = %v, want one that is OK", spans)
		}
	})
}

// The body of a response that switched protocols can be written to, is open until it is closed, and knows CloseWrite
// where there is one.
func TestTransportSwitchedProtocols(t *testing.T) {
	tests := []struct {
		name   string
		body   io.ReadWriteCloser
		use    func(t *testing.T, body io.ReadWriteCloser)
		status flowctl.Status
	}{
		{
			name: "read and written",
			body: &halfDuplex{duplex: duplex{Reader: strings.NewReader("hello"), Writer: io.Discard}},
			use: func(t *testing.T, body io.ReadWriteCloser) {
				if got, err := io.ReadAll(body); string(got) != "hello" || err != nil {
					t.Errorf("read %q, %v", got, err)
				}
				if n, err := io.WriteString(body, "bye"); n != 3 || err != nil {
					t.Errorf("wrote %d, %v", n, err)
				}
				if err := body.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
					t.Errorf("CloseWrite = %v", err)
				}
			},
			status: flowctl.StatusOK,
		},
		{
			name: "cannot be closed in one direction",
			body: &duplex{Reader: strings.NewReader("hello"), Writer: io.Discard},
			use: func(t *testing.T, body io.ReadWriteCloser) {
				if err := body.(interface{ CloseWrite() error }).CloseWrite(); !errors.Is(err, http.ErrNotSupported) {
					t.Errorf("CloseWrite = %v", err)
				}
			},
			status: flowctl.StatusOK,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			agent.Answer(flowtest.Answer{Slots: 1})
			client := agent.Client()
			rt := httpguard.NewTransport(client, point, responding(101, tt.body))
			resp, err := rt.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
			if err != nil {
				t.Fatal(err)
			}
			body, ok := resp.Body.(io.ReadWriteCloser)
			if !ok {
				t.Fatalf("a %T cannot be written to", resp.Body)
			}
			tt.use(t, body)
			if agent.Held() != 1 {
				t.Error("the flow has ended")
			}
			if err := body.Close(); err != nil {
				t.Error(err)
			}
			if agent.Held() != 0 {
				t.Error("the flow has not ended")
			}
			if err := client.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			if spans := agent.Spans(); len(spans) != 1 || spans[0].Status != tt.status {
				t.Errorf("spans = %v, want one that is %v", spans, tt.status)
			}
		})
	}
}

// A connection that breaks off after it switched protocols is a failure, and over.
func TestTransportSwitchedAndBroken(t *testing.T) {
	agent := flowtest.NewAgent(t)
	agent.Answer(flowtest.Answer{Slots: 1})
	rt := httpguard.NewTransport(agent.Client(), point, responding(101, &duplex{Reader: errReader{strings.NewReader(""), io.ErrUnexpectedEOF}}))
	resp, err := rt.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ReadAll = %v", err)
	}
	if agent.Held() != 0 {
		t.Error("the flow has not ended")
	}
}

func TestTransportPauses(t *testing.T) {
	const base0 = "Sat, 01 Jan 2000 00:00:00 GMT" // where synctest's clock starts
	tests := []struct {
		name   string
		status int
		header []string
		opts   []httpguard.TransportOption
		want   time.Duration
	}{
		{name: "429", status: 429, header: []string{"Retry-After", "7"}, want: 7 * time.Second},
		{name: "503", status: 503, header: []string{"Retry-After", "7"}, want: 7 * time.Second},
		{name: "500", status: 500, header: []string{"Retry-After", "7"}},
		{name: "301", status: 301, header: []string{"Retry-After", "7"}},
		{name: "nothing said", status: 429},
		{name: "0", status: 429, header: []string{"Retry-After", "0"}},
		{name: "negative", status: 429, header: []string{"Retry-After", "-7"}},
		{name: "signed", status: 429, header: []string{"Retry-After", "+7"}},
		{name: "not whole", status: 429, header: []string{"Retry-After", "7.5"}},
		{name: "no time at all", status: 429, header: []string{"Retry-After", "soon"}},
		{name: "a minute at the most", status: 429, header: []string{"Retry-After", "61"}, want: time.Minute},
		{name: "more than a duration", status: 429, header: []string{"Retry-After", "9223372037"}, want: time.Minute},
		{name: "more than a number", status: 429, header: []string{"Retry-After", "99999999999999999999"}, want: time.Minute},
		{name: "a date", status: 503, header: []string{"Retry-After", "Sat, 01 Jan 2000 00:01:00 GMT"}, want: time.Minute},
		{name: "a date that has passed", status: 503, header: []string{"Retry-After", "Fri, 31 Dec 1999 23:59:59 GMT"}},
		{
			name:   "a date on a clock that is an hour fast",
			status: 503,
			header: []string{"Retry-After", "Sat, 01 Jan 2000 01:01:00 GMT", "Date", "Sat, 01 Jan 2000 01:00:00 GMT"},
			want:   time.Minute,
		},
		{
			name:   "a date beside one that is none",
			status: 503,
			header: []string{"Retry-After", "Sat, 01 Jan 2000 00:01:00 GMT", "Date", "today"},
			want:   time.Minute,
		},
		{
			name:   "a longer one is allowed",
			status: 429,
			header: []string{"Retry-After", "7200"},
			opts:   []httpguard.TransportOption{nil, httpguard.WithMaxPause(24 * time.Hour)},
			want:   2 * time.Hour,
		},
		{
			name:   "off",
			status: 429,
			header: []string{"Retry-After", "7"},
			opts:   []httpguard.TransportOption{httpguard.WithMaxPause(0)},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if got := time.Now().UTC().Format(http.TimeFormat); got != base0 {
					t.Fatalf("the clock starts at %s", got)
				}
				agent := flowtest.NewAgent(t)
				sent := 0
				base := base(func(r *http.Request) (*http.Response, error) {
					if sent++; sent == 1 {
						return responding(tt.status, http.NoBody, tt.header...)(r)
					}
					return responding(200, http.NoBody)(r)
				})
				at := httpguard.WithControlPoint(func(r *http.Request) string { return r.URL.Query().Get("at") })
				rt := httpguard.NewTransport(agent.Client(), point, base, append(tt.opts, at)...)
				get := func(target string) error {
					t.Helper()
					body := &closes{Reader: strings.NewReader("request")}
					r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, target, body)
					if err != nil {
						t.Fatal(err)
					}
					before := sent
					_, err = rt.RoundTrip(r)
					if paused := err != nil; paused != (sent == before) || paused && body.n != 1 {
						t.Errorf("%s: %v, sent: %v, body closed %d times", target, err, sent != before, body.n)
					}
					if len(agent.Checks()) != sent {
						t.Errorf("%d checks, want %d", len(agent.Checks()), sent)
					}
					return err
				}

				if err := get("https://pay.example/"); err != nil {
					t.Fatal(err)
				}
				err := get("https://pay.example/other")
				if tt.want == 0 {
					if err != nil {
						t.Error(err)
					}
					return
				}
				wait, _ := fallback.RetryAfter(err)
				paused, ok := errors.AsType[*httpguard.PausedError](err)
				rejected, _ := errors.AsType[*flowctl.RejectedError](err)
				if !ok || !errors.Is(err, flowctl.ErrRejected) || wait != tt.want {
					t.Fatalf("got %v, RetryAfter %v; want a pause of %v", err, wait, tt.want)
				}
				if paused.Host() != "pay.example" || rejected.ControlPoint != point || rejected.HTTPStatus != tt.status {
					t.Errorf("got %+v", paused)
				}
				if want := fmt.Sprintf("headgate: start %q: paused by the upstream, retry after %s", point, tt.want); err.Error() != want {
					t.Errorf("error %q, want %q", err, want)
				}
				for _, other := range []string{"https://other.example/", "https://pay.example:8443/", "https://pay.example/?at=refunds"} {
					if err := get(other); err != nil {
						t.Errorf("%s: %v", other, err)
					}
				}
				<-time.After(tt.want - 1)
				if err := get("https://pay.example/"); !errors.Is(err, flowctl.ErrRejected) {
					t.Errorf("just before the end: %v", err)
				}
				<-time.After(1)
				if err := get("https://pay.example/"); err != nil {
					t.Errorf("at the end: %v", err)
				}
			})
		})
	}
}

// Of the pauses that responses in flight ask for, the one that ends last counts.
func TestTransportPauseIsNotCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := make(chan string)
		rt := httpguard.NewTransport(newEngine(t), point, base(func(r *http.Request) (*http.Response, error) {
			return responding(429, http.NoBody, "Retry-After", <-asked)(r)
		}))
		get := func() error {
			_, err := rt.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
			return err
		}
		done := make(chan error)
		for range 3 {
			go func() { done <- get() }()
		}
		synctest.Wait() // for all of them to be sent
		for _, seconds := range []string{"5", "60", "1"} {
			asked <- seconds
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if wait := retryAfter(t, get()); wait != time.Minute {
			t.Errorf("paused for %v, want a minute", wait)
		}
	})
}

// A pause begins before the flow of its response ends: a flow that waits for that slot is not sent.
func TestTransportPauseBeginsBeforeTheEnd(t *testing.T) {
	for name, body := range map[string]io.ReadCloser{"no body": http.NoBody, "a body": io.NopCloser(strings.NewReader("busy"))} {
		t.Run(name, func(t *testing.T) {
			ending := 0
			var rt *httpguard.Transport
			get := func() (*http.Response, error) {
				return rt.RoundTrip(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
			}
			rt = httpguard.NewTransport(newEngine(t), point, responding(503, body, "Retry-After", "7"),
				httpguard.WithParams(func(*http.Request) flowctl.Params {
					return flowctl.Params{IsFailure: func(error) bool {
						if ending++; ending > 1 {
							return true
						}
						if _, err := get(); !errors.Is(err, flowctl.ErrRejected) {
							t.Errorf("a request while the flow ends: %v want one that the pause rejects", err)
						}
						return true
					}}
				}))
			resp, err := get()
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if ending != 1 {
				t.Errorf("the flow ended %d times want once", ending)
			}
		})
	}
}

// Whoever calls any number of hosts that ask for pauses has the transport remember so many of them, those that last.
func TestTransportPausesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt := httpguard.NewTransport(newEngine(t), point, base(func(r *http.Request) (*http.Response, error) {
			return responding(429, http.NoBody, "Retry-After", r.Header.Get("Seconds"))(r)
		}), httpguard.WithMaxPause(time.Hour))
		paused := func(host, seconds string) bool {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+host+"/", nil)
			r.Header.Set("Seconds", seconds)
			_, err := rt.RoundTrip(r)
			return errors.Is(err, flowctl.ErrRejected)
		}
		for i := range 1024 {
			paused(fmt.Sprint("host-", i), fmt.Sprint(100+i))
		}
		if !paused("host-0", "1") {
			t.Fatal("1024 pauses are too many")
		}
		paused("one-more", "500")
		if paused("host-0", "0") {
			t.Error("the pause that ended first has not given way")
		}
		for _, host := range []string{"host-1", "host-1023", "one-more"} {
			if !paused(host, "0") {
				t.Errorf("the pause of %s has given way", host)
			}
		}
		<-time.After(200 * time.Second)
		paused("two-more", "500") // for which those that are over make room
		for _, host := range []string{"host-200", "one-more", "two-more"} {
			if !paused(host, "0") {
				t.Errorf("the pause of %s has given way", host)
			}
		}
	})
}

// The labels of an outgoing request are its own, not those of the request that it was made for; all else that the
// context has stays.
func TestTransportLabels(t *testing.T) {
	overAll(t, func(t *testing.T, client *flowctl.Client) {
		var got map[string]string
		rt := httpguard.NewTransport(client, point, base(func(r *http.Request) (*http.Response, error) {
			got = labelsOf(t, r)
			return responding(200, http.NoBody)(r)
		}), httpguard.WithHeaders("X-Account"), httpguard.WithParams(func(*http.Request) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"account": "7"}}
		}))
		h := httpguard.Middleware(client, "in", httpguard.WithHeaders("X-Tenant"))(
			http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				ctx := labels.WithTransport(r.Context(), map[string]string{"peer": "mesh"})
				ctx = labels.With(ctx, "user_id", "42")
				out, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://pay.example/charges?key=secret", http.NoBody)
				if err != nil {
					t.Fatal(err)
				}
				out.Header.Set("X-Account", "acme")
				out.Header.Set("Baggage", "sent=1")
				if _, err := rt.RoundTrip(out); err != nil {
					t.Error(err)
				}
			}))
		in := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/orders", strings.NewReader("body"))
		in.Header.Set("X-Tenant", "acme")
		h.ServeHTTP(httptest.NewRecorder(), in)
		want := map[string]string{
			"account": "7", "user_id": "42", "peer": "mesh",
			"http.method": "GET", "http.target": "/charges", "http.host": "pay.example", "http.scheme": "https",
			"http.flavor": "1.1", "http.request_content_length": "0", "http.request.header.x_account": "acme",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("labels (-want +got):\n%s", diff)
		}
	})
}

func TestTransportSkips(t *testing.T) {
	var flows []bool
	rt := httpguard.NewTransport(newEngine(t), point, base(func(r *http.Request) (*http.Response, error) {
		_, ok := flowctl.FromContext(r.Context())
		flows = append(flows, ok)
		return responding(200, http.NoBody)(r)
	}), httpguard.WithSkipPaths("/health"), httpguard.WithSkipPatterns(regexp.MustCompile("/free/.*")))
	for _, u := range []*url.URL{{Path: "/health"}, {Path: "/free/lunch"}, {Path: "/paid"}, nil} {
		if _, err := rt.RoundTrip((&http.Request{URL: u}).WithContext(t.Context())); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff([]bool{false, false, true, true}, flows); diff != "" {
		t.Errorf("flows (-want +got):\n%s", diff)
	}
}

// Through an http.Client a rejection is an *url.Error in which the flow's own error is found; each redirect is a flow.
func TestTransportInClient(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/old" {
			http.Redirect(w, r, "/new", http.StatusTemporaryRedirect)
			return
		}
		_, _ = io.Copy(w, r.Body)
	}))
	defer server.Close()
	client := newEngine(t, policy.RateLimiter{Selectors: policy.At(point), Capacity: 3, Fill: 1, Interval: time.Hour})
	guarded := &http.Client{Transport: httpguard.NewTransport(client, point, server.Client().Transport)}
	defer guarded.CloseIdleConnections()

	for _, path := range []string{"/old", "/new"} {
		resp, err := guarded.Post(server.URL+path, "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(resp.Body); string(got) != "body" || err != nil {
			t.Errorf("%s: %q, %v", path, got, err)
		}
		_ = resp.Body.Close()
	}
	_, err := guarded.Post(server.URL+"/new", "text/plain", strings.NewReader("body"))
	rejected, ok := errors.AsType[*flowctl.RejectedError](err)
	if _, inURL := errors.AsType[*url.Error](err); !inURL || !ok || !errors.Is(err, flowctl.ErrRejected) {
		t.Fatalf("Post = %v, want an *url.Error with a rejection", err)
	}
	if wait, ok := fallback.RetryAfter(err); !ok || wait != rejected.RetryAfter() {
		t.Errorf("RetryAfter = %v, %v", wait, ok)
	}
}

// CloseIdleConnections reaches the base, or has nothing to do.
func TestTransportCloseIdleConnections(t *testing.T) {
	closer := &idleCloser{}
	(&http.Client{Transport: httpguard.NewTransport(nil, point, closer)}).CloseIdleConnections()
	(&http.Client{Transport: httpguard.NewTransport(nil, point, responding(200, nil))}).CloseIdleConnections()
	if closer.n != 1 {
		t.Errorf("closed %d times, want 1", closer.n)
	}
}

type idleCloser struct {
	base
	n int
}

func (c *idleCloser) CloseIdleConnections() { c.n++ }

// retryAfter is what a rejection says.
func retryAfter(t *testing.T, err error) time.Duration {
	t.Helper()
	wait, ok := fallback.RetryAfter(err)
	if !ok {
		t.Errorf("%v does not say when to come back", err)
	}
	return wait
}
