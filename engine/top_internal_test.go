package engine

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// hashOf is a hash of few bits, so that many keys share one.
func hashOf(key string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key))
	return h.Sum32() % 7
}

// The bounds of Space-Saving hold for any stream: no count is too small, none is larger than the truth by more than its
// excess, the counts add up, and each value with more than a 64th of the rejections is there.
func TestTopHoldsItsBounds(t *testing.T) {
	for seed := range race.Pick[uint64](60, 200) {
		random := rand.New(rand.NewPCG(seed, 0))
		n, values := 1+random.IntN(5000), 1+random.IntN(400)
		skew := rand.NewZipf(random, 1.01+2*random.Float64(), 1, uint64(values))
		var top top
		exact, last := make(map[string]uint64), make(map[string]int64)
		for i := range n {
			key := fmt.Sprint(skew.Uint64())
			if seed%4 == 0 { // the worst: no value comes twice
				key = fmt.Sprint(i)
			}
			exact[key]++
			last[key] = int64(i)
			top.add(key, hashOf(key), int64(i))
		}
		sum, kept := uint64(0), make(map[string]bool)
		before := uint64(1 << 62)
		for _, r := range top.values(time.Unix(0, 0)) {
			truth := exact[r.Value]
			if r.Rejected < truth || r.Rejected-r.Excess > truth || r.Last.UnixNano() != last[r.Value] || r.Rejected > before {
				t.Errorf("seed %d: %+v after %d want %d, last at %d", seed, r, before, truth, last[r.Value])
			}
			before, kept[r.Value] = r.Rejected, true
			sum += r.Rejected
		}
		if sum != uint64(n) || len(kept) > mostTop {
			t.Errorf("seed %d: %d values have %d rejections want at most %d with %d", seed, len(kept), sum, mostTop, n)
		}
		for key, truth := range exact {
			if truth > uint64(n)/mostTop && !kept[key] {
				t.Errorf("seed %d: a value with %d of %d rejections is missing", seed, truth, n)
			}
		}
	}
}

// A rejection waits for no other, and for nobody who reads.
func TestTopDoesNotWait(t *testing.T) {
	var top top
	top.add("a", 0, 0)
	top.mu.Lock()
	top.add("a", 0, 0)
	top.mu.Unlock()
	if got := top.values(time.Time{}); len(got) != 1 || got[0].Rejected != 1 {
		t.Errorf("values() = %+v want the first rejection alone", got)
	}
}

// To count the values of rejected flows allocates nothing once the values are there, whether they come and go or not. The
// text of a value is the table's.
func TestTopAllocations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		allocations := func(label string) float64 {
			e := openEngine(t, policy.RateLimiter{Selectors: policy.At("point"), Capacity: 0, Interval: time.Second, LimitBy: label})
			reqs := make([]*agentapi.Request, 10*mostTop)
			for i := range reqs {
				reqs[i] = &agentapi.Request{ControlPoint: "point", Labels: agentapi.Labels{Params: map[string]string{"user": fmt.Sprint(i)}}}
			}
			i := 0
			ask := func() {
				var v agentapi.Verdict
				if err := e.Agent().Check(t.Context(), reqs[i%len(reqs)], &v); err != nil || !v.Rejected() {
					t.Fatal(err)
				}
				i++
			}
			for range reqs {
				ask()
			}
			return testing.AllocsPerRun(len(reqs), ask)
		}
		if with, without := allocations("user"), allocations(""); with != without {
			t.Errorf("%v allocations a rejection by a label, %v without one", with, without)
		}
	})
}
