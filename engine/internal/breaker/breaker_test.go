package breaker_test

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/headgate-go/headgate/engine/internal/breaker"
)

// rule makes a rule of a breaker that 3 of at least 4 flows open, with a window of 10 s, for 5 s.
func rule(change func(*breaker.Rule)) *breaker.Rule {
	r := &breaker.Rule{
		Count: 3, Least: 4, Step: breaker.StepOf(int64(10 * time.Second)), Open: int64(5 * time.Second),
		Probes: 1, Successes: 1, Timeout: int64(time.Minute),
	}
	if change != nil {
		change(r)
	}
	return r
}

// A play is a circuit and the flows that come to it.
type play struct {
	t     *testing.T
	rule  *breaker.Rule
	state breaker.State
	now   time.Duration
	flows map[string]breaker.Ticket
}

// do plays a line. "3s" goes on to that time; "a" starts a flow of this name, which passes; "a!5s" starts one that is to be rejected
// for so long; "a+", "a-" and "a?" end it well, badly, and without an outcome; "=open" wants the circuit to be that.
func (p *play) do(line string) {
	p.t.Helper()
	for word := range strings.FieldsSeq(line) {
		name, how := word[:len(word)-1], word[len(word)-1]
		switch d, err := time.ParseDuration(word); {
		case err == nil:
			p.now = d
		case word[0] == '=':
			if got, _, _ := p.rule.Usage(&p.state, int64(p.now)); got.String() != word[1:] {
				p.t.Fatalf("%s: after %q the circuit is %s want %s", line, word, got, word[1:])
			}
		case how == '+':
			p.end(name, breaker.Success)
		case how == '-':
			p.end(name, breaker.Failure)
		case how == '?':
			p.end(name, breaker.Nothing)
		default:
			name, wait, rejected := strings.Cut(word, "!")
			got := p.rule.Admit(&p.state, int64(p.now))
			if told := time.Duration(got.Wait).String(); rejected != (got.Ticket == 0) || rejected && told != wait {
				p.t.Fatalf("%s: the flow %s gets %+v, and is to wait for %v", line, word, got, told)
			}
			p.flows[name] = got.Ticket
		}
	}
}

func (p *play) end(name string, o breaker.Outcome) {
	p.t.Helper()
	ticket, ok := p.flows[name]
	if !ok {
		p.t.Fatalf("there is no flow %q", name)
	}
	delete(p.flows, name)
	p.rule.End(&p.state, int64(p.now), ticket, o, 0)
}

func TestCircuit(t *testing.T) {
	three := func(r *breaker.Rule) { r.Probes, r.Successes = 3, 3 }
	ratio := func(r *breaker.Rule) { r.Count, r.Ratio = 0, 0.5 }
	for _, tt := range []struct {
		name string
		rule func(*breaker.Rule)
		line string
	}{
		// What gobreaker says of itself.
		{"closed at first, and lets all pass", nil, "=closed a b c d e a+ b+ c+ d+ e+ =closed"},
		{"opens by a number of failures", nil, "a b c d a+ b- c- =closed d- =open"},
		{"opens when enough flows have ended, not when they begin", nil, "a b c d a- b- c- =closed d+ =open"},
		{"open: rejects for the rest of its time", nil, "a b c d a- b- c- d- e!5s 2s f!3s 4999999999ns g!1ns"},
		{"half-open when its time is over", nil, "a b c d a- b- c- d- 5s =half-open e =half-open"},
		{"half-open: as many probes as it may, and no others", three, "a b c d a- b- c- d- 5s e f g h!5s"},
		{"half-open: closes when they have succeeded", three, "a b c d a- b- c- d- 5s e f g e+ f+ =half-open g+ =closed"},
		{"half-open: opens again when one fails", three, "a b c d a- b- c- d- 5s e f g e+ f- =open 6s h!4s"},
		{"half-open: no more pass in all than it waits for", three, "a b c d a- b- c- d- 5s e f g e+ h!5s f+ i!5s g+ =closed"},
		{"a change clears the counts", nil, "a b c d a- b- c- d- 5s e e+ =closed f g h f- g- =closed i h- i- =open"},
		{"an outcome from before does not open a closed circuit", nil, "w x y z a b c d a- b- c- d- 5s e e+ w- x- y- z- =closed"},
		{"an outcome from before does not close a half-open circuit", nil, "x a b c d a- b- c- d- 5s e x+ =half-open e+ =closed"},
		{"an outcome from before does not open a half-open circuit", nil, "x a b c d a- b- c- d- 5s e x- =half-open"},
		{"a probe of a half-open circuit before counts no more", three, "a b c d a- b- c- d- 5s e f e- 10s g f+ f2 f3 g+ f2+ =half-open f3+ =closed"},
		{"failures are forgotten after a while", nil, "a b c d a- b- 12s c- d- =closed"},
		{"what does not count at all", nil, "a b c d a? b? c? d? e f g h e- f- g+ h? =closed i i- =open"},

		// Where we differ. There a result counts only in the interval in which its request began.
		{"a flow that is longer than the window", nil, "a b c d 60s a- b- c- d- =open"},
		{"the window moves", nil, "a b c d 9s a- b- 11s c- d- =open"},
		{"a probe that has no outcome gives its place back", nil, "a b c d a- b- c- d- 5s e e? f f+ =closed"},
		{"a probe of which nothing is heard loses its place", nil, "a b c d a- b- c- d- 5s e 64999999999ns f!1ns 65s f"},
		{"its outcome is evidence when it comes", nil, "a b c d a- b- c- d- 5s e 65s f e- =open 66s f+ =open"},
		{"its outcome takes no place from others", nil, "a b c d a- b- c- d- 5s e 65s f e? g!5s"},
		{"more successes than probes at a time", func(r *breaker.Rule) { r.Successes = 3 }, "a b c d a- b- c- d- 5s e f!5s e+ f f+ =half-open g g+ =closed"},
		{"more probes at a time than successes", func(r *breaker.Rule) { r.Probes = 3 }, "a b c d a- b- c- d- 5s e f g h!5s f+ =closed e- g- =closed"},

		{"a share", ratio, "a b c d e f a- b+ c- d+ =open"},
		{"less than the share", ratio, "a b c d e a- b+ c+ d+ e- =closed f f- =open"},
		{"a share of too few flows", ratio, "a b c a- b- c- =closed d d+ =open"},
		{"all of them", func(r *breaker.Rule) { r.Count, r.Ratio = 0, 1 }, "a b c d e a+ b- c- d- e- =closed"},
		{"a share of none", func(r *breaker.Rule) { r.Count, r.Ratio, r.Least = 0, 0.001, 0 }, "a b c a+ b+ c+ =closed"},
		{"a share that has no exact number", func(r *breaker.Rule) { r.Count, r.Ratio, r.Least = 0, 0.55, 20 }, "a a- b b- c c- d d- e e- f f- g g- h h- i i- j j- k k- l l+ m m+ n n+ o o+ p p+ q q+ r r+ s s+ =closed t t+ =open"},
		{"either of both", func(r *breaker.Rule) { r.Ratio = 0.9 }, "a b c d e f g a+ b+ c+ d+ e- f- =closed g- =open"},
		{"flows without an outcome leave the share alone", ratio, "a b c d e f a+ b+ c- d- =open"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &play{t: t, rule: rule(tt.rule), flows: map[string]breaker.Ticket{}}
			p.do(tt.line)
		})
	}
}

// A circuit that is closed by hand has nothing counted, and no flow that is under way counts.
func TestClose(t *testing.T) {
	for _, before := range []string{"a b c d a- b- c-", "a b c d a- b- c- d- =open", "a b c d a- b- c- d- 5s e =half-open"} {
		p := &play{t: t, rule: rule(nil), flows: map[string]breaker.Ticket{}}
		p.do("v w x y " + before)
		p.state.Close(int64(p.now))
		p.do("=closed v- w- x- y- =closed f g h i f- g- h- i- =open")
	}
}

// Whatever comes when, a half-open circuit lets no more flows through than it has places, and each phase counts its own flows
// only. The circuit is compared with a slow one that keeps every flow.
func TestAgainstModel(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		r := rule(func(r *breaker.Rule) {
			r.Count, r.Ratio, r.Least = uint64(random.IntN(4)), float64(random.IntN(5))/4, uint64(random.IntN(5))
			r.Probes, r.Successes = 1+random.IntN(3), 1+random.IntN(3)
			r.Timeout = int64(time.Duration(1+random.IntN(20)) * time.Second)
		})
		m := &model{rule: r}
		var s breaker.State
		var flows []*modelFlow
		now := int64(0)
		for range 400 {
			now += int64(time.Duration(random.IntN(3)) * 700 * time.Millisecond)
			if random.IntN(2) == 0 {
				f := m.admit(now)
				got := r.Admit(&s, now)
				if (f != nil) != (got.Ticket != 0) || f != nil && f.probe != got.Ticket.Probe() {
					t.Fatalf("seed %d at %v: %+v and the model has %+v", seed, time.Duration(now), got, f)
				}
				if f != nil {
					f.ticket = got.Ticket
					flows = append(flows, f)
				}
			} else if len(flows) > 0 {
				i := random.IntN(len(flows))
				f, o := flows[i], breaker.Outcome(random.IntN(3))
				flows = append(flows[:i], flows[i+1:]...)
				m.end(f, now, o)
				r.End(&s, now, f.ticket, o, 0)
			}
			if got := s.Phase(); got != m.phase {
				t.Fatalf("seed %d at %v: %v want %v", seed, time.Duration(now), got, m.phase)
			}
		}
	}
}

// A model is a circuit that is easy to understand.
type model struct {
	rule      *breaker.Rule
	phase     breaker.Phase
	number    int // of the phase
	until     int64
	successes int
	probes    []*modelFlow
	ended     []modelEnd
}

type modelFlow struct {
	phase  int
	begin  int64
	probe  bool
	ticket breaker.Ticket
}

type modelEnd struct {
	step   int64
	failed bool
}

func (m *model) enter(p breaker.Phase) {
	m.phase, m.number, m.successes, m.probes, m.ended = p, m.number+1, 0, nil, nil
}

func (m *model) admit(now int64) *modelFlow {
	if m.phase == breaker.Open && now >= m.until {
		m.enter(breaker.HalfOpen)
	}
	f := &modelFlow{phase: m.number, begin: now}
	switch m.phase {
	case breaker.Open:
		return nil
	case breaker.HalfOpen:
		f.probe = true
		under := 0
		for _, p := range m.probes {
			if now-p.begin < m.rule.Timeout {
				under++
			}
		}
		if under >= m.rule.Probes || m.successes+under >= max(m.rule.Probes, m.rule.Successes) {
			return nil
		}
		m.probes = append(m.probes, f)
	case breaker.Closed:
	}
	return f
}

func (m *model) end(f *modelFlow, now int64, o breaker.Outcome) {
	if f.phase != m.number {
		return
	}
	for i, p := range m.probes {
		if p == f {
			m.probes = append(m.probes[:i:i], m.probes[i+1:]...)
			break
		}
	}
	failed := o == breaker.Failure
	switch {
	case o == breaker.Nothing:
	case m.phase == breaker.Closed:
		m.ended = append(m.ended, modelEnd{now / m.rule.Step, failed})
		flows, failures := uint64(0), uint64(0)
		for _, e := range m.ended {
			if now/m.rule.Step-e.step <= 5 {
				flows++
				if e.failed {
					failures++
				}
			}
		}
		byCount := m.rule.Count > 0 && failures >= m.rule.Count
		byRatio := m.rule.Ratio > 0 && float64(failures)/float64(flows) >= m.rule.Ratio
		if failures > 0 && flows >= m.rule.Least && (byCount || byRatio) {
			m.enter(breaker.Open)
			m.until = now + m.rule.Open
		}
	case failed:
		m.enter(breaker.Open)
		m.until = now + m.rule.Open
	default:
		if m.successes++; m.successes >= m.rule.Successes {
			m.enter(breaker.Closed)
		}
	}
}

// A key with more flows in a step than 16 bits count is counted as any.
func TestManyFlows(t *testing.T) {
	for _, tt := range []struct {
		name           string
		flows, failed  int // in each of three steps
		opens          bool
		count, percent int
	}{
		{"less than the share", 70_000, 34_000, false, 0, 50},
		{"the share", 70_000, 36_000, true, 0, 50},
		{"less than the number", 70_000, 34_000, false, 105_000, 0},
		{"the number", 70_000, 36_000, true, 105_000, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := rule(func(r *breaker.Rule) {
				r.Count, r.Ratio, r.Least = uint64(tt.count), float64(tt.percent)/100, 210_000
			})
			var s breaker.State
			for i := range 3 * tt.flows {
				now := int64(i/tt.flows) * r.Step
				o := breaker.Success
				if i%tt.flows < tt.failed {
					o = breaker.Failure
				}
				got := r.Admit(&s, now)
				if got.Ticket == 0 {
					t.Fatalf("flow %d is rejected", i)
				}
				r.End(&s, now, got.Ticket, o, 0)
			}
			if opened := s.Phase() == breaker.Open; opened != tt.opens {
				t.Errorf("opens: %v want %v", opened, tt.opens)
			}
		})
	}
}

// A key is forgotten when nothing counts any more.
func TestIdle(t *testing.T) {
	for _, tt := range []struct {
		line string
		idle []time.Duration // it is from the second on, and not before
	}{
		{"30s a a+", []time.Duration{41999999999, 42 * time.Second}},
		{"30s a b c d a- b- c- d-", []time.Duration{44999999999, 45 * time.Second}},
		{"30s a b c d a- b- c- d- 100s e", []time.Duration{159999999999, 160 * time.Second}},
		{"30s a b c d a- b- c- d- 100s e 101s e?", []time.Duration{110999999999, 111 * time.Second}},
		{"30s a b c d a- b- c- d- 100s e e+ f f-", []time.Duration{111999999999, 112 * time.Second}},
	} {
		t.Run(tt.line, func(t *testing.T) {
			p := &play{t: t, rule: rule(nil), flows: map[string]breaker.Ticket{}}
			p.do(tt.line)
			for i, at := range tt.idle {
				if got := p.rule.Idle(&p.state, int64(at)); got != (i == 1) {
					t.Errorf("idle at %v: %v", at, got)
				}
			}
		})
	}
}

// Many flows at once: no more probes are under way than there are places, whoever ends when. Circuits that open again in the
// meantime do not know of the probes of before.
func TestProbesAtOnce(t *testing.T) {
	const places = 3
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprintf("fails=%v", fails), func(t *testing.T) { probesAtOnce(t, places, fails) })
	}
}

func probesAtOnce(t *testing.T, places int64, fails bool) {
	t.Helper()
	r := rule(func(r *breaker.Rule) {
		r.Count, r.Least, r.Open, r.Probes, r.Successes = 1, 1, 1, int(places), 1<<30
	})
	var s breaker.State
	r.End(&s, 1, r.Admit(&s, 1).Ticket, breaker.Failure, 0)
	var mu sync.Mutex
	var now, under, most, probes atomic.Int64
	now.Store(10)
	var flows sync.WaitGroup
	for i := range 8 {
		flows.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 2))
			for range 5_000 {
				at := now.Add(1)
				ticket, ok := s.Pass(at)
				if !ok {
					mu.Lock()
					ticket = r.Admit(&s, at).Ticket
					mu.Unlock()
				}
				if ticket == 0 {
					continue
				}
				if ticket.Probe() {
					probes.Add(1)
					n := under.Add(1)
					for old := most.Load(); n > old; old = most.Load() {
						if most.CompareAndSwap(old, n) {
							break
						}
					}
					runtime.Gosched()
					under.Add(-1) // before its place goes back
				}
				o := breaker.Outcome(random.IntN(2))
				if fails && random.IntN(3) == 0 {
					o = breaker.Failure
				}
				mu.Lock()
				r.End(&s, now.Add(1), ticket, o, 0)
				mu.Unlock()
			}
		})
	}
	flows.Wait()
	if most.Load() > places && !fails || probes.Load() == 0 {
		t.Errorf("%d of %d probes were under way at once want at most %d", most.Load(), probes.Load(), places)
	}
}

// The budget is 40 bytes for a key at which the circuit has never opened: with the entry of a table it has 80.
func TestSize(t *testing.T) {
	if got := unsafe.Sizeof(breaker.State{}); got > 40 {
		t.Errorf("a state has %d bytes want at most 40", got)
	}
}

func ExampleRule_Admit() {
	r := &breaker.Rule{
		Count: 2, Step: breaker.StepOf(int64(10 * time.Second)), Open: int64(5 * time.Second),
		Probes: 1, Successes: 1, Timeout: int64(time.Minute),
	}
	var s breaker.State
	for range 2 {
		r.End(&s, 0, r.Admit(&s, 0).Ticket, breaker.Failure, 0)
	}
	fmt.Println(s.Phase(), time.Duration(r.Admit(&s, int64(time.Second)).Wait))
	// Output: open 4s
}
