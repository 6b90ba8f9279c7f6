package agentapi

import (
	"fmt"
	"math"
	"sync"
	"testing"
)

func TestCosts(t *testing.T) {
	for _, tt := range []struct {
		name string
		say  func(c *Costs)
		want map[string]float64
	}{
		{"nothing", func(*Costs) {}, nil},
		{"one", func(c *Costs) { c.Say("a", 1.5) }, map[string]float64{"a": 1.5}},
		{"the last counts", func(c *Costs) { c.Say("a", 1); c.Say("a", 7); c.Say("a", 3) }, map[string]float64{"a": 3}},
		{"two labels", func(c *Costs) { c.Say("a", 1); c.Say("b", 2); c.Say("a", 3) }, map[string]float64{"a": 3, "b": 2}},
		{"nothing to pay", func(c *Costs) { c.Say("a", 1); c.Say("a", math.Copysign(0, -1)) }, map[string]float64{"a": 0}},
		{"as much as there is", func(c *Costs) { c.Say("a", math.MaxFloat64) }, map[string]float64{"a": math.MaxFloat64}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c Costs
			tt.say(&c)
			all := c.Close()
			if (all == nil) != (len(tt.want) == 0) {
				t.Fatalf("Close() = %v want %v", all, tt.want)
			}
			for _, label := range []string{"a", "b", ""} {
				want, known := tt.want[label]
				if got, ok := all.By(label); got != want || ok != known || math.Signbit(got) {
					t.Errorf("By(%q) = %v, %v want %v, %v", label, got, ok, want, known)
				}
			}
			c.Say("a", 99)
			c.Say("c", 99)
			if got, _ := all.By("a"); got != tt.want["a"] {
				t.Errorf("By(a) = %v after the end want %v", got, tt.want["a"])
			}
			if _, ok := all.By("c"); ok {
				t.Error("a label that was said after the end is settled")
			}
		})
	}
}

// Whatever is said meanwhile, the costs are what one call for each label said.
func TestCostsSayAndClose(t *testing.T) {
	for range 200 {
		var c Costs
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				for n := range 20 {
					c.Say(fmt.Sprint(n%3), float64(1+i*20+n))
				}
			})
		}
		all := c.Close()
		before := make(map[string]float64)
		for n := range 3 {
			before[fmt.Sprint(n)], _ = all.By(fmt.Sprint(n))
		}
		wg.Wait()
		for label, want := range before {
			if got, _ := all.By(label); got != want || got != math.Trunc(got) || got > 80 {
				t.Fatalf("By(%s) = %v want %v, which one call said", label, got, want)
			}
		}
		seen := make(map[string]bool)
		for of := c.newest.Load(); of != nil; of = of.next {
			if seen[of.label] && all.find(of.label) == of {
				t.Fatalf("label %s is there twice", of.label)
			}
			seen[of.label] = true
		}
	}
}

func TestCostsAllocations(t *testing.T) {
	if got := testing.AllocsPerRun(100, func() {
		var c Costs
		c.Say("a", 1)
		c.Say("a", 2)
		if tokens, _ := c.Close().By("a"); tokens != 2 {
			t.Error(tokens)
		}
	}); got > 2 { // the costs, which a flow has inside, and the cost
		t.Errorf("%v allocations want 2", got)
	}
}
