package engine_test

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// share is a sampler at a percentage, by user.
func share(percentage float64, f func(*policy.Sampler)) policy.Sampler {
	s := policy.Sampler{Selectors: policy.At("point"), AcceptPercentage: percentage, SessionLabel: "user_id"}
	if f != nil {
		f(&s)
	}
	return s
}

// inRampMode is a sampler that flows in ramp mode need.
func inRampMode(percentage float64, f func(*policy.Sampler)) policy.Sampler {
	s := share(percentage, f)
	s.RampMode = true
	return s
}

func TestRampMode(t *testing.T) {
	ramp := func(target float64) policy.LoadRamp {
		return policy.LoadRamp{Selectors: policy.At("point"), Steps: []policy.RampStep{{Target: target}}}
	}
	others := func(s *policy.Sampler) {
		s.Selectors = []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{"user_id": "other"}}}}
	}
	dry := func(s *policy.Sampler) { s.DryRun = true }
	notFound := func(s *policy.Sampler) { s.DeniedStatus = http.StatusNotFound }
	limiter := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour}
	const none = flowctl.ReasonNone
	for _, tt := range []struct {
		name       string
		components []policy.Component
		reason     flowctl.RejectReason // of a flow in ramp mode
		status     int
		decisions  int
		ordinary   flowctl.RejectReason // of one that is not
	}{
		{"no ramp", []policy.Component{limiter, share(100, nil)}, flowctl.ReasonNoMatchingRamp, 0, 0, none},
		{"a ramp for others", []policy.Component{inRampMode(100, others)}, flowctl.ReasonNoMatchingRamp, 0, 0, none},
		{"a sampler in ramp mode", []policy.Component{limiter, inRampMode(100, nil)}, none, 0, 2, none},
		{"a load ramp", []policy.Component{ramp(100)}, none, 0, 1, none},
		{"a sampler in ramp mode drops", []policy.Component{limiter, inRampMode(0, nil)}, flowctl.ReasonNoMatchingRamp, 403, 1, flowctl.ReasonNotSampled},
		{"a load ramp drops", []policy.Component{ramp(0), limiter}, flowctl.ReasonNoMatchingRamp, 403, 1, flowctl.ReasonNotSampled},
		{"with a status of its own", []policy.Component{inRampMode(0, notFound)}, flowctl.ReasonNoMatchingRamp, 404, 1, flowctl.ReasonNotSampled},
		{"one of two drops", []policy.Component{inRampMode(100, nil), ramp(0)}, flowctl.ReasonNoMatchingRamp, 403, 2, flowctl.ReasonNotSampled},
		{"one of two is for others", []policy.Component{inRampMode(0, others), ramp(100)}, none, 0, 1, none},
		{"a sampler after the ramp drops", []policy.Component{share(0, nil), ramp(100)}, flowctl.ReasonNotSampled, 403, 2, flowctl.ReasonNotSampled},
		{"dry run", []policy.Component{inRampMode(0, dry)}, none, 0, 1, none},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, c := range []struct {
				ramp      bool
				reason    flowctl.RejectReason
				decisions int
			}{{true, tt.reason, tt.decisions}, {false, tt.ordinary, -1}} {
				params := user("u")
				params.RampMode = c.ramp
				flow := start(t, open(t, tt.components), params)
				if flow.RejectReason() != c.reason || flow.ShouldRun() != (c.reason == none) {
					t.Errorf("ramp mode %v: %v, %v want %v", c.ramp, flow, flow.Err(), c.reason)
				}
				m := flow.CheckResponse()
				if n := len(m.GetLimiterDecisions()); n != c.decisions && c.ramp {
					t.Errorf("%d decisions want %d", n, c.decisions)
				}
				if got := m.GetDeniedResponseStatusCode(); c.ramp && got != checkv1.StatusCode(tt.status) {
					t.Errorf("status = %v want %d", got, tt.status)
				}
				if c.reason != none && flow.HTTPStatus() != max(tt.status, 403) {
					t.Errorf("HTTPStatus() = %d", flow.HTTPStatus())
				}
			}
		})
	}
}

func TestSampler(t *testing.T) {
	const flows = 2000
	unlabelled := func(s *policy.Sampler) { s.SessionLabel = "" }
	passing := func(values ...string) func(*policy.Sampler) {
		return func(s *policy.Sampler) { s.PassThroughValues = values }
	}
	everybody := func(i int) flowctl.Params { return user(fmt.Sprintf("user-%d", i)) }
	nobody := func(int) flowctl.Params { return flowctl.Params{} }
	one := func(name string) func(int) flowctl.Params {
		return func(int) flowctl.Params { return user(name) }
	}
	for _, tt := range []struct {
		name    string
		sampler policy.Sampler
		params  func(int) flowctl.Params
		share   float64 // that is in, within 4 %
	}{
		{"nobody", share(0, nil), everybody, 0},
		{"a third of the users", share(33, nil), everybody, 0.33},
		{"everybody", share(100, nil), everybody, 1},
		{"a user who is out", share(50, nil), one("user-1"), 0},
		{"a user who is in", share(50, nil), one("user-10"), 1},
		{"flows without a user", share(33, nil), nobody, 0.33},
		{"flows with an empty user", share(33, nil), one(""), 0.33},
		{"no label to go by", share(33, unlabelled), one("user-1"), 0.33},
		{"a user who passes", share(0, passing("x", "vip")), one("vip"), 1},
		{"users beside one who passes", share(0, passing("vip")), everybody, 0},
		{"flows without a user pass", share(0, passing("")), nobody, 1},
		{"users beside flows that pass", share(0, passing("")), everybody, 0},
		{"dry run", share(0, func(s *policy.Sampler) { s.DryRun = true }), everybody, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t, []policy.Component{tt.sampler})
			in := 0
			for i := range flows {
				flow := start(t, c, tt.params(i))
				if flow.ShouldRun() {
					in++
				}
				end(flow)
			}
			got := float64(in) / flows
			if math.Abs(got-tt.share) > 0.04 || (tt.share == 0 || tt.share == 1) && got != tt.share {
				t.Errorf("%v of the flows are in want %v", got, tt.share)
			}
		})
	}
}

func TestSamplerRejection(t *testing.T) {
	c := open(t, []policy.Component{share(0, func(s *policy.Sampler) { s.ID, s.DeniedStatus = "half", http.StatusGone }), limiter(nil)[0]})
	flow := start(t, c, user("sesame"))
	var rejected *flowctl.RejectedError
	if !errors.As(flow.Err(), &rejected) {
		t.Fatalf("Err() = %v want a rejection", flow.Err())
	}
	want := rejection{flowctl.ReasonNotSampled, flowctl.CauseNone, "test", "half", "user_id", http.StatusGone, 0}
	if got := rejectionOf(rejected); got != want {
		t.Errorf("rejection = %+v want %+v", got, want)
	}
}

// A ramp accepts more and more users, and loses none that it has accepted, until it moves back.
func TestLoadRamp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, err := engine.New([]policy.Policy{{Name: "new-ui", Components: []policy.Component{
			share(100, nil),
			policy.LoadRamp{Selectors: policy.At("point"), SessionLabel: "user_id", PassThroughValues: []string{"tester"}, Steps: []policy.RampStep{
				{Target: 10}, {Target: 90, Duration: 80 * time.Second},
			}},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		c, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		ramp, ok := rampOf(e, "new-ui", "load_ramp.0")
		if !ok {
			t.Fatal("no ramp")
		}
		for _, name := range [][2]string{{"new-ui", "sampler.0"}, {"new-ui", "load_ramp.1"}, {"new-ui", ""}, {"other", "load_ramp.0"}} {
			if _, ok := rampOf(e, name[0], name[1]); ok {
				t.Errorf("Ramp(%q, %q) found one", name[0], name[1])
			}
		}
		const users = 5000
		before := make([]bool, users)
		check := func(when string, percentage float64, growing bool) {
			t.Helper()
			if got := ramp.Percentage(); math.Abs(got-percentage) > 1e-6 {
				t.Errorf("%s: %v %% want %v", when, got, percentage)
			}
			in := 0
			for i := range users {
				params := user(fmt.Sprintf("user-%d", i))
				params.RampMode = true
				now := start(t, c, params).ShouldRun()
				if now != before[i] && now != growing {
					t.Fatalf("%s: user-%d: in = %v, before that %v", when, i, now, before[i])
				}
				if before[i] = now; now {
					in++
				}
			}
			if share := 100 * float64(in) / users; math.Abs(share-percentage) > 5 {
				t.Errorf("%s: %v %% of the users are in want %v", when, share, percentage)
			}
			if params := user("tester"); !start(t, c, params).ShouldRun() {
				t.Errorf("%s: the tester is out", when)
			}
		}
		wait := func(d time.Duration) { <-time.After(d) }
		wait(time.Minute)
		check("not started", 10, true)
		_ = ramp.Forward(t.Context())
		wait(40 * time.Second)
		check("half way", 50, true)
		_ = ramp.Hold(t.Context())
		wait(time.Hour)
		check("holding", 50, true)
		_ = ramp.Forward(t.Context())
		wait(time.Hour)
		check("at the end", 90, true)
		_ = ramp.Backward(t.Context())
		wait(20 * time.Second)
		check("going back", 70, false)
		_ = ramp.Reset(t.Context())
		wait(time.Hour)
		check("reset", 10, false)
	})
}

// A load ramp in dry run lets every flow in, and counts those that it would have dropped.
func TestLoadRampDryRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, c := reloadable(t, []policy.Component{policy.LoadRamp{
			Selectors: policy.At("point"), DryRun: true, Steps: []policy.RampStep{{Target: 0, Duration: time.Hour}},
		}})
		for _, mode := range []bool{true, false} {
			flow := c.Start(t.Context(), "point", flowctl.Params{RampMode: mode})
			if !flow.ShouldRun() || flow.Decision() != flowctl.Accepted {
				t.Errorf("in ramp mode %v: %v want Accepted", mode, flow.Decision())
			}
			end(flow)
		}
		if got := e.Stats().Components[0]; got.DryRunDrops != 2 || got.Dropped != 0 {
			t.Errorf("DryRunDrops, Dropped = %d, %d want 2, 0", got.DryRunDrops, got.Dropped)
		}
		_ = e.Close()
	})
}
