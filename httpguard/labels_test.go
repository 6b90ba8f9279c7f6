package httpguard_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// A label that the application sets counts as it was set, whatever the request says, and however an agent is asked.
func TestLabelsOfTheApplicationWin(t *testing.T) {
	keys := []string{
		"http.method", "http.target", "http.host", "http.scheme", "http.flavor", "http.request_content_length",
		"http.request.header.x_tenant", "http.request.header.x_other", "http.request.header.user_agent", "http.else", "user id", "50%25",
	}
	values := map[string]string{"empty": "", "plain": "1000", "odd": `-1, "ä";50%=\`, "the request's own method": "POST", "long": strings.Repeat("v", 4000)}
	type source struct {
		named  bool // members of baggage
		params func(key, value string) flowctl.Params
		change func(r *http.Request, key, value string) *http.Request
	}
	sources := map[string]source{
		"Params": {params: func(key, value string) flowctl.Params { return flowctl.Params{Labels: map[string]string{key: value}} }},
		"labels.With": {change: func(r *http.Request, key, value string) *http.Request {
			return r.WithContext(labels.With(r.Context(), key, value))
		}},
		"a named member of baggage": {named: true, change: func(r *http.Request, key, value string) *http.Request {
			r.Header.Set("Baggage", key+"="+url.PathEscape(value))
			return r
		}},
	}
	var components []policy.Component
	points := make(map[string]string)
	for _, key := range keys {
		for name, value := range values {
			point := fmt.Sprint("p", len(points))
			points[key+name] = point
			components = append(components, policy.RateLimiter{
				Interval:  time.Second, // without a token
				Selectors: []policy.Selector{{ControlPoint: point, Labels: policy.LabelMatcher{Equal: map[string]string{key: value}}}},
			})
		}
	}
	for from, source := range sources {
		opts := []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), flowctl.WithLabels(map[string]string{"http.else": "default", "user id": "default"})}
		if source.named {
			opts = append(opts, flowctl.WithBaggage(keys...))
		}
		t.Run(from, func(t *testing.T) {
			sides.Setup{Policies: sides.Policies(components...), Options: opts}.Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				for _, checkHTTP := range []bool{false, true} {
					for _, key := range keys {
						if source.named && key == "user id" { // which no member is called
							continue
						}
						for name, value := range values {
							set := []httpguard.MiddlewareOption{httpguard.WithHeaders("X-Tenant", "User-Agent")}
							if checkHTTP {
								set = append(set, httpguard.WithCheckHTTP())
							}
							if source.params != nil {
								set = append(set, httpguard.WithParams(func(*http.Request) flowctl.Params { return source.params(key, value) }))
							}
							r := httptest.NewRequest(http.MethodPut, "/orders", strings.NewReader("xyz"))
							r.Header.Set("X-Tenant", "acme")
							r.Header.Set("User-Agent", "caller")
							if source.change != nil {
								r = source.change(r, key, value)
							}
							w := httptest.NewRecorder()
							httpguard.Middleware(side.Client, points[key+name], set...)(http.NotFoundHandler()).ServeHTTP(w, r)
							if w.Code != http.StatusTooManyRequests {
								t.Errorf("by CheckHTTP %t: status %d: %s is not the %s value", checkHTTP, w.Code, key, name)
							}
						}
					}
				}
			})
		})
	}
}

// Of two headers that become one label, the one counts that a proxy can set, however an agent is asked, and an agent of another make
// gets that one alone.
func TestPeersSpellNoHeaderOtherwise(t *testing.T) {
	const label = "http.request.header.x_user"
	limit := policy.RateLimiter{
		Interval:  time.Second, // without a token
		Selectors: []policy.Selector{{ControlPoint: point, Labels: policy.LabelMatcher{Equal: map[string]string{label: "proxy"}}}},
	}
	setup := sides.Setup{Policies: sides.Policies(limit), Options: []flowctl.Option{flowctl.WithCheckTimeout(time.Minute)}}
	setup.Over(t, sides.All, func(t *testing.T, side *sides.Side) {
		for _, checkHTTP := range []bool{false, true} {
			for _, names := range [][]string{{"X-User", "X_User"}, {"X_User", "X-User"}, {"x_user", "X_USER", "x-user"}} {
				opts := []httpguard.MiddlewareOption{httpguard.WithHeaders(names...)}
				if checkHTTP {
					opts = append(opts, httpguard.WithCheckHTTP())
				}
				h := httpguard.Middleware(side.Client, point, opts...)(http.NotFoundHandler())
				r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
				r.Header["X-User"], r.Header["X_user"] = []string{"proxy"}, []string{"peer"}
				w := httptest.NewRecorder()
				h.ServeHTTP(w, r)
				if side.Script == nil {
					if w.Code != http.StatusTooManyRequests {
						t.Errorf("by CheckHTTP %t, listed %q: status %d, so the peer's counts", checkHTTP, names, w.Code)
					}
					continue
				}
				checks := side.Script.Checks()
				last := checks[len(checks)-1]
				got, sent := last.Request.GetLabels()[label], last.HTTP.GetRequest().GetHeaders()
				if checkHTTP {
					got = sent["x-user"]
				}
				if _, other := sent["x_user"]; got != "proxy" || other {
					t.Errorf("by CheckHTTP %t, listed %q: the agent gets %q, %v", checkHTTP, names, got, sent)
				}
			}
		}
	})
}

// A caller's headers push out no label that the service names: a limit of nothing lets no request pass.
func TestCallersPushOutNoLabel(t *testing.T) {
	for name, tt := range map[string]struct {
		by  string
		opt flowctl.Option
	}{
		"a default":                 {"region", flowctl.WithLabels(map[string]string{"region": "eu"})},
		"a named member of baggage": {"tenant", flowctl.WithBaggage("tenant")},
	} {
		t.Run(name, func(t *testing.T) {
			setup := sides.Setup{
				Policies: sides.Policies(policy.RateLimiter{Selectors: policy.At(point), Interval: time.Second, LimitBy: tt.by}),
				Options:  []flowctl.Option{tt.opt, flowctl.WithCheckTimeout(time.Minute)},
			}
			setup.Over(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				params := httpguard.WithParams(func(r *http.Request) flowctl.Params {
					return flowctl.Params{Labels: labels.Repair(map[string]string{"agent": r.UserAgent(), "referer": r.Referer()})}
				})
				for _, checkHTTP := range []bool{false, true} {
					opts := []httpguard.MiddlewareOption{params}
					if checkHTTP {
						opts = append(opts, httpguard.WithCheckHTTP())
					}
					h := httpguard.Middleware(side.Client, point, opts...)(http.NotFoundHandler())
					for _, n := range []int{10, 4000, 4070, 4080, 4085, 4088, 4090, 4091, 5000} {
						r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
						r.Header.Set("Baggage", "tenant=acme")
						r.Header.Set("User-Agent", strings.Repeat("a", n))
						r.Header.Set("Referer", strings.Repeat("a", n))
						w := httptest.NewRecorder()
						h.ServeHTTP(w, r)
						fits := !checkHTTP || side.Kind == sides.Embedded || n <= 4080
						if want := map[bool]int{true: http.StatusTooManyRequests, false: http.StatusInternalServerError}[fits]; w.Code != want {
							t.Errorf("by CheckHTTP %t, headers of %d bytes: status %d want %d", checkHTTP, n, w.Code, want)
						}
					}
				}
			})
		})
	}
}
