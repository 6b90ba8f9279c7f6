package engine_test

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// A dial is a signal that a test sets.
type dial struct{ bits atomic.Uint64 }

func (d *dial) set(x float64) { d.bits.Store(math.Float64bits(x)) }
func (d *dial) read() float64 { return math.Float64frombits(d.bits.Load()) }

// nowOrNever lets no flow wait.
var nowOrNever = policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: policy.NoQueue}}

func loadScheduler(f func(*policy.LoadScheduler)) []policy.Component {
	s := policy.LoadScheduler{Selectors: policy.At("point"), LoadMultiplier: policy.Named("share"), Scheduler: nowOrNever}
	if f != nil {
		f(&s)
	}
	return []policy.Component{s}
}

// perSecond is how many flows come each second.
const perSecond = 40

// accepted returns the share of the flows that are accepted while flows come for a while. Each takes so long.
func accepted(t *testing.T, c *flowctl.Client, last, each time.Duration, params flowctl.Params) float64 {
	t.Helper()
	var wg sync.WaitGroup
	n, in := int(last.Seconds()*perSecond), 0
	for range n {
		if flow := start(t, c, params); flow.ShouldRun() {
			in++
			wg.Go(func() {
				<-time.After(each)
				end(flow)
			})
		} else {
			end(flow)
		}
		<-time.After(time.Second / perSecond)
	}
	wg.Wait()
	return float64(in) / float64(n)
}

func TestLoadScheduler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var multiplier dial
		multiplier.set(0.5)
		c := open(t, loadScheduler(nil), engine.WithSignal("share", multiplier.read))
		check := func(when string, last time.Duration, want float64) {
			t.Helper()
			if got := accepted(t, c, last, 0, flowctl.Params{}); math.Abs(got-want) > 0.02 {
				t.Errorf("%s: %v of the flows were accepted want %v", when, got, want)
			}
		}
		<-time.After(time.Minute)
		check("while it learns", 31*time.Second, 1)
		check("once it has learned", time.Minute, 0.5)
		set := func(m float64) {
			multiplier.set(m)
			accepted(t, c, 10*time.Second, 0, flowctl.Params{}) // until it is looked at
		}
		set(0.25)
		check("at a lower multiplier", time.Minute, 0.25)
		set(math.NaN())
		check("while the signal is not known", time.Minute, 1)
		set(-1)
		check("below 0", time.Minute, 0)
		flow := start(t, c, flowctl.Params{})
		if flow.RejectReason() != flowctl.ReasonNoTokens || flow.HTTPStatus() != 503 || flow.RetryAfter() != 0 {
			t.Errorf("%v, retry after %v want no tokens, and nobody knows when there are", flow.Err(), flow.RetryAfter())
		}
		multiplier.set(0.1)
		<-time.After(32 * time.Second)
		check("after a silence", 31*time.Second, 1)
		check("once it has learned again", time.Minute, 0.1)
		rejected := false
		for range 10 { // more than the bucket holds
			flow := start(t, c, flowctl.Params{})
			if rejected = !flow.ShouldRun(); rejected {
				if at := flow.RetryAfter(); at <= 0 || at > time.Second {
					t.Errorf("retry after %v want a part of a second", at)
				}
				break
			}
		}
		if !rejected {
			t.Error("10 flows at once were accepted")
		}
	})
}

// Flows that wait are let in by priority, and all at once when everything is let in again.
func TestLoadSchedulerQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var multiplier dial
		multiplier.set(0.5)
		byLabels := byLabels
		byLabels.Default.Priority = 5
		byLabels.Workloads = []policy.Workload{{Name: "gold", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "gold"}}}}
		c := open(t, loadScheduler(func(s *policy.LoadScheduler) { s.Scheduler = byLabels }), engine.WithSignal("share", multiplier.read))
		accepted(t, c, 31*time.Second, 0, flowctl.Params{CheckTimeout: never})
		begin := time.Now()
		var wg sync.WaitGroup
		var mu sync.Mutex
		in := map[string]int{}
		for range 100 {
			for _, priority := range []string{"1", "3"} {
				wg.Go(func() {
					start(t, c, flowctl.Params{Labels: map[string]string{"priority": priority, "workload": priority}, CheckTimeout: never})
					if time.Since(begin) < 3*time.Second {
						mu.Lock()
						in[priority]++
						mu.Unlock()
					}
				})
			}
		}
		synctest.Wait()
		flow := start(t, c, flowctl.Params{Labels: map[string]string{"tier": "gold", "priority": "8", "tokens": "0"}})
		info := flow.CheckResponse().GetLimiterDecisions()[0].GetLoadSchedulerInfo()
		if info.GetWorkloadIndex() != "gold" || info.GetPriority() != 8 || info.GetTokensInfo().GetConsumed() != 0 {
			t.Errorf("decision = %v want that of workload gold", info)
		}
		<-time.After(3 * time.Second)
		multiplier.set(math.NaN())
		wg.Wait()
		if took := time.Since(begin); took > 9*time.Second {
			t.Errorf("all were let in after %v want it when the multiplier is looked at", took)
		}
		// 20 that the bucket held, and 20 each second
		if all := in["1"] + in["3"]; math.Abs(float64(all)-80) > 3 || math.Abs(float64(in["3"])-0.75*float64(all)) > 15 {
			t.Errorf("within 3 s %v were let in want 80, three quarters of which have priority 3", in)
		}
	})
}

// A load does not come to an end because all its callers wait: after a silence of the time that the scheduler learns,
// they are let in.
func TestLoadSchedulerClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, loadScheduler(func(s *policy.LoadScheduler) {
			s.LoadMultiplier, s.Scheduler = policy.Constant(0.5), policy.Scheduler{}
		}))
		ctx, cancel := context.WithCancel(t.Context())
		var ran atomic.Int64
		var callers sync.WaitGroup
		for range 8 {
			callers.Go(func() {
				for ctx.Err() == nil {
					flow := c.Start(ctx, "point", flowctl.Params{CheckTimeout: never})
					if flow.ShouldRun() {
						ran.Add(1)
					}
					<-time.After(time.Second / 10)
					end(flow)
				}
			})
		}
		for i := range race.Pick(2, 20) {
			ran.Store(0)
			<-time.After(10 * time.Minute)
			if ran.Load() == 0 {
				t.Errorf("none of the flows that waited was let in during 10 minutes, after %d", 10*i)
			}
		}
		cancel()
		callers.Wait()
	})
}

// Flows that cost nothing are no load: they do not keep the scheduler from noticing a silence of the others.
func TestLoadSchedulerFreeFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, loadScheduler(func(s *policy.LoadScheduler) {
			s.LoadMultiplier, s.Scheduler.TokensLabel = policy.Constant(1), "tokens"
		}))
		for i := range 400 {
			if flow := start(t, c, flowctl.Params{Labels: labelled("tokens=0")}); !flow.ShouldRun() {
				t.Errorf("a free flow after %d s: %v", i, flow.Err())
			}
			if i%40 == 0 {
				if flow := start(t, c, flowctl.Params{}); !flow.ShouldRun() {
					t.Errorf("the only flow in 40 s that costs a token, after %d s: %v", i, flow.Err())
				}
			}
			<-time.After(time.Second)
		}
	})
}

func aimdScheduler(f func(*policy.AIMDLoadScheduler)) []policy.Component {
	s := policy.AIMDLoadScheduler{Selectors: policy.At("point"), Signal: policy.Named("load"), Setpoint: policy.Constant(100), Scheduler: nowOrNever}
	if f != nil {
		f(&s)
	}
	return []policy.Component{s}
}

func TestAIMDLoadScheduler(t *testing.T) {
	for _, tt := range []struct {
		name   string
		set    func(*policy.AIMDLoadScheduler)
		load   float64
		second float64 // accepted in the 10 seconds after it has learned: half, and what the bucket holds
		third  float64 // and in the next 10: half of what was let in during the last 30
	}{
		{"no overload", nil, 100, 1, 1},
		{"an overload that goes on", nil, 200, 0.55, 0.42},
		{"an overload that is not confirmed", func(s *policy.AIMDLoadScheduler) { s.OverloadConfirmation = policy.Constant(0) }, 200, 1, 1},
		{"an overload that is confirmed", func(s *policy.AIMDLoadScheduler) { s.OverloadConfirmation = policy.Named("load") }, 200, 0.55, 0.42},
		{"a signal that is low in an overload", func(s *policy.AIMDLoadScheduler) {
			s.Gradient = policy.Gradient{Slope: 1, Min: 0.1, Max: 1}
		}, 50, 0.55, 0.42},
		{"a signal that is not known", nil, math.NaN(), 1, 1},
		{"a setpoint of 0", func(s *policy.AIMDLoadScheduler) { s.Setpoint = policy.Constant(0) }, 200, 1, 1},
		{"dry run", func(s *policy.AIMDLoadScheduler) { s.DryRun = true }, 200, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var load dial
				load.set(tt.load)
				c := open(t, aimdScheduler(tt.set), engine.WithSignal("load", load.read))
				for i, want := range []float64{1, tt.second, tt.third} {
					last := 10 * time.Second
					if i == 0 {
						last = 31 * time.Second
					}
					if got := accepted(t, c, last, 0, flowctl.Params{}); math.Abs(got-want) > 0.04 {
						t.Errorf("period %d: %v of the flows were accepted want %v", i, got, want)
					}
				}
			})
		})
	}
}

// In a dry run all is let in, whatever is decided: the share that is shown is that of all, and does not shrink with each look.
func TestAIMDDryRunShowsItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, c := reloadable(t, aimdScheduler(func(s *policy.AIMDLoadScheduler) { s.DryRun = true }),
			engine.WithSignal("load", func() float64 { return 200 }))
		for range 10 {
			accepted(t, c, 10*time.Second, 0, flowctl.Params{})
		}
		if got := e.Stats().Components[0].LoadMultiplier; got != 0.5 {
			t.Errorf("LoadMultiplier = %v want 0.5 of an overload of twice the setpoint", got)
		}
		_ = e.Close()
	})
}

// Step by step, what an overload has cost is given back.
func TestAIMDRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var load dial
		load.set(1e6)
		c := open(t, aimdScheduler(func(s *policy.AIMDLoadScheduler) { s.LinearIncrement = 0.2 }), engine.WithSignal("load", load.read))
		accepted(t, c, 31*time.Second, 0, flowctl.Params{})
		low := accepted(t, c, 30*time.Second, 0, flowctl.Params{})
		if low > 0.1 {
			t.Errorf("in an overload %v of the flows were accepted want next to none", low)
		}
		load.set(50)
		low = 0
		for range 6 {
			next := accepted(t, c, 10*time.Second, 0, flowctl.Params{})
			if next < low {
				t.Errorf("%v of the flows were accepted, after %v", next, low)
			}
			low = next
		}
		if low != 1 {
			t.Errorf("after a minute %v of the flows were accepted want all", low)
		}
	})
}

func TestLoadSchedulerDryRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, loadScheduler(func(s *policy.LoadScheduler) { s.DryRun, s.LoadMultiplier = true, policy.Constant(0) }))
		if got := accepted(t, c, time.Minute, 0, flowctl.Params{}); got != 1 {
			t.Errorf("%v of the flows were accepted want all", got)
		}
	})
}

// A flow of a workload costs how long they take on average, in milliseconds.
func TestWorkloadLatencyTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		of := func(kind string) flowctl.Params { return flowctl.Params{Labels: map[string]string{"kind": kind}} }
		workload := func(kind string, tokens float64) policy.Workload {
			return policy.Workload{
				Name: kind, Labels: policy.LabelMatcher{Equal: map[string]string{"kind": kind}},
				WorkloadParameters: policy.WorkloadParameters{Tokens: tokens},
			}
		}
		c := open(t, loadScheduler(func(s *policy.LoadScheduler) {
			s.LoadMultiplier, s.WorkloadLatencyTokens = policy.Constant(1), true
			s.Scheduler.TokensLabel = "tokens"
			s.Scheduler.Workloads = []policy.Workload{workload("fast", 3), workload("slow", 3), workload("rare", 3), workload("free", policy.NoTokens)}
		}))
		cost := func(kind, tokens string) float64 {
			flow := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"kind": kind, "tokens": tokens}})
			flow.SetStatus(flowctl.StatusError) // not to count
			defer end(flow)
			return flow.CheckResponse().GetLimiterDecisions()[0].GetLoadSchedulerInfo().GetTokensInfo().GetConsumed()
		}
		for kind, takes := range map[string]time.Duration{"fast": 10 * time.Millisecond, "slow": 250 * time.Millisecond, "free": time.Second, "other": 2 * time.Second} {
			accepted(t, c, time.Second, takes, of(kind))
		}
		if got := cost("slow", ""); got != 3 {
			t.Errorf("at first a slow flow costs %v want the workload's 3 tokens", got)
		}
		<-time.After(10 * time.Second)
		for _, tt := range []struct {
			kind, tokens string
			want         float64
		}{{"fast", "", 10}, {"slow", "", 250}, {"slow", "7", 7}, {"rare", "", 3}, {"free", "", 0}, {"other", "", 2000}} {
			if got := cost(tt.kind, tt.tokens); math.Abs(got-tt.want) > 1e-6 {
				t.Errorf("a flow that is %s costs %v want %v", tt.kind, got, tt.want)
			}
		}
		<-time.After(31 * time.Minute)
		if got := cost("slow", ""); got != 3 {
			t.Errorf("in the end a slow flow costs %v want the workload's 3 tokens again", got)
		}
	})
}

// When the cost of flows becomes known, or is no longer known, half of them are let in as before: the load counts at
// the prices of now. At the prices before, a token each, next to none would be let in.
func TestWorkloadLatencyTokensArePriced(t *testing.T) {
	for _, takes := range []time.Duration{100 * time.Millisecond, 35 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			c := open(t, loadScheduler(func(s *policy.LoadScheduler) {
				s.LoadMultiplier, s.WorkloadLatencyTokens = policy.Constant(0.5), true
				s.Scheduler.Default.QueueTimeout = policy.NoQueue
			}))
			var flows sync.WaitGroup
			for i := range 48 { // times fifty seconds; after some minutes none ends well, and half an hour later no cost is known
				in := 0
				for range 100 {
					<-time.After(500 * time.Millisecond)
					flow := c.Start(t.Context(), "point", flowctl.Params{})
					if !flow.ShouldRun() {
						end(flow)
						continue
					}
					in++
					flows.Go(func() {
						<-time.After(takes)
						if i > 6 {
							flow.SetStatus(flowctl.StatusError)
						}
						end(flow)
					})
				}
				if in < 45 || i >= 1 && in > 55 {
					t.Errorf("work of %v: in seconds %d to %d, %d of 100 were let in want half, or all at first", takes, 50*i, 50*i+50, in)
				}
			}
			flows.Wait()
		})
	}
}

// A flow that waits pays the price of the moment when it is let in: if it kept a higher price from before, it would be
// in the way of all later flows.
func TestWorkloadLatencyTokensOfThoseWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, loadScheduler(func(s *policy.LoadScheduler) {
			s.LoadMultiplier, s.WorkloadLatencyTokens = policy.Constant(0.5), true
			s.Scheduler = policy.Scheduler{Default: policy.WorkloadParameters{Tokens: 1000}} // what a flow costs at first
		}))
		var flows sync.WaitGroup
		var in, out [30]atomic.Int64 // in each ten seconds
		var longest atomic.Int64     // time to retry of a rejection
		begin := time.Now()
		for i := range 10 * len(in) * 20 { // twenty each second
			<-time.After(50 * time.Millisecond)
			flows.Go(func() {
				flow := c.Start(t.Context(), "point", flowctl.Params{CheckTimeout: 10 * time.Second})
				at := min(int(time.Since(begin)/(10*time.Second)), len(in)-1)
				if !flow.ShouldRun() {
					out[at].Add(1)
					if at >= 5 {
						longest.Store(max(longest.Load(), int64(flow.RetryAfter())))
					}
				}
				if flow.ShouldRun() {
					in[at].Add(1)
					<-time.After(5 * time.Millisecond)
					if i < 2000 { // in the first hundred seconds it is not known how long they take
						flow.SetStatus(flowctl.StatusError)
					}
				}
				end(flow)
			})
		}
		flows.Wait()
		for i := 5; i < len(in)-1; i++ {
			if got := in[i].Load(); got < 80 || got > 120 {
				t.Errorf("in seconds %d to %d, %d of 200 were let in want half", 10*i, 10*i+10, got)
			}
			if got := out[i].Load(); got < 80 || got > 120 {
				t.Errorf("in seconds %d to %d, %d of 200 were sent away want half", 10*i, 10*i+10, got)
			}
		}
		if got := longest.Load(); got > int64(15*time.Second) {
			t.Errorf("somebody was told to come back after %v want what is likely, ten seconds", time.Duration(got))
		}
	})
}

// A workload that comes seldom, or is free, or whose cost is forgotten, does not let other flows in.
func TestWorkloadLatencyTokensOfARareWorkload(t *testing.T) {
	for _, tokens := range []float64{1, policy.NoTokens} {
		synctest.Test(t, func(t *testing.T) {
			rare := policy.Workload{
				Name: "rare", Labels: policy.LabelMatcher{Equal: map[string]string{"kind": "rare"}},
				WorkloadParameters: policy.WorkloadParameters{Tokens: tokens},
			}
			c := open(t, loadScheduler(func(s *policy.LoadScheduler) {
				s.LoadMultiplier, s.WorkloadLatencyTokens = policy.Constant(0.25), true
				s.Scheduler.Workloads = []policy.Workload{rare}
			}))
			for minute := range 40 {
				if minute == 1 {
					end(c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"kind": "rare"}}))
				}
				in := 0
				for range 240 {
					flow := c.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Millisecond})
					if flow.ShouldRun() {
						in++
					}
					<-time.After(10 * time.Millisecond)
					end(flow)
					<-time.After(240 * time.Millisecond)
				}
				if minute > 0 && (in < 45 || in > 75) {
					t.Errorf("minute %d: %d of 240 were accepted want a quarter", minute, in)
				}
			}
		})
	}
}

// The latency that counts is that of the work: of flows that are selected, ran, and ended well. It is read off a load
// scheduler here, which lets in as many hundredths as the mean has milliseconds.
func TestMeanLatency(t *testing.T) {
	const ms = time.Millisecond
	work := func(t *testing.T, c *flowctl.Client, point, kind string, takes time.Duration, status flowctl.Status) {
		flow := c.Start(t.Context(), point, flowctl.Params{Labels: map[string]string{"kind": kind}, CheckTimeout: never})
		<-time.After(takes)
		flow.SetStatus(status)
		end(flow)
	}
	for _, tt := range []struct {
		name string
		over time.Duration
		then func(t *testing.T, c *flowctl.Client) // after a flow of 30 ms
		want float64                               // of the flows that are accepted
	}{
		{"one flow", time.Hour, nil, 0.3},
		{"a minute is long enough", time.Minute, nil, 0.3},
		{"half a minute is not", 30 * time.Second, nil, 1},
		{"another", time.Hour, func(t *testing.T, c *flowctl.Client) { work(t, c, "work", "read", 90*ms, flowctl.StatusOK) }, 0.6},
		{"one that failed", time.Hour, func(t *testing.T, c *flowctl.Client) { work(t, c, "work", "read", 90*ms, flowctl.StatusError) }, 0.3},
		{"one elsewhere", time.Hour, func(t *testing.T, c *flowctl.Client) { work(t, c, "elsewhere", "read", 90*ms, flowctl.StatusOK) }, 0.3},
		{"one that is not selected", time.Hour, func(t *testing.T, c *flowctl.Client) { work(t, c, "work", "write", 90*ms, flowctl.StatusOK) }, 0.3},
		{"one that waited", time.Hour, func(t *testing.T, c *flowctl.Client) {
			var wg sync.WaitGroup
			for _, status := range []flowctl.Status{flowctl.StatusError, flowctl.StatusOK} {
				wg.Go(func() { work(t, c, "slot", "read", 90*ms, status) })
				synctest.Wait()
			}
			wg.Wait()
		}, 0.6},
		{"one that the cache spared", time.Hour, func(t *testing.T, c *flowctl.Client) {
			params := flowctl.Params{ResultCacheKey: "k", Labels: map[string]string{"kind": "read"}}
			flow := c.Start(t.Context(), "work", params)
			_ = flow.SetResultCache(t.Context(), []byte("v"), 0)
			flow.SetStatus(flowctl.StatusError)
			end(flow)
			hit := c.Start(t.Context(), "work", params)
			if _, ok, err := hit.ResultCache(); !ok {
				t.Error("no hit", err)
			}
			end(hit)
		}, 0.3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reads := policy.LabelMatcher{Equal: map[string]string{"kind": "read"}}
				signal := policy.MeanLatency{Over: tt.over, Times: 0.01, Selectors: []policy.Selector{
					{ControlPoint: "work", Labels: reads}, {ControlPoint: "work", Labels: reads}, {ControlPoint: "slot"},
				}}
				c := open(t, append(loadScheduler(func(s *policy.LoadScheduler) { s.LoadMultiplier = signal }),
					policy.ConcurrencyScheduler{Selectors: policy.At("slot"), Max: 1, MaxInflight: time.Minute}))
				work(t, c, "work", "read", 30*ms, flowctl.StatusOK)
				if tt.then != nil {
					tt.then(t, c)
				}
				accepted(t, c, 40*time.Second, 0, flowctl.Params{})
				if got := accepted(t, c, 10*time.Second, 0, flowctl.Params{}); math.Abs(got-tt.want) > 0.03 {
					t.Errorf("%v of the flows were accepted want %v", got, tt.want)
				}
			})
		})
	}
}

// All kinds that files can have run.
func TestKinds(t *testing.T) {
	zero := func() float64 { return 0 }
	signals := []engine.Option{engine.WithSignal("SHARE", zero), engine.WithSignal("CPU", zero), engine.WithSignal("CPU_IS_HIGH", zero)}
	for _, name := range []string{"kinds", "protect-db", "slow-search", "new-ui"} {
		e, err := engine.Load("../policy/testdata/"+name+".yaml", append(signals, engine.WithSignal("LATENCY_MS", zero))...)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if name == "kinds" {
			if _, ok := rampOf(e, "kinds", "root.8"); !ok {
				t.Error("there is no ramp")
			}
		}
		_ = e.Close()
	}
}
