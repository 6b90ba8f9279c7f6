package bucket

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/statefile"
)

// No time that a file says has a bucket wait for longer than one that is empty now, and no number gives it more than its capacity.
func TestRestoreOfOddBuckets(t *testing.T) {
	const s = int64(time.Second)
	odd := []int64{0, 1, -1, s, -s, math.MaxInt64, math.MinInt64, source.Century}
	for _, r := range []*Rule{
		{Capacity: 10, Fill: 1, Interval: float64(s)},
		{Capacity: 10, Fill: 1, Interval: float64(s), Step: true},
		{Capacity: 10, Fill: 1, Interval: float64(s), Delay: true},
		{Capacity: 10, Fill: 1, Interval: float64(s), Step: true, Delay: true},
	} {
		for _, last := range odd {
			for _, start := range append(odd, 7) {
				for _, missing := range []float64{-1e300, -1, 0, 1, 10, 11, 1e300} {
					written := statefile.AppendFloat([]byte{flagDelayed | flagDebt}, missing)
					written = binary.AppendVarint(binary.AppendVarint(written, last), start)
					if start == 7 {
						written[0] = 0
						written = written[:len(written)-1]
					}
					var b State
					now := 5 * s
					r.Fresh(&b, now)
					if _, ok := r.Restore(&b, written, source.Restoring{Now: now, Then: now - s}); !ok {
						t.Fatalf("%+v: not restored", r)
					}
					if got := r.Usage(&b, now).Remaining; got > 10 || got < -10 {
						t.Errorf("%+v: last %d, start %d, missing %v: %v left want -10 to 10", r, last, start, missing, got)
					}
					if got := r.Usage(&b, now+40*s).Remaining; got != 10 { // a delay, and twice the time to fill
						t.Errorf("%+v: last %d, start %d, missing %v: %v left later want 10", r, last, start, missing, got)
					}
				}
			}
		}
	}
}

// A bucket that is written and read at any moment goes on as one that is not, in all modes.
func TestBucketGoesOn(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		r := &Rule{Capacity: float64(1 + random.IntN(20)), Fill: float64(random.IntN(5)), Interval: float64(1 + random.IntN(1000)), Step: seed&1 > 0, Delay: seed&2 > 0}
		var whole, parts State
		r.Fresh(&whole, 0)
		r.Fresh(&parts, 0)
		shift := int64(0) // of the time of parts, whose processes begin later
		for now := int64(0); now < 20_000; now += random.Int64N(300) {
			if random.IntN(4) == 0 {
				written := r.Append(nil, &parts, now-shift)
				shift = now - random.Int64N(100)
				r.Fresh(&parts, now-shift)
				if len(written) > 0 {
					if _, ok := r.Restore(&parts, written, source.Restoring{Now: now - shift, Then: now - shift}); !ok {
						t.Fatalf("seed %d: not restored", seed)
					}
				} else { // a full one may be forgotten, and its steps and delays begin anew
					r.Fresh(&whole, now)
				}
			}
			cost := float64(random.IntN(4))
			a, b := r.Take(&whole, now, cost), r.Take(&parts, now-shift, cost)
			if a.OK != b.OK || math.Abs(a.Left-b.Left) > 1e-6 || math.Abs(float64(a.Wait-b.Wait)) > 2 {
				t.Fatalf("seed %d, %+v: at %d %+v want %+v", seed, r, now, b, a)
			}
		}
	}
}
