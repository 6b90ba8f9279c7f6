package engine

import (
	"math"
	"testing"
	"time"
)

func seconds(s float64) int64 { return int64(s * 1e9) }

// drained is a rule of capacity 10 and 5 tokens a second, and a bucket of it that was emptied at 0.
func drained(step, delay bool) (*bucketRule, *bucket) {
	r := &bucketRule{capacity: 10, fill: 5, interval: 1e9, step: step, delay: delay}
	b := new(bucket)
	r.fresh(b, 0)
	r.take(b, 0, 10)
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
		{name: "delayed step", step: true, delay: true, at: 0, want: 1, wait: 3},
		{name: "more than it holds", at: 0, want: 11, wait: 0},
		{name: "nothing", at: 0, want: 0, ok: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, b := drained(tt.step, tt.delay)
			ok, wait := r.take(b, seconds(tt.at), tt.want)
			if ok != tt.ok || math.Abs(float64(wait)-tt.wait*1e9) > 2 {
				t.Errorf("take(%v) at %v = %v, %v want %v, %vs", tt.want, tt.at, ok, time.Duration(wait), tt.ok, tt.wait)
			}
		})
	}
}

// Who retries when it was told to must get in: rounding must not cost it another round.
func TestBucketWaitIsEnough(t *testing.T) {
	for _, interval := range []float64{1, 1e6, 1e9, 7e9, 86400e9} {
		for _, fill := range []float64{0.3, 1, 7, 1e6} {
			r := &bucketRule{capacity: 10 * fill, fill: fill, interval: interval}
			b := new(bucket)
			now := int64(12345)
			r.fresh(b, now)
			for range 200 {
				ok, wait := r.take(b, now, fill/3)
				if ok {
					continue
				}
				if wait <= 0 {
					t.Fatalf("interval %v, fill %v: wait = %d", interval, fill, wait)
				}
				now += wait
				if ok, again := r.take(b, now, fill/3); !ok {
					t.Fatalf("interval %v, fill %v: refused after the wait of %d, for another %d", interval, fill, wait, again)
				}
			}
		}
	}
}

func TestBucketNeverRefills(t *testing.T) {
	r := &bucketRule{capacity: 1, fill: 0, interval: 1e9}
	b := new(bucket)
	r.fresh(b, 0)
	if ok, _ := r.take(b, 0, 1); !ok {
		t.Fatal("a fresh bucket refused")
	}
	if ok, wait := r.take(b, seconds(1e6), 1); ok || wait != 0 {
		t.Errorf("take = %v, %v want a refusal without a wait", ok, wait)
	}
}

func TestBucketClockStepsBack(t *testing.T) {
	r, b := drained(false, false)
	r.take(b, seconds(1), 5)
	before := *b
	if ok, _ := r.take(b, seconds(0.5), 1); ok {
		t.Error("an earlier time filled the bucket")
	}
	if *b != before {
		t.Errorf("bucket = %+v want %+v as before", *b, before)
	}
}

func TestBucketGiveBack(t *testing.T) {
	r, b := drained(false, false)
	r.giveBack(b, 4)
	if b.tokens != 4 {
		t.Errorf("tokens = %v want 4", b.tokens)
	}
	r.giveBack(b, 100)
	if b.tokens != r.capacity {
		t.Errorf("tokens = %v want no more than the capacity", b.tokens)
	}
}

// A bucket that takes longer to fill than a clock can count must not wrap around.
func TestBucketExtremes(t *testing.T) {
	for _, r := range []*bucketRule{
		{capacity: 1e300, fill: 1e-300, interval: float64(math.MaxInt64)},
		{capacity: 1e300, fill: 1e-300, interval: float64(math.MaxInt64), step: true, delay: true},
		{capacity: math.MaxFloat64, fill: math.MaxFloat64, interval: 1},
	} {
		b := new(bucket)
		r.fresh(b, 0)
		for now := int64(0); now >= 0 && now < math.MaxInt64/2; now = now*3 + 1 {
			if ok, wait := r.take(b, now, r.capacity); !ok && wait < 0 {
				t.Fatalf("%+v: wait = %d at %d", r, wait, now)
			}
			if math.IsNaN(b.tokens) || b.tokens < 0 || b.tokens > r.capacity {
				t.Fatalf("%+v: tokens = %v at %d", r, b.tokens, now)
			}
		}
	}
}
