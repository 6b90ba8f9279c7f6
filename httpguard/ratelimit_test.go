package httpguard_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// told is what a response tells of limits.
type told struct {
	Status        int
	Limit, Policy string
}

func tell(t *testing.T, client *flowctl.Client, opts ...httpguard.MiddlewareOption) told {
	t.Helper()
	h := httpguard.Middleware(client, point, append(opts, httpguard.WithRateLimitHeaders())...)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
	return told{w.Code, w.Header().Get("RateLimit"), w.Header().Get("RateLimit-Policy")}
}

// The fields tell of each kind of limit, before it rejects and then.
func TestRateLimitHeadersOfEachKind(t *testing.T) {
	at := policy.At(point)
	const slots = `;qu="concurrent-requests"`
	for _, tt := range []struct {
		name       string
		components []policy.Component
		hold       bool // a flow holds a slot while others come
		want       []told
	}{
		{
			name:       "rate limiter",
			components: []policy.Component{policy.RateLimiter{ID: "a", Selectors: at, Capacity: 2, Fill: 1, Interval: time.Minute}},
			want: []told{
				{200, `"limits/a";r=1`, `"limits/a";q=2`},
				{200, `"limits/a";r=0`, `"limits/a";q=2`},
				{429, `"limits/a";r=0;t=60`, `"limits/a";q=2`},
			},
		},
		{
			name:       "rate limiter of nothing",
			components: []policy.Component{policy.RateLimiter{ID: "a", Selectors: at, Fill: 1, Interval: time.Minute}},
			want:       []told{{429, `"limits/a";r=0`, `"limits/a";q=0`}},
		},
		{
			name:       "calendar quota",
			components: []policy.Component{policy.CalendarQuota{ID: "a", Selectors: at, Amount: 2, Period: policy.PeriodMonth}},
			want:       []told{{200, `"limits/a";r=1`, `"limits/a";q=2`}, {200, `"limits/a";r=0`, `"limits/a";q=2`}},
		},
		{
			name:       "calendar quota of nothing",
			components: []policy.Component{policy.CalendarQuota{ID: "a", Selectors: at, Period: policy.PeriodMonth}},
			want:       []told{{429, `"limits/a";r=0`, `"limits/a";q=0`}},
		},
		{
			name:       "concurrency limiter of nothing",
			components: []policy.Component{policy.ConcurrencyLimiter{ID: "a", Selectors: at, MaxInflight: time.Minute}},
			want:       []told{{429, `"limits/a";r=0`, `"limits/a";q=0` + slots}},
		},
		{
			name:       "quota scheduler of nothing",
			components: []policy.Component{policy.QuotaScheduler{ID: "a", Selectors: at, Fill: 1, Interval: time.Minute}},
			want:       []told{{503, `"limits/a";r=0`, ``}},
		},
		{
			name: "quota scheduler of nothing that lets a flow in for nothing",
			components: []policy.Component{policy.QuotaScheduler{
				ID: "a", Selectors: at, Fill: 1, Interval: time.Minute, Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{Tokens: policy.NoTokens}},
			}},
			want: []told{{200, `"limits/a";r=0`, `"limits/a";q=0`}},
		},
		{
			name:       "a name of other characters",
			components: []policy.Component{policy.RateLimiter{ID: "\u00fc\n\"\\ 5%", Selectors: at, Capacity: 2, Fill: 1, Interval: time.Minute}},
			want:       []told{{200, `"limits/%c3%bc%0a\"\\ 5%25";r=1`, `"limits/%c3%bc%0a\"\\ 5%25";q=2`}},
		},
		{
			name:       "quota scheduler",
			components: []policy.Component{policy.QuotaScheduler{ID: "a", Selectors: at, Capacity: 2, Fill: 1, Interval: time.Minute}},
			want: []told{
				{200, `"limits/a";r=1`, `"limits/a";q=2`},
				{200, `"limits/a";r=0`, `"limits/a";q=2`},
				{503, `"limits/a";r=0;t=60`, ``},
			},
		},
		{
			name: "a quota scheduler rejects what a limiter let in",
			components: []policy.Component{
				policy.QuotaScheduler{ID: "a", Selectors: at, Capacity: 1, Fill: 1, Interval: time.Minute},
				policy.RateLimiter{ID: "b", Selectors: at, Capacity: 100, Fill: 1, Interval: time.Hour},
			},
			want: []told{
				{200, `"limits/b";r=99, "limits/a";r=0`, `"limits/b";q=100, "limits/a";q=1`},
				{503, `"limits/b";r=99, "limits/a";r=0;t=60`, `"limits/b";q=100`},
			},
		},
		{
			name:       "concurrency limiter",
			components: []policy.Component{policy.ConcurrencyLimiter{ID: "a", Selectors: at, Max: 1, MaxInflight: time.Minute}},
			want:       []told{{200, `"limits/a";r=1`, `"limits/a";q=1` + slots}, {200, `"limits/a";r=1`, `"limits/a";q=1` + slots}},
		},
		{
			name:       "concurrency limiter, taken",
			components: []policy.Component{policy.ConcurrencyLimiter{ID: "a", Selectors: at, Max: 1, MaxInflight: time.Minute}},
			hold:       true,
			want:       []told{{429, `"limits/a";r=0`, `"limits/a";q=1` + slots}},
		},
		{
			name:       "concurrency scheduler",
			components: []policy.Component{policy.ConcurrencyScheduler{ID: "a", Selectors: at, Max: 3, MaxInflight: time.Minute}},
			want:       []told{{200, `"limits/a";r=3`, `"limits/a";q=3` + slots}},
		},
		{
			name:       "concurrency scheduler, taken",
			components: []policy.Component{policy.ConcurrencyScheduler{ID: "a", Selectors: at, Max: 1, MaxInflight: time.Minute}},
			hold:       true,
			want:       []told{{503, `"limits/a";r=0`, `"limits/a";q=1` + slots}},
		},
		{
			name:       "sampler and load scheduler",
			components: []policy.Component{policy.Sampler{Selectors: at, AcceptPercentage: 100}, policy.LoadScheduler{Selectors: at, LoadMultiplier: policy.Constant(1)}},
			want:       []told{{200, ``, ``}},
		},
		{
			name: "without their label, or letting all pass",
			components: []policy.Component{
				policy.QuotaScheduler{Selectors: at, Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "absent"},
				policy.ConcurrencyScheduler{Selectors: at, Max: 1, MaxInflight: time.Minute, PassThrough: true},
			},
			want: []told{{200, ``, ``}, {200, ``, ``}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			overEngines(t, tt.components, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
				if tt.hold {
					flow := client.Start(t.Context(), point, flowctl.Params{})
					defer func() { _, _ = flow.End(t.Context()) }()
				}
				for i, want := range tt.want {
					if diff := cmp.Diff(want, tell(t, client)); diff != "" {
						t.Errorf("request %d (-want +got):\n%s", i, diff)
					}
				}
			})
		})
	}
}

// A debt and costs that are no whole numbers do not change the capacity by rounding.
func TestRateLimitHeadersOfFractions(t *testing.T) {
	at := policy.At(point)
	for _, tt := range []struct {
		name       string
		components []policy.Component
		settle     float64
		policy     string
	}{
		{
			name:       "a rate limiter's debt",
			components: []policy.Component{policy.RateLimiter{ID: "a", Selectors: at, Capacity: 2, Fill: 1, Interval: time.Hour, TokensLabel: "cost"}},
			settle:     3.5, policy: `"test/a";q=2`,
		},
		{
			name:       "a rate limiter's debt with a capacity that is no whole number",
			components: []policy.Component{policy.RateLimiter{ID: "a", Selectors: at, Capacity: 2.7, Fill: 1, Interval: time.Hour, TokensLabel: "cost"}},
			settle:     3.5, policy: `"test/a";q=2`,
		},
		{
			name:       "a calendar quota's debt",
			components: []policy.Component{policy.CalendarQuota{ID: "a", Selectors: at, Amount: 3, Period: policy.PeriodDay, TokensLabel: "cost"}},
			settle:     3.3, policy: `"test/a";q=3`,
		},
		{
			name: "a debt beside a limiter that gets its tokens back",
			components: []policy.Component{
				policy.RateLimiter{ID: "a", Selectors: at, Capacity: 3, Fill: 3, Interval: 3 * time.Second, TokensLabel: "cost"},
				policy.RateLimiter{ID: "b", Selectors: at, Capacity: 2, Fill: 1, Interval: time.Hour, TokensLabel: "cost"},
			},
			settle: 3.5, policy: `"test/a";q=3, "test/b";q=2`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			setup := sides.Setup{Policies: sides.Policies(tt.components...)}
			setup.InBubbles(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
				h := httpguard.Middleware(side.Client, point, httpguard.WithRateLimitHeaders(), httpguard.WithParams(func(*http.Request) flowctl.Params {
					return flowctl.Params{Labels: map[string]string{"cost": "0.7"}}
				}))(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
					if flow, ok := flowctl.FromContext(r.Context()); ok {
						flow.Settle("cost", tt.settle)
					}
				}))
				rejected := 0
				for range 200 {
					w := httptest.NewRecorder()
					h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody))
					if w.Code == http.StatusTooManyRequests {
						rejected++
					}
					if got := w.Header().Get("RateLimit-Policy"); got != tt.policy {
						t.Errorf("%d: RateLimit-Policy: %s want %s", w.Code, got, tt.policy)
					}
					<-time.After(7*time.Minute + 331*time.Millisecond)
				}
				if rejected < 20 {
					t.Errorf("%d rejections want many", rejected)
				}
			})
		})
	}
}

// A policy change can leave more slots in use than there are now. Then the fields have the new number of slots, and none is free.
func TestRateLimitHeadersOfFewerSlots(t *testing.T) {
	at := policy.At(point)
	for name, limit := range map[string]func(most float64) policy.Component{
		"concurrency limiter": func(most float64) policy.Component {
			return policy.ConcurrencyLimiter{ID: "a", Selectors: at, Max: most, MaxInflight: time.Hour}
		},
		"concurrency scheduler": func(most float64) policy.Component {
			return policy.ConcurrencyScheduler{
				ID: "a", Selectors: at, Max: most, MaxInflight: time.Hour,
				Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}},
			}
		},
		"concurrency scheduler that lets flows in for nothing": func(most float64) policy.Component {
			c := policy.ConcurrencyScheduler{ID: "a", Selectors: at, Max: most, MaxInflight: time.Hour}
			if most < 5 {
				c.Scheduler.Default.Tokens = policy.NoTokens
			}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			overEngines(t, []policy.Component{limit(5)}, func(t *testing.T, e *engine.Engine, client *flowctl.Client) {
				for range 5 {
					flow := client.Start(t.Context(), point, flowctl.Params{})
					defer func() { _, _ = flow.End(t.Context()) }()
				}
				for _, most := range []float64{4, 2, 0} {
					if err := e.Apply(limits([]policy.Component{limit(most)})); err != nil {
						t.Fatal(err)
					}
					got := tell(t, client)
					want := told{got.Status, `"limits/a";r=0`, fmt.Sprintf(`"limits/a";q=%v;qu="concurrent-requests"`, most)}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("with %v slots (-want +got):\n%s", most, diff)
					}
				}
			})
		})
	}
}

// The fields do not have a limit that is not in force: neither that tokens are left, nor that there are none.
func TestRateLimitHeadersOfDryRuns(t *testing.T) {
	at := policy.At(point)
	for name, limit := range map[string]func(dry bool) policy.Component{
		"rate limiter": func(dry bool) policy.Component {
			return policy.RateLimiter{ID: "a", Selectors: at, Capacity: 1, Fill: 1, Interval: time.Minute, DryRun: dry}
		},
		"concurrency limiter": func(dry bool) policy.Component {
			return policy.ConcurrencyLimiter{ID: "a", Selectors: at, Max: 1, MaxInflight: time.Minute, DryRun: dry}
		},
		"quota scheduler": func(dry bool) policy.Component {
			return policy.QuotaScheduler{ID: "a", Selectors: at, Capacity: 1, Fill: 1, Interval: time.Minute, DryRun: dry}
		},
		"concurrency scheduler": func(dry bool) policy.Component {
			return policy.ConcurrencyScheduler{ID: "a", Selectors: at, Max: 1, MaxInflight: time.Minute, DryRun: dry}
		},
	} {
		t.Run(name, func(t *testing.T) {
			// A slot is held, so that of each kind there is one that is free, and then none.
			silent := func(t *testing.T, want told, client *flowctl.Client) {
				t.Helper()
				for i := range 3 {
					if diff := cmp.Diff(want, tell(t, client)); diff != "" {
						t.Errorf("request %d (-want +got):\n%s", i, diff)
					}
					flow := client.Start(t.Context(), point, flowctl.Params{})
					defer func() { _, _ = flow.End(t.Context()) }()
				}
			}
			t.Run("client's", func(t *testing.T) {
				overEngines(t, []policy.Component{limit(false)}, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
					silent(t, told{Status: 200}, client)
				}, flowctl.WithDryRun())
			})
			t.Run("component's", func(t *testing.T) {
				overEngines(t, []policy.Component{limit(true)}, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
					silent(t, told{Status: 200}, client)
				})
			})
			t.Run("component's, beside one in force", func(t *testing.T) {
				force := policy.RateLimiter{ID: "force", Selectors: at, Capacity: 1e9, Fill: 1e9, Interval: 1}
				overEngines(t, []policy.Component{limit(true), force}, func(t *testing.T, _ *engine.Engine, client *flowctl.Client) {
					for i := range 3 {
						if got := tell(t, client); got.Limit != fmt.Sprint(`"limits/force";r=`, 999999999-i) || got.Policy != `"limits/force";q=1000000000` {
							t.Errorf("got %+v", got)
						}
					}
				})
			})
		})
	}
}

// What has no quota, and what was not asked, is in no field, by every agent that decides.
func TestRateLimitHeadersOfWhatWasNotAsked(t *testing.T) {
	limiter := policy.RateLimiter{ID: "limit", Selectors: policy.At(point), Capacity: 9, Fill: 9, Interval: time.Hour}
	breaker := policy.CircuitBreaker{Selectors: policy.At(point), FailureCount: 1, Window: time.Minute, OpenDuration: time.Minute}
	long := policy.LabelMatcher{Expression: policy.LabelMatches{
		Label: "text", Regex: "(?i)bot|crawl|spider|slurp|" + strings.Repeat("a", 48) + "b",
	}}
	at := []policy.Selector{{ControlPoint: point, Labels: long}}
	text := map[string]string{"text": strings.Repeat("a", 4096)}
	most := flowctl.Params{Labels: text, CheckTimeout: time.Minute}
	hurried := flowctl.Params{CheckTimeout: 9 * time.Millisecond}
	for _, tt := range []struct {
		name       string
		on         []sides.Kind
		components []policy.Component
		params     flowctl.Params
		status     int // of the handler
		want       []string
	}{
		{"closed breaker", sides.EnginesAndStored, []policy.Component{limiter, breaker}, flowctl.Params{}, 200, []string{`"test/limit";r=8`, `"test/limit";r=7`}},
		// A breaker that is in memory rejects before limits of a store are asked, so these tell nothing.
		{"open breaker", sides.Engines, []policy.Component{limiter, breaker}, flowctl.Params{}, 500, []string{`"test/limit";r=8`, `"test/limit";r=8`}},
		{"open breaker alone", sides.EnginesAndStored, []policy.Component{breaker}, flowctl.Params{}, 500, []string{"", ""}},
		{"late", []sides.Kind{sides.Served}, []policy.Component{
			limiter,
			policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: 3, MaxInflight: time.Minute},
			policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: 3, MaxInflight: time.Minute},
			policy.QuotaScheduler{Selectors: policy.At(point), Capacity: 9, Fill: 9, Interval: time.Hour},
			policy.LoadScheduler{Selectors: policy.At(point), LoadMultiplier: policy.Constant(0.5)},
		}, hurried, 200, []string{"", ""}},
		{"long label", sides.EnginesAndStored, []policy.Component{
			policy.RateLimiter{Selectors: at, Capacity: 9, Fill: 9, Interval: time.Hour},
			policy.ConcurrencyLimiter{Selectors: at, Max: 3, MaxInflight: time.Minute},
			policy.ConcurrencyScheduler{Selectors: at, Max: 3, MaxInflight: time.Minute},
			policy.QuotaScheduler{Selectors: at, Capacity: 9, Fill: 9, Interval: time.Hour},
			limiter,
		}, most, 200, []string{`"test/limit";r=9`, `"test/limit";r=9`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			setup := sides.Setup{Policies: sides.Policies(tt.components...)}
			setup.InBubbles(t, tt.on, func(t *testing.T, side *sides.Side) {
				h := httpguard.Middleware(side.Client, point, httpguard.WithRateLimitHeaders(), httpguard.WithParams(func(*http.Request) flowctl.Params { return tt.params }))(
					http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(tt.status) }))
				for i, want := range tt.want {
					w := httptest.NewRecorder()
					h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
					if got := w.Header().Get("RateLimit"); got != want {
						t.Errorf("request %d, %d: RateLimit: %s want %s", i, w.Code, got, want)
					}
					if limits := w.Header().Get("RateLimit-Policy"); strings.Contains(limits, "breaker") || (limits == "") != (want == "") {
						t.Errorf("request %d: RateLimit-Policy: %s", i, limits)
					}
					<-time.After(3 * time.Second) // a served breaker learns of ends by telemetry
				}
			})
		})
	}
}
