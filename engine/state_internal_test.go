package engine

import (
	"bytes"
	"encoding/base64"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/statefile"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// forgetful says why kinds of components write no state.
var forgetful = map[string]string{
	"sampler":             "it has no state",
	"load_scheduler":      "what it knows of the load is out of date after half a minute, and it lets everything in until it knows the load again",
	"aimd_load_scheduler": "as a load_scheduler",
}

// A use is what flows do to a component before it is written. They have the label "user" with the value "u".
type use func(t *testing.T, e *Engine)

// start starts flows, and returns them in flight.
func start(t *testing.T, e *Engine, flows int) []*agentapi.Verdict {
	t.Helper()
	all := make([]*agentapi.Verdict, flows)
	for i := range all {
		all[i] = new(agentapi.Verdict)
		if err := e.Agent().Check(t.Context(), ofUser("u"), all[i]); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// ofUser is a flow that does not wait.
func ofUser(value string) *agentapi.Request {
	return &agentapi.Request{ControlPoint: "point", Timeout: 1, Labels: agentapi.Labels{Params: map[string]string{"user": value}}}
}

// flows starts so many, at the same time.
func flows(n int) use {
	return func(t *testing.T, e *Engine) { start(t, e, n) }
}

// apart starts two flows, then two more after a time, and ends one of them.
func apart(d time.Duration) use {
	return func(t *testing.T, e *Engine) {
		v := start(t, e, 2)
		<-time.After(d)
		start(t, e, 2)
		<-time.After(d)
		if _, err := e.Agent().End(t.Context(), ofUser("u"), v[1], agentapi.Outcome{Ended: agentapi.EndedOK}); err != nil {
			t.Error(err)
		}
	}
}

// owing starts a flow that costs much more than it has taken.
func owing(t *testing.T, e *Engine) {
	v := start(t, e, 1)[0]
	if _, err := e.Agent().End(t.Context(), ofUser("u"), v, agentapi.Outcome{Ended: agentapi.EndedOK, Costs: costOf("cost", 15)}); err != nil {
		t.Error(err)
	}
}

// costOf says what a flow has cost.
func costOf(label string, tokens float64) *agentapi.Cost {
	var c agentapi.Costs
	c.Say(label, tokens)
	return c.Close()
}

// failing has flows fail, and waits.
func failing(n int, then time.Duration) use {
	return func(t *testing.T, e *Engine) {
		for _, v := range start(t, e, n) {
			if _, err := e.Agent().End(t.Context(), ofUser("u"), v, agentapi.Outcome{Ended: agentapi.EndedFailed}); err != nil {
				t.Error(err)
			}
		}
		<-time.After(then)
	}
}

// peek shows what the user has.
func peek(t *testing.T, e *Engine) string {
	t.Helper()
	s := e.Stats().Components[0]
	c, err := e.Component("p", s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if r, ok := c.Ramp(); ok {
		return fmt.Sprintf("%.6f %%", r.Percentage())
	}
	value := ""
	if s.LabelKey != "" {
		value = "u"
	}
	u, err := c.Peek(t.Context(), value)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%.6f of %v left, %d in flight, %s, %d open", u.Remaining, u.Capacity, u.InFlight, u.State, s.Open)
}

// inFlight returns how many flows hold slots of the only component.
func inFlight(t *testing.T, e *Engine) int {
	t.Helper()
	s := e.Stats().Components[0]
	c, err := e.Component("p", s.ID)
	if err != nil {
		t.Fatal(err)
	}
	value := ""
	if s.LabelKey != "" {
		value = "u"
	}
	u, err := c.Peek(t.Context(), value)
	if err != nil {
		t.Fatal(err)
	}
	return u.InFlight
}

// fails counts the flows that can fail before the circuit opens.
func fails(t *testing.T, e *Engine) string {
	for n := range 100 {
		v := start(t, e, 1)[0]
		if v.Rejected() {
			return fmt.Sprint("opens after ", n)
		}
		_, _ = e.Agent().End(t.Context(), ofUser("u"), v, agentapi.Outcome{Ended: agentapi.EndedFailed})
	}
	return "never opens"
}

// written returns the state of the engine as the file has it.
func written(t *testing.T, e *Engine, drained bool) *statefile.File {
	t.Helper()
	var b bytes.Buffer
	if _, err := e.Agent().WriteState(&b, statefile.Header{Drained: drained}, statefile.MaxSize); err != nil {
		t.Fatal(err)
	}
	f, err := statefile.Parse(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// stateRows are components of each kind that keeps a state, and what flows do to them.
func stateRows() []stateRow {
	const s = time.Second
	at := policy.At("point")
	steps := []policy.RampStep{{Target: 0, Duration: 10 * s}, {Target: 50, Duration: 100 * s}, {Target: 100, Duration: 1000 * s}}
	scheduler := policy.Scheduler{TokensLabel: "cost"}
	return []stateRow{
		{"bucket", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 1, Interval: s, LimitBy: "user"}, apart(1500 * time.Millisecond), nil},
		{"bucket of all", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 1, Interval: s}, flows(7), nil},
		{"slow bucket", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 10, Interval: time.Hour, LimitBy: "user"}, flows(10), nil},
		{"bucket that never fills", policy.RateLimiter{Selectors: at, Capacity: 10, Interval: s, LimitBy: "user"}, flows(3), nil},
		{"bucket by steps", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 3, Interval: 7 * s, StepFill: true, LimitBy: "user"}, apart(4 * s), nil},
		{"delayed bucket", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 1, Interval: s, DelayInitialFill: true, LimitBy: "user"}, apart(s), nil},
		{"delayed bucket, filling", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 1, Interval: s, DelayInitialFill: true, LimitBy: "user"}, apart(6 * s), nil},
		{"delayed bucket by steps", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 2, Interval: s, StepFill: true, DelayInitialFill: true, LimitBy: "user"}, apart(s), nil},
		{"debt", policy.RateLimiter{Selectors: at, Capacity: 10, Fill: 1, Interval: s, TokensLabel: "cost", LimitBy: "user"}, owing, nil},
		{"quota with a queue", policy.QuotaScheduler{Selectors: at, Capacity: 10, Fill: 1, Interval: s, LimitBy: "user", Scheduler: scheduler}, flows(4), nil},
		{"debt of a quota with a queue", policy.QuotaScheduler{Selectors: at, Capacity: 10, Fill: 1, Interval: s, Scheduler: scheduler}, owing, nil},
		{"slots", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: 40 * s, LimitBy: "user"}, apart(12 * s), nil},
		{"slots of all", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: 40 * s}, apart(12 * s), nil},
		{"slots with a queue", policy.ConcurrencyScheduler{Selectors: at, Max: 5, MaxInflight: 40 * s, LimitBy: "user"}, apart(12 * s), nil},
		{"slots with a queue, of all", policy.ConcurrencyScheduler{Selectors: at, Max: 5, MaxInflight: 40 * s}, apart(12 * s), nil},
		{"calendar", policy.CalendarQuota{Selectors: at, Amount: 10, Period: policy.PeriodHour, LimitBy: "user"}, flows(3), nil},
		{"calendar of days", policy.CalendarQuota{Selectors: at, Amount: 10, Period: policy.PeriodDay, TimeZone: "America/St_Johns"}, flows(3), nil},
		{"debt of a calendar", policy.CalendarQuota{Selectors: at, Amount: 10, Period: policy.PeriodHour, LimitBy: "user", TokensLabel: "cost"}, owing, nil},
		{"open circuit", policy.CircuitBreaker{Selectors: at, FailureCount: 3, Window: 10 * s, OpenDuration: time.Minute, LimitBy: "user"}, failing(3, s), nil},
		{"open circuit of all", policy.CircuitBreaker{Selectors: at, FailureCount: 3, Window: 10 * s, OpenDuration: time.Minute}, failing(3, s), nil},
		{"circuit with failures", policy.CircuitBreaker{Selectors: at, FailureCount: 9, Window: 10 * s, OpenDuration: time.Minute, LimitBy: "user"}, failing(5, 3*s), fails},
		{"ramp", policy.LoadRamp{Selectors: at, Steps: steps, Start: true}, func(*testing.T, *Engine) { <-time.After(30 * s) }, nil},
		{"ramp that moves back", policy.LoadRamp{Selectors: at, Steps: steps}, func(t *testing.T, e *Engine) {
			c, _ := e.Component("p", "load_ramp.0")
			r, _ := c.Ramp()
			_ = r.Forward(t.Context())
			<-time.After(300 * s)
			_ = r.Backward(t.Context())
			<-time.After(50 * s)
		}, nil},
	}
}

type stateRow struct {
	name      string
	component policy.Component
	use       use
	look      func(t *testing.T, e *Engine) string // once; nil for peek, at several times
}

// A kind that has a state, and does not write it, must be among the forgetful, with a reason. A kind that writes one must be
// among the rows.
func TestEachKindKeepsItsState(t *testing.T) {
	tested := make(map[string]bool)
	for _, row := range stateRows() {
		tested[nameOf(row.component)] = true
	}
	for _, c := range oneOfEach() {
		name := nameOf(c)
		l, ok := openEngine(t, c).rules.Load().installed[0].component.(lasting)
		if ok {
			_, ok = l.lasts()
		}
		switch reason := forgetful[name]; {
		case !ok && reason == "":
			t.Errorf("a %s writes no state: write it, or say why among the forgetful", name)
		case ok && reason != "":
			t.Errorf("a %s writes a state, and is among the forgetful", name)
		case ok != tested[name]:
			t.Errorf("a %s writes a state: %v; it is among the rows: %v", name, ok, tested[name])
		}
	}
}

func nameOf(c policy.Component) string {
	return policy.Policy{Name: "p", Components: []policy.Component{c}}.Describe()[0].Name
}

// An engine that has read the state of another decides as if it were that one, now and whenever later.
func TestStateGoesOn(t *testing.T) {
	for _, row := range stateRows() {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				<-time.After(90*time.Minute + 1234567*time.Microsecond)
				old := openEngine(t, row.component)
				<-time.After(777 * time.Millisecond)
				row.use(t, old)
				f := written(t, old, true)
				downs := []time.Duration{0, 300 * time.Millisecond, 5 * time.Second, 20 * time.Second}
				looks := []time.Duration{0, time.Millisecond, 2 * time.Second, 11 * time.Second, time.Minute}
				look := row.look
				if _, ok := row.component.(policy.CalendarQuota); ok || row.name == "slow bucket" { // the next hour and the next day
					downs, looks = append(downs, time.Hour), append(looks, 2*time.Hour)
				}
				if look == nil {
					look = peek
				} else {
					downs, looks = downs[1:2], looks[:1] // it changes what it looks at
				}
				var after []*Engine
				for i, down := range downs { // they are the times since the one before
					<-time.After(down)
					next := openEngine(t, row.component)
					if i == 0 && row.look == nil && look(t, next) == look(t, old) {
						t.Fatalf("the state is as good as fresh: %s", look(t, old))
					}
					n := next.Agent().ReadState(f)
					if n.Dropped != 0 || n.Keys != 1 {
						t.Errorf("ReadState = %+v want one key", n)
					}
					after = append(after, next)
				}
				for _, d := range looks {
					<-time.After(d)
					want := look(t, old)
					for i, e := range after {
						if got := look(t, e); got != want {
							t.Errorf("%v after a restart that took until %v: %s want %s", d, downs[i], got, want)
						}
					}
				}
			})
		})
	}
}

// What was written is read again, and written again.
func TestStateIsWrittenAgain(t *testing.T) {
	for _, row := range stateRows() {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old := openEngine(t, row.component)
				row.use(t, old)
				second, third := openEngine(t, row.component), openEngine(t, row.component)
				second.Agent().ReadState(written(t, old, true))
				<-time.After(time.Second)
				third.Agent().ReadState(written(t, second, true))
				if got, want := row.shown(t, third), row.shown(t, old); got != want {
					t.Errorf("after two restarts: %s want %s", got, want)
				}
			})
		})
	}
}

// If the clock was set back between two processes, no time has passed for limits.
func TestStateWhereClockWentBack(t *testing.T) {
	for _, row := range stateRows() {
		if row.look != nil || strings.Contains(row.name, "calendar") { // which goes by the clock
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old := openEngine(t, row.component)
				row.use(t, old)
				f, want := written(t, old, true), peek(t, old)
				<-time.After(time.Hour)
				f.Written = f.Written.Add(9 * time.Hour)
				e := openEngine(t, row.component)
				e.Agent().ReadState(f)
				if got := peek(t, e); got != want {
					t.Errorf("after the clock went back: %s want %s", got, want)
				}
			})
		})
	}
}

// A state counts by the numbers of the policies in force. It is dropped, and the log says so, where it would mean something else.
func TestStateOfOtherConfiguration(t *testing.T) {
	const s = time.Second
	at := policy.At("point")
	limit := func(change func(*policy.RateLimiter)) policy.Component {
		l := policy.RateLimiter{ID: "it", Selectors: at, Capacity: 10, Fill: 1, Interval: s, LimitBy: "user"}
		if change != nil {
			change(&l)
		}
		return l
	}
	quota := func(change func(*policy.CalendarQuota)) policy.Component {
		q := policy.CalendarQuota{ID: "it", Selectors: at, Amount: 10, Period: policy.PeriodDay, LimitBy: "user"}
		if change != nil {
			change(&q)
		}
		return q
	}
	slots := func(most float64, inflight time.Duration) policy.Component {
		return policy.ConcurrencyLimiter{ID: "it", Selectors: at, Max: most, MaxInflight: inflight, LimitBy: "user"}
	}
	breaker := func(window, open time.Duration) policy.Component {
		return policy.CircuitBreaker{ID: "it", Selectors: at, FailureCount: 4, Window: window, OpenDuration: open, LimitBy: "user"}
	}
	gone := policy.RateLimiter{ID: "other", Selectors: at, Capacity: 10, Fill: 1, Interval: s, LimitBy: "user"}
	const ofTen = " of 10 left, 0 in flight, , 0 open"
	for _, tt := range []struct {
		name    string
		before  policy.Component
		use     use
		now     policy.Component
		want    string        // 2 s after the writing
		dropped string        // reason in the log; "" if nothing is dropped
		after   time.Duration // how much of the 2 s is after the reading
	}{
		{"same", limit(nil), flows(7), limit(nil), "5.000000" + ofTen, "", 0},
		{"more capacity", limit(nil), flows(7), limit(func(l *policy.RateLimiter) { l.Capacity = 20 }), "15.000000 of 20 left, 0 in flight, , 0 open", "", 0},
		{"less capacity", limit(nil), flows(3), limit(func(l *policy.RateLimiter) { l.Capacity = 6 }), "5.000000 of 6 left, 0 in flight, , 0 open", "", 0},
		{"less capacity than was used", limit(nil), flows(7), limit(func(l *policy.RateLimiter) { l.Capacity = 4 }), "2.000000 of 4 left, 0 in flight, , 0 open", "", 0},
		{"less debt than there is", limit(func(l *policy.RateLimiter) { l.TokensLabel = "cost" }), owing, limit(func(l *policy.RateLimiter) { l.TokensLabel, l.MaxDebt = "cost", 3 }), "-1.000000" + ofTen, "", 0},
		{"faster", limit(nil), flows(7), limit(func(l *policy.RateLimiter) { l.Fill = 2 }), "7.000000" + ofTen, "", 0},
		{"other fill", limit(nil), flows(7), limit(func(l *policy.RateLimiter) { l.StepFill = true }), "10.000000" + ofTen, "it fills in another way now", 0},
		{"other label", limit(nil), flows(7), limit(func(l *policy.RateLimiter) { l.LimitBy = "tenant" }), "10.000000" + ofTen, "it goes by another label now", 0},
		{"no label", limit(nil), flows(7), limit(func(l *policy.RateLimiter) { l.LimitBy = "" }), "10.000000" + ofTen, "it goes by another label now", 0},
		{"other kind", limit(nil), flows(7), quota(nil), "10.000000" + ofTen, "it is of another kind now", 0},
		{"kind without a state", limit(nil), flows(7), policy.LoadScheduler{ID: "it", Selectors: at, LoadMultiplier: policy.Constant(9)}, "+Inf of +Inf left, 0 in flight, , 0 open", "it is of another kind now", 0},
		{"gone", limit(nil), flows(7), gone, "10.000000" + ofTen, "no policy has the component", 0},
		{"other period", quota(nil), flows(7), quota(func(q *policy.CalendarQuota) { q.Period = policy.PeriodHour }), "10.000000" + ofTen, "it fills in another way now", 0},
		{"other zone", quota(nil), flows(7), quota(func(q *policy.CalendarQuota) { q.TimeZone = "Asia/Kolkata" }), "10.000000" + ofTen, "it fills in another way now", 0},
		{"other amount", quota(nil), flows(7), quota(func(q *policy.CalendarQuota) { q.Amount = 8 }), "1.000000 of 8 left, 0 in flight, , 0 open", "", 0},
		{"fewer slots", slots(5, 10*s), flows(4), slots(2, 10*s), "-2.000000 of 2 left, 4 in flight, , 0 open", "", 0},
		{"slots for longer", slots(5, 3*s), flows(4), slots(5, 10*s), "1.000000 of 5 left, 4 in flight, , 0 open", "", s},
		{"slots for less long", slots(5, 10*s), flows(4), slots(5, s), "5.000000 of 5 left, 0 in flight, , 0 open", "", s / 2},
		{"shorter opening", breaker(10*s, time.Hour), failing(4, 0), breaker(10*s, s), "1.000000 of 1 left, 0 in flight, half-open, 1 open", "", 2 * s},
		{"other window", breaker(10*s, time.Hour), failing(2, 0), breaker(20*s, time.Hour), "1.000000 of 1 left, 0 in flight, closed, 0 open", "there is no room for their keys, or they are of a longer or shorter window", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old := openEngine(t, tt.before)
				tt.use(t, old)
				f := written(t, old, true)
				var log bytes.Buffer
				e := openEngine(t, tt.now)
				e.logger = slog.New(slog.NewTextHandler(&log, nil))
				<-time.After(2*s - tt.after)
				n := e.Agent().ReadState(f)
				<-time.After(tt.after)
				if got := peek(t, e); got != tt.want {
					t.Errorf("%s want %s", got, tt.want)
				}
				if (n.Dropped == 0) != (tt.dropped == "") || !strings.Contains(log.String(), tt.dropped) || strings.Contains(log.String(), "=u ") {
					t.Errorf("dropped %d want a reason of %q in the log: %s", n.Dropped, tt.dropped, &log)
				}
			})
		})
	}
}

// Flows of before a restart end after it by the names that their answers had, each once, also if the numbers are other ones now.
// When the component is no longer in force, nothing remembers the names.
func TestFlowsEndAfterRestart(t *testing.T) {
	at := policy.At("point")
	for _, tt := range []struct {
		name        string
		before, now policy.Component
	}{
		{"limiter", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour, LimitBy: "user"}, policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour, LimitBy: "user"}},
		{"limiter of all", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour}, policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour}},
		{"other numbers", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour, LimitBy: "user"}, policy.ConcurrencyLimiter{Selectors: at, Max: 7, MaxInflight: 2 * time.Hour, LimitBy: "user"}},
		{"scheduler", policy.ConcurrencyScheduler{Selectors: at, Max: 5, MaxInflight: time.Hour, LimitBy: "user"}, policy.ConcurrencyScheduler{Selectors: at, Max: 4, MaxInflight: time.Hour, LimitBy: "user"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old, e := openEngine(t, tt.before), openEngine(t, tt.now)
				gone := start(t, old, 3) // so that slots have other places in the next engine
				held := start(t, old, 2)
				for _, v := range gone {
					_, _ = old.Agent().End(t.Context(), ofUser("u"), v, agentapi.Outcome{Ended: agentapi.EndedOK})
				}
				e.Agent().ReadState(written(t, old, true))
				start(t, e, 1)
				end := func(v *agentapi.Verdict) (known, returned bool) {
					d := v.At(0)
					label := d.Label
					if d.Component.LabelKey != "" {
						label = d.Component.LabelKey + ":" + label
					}
					got := e.Agent().EndSlots(t.Context(), []agentapi.SlotName{{
						Policy: d.Component.Policy, Hash: d.Component.Hash, Component: d.Component.ID, Label: label, Slot: d.Slot(),
					}})
					return got[0].Known, got[0].Returned
				}
				for i, v := range append(held, held...) {
					if _, returned := end(v); returned != (i < len(held)) {
						t.Errorf("end %d of two flows: %v", i, returned)
					}
				}
				if _, returned := end(gone[0]); returned {
					t.Error("a flow that had ended before the restart ended again")
				}
				if got := inFlight(t, e); got != 1 {
					t.Errorf("%d flows are in flight want that of now", got)
				}
				if err := e.Apply(nil); err != nil {
					t.Fatal(err)
				}
				<-time.After(3 * time.Hour)
				if n := len(e.holders); n != 0 {
					t.Errorf("%d names of components are left that no flow holds anything of", n)
				}
			})
		})
	}
}

// After a kill, a slot counts for as long again as its flow had run, for 10 s at the least, and never beyond its MaxInflight.
func TestSlotsOfCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 10, MaxInflight: 100 * time.Second, LimitBy: "user"}
		old := openEngine(t, limit)
		start(t, old, 1)
		<-time.After(50 * time.Second)
		start(t, old, 1)
		<-time.After(20 * time.Second)
		start(t, old, 2) // ages of 70 s, 20 s and 0 s twice
		f := written(t, old, false)
		<-time.After(5 * time.Second)
		e, again := openEngine(t, limit), openEngine(t, limit)
		if n := e.Agent().ReadState(f); n.Slots != 4 {
			t.Errorf("ReadState = %+v want 4 slots", n)
		}
		again.Agent().ReadState(written(t, e, false)) // a second kill lends no time
		for _, tt := range []struct {
			after time.Duration
			want  int
		}{{0, 4}, {9 * time.Second, 4}, {time.Second, 2}, {9 * time.Second, 2}, {time.Second, 1}, {4 * time.Second, 1}, {time.Second, 0}} {
			<-time.After(tt.after)
			for _, of := range []*Engine{e, again} {
				if got := inFlight(t, of); got != tt.want {
					t.Errorf("after %v more: %d flows in flight want %d", tt.after, got, tt.want)
				}
			}
		}
	})
}

// The names of values that are hidden stay the same, so that their states are found again.
func TestStateOfHiddenValues(t *testing.T) {
	const label = "http.request.header.authorization"
	limit := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 3, Interval: time.Hour, LimitBy: label}
	old, e := openEngine(t, limit), openEngine(t, limit)
	req := &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{label: "Bearer sesame"}}}
	for _, of := range []*Engine{old, old} {
		if err := of.Agent().Check(t.Context(), req, new(agentapi.Verdict)); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := old.Agent().WriteState(&b, statefile.Header{Drained: true}, statefile.MaxSize); err != nil || bytes.Contains(b.Bytes(), []byte("sesame")) {
		t.Errorf("WriteState = %v want a file without the value", err)
	}
	f, err := statefile.Parse(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	e.Agent().ReadState(f)
	c, _ := e.Component("p", "rate_limiter.0")
	if u, err := c.Peek(t.Context(), "Bearer sesame"); err != nil || u.Remaining != 1 {
		t.Errorf("Peek = %+v, %v want 1 left", u, err)
	}
}

// What has no room is dropped, and counted: keys beyond the cap where they are read, and states beyond the size of the file. The
// state that keys beyond the cap share is kept.
func TestStateWithoutRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 3, Interval: time.Hour, LimitBy: "user"}
		slots := policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 3, MaxInflight: time.Hour}
		engineOf := func(keys int) *Engine {
			e, err := New([]policy.Policy{{Name: "p", Components: []policy.Component{limit, slots}}}, WithKeyCap(keys))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = e.Close() })
			return e
		}
		old := engineOf(4)
		var held []*agentapi.Verdict
		for i := range 6 { // two of them share a bucket
			v := new(agentapi.Verdict)
			if err := old.Agent().Check(t.Context(), ofUser(fmt.Sprint("user ", i)), v); err != nil {
				t.Fatal(err)
			}
			held = append(held, v)
		}
		if held[2].Rejected() || !held[3].Rejected() {
			t.Fatal("want three flows in flight")
		}
		f := written(t, old, true)
		e := engineOf(2)
		if n := e.Agent().ReadState(f); n.Slots != 3 || n.Keys+n.Dropped != states(f) || n.Dropped == 0 {
			t.Errorf("ReadState = %+v want all of %d states counted, some as dropped", n, states(f))
		}
		for _, bytes := range []int{0, 150, 250, 300, 350, 400, 450} {
			var b sizedBuffer
			n, err := old.Agent().WriteState(&b, statefile.Header{Drained: true}, bytes)
			if err != nil || len(b.b) > bytes && n.Keys > 0 || n.Keys+n.Dropped != states(f) {
				t.Errorf("WriteState within %d bytes = %+v, %v, %d bytes want %d states or fewer", bytes, n, err, len(b.b), states(f))
			}
			f, err := statefile.Parse(b.b)
			if err != nil {
				t.Fatal(err)
			}
			if got := engineOf(4).Agent().ReadState(f); got.Keys != n.Keys || n.Keys > 0 && got.Slots != 3 {
				t.Errorf("ReadState of %d bytes = %+v want %d states, slots first", bytes, got, n.Keys)
			}
		}
	})
}

// written2 counts the states of a file.
func states(f *statefile.File) (n int) {
	f.Each(func(statefile.Component) func(statefile.Record) { return func(statefile.Record) { n++ } })
	return n
}

type sizedBuffer struct{ b []byte }

func (s *sizedBuffer) Write(p []byte) (int, error) {
	s.b = append(s.b, p...)
	return len(p), nil
}

// While a hold-off lasts, no flow gets slots: the wait is what is left of it. Schedulers have flows wait for it. Other limits
// go on.
func TestHoldOff(t *testing.T) {
	at := policy.At("point")
	for _, tt := range []struct {
		name      string
		component policy.Component
		wait      time.Duration // that flows may wait
		passes    bool          // at once
	}{
		{"limiter", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour, LimitBy: "user"}, time.Minute, false},
		{"limiter of all", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour}, time.Minute, false},
		{"scheduler", policy.ConcurrencyScheduler{Selectors: at, Max: 5, MaxInflight: time.Hour, LimitBy: "user"}, time.Second, false},
		{"dry run", policy.ConcurrencyLimiter{Selectors: at, Max: 5, MaxInflight: time.Hour, DryRun: true}, time.Minute, true},
		{"rate limiter", policy.RateLimiter{Selectors: at, Capacity: 9, Interval: time.Hour}, time.Minute, true},
		{"quota scheduler", policy.QuotaScheduler{Selectors: at, Capacity: 9, Interval: time.Hour}, time.Minute, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := openEngine(t, tt.component)
				e.Agent().HoldOff(10 * time.Second)
				<-time.After(3 * time.Second)
				ask := func(wait time.Duration) (*agentapi.Verdict, time.Duration) {
					begin, v, req := time.Now(), new(agentapi.Verdict), ofUser("u")
					req.Timeout = wait
					if err := e.Agent().Check(t.Context(), req, v); err != nil {
						t.Fatal(err)
					}
					return v, time.Since(begin)
				}
				v, took := ask(tt.wait)
				if v.Rejected() == tt.passes || took != 0 {
					t.Errorf("rejected %v after %v want it at once: %v", v.Rejected(), took, !tt.passes)
				}
				want := uint64(1)
				if tt.passes {
					want = 0
				} else if got := v.At(0).Wait(); got != 7*time.Second {
					t.Errorf("retry after %v want the 7 s that are left", got)
				}
				if got := e.Agent().HeldOff(); got != want {
					t.Errorf("%d flows were held off want %d", got, want)
				}
				if _, is := tt.component.(policy.ConcurrencyScheduler); is {
					if v, took := ask(time.Minute); v.Rejected() || took != 7*time.Second {
						t.Errorf("a flow that may wait: rejected %v after %v want it in when the hold-off ends", v.Rejected(), took)
					}
				}
				<-time.After(7 * time.Second)
				if v, took := ask(0); v.Rejected() || took != 0 {
					t.Errorf("after the hold-off: rejected %v after %v", v.Rejected(), took)
				}
			})
		})
	}
}

// The state is written while flows come, end, and keys are forgotten. A state that was written so is whole.
func TestStateIsWrittenUnderLoad(t *testing.T) {
	components := make([]policy.Component, 0, policy.Kinds)
	for _, c := range oneOfEach() {
		if _, ok := c.(policy.LoadRamp); !ok {
			components = append(components, c)
		}
	}
	components[0] = policy.RateLimiter{Selectors: policy.At("point"), Capacity: 9, Fill: 1, Interval: time.Microsecond, LimitBy: "user"}
	components[1] = policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 9, MaxInflight: time.Hour, LimitBy: "user"}
	e := openEngine(t, components...)
	done := make(chan struct{})
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				var v agentapi.Verdict
				req := ofUser(fmt.Sprint(i % 100))
				_ = e.Agent().Check(t.Context(), req, &v)
				_, _ = e.Agent().End(t.Context(), req, &v, agentapi.Outcome{Ended: agentapi.EndedFailed})
				if i%64 == 0 {
					for _, in := range e.rules.Load().installed {
						if in.keeper != nil {
							in.keeper.sweep(e.now()+int64(time.Hour), false)
						}
					}
				}
			}
		})
	}
	for range race.Pick(5, 50) {
		f := written(t, e, false)
		if n := openEngine(t, components...).Agent().ReadState(f); n.Dropped != 0 {
			t.Errorf("ReadState = %+v want nothing dropped", n)
		}
	}
	close(done)
	load.Wait()
}

// Whatever a state says, reading it does not panic, gives no more than the capacity, and takes memory by the size of the file only.
func FuzzReadState(f *testing.F) {
	rows := stateRows()
	for i, row := range rows { // with what a flow or two leave behind
		e, err := New([]policy.Policy{{Name: "p", Components: []policy.Component{row.component}}})
		if err != nil {
			f.Fatal(err)
		}
		for range 2 {
			var v agentapi.Verdict
			_ = e.Agent().Check(f.Context(), ofUser("u"), &v)
			_, _ = e.Agent().End(f.Context(), ofUser("u"), &v, agentapi.Outcome{Ended: agentapi.EndedUnknown})
			_ = e.Agent().Check(f.Context(), ofUser("u"), &v)
		}
		_ = e.Close()
		var b bytes.Buffer
		_, _ = e.Agent().WriteState(&b, statefile.Header{Drained: true}, statefile.MaxSize)
		file, err := statefile.Parse(b.Bytes())
		if err != nil {
			f.Fatal(err)
		}
		file.Each(func(statefile.Component) func(statefile.Record) {
			return func(r statefile.Record) { f.Add(uint8(i), r.State, i%2 == 0, int64(i)) }
		})
	}
	f.Fuzz(func(t *testing.T, row uint8, state []byte, drained bool, ago int64) {
		c := rows[int(row)%len(rows)].component
		e := openEngine(t, c)
		in := e.rules.Load().installed[0]
		l, _ := in.component.(lasting)
		mode, _ := l.lasts()
		var b bytes.Buffer
		w := statefile.NewWriter(&b, statefile.Header{Drained: drained, Written: time.Now().Add(-time.Duration(ago))}, statefile.MaxSize)
		w.Component(in.written(mode))
		w.Key("u", state)
		w.Shared(state)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		file, err := statefile.Parse(b.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		if n := e.Agent().ReadState(file); n.Keys+n.Dropped != 2 {
			t.Errorf("ReadState = %+v want two states", n)
		}
		_ = peek(t, e)
		accepted := 0
		for range 12 {
			if v := start(t, e, 1)[0]; !v.Rejected() {
				accepted++
				_, _ = e.Agent().End(t.Context(), ofUser("u"), v, agentapi.Outcome{Ended: agentapi.EndedFailed})
			}
		}
		if q, ok := c.(policy.RateLimiter); ok && q.Interval >= time.Second && accepted > 11 {
			t.Errorf("%d flows were admitted want no more than the capacity of 10", accepted)
		}
		_ = written(t, e, true)
	})
}

// -update-states writes the golden states of the present version of the file, where there are none yet.
var updateStates = flag.Bool("update-states", false, "write the golden states of the present version")

// States of this version of the file, and of the one before, stay readable. The golden states never change: if a kind writes
// another state, that is a new version of the file, with golden states of its own. A line has the name of a row, a state file
// and what the component shows a tenth of a second after it was written.
func TestGoldenStates(t *testing.T) {
	golden := func(version int) string { return filepath.Join("testdata", fmt.Sprintf("states-v%d.txt", version)) }
	rows := make(map[string]stateRow)
	var lines strings.Builder
	for _, row := range stateRows() {
		rows[row.name] = row
		synctest.Test(t, func(t *testing.T) {
			e := openEngine(t, row.component)
			row.use(t, e)
			var b bytes.Buffer
			if _, err := e.Agent().WriteState(&b, statefile.Header{Drained: true}, statefile.MaxSize); err != nil {
				t.Fatal(err)
			}
			<-time.After(time.Second / 10)
			fmt.Fprintf(&lines, "%s\t%s\t%s\n", row.name, base64.StdEncoding.EncodeToString(b.Bytes()), row.shown(t, e))
		})
	}
	if *updateStates {
		if err := os.WriteFile(golden(statefile.Version), []byte(lines.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for version := max(statefile.Version-1, 1); version <= statefile.Version; version++ {
		text, err := os.ReadFile(golden(version))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for line := range strings.Lines(string(text)) {
			n++
			fields := strings.Split(strings.TrimSpace(line), "\t")
			synctest.Test(t, func(t *testing.T) {
				data, err := base64.StdEncoding.DecodeString(fields[1])
				if err != nil {
					t.Fatal(err)
				}
				f, err := statefile.Parse(data)
				if err != nil {
					t.Fatal(err)
				}
				<-time.After(time.Until(f.Written) + time.Second/10)
				row := rows[fields[0]]
				e := openEngine(t, row.component)
				if n := e.Agent().ReadState(f); n.Keys != 1 || n.Dropped != 0 {
					t.Errorf("version %d: %s: ReadState = %+v want one state", version, row.name, n)
				}
				if got := row.shown(t, e); got != fields[2] {
					t.Errorf("version %d: %s: %s want %s", version, row.name, got, fields[2])
				}
			})
		}
		if n == 0 {
			t.Errorf("version %d has no states", version)
		}
	}
}

// shown is what the row looks at.
func (r stateRow) shown(t *testing.T, e *Engine) string {
	t.Helper()
	if r.look != nil {
		return r.look(t, e)
	}
	return peek(t, e)
}

// While the file's disk hangs, checks, new policies and stats go on: no lock is held while anything is written.
func TestStateIsWrittenToHangingDisk(t *testing.T) {
	limit := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 9, Fill: 1, Interval: time.Hour, LimitBy: "user"}
	slots := policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: 9, MaxInflight: time.Hour, LimitBy: "user"}
	e := openEngine(t, limit, slots)
	const keys = 5_000 // much more than a buffer
	all := func() {
		for i := range keys {
			if err := e.Agent().Check(t.Context(), ofUser(fmt.Sprint(i)), new(agentapi.Verdict)); err != nil {
				t.Fatal(err)
			}
		}
	}
	all()
	disk := make(hangingDisk)
	var n agentapi.StateCount
	var writing sync.WaitGroup
	writing.Go(func() { n, _ = e.Agent().WriteState(disk, statefile.Header{Drained: false}, statefile.MaxSize) })
	disk <- struct{}{} // the first piece is being written
	all()
	_ = e.Stats()
	if err := e.Apply([]policy.Policy{{Name: "p", Components: []policy.Component{limit}}}); err != nil {
		t.Error(err)
	}
	close(disk)
	writing.Wait()
	if n.Keys != 2*keys {
		t.Errorf("%d states were written want two for each of %d keys", n.Keys, keys)
	}
}

// A hangingDisk writes a piece when it receives twice, or is closed.
type hangingDisk chan struct{}

func (d hangingDisk) Write(b []byte) (int, error) {
	<-d
	<-d
	return len(b), nil
}
