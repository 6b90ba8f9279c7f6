package agent_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/replay"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// served is an engine that is served in memory.
type served struct {
	engine *engine.Engine
	server *agent.Service
	dialer grpc.DialOption
}

func serve(t testing.TB, policies []policy.Policy) *served {
	t.Helper()
	e, err := engine.New(policies)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	server := grpc.NewServer(agent.ServerOptions()...)
	service := agent.Register(server, e)
	return &served{engine: e, server: service, dialer: sides.Serve(t, server)}
}

// client is a client of the toolkit's.
func (s *served) client(t testing.TB, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	opts = append(opts, flowctl.WithInsecure(), flowctl.WithDialOptions(s.dialer))
	c, err := flowctl.Dial("passthrough:///localhost", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

// overEngines runs f in a bubble over engines with the policies, one of which is served.
func overEngines(t *testing.T, policies []policy.Policy, f func(t *testing.T, e *engine.Engine, client *flowctl.Client)) {
	t.Helper()
	sides.Setup{Policies: policies}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) { f(t, side.Engine, side.Client) })
}

// stub is a client of the bare protocol.
func (s *served) stub(t testing.TB) checkv1.FlowControlServiceClient {
	t.Helper()
	return checkv1.NewFlowControlServiceClient(s.conn(t))
}

func (s *served) conn(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///localhost", s.dialer, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// The recordings of a real agent, over the wire, as other SDKs see it and as the toolkit's client does.
func TestVectors(t *testing.T) {
	t.Run("stub", func(t *testing.T) {
		replay.Run(t, func(t *testing.T, policies []policy.Policy) checkv1.FlowControlServiceClient {
			return serve(t, policies).stub(t)
		})
	})
	t.Run("stub with baggage", func(t *testing.T) {
		replay.Run(t, func(t *testing.T, policies []policy.Policy) checkv1.FlowControlServiceClient {
			return carrying{serve(t, policies).stub(t)}
		})
	})
	t.Run("client", func(t *testing.T) {
		replay.Run(t, func(t *testing.T, policies []policy.Policy) checkv1.FlowControlServiceClient {
			return replay.Stub(serve(t, policies).client(t))
		})
	})
}

// A carrying client merges 200 labels into each check, as SDKs do with baggage, and removes them from the answer.
type carrying struct {
	checkv1.FlowControlServiceClient
}

func (c carrying) Check(ctx context.Context, in *checkv1.CheckRequest, opts ...grpc.CallOption) (*checkv1.CheckResponse, error) {
	in = proto.CloneOf(in)
	if in.Labels == nil {
		in.Labels = make(map[string]string)
	}
	long := race.Pick(8, 1) // each such label is longer than an answer reports
	for i := range 200 {
		size := 1
		if i%long == 0 {
			size = 5000
		}
		in.Labels[fmt.Sprintf("~%03d", i)] = strings.Repeat("v", size)
	}
	m, err := c.FlowControlServiceClient.Check(ctx, in, opts...)
	if err != nil {
		return nil, err
	}
	carried := func(key string) bool { return strings.HasPrefix(key, "~") }
	m.FlowLabelKeys = slices.DeleteFunc(m.GetFlowLabelKeys(), carried)
	maps.DeleteFunc(m.GetTelemetryFlowLabels(), func(key, _ string) bool { return carried(key) })
	return m, nil
}

func slots(limit float64) []policy.Policy {
	return []policy.Policy{{Name: "slots", Components: []policy.Component{
		policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: limit, MaxInflight: time.Hour, LimitBy: "user_id"},
	}}}
}

// Two clients share one limit, and a flow of one frees a slot for the other.
func TestClientsShareLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, slots(1))
		a, b := s.client(t), s.client(t)
		params := flowctl.Params{Labels: map[string]string{"user_id": "u:1"}} // a colon, as in the wire's own notation
		flow := a.Start(t.Context(), "point", params)
		if !flow.ShouldRun() || b.Start(t.Context(), "point", params).ShouldRun() {
			t.Fatal("want one flow of one slot")
		}
		if got, err := flow.End(t.Context()); got != (flowctl.EndResponse{Held: 1, Returned: 1}) || err != nil {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if !b.Start(t.Context(), "point", params).ShouldRun() {
			t.Error("the slot was not freed")
		}
		_ = a.Close(t.Context())
		if got := s.server.Spans(); got != 1 {
			t.Errorf("%d records of flows want 1", got)
		}
	})
}

// A check without a control point is none.
func TestInvalidArgument(t *testing.T) {
	if m, err := serve(t, nil).stub(t).Check(t.Context(), &checkv1.CheckRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("Check() = %v, %v want InvalidArgument", m, err)
	}
}

func TestFlowEnd(t *testing.T) {
	stub := serve(t, slots(1)).stub(t)
	check := func() *checkv1.CheckResponse {
		t.Helper()
		m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}, ExpectEnd: true})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	d := check().GetLimiterDecisions()[0]
	ref := func(change func(*checkv1.InflightRequestRef)) *checkv1.InflightRequestRef {
		r := &checkv1.InflightRequestRef{
			PolicyName: d.GetPolicyName(), PolicyHash: d.GetPolicyHash(), ComponentId: d.GetComponentId(),
			Label: d.GetConcurrencyLimiterInfo().GetLabel(), RequestId: d.GetConcurrencyLimiterInfo().GetRequestId(), Tokens: 1,
		}
		change(r)
		return r
	}
	m, err := stub.FlowEnd(t.Context(), &checkv1.FlowEndRequest{ControlPoint: "point", InflightRequests: []*checkv1.InflightRequestRef{
		nil,
		ref(func(r *checkv1.InflightRequestRef) { r.PolicyHash = "other" }),
		ref(func(r *checkv1.InflightRequestRef) { r.Label = "default" }),
		ref(func(r *checkv1.InflightRequestRef) { r.Label = "user_id:other" }),
		ref(func(r *checkv1.InflightRequestRef) { r.RequestId = "not an id" }),
		ref(func(r *checkv1.InflightRequestRef) { r.RequestId = "100000001" }),
		ref(func(*checkv1.InflightRequestRef) {}),
		ref(func(*checkv1.InflightRequestRef) {}),
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"false flow ender not found for limiter id", "false flow ender not found for limiter id", "false ", "false ", "false ", "false ", "true ", "false "}
	for i, s := range m.GetTokenReturnStatuses() {
		if got := fmt.Sprint(s.GetReturned(), " ", s.GetError()); got != want[i] {
			t.Errorf("reference %d: %q want %q", i, got, want[i])
		}
	}
	if len(m.GetTokenReturnStatuses()) != len(want) {
		t.Errorf("%d statuses want %d", len(m.GetTokenReturnStatuses()), len(want))
	}
	if check().GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		t.Error("the slot was not freed")
	}
}

// A client's flow gives its slot back though the limiter has changed meanwhile.
func TestFlowEndAfterApply(t *testing.T) {
	s := serve(t, slots(1))
	c := s.client(t)
	params := flowctl.Params{Labels: map[string]string{"user_id": "u"}, CheckTimeout: -1}
	before := c.Start(t.Context(), "point", params)
	if err := s.engine.Apply(slots(2)); err != nil {
		t.Fatal(err)
	}
	after := c.Start(t.Context(), "point", params)
	for name, flow := range map[string]*flowctl.Flow{"before": before, "after": after} {
		if got, err := flow.End(t.Context()); err != nil || got != (flowctl.EndResponse{Held: 1, Returned: 1}) {
			t.Errorf("%s: End = %+v, %v want the slot given back", name, got, err)
		}
	}
}

func TestCacheCalls(t *testing.T) {
	stub := serve(t, nil).stub(t)
	if _, err := stub.CacheUpsert(t.Context(), &checkv1.CacheUpsertRequest{
		ControlPoint:       "point",
		ResultCacheEntry:   &checkv1.CacheEntry{Key: "r", Value: []byte("one")},
		GlobalCacheEntries: map[string]*checkv1.CacheEntry{"g": {Value: []byte("two")}, "nothing": nil},
	}); err != nil {
		t.Fatal(err)
	}
	look := func(point string) *checkv1.CacheLookupResponse {
		t.Helper()
		m, err := stub.CacheLookup(t.Context(), &checkv1.CacheLookupRequest{ControlPoint: point, ResultCacheKey: "r", GlobalCacheKeys: []string{"g", "none", ""}})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := look("point")
	if string(m.GetResultCacheResponse().GetValue()) != "one" || string(m.GetGlobalCacheResponses()["g"].GetValue()) != "two" {
		t.Errorf("lookup = %v", m)
	}
	if got := m.GetGlobalCacheResponses()["none"].GetLookupStatus(); got != checkv1.CacheLookupStatus_MISS {
		t.Errorf("lookup of nothing = %v want a miss", got)
	}
	if got := m.GetGlobalCacheResponses()[""]; got.GetOperationStatus() != checkv1.CacheOperationStatus_ERROR || got.GetError() == "" {
		t.Errorf("lookup of no key = %v want an error", got)
	}
	if got := look("other").GetResultCacheResponse().GetLookupStatus(); got != checkv1.CacheLookupStatus_MISS {
		t.Errorf("another control point's result = %v want a miss", got)
	}
	if _, err := stub.CacheDelete(t.Context(), &checkv1.CacheDeleteRequest{ControlPoint: "point", ResultCacheKey: "r", GlobalCacheKeys: []string{"g", "none"}}); err != nil {
		t.Fatal(err)
	}
	m = look("point")
	if m.GetResultCacheResponse().GetLookupStatus() != checkv1.CacheLookupStatus_MISS || m.GetGlobalCacheResponses()["g"].GetLookupStatus() != checkv1.CacheLookupStatus_MISS {
		t.Errorf("lookup after delete = %v want misses", m)
	}
}

// A client that has gone holds nothing, and has taken nothing.
func TestCheckOfACallerWhoHasGone(t *testing.T) {
	e, err := engine.New([]policy.Policy{{Name: "p", Components: append(slots(1)[0].Components, policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour,
	})}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var service checkv1.FlowControlServiceServer
	agent.Register(registrar(func(impl any) {
		if s, ok := impl.(checkv1.FlowControlServiceServer); ok {
			service = s
		}
	}), e)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	req := &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}}
	if _, err := service.Check(ctx, req); status.Code(err) != codes.Canceled {
		t.Errorf("Check() = %v want Canceled", err)
	}
	if m, err := service.Check(t.Context(), req); err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
		t.Errorf("Check() = %v, %v want the slot and the token free", m, err)
	}
	if _, err := service.Check(ctx, req); status.Code(err) != codes.Canceled { // now it is rejected
		t.Errorf("Check() = %v want Canceled", err)
	}
	if m, err := service.Check(t.Context(), req); err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED {
		t.Errorf("Check() = %v, %v want nothing given back that the rejected check had not taken", m, err)
	}
}

// An answer says when it was there.
func TestAnswerHasAnEnd(t *testing.T) {
	stub := serve(t, slots(1)).stub(t)
	for range 1000 { // the clock may be coarse
		m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point"})
		if err != nil {
			t.Fatal(err)
		}
		start, end := m.GetStart().AsTime(), m.GetEnd().AsTime()
		if end.Before(start) || start.Before(time.Now().Add(-time.Hour)) {
			t.Fatalf("the answer is from %v to %v", start, end)
		}
		if end.After(start) {
			return
		}
	}
	t.Error("no answer has ended after it began")
}

// Clients may compress all that they send.
func TestCompression(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, slots(1))
		client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(),
			flowctl.WithDialOptions(s.dialer, grpc.WithDefaultCallOptions(grpc.UseCompressor("gzip"))))
		if err != nil {
			t.Fatal(err)
		}
		flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": "u"}})
		if flow.Decision() != flowctl.Accepted {
			t.Errorf("%v: %v", flow, flow.Err())
		}
		if got, err := flow.End(t.Context()); err != nil || got.Returned != 1 {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if err := client.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if got := s.server.Spans(); got != 1 {
			t.Errorf("%d records of flows want 1", got)
		}
	})
}

// Flows from the network have no service. A limit for a service would have no effect, so there is a warning.
func TestWarnings(t *testing.T) {
	limiter := func(services ...string) policy.Component {
		l := policy.RateLimiter{Interval: time.Second}
		for _, service := range services {
			l.Selectors = append(l.Selectors, policy.Selector{ControlPoint: "point", Service: service})
		}
		return l
	}
	s := serve(t, []policy.Policy{
		{Name: "fine", Components: []policy.Component{limiter("", "any")}},
		{Name: "p", Components: []policy.Component{limiter("any"), limiter("any", "shop"), limiter("bar")}},
	})
	got := s.server.Warnings()
	if len(got) != 2 || !strings.HasPrefix(got[1], `policy "p": component "rate_limiter.1": control point "point": `) || !strings.Contains(got[1], `"shop"`) ||
		!strings.HasPrefix(got[0], `policy "p": component "rate_limiter.2": control point "point": `) || !strings.Contains(got[0], `"bar"`) {
		t.Errorf("Warnings() = %q want those of the bar's, which never acts, and of the shop's", got)
	}
}

// What comes too late to be answered in time takes nothing.
func TestLateCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			name       string
			components []policy.Component
			rejected   bool
		}{
			{"rate limiter", []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour}}, true},
			{"slots of a user", slots(1)[0].Components, true},
			{"scheduler of slots", scheduler()[0].Components, true},
			{"scheduler of tokens", []policy.Component{policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour}}, true},
			{"dry run of a scheduler", []policy.Component{policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, DryRun: true}}, false},
			{"no limiter", nil, false},
			{"slots of others", []policy.Component{policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "other"}}, false},
			{"dry run", []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, DryRun: true}}, false},
			{"pass through", []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, PassThrough: true}}, false},
		} {
			stub := serve(t, []policy.Policy{{Name: "p", Components: append(tt.components, policy.RateLimiter{
				Selectors: policy.At("elsewhere"), Interval: time.Second,
			})}}).stub(t)
			req := &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user_id": "u"}}
			late, cancel := context.WithTimeout(t.Context(), 9*time.Millisecond)
			defer cancel()
			m, err := stub.Check(late, req)
			if err != nil || (m.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_REJECTED) != tt.rejected || m.GetWaitTime() != nil {
				t.Errorf("%s: %v, %v want rejected: %v", tt.name, m, err, tt.rejected)
			}
			if m, err := stub.Check(t.Context(), req); err != nil || m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
				t.Errorf("%s: the late check took what the next one needs: %v, %v", tt.name, m, err)
			}
		}
	})
}

// What the engine counts is the same for clients near and far, dry runs too.
func TestStats(t *testing.T) {
	overEngines(t, []policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{ID: "users", Selectors: policy.At("point"), Capacity: 2, Interval: time.Hour, LimitBy: "user_id"},
		policy.RateLimiter{ID: "dry", Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, DryRun: true},
	}}}, func(t *testing.T, e *engine.Engine, client *flowctl.Client) {
		for _, user := range []string{"a", "a", "a", "b"} {
			_, _ = client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user_id": user}}).End(t.Context())
		}
		got := e.Stats()
		want := engine.ControlPointStats{ControlPoint: "point", Accepted: 3, RateLimited: 1}
		if diff := cmp.Diff([]engine.ControlPointStats{{}, want}, got.ControlPoints); diff != "" {
			t.Errorf("control points (-want +got):\n%s", diff)
		}
		for i, want := range []engine.ComponentStats{{ID: "users", Accepted: 3, Dropped: 1}, {ID: "dry", Accepted: 4, DryRunDrops: 3}} {
			c := got.Components[i]
			if c := (engine.ComponentStats{ID: c.ID, Accepted: c.Accepted, Dropped: c.Dropped, DryRunDrops: c.DryRunDrops}); !cmp.Equal(c, want) {
				t.Errorf("component %d = %+v want %+v", i, c, want)
			}
		}
	})
}

// scheduler has one slot.
func scheduler() []policy.Policy {
	return []policy.Policy{{Name: "queue", Components: []policy.Component{
		policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, Scheduler: policy.Scheduler{PriorityLabel: "priority"}},
	}}}
}

// Flows of all clients wait in one queue, and are answered before their clients give up.
func TestWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, scheduler())
		a, b := s.client(t), s.client(t)
		begin := time.Now()
		var wg sync.WaitGroup
		visit := func(c *flowctl.Client, priority string, timeout, answered time.Duration, want flowctl.Decision) {
			wg.Go(func() {
				flow := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"priority": priority}, CheckTimeout: timeout})
				if at := time.Since(begin); flow.Decision() != want || at != answered {
					t.Errorf("priority %s: %v at %v want %v at %v", priority, flow, at, want, answered)
				}
				if flow.ShouldRun() {
					<-time.After(time.Second)
				}
				held := 0
				if want == flowctl.Accepted {
					held = 1
				}
				if got, err := flow.End(t.Context()); got != (flowctl.EndResponse{Held: held, Returned: held}) || err != nil {
					t.Errorf("priority %s: End() = %+v, %v", priority, got, err)
				}
			})
			synctest.Wait()
		}
		visit(a, "1", 500*time.Millisecond, 0, flowctl.Accepted)
		visit(a, "2", 5*time.Second, 2*time.Second, flowctl.Accepted)
		visit(b, "3", 5*time.Second, time.Second, flowctl.Accepted)
		visit(b, "4", 500*time.Millisecond, 490*time.Millisecond, flowctl.Rejected)
		wg.Wait()
	})
}

// A client that goes while it waits leaves the queue.
func TestWaitOfACallerWhoGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, scheduler())
		c, stub := s.client(t), s.stub(t)
		first := c.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if flow := c.Start(ctx, "point", flowctl.Params{CheckTimeout: time.Minute}); flow.Decision() != flowctl.Canceled {
				t.Errorf("%v, %v want it canceled", flow, flow.Err())
			}
		})
		wg.Go(func() {
			if _, err := stub.Check(ctx, &checkv1.CheckRequest{ControlPoint: "point"}); status.Code(err) != codes.Canceled {
				t.Errorf("Check() = %v want Canceled", err)
			}
		})
		synctest.Wait()
		cancel()
		wg.Wait()
		synctest.Wait() // for the server to hear of it
		if got, err := first.End(t.Context()); got.Returned != 1 || err != nil {
			t.Errorf("End() = %+v, %v", got, err)
		}
		if next := c.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Minute}); !next.ShouldRun() {
			t.Errorf("%v: the slot went to somebody who had gone", next.Err())
		}
	})
}

// registrar takes the services that are registered.
type registrar func(impl any)

func (r registrar) RegisterService(_ *grpc.ServiceDesc, impl any) { r(impl) }
