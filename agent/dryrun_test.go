package agent_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// overEnginesShown runs f in a bubble over engines, one of which is served. Their clients have the options, and show what
// they count.
func overEnginesShown(t *testing.T, opts []flowctl.Option, components []policy.Component,
	f func(t *testing.T, client *flowctl.Client, p *metertest.Provider),
) {
	t.Helper()
	for _, kind := range sides.EnginesAndStored {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(metertest.Provider)
				setup := sides.Setup{Policies: sides.Policies(components...), Options: append(slices.Clone(opts), flowctl.WithMeterProvider(p))}
				f(t, setup.New(t, kind).Client, p)
			})
		})
	}
}

// A check that says dry_run is answered at once, with what would have happened and with what the caches have. The same
// check without it is not.
func TestDryRunOverTheWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, []policy.Policy{{Name: "queue", Components: []policy.Component{
			policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Hour},
		}}})
		stub := s.stub(t)
		_, err := stub.CacheUpsert(t.Context(), &checkv1.CacheUpsertRequest{
			ControlPoint:       "point",
			GlobalCacheEntries: map[string]*checkv1.CacheEntry{"key": {Value: []byte("global")}},
		})
		if err != nil {
			t.Fatal(err)
		}
		ask := func(dry bool) (*checkv1.CheckResponse, time.Duration) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			begin := time.Now()
			m, err := stub.Check(ctx, &checkv1.CheckRequest{
				ControlPoint: "point", ExpectEnd: true, DryRun: dry,
				CacheLookupRequest: &checkv1.CacheLookupRequest{ResultCacheKey: "missing", GlobalCacheKeys: []string{"key"}},
			})
			if err != nil {
				t.Fatal(err)
			}
			return m, time.Since(begin)
		}
		ask(false) // takes what there is
		for _, dry := range []bool{false, true} {
			m, took := ask(dry)
			if m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED || m.GetRejectReason() != checkv1.CheckResponse_REJECT_REASON_NO_TOKENS {
				t.Errorf("dry run %v: %v want a rejection for want of tokens", dry, m)
			}
			if took != 0 { // it cannot be served in time
				t.Errorf("dry run %v: the answer took %v want no time", dry, took)
			}
			d := m.GetLimiterDecisions()[0]
			if !d.GetDropped() || d.GetDryRun() {
				t.Errorf("dry run %v: %v want a drop by a component in force", dry, d)
			}
			var want *checkv1.CacheLookupResponse
			if dry {
				want = &checkv1.CacheLookupResponse{
					ResultCacheResponse:  &checkv1.KeyLookupResponse{LookupStatus: checkv1.CacheLookupStatus_MISS},
					GlobalCacheResponses: map[string]*checkv1.KeyLookupResponse{"key": {Value: []byte("global")}},
				}
			}
			if diff := cmp.Diff(want, m.GetCacheLookupResponse(), protocmp.Transform()); diff != "" {
				t.Errorf("dry run %v: caches (-want +got):\n%s", dry, diff)
			}
		}
	})
}

// A check of either kind that could wait its turn waits, and in a dry run does not.
func TestDryRunDoesNotQueue(t *testing.T) {
	for _, dry := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := serve(t, scheduler())
			holder := s.client(t).Start(t.Context(), "point", flowctl.Params{})
			time.AfterFunc(time.Second, func() { _, _ = holder.End(context.Background()) })
			conn := s.conn(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			begin := time.Now()
			var m *checkv1.CheckResponse
			var err error
			accepted, want := checkv1.CheckResponse_DECISION_TYPE_ACCEPTED, time.Second
			if dry {
				accepted, want = checkv1.CheckResponse_DECISION_TYPE_REJECTED, 0
			}
			for _, ask := range []func(){
				func() {
					m, err = checkv1.NewFlowControlServiceClient(conn).Check(ctx, &checkv1.CheckRequest{ControlPoint: "point", DryRun: dry})
				},
				func() {
					var h *checkhttpv1.CheckHTTPResponse
					h, err = checkhttpv1.NewFlowControlServiceHTTPClient(conn).CheckHTTP(ctx,
						&checkhttpv1.CheckHTTPRequest{ControlPoint: "point", DryRun: dry})
					m = h.GetCheckResponse()
				},
			} {
				ask()
				if took := time.Since(begin); err != nil || m.GetDecisionType() != accepted || took != want {
					t.Errorf("dry run %v: %v, %v after %v want %v after %v", dry, m, err, took, accepted, want)
				}
				for _, d := range m.GetLimiterDecisions() {
					i := d.GetConcurrencySchedulerInfo()
					_, err := checkv1.NewFlowControlServiceClient(conn).FlowEnd(t.Context(), &checkv1.FlowEndRequest{
						ControlPoint: "point",
						InflightRequests: []*checkv1.InflightRequestRef{{
							PolicyName: d.GetPolicyName(), PolicyHash: d.GetPolicyHash(), ComponentId: d.GetComponentId(),
							Label: i.GetLabel(), RequestId: i.GetRequestId(),
						}},
					})
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}

// What a flow in dry run holds although it was rejected goes back when it ends.
func TestDryRunGivesBack(t *testing.T) {
	overEnginesShown(t, []flowctl.Option{flowctl.WithDryRun()}, []policy.Component{
		policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour},
		policy.Sampler{Selectors: policy.At("point")},
	}, func(t *testing.T, client *flowctl.Client, _ *metertest.Provider) {
		for range 3 {
			flow := client.Start(t.Context(), "point", flowctl.Params{})
			r, err := flow.End(t.Context())
			if flow.Decision() != flowctl.Rejected || flow.RejectReason() != flowctl.ReasonNotSampled || r.Held != 1 || r.Returned != 1 || err != nil {
				t.Errorf("%v, End() = %+v, %v want one that a sampler rejects, and its slot back", flow, r, err)
			}
		}
	})
}

// Clients see a component that is in dry run, and count what it would have dropped, as they do in a dry run of their own.
func TestDryRunIsCounted(t *testing.T) {
	users := func(id string, dry bool) policy.RateLimiter {
		return policy.RateLimiter{ID: id, Selectors: policy.At("point"), Capacity: 1, Fill: 1, Interval: time.Hour, DryRun: dry}
	}
	for _, tt := range []struct {
		name   string
		opts   []flowctl.Option
		inDry  bool
		counts map[string]float64
		last   flowctl.Decision
	}{
		{"component", nil, true, map[string]float64{"dry": 2}, flowctl.Accepted},
		{"client", []flowctl.Option{flowctl.WithDryRun()}, false, map[string]float64{"dry": 2, "force": 2}, flowctl.Rejected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			components := []policy.Component{users("dry", true)}
			if !tt.inDry {
				components = append(components, users("force", false))
			}
			overEnginesShown(t, tt.opts, components, func(t *testing.T, client *flowctl.Client, p *metertest.Provider) {
				var last *flowctl.Flow
				for range 3 {
					last = client.Start(t.Context(), "point", flowctl.Params{})
					_, _ = last.End(t.Context())
				}
				if last.Decision() != tt.last {
					t.Errorf("%v want %v", last, tt.last)
				}
				for _, d := range last.CheckResponse().GetLimiterDecisions() {
					inDry := d.GetComponentId() == "dry"
					if !d.GetDropped() || d.GetDryRun() != inDry || inDry == (d.GetWaitTime().AsDuration() > 0) {
						t.Errorf("decision of %s: %v want dropped, in dry run: %v, and a wait if not", d.GetComponentId(), d, inDry)
					}
				}
				got := make(map[string]float64)
				for name, n := range p.Read(t.Context()) {
					if rest, ok := strings.CutPrefix(name, "flowcontrol_dry_run_drops_total component_id="); ok {
						id, _, _ := strings.Cut(rest, " ")
						got[id] += n
					}
				}
				if diff := cmp.Diff(tt.counts, got); diff != "" {
					t.Errorf("drops (-want +got):\n%s", diff)
				}
			})
		})
	}
}
