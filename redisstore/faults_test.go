//go:build unix

package redisstore_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// patient is a bound that only a hang reaches, for calls that are to succeed on a slow machine.
const patient = 30 * time.Second

// open opens a store for a test.
func open(t *testing.T, url string, opts ...redisstore.Option) *redisstore.Store {
	t.Helper()
	store, err := redisstore.Open(t.Context(), url, append([]redisstore.Option{redisstore.WithTimeout(patient)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}

// key returns the key of a user.
func key(user string) shared.Key {
	return shared.Key{Policy: "policy", Component: "0", Label: "user", Value: user}
}

// budget is a bucket that does not refill.
func budget(capacity float64) *shared.Rule {
	return &shared.Rule{Kind: shared.Bucket, Capacity: capacity, Interval: time.Hour}
}

// slots are so many, which do not run out while a test lasts.
func slots(n float64) *shared.Rule {
	return &shared.Rule{Kind: shared.Slots, Capacity: n, MaxInflight: time.Hour}
}

// take takes tokens of a user's key.
func take(ctx context.Context, store *redisstore.Store, rule *shared.Rule, user string, tokens float64) (shared.Answer, error) {
	answers := make([]shared.Answer, 1)
	err := store.Take(ctx, []shared.Ask{{Key: key(user), Rule: rule, Tokens: tokens}}, answers)
	return answers[0], err
}

// mustTake takes tokens that are there.
func mustTake(t *testing.T, store *redisstore.Store, rule *shared.Rule, user string, tokens float64) shared.Answer {
	t.Helper()
	answer, err := take(t.Context(), store, rule, user, tokens)
	if err != nil || !answer.OK {
		t.Fatalf("Take = %+v, %v want OK", answer, err)
	}
	return answer
}

// giveBack returns a slot, and reports whether it was held.
func giveBack(t *testing.T, store *redisstore.Store, rule *shared.Rule, user string, slot uint64) bool {
	t.Helper()
	results := make([]shared.Result, 1)
	if err := store.Return(t.Context(), []shared.Return{{Key: key(user), Rule: rule, Slot: slot, Tokens: 1}}, results); err != nil {
		t.Fatal(err)
	}
	return results[0].Returned
}

// left returns what is left of a user's key.
func left(t *testing.T, store *redisstore.Store, rule *shared.Rule, user string) float64 {
	t.Helper()
	usage, err := store.Look(t.Context(), key(user), rule)
	if err != nil {
		t.Fatal(err)
	}
	return usage.Remaining
}

// works waits until a take succeeds, and returns how many were asked for. All that fail must be errors.
func works(t *testing.T, store *redisstore.Store, rule *shared.Rule, user string) (asked int) {
	t.Helper()
	eventually(t, "take that succeeds", func() bool {
		asked++
		answer, err := take(t.Context(), store, rule, user, 1)
		if err == nil && !answer.OK {
			t.Fatalf("take %d was refused", asked)
		}
		return err == nil
	})
	return asked
}

// A server that is stopped costs a few calls their bound, and the others nothing. What was taken meanwhile is counted.
func TestFleetServerStopped(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	const bound = 50 * time.Millisecond
	store := open(t, server.URL(), redisstore.WithTimeout(bound))
	other := open(t, server.URL())
	rule := budget(1e6)
	granted := works(t, store, rule, "u")
	before := left(t, other, rule, "u")

	server.Stop()
	const flows = 20_000
	var slow, down int
	begin := time.Now()
	var longest time.Duration
	for range flows {
		begin := time.Now()
		answer, err := take(t.Context(), store, rule, "u", 1)
		took := time.Since(begin)
		if err == nil {
			t.Fatalf("Take = %+v of a server that is stopped", answer)
		}
		longest = max(longest, took)
		if errors.Is(err, shared.ErrDown) {
			down++
		} else {
			slow++
		}
	}
	took := time.Since(begin)
	t.Logf("%d flows in %v while the server was stopped: %d waited for it, the longest for %v; %d did not, after %v in the mean",
		flows, took.Round(time.Millisecond), slow, longest.Round(time.Microsecond), down, (took-time.Duration(slow)*bound)/flows)
	// One probe a second, after those that found the silence.
	if most := 40 + int(took/time.Second); slow > most {
		t.Errorf("%d of %d calls waited for a server that is stopped; want at most %d", slow, flows, most)
	}
	if !store.Down() {
		t.Error("the store is not down")
	}

	server.Continue()
	granted += works(t, store, rule, "u")
	eventually(t, "store that is up", func() bool { return !store.Down() })
	// Each that waited may have counted, and none twice.
	if after := left(t, other, rule, "u"); after > before-1 || after < before-float64(slow+1)-float64(granted) {
		t.Errorf("%v tokens are left of %v after %d calls that failed and %d that did not", after, before, slow, granted)
	}
}

// A server that was killed comes back with what it had, where it writes it down, and without its scripts.
func TestFleetServerKilled(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		aof  bool
		left float64
	}{
		{"AOF", true, 6},
		{"in memory", false, 9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, redistest.Options{AOF: tt.aof})
			store := open(t, server.URL())
			rule := budget(10)
			for range 3 {
				mustTake(t, store, rule, "u", 1)
			}
			server.Kill()
			ctx, stop := context.WithTimeout(t.Context(), time.Second)
			defer stop()
			if answer, err := take(ctx, store, rule, "u", 1); err == nil {
				t.Errorf("Take = %+v of a server that was killed", answer)
			}
			server.Restart()
			works(t, store, rule, "u")
			if got := left(t, store, rule, "u"); got != tt.left {
				t.Errorf("%v left want %v", got, tt.left)
			}
		})
	}
}

// asInstance is the URL of the store of which this test's process holds slots.
const asInstance = "HEADGATE_TEST_INSTANCE"

// lease is that of instances that are killed or stopped.
const lease = 2 * time.Second

// holdSlots takes three slots, and keeps them until standard input ends. Then it gives them back, and prints how many it held still.
func holdSlots(t *testing.T, url string) {
	t.Helper()
	store := open(t, url, redisstore.WithLease(lease))
	rule := slots(3)
	var held []uint64
	for range 3 {
		held = append(held, mustTake(t, store, rule, "u", 1).Slot)
	}
	fmt.Println("holds all")
	_, _ = os.Stdin.Read(make([]byte, 1))
	returned := 0
	for _, slot := range held {
		if giveBack(t, store, rule, "u", slot) {
			returned++
		}
	}
	fmt.Printf("returned %d.\n", returned)
	fmt.Printf("kept %v.\n", time.Now().Before(store.Kept()))
}

// The slots of an instance that is gone, or cut off, are free when its lease has run out, and not before. An instance that comes back
// does not free the slots that others have then.
func TestFleetInstanceGone(t *testing.T) {
	if url := os.Getenv(asInstance); url != "" {
		holdSlots(t, url)
		return
	}
	t.Parallel()
	for _, tt := range []struct {
		name string
		gone func(*os.Process) error
		back func(*os.Process) error
	}{
		{"killed", (*os.Process).Kill, nil},
		{"stopped", redistest.StopProcess, redistest.ContinueProcess},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, redistest.Options{})
			store := open(t, server.URL(), redisstore.WithLease(lease))
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestFleetInstanceGone$")
			cmd.Env = append(os.Environ(), asInstance+"="+server.URL())
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out := new(lines)
			cmd.Stdout, cmd.Stderr = out, os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			defer func() {
				if ended != nil {
					_ = cmd.Process.Kill()
					if err := <-ended; err == nil {
						t.Error("an instance that was killed ended well")
					}
				}
			}()
			eventually(t, "instance that holds slots", func() bool { return strings.Contains(out.String(), "holds all") })

			// While the instance lives its slots are held, for longer than a lease.
			rule := slots(3)
			for end := time.Now().Add(2 * lease); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
				if answer, err := take(t.Context(), store, rule, "u", 1); err != nil || answer.OK {
					t.Fatalf("Take = %+v, %v while an instance holds all slots", answer, err)
				}
			}
			if err := tt.gone(cmd.Process); err != nil {
				t.Fatal(err)
			}
			gone := time.Now()
			var mine []uint64
			eventually(t, "slot that is free", func() bool {
				answer, err := take(t.Context(), store, rule, "u", 1)
				if err != nil {
					t.Fatal(err)
				}
				if answer.OK {
					mine = append(mine, answer.Slot)
				}
				return answer.OK
			})
			t.Logf("slots are free %v after the instance was %s; its lease is %v", time.Since(gone).Round(time.Millisecond), tt.name, lease)
			for range 2 {
				mine = append(mine, mustTake(t, store, rule, "u", 1).Slot)
			}
			if tt.back != nil {
				if err := tt.back(cmd.Process); err != nil {
					t.Fatal(err)
				}
				if err := in.Close(); err != nil {
					t.Fatal(err)
				}
				if err := <-ended; err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				ended = nil
				if !strings.Contains(out.String(), "returned 0.") {
					t.Errorf("an instance has freed slots of another:\n%s", out)
				}
			}
			for _, slot := range mine {
				if !giveBack(t, store, rule, "u", slot) {
					t.Error("a slot is not held any more")
				}
			}
		})
	}
}

// lines are what a process prints.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// After FLUSHALL limits begin anew, and slots that are taken then are kept for longer than a lease.
func TestFleetFlushAll(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL(), redisstore.WithLease(lease))
	other := open(t, server.URL())
	rule, places := budget(2), slots(1)
	mustTake(t, store, rule, "u", 2)
	lost := mustTake(t, store, places, "slots", 1).Slot

	server.Text("FLUSHALL")
	mustTake(t, store, rule, "u", 2)
	slot := mustTake(t, store, places, "slots", 1).Slot
	if giveBack(t, store, places, "slots", lost) {
		t.Error("a slot that was lost was returned")
	}
	for end := time.Now().Add(2 * lease); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
		if answer, err := take(t.Context(), other, places, "slots", 1); err != nil || answer.OK {
			t.Fatalf("Take = %+v, %v while the slot is held", answer, err)
		}
	}
	if !time.Now().Before(store.Kept()) {
		t.Error("the slot is not kept")
	}
	if !giveBack(t, store, places, "slots", slot) {
		t.Error("the slot is not held any more")
	}
}

// A server that has forgotten its scripts gets them again, and no call notices.
func TestFleetScriptFlush(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL())
	rule, places := budget(10), slots(10)
	for i := range 5 {
		mustTake(t, store, rule, "u", 1)
		slot := mustTake(t, store, places, "slots", 1).Slot
		server.Text("SCRIPT", "FLUSH")
		if got, want := left(t, store, rule, "u"), float64(9-i); got != want {
			t.Errorf("%v left want %v", got, want)
		}
		server.Text("SCRIPT", "FLUSH")
		if !giveBack(t, store, places, "slots", slot) {
			t.Error("the slot was not held")
		}
		server.Text("SCRIPT", "FLUSH")
	}
}

// A failover costs calls for a while. What the replica had is kept, and its missing scripts are no error.
func TestFleetFailover(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		gone func(*redistest.Server)
	}{
		{"killed", (*redistest.Server).Kill},
		{"stopped", (*redistest.Server).Stop},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			servers := redistest.StartReplicated(t, redistest.Options{Password: "p"}, 1)
			store := open(t, servers.URL(), redisstore.WithTimeout(time.Second), redisstore.WithLease(time.Minute))
			rule, places := budget(10), slots(1)
			mustTake(t, store, rule, "u", 3)
			slot := mustTake(t, store, places, "slots", 1).Slot
			servers.InStep()
			primary, _ := servers.Primary()
			tt.gone(primary)
			if answer, err := take(t.Context(), store, rule, "u", 1); err == nil {
				t.Errorf("Take = %+v of a primary that was %s", answer, tt.name)
			}
			servers.Failover(primary)
			begin := time.Now()
			works(t, store, rule, "u")
			t.Logf("works again %v after the failover", time.Since(begin).Round(time.Millisecond))
			if got := left(t, store, rule, "u"); got != 6 {
				t.Errorf("%v left want 6", got)
			}
			if answer, err := take(t.Context(), store, places, "slots", 1); err != nil || answer.OK {
				t.Errorf("Take = %+v, %v while the slot is held", answer, err)
			}
			if !giveBack(t, store, places, "slots", slot) {
				t.Error("the slot is not held any more")
			}
		})
	}
}

// The keys of a slot that moves in a cluster move with what they have. While it moves, calls may fail, and take nothing twice.
func TestFleetMovedSlot(t *testing.T) {
	t.Parallel()
	cluster := redistest.StartCluster(t, redistest.Options{})
	store := open(t, cluster.URL(), redisstore.WithTimeout(time.Second), redisstore.WithLease(lease))
	rule, places := budget(1000), slots(1)
	mustTake(t, store, rule, "u", 1)
	held := shared.Key{Policy: "policy", Component: "1", Label: "user", Value: "u"}
	answers := make([]shared.Answer, 1)
	if err := store.Take(t.Context(), []shared.Ask{{Key: held, Rule: places, Tokens: 1}}, answers); err != nil || !answers[0].OK {
		t.Fatalf("Take = %+v, %v want OK", answers, err)
	}
	from, slot := tagSlot(t, cluster, "{headgate:user=u}")
	took := 1
	attempt := func(when string) {
		t.Helper()
		answer, err := take(t.Context(), store, rule, "u", 1)
		switch {
		case err == nil && answer.OK:
			took++
		case err == nil:
			t.Errorf("Take = %+v %s", answer, when)
		default:
			t.Logf("%s: %v", when, err)
		}
	}
	m := cluster.Begin(slot, cluster.Other(from))
	attempt("before the first key has moved")
	for m.Key() {
		attempt("when a key has moved")
	}
	attempt("when all keys have moved")
	m.End()
	took++
	if asked := works(t, store, rule, "u"); asked > 1 {
		t.Logf("%d calls failed after the slot had moved", asked-1)
	}
	// A call that failed has taken nothing here: a refusal by the server is no time-out.
	if got, want := left(t, store, rule, "u"), float64(1000-took); got != want {
		t.Errorf("%v left want %v", got, want)
	}
	// The lease of the slot's holder has moved, or is there again.
	for end := time.Now().Add(2 * lease); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
		var again [1]shared.Answer
		if err := store.Take(t.Context(), []shared.Ask{{Key: held, Rule: places, Tokens: 1}}, again[:]); err != nil || again[0].OK {
			t.Fatalf("Take = %+v, %v while the slot is held", again, err)
		}
	}
}

// tagSlot returns the slot of a hash tag, and the server that has it.
func tagSlot(t *testing.T, cluster *redistest.Cluster, tag string) (*redistest.Server, int) {
	t.Helper()
	slot := cluster.Slot(tag)
	server := cluster.Owner(slot)
	if server.Text("CLUSTER", "COUNTKEYSINSLOT", fmt.Sprint(slot)) == "0" {
		t.Fatalf("no key has the tag %s", tag)
	}
	return server, slot
}

// A server in a cluster that is gone costs the keys that it had, and no others. Slots at the others are kept.
func TestFleetShardGone(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		gone func(*redistest.Server)
		back func(*redistest.Server)
	}{
		{"stopped", (*redistest.Server).Stop, (*redistest.Server).Continue},
		{"killed", (*redistest.Server).Kill, (*redistest.Server).Restart},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cluster := redistest.StartCluster(t, redistest.Options{AOF: true})
			store := open(t, cluster.URL(), redisstore.WithTimeout(time.Second), redisstore.WithLease(lease))
			other := open(t, cluster.URL())
			rule, places := budget(1000), slots(1)
			byServer := map[*redistest.Server]string{} // a user of each
			for i := 0; len(byServer) < len(cluster.Servers); i++ {
				user := fmt.Sprint("user-", i)
				mustTake(t, store, rule, user, 1)
				byServer[cluster.Owner(cluster.Slot("{headgate:user="+user+"}"))] = user
			}
			hold := func(store *redisstore.Store, user string) (shared.Answer, error) {
				answers := make([]shared.Answer, 1)
				k := key(user)
				k.Component = "slots"
				err := store.Take(t.Context(), []shared.Ask{{Key: k, Rule: places, Tokens: 1}}, answers)
				return answers[0], err
			}
			for _, user := range byServer {
				if answer, err := hold(store, user); err != nil || !answer.OK {
					t.Fatalf("Take = %+v, %v want OK", answer, err)
				}
			}
			gone := cluster.Servers[1]
			tt.gone(gone)
			eventually(t, "store that is down", func() bool {
				_, err := take(t.Context(), store, rule, byServer[gone], 1)
				return errors.Is(err, shared.ErrDown)
			})
			for end := time.Now().Add(3 * lease); time.Now().Before(end); <-time.After(20 * time.Millisecond) {
				for server, user := range byServer {
					if server == gone {
						continue
					}
					mustTake(t, store, rule, user, 1)
					if answer, err := hold(other, user); err != nil || answer.OK {
						t.Fatalf("Take = %+v, %v while the slot is held", answer, err)
					}
				}
			}
			tt.back(gone)
			works(t, store, rule, byServer[gone])
		})
	}
}

// A server that has no memory left refuses, and takes nothing.
func TestFleetOutOfMemory(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL())
	rule, places := budget(10), slots(2)
	mustTake(t, store, rule, "u", 1)
	slot := mustTake(t, store, places, "slots", 1).Slot
	server.Text("CONFIG", "SET", "maxmemory", "1")
	for range 10 {
		if answer, err := take(t.Context(), store, rule, "u", 1); err == nil {
			t.Errorf("Take = %+v of a server without memory", answer)
		} else if strings.Contains(err.Error(), "user") {
			t.Errorf("the error names a key: %v", err)
		}
	}
	// To give back needs no memory.
	if !giveBack(t, store, places, "slots", slot) {
		t.Error("the slot was not returned")
	}
	server.Text("CONFIG", "SET", "maxmemory", "0")
	works(t, store, rule, "u")
	if got := left(t, store, rule, "u"); got != 8 {
		t.Errorf("%v left want 8", got)
	}
}

// A server that refuses to write without a replica answers: the store is not down, and works when it writes again.
func TestFleetNoReplica(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL())
	rule := budget(10)
	mustTake(t, store, rule, "u", 1)
	server.Text("CONFIG", "SET", "min-replicas-to-write", "1")
	for range 10 {
		if answer, err := take(t.Context(), store, rule, "u", 1); err == nil || store.Down() {
			t.Errorf("Take = %+v, %v without a replica, Down() = %v", answer, err, store.Down())
		}
	}
	server.Text("CONFIG", "SET", "min-replicas-to-write", "0")
	mustTake(t, store, rule, "u", 1)
	if got := left(t, store, rule, "u"); got != 8 {
		t.Errorf("%v left want 8", got)
	}
}

// A replica takes nothing. A primary that has become one does not, either.
func TestFleetReadOnly(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	primary := redistest.Start(t, redistest.Options{})
	store := open(t, server.URL(), redisstore.WithTimeout(time.Second))
	rule := budget(10)
	mustTake(t, store, rule, "u", 1)
	host, port, _ := strings.Cut(primary.Addr(), ":")
	server.Text("REPLICAOF", host, port)
	eventually(t, "replica", func() bool { return server.Info("master_link_status") == "up" })
	for range 10 {
		if answer, err := take(t.Context(), store, rule, "u", 1); err == nil {
			t.Errorf("Take = %+v of a replica", answer)
		}
	}
	server.Text("REPLICAOF", "NO", "ONE")
	works(t, store, rule, "u")
}

// A reply that breaks off is an error, and the call is not sent again: it may have counted.
func TestFleetCutReply(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	store := open(t, proxy.URL())
	other := open(t, server.URL())
	rule := budget(1e6)
	mustTake(t, store, rule, "u", 1)
	taken, counted := 1, 0.0
	for after := range 12 {
		proxy.Cut(after)
		before := left(t, other, rule, "u")
		answer, err := take(t.Context(), store, rule, "u", 1)
		if err == nil {
			t.Errorf("Take = %+v of a reply that broke off after %d bytes", answer, after)
		}
		// The client has several connections, and may have made one for the call: then it was the first reply there that broke off.
		took := before - left(t, other, rule, "u")
		if took > 1 {
			t.Errorf("a call whose reply broke off after %d bytes has taken %v want 1: %v", after, took, err)
		}
		counted += took
		taken += 1 + works(t, store, rule, "u")
	}
	if got := left(t, other, rule, "u"); got < 1e6-float64(taken) {
		t.Errorf("%v left after %d calls", got, taken)
	}
	if counted == 0 {
		t.Error("no reply broke off that was to tell of a token")
	}
}

// A reply that does not come is no success, whoever has waited for it: a call by itself, or many together.
func TestFleetLostReply(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	store := open(t, proxy.URL(), redisstore.WithTimeout(200*time.Millisecond))
	other := open(t, server.URL())
	rule, places := budget(1e6), slots(100)
	eventually(t, "take", func() bool { _, err := take(t.Context(), store, rule, "u", 1); return err == nil })
	proxy.Lose()
	var calls sync.WaitGroup
	var granted atomic.Int64
	for i := range 100 {
		calls.Go(func() {
			r, user := rule, "u"
			if i%2 == 1 {
				r, user = places, "slots"
			}
			if _, err := take(t.Context(), store, r, user, 1); err == nil {
				granted.Add(1)
			}
		})
	}
	calls.Wait()
	if n := granted.Load(); n > 0 {
		t.Errorf("%d calls succeeded without a reply", n)
	}
	proxy.Close()
	works(t, store, rule, "u")
	// Slots that nobody knows of come back without being asked for.
	eventually(t, "slots that are free", func() bool { return left(t, other, places, "slots") == 100 })
}

// A token that comes back late, because its caller did not wait for it, is none beyond the bound: what has come meanwhile would have
// overflowed if it had not been taken.
func TestFleetLateReply(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	store, other := open(t, proxy.URL(), redisstore.WithTimeout(10*time.Second)), open(t, server.URL())
	slow := &shared.Rule{Kind: shared.Bucket, Capacity: 3, Fill: 1, Interval: time.Second}
	works(t, store, budget(1e6), "u") // there are connections now
	for range 3 {
		proxy.Hold()
		ctx, cancel := context.WithCancel(t.Context())
		var late sync.WaitGroup
		late.Go(func() {
			if answer, err := take(ctx, store, slow, "slow", 3); err == nil {
				t.Errorf("Take = %+v without a reply", answer)
			}
		})
		eventually(t, "the tokens are taken", func() bool { return left(t, other, slow, "slow") < 1 })
		cancel()
		late.Wait()
		began := time.Now()
		eventually(t, "two tokens that have come", func() bool {
			answer, err := take(t.Context(), other, slow, "slow", 2)
			if err != nil {
				t.Fatal(err)
			}
			return answer.OK
		})
		proxy.Release()
		works(t, store, budget(1e6), "u")
		for time.Since(began) < 2500*time.Millisecond {
			if answer, err := take(t.Context(), other, slow, "slow", 2); err != nil || answer.OK {
				t.Fatalf("Take = %+v, %v: 4 were taken of 3 in %v, in which 2 have come", answer, err, time.Since(began))
			}
			<-time.After(10 * time.Millisecond)
		}
		if err := other.Reset(t.Context(), key("slow")); err != nil {
			t.Fatal(err)
		}
	}
}

// What goes back to queues and to limiters goes at once: no call waits for the answer of another.
func TestFleetReturnAtOnce(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	proxy := redistest.StartProxy(t, server)
	client, err := rueidis.NewClient(rueidis.ClientOption{ // one that does not give up a connection without answers
		InitAddress: []string{proxy.Addr()}, ForceSingleClient: true, DisableCache: true, AlwaysPipelining: true, ConnWriteTimeout: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	store := newStore(t, client, redisstore.WithTimeout(time.Hour), redisstore.WithLease(time.Hour))
	other := newStore(t, newClient(t, server.Addr()))
	rule := slots(1)
	var returns []shared.Return
	for i, user := range []string{"a", "b", "c", "d"} {
		back := shared.Return{Key: key(user), Rule: rule, Tokens: 1, Cost: 1, Queued: i%2 == 1}
		if back.Queued {
			d := &shared.Drawing{Key: back.Key, Rule: rule, Waiting: []shared.Waiting{{Workload: "w", Weight: 1, Costs: []float64{1}}}}
			drawn := draw(t, store, d)
			back.Slot = drawn.Grants[0].Slots[0]
		} else {
			back.Slot = mustTake(t, store, rule, user, 1).Slot
		}
		returns = append(returns, back)
	}
	warm := make([]shared.Result, len(returns)) // the server knows the scripts then
	nothing := slices.Clone(returns)
	for i := range nothing {
		nothing[i].Slot = 1
	}
	if err := store.Return(t.Context(), nothing, warm); err != nil {
		t.Fatal(err)
	}
	proxy.Hold()
	t.Cleanup(proxy.Release)
	done := make(chan error, 1)
	go func() { done <- store.Return(t.Context(), returns, make([]shared.Result, len(returns))) }()
	eventually(t, "slots that are free before any answer has come", func() bool {
		for _, r := range returns {
			if usage, err := other.Look(t.Context(), r.Key, rule); err != nil || usage.InFlight != 0 {
				return false
			}
		}
		return true
	})
	proxy.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A server that refuses the password is an error at once, which does not tell the password. One that changes it is an error for each
// call until it accepts the old one again.
func TestFleetAuth(t *testing.T) {
	t.Parallel()
	const password = "sesame"
	server := redistest.Start(t, redistest.Options{Password: password})
	for _, tt := range []struct{ name, url string }{
		{"none", "redis://" + server.Addr()},
		{"another", "redis://:hidden@" + server.Addr()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			store, err := redisstore.Open(t.Context(), tt.url, redisstore.WithTimeout(patient))
			if err == nil {
				_ = store.Close()
				t.Fatal("a store without the right password")
			}
			if strings.Contains(err.Error(), "hidden") {
				t.Errorf("the error tells the password: %v", err)
			}
			t.Log(err)
		})
	}
	store := open(t, server.URL(), redisstore.WithTimeout(time.Second))
	rule := budget(10)
	mustTake(t, store, rule, "u", 1)
	server.SetPassword("changed")
	server.Text("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
	for range 5 {
		if answer, err := take(t.Context(), store, rule, "u", 1); err == nil {
			t.Errorf("Take = %+v without the password", answer)
		} else if strings.Contains(err.Error(), password) {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	server.SetPassword(password)
	works(t, store, rule, "u")
}
