package ledger

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/internal/shared"
)

// A purse has tokens that come at a rate of one a second, or never by themselves.
type purse struct {
	tokens, most float64
	taken        float64 // less what came back
	still        bool
}

func (p *purse) Take(cost float64) bool {
	if p.tokens < cost-slack {
		return false
	}
	p.tokens, p.taken = p.tokens-cost, p.taken+cost
	return true
}

func (p *purse) Never(cost float64) bool { return cost > p.most }

func (p *purse) Return(tokens float64) { p.tokens, p.taken = p.tokens+tokens, p.taken-tokens }

func (p *purse) Until(tokens float64) time.Duration {
	if p.still {
		return 0
	}
	return time.Duration((tokens - p.tokens) * float64(time.Second))
}

// A step is a call at a ledger, or tokens that come.
type step struct {
	tokens  float64 // that come before
	after   time.Duration
	at      string // the instance; "" for Serve
	waiting []shared.Waiting
	once    bool

	got  string // workloads and tokens
	next time.Duration
}

func waits(workload string, weight float64, costs ...float64) shared.Waiting {
	return shared.Waiting{Workload: workload, Weight: weight, Costs: costs}
}

func several(w ...shared.Waiting) []shared.Waiting { return w }

func text(grants []shared.Grant) string {
	s := ""
	for _, g := range grants {
		s += fmt.Sprint(g.Workload, g.Tokens)
	}
	return s
}

func TestDraw(t *testing.T) {
	var many []shared.Waiting
	for i := range MaxWorkloads + 2 {
		many = append(many, waits(fmt.Sprintf("w%d", i), 1, 1, 1))
	}
	for _, tt := range []struct {
		name  string
		still bool
		steps []step
		left  float64 // tokens that are there in the end
		boxed float64
	}{
		{"what is there is for the caller if nobody else waits", false, []step{
			{tokens: 2, at: "x", waiting: several(waits("a", 1, 1, 1, 1)), got: "a[1 1]", next: time.Second},
			{tokens: 1, at: "x", waiting: several(waits("a", 1, 1)), got: "a[1]"},
		}, 0, 0},
		{"a flow that is not first does not go before one that wants more", false, []step{
			{tokens: 1, at: "x", waiting: several(waits("a", 1, 2)), next: time.Second},
			{at: "y", waiting: several(waits("b", 1, 3)), next: 4 * time.Second},
			{tokens: 2, at: "y", waiting: several(waits("b", 1, 3)), next: 2 * time.Second},
			{at: "x", waiting: several(waits("a", 1, 2)), got: "a[2]"},
		}, 1, 0},
		{"what falls to another lies in its box", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1, 1)), next: time.Second},
			{tokens: 2, at: "y", waiting: several(waits("b", 1, 1)), got: "b[1]"},
			{at: "x", waiting: several(waits("a", 1, 1, 1)), got: "a[1]", next: time.Second},
		}, 0, 0},
		{"workloads share by weight", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1, 1, 1, 1)), next: time.Second},
			{tokens: 4, at: "y", waiting: several(waits("b", 3, 1, 1, 1, 1, 1, 1)), got: "b[1 1 1]", next: time.Second},
			{tokens: 4, at: "y", waiting: several(waits("b", 3, 1, 1, 1)), got: "b[1 1 1]"},
			{at: "x", waiting: several(waits("a", 1, 1, 1, 1)), got: "a[1 1]", next: time.Second},
		}, 0, 0},
		{"instances take turns within a workload", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1, 1, 1)), next: time.Second},
			{at: "y", waiting: several(waits("a", 1, 1, 1, 1)), next: 2 * time.Second},
			{at: "z", waiting: several(waits("a", 1, 1, 1, 1)), next: 3 * time.Second},
			{tokens: 4, at: "z", waiting: several(waits("a", 1, 1, 1, 1)), got: "a[1]", next: 2 * time.Second},
			{at: "y", waiting: several(waits("a", 1, 1, 1, 1)), got: "a[1]", next: time.Second},
			{at: "x", waiting: several(waits("a", 1, 1, 1, 1)), got: "a[1 1]", next: 3 * time.Second},
		}, 0, 0},
		{"what a box holds for flows that have gone goes to others", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1, 1)), next: time.Second},
			{tokens: 2, at: "y", waiting: several(waits("b", 1, 1, 1, 1)), got: "b[1]", next: 2 * time.Second},
			{at: "x", waiting: nil},
			{at: "y", waiting: several(waits("b", 1, 1, 1)), got: "b[1]", next: time.Second},
		}, 0, 0},
		{"a box goes to the flows that wait now, as far as it does", false, []step{
			{at: "x", waiting: several(waits("a", 1, 4)), next: 4 * time.Second},
			{tokens: 4, at: "y", waiting: several(waits("b", 1, 5)), next: 5 * time.Second},
			{at: "x", waiting: several(waits("a", 1, 3, 3)), got: "a[3]", next: 7 * time.Second},
		}, 1, 0},
		{"nobody believes an instance that does not call", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1, 1, 1)), next: time.Second},
			{tokens: 2, at: "y", waiting: several(waits("b", 1, 1)), got: "b[1]"},
			{after: TTL - 1, at: "z", waiting: several(waits("c", 1, 1, 1)), next: 2 * time.Second},
			{after: 1, at: "z", waiting: several(waits("c", 1, 1, 1)), got: "c[1]", next: time.Second},
		}, 0, 0},
		{"what comes back falls into boxes", true, []step{
			{at: "x", waiting: several(waits("a", 1, 1))},
			{at: "y", waiting: several(waits("b", 1, 1))},
			{tokens: 1},
		}, 0, 1},
		{"once", false, []step{
			{tokens: 1, at: "x", waiting: several(waits("a", 1, 1, 1)), once: true, got: "a[1]", next: time.Second},
			{tokens: 1, at: "y", waiting: several(waits("b", 1, 1, 1)), got: "b[1]", next: time.Second},
		}, 0, 0},
		{"what never comes is in nobody's way", false, []step{
			{tokens: 1, at: "x", waiting: several(waits("a", 1, 1000, 1)), got: "a[1]"},
		}, 0, 0},
		{"a workload that waits again starts at the clock", false, []step{
			{tokens: 3, at: "x", waiting: several(waits("a", 1, 1, 1, 1, 1, 1)), got: "a[1 1 1]", next: time.Second},
			{at: "y", waiting: several(waits("b", 1, 1, 1, 1)), next: 2 * time.Second},
			{tokens: 2, at: "y", waiting: several(waits("b", 1, 1, 1, 1)), got: "b[1]", next: 2 * time.Second},
		}, 0, 1},
		{"beyond the most, workloads with new names are one", false, []step{
			{at: "x", waiting: many, next: time.Second},
			{tokens: MaxWorkloads + 1, at: "y", waiting: several(waits("w65", 1, 1)), next: 63 * time.Second},
			{at: "x", waiting: many[MaxWorkloads-2:], got: "w62[1 1]w63[1 1]w64[1 1]w65[1 1]"},
		}, 56, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var l Ledger
			p := &purse{most: 100, still: tt.still}
			now := time.Duration(0)
			for i, s := range tt.steps {
				p.tokens += s.tokens
				if now += s.after; s.at == "" {
					l.Serve(now, p)
					continue
				}
				grants, next := l.Draw(now, s.at, s.waiting, s.once, p)
				if got := text(grants); got != s.got || next != s.next {
					t.Errorf("step %d: got %s, next %v want %s, %v", i, got, next, s.got, s.next)
				}
			}
			if p.tokens != tt.left || l.Boxed() != tt.boxed {
				t.Errorf("%v tokens left, %v in boxes want %v, %v", p.tokens, l.Boxed(), tt.left, tt.boxed)
			}
		})
	}
}

// An instance is woken where it must not wait until its turn.
func TestWoken(t *testing.T) {
	long := slices.Repeat([]float64{1}, MaxFlows)
	for _, tt := range []struct {
		name  string
		still bool
		steps []step
		want  []string // of each step, the instances that it wakes
	}{
		{"what comes back falls to it", true, []step{
			{at: "x", waiting: several(waits("a", 1, 1, 1))},
			{tokens: 1},
			{tokens: 1},
			{at: "x", waiting: nil},
		}, []string{"", "x", "", ""}},
		{"it gets something when its turn is due", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1))},
			{after: time.Second - 1, tokens: 1, at: "y", waiting: several(waits("b", 1, 1))},
		}, []string{"", ""}},
		{"it gets something long before", false, []step{
			{at: "x", waiting: several(waits("a", 1, 1))},
			{after: time.Second / 2, tokens: 1, at: "y", waiting: several(waits("b", 1, 1))},
		}, []string{"", "x"}},
		{"one that was before it has left", false, []step{
			{at: "y", waiting: several(waits("b", 20, long...))},
			{at: "x", waiting: several(waits("a", 1, 1))},
			{at: "y", waiting: nil},
			{at: "y", waiting: nil},
		}, []string{"", "", "x", ""}},
		{"one that was after it has left", false, []step{
			{at: "y", waiting: several(waits("b", 1, 5))},
			{at: "x", waiting: several(waits("a", 1, 1))},
			{at: "y", waiting: nil},
		}, []string{"", "", ""}},
		{"one does not stay", false, []step{
			{at: "x", waiting: several(waits("a", 1, 5))},
			{at: "y", waiting: several(waits("b", 1, 1)), once: true},
			{at: "y", waiting: several(waits("b", 1, 1)), once: true},
		}, []string{"", "", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var l Ledger
			p := &purse{most: 100, still: tt.still}
			now := time.Duration(1)
			for i, s := range tt.steps {
				now, p.tokens = now+s.after, p.tokens+s.tokens
				if s.at == "" {
					l.Serve(now, p)
				} else {
					l.Draw(now, s.at, s.waiting, s.once, p)
				}
				if got := strings.Join(l.Woken(), ","); got != tt.want[i] {
					t.Errorf("step %d wakes %q want %q", i, got, tt.want[i])
				}
			}
		})
	}
}

// Whatever instances do, nothing is handed out that was not there, and nothing is lost: what was taken was granted, or lies
// in boxes. An instance gets what it lists, from the first on.
func TestDrawKeepsAccount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var l Ledger
		p := &purse{most: 50, still: rapid.Bool().Draw(t, "still")}
		now, granted := time.Duration(0), 0.0
		names := rapid.SampledFrom([]string{"a", "b", "c", "d", Others, ""})
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				if math.Abs(p.taken-granted-l.Boxed()) > 1e-6 || p.tokens < -1e-6 {
					t.Fatalf("taken %v, granted %v, boxed %v, left %v", p.taken, granted, l.Boxed(), p.tokens)
				}
				if len(l.workloads) > MaxWorkloads {
					t.Fatalf("%d workloads", len(l.workloads))
				}
				if l.Empty() && l.Boxed() != 0 {
					t.Fatal("an empty ledger has boxes")
				}
			},
			"come":  func(t *rapid.T) { p.tokens += rapid.SampledFrom([]float64{0.3, 1, 7, 40}).Draw(t, "tokens") },
			"pass":  func(t *rapid.T) { now += rapid.SampledFrom([]time.Duration{1, TTL / 3, TTL}).Draw(t, "time") },
			"serve": func(*rapid.T) { l.Serve(now, p) },
			"draw": func(t *rapid.T) {
				var waiting []shared.Waiting
				for range rapid.IntRange(0, 4).Draw(t, "workloads") {
					name := names.Draw(t, "workload")
					if slices.ContainsFunc(waiting, func(w shared.Waiting) bool { return w.Workload == name }) {
						continue
					}
					costs := rapid.SliceOfN(rapid.SampledFrom([]float64{1, 0.1, 5, 60}), 0, 40).Draw(t, "costs")
					waiting = append(waiting, waits(name, rapid.SampledFrom([]float64{1, 3, 1e-6, 1e6}).Draw(t, "weight"), costs...))
				}
				grants, _ := l.Draw(now, fmt.Sprint(rapid.IntRange(0, 3).Draw(t, "instance")), waiting, rapid.Bool().Draw(t, "once"), p)
				for _, g := range grants {
					w := waiting[slices.IndexFunc(waiting, func(w shared.Waiting) bool { return w.Workload == g.Workload })]
					fit := slices.DeleteFunc(slices.Clone(w.Costs), func(cost float64) bool { return cost > p.most })
					if len(g.Tokens) > len(fit) || !slices.Equal(g.Tokens, fit[:len(g.Tokens)]) {
						t.Fatalf("granted %v of %v", g.Tokens, w.Costs)
					}
					for _, tokens := range g.Tokens {
						granted += tokens
					}
				}
			},
		})
	})
}

// What waits in one ledger is served as by one queue: between two workloads that wait all the time, neither gets more ahead
// than one flow of each.
func TestDrawIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		weights := []float64{rapid.SampledFrom([]float64{1, 2, 7}).Draw(t, "weight"), rapid.SampledFrom([]float64{1, 3}).Draw(t, "weight")}
		costs := []float64{rapid.SampledFrom([]float64{1, 4}).Draw(t, "cost"), 1}
		var l Ledger
		p := &purse{most: 100}
		var got [2]float64
		for range 100 {
			p.tokens += rapid.Float64Range(0, 9).Draw(t, "tokens")
			i := rapid.IntRange(0, 3).Draw(t, "instance")
			w := i % 2
			grants, _ := l.Draw(0, fmt.Sprint(i), several(waits(fmt.Sprint(w), weights[w], slices.Repeat([]float64{costs[w]}, MaxFlows)...)), false, p)
			for _, g := range grants {
				for _, tokens := range g.Tokens {
					got[w] += tokens
				}
			}
			served := got
			for _, i := range l.instances {
				for _, p := range i.box {
					served[p.workload[0]-'0'] += p.tokens
				}
			}
			if i := slices.IndexFunc(l.workloads, func(w *workload) bool { return len(w.lists) < 2 }); i >= 0 || len(l.workloads) < 2 {
				got = [2]float64{} // one waits nowhere or has run out of flows at an instance: count anew
				l = Ledger{}
				continue
			}
			if ahead := math.Abs(served[0]/weights[0] - served[1]/weights[1]); ahead > costs[0]/weights[0]+costs[1]/weights[1]+1e-6 {
				t.Fatalf("one is ahead by %v after %v", ahead, served)
			}
		}
	})
}
