package bucket

import (
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/engine/internal/source"
)

func seconds(s float64) int64 { return int64(s * 1e9) }

// drained is a rule of capacity 10 and 5 tokens a second, and a bucket of it that was emptied at 0.
func drained(step, delay bool) (*Rule, *State) {
	r := &Rule{Capacity: 10, Fill: 5, Interval: 1e9, Step: step, Delay: delay}
	b := new(State)
	r.Fresh(b, 0)
	r.takeOrWait(b, 0, 10)
	return r, b
}

func TestBucketWait(t *testing.T) {
	for _, tt := range []struct {
		name        string
		step, delay bool
		at, want    float64
		ok          bool
		wait        float64
	}{
		{name: "continuous", at: 0, want: 1, wait: 0.2},
		{name: "continuous, later", at: 0.1, want: 1, wait: 0.1},
		{name: "continuous, in time", at: 0.2, want: 1, ok: true},
		{name: "continuous, all", at: 0, want: 10, wait: 2},
		{name: "step", step: true, at: 0, want: 1, wait: 1},
		{name: "step, later", step: true, at: 0.7, want: 1, wait: 0.3},
		{name: "step, in time", step: true, at: 1, want: 5, ok: true},
		{name: "step, two fills", step: true, at: 0.5, want: 6, wait: 1.5},
		{name: "delayed", delay: true, at: 0, want: 1, wait: 2.2},
		{name: "delayed, in time", delay: true, at: 2.2, want: 1, ok: true},
		{name: "delayed step", step: true, delay: true, at: 0, want: 5, wait: 2},
		{name: "delayed step, two fills", step: true, delay: true, at: 0, want: 6, wait: 3},
		{name: "more than it holds", at: 0, want: 11, wait: 0},
		{name: "nothing", at: 0, want: 0, ok: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, b := drained(tt.step, tt.delay)
			ok, wait := r.takeOrWait(b, seconds(tt.at), tt.want)
			if ok != tt.ok || math.Abs(float64(wait)-tt.wait*1e9) > 2 {
				t.Errorf("take(%v) at %v = %v, %v want %v, %vs", tt.want, tt.at, ok, time.Duration(wait), tt.ok, tt.wait)
			}
		})
	}
}

// The example of Forecast's comment.
func TestForecastExample(t *testing.T) {
	r, b := drained(false, false)
	if least, likely := r.Forecast(b, 0, source.Ahead{Least: 3, Likely: 5}, 1); least != seconds(0.8) || likely != seconds(1.2) {
		t.Errorf("forecast = %v, %v want 800ms, 1.2s", time.Duration(least), time.Duration(likely))
	}
}

// A step that is larger than the bucket brings no more than the bucket holds.
func TestBucketForecastLargeSteps(t *testing.T) {
	r, b := &Rule{Capacity: 2, Fill: 10, Interval: 1e9, Step: true}, new(State)
	r.Fresh(b, 0)
	r.takeOrWait(b, 0, 2)
	if least, likely := r.Forecast(b, 0, source.Ahead{Least: 5, Likely: 5}, 1); least != seconds(3) || likely != least {
		t.Errorf("forecast behind 5 = %v, %v want 3s", time.Duration(least), time.Duration(likely))
	}
}

func TestBucketOfNothing(t *testing.T) {
	r, b := &Rule{Capacity: 0, Fill: 1, Interval: 1e9, Step: true, Delay: true}, new(State)
	r.Fresh(b, 0)
	if ok, wait := r.takeOrWait(b, 1, 1); ok || wait != 0 || b.start != 1 {
		t.Errorf("take = %v, %v, with nothing filled up to %d want a refusal without a wait, and no delay", ok, wait, b.start)
	}
}

// A flow that retries after the time of its rejection must get in: rounding must not cost it another wait.
func TestBucketWaitIsEnough(t *testing.T) {
	for _, interval := range []float64{1, 1e6, 1e9, 7e9, 86400e9} {
		for _, fill := range []float64{0.3, 1, 7, 1e6} {
			r := &Rule{Capacity: 10 * fill, Fill: fill, Interval: interval}
			b := new(State)
			now := int64(12345)
			r.Fresh(b, now)
			for range 200 {
				ok, wait := r.takeOrWait(b, now, fill/3)
				if ok {
					continue
				}
				if wait <= 0 {
					t.Fatalf("interval %v, fill %v: wait = %d", interval, fill, wait)
				}
				now += wait
				if ok, again := r.takeOrWait(b, now, fill/3); !ok {
					t.Fatalf("interval %v, fill %v: refused after the wait of %d, for another %d", interval, fill, wait, again)
				}
			}
		}
	}
}

// Fractions whose sums a float cannot hold cost no flow another step.
func TestBucketStepsOfFractions(t *testing.T) {
	for n := range 30 {
		share := 1 / float64(n+1)
		r, b := &Rule{Capacity: 10, Fill: share, Interval: 1e9, Step: true}, new(State)
		r.Fresh(b, 0)
		r.takeOrWait(b, 0, 10)
		for steps := int64(1); steps <= 10; steps++ {
			want := float64(steps) * share
			if ok, wait := r.takeOrWait(b, 0, want); ok || wait != steps*seconds(1) {
				t.Errorf("steps of 1/%d: take(%d of them) = %v, %v want %d s", n+1, steps, ok, time.Duration(wait), steps)
			}
			sum := 0.0
			for range steps {
				sum += share
			}
			if ok, wait := r.takeOrWait(b, 0, sum); ok || wait != steps*seconds(1) {
				t.Errorf("steps of 1/%d: take(the sum of %d) = %v, %v want %d s", n+1, steps, ok, time.Duration(wait), steps)
			}
		}
	}
}

func TestBucketNeverRefills(t *testing.T) {
	r := &Rule{Capacity: 1, Fill: 0, Interval: 1e9}
	b := new(State)
	r.Fresh(b, 0)
	if ok, _ := r.takeOrWait(b, 0, 1); !ok {
		t.Fatal("a fresh bucket refused")
	}
	if ok, wait := r.takeOrWait(b, seconds(1e6), 1); ok || wait != 0 {
		t.Errorf("take = %v, %v want a refusal without a wait", ok, wait)
	}
}

func TestBucketClockStepsBack(t *testing.T) {
	r, b := drained(false, false)
	r.takeOrWait(b, seconds(1), 5)
	before := *b
	if ok, _ := r.takeOrWait(b, seconds(0.5), 1); ok {
		t.Error("an earlier time filled the bucket")
	}
	if *b != before {
		t.Errorf("bucket = %+v want %+v as before", *b, before)
	}
}

func TestBucketGiveBack(t *testing.T) {
	r, b := drained(false, false)
	r.GiveBack(b, 0, 4, 0, false)
	if b.tokens != 4 {
		t.Errorf("tokens = %v want 4", b.tokens)
	}
	r.GiveBack(b, 0, 100, 0, false)
	if b.tokens != r.Capacity {
		t.Errorf("tokens = %v want no more than the capacity", b.tokens)
	}
}

// A bucket that takes longer to fill than a clock can count must not wrap around.
func TestBucketExtremes(t *testing.T) {
	for _, r := range []*Rule{
		{Capacity: 1e300, Fill: 1e-300, Interval: float64(math.MaxInt64)},
		{Capacity: 1e300, Fill: 1e-300, Interval: float64(math.MaxInt64), Step: true, Delay: true},
		{Capacity: math.MaxFloat64, Fill: math.MaxFloat64, Interval: 1},
	} {
		b := new(State)
		r.Fresh(b, 0)
		for now := int64(0); now >= 0 && now < math.MaxInt64/2; now = now*3 + 1 {
			if ok, wait := r.takeOrWait(b, now, r.Capacity); !ok && wait < 0 {
				t.Fatalf("%+v: wait = %d at %d", r, wait, now)
			}
			if math.IsNaN(b.tokens) || b.tokens < 0 || b.tokens > r.Capacity {
				t.Fatalf("%+v: tokens = %v at %d", r, b.tokens, now)
			}
		}
	}
}

// exactBucket is a bucket in exact arithmetic, which counts fills one by one.
type exactBucket struct {
	rule        *Rule
	tokens      *big.Rat
	last, start int64
}

func rat(x float64) *big.Rat { return new(big.Rat).SetFloat64(x) }

func newExactBucket(r *Rule) *exactBucket {
	return &exactBucket{rule: r, tokens: rat(r.Capacity), start: math.MinInt64}
}

func (b *exactBucket) clone() *exactBucket {
	c := *b
	c.tokens = new(big.Rat).Set(b.tokens)
	return &c
}

// at is what it holds then, less the tokens.
func (b *exactBucket) at(now int64, want float64) float64 {
	b.fill(now)
	left, _ := new(big.Rat).Sub(b.tokens, rat(want)).Float64()
	return left
}

func (b *exactBucket) fill(now int64) {
	interval := int64(b.rule.Interval)
	if now > b.start {
		for b.rule.Step && b.last+interval <= now {
			b.add(rat(b.rule.Fill))
			b.last += interval
		}
		if !b.rule.Step && b.last < now {
			b.add(new(big.Rat).Mul(rat(b.rule.Fill), big.NewRat(now-b.last, interval)))
			b.last = now
		}
	}
	if b.rule.Delay && b.tokens.Cmp(rat(b.rule.Capacity)) == 0 {
		fills := math.Ceil(b.rule.Capacity / b.rule.Fill * float64(interval))
		if b.rule.Step {
			fills = math.Ceil(b.rule.Capacity/b.rule.Fill) * float64(interval)
		}
		b.start = now + int64(fills)
		b.last = b.start
		if b.rule.Step {
			b.last -= interval
		}
	}
}

func (b *exactBucket) add(tokens *big.Rat) {
	b.tokens.Add(b.tokens, tokens)
	if capacity := rat(b.rule.Capacity); b.tokens.Cmp(capacity) > 0 {
		b.tokens = capacity
	}
}

// The bucket decides, and returns waits, like one in exact arithmetic.
func TestBucketModel(t *testing.T) {
	const rounding = 1e-6 // tokens, which may decide
	rapid.Check(t, func(t *rapid.T) {
		r := &Rule{
			Capacity: float64(rapid.IntRange(1, 50).Draw(t, "capacity")),
			Fill:     float64(rapid.IntRange(1, 50).Draw(t, "fill")),
			Interval: float64(rapid.SampledFrom([]time.Duration{time.Millisecond, time.Second, 7 * time.Second}).Draw(t, "interval")),
			Step:     rapid.Bool().Draw(t, "step"),
			Delay:    rapid.Bool().Draw(t, "delay"),
		}
		b, exact := new(State), newExactBucket(r)
		r.Fresh(b, 0)
		var now int64
		t.Repeat(map[string]func(*rapid.T){
			"later": func(t *rapid.T) {
				now += int64(r.Interval * rapid.Float64Range(0, 20).Draw(t, "intervals"))
			},
			"take": func(t *rapid.T) {
				want := float64(rapid.IntRange(0, int(2*r.Capacity)).Draw(t, "tokens")) / 2
				ok, wait := r.takeOrWait(b, now, want)
				left := exact.at(now, want)
				if ok != (left >= 0) && math.Abs(left) > rounding {
					t.Fatalf("take(%v) = %v with %v left", want, ok, left)
				}
				if ok {
					exact.tokens.Sub(exact.tokens, rat(want))
					return
				}
				if early := exact.clone().at(now+wait-2, want); early > rounding {
					t.Fatalf("take(%v) waits %v, too long: %v are left before", want, time.Duration(wait), early)
				}
				if then := exact.clone().at(now+wait, want); then < -rounding {
					t.Fatalf("take(%v) waits %v, and then %v are missing", want, time.Duration(wait), -then)
				}
			},
			"give back": func(t *rapid.T) {
				tokens := float64(rapid.IntRange(0, int(r.Capacity)).Draw(t, "tokens"))
				r.GiveBack(b, now, tokens, 0, false)
				exact.add(rat(tokens))
			},
			"": func(t *rapid.T) {
				if got, _ := exact.tokens.Float64(); b.tokens < 0 || b.tokens > r.Capacity || b.last == exact.last && math.Abs(got-b.tokens) > rounding {
					t.Fatalf("%v tokens want %v", b.tokens, got)
				}
			},
		})
	})
}
