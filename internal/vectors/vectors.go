// Package vectors replays recordings of an Aperture agent against a client, and compares what it is told with what the
// recorded agent answered. Tests use it.
//
// A scenario is a policy and calls at set times. Decisions, reasons, statuses, labels and cache outcomes must be the
// same; token counts and waits may differ by what the recorder's clock drifted. In a bubble of testing/synctest the
// replay has no drift of its own.
//
// Where the engine is meant to do better than the recorded agent, the better is demanded: who waits is served in the
// right order and at the right time, no count of tokens is negative, and how long to wait after a rejection may be told
// where the recorded agent does not know.
package vectors

import (
	"embed"
	"encoding/json"
	"errors"
	"math"
	"path"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/flowctl"
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

	// DecisionsOnly compares just whether a step carries a limiter decision.
	DecisionsOnly bool

	// TokensPerSecond is how fast the policy's buckets fill, which makes token counts drift.
	TokensPerSecond float64

	// Answered is when checks that wait are answered; the others are at once.
	Answered map[string]time.Duration
}

// scenarios are those of what the engine can do, with what to compare of each.
func scenarios() map[string]Options {
	return map[string]Options{
		"rl-burst-then-refill":     {TokensPerSecond: 2},
		"rl-delay-initial-fill":    {TokensPerSecond: 2},
		"rl-global-bucket":         {TokensPerSecond: 1.0 / 60},
		"rl-missing-label":         {},
		"cl-inflight-and-end":      {},
		"cl-max-inflight-duration": {},
		"label-matchers":           {DecisionsOnly: true}, // a limit of 0 lets everything pass there, and nothing here
		"cache":                    {},
		// A token comes every half second, and q4 goes first. q5 has less time than that.
		"qs-bucket-and-queue": {TokensPerSecond: 2, Answered: map[string]time.Duration{
			"q3": 1000 * time.Millisecond, "q4": 500 * time.Millisecond,
		}},
		// s4 goes first, when a slot comes back; s2 and s6 wait until 10 ms before their deadlines.
		"cs-queue-and-timeout": {Answered: map[string]time.Duration{
			"s2": 530 * time.Millisecond, "s3": 1500 * time.Millisecond, "s4": 1000 * time.Millisecond, "s6": 3590 * time.Millisecond,
		}},
		// No ramp lets r0 in there, though it matches; r5 is invalid here.
		"ramp-mode": {Except: []string{"r5"}, Accepted: []string{"r0"}},
		// pm has no label to go by, and is in or out by chance.
		"sampler-sticky": {Except: []string{"pm"}},
	}
}

// Run replays the scenarios, each in a bubble of its own, against clients that open makes for a policy.
func Run(t *testing.T, open func(t *testing.T, policies []policy.Policy) *flowctl.Client) {
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
func (s *Scenario) Replay(t *testing.T, client *flowctl.Client, opts Options) {
	t.Helper()
	r := &replay{t: t, client: client, opts: opts, begin: time.Now(), refused: -1, flows: make(map[string]*flowctl.Flow)}
	for _, st := range s.steps {
		if slices.Contains(opts.Except, st.ID) {
			continue
		}
		<-time.After(time.Until(r.begin.Add(time.Duration(st.AtMS) * time.Millisecond)))
		r.step(st)
		synctest.Wait()
	}
	r.waiting.Wait()
}

type replay struct {
	t       *testing.T
	client  *flowctl.Client
	opts    Options
	begin   time.Time
	waiting sync.WaitGroup

	mu    sync.Mutex
	flows map[string]*flowctl.Flow

	first   time.Time     // when the recorded agent saw the first check, less its place in the scenario
	drift   time.Duration // the worst so far
	refused time.Duration // since when each check was rejected; negative when the last was not
}

func (r *replay) step(st step) {
	switch st.RPC {
	case "Check":
		r.check(st)
	case "FlowEnd":
		r.end(st)
	case "CacheUpsert":
		r.upsert(st)
	case "CacheLookup":
		r.lookup(st)
	case "CacheDelete":
		r.remove(st)
	default:
		r.t.Fatalf("%s: unknown rpc %q", st.ID, st.RPC)
	}
}

func (r *replay) read(st step, data json.RawMessage, m proto.Message) {
	r.t.Helper()
	if err := protojson.Unmarshal(data, m); err != nil {
		r.t.Fatalf("%s: %v", st.ID, err)
	}
}

func (r *replay) check(st step) {
	req, want := new(checkv1.CheckRequest), new(checkv1.CheckResponse)
	r.read(st, st.Request, req)
	r.read(st, st.Response, want)
	params := flowctl.Params{
		Labels:          req.GetLabels(),
		CheckTimeout:    time.Duration(st.DeadlineMS) * time.Millisecond,
		RampMode:        req.GetRampMode(),
		ResultCacheKey:  req.GetCacheLookupRequest().GetResultCacheKey(),
		GlobalCacheKeys: req.GetCacheLookupRequest().GetGlobalCacheKeys(),
	}
	r.waiting.Go(func() {
		flow := r.client.Start(r.t.Context(), req.GetControlPoint(), params)
		at := time.Since(r.begin)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.flows[st.ID] = flow
		answered, ok := r.opts.Answered[st.ID]
		if !ok {
			answered = time.Duration(st.AtMS) * time.Millisecond
		}
		if (at - answered).Abs() > time.Millisecond {
			r.t.Errorf("%s: answered at %v want %v", st.ID, at, answered)
		}
		r.compare(st, params, flow, want)
	})
}

func (r *replay) compare(st step, params flowctl.Params, flow *flowctl.Flow, want *checkv1.CheckResponse) {
	got := flow.CheckResponse()
	if got == nil {
		r.t.Errorf("%s: no answer: %v", st.ID, flow.Err())
		return
	}
	r.noteDrift(st, want)
	if slices.Contains(r.opts.Accepted, st.ID) {
		if got.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
			r.t.Errorf("%s: %v want it accepted", st.ID, flow.Err())
		}
		return
	}
	if r.opts.DecisionsOnly {
		if g, w := len(got.GetLimiterDecisions()), len(want.GetLimiterDecisions()); g != w {
			r.t.Errorf("%s: %d limiter decisions want %d", st.ID, g, w)
		}
		return
	}
	if params.ResultCacheKey == "" && params.GlobalCacheKeys == nil {
		// A check without keys asks for no lookup, and so gets no empty answer to one.
		want.CacheLookupResponse = nil
	}
	r.compareNumbers(st, got, want)
	for _, m := range []*checkv1.CheckResponse{got, want} {
		forget(m)
	}
	byComponent := protocmp.SortRepeated(func(a, b *checkv1.LimiterDecision) bool { return a.GetComponentId() < b.GetComponentId() })
	if diff := cmp.Diff(want, got, protocmp.Transform(), byComponent); diff != "" {
		r.t.Errorf("%s: (-recorded +got)\n%s", st.ID, diff)
	}
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

// estimated says whether what dropped the flow is no rate limiter: then the recorded agent does not tell how long to
// wait.
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

func (r *replay) end(st step) {
	want := new(checkv1.FlowEndResponse)
	r.read(st, st.Response, want)
	returned := 0
	for _, s := range want.GetTokenReturnStatuses() {
		if s.GetReturned() {
			returned++
		}
	}
	r.mu.Lock()
	flow, ok := r.flows[st.EndOf]
	r.mu.Unlock()
	if !ok {
		r.t.Fatalf("%s: no flow %s", st.ID, st.EndOf)
	}
	got, err := flow.End(r.t.Context())
	if err != nil && !errors.Is(err, flowctl.ErrEnded) {
		r.t.Errorf("%s: End() = %v", st.ID, err)
	}
	if got.Returned != returned {
		r.t.Errorf("%s: %d slots returned want %d", st.ID, got.Returned, returned)
	}
}

func (r *replay) upsert(st step) {
	req := new(checkv1.CacheUpsertRequest)
	r.read(st, st.Request, req)
	if e := req.GetResultCacheEntry(); e.GetKey() != "" {
		flow := r.client.Start(r.t.Context(), req.GetControlPoint(), flowctl.Params{ResultCacheKey: e.GetKey()})
		if err := flow.SetResultCache(r.t.Context(), e.GetValue(), e.GetTtl().AsDuration()); err != nil {
			r.t.Errorf("%s: SetResultCache() = %v", st.ID, err)
		}
	}
	for key, e := range req.GetGlobalCacheEntries() {
		flow := r.client.Start(r.t.Context(), req.GetControlPoint(), flowctl.Params{})
		if err := flow.SetGlobalCache(r.t.Context(), key, e.GetValue(), e.GetTtl().AsDuration()); err != nil {
			r.t.Errorf("%s: SetGlobalCache() = %v", st.ID, err)
		}
	}
}

func (r *replay) lookup(st step) {
	req, want := new(checkv1.CacheLookupRequest), new(checkv1.CacheLookupResponse)
	r.read(st, st.Request, req)
	r.read(st, st.Response, want)
	flow := r.client.Start(r.t.Context(), req.GetControlPoint(), flowctl.Params{
		ResultCacheKey: req.GetResultCacheKey(), GlobalCacheKeys: req.GetGlobalCacheKeys(),
	})
	got := flow.CheckResponse().GetCacheLookupResponse()
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		r.t.Errorf("%s: (-recorded +got)\n%s", st.ID, diff)
	}
}

func (r *replay) remove(st step) {
	req := new(checkv1.CacheDeleteRequest)
	r.read(st, st.Request, req)
	flow := r.client.Start(r.t.Context(), req.GetControlPoint(), flowctl.Params{ResultCacheKey: req.GetResultCacheKey()})
	if req.GetResultCacheKey() != "" {
		if err := flow.DeleteResultCache(r.t.Context()); err != nil {
			r.t.Errorf("%s: DeleteResultCache() = %v", st.ID, err)
		}
	}
	for _, key := range req.GetGlobalCacheKeys() {
		if err := flow.DeleteGlobalCache(r.t.Context(), key); err != nil {
			r.t.Errorf("%s: DeleteGlobalCache() = %v", st.ID, err)
		}
	}
}
