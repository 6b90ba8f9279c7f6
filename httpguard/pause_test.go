package httpguard_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// overEngines runs a test in a bubble over engines with these components.
func overEngines(t *testing.T, components []policy.Component, test func(t *testing.T, e *engine.Engine, client *flowctl.Client), opts ...flowctl.Option) {
	t.Helper()
	sides.Setup{Policies: limits(components), Options: opts}.InBubbles(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
		if err := side.Client.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		test(t, side.Engine, side.Client)
	})
}

// busy is an upstream that asks for a pause of an hour each time, and counts.
func busy(sent *int) base {
	return func(r *http.Request) (*http.Response, error) {
		*sent++
		return responding(http.StatusTooManyRequests, http.NoBody, "Retry-After", "3600")(r)
	}
}

// try sends a request for the URL.
func try(t *testing.T, rt http.RoundTripper, target string) error {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, target, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	_, err = rt.RoundTrip(r)
	return err
}

// Without flow control, and in a dry run, an upstream pauses nothing. Around such a client, flow control may be on.
func TestNoPausesWhereNoLimitIsInForce(t *testing.T) {
	off := func(t *testing.T, client *flowctl.Client) {
		t.Helper()
		sent := 0
		rt := httpguard.NewTransport(client, point, busy(&sent))
		on := newEngine(t).Start(t.Context(), point, flowctl.Params{})
		defer func() { _, _ = on.End(t.Context()) }()
		for _, ctx := range []context.Context{t.Context(), on.Context(), t.Context()} {
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, "https://api.example/", http.NoBody)
			if _, err := rt.RoundTrip(r); err != nil {
				t.Errorf("after %d requests: %v", sent, err)
			}
		}
		if sent != 3 {
			t.Errorf("%d of 3 requests were sent", sent)
		}
	}
	t.Run("nil client", func(t *testing.T) { off(t, nil) })
	dry := sides.Setup{Options: []flowctl.Option{flowctl.WithDryRun()}}
	dry.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) { off(t, side.Client) })
}

// Within a flow of a client in dry run, or without one, a client in force pauses as it does elsewhere.
func TestPausesWithinADryRun(t *testing.T) {
	dry, err := flowctl.New(newAgent(t), flowctl.WithDryRun())
	if err != nil {
		t.Fatal(err)
	}
	for name, around := range map[string]*flowctl.Client{"nil client": nil, "dry run": dry} {
		sent := 0
		rt := httpguard.NewTransport(newEngine(t), point, busy(&sent))
		flow := around.Start(t.Context(), "around", flowctl.Params{})
		var last error
		for range 3 {
			r := httptest.NewRequestWithContext(flow.Context(), http.MethodGet, "https://api.example/", http.NoBody)
			_, last = rt.RoundTrip(r)
		}
		_, _ = flow.End(t.Context())
		if sent != 1 || !errors.Is(last, flowctl.ErrRejected) {
			t.Errorf("%s: %d requests were sent, the last gave %v; want 1, and a pause", name, sent, last)
		}
	}
}

func newAgent(t *testing.T) *engine.Engine {
	t.Helper()
	e, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

// A pause is for a host and port, and these have more than one spelling.
func TestPauseHoldsForAllSpellings(t *testing.T) {
	for _, same := range [][]string{
		{
			"https://api.example/", "https://API.Example/", "https://api.example:443/", "https://api.example:/", "https://api.example./",
			"https://API.EXAMPLE.:0443/v2?q=1#f", "https://user:secret@api.example/", "HTTPS://api.example", "http://api.example:443/",
			"https://\uff41\uff50\uff49\u3002example/",
		},
		{"http://api.example/", "http://api.example:80/", "http://Api.example.:080/", "https://api.example:80"},
		{"https://api.example:8443/", "http://API.example:08443"},
		{
			"https://b\u00fccher.example/", "https://B\u00dcCHER.example/", "https://bu\u0308cher.example./", "https://xn--bcher-kva.example:443",
			"https://XN--Bcher-KVA.EXAMPLE", "https://b%C3%BCcher.example",
		},
		{
			"https://[2001:db8::1]/", "https://[2001:DB8::1]:443/", "https://[2001:db8:0:0:0:0:0:1]/", "https://[2001:0db8:0000:0000:0000:0000:0000:0001]:/",
			"https://[2001:db8::0.0.0.1]/",
		},
		{"https://[fe80::1%25eth0]/", "https://[FE80:0::1%25eth0]:443/"},
		{"https://[fe80::1%25eth1]/"},
		{"https://[fe80::1]/"},
		{"https://192.0.2.1/", "https://192.0.2.1:443/", "https://[::ffff:192.0.2.1]/", "https://[::FFFF:c000:201]/", "https://192.0.2.1./", "https://\uff11\uff19\uff12.0.2.1/"},
		{"https://example/"},
		{"https://www.api.example/"},
	} {
		for _, first := range same {
			sent := 0
			rt := httpguard.NewTransport(newEngine(t), point, busy(&sent))
			for _, target := range append([]string{first}, same...) {
				r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
				if err != nil {
					t.Fatal(err)
				}
				if r.URL, err = url.Parse(target); err != nil { // NewRequest changes some
					t.Fatal(err)
				}
				if _, err := rt.RoundTrip(r); sent != 1 {
					t.Errorf("%s was sent after a pause of %s: %v", target, first, err)
					sent = 1
				} else if paused, ok := errors.AsType[*httpguard.PausedError](err); ok && paused.Host() != r.URL.Host {
					t.Errorf("Host = %q want %q, as the URL has it", paused.Host(), r.URL.Host)
				}
			}
		}
	}
}

func TestPauseHoldsForNoOtherUpstream(t *testing.T) {
	different := []string{
		"https://api.example/", "http://api.example/", "https://api.example:8443/", "https://api.example..", "https://apiexample/",
		"https://b\u00fccher.example/", "https://bucher.example/", "https://[2001:db8::1]/", "https://[2001:db8::2]/",
		"https://[fe80::1%25eth0]/", "https://[fe80::1%25eth1]/", "https://[fe80::1%25ETH0]/", "https://[fe80::1]/", "https://192.0.2.1/",
		"https://192.0.2.10/", "https:///", "ftp://api.example/", "ftp://api.example:21/", "https://-\u00fc-./",
	}
	sent := 0
	rt := httpguard.NewTransport(newEngine(t), point, busy(&sent))
	for _, target := range different {
		if err := try(t, rt, target); err != nil {
			t.Errorf("%s: %v", target, err)
		}
	}
	if sent != len(different) {
		t.Errorf("%d of %d requests were sent", sent, len(different))
	}
	r := &http.Request{Method: http.MethodGet, Header: make(http.Header)} // which no base takes, nor must it panic here
	for range 2 {
		_, _ = rt.RoundTrip(r.WithContext(t.Context()))
	}
}

// Pauses, and the requests that they stop, are counted and logged for the client, once a minute each. What they are about
// stays out: the host is a label's value.
func TestPausesAreSeen(t *testing.T) {
	var log bytes.Buffer
	provider := new(metertest.Provider)
	opts := []flowctl.Option{flowctl.WithMeterProvider(provider), flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil)))}
	overEngines(t, nil, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
		log.Reset()
		before := provider.Read(t.Context())
		sent := 0
		rt := httpguard.NewTransport(client, point, base(func(r *http.Request) (*http.Response, error) {
			sent++
			return responding(http.StatusServiceUnavailable, http.NoBody, "Retry-After", "20")(r)
		}))
		for range 4 { // 10 requests in each of 4 pauses, within a minute and more
			for range 10 {
				_ = try(t, rt, "https://api.example/?key=secret")
			}
			<-time.After(20 * time.Second)
		}
		got := provider.Read(t.Context())
		counts := map[string]float64{}
		for _, name := range []string{"flowcontrol_pauses_total", "flowcontrol_paused_requests_total"} {
			key := name + " control_point=" + point
			counts[name] = got[key] - before[key]
		}
		if diff := cmp.Diff(map[string]float64{"flowcontrol_pauses_total": 4, "flowcontrol_paused_requests_total": 36}, counts); diff != "" || sent != 4 {
			t.Errorf("%d sent, counted (-want +got):\n%s", sent, diff)
		}
		for _, want := range []string{
			`level=WARN msg="headgate: an upstream asks for a pause" control_point=orders status=503 pause=20s unlogged_before=0`,
			`level=WARN msg="headgate: an upstream asks for a pause" control_point=orders status=503 pause=20s unlogged_before=2`,
			`level=WARN msg="headgate: a request was not sent because of a pause" control_point=orders left=20s unlogged_before=0`,
			`level=WARN msg="headgate: a request was not sent because of a pause" control_point=orders left=20s unlogged_before=26`,
		} {
			if strings.Count(log.String(), want) != 1 {
				t.Errorf("the log does not have once %s:\n%s", want, &log)
			}
		}
		if n := strings.Count(log.String(), "\n"); n != 4 || strings.Contains(log.String(), "example") || strings.Contains(log.String(), "secret") {
			t.Errorf("%d lines want 4, without the host:\n%s", n, &log)
		}
	}, opts...)
}

// A client that shows nothing pauses all the same.
func TestPausesAreSeenByNobody(t *testing.T) {
	sent := 0
	rt := httpguard.NewTransport(newEngine(t), point, busy(&sent))
	for range 3 {
		_ = try(t, rt, "https://api.example/")
	}
	if sent != 1 {
		t.Errorf("%d requests were sent want 1", sent)
	}
}

// What a flow had taken when a pause turns it away goes back: tokens and slots of an engine in the process, and slots of
// one that is served.
func TestPauseGivesBack(t *testing.T) {
	const flows = 4
	for _, tt := range []struct {
		name    string
		limiter policy.Component
		slots   bool
	}{
		{name: "rate limiter", limiter: policy.RateLimiter{Capacity: flows, Fill: 1, Interval: time.Hour}},
		{name: "rate limiter by label", limiter: policy.RateLimiter{Capacity: flows, Fill: 1, Interval: time.Hour, LimitBy: "user"}},
		{name: "quota scheduler", limiter: policy.QuotaScheduler{Capacity: flows, Fill: 1, Interval: time.Hour}},
		{name: "concurrency limiter", limiter: policy.ConcurrencyLimiter{Max: flows, MaxInflight: time.Hour}, slots: true},
		{name: "concurrency scheduler", limiter: policy.ConcurrencyScheduler{Max: flows, MaxInflight: time.Hour}, slots: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			components := []policy.Component{named(tt.limiter), policy.ConcurrencyScheduler{ID: "one", Selectors: policy.At(point), Max: 1, MaxInflight: time.Hour}}
			overEngines(t, components, func(t *testing.T, e *engine.Engine, client *flowctl.Client) {
				sent := 0
				rt := httpguard.NewTransport(client, point, base(func(r *http.Request) (*http.Response, error) {
					sent++
					<-time.After(time.Second) // in which the others come to wait
					return responding(http.StatusTooManyRequests, http.NoBody, "Retry-After", "60")(r)
				}), httpguard.WithParams(func(*http.Request) flowctl.Params {
					return flowctl.Params{CheckTimeout: time.Minute, Labels: map[string]string{"user": "alice"}}
				}))
				done := make(chan error)
				for range flows {
					go func() { done <- try(t, rt, "https://api.example/") }()
				}
				paused := 0
				for range flows {
					if _, ok := errors.AsType[*httpguard.PausedError](<-done); ok {
						paused++
					}
				}
				if sent != 1 || paused != flows-1 {
					t.Fatalf("%d sent, %d paused want 1, %d", sent, paused, flows-1)
				}
				value := ""
				if strings.HasSuffix(tt.name, "label") {
					value = "alice"
				}
				want := float64(flows)
				switch {
				case tt.slots:
				case strings.Contains(t.Name(), "served"):
					want = 0 // the protocol has no message that gives tokens back
				default:
					want = flows - 1 // those of the request that was sent stay taken
				}
				for component, want := range map[string]float64{"limit": want, "one": 1} {
					by := value
					if component == "one" {
						by = ""
					}
					c, err := e.Component("limits", component)
					if err != nil {
						t.Fatal(err)
					}
					usage, err := c.Peek(t.Context(), by)
					if err != nil {
						t.Fatal(err)
					}
					if int(usage.Remaining) != int(want) {
						t.Errorf("%s: %v of %v are free, want %v", component, usage.Remaining, usage.Capacity, want)
					}
				}
			})
		})
	}
}

// named gives the limiter an ID and the control point.
func named(c policy.Component) policy.Component {
	switch c := c.(type) {
	case policy.RateLimiter:
		c.ID, c.Selectors = "limit", policy.At(point)
		return c
	case policy.QuotaScheduler:
		c.ID, c.Selectors = "limit", policy.At(point)
		return c
	case policy.ConcurrencyLimiter:
		c.ID, c.Selectors = "limit", policy.At(point)
		return c
	case policy.ConcurrencyScheduler:
		c.ID, c.Selectors = "limit", policy.At(point)
		return c
	default:
		return c
	}
}

// A pause that is over when a flow's turn comes turns nothing away.
func TestPauseIsOverInTime(t *testing.T) {
	overEngines(t, []policy.Component{policy.QuotaScheduler{Selectors: policy.At(point), Capacity: 1, Fill: 1, Interval: 10 * time.Second}},
		func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
			for _, tt := range []struct{ pause, sent int }{{9, 2}, {11, 1}} {
				sent := 0
				rt := httpguard.NewTransport(client, point, base(func(r *http.Request) (*http.Response, error) {
					if sent++; sent == 1 {
						<-time.After(time.Millisecond)
						return responding(429, http.NoBody, "Retry-After", strconv.Itoa(tt.pause))(r)
					}
					return responding(200, http.NoBody)(r)
				}), httpguard.WithParams(func(*http.Request) flowctl.Params { return flowctl.Params{CheckTimeout: time.Minute} }))
				done := make(chan error, 2)
				for range 2 {
					go func() { done <- try(t, rt, "https://api.example/") }()
				}
				err := errors.Join(<-done, <-done)
				if sent != tt.sent || (err == nil) != (sent == 2) {
					t.Errorf("a pause of %d s: %d sent want %d: %v", tt.pause, sent, tt.sent, err)
				}
				<-time.After(time.Minute)
			}
		})
}

// A PausedError tells its text only, however it is printed, and no encoding of it shows the host, which is the value of a
// label.
func TestPausedErrorHidesItsHost(t *testing.T) {
	sent := 0
	rt := httpguard.NewTransport(newEngine(t), point, busy(&sent))
	_ = try(t, rt, "https://api.example/")
	err := try(t, rt, "https://api.example/")
	type result struct{ err error } // package fmt calls no methods of what is in it
	for _, verb := range []string{"%v", "%s", "%q", "%t", "%+v", "%#v"} {
		if got := fmt.Sprintf(verb, result{err}); strings.Contains(got, "example") {
			t.Errorf("%s of a struct: %s", verb, got)
		}
	}
	for _, verb := range []string{"%v", "%s", "%+v", "%#v"} {
		if got := fmt.Sprintf(verb, err); !strings.Contains(got, "paused by the upstream, retry after ") || strings.Contains(got, "example") {
			t.Errorf("%s: %s", verb, got)
		}
	}
	paused, _ := errors.AsType[*httpguard.PausedError](err)
	if data, err := json.Marshal(paused); err != nil || strings.Contains(string(data), "example") || !strings.Contains(string(data), point) {
		t.Errorf("Marshal() = %s, %v want the control point, and no host", data, err)
	}
}

// A nil pointer is logged and printed in a few words, and an error that a program has made has no host.
func TestPausedErrorsOfPrograms(t *testing.T) {
	var none *httpguard.PausedError
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "error", none)
	if got := fmt.Sprintf("%v %s %s", none, none.Error(), log.String()[max(0, strings.Index(log.String(), "msg=")):]); got != "<nil> <nil> msg=m error=<nil>\n" {
		t.Error(got)
	}
	if got := new(httpguard.PausedError).Host(); got != "" {
		t.Errorf("Host() = %q", got)
	}
}
