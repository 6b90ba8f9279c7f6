//go:build unix

package redisstore_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// The tests of this file are named after what other limiters that keep their state in Redis get wrong.

// A flood of calls gets what there is, and not one more: no call decides by what it has read before others wrote.
func TestFleetReadThenSet(t *testing.T) {
	server := redistest.Start(t, redistest.Options{})
	for _, tt := range []struct {
		name string
		rule *shared.Rule
	}{
		{"bucket", budget(100)},
		{"slots", slots(100)},
		{"quota", &shared.Rule{Kind: shared.Quota, Capacity: 100, Periods: centuries}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var granted, refused atomic.Int64
			flood(t, server.URL(), func(store *redisstore.Store) {
				answer, err := take(t.Context(), store, tt.rule, tt.name, 1)
				switch {
				case err != nil:
					t.Error(err)
				case answer.OK:
					granted.Add(1)
				default:
					refused.Add(1)
				}
			})
			if granted.Load() != 100 {
				t.Errorf("%d calls of %d got one of 100 tokens", granted.Load(), granted.Load()+refused.Load())
			}
		})
	}
}

// centuries are periods of a quota that do not end while a test lasts.
func centuries(at time.Time) (periods [4]time.Time) {
	first := at.Year() / 100 * 100
	for i := range periods {
		periods[i] = time.Date(first+100*(i-1), 1, 1, 0, 0, 0, 0, time.UTC)
	}
	return periods
}

// flood calls f from 64 goroutines with each of four stores, 10 times each.
func flood(t *testing.T, url string, f func(*redisstore.Store)) {
	t.Helper()
	var calls sync.WaitGroup
	for range 4 {
		store := open(t, url)
		for range 64 {
			calls.Go(func() {
				for range 10 {
					f(store)
				}
			})
		}
	}
	calls.Wait()
}

// Calls on one hot key do not undo each other: each costs the server one command, and none fails.
func TestFleetHotKey(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	rule := budget(1e6)
	var calls atomic.Int64
	server.Text("CONFIG", "RESETSTAT")
	flood(t, server.URL(), func(store *redisstore.Store) {
		calls.Add(1)
		if answer, err := take(t.Context(), store, rule, "hot", 1); err != nil || !answer.OK {
			t.Errorf("Take = %+v, %v want OK", answer, err)
		}
	})
	scripts := ran(t, server, "evalsha") + ran(t, server, "eval")
	t.Logf("%d calls were %d scripts", calls.Load(), scripts)
	if most := calls.Load() + 100; scripts > most { // each store may have to load its scripts, and may renew its lease
		t.Errorf("%d calls were %d scripts want at most %d", calls.Load(), scripts, most)
	}
	if got, want := left(t, open(t, server.URL()), rule, "hot"), float64(1e6-calls.Load()); got != want {
		t.Errorf("%v left want %v", got, want)
	}
}

// Every key has a time to live, whatever call wrote it last, and however often. What never comes back by itself has none.
func TestFleetTimeToLive(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL())
	minute := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 10, Interval: time.Minute, MaxDebt: 100}
	places := &shared.Rule{Kind: shared.Slots, Capacity: 10, MaxInflight: time.Minute}
	month := &shared.Rule{Kind: shared.Quota, Capacity: 10, Periods: centuries}
	for _, tt := range []struct {
		name string
		rule *shared.Rule
	}{{"bucket", minute}, {"slots", places}, {"quota", month}} {
		t.Run(tt.name, func(t *testing.T) {
			for range 3 {
				a := mustTake(t, store, tt.rule, tt.name, 1)
				haveTTL(t, server, "a take")
				b := mustTake(t, store, tt.rule, tt.name, 1)
				haveTTL(t, server, "a take")
				results := make([]shared.Result, 2)
				if err := store.Return(t.Context(), []shared.Return{
					{Key: key(tt.name), Rule: tt.rule, Slot: a.Slot, Tokens: 1, Unused: true},
					{Key: key(tt.name), Rule: tt.rule, Slot: b.Slot, Tokens: 1, Cost: 5},
				}, results); err != nil {
					t.Fatal(err)
				}
				haveTTL(t, server, "a return")
				left(t, store, tt.rule, tt.name)
				haveTTL(t, server, "a look")
				if err := store.Reset(t.Context(), key(tt.name)); err != nil {
					t.Fatal(err)
				}
				haveTTL(t, server, "a reset")
				none := *tt.rule
				none.Capacity = 0
				if answer, err := take(t.Context(), store, &none, tt.name, 1); err != nil || answer.OK {
					t.Fatalf("Take = %+v, %v want a refusal", answer, err)
				}
				haveTTL(t, server, "a refusal")
				if err := store.Reset(t.Context(), key(tt.name)); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	t.Run("cache", func(t *testing.T) {
		if err := store.Set(t.Context(), shared.CacheKey{ControlPoint: "point", Key: "k"}, []byte("v"), time.Minute); err != nil {
			t.Fatal(err)
		}
		haveTTL(t, server, "a value")
	})
	t.Run("comes again", func(t *testing.T) {
		// What a key was has run out, and the next one is as it was.
		short := &shared.Rule{Kind: shared.Bucket, Capacity: 1, Fill: 1, Interval: 10 * time.Millisecond}
		brief := &shared.Rule{Kind: shared.Slots, Capacity: 10, MaxInflight: 10 * time.Millisecond}
		for range 2 {
			mustTake(t, store, short, "short", 1)
			mustTake(t, store, brief, "brief", 1)
			haveTTL(t, server, "a take")
			for _, name := range keysOf(t, server) {
				if strings.Contains(name, "short") || strings.Contains(name, "brief") {
					server.Text("PEXPIRE", name, "0")
				}
			}
		}
	})
	t.Run("never refills", func(t *testing.T) {
		mustTake(t, store, &shared.Rule{Kind: shared.Bucket, Capacity: 10, Interval: time.Second}, "never", 1)
		eternal := 0
		for _, name := range keysOf(t, server) {
			if server.Text("PTTL", name) == "-1" && strings.Contains(name, "never") {
				eternal++
			}
		}
		if eternal != 1 {
			t.Errorf("%d keys of a budget that never refills are kept for ever; want 1", eternal)
		}
	})
}

// keysOf returns all keys of the server.
func keysOf(t *testing.T, server *redistest.Server) []string {
	t.Helper()
	text := server.Text("KEYS", "*")
	if text == "" {
		return nil
	}
	return strings.Split(text, "\n")
}

// haveTTL checks that all keys have a time to live.
func haveTTL(t *testing.T, server *redistest.Server, after string) {
	t.Helper()
	for _, name := range keysOf(t, server) {
		if server.Text("PTTL", name) == "-1" {
			t.Errorf("%s has no time to live after %s", name, after)
		}
	}
}

// A flow whose limiters have several labels is several slots of a cluster. It gets all that it asks for, or nothing.
func TestFleetCrossSlot(t *testing.T) {
	t.Parallel()
	cluster := redistest.StartCluster(t, redistest.Options{})
	store := open(t, cluster.URL())
	rule, places := budget(1000), slots(1000)
	const labels = 12
	asks := make([]shared.Ask, 0, 2*labels)
	for i := range labels {
		k := shared.Key{Policy: "policy", Component: "0", Label: fmt.Sprint("label-", i), Value: "v"}
		asks = append(asks, shared.Ask{Key: k, Rule: rule, Tokens: 1})
		k.Component = "1"
		asks = append(asks, shared.Ask{Key: k, Rule: places, Tokens: 1})
	}
	asks = append(asks, shared.Ask{Key: shared.Key{Policy: "policy", Component: "2"}, Rule: rule, Tokens: 1})
	answers := make([]shared.Answer, len(asks))
	var returns []shared.Return
	for range 10 {
		if err := store.Take(t.Context(), asks, answers); err != nil {
			t.Fatal(err)
		}
		for i, a := range answers {
			if !a.OK {
				t.Fatalf("answer %d = %+v want OK", i, a)
			}
			if a.Slot != 0 {
				returns = append(returns, shared.Return{Key: asks[i].Key, Rule: asks[i].Rule, Slot: a.Slot, Tokens: 1})
			}
		}
	}
	look := func(want float64, when string) {
		t.Helper()
		for _, ask := range asks {
			usage, err := store.Look(t.Context(), ask.Key, ask.Rule)
			if err != nil || usage.Remaining != want {
				t.Errorf("%v left, %v want %v %s", usage.Remaining, err, want, when)
			}
		}
	}
	look(990, "after 10 takes")
	none := map[shared.Kind]*shared.Rule{shared.Bucket: budget(0), shared.Slots: slots(0)}
	for i := range asks {
		// One that is refused, wherever it is, keeps all others from taking.
		refused := slices.Clone(asks)
		refused[i].Rule = none[refused[i].Rule.Kind]
		if err := store.Take(t.Context(), refused, answers); err != nil {
			t.Fatal(err)
		}
		if answers[i].OK {
			t.Errorf("answer %d = %+v want a refusal", i, answers[i])
		}
	}
	// What another server had granted is given back, at the latest by a moment after the answer.
	eventually(t, "return of what other servers granted", func() bool {
		for _, ask := range asks {
			if usage, err := store.Look(t.Context(), ask.Key, ask.Rule); err != nil || usage.Remaining != 990 {
				return false
			}
		}
		return true
	})
	if err := store.Return(t.Context(), returns, make([]shared.Result, len(returns))); err != nil {
		t.Error(err)
	}
	for _, ask := range asks {
		if usage, err := store.Look(t.Context(), ask.Key, ask.Rule); ask.Rule == places && (err != nil || usage.InFlight != 0) {
			t.Errorf("%+v, %v after all slots were returned", usage, err)
		}
	}
}

// Scripts read and write only keys that the call declares, and the arguments tell no process's time.
func TestFleetDeclaredKeys(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	log := redistest.StartMonitor(t, server)
	store := open(t, server.URL(), redisstore.WithLease(time.Second))
	minute := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Fill: 10, Interval: time.Minute, MaxDebt: 100}
	places := &shared.Rule{Kind: shared.Slots, Capacity: 10, MaxInflight: time.Minute}
	for range 5 {
		asks := []shared.Ask{
			{Key: key("u"), Rule: minute, Tokens: 3, Owed: 1},
			{Key: shared.Key{Policy: "policy", Component: "1", Label: "user", Value: "u"}, Rule: places, Tokens: 1},
			{Key: shared.Key{Policy: "policy", Component: "2", Label: "user", Value: "u"}, Rule: minute, Tokens: 1, Dry: true},
			{Key: shared.Key{Policy: "policy", Component: "3"}, Rule: places, Tokens: 1, Holder: shared.Holder{1}},
		}
		answers := make([]shared.Answer, len(asks))
		if err := store.Take(t.Context(), asks, answers); err != nil {
			t.Fatal(err)
		}
		store.Renew(shared.Holder{1}, time.Minute)
		returns := make([]shared.Return, len(asks))
		for i, ask := range asks {
			returns[i] = shared.Return{Key: ask.Key, Rule: ask.Rule, Slot: answers[i].Slot, Tokens: ask.Tokens, Cost: 1}
		}
		if err := store.Return(t.Context(), returns, make([]shared.Result, len(returns))); err != nil {
			t.Fatal(err)
		}
		left(t, store, minute, "u")
		if err := store.Reset(t.Context(), key("u")); err != nil {
			t.Fatal(err)
		}
		for component, rule := range map[string]*shared.Rule{"queue": minute, "places": places} {
			d := &shared.Drawing{
				Key: shared.Key{Policy: "policy", Component: component, Label: "user", Value: "u"}, Rule: rule, Owed: 1,
				Waiting: []shared.Waiting{{Workload: "a", Weight: 1, Costs: []float64{1, 2}}, {Workload: "b", Weight: 2, Costs: []float64{3}}},
			}
			drawn, err := store.Draw(t.Context(), d)
			if err != nil || len(drawn.Grants) == 0 {
				t.Fatalf("Draw = %+v, %v want grants", drawn, err)
			}
			if _, err := store.Draw(t.Context(), &shared.Drawing{Key: d.Key, Rule: rule, Unneeded: drawn.Grants}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := store.Move(t.Context(), shared.Key{Policy: "policy", Component: "ramp"}, 0, &shared.Position{Direction: 1}); err != nil {
			t.Fatal(err)
		}
	}
	renewed := time.Now()
	eventually(t, "renewal of leases", func() bool { return time.Since(renewed) > time.Second })
	commands := log.Commands()
	var declared []string
	scripts, inside := 0, 0
	now := time.Now()
	for _, c := range commands {
		name := strings.ToLower(c.Args[0])
		if !c.Lua {
			for _, arg := range c.Args {
				if n, err := strconv.ParseFloat(arg, 64); err == nil {
					for _, unit := range []time.Duration{time.Second, time.Millisecond, time.Microsecond, time.Nanosecond} {
						if at := float64(now.UnixNano()) / float64(unit); n > 0.99*at && n < 1.01*at {
							t.Errorf("%s tells the server the time of this process: %s", name, arg)
						}
					}
				}
			}
		}
		switch {
		case name == "evalsha" || name == "eval":
			n, err := strconv.Atoi(c.Args[2])
			if err != nil {
				t.Fatal(err)
			}
			scripts++
			declared = c.Args[3 : 3+n]
		case c.Lua && len(c.Args) > 1:
			inside++
			if !slices.Contains(declared, c.Args[1]) && name != "publish" && name != "spublish" {
				t.Errorf("a script runs %q, and declares %q", c.Args, declared)
			}
		}
	}
	if scripts == 0 || inside == 0 {
		t.Errorf("%d scripts with %d commands were seen", scripts, inside)
	}
}

// The keys of one component spread over a cluster's servers.
func TestFleetHotShard(t *testing.T) {
	t.Parallel()
	cluster := redistest.StartCluster(t, redistest.Options{})
	store := open(t, cluster.URL())
	rule := budget(10)
	const users = 600
	for i := range users {
		mustTake(t, store, rule, fmt.Sprint("user-", i), 1)
	}
	for _, server := range cluster.Servers {
		n, err := strconv.Atoi(server.Text("DBSIZE"))
		if err != nil || n < users/5 {
			t.Errorf("%d of %d keys, %v at one of three servers", n, users, err)
		}
	}
}

// A server that may evict a limit's state, or forgets it when it ends, is in the log.
func TestFleetEviction(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options redistest.Options
		warned  []string
	}{
		{"as it should be", redistest.Options{AOF: true}, nil},
		{"in memory", redistest.Options{}, []string{"append"}},
		{"evicts", redistest.Options{AOF: true, Args: []string{"--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru"}}, []string{"allkeys-lru"}},
		{"evicts what has a time to live", redistest.Options{AOF: true, Args: []string{"--maxmemory", "1gb", "--maxmemory-policy", "volatile-ttl"}}, []string{"volatile-ttl"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := redistest.Start(t, tt.options)
			var log bytes.Buffer
			open(t, server.URL(), redisstore.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
			if got := strings.Count(log.String(), "level=WARN"); got != len(tt.warned) {
				t.Errorf("%d warnings want %d:\n%s", got, len(tt.warned), &log)
			}
			for _, want := range tt.warned {
				if !strings.Contains(log.String(), want) {
					t.Errorf("no warning has %q:\n%s", want, &log)
				}
			}
		})
	}
}

// Parts of tokens are not lost: what is taken, left, owed and returned has all its digits.
func TestFleetFractions(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL())
	rule := budget(10)
	if got := mustTake(t, store, rule, "u", 3.7); got.Left < 6.3-1e-9 || got.Left > 6.3+1e-6 {
		t.Errorf("%v left of 10 after 3.7 were taken", got.Left)
	}
	if answer, err := take(t.Context(), store, rule, "u", 6.4); err != nil || answer.OK {
		t.Errorf("Take = %+v, %v of 6.4 where 6.3 are left", answer, err)
	}
	mustTake(t, store, rule, "u", 0.05)
	results := make([]shared.Result, 1)
	if err := store.Return(t.Context(), []shared.Return{{Key: key("u"), Rule: rule, Tokens: 3.7, Cost: 1.2}}, results); err != nil {
		t.Fatal(err)
	}
	if got := left(t, store, rule, "u"); got < 8.75-1e-6 || got > 8.75+1e-6 {
		t.Errorf("%v left want 8.75", got)
	}
	places := slots(1)
	mustTake(t, store, places, "slots", 0.7)
	if got := mustTake(t, store, places, "slots", 0.3).Left; got < -1e-9 || got > 1e-9 {
		t.Errorf("%v left of 1 slot after 0.7 and 0.3", got)
	}
	if answer, err := take(t.Context(), store, places, "slots", 0.1); err != nil || answer.OK {
		t.Errorf("Take = %+v, %v of slots that are taken", answer, err)
	}
	if got := mustTake(t, store, &shared.Rule{Kind: shared.Bucket, Capacity: 1e15, Interval: time.Hour}, "large", 0.5).Left; got != 1e15-0.5 {
		t.Errorf("%v left want %v", got, 1e15-0.5)
	}
}
