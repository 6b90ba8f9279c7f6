package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/allkinds"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// dryRunClients make a client of the engine that is in dry run, and one that is not.
func dryRunClients(t *testing.T, components ...policy.Component) (e *engine.Engine, dry, forReal *flowctl.Client) {
	t.Helper()
	e, forReal = reloadable(t, components)
	dry, err := flowctl.New(e, flowctl.WithDryRun())
	if err != nil {
		t.Fatal(err)
	}
	return e, dry, forReal
}

// A component takes, counts and gets back the same, whether it is in dry run or the client is.
func TestDryRunIsOneMechanism(t *testing.T) {
	var tested []policy.Component
	for _, tt := range []struct {
		name string
		of   func(dry bool) policy.Component
	}{
		{"rate limiter", func(dry bool) policy.Component {
			return policy.RateLimiter{
				Selectors: policy.At("point"), Capacity: 3, Fill: 1, Interval: time.Second, LimitBy: "user", TokensLabel: "tokens", DryRun: dry,
			}
		}},
		{"concurrency limiter", func(dry bool) policy.Component {
			return policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 2, MaxInflight: 4 * time.Second, TokensLabel: "tokens", DryRun: dry}
		}},
		{"quota scheduler", func(dry bool) policy.Component {
			return policy.QuotaScheduler{
				Selectors: policy.At("point"), Capacity: 3, Fill: 1, Interval: time.Second, LimitBy: "user",
				Scheduler: policy.Scheduler{TokensLabel: "tokens"}, DryRun: dry,
			}
		}},
		{"concurrency scheduler", func(dry bool) policy.Component {
			return policy.ConcurrencyScheduler{
				Selectors: policy.At("point"), Max: 2, MaxInflight: 4 * time.Second, Scheduler: policy.Scheduler{TokensLabel: "tokens"}, DryRun: dry,
			}
		}},
		{"load scheduler", func(dry bool) policy.Component {
			return policy.LoadScheduler{
				Selectors: policy.At("point"), LoadMultiplier: policy.Constant(0.5), Scheduler: policy.Scheduler{TokensLabel: "tokens"}, DryRun: dry,
			}
		}},
		{"AIMD load scheduler", func(dry bool) policy.Component {
			return policy.AIMDLoadScheduler{Selectors: policy.At("point"), Signal: policy.Constant(2), Setpoint: policy.Constant(1), DryRun: dry}
		}},
		{"calendar quota", func(dry bool) policy.Component {
			return policy.CalendarQuota{
				Selectors: policy.At("point"), Amount: 3, Period: policy.PeriodHour, LimitBy: "user", TokensLabel: "tokens", DryRun: dry,
			}
		}},
		{"circuit breaker", func(dry bool) policy.Component { // which slow flows open
			return policy.CircuitBreaker{
				Selectors: policy.At("point"), FailureCount: 2, SlowAfter: time.Second, Window: time.Minute, OpenDuration: 5 * time.Second,
				LimitBy: "user", DryRun: dry,
			}
		}},
		{"sampler", func(dry bool) policy.Component {
			return policy.Sampler{Selectors: policy.At("point"), AcceptPercentage: 50, SessionLabel: "user", DryRun: dry}
		}},
		{"ramp", func(dry bool) policy.Component {
			return policy.LoadRamp{
				Selectors: policy.At("point"), SessionLabel: "user", Start: true, DryRun: dry,
				Steps: []policy.RampStep{{Target: 0}, {Target: 100, Duration: time.Minute}},
			}
		}},
	} {
		tested = append(tested, tt.of(true))
		t.Run(tt.name, func(t *testing.T) {
			// Flows of two users, some of which overlap, and a minute's worth, for schedulers that learn.
			run := func(t *testing.T, component policy.Component, opts ...flowctl.Option) (stats []engine.ComponentStats, held int) {
				e, _ := reloadable(t, []policy.Component{component})
				c, err := flowctl.New(e, opts...)
				if err != nil {
					t.Fatal(err)
				}
				var flows []*flowctl.Flow
				for i := range 120 {
					labels := map[string]string{"user": string(rune('a' + i%7)), "tokens": []string{"1", "0", "2", "9"}[i%4]}
					begin := time.Now()
					flow := c.Start(t.Context(), "point", flowctl.Params{Labels: labels, CheckTimeout: time.Minute})
					if took := time.Since(begin); !flow.ShouldRun() || took != 0 {
						t.Fatalf("flow %d: %v after %v want it to run at once", i, flow, took)
					}
					if flows = append(flows, flow); len(flows) == 5 {
						for _, f := range flows {
							held += end(f).Held
						}
						flows = nil
					}
					<-time.After(500 * time.Millisecond)
				}
				return e.Stats().Components, held
			}
			synctest.Test(t, func(t *testing.T) {
				want, wantHeld := run(t, tt.of(true))
				if want[0].DryRunDrops == 0 || want[0].Dropped != 0 {
					t.Fatalf("DryRunDrops, Dropped = %d, %d want some, and none", want[0].DryRunDrops, want[0].Dropped)
				}
				got, held := run(t, tt.of(false), flowctl.WithDryRun())
				for i := range got {
					got[i].DryRun = true // which only says where the dry run comes from
				}
				if diff := cmp.Diff(want, got, withoutHash); diff != "" || held != wantHeld {
					t.Errorf("with %d slots want %d (-component's dry run +client's):\n%s", held, wantHeld, diff)
				}
			})
		})
	}
	allkinds.Covered(t, "TestDryRunIsOneMechanism", allkinds.Having("DryRun"), tested...)
}

// A flow in dry run does not wait behind flows that do, nor takes their turn. A slot that it takes is one.
func TestDryRunBesideFlowsThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, dry, forReal := dryRunClients(t, policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour})
		params := flowctl.Params{CheckTimeout: time.Minute}
		first := dry.Start(t.Context(), "point", params)
		if first.Decision() != flowctl.Accepted {
			t.Fatalf("the first is %v", first)
		}
		begin := time.Now()
		served := make(chan *flowctl.Flow)
		go func() { served <- forReal.Start(t.Context(), "point", params) }()
		synctest.Wait()
		for range 3 {
			flow := dry.Start(t.Context(), "point", params)
			if took := time.Since(begin); flow.Decision() != flowctl.Rejected || took != 0 {
				t.Errorf("a flow in dry run is %v after %v want rejected at once", flow, took)
			}
			if r := end(flow); r.Held != 0 {
				t.Errorf("it held %d slots", r.Held)
			}
		}
		<-time.After(time.Second)
		if r := end(first); r.Held != 1 || r.Returned != 1 {
			t.Errorf("the first gave back %+v", r)
		}
		flow := <-served
		if took := time.Since(begin); flow.Decision() != flowctl.Accepted || took != time.Second {
			t.Errorf("the flow that waits is %v after %v want accepted after a second", flow, took)
		}
		end(flow)
	})
}

// A flow that is rejected in a dry run runs: it keeps what other components gave it for as long.
func TestDryRunKeepsWhatOthersGave(t *testing.T) {
	_, dry, forReal := dryRunClients(
		t,
		policy.ConcurrencyLimiter{ID: "slots", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
		policy.RateLimiter{ID: "rate", Selectors: policy.At("point"), Interval: time.Hour, LimitBy: "user"},
	)
	flow := dry.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "a"}})
	if flow.Decision() != flowctl.Rejected || !flow.ShouldRun() {
		t.Fatalf("%v, runs: %v want rejected, and to run", flow, flow.ShouldRun())
	}
	if other := forReal.Start(t.Context(), "point", flowctl.Params{}); other.Decision() != flowctl.Rejected {
		t.Errorf("while it runs another is %v want rejected", other)
	}
	if r := end(flow); r.Held != 1 || r.Returned != 1 {
		t.Errorf("it gave back %+v want the slot", r)
	}
	if other := forReal.Start(t.Context(), "point", flowctl.Params{}); other.Decision() != flowctl.Accepted {
		t.Errorf("after it has run another is %v want accepted", other)
	}
}

// The rejection of a dry run is the one that the flow would have had: by the first stage that drops it, and not by a
// component that is in dry run itself.
func TestDryRunRejection(t *testing.T) {
	none := func(id string, limit policy.RateLimiter) policy.RateLimiter {
		limit.ID, limit.Selectors, limit.Interval = id, policy.At("point"), time.Minute
		return limit
	}
	sampler := policy.Sampler{ID: "sampler", Selectors: policy.At("point"), DeniedStatus: 418}
	drySampler := sampler
	drySampler.DryRun = true
	for _, tt := range []struct {
		name       string
		components []policy.Component
		params     flowctl.Params
		by         string
		want       flowctl.RejectedError
	}{
		{
			"stages",
			[]policy.Component{none("rate", policy.RateLimiter{}), sampler},
			flowctl.Params{},
			"sampler",
			flowctl.RejectedError{Reason: flowctl.ReasonNotSampled, HTTPStatus: 418},
		},
		{
			"beside a component in dry run",
			[]policy.Component{none("rate", policy.RateLimiter{DeniedStatus: 503}), drySampler},
			flowctl.Params{},
			"rate",
			flowctl.RejectedError{Reason: flowctl.ReasonRateLimited, HTTPStatus: 503},
		},
		{
			"in one stage",
			[]policy.Component{
				none("dry", policy.RateLimiter{DryRun: true}), none("first", policy.RateLimiter{}), none("second", policy.RateLimiter{}),
			},
			flowctl.Params{},
			"first",
			flowctl.RejectedError{Reason: flowctl.ReasonRateLimited, HTTPStatus: 429},
		},
		{
			"no ramp",
			[]policy.Component{none("rate", policy.RateLimiter{})},
			flowctl.Params{RampMode: true},
			"",
			flowctl.RejectedError{Reason: flowctl.ReasonNoMatchingRamp, HTTPStatus: 403},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, dry, forReal := dryRunClients(t, tt.components...)
			flow := dry.Start(t.Context(), "point", tt.params)
			defer end(flow)
			inForce := forReal.Start(t.Context(), "point", tt.params)
			defer end(inForce)
			for _, f := range []*flowctl.Flow{flow, inForce} {
				got, ok := errors.AsType[*flowctl.RejectedError](f.Err())
				if !ok || got.Component() != tt.by || got.Reason != tt.want.Reason || got.HTTPStatus != tt.want.HTTPStatus {
					t.Errorf("Err() = %v by %q want %v by %q", f.Err(), got.Component(), &tt.want, tt.by)
				}
			}
			if flow.RetryAfter() != inForce.RetryAfter() {
				t.Errorf("RetryAfter() = %v want %v, as in force", flow.RetryAfter(), inForce.RetryAfter())
			}
			for _, c := range e.Stats().Components {
				if c.DryRunDrops == 0 {
					t.Errorf("component %s has not counted the flow in dry run: %+v", c.ID, c)
				}
			}
		})
	}
	t.Run("a component in dry run alone", func(t *testing.T) {
		_, dry, _ := dryRunClients(t, drySampler)
		flow := dry.Start(t.Context(), "point", flowctl.Params{})
		defer end(flow)
		if flow.Decision() != flowctl.Accepted {
			t.Errorf("%v want accepted, as without the client's dry run", flow)
		}
	})
}

// An error of a client's dry run names the same component at every agent, whatever else would have rejected the flow.
func TestDryRunRejectionNamesOneComponent(t *testing.T) {
	at := policy.At("point")
	steps := []policy.RampStep{{Target: 0}}
	all := []policy.Component{
		policy.RateLimiter{ID: "rate", Selectors: at, Interval: time.Hour, LimitBy: "user", DeniedStatus: 403},
		policy.QuotaScheduler{ID: "queue", Selectors: at, Interval: time.Minute},
		policy.CalendarQuota{ID: "calendar", Selectors: at, Amount: 0.5, Period: policy.PeriodMonth, DeniedStatus: 403},
		policy.Sampler{ID: "sampler", Selectors: at},
		policy.ConcurrencyScheduler{ID: "slots", Selectors: at, MaxInflight: time.Minute},
		policy.LoadRamp{ID: "ramp", Selectors: at, Steps: steps, Start: true},
		policy.Sampler{ID: "sampler in ramp mode", Selectors: at, RampMode: true},
	}
	type named struct {
		policy, component, label string
		reason                   flowctl.RejectReason
		status                   int
	}
	for set := 1; set < 1<<len(all); set++ {
		var components []policy.Component
		for i, c := range all {
			if set&(1<<i) != 0 {
				components = append(components, c)
			}
		}
		for _, params := range []flowctl.Params{
			{}, {RampMode: true}, {HTTP: &flowctl.HTTPRequest{Method: "GET", Path: "/"}}, {HTTP: &flowctl.HTTPRequest{Method: "GET", Path: "/"}, RampMode: true},
		} {
			params.Labels = map[string]string{"user": "ann"}
			got := make(map[sides.Kind]named)
			for _, kind := range sides.Engines {
				synctest.Test(t, func(t *testing.T) {
					side := sides.Setup{Policies: sides.Policies(components...), Options: []flowctl.Option{flowctl.WithDryRun()}}.New(t, kind)
					flow := side.Client.Start(t.Context(), "point", params)
					defer end(flow)
					if r, ok := errors.AsType[*flowctl.RejectedError](flow.Err()); ok {
						got[kind] = named{r.Policy(), r.Component(), r.LabelKey(), r.Reason, r.HTTPStatus}
					}
				})
			}
			if got[sides.Served] != got[sides.Embedded] {
				t.Errorf("components %07b, %+v: rejected by %+v want %+v as in the process", set, params, got[sides.Served], got[sides.Embedded])
			}
		}
	}
}
