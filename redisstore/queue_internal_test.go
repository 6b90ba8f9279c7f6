package redisstore

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/ledger"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// A queueModel does what queue.lua does, in memory.
type queueModel struct {
	rule   *shared.Rule
	ledger ledger.Ledger

	tokens    float64 // of a bucket
	last, now float64 // in microseconds

	slots map[uint64]float64
	held  float64
}

func (m *queueModel) at(now float64) {
	m.now = now
	if m.rule.Kind == shared.Slots {
		m.held = m.ledger.Boxed()
		for _, tokens := range m.slots {
			m.held += tokens
		}
		return
	}
	if now > m.last {
		m.tokens = min(m.tokens+m.rule.Fill*((now-m.last)*1000)/float64(m.rule.Interval), m.rule.Capacity)
		m.last = now
	}
	if m.tokens >= m.rule.Capacity-1e-9 {
		m.tokens = m.rule.Capacity
	}
}

func (m *queueModel) time() time.Duration { return time.Duration(m.now * 1000) }

func (m *queueModel) Take(cost float64) bool {
	if m.rule.Kind == shared.Slots {
		if m.rule.Capacity-m.held > 1e-9 || m.held <= 1e-9 {
			m.held += cost
			return true
		}
		return false
	}
	if m.tokens-cost < -1e-9 {
		return false
	}
	m.tokens = max(m.tokens-cost, 0)
	return true
}

func (m *queueModel) Never(cost float64) bool {
	return m.rule.Kind == shared.Bucket && cost > m.rule.Capacity+1e-9
}

func (m *queueModel) Return(tokens float64) {
	if m.rule.Kind == shared.Slots {
		m.held -= tokens
		return
	}
	m.tokens = min(m.tokens+tokens, m.rule.Capacity)
}

func (m *queueModel) Until(tokens float64) time.Duration {
	if m.rule.Kind == shared.Slots {
		return 0
	}
	us := math.Ceil(math.Ceil((tokens-m.tokens)/m.rule.Fill*float64(m.rule.Interval)) / 1000)
	return time.Duration(max(us, 1)) * time.Microsecond
}

func (m *queueModel) giveBack(r shared.Return) shared.Result {
	tokens, ok := m.slots[r.Slot]
	switch {
	case m.rule.Kind == shared.Slots:
		m.held -= tokens
		delete(m.slots, r.Slot)
		return shared.Result{Returned: ok}
	case r.Unused || r.Cost < r.Tokens:
		back := r.Tokens - r.Cost
		if r.Unused {
			back = r.Tokens
		}
		m.Return(back)
		return shared.Result{Returned: true}
	}
	left := m.tokens - (r.Cost - r.Tokens)
	to := max(left, min(m.tokens, -m.rule.Capacity))
	m.tokens = to
	return shared.Result{Forgiven: to - left}
}

// The script and the model hand out the same, step by step.
func TestFleetQueueAndModel(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{server.Addr()}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	q := queueTester{client: client}
	for _, tt := range []struct {
		name string
		rule shared.Rule
	}{
		{"bucket", shared.Rule{Kind: shared.Bucket, Capacity: 20, Fill: 5, Interval: 3 * time.Millisecond}},
		{"slow bucket", shared.Rule{Kind: shared.Bucket, Capacity: 70, Fill: 7, Interval: time.Second}},
		{"slots", shared.Rule{Kind: shared.Slots, Capacity: 5, MaxInflight: time.Hour}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q.script = rueidis.NewLuaScript(newScript(queueLua).text)
			if tt.rule.Kind == shared.Bucket {
				q.script = rueidis.NewLuaScript(newBucketScript(queueLua).text)
			}
			for seed := range uint64(60) {
				q.compare(t, seed, tt.rule)
			}
		})
	}
}

type queueTester struct {
	client rueidis.Client
	script *rueidis.Lua
}

func (q *queueTester) compare(t *testing.T, seed uint64, rule shared.Rule) {
	const lives = 8 * time.Millisecond
	rng := rand.New(rand.NewPCG(seed, 1))
	pick := func(of ...float64) float64 { return of[rng.IntN(len(of))] }
	n := name{"{tag}", fmt.Sprintf("{tag}:%d/%d", rule.Kind, time.Now().UnixNano())}
	keys := queueKeys(n, rule.Kind, "{tag}#l")
	m := &queueModel{rule: &rule, ledger: ledger.Ledger{Lives: lives}, tokens: rule.Capacity, slots: make(map[uint64]float64)}
	run := func(arg []byte) []byte {
		reply, err := q.script.Exec(t.Context(), q.client, keys, []string{string(arg)}).AsBytes()
		if err != nil {
			t.Fatal(err)
		}
		return reply
	}
	messages := make(chan string, 1000)
	subscribed, cancel := q.client.Dedicate()
	defer cancel()
	subscribed.SetPubSubHooks(rueidis.PubSubHooks{OnMessage: func(m rueidis.PubSubMessage) { messages <- m.Channel }})
	if err := subscribed.Do(t.Context(), subscribed.B().Psubscribe().Pattern("wake:*").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	var woken []string
	exact := true // up to now, the two have told instances the same times
	spare := make(map[int][]shared.Grant)
	for step := range 50 {
		at := fmt.Sprintf("seed %d, step %d", seed, step)
		switch rng.IntN(8) {
		case 0:
			<-time.After(time.Duration(rng.IntN(5)) * time.Millisecond)
		case 1:
			r := shared.Return{Rule: &rule, Tokens: pick(1, 3), Cost: pick(0, 1, 5, 40), Unused: rng.IntN(2) == 0, Slot: 1}
			for id := range m.slots {
				r.Slot = id
			}
			reply := run(encodeQueued(&rule, "wake:", []returned{{Return: r}}))
			results := make([]shared.Result, 1)
			if err := decodeQueued(reply, results); err != nil {
				t.Fatalf("%s: %v", at, err)
			}
			m.at(floatAt(reply))
			want := m.giveBack(r)
			m.ledger.Serve(m.time(), m)
			if results[0].Returned != want.Returned || math.Abs(results[0].Forgiven-want.Forgiven) > 1e-6 {
				t.Fatalf("%s: returned %+v want %+v", at, results[0], want)
			}
		default:
			instance := rng.IntN(4)
			d := &shared.Drawing{Rule: &rule, Once: rng.IntN(8) == 0, Unneeded: spare[instance]}
			if rng.IntN(10) == 0 {
				d.Owed = pick(1, 30)
			}
			delete(spare, instance)
			names := 5
			if seed%3 == 0 {
				names = 90
			}
			for range rng.IntN(4) * (1 + names/10) {
				w := shared.Waiting{Workload: fmt.Sprint(rng.IntN(names)), Weight: pick(1, 3, 1e-6, 1e6)}
				if slices.ContainsFunc(d.Waiting, func(o shared.Waiting) bool { return o.Workload == w.Workload }) {
					continue
				}
				for range rng.IntN(36) {
					w.Costs = append(w.Costs, pick(1, 1, 1, 0.1, 3, 90))
				}
				d.Waiting = append(d.Waiting, w)
			}
			c := newDrawing(d, n)
			own := shared.Holder{byte(instance + 'a')}
			reply := run(c.encode(0, "wake:", own, lives, func(shared.Holder) time.Duration { return time.Hour }))
			got, _, _, err := c.decode(reply)
			if err != nil {
				t.Fatalf("%s: %v", at, err)
			}
			m.at(floatAt(reply))
			if rule.Kind == shared.Bucket && d.Owed > 0 {
				m.giveBack(shared.Return{Cost: d.Owed})
			}
			for _, g := range d.Unneeded {
				for i, tokens := range g.Tokens {
					if rule.Kind == shared.Slots {
						m.giveBack(shared.Return{Slot: g.Slots[i]})
					} else {
						m.Return(tokens)
					}
				}
			}
			grants, next := m.ledger.Draw(m.time(), string(own[:]), d.Waiting, d.Once, m)
			woken = append(woken, m.ledger.Woken()...)
			for i, g := range got.Grants {
				if g.Slots != nil {
					if i >= len(grants) || len(g.Slots) != len(g.Tokens) {
						t.Fatalf("%s: %d slots for %d flows", at, len(g.Slots), len(g.Tokens))
					}
					for j, id := range g.Slots {
						m.slots[id] = g.Tokens[j]
					}
					got.Grants[i].Slots = nil
					g.Slots = slices.Clone(g.Slots)
				}
				if rng.IntN(5) == 0 {
					spare[instance] = append(spare[instance], g)
				}
			}
			left := m.tokens
			if rule.Kind == shared.Slots {
				left = rule.Capacity - m.held
			}
			exact = exact && got.Next == next
			// A call that changes nothing writes nothing, so the two round differently.
			if !reflect.DeepEqual(got.Grants, grants) || (got.Next-next).Abs() > 2*time.Microsecond || math.Abs(got.Left-left) > 1e-6 {
				t.Fatalf("%s: got %v, next %v, left %v want %v, %v, %v", at, got.Grants, got.Next, got.Left, grants, next, left)
			}
		}
		woken = append(woken, m.ledger.Woken()...)
	}
	if err := q.client.Do(t.Context(), q.client.B().Publish().Channel("wake:").Message("").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	var heard []string
	for m := range messages {
		if m == "wake:" {
			break
		}
		heard = append(heard, m[len("wake:"):])
	}
	if exact && !slices.Equal(heard, woken) { // else one may have found an instance just early enough to be woken
		t.Fatalf("seed %d: %q were woken want %q", seed, heard, woken)
	}
}
