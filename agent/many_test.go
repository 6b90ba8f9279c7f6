package agent_test

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
)

// plans are n policies with a component each, as a file with the limits of many plans has them.
func plans(n int, c policy.Component) []policy.Policy {
	all := make([]policy.Policy, n)
	for i := range all {
		all[i] = policy.Policy{Name: fmt.Sprintf("limit-of-plan-%d", i), Components: []policy.Component{c}}
	}
	return all
}

func refuses() policy.Component {
	return policy.RateLimiter{Selectors: policy.At("point"), Interval: time.Hour, LimitBy: "user"}
}

func passes() policy.Component {
	return policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1e9, Interval: time.Hour, LimitBy: "user"}
}

func holds() policy.ConcurrencyLimiter {
	return policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user"}
}

// steps are policies with a limiter each, by which a control point has as many limiters as there are in counts: stepOf names
// it. One engine of them takes the place of one for each count, which costs most of a test.
func steps(c policy.ConcurrencyLimiter, counts ...int) []policy.Policy {
	all := plans(slices.Max(counts), nil)
	for i := range all {
		limiter := c
		limiter.Selectors = nil
		for _, n := range counts {
			if i < n {
				limiter.Selectors = append(limiter.Selectors, policy.Selector{ControlPoint: stepOf(n)})
			}
		}
		all[i].Components = []policy.Component{limiter}
	}
	return all
}

func stepOf(n int) string { return fmt.Sprintf("point of %d", n) }

// inFlight is how many flows of the user hold slots of a plan's limiter.
func inFlight(t *testing.T, e *engine.Engine, plan int, user string) int {
	t.Helper()
	c, err := e.Component(fmt.Sprintf("limit-of-plan-%d", plan), "concurrency_limiter.0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := c.Peek(t.Context(), user)
	if err != nil {
		t.Fatal(err)
	}
	return u.InFlight
}

// forms are the two ways to ask about a user.
func forms(user string) map[string]flowctl.Params {
	of := map[string]string{"user": user}
	return map[string]flowctl.Params{
		"Check":     {Labels: of},
		"CheckHTTP": {Labels: of, HTTP: &flowctl.HTTPRequest{Method: "GET", Path: "/", Host: "h", Scheme: "http", Protocol: "HTTP/1.1"}},
	}
}

// Any number of limiters rejects. An answer that is too large would be an error, and let the flow run. That of 1400 would
// be too large for stubs and for our client.
func TestManyLimitersReject(t *testing.T) {
	for _, n := range race.Pick([]int{1, 1400}, []int{1, 300, 900, 1400, 5000}) {
		for _, user := range []string{"ann", strings.Repeat("a", 256)} {
			t.Run(fmt.Sprintf("%d limiters, %d bytes", n, len(user)), func(t *testing.T) {
				limits := plans(n, refuses())
				sides.Setup{Policies: limits}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
					for form, params := range forms(user) {
						flow := side.Client.Start(t.Context(), "point", params)
						if flow.Decision() != flowctl.Rejected || flow.RejectReason() != flowctl.ReasonRateLimited || flow.ShouldRun() {
							t.Errorf("%s: %v, %v, runs: %v want rejected", form, flow.Decision(), flow.Err(), flow.ShouldRun())
						}
						if _, err := flow.End(t.Context()); err != nil {
							t.Error(err)
						}
					}
				})
				t.Run("stub", func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { rejectsStubs(t, limits, user) })
				})
			})
		}
	}
}

// rejectsStubs checks what clients get that have gRPC's own bounds.
func rejectsStubs(t *testing.T, limits []policy.Policy, user string) {
	t.Helper()
	s := serve(t, limits)
	m, err := s.stub(t).Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"user": user}})
	if err != nil {
		t.Fatal(err)
	}
	h, err := s.stubHTTP(t).CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{
		ControlPoint: "point", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: map[string]string{"baggage": "user=" + user}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for form, answer := range map[string]struct {
		check *checkv1.CheckResponse
		size  int
	}{"Check": {m, proto.Size(m)}, "CheckHTTP": {h.GetCheckResponse(), proto.Size(h)}} {
		got := answer.check.GetLimiterDecisions()
		if answer.check.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED || len(got) == 0 || answer.size > 200<<10 {
			t.Errorf("%s: %v by %d limiters in %d bytes want rejected, in at most 200 KiB", form, answer.check.GetDecisionType(), len(got), answer.size)
			continue
		}
		if got[0].GetPolicyName() != "limit-of-plan-0" || !got[0].GetDropped() {
			t.Errorf("%s: the first decision is %v want the one that decides", form, got[0])
		}
	}
}

// Slots come back, however many there are. A flow whose slots do not fit into an answer is rejected, and holds none.
func TestManySlotsComeBack(t *testing.T) {
	limits := steps(holds(), 1, 300, 500, 800, 1200)
	sides.Setup{Policies: limits}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		for _, tt := range []struct {
			slots, user     int
			check, overHTTP bool // accepted over the wire
		}{
			{1, 3, true, true},
			{300, 3, true, true},
			{800, 3, true, false},
			{1200, 3, false, false},
			{300, 256, true, false},
			{500, 256, true, false},
			{800, 256, false, false},
		} {
			user := strings.Repeat("a", tt.user)
			for form, params := range forms(user) {
				name := fmt.Sprintf("%s: %d slots, %d bytes", form, tt.slots, tt.user)
				accepted := side.Kind == sides.Embedded || form == "Check" && tt.check || form == "CheckHTTP" && tt.overHTTP
				for range 2 { // the second takes what the first gave back
					flow := side.Client.Start(t.Context(), stepOf(tt.slots), params)
					want, slots := flowctl.Accepted, tt.slots
					if !accepted {
						want, slots = flowctl.Rejected, 0
					}
					if flow.Decision() != want || flow.ShouldRun() != accepted {
						t.Errorf("%s: %v, %v want %v", name, flow.Decision(), flow.Err(), want)
					}
					if !accepted && (flow.RejectReason() != flowctl.ReasonNoTokens || flow.HTTPStatus() != 503) {
						t.Errorf("%s: rejected: %v, %d want no tokens, 503", name, flow.RejectReason(), flow.HTTPStatus())
					}
					if got, err := flow.End(t.Context()); err != nil || got.Held != slots || got.Returned != slots {
						t.Errorf("%s: End() = %+v, %v want %d slots", name, got, err, slots)
					}
					for _, i := range []int{0, tt.slots / 2, tt.slots - 1} {
						if n := inFlight(t, side.Engine, i, user); n != 0 {
							t.Errorf("%s: limiter %d has %d in flight want none", name, i, n)
						}
					}
				}
			}
		}
	})
}

// Decisions that hold slots go before those that only let the flow pass.
func TestSlotsAreToldFirst(t *testing.T) {
	const many = wire.MostDecisions + 100 // which do not fit, and would leave no room
	limits := append(plans(many, passes()), policy.Policy{Name: "z", Components: []policy.Component{holds(), holds()}})
	for i := range limits[many].Components {
		limiter := holds()
		limiter.ID = fmt.Sprint("slot-", i)
		limits[many].Components[i] = limiter
	}
	sides.Setup{Policies: limits}.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
		for form, params := range forms(strings.Repeat("a", 256)) {
			flow := side.Client.Start(t.Context(), "point", params)
			if flow.Decision() != flowctl.Accepted {
				t.Errorf("%s: %v want accepted", form, flow.Err())
			}
			if got, err := flow.End(t.Context()); err != nil || got.Held != 2 || got.Returned != 2 {
				t.Errorf("%s: End() = %+v, %v want 2 slots", form, got, err)
			}
		}
	})
}

// A flow in dry run runs whatever does not fit, and holds what the answer tells of.
func TestManySlotsInADryRun(t *testing.T) {
	limits := steps(holds(), 300, 1200)
	for name, more := range map[string][]policy.Policy{
		"accepted": nil,
		"rejected": {{Name: "z", Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At(stepOf(300), stepOf(1200)), Interval: time.Hour,
		}}}},
	} {
		t.Run(name, func(t *testing.T) {
			setup := sides.Setup{Policies: slices.Concat(limits, more), Options: []flowctl.Option{flowctl.WithDryRun()}}
			setup.InBubbles(t, sides.Engines, func(t *testing.T, side *sides.Side) {
				for _, n := range []int{300, 300, 1200, 1200} { // the second takes what the first gave back
					flow := side.Client.Start(t.Context(), stepOf(n), flowctl.Params{Labels: map[string]string{"user": "ann"}})
					want, slots := flowctl.Accepted, n
					if side.Kind == sides.Served && n > 1000 {
						want, slots = flowctl.Rejected, 0
					}
					if more != nil {
						want = flowctl.Rejected
						if flow.RejectReason() != flowctl.ReasonRateLimited {
							t.Errorf("%d slots: rejected: %v want by the limiter", n, flow.RejectReason())
						}
					}
					if flow.Decision() != want || !flow.ShouldRun() {
						t.Errorf("%d slots: %v, runs: %v want %v, runs", n, flow.Decision(), flow.ShouldRun(), want)
					}
					if got, err := flow.End(t.Context()); err != nil || got.Held != slots || got.Returned != slots {
						t.Errorf("%d slots: End() = %+v, %v want %d slots", n, got, err, slots)
					}
					if left := inFlight(t, side.Engine, 0, "ann"); left != 0 {
						t.Errorf("%d slots: %d in flight want none", n, left)
					}
				}
			})
		})
	}
}

// SDKs end a flow by one call, which names all slots of the answer.
func TestOneFlowEndIsEnough(t *testing.T) {
	const least, step = 400, 16
	var counts []int
	for n := least; n <= wire.MostDecisions; n += step {
		counts = append(counts, n)
	}
	limiter := holds()
	limiter.Max = 1000
	stub := serve(t, steps(limiter, counts...)).stub(t)
	for _, user := range []string{"ann", strings.Repeat("a", 256)} {
		// start starts a flow that asks for n slots. It gives a reference to each, or none if they do not fit.
		start := func(n int) []*checkv1.InflightRequestRef {
			m, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: stepOf(n), Labels: map[string]string{"user": user}})
			if err != nil {
				t.Fatal(err)
			}
			refs := wire.Held(m)
			if len(refs) == 0 && m.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED {
				t.Fatalf("%d slots: %v", n, m.GetDecisionType())
			}
			return refs
		}
		tooMany := sort.Search(len(counts), func(i int) bool { return len(start(counts[i])) == 0 })
		if tooMany == 0 {
			t.Fatalf("%d slots do not fit", least)
		}
		n := counts[tooMany-1] // the most that fit are wanted
		end := &checkv1.FlowEndRequest{ControlPoint: stepOf(n), InflightRequests: start(n)}
		ended, err := stub.FlowEnd(t.Context(), end)
		if err != nil {
			t.Fatal(err)
		}
		returned := 0
		for _, one := range ended.GetTokenReturnStatuses() {
			if one.GetReturned() {
				returned++
			}
		}
		if returned != n {
			t.Errorf("%d of %d slots are back, by a call of %d bytes", returned, n, proto.Size(end))
		}
	}
}

// A server warns of control points whose answers may leave out decisions. Those where flows are rejected for it come
// first.
func TestWarningsOfManyComponents(t *testing.T) {
	const (
		slots     = "control point %q: a flow that takes slots of all %d components is rejected if its slots do not fit into %s"
		decisions = "control point %q: the decisions of all %d components may not fit into %s: it leaves out those that hold no slot"
		check     = "an answer"
		http      = "an answer to CheckHTTP"
	)
	for _, tt := range []struct {
		name      string
		n         int
		component policy.Component
		want      []string
	}{
		{"few limiters", 100, passes(), nil},
		{"few slots", 100, holds(), nil},
		{"for CheckHTTP", 400, passes(), []string{fmt.Sprintf(decisions, "point", 400, http)}},
		{"for both", 900, passes(), []string{fmt.Sprintf(decisions, "point", 900, check)}},
		{"slots", 900, holds(), []string{fmt.Sprintf(slots, "point", 900, check), fmt.Sprintf(decisions, "point", 900, check)}},
		{"for a service", 900, policy.RateLimiter{Selectors: []policy.Selector{{ControlPoint: "point", Service: "shop"}}, Interval: time.Hour}, make([]string, 900)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, plans(tt.n, tt.component))
			got := s.server.Warnings()
			if len(got) != len(tt.want) {
				t.Fatalf("Warnings() = %d, %.200q want %d", len(got), got, len(tt.want))
			}
			for i, want := range tt.want {
				if want != "" && got[i] != want {
					t.Errorf("warning %q want %q", got[i], want)
				}
			}
		})
	}
}

// An answer to our client is within its bounds wherever a warning does not say otherwise.
func TestAnswersFitWithoutAWarning(t *testing.T) {
	user := strings.Repeat("a", 300) // whose bucket has a name of 256 bytes
	for n := 100; n <= 1000; n += 25 {
		s := serve(t, plans(n, holds()))
		m, err := s.stubHTTP(t).CheckHTTP(context.WithoutCancel(t.Context()), &checkhttpv1.CheckHTTPRequest{
			ControlPoint: "point", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: map[string]string{"baggage": "user=" + user}},
		})
		if err != nil {
			t.Fatal(err)
		}
		accepted := m.GetCheckResponse().GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED
		if warned := len(s.server.Warnings()) > 0; warned {
			if n < 150 || accepted && n > 250 {
				t.Errorf("a warning of %d components, of which the flow is accepted: %v", n, accepted)
			}
			return
		}
		if !accepted || len(m.GetCheckResponse().GetLimiterDecisions()) != n {
			t.Fatalf("%d components: accepted: %v, %d decisions want all", n, accepted, len(m.GetCheckResponse().GetLimiterDecisions()))
		}
	}
	t.Error("no warning")
}

// Slots of components in dry run reject no flow, however many there are. Those without room in the answer come back at once,
// and the others at the flow's end.
func TestSlotsInDryRunRejectNoFlow(t *testing.T) {
	const many = wire.MostDecisions + 100
	components := make([]policy.Component, 0, many+2)
	for range many {
		components = append(components,
			policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 100, MaxInflight: time.Minute, LimitBy: "user", DryRun: true})
	}
	components = append(components, policy.ConcurrencyLimiter{ID: "in force", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Minute},
		policy.ConcurrencyScheduler{ID: "dry", Selectors: policy.At("point"), Max: 1, MaxInflight: time.Minute, DryRun: true})
	s := serve(t, []policy.Policy{{Name: "p", Components: components}})
	for _, warning := range agent.Register(grpc.NewServer(), s.engine).Warnings() {
		if strings.Contains(warning, "is rejected") {
			t.Errorf("Warnings() = %q", warning)
		}
	}
	client := s.client(t, flowctl.WithEndTimeout(time.Minute))
	for _, user := range []string{"a", strings.Repeat("u", 256)} {
		flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": user}, CheckTimeout: time.Minute})
		if flow.Decision() != flowctl.Accepted {
			t.Errorf("a user of %d bytes: %v, %v", len(user), flow, flow.Err())
		}
		if got, err := flow.End(t.Context()); err != nil || got.Held != got.Returned || got.Held == 0 || got.Held >= many {
			t.Errorf("End() = %+v, %v", got, err)
		}
		for _, c := range s.engine.Stats().Components {
			k, err := s.engine.Component("p", c.ID)
			if err != nil {
				t.Fatal(err)
			}
			value := user
			if c.LabelKey == "" {
				value = ""
			}
			if u, err := k.Peek(t.Context(), value); err != nil || u.InFlight != 0 {
				t.Errorf("%s: %+v, %v", c.ID, u, err)
			}
		}
	}
}
