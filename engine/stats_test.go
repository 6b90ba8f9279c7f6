package engine_test

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/policy"
)

// countedPolicies have a component of each kind, and a control point for each.
var countedPolicies = []policy.Policy{
	{Name: "limits", Components: []policy.Component{
		policy.RateLimiter{ID: "rate", Selectors: policy.At("rate"), Capacity: 2, Interval: time.Hour, LimitBy: "user"},
		policy.RateLimiter{ID: "dry", Selectors: policy.At("rate"), Capacity: 3, Interval: time.Hour, DryRun: true},
		policy.ConcurrencyLimiter{ID: "slots", Selectors: policy.At("slots"), Max: 1, MaxInflight: time.Hour},
		policy.RateLimiter{ID: "shut", Selectors: policy.At("slots"), Capacity: 1, Interval: time.Hour},
	}},
	{Name: "queues", Components: []policy.Component{
		policy.QuotaScheduler{
			ID: "quota", Selectors: policy.At("queue"), Capacity: 3, Fill: 1, Interval: time.Second,
			Scheduler: policy.Scheduler{
				TokensLabel: "cost",
				Workloads: []policy.Workload{{
					Name: "paid", Labels: policy.LabelMatcher{Equal: map[string]string{"plan": "paid"}},
				}},
			},
		},
		policy.LoadScheduler{ID: "load", Selectors: policy.At("load"), LoadMultiplier: policy.Constant(0.5)},
	}},
	{Name: "shares", Components: []policy.Component{
		policy.Sampler{ID: "half", Selectors: policy.At("share"), AcceptPercentage: 50, SessionLabel: "user"},
		policy.LoadRamp{ID: "ramp", Selectors: policy.At("ramp"), Steps: []policy.RampStep{{Target: 0, Duration: time.Hour}}},
	}},
}

// decideAll has flows at all of them, in a bubble. It takes two seconds.
func decideAll(t *testing.T, client *flowctl.Client) {
	start := func(ctx context.Context, at string, labels ...string) *flowctl.Flow {
		p := flowctl.Params{Labels: make(map[string]string), CheckTimeout: -1}
		for _, l := range labels {
			key, value, _ := strings.Cut(l, "=")
			p.Labels[key] = value
		}
		return client.Start(ctx, at, p)
	}
	end := func(f *flowctl.Flow) { _, _ = f.End(t.Context()) }

	for range 4 { // two pass, and two give back what they got of the one in dry run
		end(start(t.Context(), "rate", "user=a"))
	}
	for range 2 { // of which the dry one would drop one
		end(start(t.Context(), "rate"))
	}

	held := start(t.Context(), "slots")
	end(start(t.Context(), "slots")) // neither of the two limiters has anything left
	end(held)
	end(start(t.Context(), "slots")) // the other one has none

	end(start(t.Context(), "queue", "cost=3", "plan=paid"))
	end(start(t.Context(), "queue", "cost=4")) // never
	leaving, leave := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	waiting.Go(func() { end(start(t.Context(), "queue", "cost=2")) }) // two seconds
	waiting.Go(func() { end(start(leaving, "queue", "cost=3")) })
	synctest.Wait()
	<-time.After(time.Second)
	leave()
	waiting.Wait()
	end(start(t.Context(), "load"))

	for _, user := range []string{"ann", "bob", "cleo", "finn"} {
		end(start(t.Context(), "share", "user="+user))
	}
	end(client.Start(t.Context(), "ramp", flowctl.Params{RampMode: true}))
	end(client.Start(t.Context(), "elsewhere", flowctl.Params{RampMode: true}))

	f := client.Start(t.Context(), "elsewhere", flowctl.Params{ResultCacheKey: "key", GlobalCacheKeys: []string{"key", "other"}})
	for _, err := range []error{
		f.SetResultCache(t.Context(), []byte("value"), time.Hour),
		f.SetGlobalCache(t.Context(), "key", []byte("value"), time.Hour),
		f.DeleteGlobalCache(t.Context(), "other"),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if err := f.SetGlobalCache(t.Context(), "key", make([]byte, 2000), time.Hour); err == nil {
		t.Error("a value as large as the cache was stored")
	}
	end(f)
	end(client.Start(t.Context(), "rate", flowctl.Params{ResultCacheKey: "key"}))
	end(client.Start(t.Context(), "elsewhere", flowctl.Params{ResultCacheKey: "key", GlobalCacheKeys: []string{"key"}}))
}

func wantStats() engine.Stats {
	const second = time.Second
	return engine.Stats{
		ControlPoints: []engine.ControlPointStats{
			{Accepted: 2, Unpicked: 2, NoMatchingRamp: 1, CacheHits: 1, CacheMisses: 1},
			{ControlPoint: "load", Accepted: 1},
			{ControlPoint: "queue", Accepted: 2, NoTokens: 1, Canceled: 1},
			{ControlPoint: "ramp", NoMatchingRamp: 1},
			{ControlPoint: "rate", Accepted: 5, RateLimited: 2, CacheMisses: 1},
			{ControlPoint: "share", Accepted: 2, NotSampled: 2},
			{ControlPoint: "slots", Accepted: 1, RateLimited: 2},
		},
		Components: []engine.ComponentStats{
			{Policy: "limits", Kind: "rate_limiter", ID: "rate", LabelKey: "user", Accepted: 5, Dropped: 2, Unlimited: 3, Keys: 1, Usage: engine.Usage{Capacity: 2}},
			{
				Policy: "limits", Kind: "rate_limiter", ID: "dry", DryRun: true, Accepted: 7, DryRunDrops: 2, Refunded: 2,
				Usage: engine.Usage{Capacity: 3},
			},
			{
				Policy: "limits", Kind: "concurrency_limiter", ID: "slots", Accepted: 2, Dropped: 1, Refunded: 1,
				Usage: engine.Usage{Capacity: 1, Remaining: 1},
			},
			{Policy: "limits", Kind: "rate_limiter", ID: "shut", Accepted: 1, Dropped: 2, Usage: engine.Usage{Capacity: 1}},
			{
				Policy: "queues", Kind: "quota_scheduler", ID: "quota", Accepted: 2, Dropped: 1, Usage: engine.Usage{Capacity: 3},
				Workloads: []engine.WorkloadStats{
					{Name: "paid", Accepted: 1, AcceptedTokens: 3},
					{Name: "default", Accepted: 1, Dropped: 1, AcceptedTokens: 2, RejectedTokens: 4, Waits: 2, Waited: 3 * second},
				},
			},
			{
				Policy: "queues", Kind: "load_scheduler", ID: "load", Accepted: 1, LoadMultiplier: math.Inf(1),
				Usage:     engine.Usage{Capacity: math.Inf(1), Remaining: math.Inf(1)},
				Workloads: []engine.WorkloadStats{{Name: "default", Accepted: 1, AcceptedTokens: 1}},
			},
			{Policy: "shares", Kind: "sampler", ID: "half", LabelKey: "user", Accepted: 2, Dropped: 2, AcceptPercentage: 50},
			{Policy: "shares", Kind: "load_ramp", ID: "ramp", Dropped: 1},
		},
		ResultCache: engine.CacheStats{Hits: 1, Misses: 2, Stores: 1, Entries: 1},
		GlobalCache: engine.CacheStats{Hits: 1, Misses: 2, Stores: 1, Deletes: 1, Refused: 1, Entries: 1},
	}
}

// withoutHash leaves out the selectors too, which TestSelectorStats looks at.
var withoutHash = cmpopts.IgnoreFields(engine.ComponentStats{}, "PolicyHash", "Selectors")

func countedEngine(t *testing.T) *engine.Engine {
	e, err := engine.New(countedPolicies, engine.WithCacheBounds(10, 1000))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := countedEngine(t)
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		decideAll(t, client)
		if diff := cmp.Diff(wantStats(), e.Stats(), withoutHash); diff != "" {
			t.Errorf("Stats() (-want +got):\n%s", diff)
		}
	})
}

// What stays in the policies goes on counting, with other numbers too; what is new begins at nothing.
func TestStatsAcrossApply(t *testing.T) {
	limits := policy.Policy{Name: "p", Components: []policy.Component{
		policy.RateLimiter{ID: "stays", Selectors: policy.At("point"), Capacity: 10, Interval: time.Hour},
		policy.RateLimiter{ID: "changes", Selectors: policy.At("point"), Capacity: 10, Interval: time.Hour},
		policy.RateLimiter{ID: "goes", Selectors: policy.At("other"), Capacity: 10, Interval: time.Hour},
	}}
	e, err := engine.New([]policy.Policy{limits})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.Close() }()
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{"point", "other", "elsewhere"} {
		_, _ = client.Start(t.Context(), at, flowctl.Params{}).End(t.Context())
	}
	limits.Components = []policy.Component{
		limits.Components[0],
		policy.RateLimiter{ID: "changes", Selectors: policy.At("point"), Capacity: 11, Interval: time.Hour},
	}
	if err := e.Apply([]policy.Policy{limits}); err != nil {
		t.Fatal(err)
	}
	want := engine.Stats{
		ControlPoints: []engine.ControlPointStats{{Accepted: 1, Unpicked: 1}, {ControlPoint: "point", Accepted: 1}},
		Components: []engine.ComponentStats{
			{Policy: "p", Kind: "rate_limiter", ID: "stays", Accepted: 1, Usage: engine.Usage{Capacity: 10, Remaining: 9}},
			{Policy: "p", Kind: "rate_limiter", ID: "changes", Accepted: 1, Usage: engine.Usage{Capacity: 11, Remaining: 10}},
		},
	}
	if diff := cmp.Diff(want, e.Stats(), withoutHash); diff != "" {
		t.Errorf("Stats() (-want +got):\n%s", diff)
	}
}

// Many goroutines count at once, keys come and go, and nothing is counted twice, lost or counted down.
func TestStatsAreExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 5, Fill: 1000, Interval: time.Second, LimitBy: "user", MaxIdle: time.Second},
		}}}, engine.WithKeyCap(50))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = e.Close() }()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		var accepted, dropped uint64
		var last engine.ComponentStats
		for minute := range 5 {
			var mu sync.Mutex
			var flows sync.WaitGroup
			for worker := range 4 {
				flows.Go(func() {
					for i := range 200 {
						user := string(rune('a' + (i*worker+minute*7)%100))
						flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}})
						mu.Lock()
						if flow.ShouldRun() {
							accepted++
						} else {
							dropped++
						}
						mu.Unlock()
						_, _ = flow.End(t.Context())
						if now := e.Stats().Components[0]; i%50 == 0 && (now.Accepted < last.Accepted || now.Dropped < last.Dropped) {
							t.Errorf("counted back from %+v to %+v", last, now)
						}
					}
				})
			}
			flows.Wait()
			last = e.Stats().Components[0]
			<-time.After(61 * time.Second) // the sweeper comes by
		}
		got := e.Stats().Components[0]
		if got.Accepted != accepted || got.Dropped != dropped || accepted == 0 || dropped == 0 {
			t.Errorf("Accepted, Dropped = %d, %d want %d, %d", got.Accepted, got.Dropped, accepted, dropped)
		}
		if got.Keys != 0 || got.Overflows == 0 {
			t.Errorf("Keys, Overflows = %d, %d want none after the sweep, and some", got.Keys, got.Overflows)
		}
	})
}

// What a label says that a flow costs does not hide what the others do.
func TestStatsOfExtremeTokens(t *testing.T) {
	components := map[string]policy.Component{
		"quota": policy.QuotaScheduler{
			Selectors: policy.At("point"), Capacity: 100, Fill: 1, Interval: time.Second, Scheduler: policy.Scheduler{TokensLabel: "cost"},
		},
		"slots": policy.ConcurrencyScheduler{
			Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, Scheduler: policy.Scheduler{TokensLabel: "cost"},
		},
	}
	for name, component := range components {
		e, c := reloadable(t, []policy.Component{component})
		for range 3 {
			flow := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"cost": "1.7e308"}})
			end(flow)
		}
		end(c.Start(t.Context(), "point", flowctl.Params{}))
		got := e.Stats().Components[0].Workloads[0]
		if sum := got.AcceptedTokens + got.RejectedTokens; sum != 3e9+1 {
			t.Errorf("%s: %v tokens are counted want 3e9 and 1", name, sum)
		}
	}
}

// Stats show a queue while flows wait in it.
func TestStatsOfQueues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user"},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = e.Close() }()
		client, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		ctx, leave := context.WithCancel(t.Context())
		var flows sync.WaitGroup
		for _, user := range []string{"a", "a", "a", "b", "b"} {
			flows.Go(func() {
				flow := client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"user": user}, CheckTimeout: -1})
				<-ctx.Done()
				_, _ = flow.End(t.Context())
			})
		}
		synctest.Wait()
		if got := e.Stats().Components[0]; got.Usage.Waiting != 3 || got.Accepted != 2 || got.Keys != 2 {
			t.Errorf("Waiting, Accepted, Keys = %d, %d, %d want 3, 2, 2", got.Usage.Waiting, got.Accepted, got.Keys)
		}
		leave()
		flows.Wait()
		if got := e.Stats(); got.Components[0].Usage.Waiting != 0 || got.ControlPoints[1].Canceled != 3 {
			t.Errorf("Waiting, Canceled = %d, %d want 0, 3", got.Components[0].Usage.Waiting, got.ControlPoints[1].Canceled)
		}
	})
}

// Metrics show what there is only at times: queues, why flows did not wait or did in vain, keys beyond the cap, the
// share of a load. They never show the values of labels that name workloads, or that limiters keep apart.
func TestMetricsOfWhatComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "p", Components: []policy.Component{
			policy.ConcurrencyScheduler{
				ID: "queue", Selectors: policy.At("queue"), Max: 1, MaxInflight: time.Hour,
				Scheduler: policy.Scheduler{WorkloadLabel: "secret", FairnessLabel: "secret", MaxQueue: 1},
			},
			policy.RateLimiter{ID: "keys", Selectors: policy.At("keys"), Capacity: 1, Interval: time.Hour, LimitBy: "secret"},
			policy.LoadScheduler{ID: "load", Selectors: policy.At("load"), LoadMultiplier: policy.Constant(0.5), Scheduler: nowOrNever},
		}}}, engine.WithKeyCap(1))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		p := new(metertest.Provider)
		client, err := flowctl.New(e, flowctl.WithMeterProvider(p))
		if err != nil {
			t.Fatal(err)
		}
		start := func(at string, timeout time.Duration, i int) *flowctl.Flow {
			secret := map[string]string{"secret": fmt.Sprint("sesame", i)}
			return client.Start(t.Context(), at, flowctl.Params{Labels: secret, CheckTimeout: timeout})
		}
		end(start("queue", time.Second, 0)) // it takes no time, which is learnt
		held := start("queue", time.Second, 0)
		var waiting sync.WaitGroup
		waiting.Go(func() { end(start("queue", time.Second, 1)) }) // in vain
		synctest.Wait()
		end(start("queue", time.Second, 2)) // as many wait as may
		for i := range 3 {
			end(start("keys", 0, i))
		}
		queued := p.Read(t.Context())
		waiting.Wait()
		end(held)
		for range 400 { // ten each second
			end(start("load", 0, 0))
			<-time.After(100 * time.Millisecond)
		}
		read := p.Read(t.Context())
		read["requests_in_queue while one waits"] = 0
		for name, n := range queued {
			if strings.HasPrefix(name, "requests_in_queue component_id=queue ") {
				read["requests_in_queue while one waits"] = n
			}
		}
		got := make(map[string]float64)
		for name, n := range read {
			if strings.Contains(name, "sesame") {
				t.Errorf("%s has a label's value", name)
			}
			before, hash, found := strings.Cut(name, " policy_hash=")
			if _, after, ok := strings.Cut(hash, " "); found && ok {
				before += " " + after
			}
			for _, metric := range []string{
				"requests_in_queue", "workload_rejections_total", "limiter_overflows_total", "limiter_keys",
				"token_bucket_lm_ratio", "token_bucket_fill_rate", "flowcontrol_reject_reasons_total",
			} {
				if strings.HasPrefix(name, metric+" ") && n != 0 {
					got[strings.ReplaceAll(strings.ReplaceAll(before, "component_id=", ""), " policy_name=p", "")] = n
				}
			}
		}
		want := map[string]float64{
			"requests_in_queue while one waits":                                           1,
			"workload_rejections_total cause=queue full queue workload_index=default":     1,
			"workload_rejections_total cause=waited in vain queue workload_index=default": 1,
			"limiter_keys keys":            1,
			"limiter_overflows_total keys": 2,
			"token_bucket_lm_ratio load":   0.5,
			"token_bucket_fill_rate load":  5,
			"flowcontrol_reject_reasons_total control_point=queue reject_reason=no tokens":   2,
			"flowcontrol_reject_reasons_total control_point=keys reject_reason=rate limited": 1,
		}
		for name := range got { // which depends on where in a second the flows came
			if strings.HasPrefix(name, "flowcontrol_reject_reasons_total control_point=load ") {
				delete(got, name)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("metrics (-want +got):\n%s", diff)
		}
	})
}

// All that is counted is shown, by the names that Aperture's dashboards know, where there are any.
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, p := countedEngine(t), new(metertest.Provider)
		client, err := flowctl.New(e, flowctl.WithMeterProvider(p))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := flowctl.New(e, flowctl.WithMeterProvider(p)); err != nil { // which counts nothing twice
			t.Fatal(err)
		}
		decideAll(t, client)
		read := p.Read(t.Context())
		got := make(map[string]float64)
		for name, n := range read {
			before, hash, found := strings.Cut(name, " policy_hash=")
			if _, after, ok := strings.Cut(hash, " "); found && ok {
				before += " " + after
			}
			if n != 0 && !strings.HasPrefix(name, "flowcontrol_decisions_total") {
				got[strings.ReplaceAll(before, "component_id=", "")] = n
			}
			for _, value := range []string{"=a", "=ann", "=bob", "=cleo", "=finn"} {
				if strings.Contains(name+" ", value+" ") {
					t.Errorf("%s has a label's value", name)
				}
			}
		}
		want := map[string]float64{
			"accepted_tokens_total load policy_name=queues workload_index=default":  1,
			"accepted_tokens_total quota policy_name=queues workload_index=default": 2,
			"accepted_tokens_total quota policy_name=queues workload_index=paid":    3,
			"cache_entries type=global":                                                                                            1,
			"cache_entries type=result":                                                                                            1,
			"cache_lookup_hits_total control_point= type=result":                                                                   1,
			"cache_lookup_hits_total type=global":                                                                                  1,
			"cache_lookup_misses_total control_point= type=result":                                                                 1,
			"cache_lookup_misses_total control_point=rate type=result":                                                             1,
			"cache_lookup_misses_total type=global":                                                                                2,
			"cache_operation_results_total operation_type=delete status=success type=global":                                       1,
			"cache_operation_results_total operation_type=upsert status=error type=global":                                         1,
			"cache_operation_results_total operation_type=upsert status=success type=global":                                       1,
			"cache_operation_results_total operation_type=upsert status=success type=result":                                       1,
			"concurrency_limiter_counter_total slots decision_type=accepted limiter_dropped=false policy_name=limits":              2,
			"concurrency_limiter_counter_total slots decision_type=rejected limiter_dropped=true policy_name=limits":               1,
			"flowcontrol_dry_run_drops_total dry policy_name=limits":                                                               2,
			"flowcontrol_requests_total control_point= decision_type=accepted":                                                     2,
			"flowcontrol_requests_total control_point= decision_type=rejected reject_reason=no matching ramp":                      1,
			"flowcontrol_requests_total control_point=load decision_type=accepted":                                                 1,
			"flowcontrol_requests_total control_point=queue decision_type=accepted":                                                2,
			"flowcontrol_requests_total control_point=queue decision_type=canceled":                                                1,
			"flowcontrol_requests_total control_point=queue decision_type=rejected reject_reason=no tokens":                        1,
			"flowcontrol_requests_total control_point=ramp decision_type=rejected reject_reason=no matching ramp":                  1,
			"flowcontrol_requests_total control_point=rate decision_type=accepted":                                                 5,
			"flowcontrol_requests_total control_point=rate decision_type=rejected reject_reason=rate limited":                      2,
			"flowcontrol_requests_total control_point=share decision_type=accepted":                                                2,
			"flowcontrol_requests_total control_point=share decision_type=rejected reject_reason=not sampled":                      2,
			"flowcontrol_requests_total control_point=slots decision_type=accepted":                                                1,
			"flowcontrol_requests_total control_point=slots decision_type=rejected reject_reason=rate limited":                     2,
			"flowcontrol_unpicked_flows_total control_point=":                                                                      2,
			"flowcontrol_reject_reasons_total control_point= reject_reason=no matching ramp":                                       1,
			"flowcontrol_reject_reasons_total control_point=queue reject_reason=no tokens":                                         1,
			"flowcontrol_reject_reasons_total control_point=ramp reject_reason=no matching ramp":                                   1,
			"flowcontrol_reject_reasons_total control_point=rate reject_reason=rate limited":                                       2,
			"flowcontrol_reject_reasons_total control_point=share reject_reason=not sampled":                                       2,
			"flowcontrol_reject_reasons_total control_point=slots reject_reason=rate limited":                                      2,
			"incoming_tokens_total load policy_name=queues workload_index=default":                                                 1,
			"incoming_tokens_total quota policy_name=queues workload_index=default":                                                6,
			"incoming_tokens_total quota policy_name=queues workload_index=paid":                                                   3,
			"limiter_keys rate policy_name=limits":                                                                                 1,
			"limiter_refunds_total dry policy_name=limits":                                                                         2,
			"limiter_refunds_total slots policy_name=limits":                                                                       1,
			"limiter_unlimited_total rate policy_name=limits":                                                                      3,
			"rate_limiter_counter_total dry decision_type=accepted limiter_dropped=false policy_name=limits":                       7,
			"rate_limiter_counter_total rate decision_type=accepted limiter_dropped=false policy_name=limits":                      5,
			"rate_limiter_counter_total rate decision_type=rejected limiter_dropped=true policy_name=limits":                       2,
			"rate_limiter_counter_total shut decision_type=accepted limiter_dropped=false policy_name=limits":                      1,
			"rate_limiter_counter_total shut decision_type=rejected limiter_dropped=true policy_name=limits":                       2,
			"rejected_tokens_total quota policy_name=queues workload_index=default":                                                4,
			"request_in_queue_duration_ms quota policy_name=queues workload_index=default":                                         2,
			"sampler_accept_percentage half policy_name=shares":                                                                    50,
			"sampler_counter_total half decision_type=accepted limiter_dropped=false policy_name=shares":                           2,
			"sampler_counter_total half decision_type=rejected limiter_dropped=true policy_name=shares":                            2,
			"sampler_counter_total ramp decision_type=rejected limiter_dropped=true policy_name=shares":                            1,
			"token_bucket_available_tokens slots policy_name=limits":                                                               1,
			"token_bucket_capacity dry policy_name=limits":                                                                         3,
			"token_bucket_capacity quota policy_name=queues":                                                                       3,
			"token_bucket_capacity shut policy_name=limits":                                                                        1,
			"token_bucket_capacity slots policy_name=limits":                                                                       1,
			"workload_requests_total load decision_type=accepted limiter_dropped=false policy_name=queues workload_index=default":  1,
			"workload_requests_total quota decision_type=accepted limiter_dropped=false policy_name=queues workload_index=default": 1,
			"workload_requests_total quota decision_type=accepted limiter_dropped=false policy_name=queues workload_index=paid":    1,
			"workload_requests_total quota decision_type=rejected limiter_dropped=true policy_name=queues workload_index=default":  1,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("metrics (-want +got):\n%s", diff)
		}
		_ = e.Close()
		for name := range p.Read(t.Context()) {
			if strings.HasPrefix(name, "rate_limiter_counter_total") {
				t.Errorf("%s is shown after Close", name)
			}
		}
	})
}
