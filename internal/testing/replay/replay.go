// Package replay replays recordings of an Aperture agent against an engine, and compares what it answers with what the
// recorded agent did. Tests use it.
//
// A scenario is a policy and calls at set times. The protocol's generated stub makes the calls, as in other SDKs, or
// [Stub] does by a client of the toolkit. Decisions, reasons, statuses, labels, slots that come back and cache outcomes
// must be the same. Token counts and waits may differ by the drift of the recorder's clock. In a bubble of
// testing/synctest the replay has no drift of its own.
//
// The engine must do better than the recorded agent in some points: flows that wait are served in the right order and
// at the right time, no count of tokens is negative, and what is invalid is refused. After a rejection it may report a
// wait where the recorded agent does not.
package replay

import (
	"context"
	"embed"
	"encoding/json"
	"math"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/policy"
)

//go:embed testdata
var recordings embed.FS

// A Scenario is one recording.
type Scenario struct {
	Name   string
	Policy string // its file's name, "" for none
	steps  []step
}

type step struct {
	ID         string          `json:"id"`
	AtMS       int64           `json:"at_ms"`
	RPC        string          `json:"rpc"`
	DeadlineMS int64           `json:"deadline_ms"`
	EndOf      string          `json:"end_of"`
	Request    json.RawMessage `json:"request"`
	Response   json.RawMessage `json:"response"`
	TookMS     float64         `json:"took_ms"`
}

// load reads the recording of that name.
func load(t *testing.T, name string) *Scenario {
	t.Helper()
	data, err := recordings.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Name   string `json:"name"`
		Policy string `json:"policy"`
		Steps  []step `json:"steps"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	s := &Scenario{Name: file.Name, steps: file.Steps}
	if file.Policy != "" {
		s.Policy = path.Base(file.Policy)
	}
	return s
}

// policyData is the scenario's policy file; nil for none.
func (s *Scenario) policyData(t *testing.T) []byte {
	t.Helper()
	if s.Policy == "" {
		return nil
	}
	data, err := recordings.ReadFile("testdata/policies/" + s.Policy)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Options say what to compare of a scenario.
type Options struct {
	// Except names the steps to leave out.
	Except []string

	// Accepted names the checks that are to be accepted, although the recorded agent rejects them.
	Accepted []string

	// Invalid names the checks that are to be refused as such, although the recorded agent accepts them.
	Invalid []string

	// Refused means that each check that meets a limiter must be rejected, although the recorded agent accepts it, and
	// that nothing else is compared.
	Refused bool

	// TokensPerSecond is how fast the policy's buckets fill, which makes token counts drift.
	TokensPerSecond float64

	// Answered is when checks that wait are answered; the others are at once.
	Answered map[string]time.Duration
}

// scenarios are the recordings of what the engine can do, with what to compare of each.
func scenarios() map[string]Options {
	return map[string]Options{
		"rl-burst-then-refill":     {TokensPerSecond: 2},
		"rl-delay-initial-fill":    {TokensPerSecond: 2},
		"rl-global-bucket":         {TokensPerSecond: 1.0 / 60},
		"rl-missing-label":         {},
		"cl-inflight-and-end":      {},
		"cl-max-inflight-duration": {},
		"label-matchers":           {Refused: true}, // a limit of 0 lets everything pass there, and nothing here
		"cache":                    {},
		// A token comes every half second, and q4 goes first. q5 has less time than that.
		"qs-bucket-and-queue": {TokensPerSecond: 2, Answered: map[string]time.Duration{
			"q3": 1000 * time.Millisecond, "q4": 500 * time.Millisecond,
		}},
		// s4 goes first, when a slot comes back; s2 and s6 wait until 10 ms before their deadlines.
		"cs-queue-and-timeout": {Answered: map[string]time.Duration{
			"s2": 530 * time.Millisecond, "s3": 1500 * time.Millisecond, "s4": 1000 * time.Millisecond, "s6": 3590 * time.Millisecond,
		}},
		// No ramp lets r0 in there, though it matches; r5 has no control point.
		"ramp-mode": {Accepted: []string{"r0"}, Invalid: []string{"r5"}},
		// pm has no label to go by, and is in or out by chance.
		"sampler-sticky": {Except: []string{"pm"}},
	}
}

// Run replays the scenarios, each in a bubble of its own, against what open makes for a policy.
func Run(t *testing.T, open func(t *testing.T, policies []policy.Policy) checkv1.FlowControlServiceClient) {
	for name, opts := range scenarios() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := load(t, name)
				var policies []policy.Policy
				if data := s.policyData(t); data != nil {
					var err error
					if policies, err = policy.Parse(s.Policy, data); err != nil {
						t.Fatal(err)
					}
				}
				s.Replay(t, open(t, policies), opts)
			})
		})
	}
}

// Replay makes the scenario's calls at their times, in a bubble, and reports every difference.
func (s *Scenario) Replay(t *testing.T, stub checkv1.FlowControlServiceClient, opts Options) {
	t.Helper()
	r := &replay{t: t, stub: stub, opts: opts, begin: time.Now(), refused: -1, answers: make(map[string]*checkv1.CheckResponse)}
	for _, st := range s.steps {
		if slices.Contains(opts.Except, st.ID) {
			continue
		}
		<-time.After(time.Until(r.begin.Add(time.Duration(st.AtMS) * time.Millisecond)))
		r.step(st)
		synctest.Wait()
	}
	r.calls.Wait()
}

type replay struct {
	t     *testing.T
	stub  checkv1.FlowControlServiceClient
	opts  Options
	begin time.Time
	calls sync.WaitGroup

	mu      sync.Mutex
	answers map[string]*checkv1.CheckResponse // to the checks, for their ends

	first   time.Time     // when the recorded agent saw the first check, less its place in the scenario
	drift   time.Duration // the worst so far
	refused time.Duration // since when each check was rejected; negative when the last was not
}

func (r *replay) step(st step) {
	switch st.RPC {
	case "Check":
		req, want := read(r, st, new(checkv1.CheckRequest), new(checkv1.CheckResponse))
		call(r, st, r.stub.Check, req, func(got *checkv1.CheckResponse) {
			r.answers[st.ID] = proto.CloneOf(got)
			r.compareCheck(st, got, want)
		})
	case "FlowEnd":
		req, want := read(r, st, new(checkv1.FlowEndRequest), new(checkv1.FlowEndResponse))
		r.rename(st, req, want)
		call(r, st, r.stub.FlowEnd, req, compare(r, st, want))
	case "CacheUpsert":
		req, want := read(r, st, new(checkv1.CacheUpsertRequest), new(checkv1.CacheUpsertResponse))
		call(r, st, r.stub.CacheUpsert, req, compare(r, st, want))
	case "CacheLookup":
		req, want := read(r, st, new(checkv1.CacheLookupRequest), new(checkv1.CacheLookupResponse))
		call(r, st, r.stub.CacheLookup, req, compare(r, st, want))
	case "CacheDelete":
		req, want := read(r, st, new(checkv1.CacheDeleteRequest), new(checkv1.CacheDeleteResponse))
		call(r, st, r.stub.CacheDelete, req, compare(r, st, want))
	default:
		r.t.Fatalf("%s: unknown rpc %q", st.ID, st.RPC)
	}
}

// read reads what was asked and answered into the messages.
func read[Req, Resp proto.Message](r *replay, st step, req Req, want Resp) (Req, Resp) {
	r.t.Helper()
	if err := protojson.Unmarshal(st.Request, req); err != nil {
		r.t.Fatalf("%s: request: %v", st.ID, err)
	}
	if err := protojson.Unmarshal(st.Response, want); err != nil {
		r.t.Fatalf("%s: response: %v", st.ID, err)
	}
	return req, want
}

// call makes a call in the background, and passes its answer to look if it comes in time.
func call[Req, Resp proto.Message](r *replay, st step, rpc func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req, look func(Resp)) {
	r.calls.Go(func() {
		ctx := r.t.Context()
		if st.DeadlineMS > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, time.Duration(st.DeadlineMS)*time.Millisecond)
			defer cancel()
		}
		got, err := rpc(ctx, req)
		at := time.Since(r.begin)
		r.mu.Lock()
		defer r.mu.Unlock()
		answered, ok := r.opts.Answered[st.ID]
		if !ok {
			answered = time.Duration(st.AtMS) * time.Millisecond
		}
		if (at - answered).Abs() > time.Millisecond {
			r.t.Errorf("%s: answered at %v want %v", st.ID, at, answered)
		}
		switch {
		case slices.Contains(r.opts.Invalid, st.ID):
			if status.Code(err) != codes.InvalidArgument {
				r.t.Errorf("%s: %v, %v want InvalidArgument", st.ID, got, err)
			}
		case err != nil:
			r.t.Errorf("%s: %v", st.ID, err)
		default:
			look(got)
		}
	})
}

// own are the fields of Headgate's own, which no recorded answer has.
func own() cmp.Option {
	return protocmp.IgnoreFields(&checkv1.CheckResponse{}, "cause", "settlement_id", "agent_id", "awaits_outcome")
}

// compare compares answers that depend on neither the time nor the agent.
func compare[Resp proto.Message](r *replay, st step, want Resp) func(Resp) {
	return func(got Resp) {
		if diff := cmp.Diff(want, got, protocmp.Transform(), own()); diff != "" {
			r.t.Errorf("%s: (-recorded +got)\n%s", st.ID, diff)
		}
	}
}

// rename makes an end, and the answer to it, name slots as our answer to the check did.
func (r *replay) rename(st step, req *checkv1.FlowEndRequest, want *checkv1.FlowEndResponse) {
	r.t.Helper()
	r.mu.Lock()
	check, ok := r.answers[st.EndOf]
	r.mu.Unlock()
	if !ok {
		r.t.Fatalf("%s: no answer to %s", st.ID, st.EndOf)
	}
	refs := slices.Clone(req.GetInflightRequests())
	for _, s := range want.GetTokenReturnStatuses() {
		refs = append(refs, s.GetInflightRequestRef())
	}
	for _, ref := range refs {
		of := slices.IndexFunc(check.GetLimiterDecisions(), func(d *checkv1.LimiterDecision) bool {
			return d.GetPolicyName() == ref.GetPolicyName() && d.GetComponentId() == ref.GetComponentId()
		})
		if of < 0 {
			r.t.Fatalf("%s: no decision of %s/%s on %s", st.ID, ref.GetPolicyName(), ref.GetComponentId(), st.EndOf)
		}
		d := check.GetLimiterDecisions()[of]
		ref.PolicyHash = d.GetPolicyHash()
		switch i := d.GetDetails().(type) {
		case *checkv1.LimiterDecision_ConcurrencyLimiterInfo_:
			ref.Label, ref.RequestId = i.ConcurrencyLimiterInfo.GetLabel(), i.ConcurrencyLimiterInfo.GetRequestId()
		case *checkv1.LimiterDecision_ConcurrencySchedulerInfo_:
			ref.Label, ref.RequestId = i.ConcurrencySchedulerInfo.GetLabel(), i.ConcurrencySchedulerInfo.GetRequestId()
		default:
			r.t.Fatalf("%s: %s/%s holds no slots", st.ID, ref.GetPolicyName(), ref.GetComponentId())
		}
	}
}

func (r *replay) compareCheck(st step, got, want *checkv1.CheckResponse) {
	r.noteDrift(st, want)
	if slices.Contains(r.opts.Accepted, st.ID) {
		if got.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
			r.t.Errorf("%s: %v want it accepted", st.ID, got)
		}
		return
	}
	if r.opts.Refused {
		met := len(want.GetLimiterDecisions())
		if n := len(got.GetLimiterDecisions()); n != met || (got.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_REJECTED) != (met > 0) {
			r.t.Errorf("%s: %v with %d limiter decisions want %d, and rejected if any", st.ID, got.GetDecisionType(), n, met)
		}
		return
	}
	for _, m := range []*checkv1.CheckResponse{got, want} {
		slices.SortFunc(m.GetLimiterDecisions(), func(a, b *checkv1.LimiterDecision) int {
			return strings.Compare(a.GetComponentId(), b.GetComponentId())
		})
	}
	r.compareNumbers(st, got, want)
	forget(got)
	forget(want)
	compare(r, st, want)(got)
}

// noteDrift finds out how far from its set time the recorded agent saw the check.
func (r *replay) noteDrift(st step, want *checkv1.CheckResponse) {
	at := time.Duration(st.AtMS) * time.Millisecond
	seen := want.GetStart().AsTime()
	if r.first.IsZero() {
		r.first = seen.Add(-at)
	}
	d := seen.Sub(r.first) - at
	underway := time.Duration(st.TookMS*float64(time.Millisecond)) - want.GetEnd().AsTime().Sub(seen)
	r.drift = max(r.drift, d.Abs(), underway)
}

// compareNumbers compares token counts and waits within the drift, and then makes them equal.
func (r *replay) compareNumbers(st step, got, want *checkv1.CheckResponse) {
	slack := 2*r.drift + time.Millisecond
	tokens := r.opts.TokensPerSecond*slack.Seconds() + 1e-9
	switch at := time.Duration(st.AtMS) * time.Millisecond; {
	case want.GetDecisionType() == checkv1.CheckResponse_DECISION_TYPE_ACCEPTED:
		r.refused = -1
	case r.refused < 0:
		r.refused = at
	default:
		// The recorded agent repeats the count of its first refusal, when it refuses again.
		tokens += r.opts.TokensPerSecond * (at - r.refused).Seconds()
	}
	if want.GetWaitTime() == nil && estimated(got) {
		got.WaitTime = nil
	}
	r.compareWait(st, "wait", got.GetWaitTime(), want.GetWaitTime(), slack)
	if len(got.GetLimiterDecisions()) != len(want.GetLimiterDecisions()) {
		return // Diff tells
	}
	for i, w := range want.GetLimiterDecisions() {
		g := got.GetLimiterDecisions()[i]
		if w.GetWaitTime().AsDuration() == 0 && estimated(got) {
			g.WaitTime = w.GetWaitTime()
		}
		r.compareWait(st, "decision's wait", g.GetWaitTime(), w.GetWaitTime(), slack)
		gt, wt := tokensOf(g), tokensOf(w)
		if gt == nil || wt == nil {
			continue
		}
		for _, n := range []struct {
			name      string
			got, want *float64
		}{
			{"remaining", &gt.Remaining, &wt.Remaining},
			{"current", &gt.Current, &wt.Current},
		} {
			if wt.GetRemaining() < 0 && *n.got >= 0 { // overdrawn there
				*n.got = *n.want
			}
			if math.Abs(*n.got-*n.want) > tokens {
				r.t.Errorf("%s: %s = %v want %v ± %v", st.ID, n.name, *n.got, *n.want, tokens)
			}
			*n.got = *n.want
		}
	}
}

func (r *replay) compareWait(st step, name string, got, want *durationpb.Duration, slack time.Duration) {
	if (got == nil) != (want == nil) {
		return // Diff tells
	}
	if d := got.AsDuration() - want.AsDuration(); d.Abs() > slack {
		r.t.Errorf("%s: %s = %v want %v ± %v", st.ID, name, got.AsDuration(), want.AsDuration(), slack)
	}
	if got != nil {
		got.Seconds, got.Nanos = want.GetSeconds(), want.GetNanos()
	}
}

// estimated reports whether no rate limiter dropped the flow. Then the recorded agent does not report a wait.
func estimated(m *checkv1.CheckResponse) bool {
	return !slices.ContainsFunc(m.GetLimiterDecisions(), func(d *checkv1.LimiterDecision) bool {
		return d.GetDropped() && d.GetRateLimiterInfo() != nil
	})
}

func tokensOf(d *checkv1.LimiterDecision) *checkv1.LimiterDecision_TokensInfo {
	switch i := d.GetDetails().(type) {
	case *checkv1.LimiterDecision_RateLimiterInfo_:
		return i.RateLimiterInfo.GetTokensInfo()
	case *checkv1.LimiterDecision_ConcurrencyLimiterInfo_:
		return i.ConcurrencyLimiterInfo.GetTokensInfo()
	case *checkv1.LimiterDecision_QuotaSchedulerInfo_:
		return i.QuotaSchedulerInfo.GetTokensInfo()
	case *checkv1.LimiterDecision_ConcurrencySchedulerInfo_:
		return i.ConcurrencySchedulerInfo.GetTokensInfo()
	default:
		return nil
	}
}

// forget clears what no two agents have in common.
func forget(m *checkv1.CheckResponse) {
	m.Start, m.End = nil, nil
	for _, d := range m.GetLimiterDecisions() {
		d.PolicyHash = ""
		switch i := d.GetDetails().(type) {
		case *checkv1.LimiterDecision_ConcurrencyLimiterInfo_:
			i.ConcurrencyLimiterInfo.RequestId = ""
		case *checkv1.LimiterDecision_ConcurrencySchedulerInfo_:
			i.ConcurrencySchedulerInfo.RequestId = ""
		}
	}
}
