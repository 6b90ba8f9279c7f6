package engine_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// dearRegex has a program of about 1,000 instructions: values of up to 262 bytes are matched.
const dearRegex = "(?:x?){490}y"

// A flow is rejected where a condition by which it would be limited takes too long to match, and only there.
func TestLongValuesOfSelectors(t *testing.T) {
	matches, absent := policy.LabelMatches{Label: "l", Regex: dearRegex}, policy.LabelExists("absent")
	exists := policy.LabelExists("l")
	for _, tt := range []struct {
		name      string
		condition policy.Expression
		rejected  bool
	}{
		{"matches", matches, true},
		{"does not match", policy.Not{Of: matches}, true},
		{"all, and others hold", policy.All{exists, matches, exists}, true},
		{"all, and one before does not hold", policy.All{absent, matches}, false},
		{"all, and one after does not hold", policy.All{matches, absent}, false},
		{"any, and no other holds", policy.Any{absent, matches, absent}, true},
		{"any, and the flow is picked anyway", policy.Any{matches, exists}, false},
		{"not any, and another holds", policy.Not{Of: policy.Any{matches, exists}}, false},
		{"not all, and another does not hold", policy.Not{Of: policy.All{matches, absent}}, false},
	} {
		for _, c := range allkinds.Components(policy.Selector{ControlPoint: "point", Labels: policy.LabelMatcher{Expression: tt.condition}}) {
			for _, dry := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/dry=%v", tt.name, allkinds.Name(c), dry), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						e, client := opened(t, allkinds.With(t, c, "DryRun", dry))
						flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"l": strings.Repeat("x", 300)}})
						end(flow)
						want := flowctl.CauseNone
						if tt.rejected && !dry {
							want = flowctl.CauseLabelTooLong
						}
						if got := causeOf(flow); got != want || flow.ShouldRun() != (want == flowctl.CauseNone) {
							t.Errorf("Start() = %v, cause %v want %v", flow.Decision(), got, want)
						}
						s := e.Stats().Components[0]
						if s.LabelTooLong != b2u(tt.rejected) || s.Dropped != b2u(tt.rejected && !dry) || s.DryRunDrops != b2u(tt.rejected && dry) {
							t.Errorf("%d dropped, %d in a dry run, %d for a long label", s.Dropped, s.DryRunDrops, s.LabelTooLong)
						}
					})
				})
			}
		}
	}
}

// A flow whose value is too long cannot be limited less than others: it passes a component only where all flows like it do.
func TestLongValuesOfWhatPassesAnyway(t *testing.T) {
	long := flowctl.Params{Labels: map[string]string{"l": strings.Repeat("x", 300)}}
	selectors := []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Expression: policy.LabelMatches{Label: "l", Regex: dearRegex}}}}
	for _, tt := range []struct {
		name string
		c    policy.Component
	}{
		{"without the label", policy.RateLimiter{Selectors: selectors, Interval: 1, LimitBy: "user"}},
		{"pass through", policy.RateLimiter{Selectors: selectors, Interval: 1, PassThrough: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, client := opened(t, tt.c)
			flow := client.Start(t.Context(), "point", long)
			end(flow)
			if !flow.ShouldRun() {
				t.Errorf("Start() = %v want the flow to run", flow.Err())
			}
		})
	}
}

// A caller cannot choose its workload by how long a value is.
func TestLongValuesOfWorkloads(t *testing.T) {
	slow := policy.LabelMatcher{Expression: policy.LabelMatches{Label: "l", Regex: dearRegex}}
	first := policy.LabelMatcher{Equal: map[string]string{"first": "yes"}}
	for _, c := range allkinds.Components(policy.At("point")...) {
		if !allkinds.Has(c, "Scheduler") {
			continue
		}
		t.Run(allkinds.Name(c), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, client := opened(t, allkinds.With(t, c, "Scheduler", policy.Scheduler{Workloads: []policy.Workload{
					{Name: "first", Labels: first}, {Name: "slow", Labels: slow}, {Name: "all", Labels: policy.LabelMatcher{Expression: policy.LabelExists("l")}},
				}}))
				long := strings.Repeat("x", 300)
				for _, tt := range []struct {
					name   string
					labels map[string]string
					want   flowctl.RejectCause
				}{
					{"too long", map[string]string{"l": long}, flowctl.CauseLabelTooLong},
					{"too long, in a workload before", map[string]string{"l": long, "first": "yes"}, flowctl.CauseNone},
					{"short", map[string]string{"l": "x"}, flowctl.CauseNone},
				} {
					flow := client.Start(t.Context(), "point", flowctl.Params{Labels: tt.labels})
					end(flow)
					if got := causeOf(flow); got != tt.want || flow.ShouldRun() != (tt.want == flowctl.CauseNone) {
						t.Errorf("%s: cause %v want %v", tt.name, got, tt.want)
					}
				}
				s := e.Stats().Components[0]
				for i, want := range []uint64{1, 0, 1, 0} {
					if s.Workloads[i].Accepted != want {
						t.Errorf("workload %s let %d flows pass want %d", s.Workloads[i].Name, s.Workloads[i].Accepted, want)
					}
				}
				if s.LabelTooLong != 1 {
					t.Errorf("%d flows dropped for a long label want 1", s.LabelTooLong)
				}
			})
		})
	}
}

// A value that a component has a bucket for, or samples by, is bounded too: to hash it takes time.
func TestLongValuesThatAreHashed(t *testing.T) {
	at := policy.At("point")
	var tested []policy.Component
	for _, tt := range []struct {
		name string
		c    policy.Component
	}{
		{"rate limiter", policy.RateLimiter{Selectors: at, Capacity: 9, Interval: 1, LimitBy: "l"}},
		{"by credentials", policy.RateLimiter{Selectors: at, Capacity: 9, Interval: 1, LimitBy: "http.request.header.authorization"}},
		{"concurrency limiter", policy.ConcurrencyLimiter{Selectors: at, Max: 9, MaxInflight: 1, LimitBy: "l"}},
		{"quota scheduler", policy.QuotaScheduler{Selectors: at, Capacity: 9, Interval: 1, LimitBy: "l"}},
		{"concurrency scheduler", policy.ConcurrencyScheduler{Selectors: at, Max: 9, MaxInflight: 1, LimitBy: "l"}},
		{"sampler", policy.Sampler{Selectors: at, AcceptPercentage: 100, SessionLabel: "l"}},
		{"load ramp", policy.LoadRamp{Selectors: at, Steps: []policy.RampStep{{Target: 100}}, Start: true, SessionLabel: "l"}},
		{"calendar quota", policy.CalendarQuota{Selectors: at, Amount: 9, Period: policy.PeriodDay, LimitBy: "l"}},
		{"circuit breaker", policy.CircuitBreaker{Selectors: at, FailureCount: 9, Window: time.Minute, OpenDuration: time.Minute, LimitBy: "l"}},
	} {
		tested = append(tested, tt.c)
		for size, want := range map[int]flowctl.RejectCause{64 << 10: flowctl.CauseNone, 64<<10 + 1: flowctl.CauseLabelTooLong} {
			t.Run(fmt.Sprintf("%s/%d bytes", tt.name, size), func(t *testing.T) {
				e, _ := opened(t, tt.c)
				key := e.Stats().Components[0].LabelKey
				got, accepted := checked(t, e, map[string]string{key: strings.Repeat("x", size)})
				if got != want || accepted != (want == flowctl.CauseNone) {
					t.Errorf("cause %v want %v", got, want)
				}
				if n := e.Stats().Components[0].LabelTooLong; n != b2u(want != flowctl.CauseNone) {
					t.Errorf("%d flows dropped for a long label", n)
				}
			})
		}
	}
	allkinds.Covered(t, "TestLongValuesThatAreHashed", func(c policy.Component) bool {
		return allkinds.Has(c, "LimitBy") || allkinds.Has(c, "SessionLabel")
	}, tested...)
}

// What a check costs does not grow with the length of values without bound, whatever a policy reads them for.
func TestLongValuesAreCheap(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector makes it slow")
	}
	at := policy.At("point")
	all := policy.Scheduler{TokensLabel: "l", PriorityLabel: "l", WorkloadLabel: "l", FairnessLabel: "l"}
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	in := []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Require: []policy.Requirement{
		{Key: "l", Operator: policy.NotIn, Values: many},
	}}}}
	e, _ := opened(t,
		policy.RateLimiter{Selectors: at, Capacity: 1e9, Interval: 1, TokensLabel: "l"},
		policy.RateLimiter{Selectors: in, Capacity: 1e9, Interval: 1},
		policy.QuotaScheduler{Selectors: at, Capacity: 1e9, Interval: 1, Scheduler: all},
		policy.ConcurrencyScheduler{Selectors: at, Max: 1e9, MaxInflight: time.Hour, Scheduler: all},
	)
	least := func(size int) time.Duration { // of several runs, because others use the machine too
		value, least := strings.Repeat("1", size), time.Hour
		for range 20 {
			start := time.Now()
			if cause, accepted := checked(t, e, map[string]string{"l": value}); !accepted {
				t.Fatal("rejected: ", cause)
			}
			least = min(least, time.Since(start))
		}
		return least
	}
	short, long := least(4<<10), least(4<<20)
	t.Logf("a check with a value of 4 KiB takes %v, and of 4 MiB %v", short, long)
	if long > 100*short {
		t.Errorf("a check with a value of 4 MiB takes %v, and with one of 4 KiB %v want less than a tenth of 1024 times that", long, short)
	}
}

// Flows whose long values begin alike have one share of a queue, and the queue keeps no more than 256 bytes of a value.
func TestLongValuesOfFairness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := opened(t, policy.ConcurrencyScheduler{
			Selectors: policy.At("point"), Max: 1, MaxInflight: time.Second,
			Scheduler: policy.Scheduler{FairnessLabel: "l", WorkloadLabel: "l"},
		})
		for range 2 {
			if cause, accepted := checked(t, e, map[string]string{"l": strings.Repeat("é", 1<<20)}); !accepted {
				t.Errorf("rejected: %v", cause)
			}
		}
	})
}
