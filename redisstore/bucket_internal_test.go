package redisstore

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/redis/rueidis"
	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// A bucketModel is a bucket as package engine/internal/bucket has it, in the server's unit of time, with what the store adds: what a smaller
// capacity has forgiven is owed again when the capacity grows, and a refusal does not change the state.
type bucketModel struct {
	tokens, excess, last, start float64
	rule                        *shared.Rule // nil for a key without a state
}

// Where a bucket's value has what. The last two are there if they are needed.
const (
	atTokens = 2
	atLast   = 10
	atExcess = 42
	atStart  = 50
)

const (
	modelSlack   = 1e-9
	modelCentury = 3153600000 * 1e6
)

func interval(r *shared.Rule) float64 { return float64(r.Interval) }

func timeToFill(r *shared.Rule, tokens float64) float64 {
	if r.Fill == 0 || tokens == 0 {
		return 0
	}
	fills := tokens / r.Fill
	if r.Step {
		fills = math.Ceil(tokens / min(r.Fill, r.Capacity))
	}
	return min(math.Ceil(math.Ceil(fills*interval(r))/1000), modelCentury)
}

func (m *bucketModel) refill(r *shared.Rule, now float64) {
	if now > m.start && now > m.last {
		elapsed := (now - m.last) * 1000
		if r.Step {
			steps := math.Floor(elapsed / interval(r))
			m.tokens += steps * r.Fill
			m.last += min(steps*interval(r)/1000, modelCentury)
		} else {
			m.tokens += r.Fill * elapsed / interval(r)
			m.last = now
		}
		if m.tokens > r.Capacity {
			m.excess = max(m.excess-(m.tokens-r.Capacity), 0)
			m.tokens = r.Capacity
		}
	}
	if m.tokens >= r.Capacity-modelSlack {
		m.tokens = max(m.tokens, r.Capacity)
	}
	if r.Delay && m.tokens >= r.Capacity {
		m.start = now + timeToFill(r, r.Capacity)
		m.last = m.start
		if r.Step {
			m.last -= interval(r) / 1000
		}
	}
}

func (m *bucketModel) until(r *shared.Rule, now, tokens float64) float64 {
	missing := tokens - m.tokens
	if missing <= modelSlack {
		return 0
	}
	debt := 0.0
	if r.Step {
		missing -= modelSlack / 2
		if m.tokens < 0 && r.Fill > r.Capacity {
			steps := math.Ceil(-m.tokens / r.Fill)
			debt = min(steps*interval(r)/1000, modelCentury)
			missing = tokens - min(m.tokens+steps*r.Fill, r.Capacity) - modelSlack/2
		}
	}
	wait := m.last - now + debt + timeToFill(r, max(missing, 0))
	if now <= m.start {
		wait = max(wait, m.start-now+1)
	}
	return wait
}

// needed returns how long the state is needed from now on.
func (m *bucketModel) needed(now float64) float64 {
	if m.rule.Fill == 0 {
		return math.Inf(1)
	}
	return max(m.last, m.start, now) - now + timeToFill(m.rule, max(m.rule.Capacity-m.tokens, 0)+m.excess)
}

// load brings the model up to now, by the numbers of the rule. They have been in force for so long.
func (m *bucketModel) load(r *shared.Rule, now, since float64) (differs bool) {
	if m.rule == nil {
		*m = bucketModel{tokens: r.Capacity, last: now, start: math.Inf(-1), rule: r}
		m.refill(r, now)
		return false
	}
	was := m.rule
	if *modelNumbers(was) == *modelNumbers(r) {
		m.refill(r, now)
		return false
	}
	changed := max(now-since, min(m.last, now))
	m.refill(was, changed)
	used := base(r) - (base(was) - m.tokens)
	balance := max(used, min(m.tokens, 0))
	if balance > used {
		m.excess += balance - used
	} else if balance > m.tokens {
		paid := min(m.excess, balance-m.tokens)
		balance, m.excess = balance-paid, m.excess-paid
	}
	m.tokens = min(balance, r.Capacity)
	switch {
	case r.Delay && m.start > changed:
		m.start = min(m.start, changed+timeToFill(r, r.Capacity))
		m.last = m.start
		if r.Step {
			m.last -= interval(r) / 1000
		}
	case r.Step && r.Interval < was.Interval:
		m.last = max(m.last, changed)
	}
	m.rule = r
	m.refill(r, now)
	return true
}

type numbers struct {
	capacity, base, fill float64
	interval             time.Duration
	step, delay          bool
}

func modelNumbers(r *shared.Rule) *numbers {
	return &numbers{r.Capacity, base(r), r.Fill, r.Interval, r.Step, r.Delay}
}

func (m *bucketModel) owe(debt, lowest float64) (forgiven float64) {
	left := m.tokens - debt
	m.tokens = max(left, min(m.tokens, lowest))
	return m.tokens - left
}

// take does what an ask does, and returns the answer. The state stays as it was if nothing changes it but the time.
func (m *bucketModel) take(a *shared.Ask, now float64, instances float64) shared.Answer {
	r := a.Rule
	is := *m
	answer := shared.Answer{Differs: is.load(r, now, float64(a.Since.Microseconds()))}
	changed := answer.Differs
	if a.Owed > 0 {
		is.owe(a.Owed, lowest(r))
		changed = true
	}
	answer.Left = is.tokens
	answer.OK = a.Tokens == 0 || is.tokens-a.Tokens >= -modelSlack
	wait := 0.0
	if !answer.OK {
		if wait = -1; a.Tokens <= r.Capacity && r.Fill > 0 {
			wait = max(is.until(r, now, a.Tokens), 1)
		}
	}
	if answer.OK && a.Tokens > 0 {
		is.tokens = max(is.tokens-a.Tokens, 0)
		answer.Left = is.tokens
		changed = true
	}
	after := 0.0
	if a.Ahead > 0 || a.Reserve > 0 {
		if answer.OK {
			answer.Drawn = min(a.Ahead, max(is.tokens, 0)/2/instances)
		}
		if a.Reserve > answer.Drawn && r.Fill > 0 {
			answer.Drawn = min(a.Reserve, max(is.tokens+r.Capacity/2, answer.Drawn))
		}
		if answer.Drawn < a.Tokens {
			answer.Drawn = 0
		}
		if answer.Drawn > 0 {
			after = is.until(r, now, answer.Drawn)
			is.tokens -= answer.Drawn
			answer.Left = is.tokens
			changed = true
		}
	}
	answer.Wait, answer.After = micros(wait), micros(after)
	if changed {
		*m = is
	}
	return answer
}

func (m *bucketModel) giveBack(b *shared.Return, now float64) (result shared.Result) {
	is := *m
	is.load(b.Rule, now, 0)
	back := b.Tokens - b.Cost
	if b.Unused {
		back = b.Tokens
	}
	switch {
	case back > 0:
		tokens := is.tokens + back
		is.excess = max(is.excess-max(tokens-b.Rule.Capacity, 0), 0)
		is.tokens = min(tokens, b.Rule.Capacity)
		result.Returned = true
	case back < 0:
		result.Forgiven = is.owe(-back, lowest(b.Rule))
	default:
		return result
	}
	*m = is
	return result
}

// A failer is a test, or one run of a property.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// harness runs scripts one by one, and knows at which time they ran.
type harness struct {
	tb failer
	*Store

	taking *script
}

func newHarness(tb testing.TB) *harness {
	tb.Helper()
	client, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: []string{redistest.Start(tb, redistest.Options{}).Addr()}, ForceSingleClient: true, DisableCache: true, AlwaysPipelining: true,
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(client.Close)
	s, err := New(client, WithTimeout(5*time.Second))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return &harness{tb, s, s.scripts.take}
}

func (h *harness) send(sc *script, c *call, head []byte) (now float64) {
	h.tb.Helper()
	e := new(encoder)
	at := h.serverTime(h.single.take.shard(), time.Now())
	n := len(c.returns)
	if c.asks != nil {
		e.flow(c.asks, at, h.own, func(shared.Holder) time.Duration { return h.lease }, 2)
		n = 1
	}
	for i := range c.returns {
		e.giveBack(&c.returns[i], at)
	}
	keys, arg := e.call(head, n)
	reply, err := h.run(context.Background(), sc, keys, arg)
	if err != nil {
		h.tb.Fatal(err)
	}
	if !h.decode(h.single.take.shard(), []*call{c}, reply, time.Now()) || c.err != nil {
		h.tb.Fatalf("reply %x: %v", reply, c.err)
	}
	return floatAt(reply)
}

func (h *harness) take(a shared.Ask) (answer shared.Answer, now float64) {
	h.tb.Helper()
	c := &call{asks: []asked{h.asked(a)}}
	now = h.send(h.taking, c, appendFloats(nil, 0))
	return c.answers[0], now
}

func (h *harness) back(r shared.Return) (result shared.Result, now float64) {
	h.tb.Helper()
	c := &call{returns: []returned{{r, h.name(r.Key)}}}
	now = h.send(h.scripts.giveBack, c, nil)
	return c.results[0], now
}

// value returns the bucket of a key as the server keeps it.
func (h *harness) value(key shared.Key) []byte {
	h.tb.Helper()
	value, err := h.client.Do(context.Background(), h.client.B().Get().Key(h.name(key).all).Build()).AsBytes()
	if err != nil && !rueidis.IsRedisNil(err) {
		h.tb.Fatal(err)
	}
	return value
}

func (h *harness) set(key shared.Key, value []byte) {
	h.tb.Helper()
	command := h.client.B().Set().Key(h.name(key).all).Value(rueidis.BinaryString(value)).Keepttl().Build()
	if err := h.client.Do(context.Background(), command).Error(); err != nil {
		h.tb.Fatal(err)
	}
}

// expires checks that the key expires after the bucket is full, or never if the bucket does not fill. It returns how long after.
func (h *harness) expires(key shared.Key, m *bucketModel) (after time.Duration) {
	h.tb.Helper()
	now := time.Now() // the server's clock, too: it is on this machine
	ms, err := h.client.Do(context.Background(), h.client.B().Pttl().Key(h.name(key).all).Build()).AsInt64()
	if err != nil {
		h.tb.Fatal(err)
	}
	if m.rule.Fill == 0 {
		if ms != -1 {
			h.tb.Fatalf("the key of a bucket that does not fill expires in %d ms", ms)
		}
		return 0
	}
	needed := m.needed(float64(now.UnixMicro()))
	after = time.Duration(ms)*time.Millisecond + time.Since(now) - time.Duration(needed)*time.Microsecond
	if ms < 0 || after < 0 {
		h.tb.Fatalf("the key expires in %d ms, and %+v is needed for %v ms", ms, *m, needed/1000)
	}
	return after
}

// age has the key's state be older, as if the time had passed.
func (h *harness) age(key shared.Key, by time.Duration, m *bucketModel) {
	h.tb.Helper()
	value := h.value(key)
	if value == nil {
		return
	}
	for _, at := range []int{atLast, atStart} {
		if at >= len(value) {
			continue
		}
		older := floatAt(value[at:]) - float64(by.Microseconds())
		binary.LittleEndian.PutUint64(value[at:], math.Float64bits(older))
	}
	h.set(key, value)
	m.last -= float64(by.Microseconds())
	m.start -= float64(by.Microseconds())
}

// The bucket of the script and the model are the same, bit for bit, whatever flows take, owe, draw, return and settle, at whatever
// times, and whoever changes the numbers.
func TestFleetBucketAndModel(t *testing.T) {
	h := newHarness(t)
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		h.tb = rt
		run++
		key := shared.Key{Policy: "p", Component: "c", Label: "run", Value: string(rune('a'+run%26)) + time.Now().String()}
		amounts := rapid.SampledFrom([]float64{0, 0.1, 0.5, 1, 2, 3.7, 5, 10, 1000})
		drawRule := func(rt *rapid.T) *shared.Rule {
			return &shared.Rule{
				Kind:     shared.Bucket,
				Capacity: rapid.SampledFrom([]float64{0.5, 1, 5, 10, 64}).Draw(rt, "capacity"),
				Fill:     rapid.SampledFrom([]float64{0, 0.3, 1, 7, 100}).Draw(rt, "fill"),
				Interval: rapid.SampledFrom([]time.Duration{time.Millisecond, 7 * time.Millisecond, time.Second, time.Hour}).Draw(rt, "interval"),
				Step:     rapid.Bool().Draw(rt, "step"),
				Delay:    rapid.Bool().Draw(rt, "delay"),
				MaxDebt:  rapid.SampledFrom([]float64{0, -1, 2.5}).Draw(rt, "debt"),
				Base:     rapid.SampledFrom([]float64{0, 0, 20}).Draw(rt, "base"),
			}
		}
		rule := drawRule(rt)
		m := new(bucketModel)
		rt.Repeat(map[string]func(*rapid.T){
			"take": func(rt *rapid.T) {
				a := shared.Ask{Key: key, Rule: rule, Tokens: amounts.Draw(rt, "tokens")}
				if rapid.IntRange(0, 3).Draw(rt, "extra") == 0 {
					a.Owed, a.Ahead, a.Reserve = amounts.Draw(rt, "owed"), amounts.Draw(rt, "ahead"), amounts.Draw(rt, "reserve")
				}
				if rapid.Bool().Draw(rt, "known") {
					a.Since = time.Duration(rapid.Int64Range(1, int64(2*time.Hour)/1000).Draw(rt, "since")) * time.Microsecond
				}
				h.taking = rapid.SampledFrom([]*script{h.scripts.take, h.scripts.takeTokens}).Draw(rt, "script")
				got, now := h.take(a)
				if want := m.take(&a, now, 2); got != want {
					rt.Fatalf("Take(%+v) by %+v = %+v want %+v", a, rule, got, want)
				}
			},
			"return": func(rt *rapid.T) {
				r := shared.Return{Key: key, Rule: rule, Tokens: amounts.Draw(rt, "tokens"), Cost: amounts.Draw(rt, "cost"), Unused: rapid.Bool().Draw(rt, "unused")}
				got, now := h.back(r)
				if want := m.giveBack(&r, now); got != want {
					rt.Fatalf("Return(%+v) by %+v = %+v want %+v", r, rule, got, want)
				}
			},
			"numbers": func(rt *rapid.T) { rule = drawRule(rt) },
			"time": func(rt *rapid.T) {
				h.age(key, time.Duration(rapid.Int64Range(1, int64(3*time.Hour)/1000).Draw(rt, "us"))*time.Microsecond, m)
			},
			"": func(rt *rapid.T) {
				value := h.value(key)
				if value == nil { // it was forgotten since it was full
					*m = bucketModel{}
					return
				}
				got := bucketModel{tokens: floatAt(value[atTokens:]), last: floatAt(value[atLast:]), start: math.Inf(-1), rule: m.rule}
				if len(value) > atExcess {
					got.excess, got.start = floatAt(value[atExcess:]), floatAt(value[atStart:])
				}
				if got != *m {
					rt.Fatalf("the state is %+v want %+v", got, *m)
				}
				h.expires(key, m)
			},
		})
	})
}

// A key expires soon after its bucket is full, whichever script writes it, and whether that changes the expiry or not.
func TestFleetBucketExpires(t *testing.T) {
	h := newHarness(t)
	for name, taking := range map[string]*script{"take": h.scripts.take, "take tokens": h.scripts.takeTokens} {
		for _, tt := range []struct {
			name string
			rule shared.Rule
		}{
			{"fills in a moment", shared.Rule{Capacity: 1e9, Fill: 1e9, Interval: time.Second}},
			{"fills in minutes", shared.Rule{Capacity: 1000, Fill: 1, Interval: time.Second}},
			{"fills in centuries", shared.Rule{Capacity: 1e9, Fill: 1e-300, Interval: time.Hour}},
			{"does not fill", shared.Rule{Capacity: 1000, Interval: time.Second}},
		} {
			t.Run(name+", "+tt.name, func(t *testing.T) {
				h.tb, h.taking = t, taking
				key, rule := shared.Key{Policy: "p", Component: tt.name, Label: "by", Value: name}, tt.rule
				rule.Kind = shared.Bucket
				m := new(bucketModel)
				const most = 8*time.Second + 10*time.Millisecond
				for i, tokens := range []float64{1, 0.01, 0.01, 1, 0, 2, 3, 4, 20, 0.1, 200, 2000, 1} {
					a := shared.Ask{Key: key, Rule: &rule, Tokens: tokens}
					_, now := h.take(a)
					m.take(&a, now, 1)
					if after := h.expires(key, m); after > most {
						t.Errorf("after take %d the key expires %v after the bucket is full", i+1, after)
					}
				}
				r := shared.Return{Key: key, Rule: &rule, Tokens: 200, Unused: true}
				_, now := h.back(r)
				m.giveBack(&r, now)
				if after := h.expires(key, m); after > most {
					t.Errorf("after a return the key expires %v after the bucket is full", after)
				}
			})
		}
	}
}

// A call about several flows decides about one after the other. It is the same for a script that decides about all of them as plain ones,
// and for one that finds on the way that some are not.
func TestFleetFlowsOfACall(t *testing.T) {
	h := newHarness(t)
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		h.tb = rt
		run++
		rules := []*shared.Rule{
			{Kind: shared.Bucket, Capacity: 5, Interval: time.Hour},
			{Kind: shared.Bucket, Capacity: 9, Interval: time.Hour},
			{Kind: shared.Bucket, Capacity: 7, Interval: time.Hour, Step: true}, // it is not plain
		}
		var left [4]float64
		kinds := rapid.SliceOfN(rapid.SampledFrom([]int{0, 0, 1, 2}), len(left), len(left)).Draw(rt, "rules")
		for i, kind := range kinds {
			left[i] = rules[kind].Capacity
		}
		for range rapid.IntRange(1, 3).Draw(rt, "calls") {
			e := newEncoder()
			var calls []*call
			var want []shared.Answer
			for range rapid.IntRange(1, 9).Draw(rt, "flows") {
				keys := rapid.SliceOfNDistinct(rapid.IntRange(0, len(left)-1), 1, 3, rapid.ID).Draw(rt, "keys")
				c := &call{}
				refused := false
				for _, k := range keys {
					a := shared.Ask{Key: shared.Key{Policy: "p", Component: fmt.Sprint(k), Label: "run", Value: fmt.Sprint(run)}, Rule: rules[kinds[k]], Tokens: float64(rapid.IntRange(0, 3).Draw(rt, "tokens"))}
					a.Since = rapid.SampledFrom([]time.Duration{0, time.Second}).Draw(rt, "since")
					c.asks = append(c.asks, h.asked(a))
					refused = refused || a.Tokens > left[k]
				}
				for i, k := range keys {
					tokens := c.asks[i].Tokens
					answer := shared.Answer{OK: tokens <= left[k] || tokens == 0}
					if !answer.OK {
						answer.Wait = -1
					}
					if !refused {
						left[k] -= tokens
					}
					answer.Left = left[k]
					want = append(want, answer)
				}
				e.flow(c.asks, time.Now(), h.own, nil, 1)
				calls = append(calls, c)
			}
			keys, arg := e.call(appendFloats(nil, 0), len(calls))
			sc := rapid.SampledFrom([]*script{h.scripts.take, h.scripts.takeTokens}).Draw(rt, "script")
			reply, err := h.run(t.Context(), sc, keys, arg)
			if err != nil || !h.decode(h.single.take.shard(), calls, reply, time.Now()) {
				rt.Fatalf("reply %x, %v", reply, err)
			}
			var got []shared.Answer
			for _, c := range calls {
				got = append(got, c.answers...)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				rt.Fatalf("answers (-want +got):\n%s", diff)
			}
		}
	})
}
