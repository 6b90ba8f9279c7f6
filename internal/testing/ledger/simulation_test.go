package ledger

import (
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// A bucket fills continuously. It begins empty, so that no burst hides what it does later.
type bucket struct {
	capacity, rate float64 // tokens a second
	tokens         float64
	last           time.Time
}

func (b *bucket) refill() {
	now := time.Now()
	b.tokens = min(b.tokens+now.Sub(b.last).Seconds()*b.rate, b.capacity)
	b.last = now
}

func (b *bucket) Take(cost float64) bool {
	if b.tokens < cost-slack {
		return false
	}
	b.tokens = max(b.tokens-cost, 0)
	return true
}

func (b *bucket) Never(cost float64) bool { return cost > b.capacity }

func (b *bucket) Return(tokens float64) { b.tokens = min(b.tokens+tokens, b.capacity) }

func (b *bucket) Until(tokens float64) time.Duration {
	return time.Duration(math.Ceil((tokens - b.tokens) / b.rate * 1e9))
}

// A stream is flows of one workload that come to one instance.
type stream struct {
	instance int
	workload string
	weight   float64
	cost     float64       // 1 if it is 0
	keep     int           // so many flows wait at any time
	every    time.Duration // or a flow comes so often
	from, to time.Duration // 0: all the time
}

type scenario struct {
	name           string
	capacity, rate float64
	instances      int
	streams        []stream
	die            time.Duration      // when the first instance ends without a word; 0 for never
	want           map[string]float64 // shares in points of what is handed out
}

// everywhere is a workload that always waits at some instances, from the first up to before the last.
func everywhere(first, last int, workload string, weight float64, keep int) (all []stream) {
	for i := first; i < last; i++ {
		all = append(all, stream{instance: i, workload: workload, weight: weight, keep: keep})
	}
	return all
}

func join(all ...[]stream) (joined []stream) {
	for _, s := range all {
		joined = append(joined, s...)
	}
	return joined
}

const (
	far    = time.Millisecond / 2 // one way to the store
	warm   = time.Second          // before anything is measured
	lasts  = 21 * time.Second
	points = 100.0
)

var scenarios = []scenario{
	{
		name: "both at both", capacity: 20, rate: 200, instances: 2,
		streams: join(everywhere(0, 2, "a", 1, 50), everywhere(0, 2, "b", 3, 50)),
		want:    map[string]float64{"a": 25, "b": 75},
	}, {
		name: "each at one of its own", capacity: 20, rate: 200, instances: 2,
		streams: join(everywhere(0, 1, "a", 1, 50), everywhere(1, 2, "b", 3, 50)),
		want:    map[string]float64{"a": 25, "b": 75},
	}, {
		name: "each at one of its own, fast", capacity: 200, rate: 2000, instances: 2,
		streams: join(everywhere(0, 1, "a", 1, 50), everywhere(1, 2, "b", 3, 50)),
		want:    map[string]float64{"a": 25, "b": 75},
	}, {
		name: "each at one of its own, slow", capacity: 5, rate: 20, instances: 2,
		streams: join(everywhere(0, 1, "a", 1, 50), everywhere(1, 2, "b", 3, 50)),
		want:    map[string]float64{"a": 25, "b": 75},
	}, {
		name: "the small at one of eight", capacity: 50, rate: 1000, instances: 8,
		streams: join(everywhere(0, 1, "a", 3, 50), everywhere(1, 8, "b", 1, 50)),
		want:    map[string]float64{"a": 75, "b": 25},
	}, {
		name: "both at all eight", capacity: 50, rate: 1000, instances: 8,
		streams: join(everywhere(0, 8, "a", 1, 50), everywhere(0, 8, "b", 3, 50)),
		want:    map[string]float64{"a": 25, "b": 75},
	}, {
		name: "three over four", capacity: 40, rate: 400, instances: 4,
		streams: join(everywhere(0, 2, "a", 1, 50), everywhere(1, 3, "b", 2, 50), everywhere(2, 4, "c", 5, 50)),
		want:    map[string]float64{"a": 12.5, "b": 25, "c": 62.5},
	}, {
		name: "costs that differ", capacity: 50, rate: 500, instances: 3,
		streams: []stream{
			{instance: 0, workload: "a", weight: 1, cost: 5, keep: 50},
			{instance: 1, workload: "a", weight: 1, cost: 5, keep: 50},
			{instance: 1, workload: "b", weight: 1, keep: 50},
			{instance: 2, workload: "b", weight: 1, keep: 50},
		},
		want: map[string]float64{"a": 50, "b": 50},
	}, {
		name: "one that wants less than its share", capacity: 20, rate: 200, instances: 3,
		streams: join([]stream{{instance: 0, workload: "a", weight: 3, every: 50 * time.Millisecond}}, everywhere(1, 3, "b", 1, 50)),
		want:    map[string]float64{"a": 10, "b": 90},
	}, {
		name: "few callers that come back at once", capacity: 30, rate: 300, instances: 4,
		streams: join(everywhere(0, 2, "a", 1, 3), everywhere(2, 4, "b", 3, 3)),
		want:    map[string]float64{"a": 25, "b": 75},
	}, {
		name: "far apart", capacity: 20, rate: 500, instances: 4,
		streams: join(everywhere(0, 1, "a", 1, 50), everywhere(1, 4, "b", 99, 50)),
		want:    map[string]float64{"a": 1, "b": 99},
	}, {
		name: "one that comes and goes", capacity: 20, rate: 200, instances: 2,
		streams: join([]stream{{instance: 0, workload: "a", weight: 1, keep: 50, from: 6 * time.Second, to: 16 * time.Second}},
			everywhere(1, 2, "b", 3, 50)),
		want: map[string]float64{"a": 13.75, "b": 86.25}, // half of the time, and the 50 that wait then
	}, {
		name: "a bucket of three", capacity: 3, rate: 300, instances: 5,
		streams: join(everywhere(0, 3, "a", 1, 50), everywhere(3, 5, "b", 1, 50)),
		want:    map[string]float64{"a": 50, "b": 50},
	}, {
		name: "one that dies with a full box", capacity: 20, rate: 200, instances: 3, die: 9 * time.Second,
		streams: join(everywhere(0, 1, "b", 3, 50), everywhere(1, 2, "a", 1, 50), everywhere(2, 3, "b", 3, 50)),
		want:    map[string]float64{"a": 25, "b": 75},
	},
}

// A fleet runs a scenario.
type fleet struct {
	scenario

	mu     sync.Mutex
	bucket bucket
	ledger Ledger

	calls, flows int
	got          map[string]float64
	began        time.Time
}

func (f *fleet) at() time.Duration { return time.Since(f.began) }

func (f *fleet) measured() bool { return f.at() >= warm }

// A process is one instance: what waits there, by workload.
type process struct {
	*fleet
	number  int
	waiting map[string][]float64
	weights map[string]float64
	order   []string
	comes   chan struct{} // a flow has come
}

func (p *process) come(s stream) {
	cost := s.cost
	if cost == 0 {
		cost = 1
	}
	if _, ok := p.weights[s.workload]; !ok {
		p.weights[s.workload] = s.weight
		p.order = append(p.order, s.workload)
	}
	p.waiting[s.workload] = append(p.waiting[s.workload], cost)
}

// top adds flows of those that always wait.
func (p *process) top() {
	for _, s := range p.streams {
		if s.instance != p.number || p.at() < s.from || s.to > 0 && p.at() >= s.to {
			continue
		}
		for len(p.waiting[s.workload]) < s.keep {
			p.come(s)
		}
	}
}

// run draws as an engine does: at the next known time, no more often than pace.
func (p *process) run() {
	pace := min(5*time.Millisecond, time.Duration(p.capacity/p.rate/4*1e9))
	for p.at() < lasts && (p.die == 0 || p.number > 0 || p.at() < p.die) {
		p.mu.Lock()
		p.top()
		var waiting []shared.Waiting
		listed := make(map[string]bool)
		for _, name := range p.order {
			if n := len(p.waiting[name]); n > 0 {
				waiting = append(waiting, shared.Waiting{Workload: name, Weight: p.weights[name], Costs: p.waiting[name][:min(n, MaxFlows)]})
				listed[name] = true
			}
		}
		p.mu.Unlock()
		if len(waiting) == 0 {
			select {
			case <-p.comes:
			case <-time.After(50 * time.Millisecond): // perhaps others always wait from then on
			}
			continue
		}
		<-time.After(far)
		p.mu.Lock()
		p.bucket.refill()
		grants, next := p.ledger.Draw(time.Duration(time.Now().UnixNano()), fmt.Sprint(p.number), waiting, false, &p.bucket)
		p.mu.Unlock()
		<-time.After(far)
		p.mu.Lock()
		if p.measured() {
			p.calls++
		}
		short := false // of flows that are listed
		for _, g := range grants {
			short = short || len(g.Tokens) == MaxFlows && len(p.waiting[g.Workload]) > MaxFlows
			p.waiting[g.Workload] = p.waiting[g.Workload][len(g.Tokens):]
			for _, tokens := range g.Tokens {
				if p.measured() {
					p.flows++
					p.got[g.Workload] += tokens
				}
			}
		}
		p.mu.Unlock()
		if short {
			continue
		}
		wait := time.After(max(pace, min(next, TTL/2)))
		paced := time.After(pace)
		for again := true; again; {
			select {
			case <-wait:
				again = false
			case <-p.comes:
				p.mu.Lock()
				for name, flows := range p.waiting {
					again = again && (len(flows) == 0 || listed[name])
				}
				p.mu.Unlock()
				if !again {
					<-paced
				}
			}
		}
	}
}

func (f *fleet) run(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f.began, f.got = time.Now(), make(map[string]float64)
		f.bucket = bucket{capacity: f.capacity, rate: f.rate, last: f.began}
		var all sync.WaitGroup
		for i := range f.instances {
			p := &process{fleet: f, number: i, waiting: make(map[string][]float64), weights: make(map[string]float64), comes: make(chan struct{}, 1)}
			all.Go(func() {
				<-time.After(time.Duration(i) * 137 * time.Microsecond)
				p.run()
			})
			for _, s := range f.streams {
				if s.instance != i || s.every == 0 {
					continue
				}
				all.Go(func() {
					for f.at() < lasts {
						<-time.After(s.every)
						f.mu.Lock()
						p.come(s)
						f.mu.Unlock()
						select {
						case p.comes <- struct{}{}:
						default:
						}
					}
				})
			}
		}
		all.Wait()
	})
}

// measure runs a scenario, and returns how many points its shares are off at the most, its use in points of what comes, and its
// calls a flow.
func measure(t *testing.T, of scenario) (off, use, calls float64) {
	f := fleet{scenario: of}
	f.run(t)
	sum := 0.0
	for _, tokens := range f.got {
		sum += tokens
	}
	for name, want := range of.want {
		off = max(off, math.Abs(f.got[name]/sum*points-want))
	}
	use, calls = sum/(of.rate*(lasts-warm).Seconds())*points, float64(f.calls)/float64(f.flows)
	t.Logf("shares off by %.2f points, use %.2f %%, %.2f calls a flow", off, use, calls)
	return off, use, calls
}

// Shares by priority hold for the whole.
func TestShares(t *testing.T) {
	for _, tt := range scenarios {
		t.Run(tt.name, func(t *testing.T) {
			if off, use, calls := measure(t, tt); off > 0.2 || use < 98 || calls > 2 {
				t.Errorf("want shares off by at most 0.2 points, a use of at least 98 %%, and at most 2 calls a flow")
			}
		})
	}
}

// Where the shares or the use fall. What is worse than this is a fault.
func TestLimits(t *testing.T) {
	for _, tt := range []struct {
		scenario
		off, use float64
	}{
		{scenario{ // a call can be no sooner than the bucket is full
			name: "a bucket of less than comes in a round trip", capacity: 2, rate: 2000, instances: 2,
			streams: join(everywhere(0, 1, "a", 1, 50), everywhere(1, 2, "b", 3, 50)),
			want:    map[string]float64{"a": 25, "b": 75},
		}, 1, 75},
		{scenario{ // nothing is known of the others of its workload until the next call
			name: "more between two calls than is listed", capacity: 4000, rate: 40_000, instances: 2,
			streams: join(everywhere(0, 1, "a", 1, 500), everywhere(1, 2, "b", 3, 500)),
			want:    map[string]float64{"a": 25, "b": 75},
		}, 26, 98},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if off, use, _ := measure(t, tt.scenario); off > tt.off || use < tt.use {
				t.Errorf("want shares off by at most %v points, and a use of at least %v %%", tt.off, tt.use)
			}
		})
	}
}
