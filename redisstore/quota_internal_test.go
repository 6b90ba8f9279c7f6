package redisstore

import (
	"encoding/binary"
	"errors"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/internal/shared"
)

// A calendar has days of a zone with summer time, at a time that the test chooses: that of the server, and an offset.
type calendar struct {
	zone   *time.Location
	offset time.Duration
}

func (c *calendar) day(at time.Time, n int) time.Time {
	y, m, d := at.In(c.zone).Date()
	return time.Date(y, m, d+n, 0, 0, 0, 0, c.zone)
}

func (c *calendar) periods(at time.Time) (bounds [4]time.Time) {
	for i := range bounds {
		bounds[i] = c.day(at.Add(c.offset), i-1).Add(-c.offset)
	}
	return bounds
}

// quotaModel is a quota as package engine/internal/calendar has it.
type quotaModel struct {
	left float64
	over time.Time
}

func (q *quotaModel) renew(r *shared.Rule, now time.Time) {
	if q.over.IsZero() {
		*q = quotaModel{r.Capacity, r.Periods(now)[2]}
	}
	for !now.Before(q.over) && q.left < 0 && r.Capacity > 0 {
		*q = quotaModel{min(q.left+r.Capacity, r.Capacity), r.Periods(q.over)[2]}
	}
	if !now.Before(q.over) {
		*q = quotaModel{min(q.left+r.Capacity, r.Capacity), r.Periods(now)[2]}
	}
}

// In no day of the calendar more than the amount is used, through the changes to and from summer time. Debts are paid by the days that
// begin.
func TestFleetQuotaAndModel(t *testing.T) {
	zone, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip(err)
	}
	h := newHarness(t)
	rapid.Check(t, func(rt *rapid.T) {
		h.tb = rt
		key := shared.Key{Policy: "p", Component: "quota", Label: "run", Value: time.Now().String()}
		begin := rapid.SampledFrom([]string{"2026-03-27T12:00:00Z", "2026-10-24T21:59:59Z", "2026-12-31T22:59:59Z"}).Draw(rt, "begin")
		at, _ := time.Parse(time.RFC3339, begin)
		c := &calendar{zone, time.Until(at).Round(time.Microsecond)}
		rule := &shared.Rule{Kind: shared.Quota, Capacity: 10, Periods: c.periods}
		q := new(quotaModel)
		type taken struct {
			tokens float64
			slot   uint64
		}
		var flows []taken
		amounts := rapid.SampledFrom([]float64{0, 0.5, 1, 3.7, 10, 11, 14})
		moved := 0 // since the state was written
		rt.Repeat(map[string]func(*rapid.T){
			"take": func(rt *rapid.T) {
				tokens := amounts.Draw(rt, "tokens")
				got, now := h.take(shared.Ask{Key: key, Rule: rule, Tokens: tokens})
				is := *q
				is.renew(rule, time.UnixMicro(int64(now)))
				ok := tokens == 0 || is.left-tokens >= -modelSlack
				if ok {
					is.left = max(is.left-tokens, min(is.left, 0))
					flows = append(flows, taken{tokens, got.Slot})
				}
				if got.OK != ok || got.Left != is.left || got.Slot != uint64(is.over.UnixMicro()) {
					rt.Fatalf("Take(%v) = %+v want %v, %v left until %d", tokens, got, ok, is.left, is.over.UnixMicro())
				}
				if ok && tokens > 0 {
					*q, moved = is, 0
				}
				wait := is.over.Sub(time.UnixMicro(int64(now)))
				switch {
				case ok && got.Wait != 0, tokens > 10 && !ok && got.Wait != -1, !ok && tokens <= 10+min(is.left, 0) && got.Wait != wait:
					rt.Fatalf("Take(%v) waits %v, and the day ends in %v", tokens, got.Wait, wait)
				case !ok && tokens <= 10 && got.Wait < wait:
					rt.Fatalf("Take(%v) in debt waits %v, and the day ends in %v", tokens, got.Wait, wait)
				}
			},
			"return": func(rt *rapid.T) {
				if len(flows) == 0 {
					return
				}
				f := flows[len(flows)-1]
				flows = flows[:len(flows)-1]
				r := shared.Return{Key: key, Rule: rule, Slot: f.slot, Tokens: f.tokens, Cost: amounts.Draw(rt, "cost"), Unused: rapid.Bool().Draw(rt, "unused")}
				got, now := h.back(r)
				is := *q
				is.renew(rule, time.UnixMicro(int64(now)))
				back := r.Tokens - r.Cost
				if r.Unused {
					back = r.Tokens
				}
				want := shared.Result{}
				switch {
				case back > 0 && f.slot == uint64(is.over.UnixMicro()):
					is.left = min(is.left+back, 10)
					want.Returned = true
				case back < 0:
					want.Forgiven = max(-10-(is.left+back), 0)
					is.left = max(is.left+back, -10)
				default:
					is = *q
				}
				if is != *q {
					moved = 0
				}
				*q = is
				if got.Returned != want.Returned || math.Abs(got.Forgiven-want.Forgiven) > modelSlack {
					rt.Fatalf("Return(%+v) = %+v want %+v", r, got, want)
				}
			},
			"time": func(rt *rapid.T) {
				if moved++; moved > 1 && q.left < 0 { // many days of debt are counted by their mean length
					return
				}
				by := time.Duration(rapid.Int64Range(1, int64(30*time.Hour)/1000).Draw(rt, "us")) * time.Microsecond
				c.offset += by
				for i := range flows {
					flows[i].slot -= uint64(by.Microseconds())
				}
				if !q.over.IsZero() {
					q.over = q.over.Add(-by)
				}
				value := h.value(key)
				if value == nil {
					return
				}
				for _, at := range []int{2 + 2*8, 2 + 3*8} {
					older := floatAt(value[at:]) - float64(by.Microseconds())
					binary.LittleEndian.PutUint64(value[at:], math.Float64bits(older))
				}
				h.set(key, value)
			},
		})
	})
}

// Where the process's clock is beyond the periods that it has sent, nothing is decided, and the call is made again by the server's
// clock.
func TestFleetQuotaByTheServersClock(t *testing.T) {
	for _, skew := range []time.Duration{-100 * time.Hour, 100 * time.Hour} {
		h := newHarness(t)
		h.single.take.shard().offset.Store(skew.Microseconds())
		c := &calendar{zone: time.UTC}
		rule := &shared.Rule{Kind: shared.Quota, Capacity: 10, Periods: c.periods}
		bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: time.Hour, Step: true}
		asks := []shared.Ask{
			{Key: shared.Key{Policy: "p", Component: "bucket"}, Rule: bucket, Tokens: 1, Owed: 1},
			{Key: shared.Key{Policy: "p", Component: "quota"}, Rule: rule, Tokens: 4, Dry: true},
		}
		answers := make([]shared.Answer, 2)
		if err := h.Take(t.Context(), asks, answers); err != nil || answers[0].Left != 8 || !answers[1].OK || answers[1].Left != 6 {
			t.Errorf("off by %v: Take = %+v, %v want 8 and 6 left", skew, answers, err)
		}
		if end := c.periods(time.Now())[2].UnixMicro(); answers[1].Slot != uint64(end) {
			t.Errorf("off by %v: the period ends at %d want %d", skew, answers[1].Slot, end)
		}
		// What is returned with it does not come back twice.
		h.single.take.shard().offset.Store(skew.Microseconds())
		back := []shared.Return{
			{Key: asks[0].Key, Rule: bucket, Tokens: 1, Unused: true},
			{Key: asks[1].Key, Rule: rule, Slot: answers[1].Slot, Tokens: 4, Unused: true},
		}
		results := make([]shared.Result, 2)
		if err := h.Return(t.Context(), back, results); err != nil || !results[0].Returned || !results[1].Returned {
			t.Errorf("off by %v: Return = %+v, %v", skew, results, err)
		}
		if u, err := h.Look(t.Context(), asks[0].Key, bucket); err != nil || u.Remaining != 9 {
			t.Errorf("off by %v: the bucket has %v, %v want 9", skew, u.Remaining, err)
		}
	}
}

// A call that the server gets when nobody waits for it any more does not count. If only the clocks are apart, it is made again.
func TestFleetLateCall(t *testing.T) {
	h := newHarness(t)
	rule := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: time.Hour, Step: true}
	a := h.asked(shared.Ask{Key: shared.Key{Policy: "p", Component: "c"}, Rule: rule, Tokens: 1, Owed: 3})
	e := new(encoder)
	e.flow([]asked{a}, time.Now(), h.own, func(shared.Holder) time.Duration { return h.lease }, 1)
	keys, arg := e.call(appendFloats(nil, float64(time.Now().Add(-time.Second).UnixMicro())), 1)
	c := &call{asks: []asked{a}}
	reply, err := h.run(t.Context(), h.scripts.take, keys, arg)
	if err != nil || !h.decode(h.single.take.shard(), []*call{c}, reply, time.Now()) || !errors.Is(c.err, errLate) {
		t.Fatalf("reply = %x, %v, and then %v want %v", reply, err, c.err, errLate)
	}
	sh := h.single.take.shard()
	sh.offset.Store(-time.Hour.Microseconds())
	answers := make([]shared.Answer, 1)
	if err := h.Take(t.Context(), []shared.Ask{a.Ask}, answers); err != nil || answers[0].Left != 6 {
		t.Errorf("Take with clocks that are apart = %+v, %v want 6 left: nothing taken by the call that was late", answers, err)
	}
}

// What a newer version has written is neither used nor overwritten. The same goes for what another program has put there.
func TestFleetNewerSchema(t *testing.T) {
	h := newHarness(t)
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: time.Hour}
	quota := &shared.Rule{Kind: shared.Quota, Capacity: 10, Periods: (&calendar{zone: time.UTC}).periods}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 10, MaxInflight: time.Hour}
	other := shared.Ask{Key: shared.Key{Policy: "p", Component: "other"}, Rule: bucket, Tokens: 1}
	for _, tt := range []struct {
		name   string
		rule   *shared.Rule
		change func(n name) []string
	}{
		{"bucket", bucket, func(n name) []string { return []string{"SETRANGE", n.all, "0", "\x02"} }},
		{"quota", quota, func(n name) []string { return []string{"SETRANGE", n.all, "0", "\x02"} }},
		{"slots", slots, func(n name) []string { return []string{"HSET", n.all + suffixSlots, "", "\x02 and more"} }},
		{"a bucket that is text", bucket, func(n name) []string { return []string{"SET", n.all, "\x01text"} }},
		{"slots that are text", slots, func(n name) []string { return []string{"SET", n.all + suffixSlots, "text"} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			key := shared.Key{Policy: "p", Component: tt.name}
			ask := shared.Ask{Key: key, Rule: tt.rule, Tokens: 1}
			answers := make([]shared.Answer, 2)
			if err := h.Take(t.Context(), []shared.Ask{ask}, answers[:1]); err != nil {
				t.Fatal(err)
			}
			n := h.name(key)
			slot := answers[0].Slot
			if err := h.client.Do(t.Context(), h.client.B().Arbitrary(tt.change(n)...).Build()).Error(); err != nil {
				t.Fatal(err)
			}
			dump := func() string {
				text := ""
				for _, k := range []string{n.all, n.all + suffixSlots, n.all + suffixEnds} {
					one, _ := h.client.Do(t.Context(), h.client.B().Dump().Key(k).Build()).ToString()
					text += one + "\n"
				}
				return text
			}
			before := dump()
			if err := h.Take(t.Context(), []shared.Ask{other, ask}, answers); !errors.Is(err, errNewer) {
				t.Errorf("Take = %+v, %v want %v", answers, err, errNewer)
			}
			if _, err := h.Look(t.Context(), key, tt.rule); !errors.Is(err, errNewer) {
				t.Errorf("Look = %v want %v", err, errNewer)
			}
			back := []shared.Return{{Key: key, Rule: tt.rule, Slot: slot, Tokens: 1, Unused: true}}
			if err := h.Return(t.Context(), back, make([]shared.Result, 1)); !errors.Is(err, errNewer) {
				t.Errorf("Return = %v want %v", err, errNewer)
			}
			if after := dump(); after != before {
				t.Errorf("the state was %q and is %q", before, after)
			}
			if u, err := h.Look(t.Context(), other.Key, bucket); err != nil || u.Remaining != 10 {
				t.Errorf("the flow's other bucket has %+v, %v want all tokens", u, err)
			}
		})
	}
}

// A component that has become one of another kind begins anew.
func TestFleetOtherKind(t *testing.T) {
	h := newHarness(t)
	key := shared.Key{Policy: "p", Component: "c"}
	rules := []*shared.Rule{
		{Kind: shared.Bucket, Capacity: 10, Interval: time.Hour},
		{Kind: shared.Quota, Capacity: 10, Periods: (&calendar{zone: time.UTC}).periods},
		{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: time.Hour, Delay: true},
		{Kind: shared.Quota, Capacity: 10, Periods: (&calendar{zone: time.UTC}).periods},
		{Kind: shared.Slots, Capacity: 10, MaxInflight: time.Hour},
		{Kind: shared.Bucket, Capacity: 10, Fill: 1, Interval: time.Hour},
	}
	for i, r := range rules {
		answers := make([]shared.Answer, 1)
		for n := range 2 {
			if err := h.Take(t.Context(), []shared.Ask{{Key: key, Rule: r, Tokens: 4}}, answers); err != nil || !answers[0].OK || math.Abs(answers[0].Left-float64(6-4*n)) > 1 {
				t.Errorf("take %d of component %d = %+v, %v", n+1, i, answers[0], err)
			}
		}
	}
}
