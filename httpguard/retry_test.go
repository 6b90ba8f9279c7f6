package httpguard_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A reply is what an upstream answers.
type reply struct {
	status     int
	retryAfter string
	date       string
	err        error
}

// An upstream gives its replies one after the other, and the last one again and again. It notes when it got requests, and
// with what bodies.
type upstream struct {
	mu      sync.Mutex
	replies []reply
	at      []time.Duration // since begin
	got     []string
	bodies  []*closes // of responses
	begin   time.Time
	during  func() // called while a request is there
}

func newUpstream(replies ...reply) *upstream { return &upstream{replies: replies, begin: time.Now()} }

// with sets a function that is called while a request is there.
func (u *upstream) with(during func()) *upstream {
	u.during = during
	return u
}

func (u *upstream) RoundTrip(r *http.Request) (*http.Response, error) {
	var text []byte
	if r.Body != nil {
		defer r.Body.Close()
		text, _ = io.ReadAll(r.Body)
	}
	if u.during != nil {
		u.during()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.at = append(u.at, time.Since(u.begin))
	u.got = append(u.got, string(text))
	said := u.replies[0]
	if len(u.replies) > 1 {
		u.replies = u.replies[1:]
	}
	if said.err != nil {
		return nil, said.err
	}
	body := &closes{Reader: strings.NewReader(fmt.Sprint("reply ", len(u.at)))}
	u.bodies = append(u.bodies, body)
	h := make(http.Header)
	for name, value := range map[string]string{"Retry-After": said.retryAfter, "Date": said.date} {
		if value != "" {
			h.Set(name, value)
		}
	}
	return &http.Response{StatusCode: said.status, Header: h, Body: body, Request: r}, nil
}

func (u *upstream) requests() []time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.at)
}

// A source is a body that can be read again.
type source struct {
	text  string
	fails error // of GetBody
	made  []*closes
}

func (s *source) body() (io.ReadCloser, error) {
	body := &closes{Reader: strings.NewReader(s.text)}
	s.made = append(s.made, body)
	return body, nil
}

// allClosed checks that each body was closed, once.
func (s *source) allClosed(t *testing.T) {
	t.Helper()
	for i, body := range s.made {
		if body.n != 1 {
			t.Errorf("body %d was closed %d times", i+1, body.n)
		}
	}
}

// request makes a request whose body can be read again if again is set.
func (s *source) request(ctx context.Context, t *testing.T, again bool) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://api.example/", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	if s == nil {
		return r
	}
	r.Body, _ = s.body()
	r.GetBody = nil
	if again {
		r.GetBody = func() (io.ReadCloser, error) {
			if s.fails != nil {
				return nil, s.fails
			}
			return s.body()
		}
	}
	return r
}

var errBroken = errors.New("broken")

// What becomes of a request with retries: how often it is sent and when, and what its caller gets, over all agents.
func TestRetries(t *testing.T) {
	ok, busy := reply{status: 200}, reply{status: 429, retryAfter: "4"}
	steady := headgate.RetryPolicy{Jitter: -1}
	type want struct {
		at     []int // seconds
		status int   // zero: an error
		err    error
	}
	for _, tt := range []struct {
		name     string
		replies  []reply
		policy   headgate.RetryPolicy
		opts     []httpguard.TransportOption
		deadline time.Duration
		body     *source
		noBody   bool // there is no GetBody
		want     want
	}{
		{name: "no need", replies: []reply{ok}, want: want{at: []int{0}, status: 200}},
		{name: "429", replies: []reply{busy, ok}, policy: steady, want: want{at: []int{0, 4}, status: 200}},
		{name: "503", replies: []reply{{status: 503, retryAfter: "4"}, ok}, policy: steady, want: want{at: []int{0, 4}, status: 200}},
		{name: "twice", replies: []reply{busy, {status: 503, retryAfter: "2"}, ok}, policy: steady, want: want{at: []int{0, 4, 6}, status: 200}},
		{
			name:    "a date on a clock that is an hour fast",
			replies: []reply{{status: 429, retryAfter: "Sat, 01 Jan 2000 01:00:09 GMT", date: "Sat, 01 Jan 2000 01:00:00 GMT"}, ok},
			policy:  steady,
			want:    want{at: []int{0, 9}, status: 200},
		},
		{
			name:    "a date on a clock that is an hour slow",
			replies: []reply{{status: 429, retryAfter: "Fri, 31 Dec 1999 23:00:09 GMT", date: "Fri, 31 Dec 1999 23:00:00 GMT"}, ok},
			policy:  steady,
			want:    want{at: []int{0, 9}, status: 200},
		},
		{name: "a date on no clock", replies: []reply{{status: 429, retryAfter: "Sat, 01 Jan 2000 00:00:09 GMT"}, ok}, policy: steady, want: want{at: []int{0, 9}, status: 200}},
		{name: "a date that has passed", replies: []reply{{status: 429, retryAfter: "Fri, 31 Dec 1999 23:00:00 GMT"}, ok}, want: want{at: []int{0}, status: 429}},
		{name: "nobody says when", replies: []reply{{status: 429}, ok}, want: want{at: []int{0}, status: 429}},
		{name: "no time", replies: []reply{{status: 503, retryAfter: "0"}, ok}, want: want{at: []int{0}, status: 503}},
		{name: "500", replies: []reply{{status: 500, retryAfter: "4"}, ok}, want: want{at: []int{0}, status: 500}},
		{name: "301", replies: []reply{{status: 301, retryAfter: "4"}, ok}, want: want{at: []int{0}, status: 301}},
		{name: "an error", replies: []reply{{err: errBroken}, ok}, want: want{at: []int{0}, err: errBroken}},
		{name: "an error of a retry", replies: []reply{busy, {err: errBroken}}, policy: steady, want: want{at: []int{0, 4}, err: errBroken}},
		{name: "three attempts", replies: []reply{busy}, policy: steady, want: want{at: []int{0, 4, 8}, status: 429}},
		{name: "one attempt", replies: []reply{busy}, policy: headgate.RetryPolicy{Attempts: 1}, want: want{at: []int{0}, status: 429}},
		{
			name: "the budget is used up", replies: []reply{{status: 429, retryAfter: "1"}},
			policy: headgate.RetryPolicy{Attempts: -1, Jitter: -1},
			want:   want{at: []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, status: 429},
		},
		{name: "more than the policy's MaxWait", replies: []reply{busy, {status: 429, retryAfter: "5"}}, policy: headgate.RetryPolicy{Jitter: -1, MaxWait: 4 * time.Second}, want: want{at: []int{0, 4}, status: 429}},
		{
			name: "all waits fit", replies: []reply{busy, busy, ok}, policy: steady, want: want{at: []int{0, 4, 8}, status: 200},
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(9 * time.Second)},
		},
		{
			name: "all waits just fit", replies: []reply{busy, busy, ok}, policy: steady, want: want{at: []int{0, 4, 8}, status: 200},
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(8 * time.Second)},
		},
		{
			name: "one nanosecond is missing", replies: []reply{busy, busy, ok}, policy: steady, want: want{at: []int{0, 4}, status: 429},
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(8*time.Second - 1)},
		},
		{
			name: "all waits do not fit", replies: []reply{busy, busy, ok}, policy: steady, want: want{at: []int{0, 4}, status: 429},
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(7 * time.Second)},
		},
		{name: "a minute", replies: []reply{{status: 429, retryAfter: "60"}, ok}, want: want{at: []int{0, 60}, status: 200}},
		{name: "a minute in all", replies: []reply{{status: 429, retryAfter: "50"}}, policy: steady, want: want{at: []int{0, 50}, status: 429}},
		{name: "more than a number", replies: []reply{{status: 429, retryAfter: "99999999999999999999"}}, want: want{at: []int{0}, status: 429}},
		{
			name: "no limit", replies: []reply{{status: 429, retryAfter: "3600"}, ok}, policy: steady, want: want{at: []int{0, 3600}, status: 200},
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(-1)},
		},
		{
			name: "without pauses", replies: []reply{busy, ok}, policy: steady, want: want{at: []int{0, 4}, status: 200},
			opts: []httpguard.TransportOption{httpguard.WithMaxPause(0)},
		},
		{name: "before the deadline", replies: []reply{busy, ok}, deadline: 4*time.Second + 1, policy: headgate.RetryPolicy{Jitter: 10}, want: want{at: []int{0, 4}, status: 200}},
		{name: "after the deadline", replies: []reply{busy, ok}, deadline: 4 * time.Second, want: want{at: []int{0}, status: 429}},
		{name: "a body", body: &source{text: "body"}, replies: []reply{busy, busy, ok}, policy: steady, want: want{at: []int{0, 4, 8}, status: 200}},
		{name: "a body that cannot be sent again", body: &source{text: "body"}, noBody: true, replies: []reply{busy, ok}, want: want{at: []int{0}, status: 429}},
		{name: "GetBody fails", body: &source{text: "body", fails: errBroken}, replies: []reply{busy, ok}, want: want{at: []int{0}, status: 429}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.body == nil {
				tt.noBody = true
			}
			sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				up := newUpstream(tt.replies...)
				rt := httpguard.NewTransport(side.Client, point, up.with(func() {
					if n := len(up.requests()); side.Asked() != n+1 {
						t.Errorf("%d checks for attempt %d", side.Asked(), n+1)
					}
				}), append(tt.opts, httpguard.WithRetries(tt.policy))...)
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if tt.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, tt.deadline)
				}
				defer cancel()
				var body *source
				if tt.body != nil {
					body = &source{text: tt.body.text, fails: tt.body.fails}
				}
				request := body.request(ctx, t, !tt.noBody)
				before := *request
				resp, err := rt.RoundTrip(request)

				var at []int
				for _, d := range up.requests() {
					at = append(at, int(d/time.Second))
				}
				if diff := cmp.Diff(tt.want.at, at); diff != "" {
					t.Errorf("sent at (-want +got):\n%s", diff)
				}
				if !errors.Is(err, tt.want.err) || (err == nil) != (resp != nil) {
					t.Errorf("RoundTrip() = %v, %v want %v", resp, err, tt.want.err)
				}
				if request.Body != before.Body || request.Context() != before.Context() {
					t.Error("the request was changed")
				}
				for i, closed := range up.bodies {
					if want := resp == nil || i < len(up.bodies)-1; (closed.n == 1) != want {
						t.Errorf("the body of reply %d was closed %d times", i+1, closed.n)
					}
				}
				if resp != nil {
					if text, err := io.ReadAll(resp.Body); err != nil || string(text) != fmt.Sprint("reply ", len(at)) || resp.StatusCode != tt.want.status {
						t.Errorf("got %d, %q, %v want %d of attempt %d", resp.StatusCode, text, err, tt.want.status, len(at))
					}
					_ = resp.Body.Close()
				}
				if body != nil {
					if body.allClosed(t); len(body.made) != len(at) {
						t.Errorf("%d bodies were made want %d", len(body.made), len(at))
					}
					for i, got := range up.got {
						if got != body.text {
							t.Errorf("attempt %d sent %q want %q", i+1, got, body.text)
						}
					}
				}
				// Each attempt is a flow.
				ends := side.Ends()
				for i, end := range ends {
					want := flowctl.StatusError
					if i == len(at)-1 && (tt.want.status == 200 || tt.want.status == 301) {
						want = flowctl.StatusOK
					}
					if end.Status != want {
						t.Errorf("flow %d ended as %s want %s", i+1, end.Status, want)
					}
				}
				if len(ends) != len(at) {
					t.Errorf("%d flows ended want %d", len(ends), len(at))
				}
			})
		})
	}
}

// Without a client and in its dry run nothing waits, and nothing is sent again. A component in dry run changes nothing.
func TestRetriesWhereNoLimitIsInForce(t *testing.T) {
	opts := []httpguard.TransportOption{httpguard.WithMaxWait(-1), httpguard.WithRetries(headgate.RetryPolicy{Jitter: -1, Budget: -1})}
	twice := func(t *testing.T, client *flowctl.Client, want []time.Duration) {
		t.Helper()
		up := newUpstream(reply{status: 429, retryAfter: "5"})
		rt := httpguard.NewTransport(client, point, up, opts...)
		for range 2 {
			if err := try(t, rt, "https://api.example/"); err != nil {
				t.Error(err)
			}
		}
		if diff := cmp.Diff(want, up.requests()); diff != "" {
			t.Errorf("sent at (-want +got):\n%s", diff)
		}
	}
	atOnce := []time.Duration{0, 0}
	t.Run("nil client", func(t *testing.T) { synctest.Test(t, func(t *testing.T) { twice(t, nil, atOnce) }) })
	dry := sides.Setup{Options: []flowctl.Option{flowctl.WithDryRun()}}
	t.Run("client's dry run", func(t *testing.T) {
		dry.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) { twice(t, side.Client, atOnce) })
	})
	component := sides.Setup{Policies: limits([]policy.Component{policy.RateLimiter{Selectors: policy.At(point), Interval: time.Hour, DryRun: true}})}
	t.Run("component's dry run", func(t *testing.T) {
		component.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
			const s = time.Second
			twice(t, side.Client, []time.Duration{0, 5 * s, 10 * s, 15 * s, 20 * s, 25 * s})
		})
	})
}

// A quota counts each attempt. A slot is free while a request waits to be sent again.
func TestRetriesAndLimits(t *testing.T) {
	quota := policy.RateLimiter{ID: "quota", Selectors: policy.At(point), Capacity: 10, Interval: time.Hour}
	slots := policy.ConcurrencyLimiter{ID: "slots", Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}
	for _, tt := range []struct {
		name     string
		capacity float64
		sent     int
		left     float64
		err      error
	}{
		{name: "enough", capacity: 10, sent: 3, left: 7},
		{name: "too little", capacity: 2, sent: 2, err: flowctl.ErrRejected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			quota := quota
			quota.Capacity = tt.capacity
			sides.Setup{Policies: limits([]policy.Component{quota, slots})}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				free := func() float64 {
					t.Helper()
					c, err := side.Engine.Component("limits", "slots")
					if err != nil {
						t.Fatal(err)
					}
					usage, err := c.Peek(t.Context(), "")
					if err != nil {
						t.Fatal(err)
					}
					return usage.Remaining
				}
				up := newUpstream(reply{status: 429, retryAfter: "4"}, reply{status: 429, retryAfter: "4"}, reply{status: 200})
				rt := httpguard.NewTransport(side.Client, point, up.with(func() {
					if free() != 0 {
						t.Error("a request in flight holds no slot")
					}
				}), httpguard.WithRetries(headgate.RetryPolicy{}))
				done := make(chan error)
				go func() { done <- try(t, rt, "https://api.example/") }()
				for {
					<-time.After(500 * time.Millisecond)
					select {
					case err := <-done:
						if !errors.Is(err, tt.err) || err != nil && errors.As(err, new(*httpguard.PausedError)) {
							t.Errorf("RoundTrip() = %v want %v", err, tt.err)
						}
						if left := side.Engine.Stats().Components[0].Usage.Remaining; left != tt.left || len(up.requests()) != tt.sent {
							t.Errorf("%d were sent, and %v tokens are left, want %d, %v", len(up.requests()), left, tt.sent, tt.left)
						}
						return
					default:
						if free() != 1 {
							t.Error("a request that waits holds a slot")
						}
					}
				}
			})
		})
	}
}

// A request waits out a pause for as long as it may.
func TestMaxWait(t *testing.T) {
	for _, tt := range []struct {
		name     string
		opts     []httpguard.TransportOption
		deadline time.Duration
		sent     bool
		most     time.Duration // that it takes
	}{
		{name: "by default"},
		{name: "zero", opts: []httpguard.TransportOption{httpguard.WithMaxWait(0)}},
		{name: "retries alone", opts: []httpguard.TransportOption{httpguard.WithRetries(headgate.RetryPolicy{})}},
		{name: "long enough", opts: []httpguard.TransportOption{httpguard.WithMaxWait(time.Minute)}, sent: true, most: 24 * time.Second},
		{name: "just enough", opts: []httpguard.TransportOption{httpguard.WithMaxWait(20 * time.Second)}, sent: true, most: 20 * time.Second},
		{name: "no limit", opts: []httpguard.TransportOption{httpguard.WithMaxWait(-1)}, sent: true, most: 24 * time.Second},
		{name: "too short", opts: []httpguard.TransportOption{httpguard.WithMaxWait(20*time.Second - 1)}},
		{name: "before the deadline", opts: []httpguard.TransportOption{httpguard.WithMaxWait(-1)}, deadline: 21 * time.Second, sent: true, most: 20500 * time.Millisecond},
		{name: "after the deadline", opts: []httpguard.TransportOption{httpguard.WithMaxWait(-1)}, deadline: 20 * time.Second},
		{
			name: "more than the policy's MaxWait",
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(-1), httpguard.WithRetries(headgate.RetryPolicy{MaxWait: 19 * time.Second})},
		},
		{
			name: "without jitter", sent: true, most: 20 * time.Second,
			opts: []httpguard.TransportOption{httpguard.WithMaxWait(-1), httpguard.WithRetries(headgate.RetryPolicy{Jitter: -1})},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				up := newUpstream(reply{status: 429, retryAfter: "20"}, reply{status: 200})
				rt := httpguard.NewTransport(side.Client, point, up, append(tt.opts, httpguard.WithControlPoint(func(r *http.Request) string { return r.URL.Fragment }))...)
				first, last := (*source)(nil).request(t.Context(), t, false), (*source)(nil).request(t.Context(), t, false)
				begin := time.Now()
				_, err := rt.RoundTrip(first.WithContext(deadlineNow(t))) // which leaves no time for a retry
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if tt.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, tt.deadline)
				}
				defer cancel()
				asked := side.Asked()
				_, err = rt.RoundTrip(last.WithContext(ctx))
				took := time.Since(begin)
				if tt.sent {
					if err != nil || took < 20*time.Second || took > tt.most || len(up.requests()) != 2 {
						t.Errorf("RoundTrip() = %v after %s, %d sent; want that it is sent within 20 s to %s", err, took, len(up.requests()), tt.most)
					}
					return
				}
				if paused, ok := errors.AsType[*httpguard.PausedError](err); !ok || took != 0 || paused.RetryAfter() != 20*time.Second || side.Asked() != asked {
					t.Errorf("RoundTrip() = %v after %s want a PausedError at once, and no flow", err, took)
				}
			})
		})
	}
}

// deadlineNow gives a context with a second left.
func deadlineNow(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	t.Cleanup(cancel)
	return ctx
}

// hidden is a context that does not tell its deadline.
type hidden struct{ context.Context }

func (hidden) Deadline() (time.Time, bool) { return time.Time{}, false }

// A wait ends with the request's context, or with the client, before a pause and before a retry. Nothing is sent then.
func TestWaitsEnd(t *testing.T) {
	errGone := errors.New("gone home")
	for _, tt := range []struct {
		name    string
		end     func(side *sides.Side, cancel context.CancelCauseFunc) // after 2 s
		expires time.Duration
		kinds   []sides.Kind
		match   []error
		timeout bool
		paused  bool
	}{
		{name: "canceled", end: func(_ *sides.Side, cancel context.CancelCauseFunc) { cancel(nil) }, kinds: sides.All, match: []error{context.Canceled}},
		{name: "canceled with a cause", end: func(_ *sides.Side, cancel context.CancelCauseFunc) { cancel(errGone) }, kinds: sides.All, match: []error{context.Canceled, errGone}},
		{name: "too late", expires: 2 * time.Second, kinds: sides.All, match: []error{context.DeadlineExceeded}, timeout: true},
		{
			name: "client closed", kinds: sides.All, match: []error{flowctl.ErrRejected}, paused: true,
			end: func(side *sides.Side, _ context.CancelCauseFunc) { _ = side.Client.Close(context.Background()) },
		},
		{
			name: "engine closed", kinds: []sides.Kind{sides.Embedded}, match: []error{flowctl.ErrRejected}, paused: true,
			end: func(side *sides.Side, _ context.CancelCauseFunc) { _ = side.Engine.Close() },
		},
	} {
		for _, retry := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/retry=%t", tt.name, retry), func(t *testing.T) {
				sides.Setup{}.InBubbles(t, tt.kinds, func(t *testing.T, side *sides.Side) {
					up := newUpstream(reply{status: 503, retryAfter: "20"}, reply{status: 200})
					rt := httpguard.NewTransport(side.Client, point, up, httpguard.WithMaxWait(-1), httpguard.WithRetries(headgate.RetryPolicy{Budget: -1}))
					body := &source{text: "body"}
					if !retry {
						if _, err := rt.RoundTrip((*source)(nil).request(deadlineNow(t), t, false)); err != nil {
							t.Fatal(err)
						}
					}
					begin := time.Now()
					ctx, cancel := context.WithCancelCause(t.Context())
					defer cancel(nil)
					if tt.expires > 0 {
						late, cancel := context.WithTimeout(ctx, tt.expires)
						defer cancel()
						ctx = hidden{late}
					}
					if tt.end != nil {
						time.AfterFunc(2*time.Second, func() { tt.end(side, cancel) })
					}
					client := &http.Client{Transport: rt}
					_, err := client.Do(body.request(ctx, t, true))
					if took := time.Since(begin); took != 2*time.Second || len(up.requests()) != 1 {
						t.Errorf("it took %s, and %d requests were sent, want 2s and 1", took, len(up.requests()))
					}
					for _, want := range tt.match {
						if !errors.Is(err, want) {
							t.Errorf("RoundTrip() = %v want %v", err, want)
						}
					}
					var wrapped *url.Error
					if !errors.As(err, &wrapped) || wrapped.Timeout() != tt.timeout {
						t.Errorf("Timeout of %v is not %t", err, tt.timeout)
					}
					paused, ok := errors.AsType[*httpguard.PausedError](err)
					if ok != tt.paused || ok && (paused.RetryAfter() != 18*time.Second || paused.HTTPStatus != 503 || paused.Host() != "api.example") {
						t.Errorf("RoundTrip() = %v want a PausedError: %t", err, tt.paused)
					}
					if !ok && !strings.HasPrefix(wrapped.Err.Error(), `headgate: start "orders": context `) || strings.Contains(wrapped.Err.Error(), "home") {
						t.Errorf("the error is %q", wrapped.Err)
					}
					body.allClosed(t)
				})
			})
		}
	}
}

// A pause that becomes longer while requests wait for its end holds them for longer: one that has not been sent, and one
// that is sent again.
func TestWaitsForLongerPauses(t *testing.T) {
	for _, tt := range []struct {
		maxWait time.Duration
		sent    int // of those that wait, also again
	}{{time.Minute, 2}, {10 * time.Second, 0}} {
		t.Run(tt.maxWait.String(), func(t *testing.T) {
			sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				var mu sync.Mutex
				late := []time.Duration{}
				begin := time.Now()
				rt := httpguard.NewTransport(side.Client, point, base(func(r *http.Request) (*http.Response, error) {
					since := time.Since(begin)
					switch {
					case r.URL.Path == "/slow":
						<-time.After(4 * time.Second)
						return responding(429, http.NoBody, "Retry-After", "20")(r)
					case since < time.Second:
						return responding(429, http.NoBody, "Retry-After", "5")(r)
					default:
						mu.Lock()
						defer mu.Unlock()
						late = append(late, since)
						return responding(200, http.NoBody)(r)
					}
				}), httpguard.WithMaxWait(tt.maxWait), httpguard.WithRetries(headgate.RetryPolicy{Attempts: 2}))
				var wg sync.WaitGroup
				errs := make([]error, 3)
				for i, path := range []string{"slow", "again", "waits"} {
					wg.Go(func() {
						ctx := t.Context()
						if path == "slow" {
							late, cancel := context.WithTimeout(ctx, 10*time.Second)
							defer cancel()
							ctx = late
						}
						r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://api.example/"+path, http.NoBody)
						if err != nil {
							t.Error(err)
							return
						}
						_, errs[i] = rt.RoundTrip(r)
					})
					<-time.After(100 * time.Millisecond)
				}
				wg.Wait()
				if errs[0] != nil {
					t.Error(errs[0])
				}
				for _, err := range errs[1:] {
					if _, paused := errors.AsType[*httpguard.PausedError](err); paused != (tt.sent == 0) {
						t.Errorf("RoundTrip() = %v", err)
					}
				}
				if len(late) != tt.sent || tt.sent > 0 && slices.Min(late) < 24*time.Second {
					t.Errorf("sent after %v want %d, after 24s", late, tt.sent)
				}
			})
		})
	}
}

// A response that asks for less than the pause that another one has begun is returned at once if the pause is too long.
func TestRetryWithinALongerPause(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		rt := httpguard.NewTransport(side.Client, point, base(func(r *http.Request) (*http.Response, error) {
			if r.URL.Path == "/long" {
				return responding(429, http.NoBody, "Retry-After", "50")(r)
			}
			<-time.After(time.Second)
			return responding(503, text("busy"), "Retry-After", "4")(r)
		}), httpguard.WithMaxWait(30*time.Second), httpguard.WithRetries(headgate.RetryPolicy{}))
		time.AfterFunc(500*time.Millisecond, func() { _ = try(t, rt, "https://api.example/long") })
		begin := time.Now()
		resp, err := rt.RoundTrip(to(t, "https://api.example/short"))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "busy" || resp.StatusCode != 503 || time.Since(begin) != time.Second {
			t.Errorf("got %d, %q, %v after %s want the response at once", resp.StatusCode, got, err, time.Since(begin))
		}
	})
}

// A flow that waits in a queue when a pause begins gives its place up, and another one is started after the pause.
func TestMaxWaitInQueues(t *testing.T) {
	one := policy.ConcurrencyScheduler{ID: "one", Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}
	overEngines(t, []policy.Component{one}, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
		up := newUpstream(reply{status: 429, retryAfter: "20"}, reply{status: 200})
		rt := httpguard.NewTransport(client, point, up.with(func() { <-time.After(time.Second) }), httpguard.WithMaxWait(time.Minute),
			httpguard.WithParams(func(*http.Request) flowctl.Params { return flowctl.Params{MaxWait: time.Minute} }))
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				resp, err := rt.RoundTrip((*source)(nil).request(t.Context(), t, false))
				if err != nil {
					t.Error(err)
					return
				}
				_ = resp.Body.Close()
			})
		}
		wg.Wait()
		at := up.requests()
		if len(at) != 3 || at[0] != time.Second || at[1] < 22*time.Second || at[2] > 30*time.Second {
			t.Errorf("sent until %v want one after 1 s, and two from 22 s on", at)
		}
	})
}

// All requests of a Transport share its budget.
func TestRetriesShareABudget(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		up := newUpstream(reply{status: 429, retryAfter: "1"})
		rt := httpguard.NewTransport(side.Client, point, up, httpguard.WithRetries(headgate.RetryPolicy{}), httpguard.WithMaxWait(-1))
		for range 40 {
			if err := try(t, rt, "https://api.example/"); err != nil {
				t.Error(err)
			}
		}
		if n, want := len(up.requests()), 40+10+4; n != want {
			t.Errorf("%d requests were sent for 40, want %d", n, want)
		}
	})
}

// A retry that is not made after all does not take from the budget.
func TestRetriesThatAreNotMade(t *testing.T) {
	for name, try := range map[string]func(t *testing.T, rt http.RoundTripper){
		"GetBody fails": func(t *testing.T, rt http.RoundTripper) {
			resp, err := rt.RoundTrip((&source{text: "body", fails: errBroken}).request(t.Context(), t, true))
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
		},
		"the context ends": func(t *testing.T, rt http.RoundTripper) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Millisecond, cancel)
			if _, err := rt.RoundTrip((*source)(nil).request(ctx, t, false)); !errors.Is(err, context.Canceled) {
				t.Errorf("RoundTrip() = %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			sides.Setup{}.InBubbles(t, []sides.Kind{sides.Embedded}, func(t *testing.T, side *sides.Side) {
				up := newUpstream(reply{status: 429, retryAfter: "1"})
				rt := httpguard.NewTransport(side.Client, point, up, httpguard.WithMaxPause(0),
					httpguard.WithRetries(headgate.RetryPolicy{Attempts: -1, Budget: 1e-300}))
				for range 20 {
					try(t, rt)
				}
				if _, err := rt.RoundTrip((*source)(nil).request(t.Context(), t, false)); err != nil {
					t.Error(err)
				}
				if n := len(up.requests()); n != 20+1+10 {
					t.Errorf("%d requests were sent want 20, and one with 10 retries", n)
				}
			})
		})
	}
}

// A panic while a request waits to be sent again leaves no flow behind.
func TestRetryPanics(t *testing.T) {
	for name, tt := range map[string]struct {
		getBody func() (io.ReadCloser, error)
		body    io.Reader
	}{
		"GetBody": {getBody: func() (io.ReadCloser, error) { panic(errBroken) }, body: strings.NewReader("busy")},
		"body":    {getBody: func() (io.ReadCloser, error) { return text("again"), nil }, body: panicking{}},
	} {
		t.Run(name, func(t *testing.T) {
			sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
				rt := httpguard.NewTransport(side.Client, point, responding(429, io.NopCloser(tt.body), "Retry-After", "1"), httpguard.WithRetries(headgate.RetryPolicy{}))
				r := (*source)(nil).request(t.Context(), t, false)
				r.Body, r.GetBody = text("once"), tt.getBody
				func() {
					defer func() {
						if p := recover(); p != any(errBroken) {
							t.Errorf("panicked with %v want %v", p, errBroken)
						}
					}()
					_, _ = rt.RoundTrip(r)
				}()
				if ends := side.Ends(); len(ends) != 1 || ends[0].Status != flowctl.StatusError {
					t.Errorf("ends %v want one as Error", ends)
				}
			})
		})
	}
}

type panicking struct{}

func (panicking) Read([]byte) (int, error) { panic(errBroken) }

// pipes is a listener in memory, for servers in a bubble.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// What is left of a response is read, so that the next attempt uses its connection again, unless it is too long or takes too
// long. The attempt's goroutines end, which the bubble checks.
func TestRetryConnections(t *testing.T) {
	for _, tt := range []struct {
		name   string
		write  func(w http.ResponseWriter, r *http.Request)
		reused bool
	}{
		{"no body", func(http.ResponseWriter, *http.Request) {}, true},
		{"short body", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat("x", 30_000)) }, true},
		{"slow body", func(w http.ResponseWriter, _ *http.Request) {
			for range 3 {
				_, _ = io.WriteString(w, "x")
				_ = http.NewResponseController(w).Flush()
				<-time.After(300 * time.Millisecond)
			}
		}, true},
		{"long body", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat("x", 1_000_000)) }, false},
		{"body without an end", func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "x")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{}.InBubbles(t, []sides.Kind{sides.Embedded, sides.Served}, func(t *testing.T, side *sides.Side) {
				listener, sent := newPipes(), 0
				var mu sync.Mutex
				server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					mu.Lock()
					sent++
					first := sent == 1
					mu.Unlock()
					if !first {
						_, _ = io.WriteString(w, "done")
						return
					}
					w.Header().Set("Retry-After", "3")
					w.WriteHeader(http.StatusServiceUnavailable)
					tt.write(w, r)
				})}
				served := make(chan error, 1)
				go func() { served <- server.Serve(listener) }()
				wire := &http.Transport{DialContext: listener.dial}
				client := &http.Client{Transport: httpguard.NewTransport(side.Client, point, wire, httpguard.WithRetries(headgate.RetryPolicy{}))}

				var reused []bool
				ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
					GotConn: func(info httptrace.GotConnInfo) { reused = append(reused, info.Reused) },
				})
				begin := time.Now()
				r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://api.example/", strings.NewReader("hello"))
				if err != nil {
					t.Fatal(err)
				}
				resp, err := client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				if took := time.Since(begin); err != nil || string(body) != "done" || took < 3*time.Second || took > 3600*time.Millisecond {
					t.Errorf("got %q, %v after %s want the second response after 3 s", body, err, took)
				}
				_ = resp.Body.Close()
				if diff := cmp.Diff([]bool{false, tt.reused}, reused); diff != "" {
					t.Errorf("connections reused (-want +got):\n%s", diff)
				}
				wire.CloseIdleConnections()
				_ = server.Close()
				if err := <-served; !errors.Is(err, http.ErrServerClosed) {
					t.Error(err)
				}
			})
		})
	}
}
