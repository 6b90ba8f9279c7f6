//go:build unix

package redisstore_test

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// A cable makes connections that all go silent when it is cut: what is written is lost, and nothing comes back.
type cable struct {
	once sync.Once
	off  chan struct{}
}

func newCable() *cable { return &cable{off: make(chan struct{})} }

func (w *cable) cut() { w.once.Do(func() { close(w.off) }) }

func (w *cable) isCut() bool {
	select {
	case <-w.off:
		return true
	default:
		return false
	}
}

func (w *cable) dial(ctx context.Context, address string, dialer *net.Dialer, _ *tls.Config) (net.Conn, error) {
	if w.isCut() {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	return &silenced{conn, w}, err
}

type silenced struct {
	net.Conn
	cable *cable
}

func (c *silenced) Write(b []byte) (int, error) {
	if c.cable.isCut() {
		_, err := c.Conn.Write(nil) // which a closed connection refuses
		return len(b), err
	}
	return c.Conn.Write(b)
}

// cutOff is an engine that can be cut off from the servers. Its flows want to know of lost slots.
func cutOff(t *testing.T, servers []string, c policy.Component, opts ...redisstore.Option) (*member, *cable) {
	t.Helper()
	w := newCable()
	client, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: servers, ForceSingleClient: len(servers) == 1, DisableCache: true, AlwaysPipelining: true, DisableRetry: true,
		ConnWriteTimeout: time.Second, DialCtxFn: w.dial,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	store, err := redisstore.New(client, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	e, err := engine.New(at([]policy.Component{c}), engine.WithStore(store))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	watching, err := flowctl.New(e, flowctl.WithCancelOnLostSlot())
	if err != nil {
		t.Fatal(err)
	}
	return &member{e, watching, store}, w
}

// A process that is cut off from the servers knows that its slots are lost before another one gets them: the contexts of its flows are
// canceled by then. When its lease was renewed last does not matter, nor which server of a cluster has the slots.
func TestFleetLostSlots(t *testing.T) {
	t.Parallel()
	slot := policy.ConcurrencyLimiter{
		Selectors: policy.At("point"), Max: 1, MaxInflight: time.Hour, LimitBy: "user", OnOutage: policy.OutageClosed,
	}
	run := func(t *testing.T, servers []string, url string, lease time.Duration) {
		t.Helper()
		opts := []redisstore.Option{redisstore.WithNamespace(t.Name()), redisstore.WithLease(lease)}
		other := join(t, url, []policy.Component{slot}, opts...)
		users := []string{"ann", "bob", "cid", "dan", "eve", "fay"}
		var early atomic.Int64 // processes that lost their slot before, as on a machine that is busy for a whole lease
		begins := time.Now()
		var all sync.WaitGroup
		for _, user := range users {
			holder, w := cutOff(t, servers, slot, append(opts, redisstore.WithTimeout(time.Second))...)
			flow := holder.start(t, user)
			if flow.Decision() != flowctl.Accepted {
				t.Fatalf("%v of %s", flow, user)
			}
			all.Go(func() {
				<-time.After(time.Until(begins.Add(lease + rand.N(lease))))
				if flow.Context().Err() != nil {
					t.Logf("%s: %v before the process was cut off", user, context.Cause(flow.Context()))
					early.Add(1)
				}
				w.cut()
				cut := time.Now()
				for next := other.start(t, user); next.Decision() != flowctl.Accepted; next = other.start(t, user) {
					if time.Since(cut) > time.Minute {
						t.Errorf("the slot of %s does not come back", user)
						return
					}
					<-time.After(5 * time.Millisecond)
				}
				if err := context.Cause(flow.Context()); !errors.Is(err, flowctl.ErrSlotLost) {
					t.Errorf("%s: another process has the slot after %v, and the flow that had it is not canceled: %v", user, time.Since(cut), err)
				}
				if n := holder.engine.Stats().Store.LostSlots; n != 1 {
					t.Errorf("%s: %d slots are counted as lost", user, n)
				}
			})
		}
		all.Wait()
		if n := early.Load(); n > int64(len(users)/2) {
			t.Errorf("%d of %d processes lost their slots before they were cut off", n, len(users))
		}
	}
	t.Run("of one server", func(t *testing.T) {
		server := redistest.Start(t, redistest.Options{})
		for _, lease := range []time.Duration{time.Second, 3 * time.Second} {
			t.Run(lease.String(), func(t *testing.T) { run(t, []string{server.Addr()}, server.URL(), lease) })
		}
	})
	t.Run("of a cluster", func(t *testing.T) {
		cluster := redistest.StartCluster(t, redistest.Options{})
		var servers []string
		for _, s := range cluster.Servers {
			servers = append(servers, s.Addr())
		}
		run(t, servers, cluster.URL(), 2*time.Second)
	})
}

// A renewal that fails costs no slot: it is made again in time.
func TestFleetRenewalThatFails(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	const lease = 9 * time.Second
	m := join(t, server.URL(), []policy.Component{oneSlot()}, redisstore.WithLease(lease))
	flow := m.start(t, "ann")
	renewed := func(since time.Time) func() bool { return func() bool { return m.store.Kept().After(since) } }
	eventually(t, "the lease is renewed", renewed(m.store.Kept().Add(time.Second)))
	due := time.Now().Add(lease / 3)
	kept := m.store.Kept()
	<-time.After(time.Until(due.Add(-lease / 12)))
	server.Stop()
	<-time.After(time.Until(due.Add(lease / 12))) // the renewal is under way, or has failed
	server.Continue()
	eventually(t, "the lease is renewed again", renewed(kept))
	if n := m.engine.Stats().Store.LostSlots; flow.Decision() != flowctl.Accepted || n != 0 {
		t.Errorf("%v, %d slots are lost after a pause of the server that is a sixth of the lease", flow, n)
	}
}

// A store notices an outage by what it does itself, while no flow asks: that the server does not renew leases, nor count instances.
func TestFleetOutageWithoutFlows(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, url string, server *redistest.Server, hold int) {
		t.Helper()
		m := join(t, url, []policy.Component{oneSlot()}, redisstore.WithLease(2*time.Second), redisstore.WithTimeout(time.Second))
		for i := range hold {
			if flow := m.start(t, userName(i)); flow.Decision() != flowctl.Accepted {
				t.Fatal(flow.Err())
			}
		}
		if s := m.engine.Stats().Store; s.Down {
			t.Errorf("%+v before the outage", s)
		}
		server.Stop()
		eventually(t, "the outage shows", func() bool { s := m.engine.Stats().Store; return s.Down && s.Failures > 0 })
		seen := m.engine.Stats().Store
		if seen.Unanswered != 0 {
			t.Errorf("%+v want no flows", seen)
		}
		eventually(t, "the calls that ask whether it is back count", func() bool { return m.engine.Stats().Store.Failures > seen.Failures })
		server.Continue()
		eventually(t, "the end of the outage shows", func() bool { return !m.engine.Stats().Store.Down })
	}
	t.Run("of one server that holds nothing", func(t *testing.T) {
		server := redistest.Start(t, redistest.Options{})
		run(t, server.URL(), server, 0)
	})
	t.Run("of a server of a cluster", func(t *testing.T) {
		cluster := redistest.StartCluster(t, redistest.Options{})
		run(t, cluster.URL(), cluster.Servers[1], 20)
	})
}

// The first calls of a store that was opened are one round trip each: the servers know the scripts by then.
func TestFleetFirstCalls(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	monitor := redistest.StartMonitor(t, server)
	store := open(t, server.URL())
	bucket, held := budget(10), slots(10)
	key := keyOf("fresh-key", "a")
	takeSlot(t, store, keyOf("fresh-key", "slots"), held, shared.Holder{})
	for name, call := range map[string]func() error{
		"Take": func() error {
			return store.Take(t.Context(), []shared.Ask{{Key: key, Rule: bucket, Tokens: 1}}, make([]shared.Answer, 1))
		},
		"Return": func() error {
			return store.Return(t.Context(), []shared.Return{{Key: key, Rule: bucket, Tokens: 1, Unused: true}}, make([]shared.Result, 1))
		},
		"Draw": func() error {
			_, err := store.Draw(t.Context(), &shared.Drawing{Key: key, Rule: bucket})
			return err
		},
		"Draw of slots": func() error {
			_, err := store.Draw(t.Context(), &shared.Drawing{Key: keyOf("fresh-key", "queue"), Rule: held})
			return err
		},
		"Move": func() error {
			_, err := store.Move(t.Context(), keyOf("fresh-key", "ramp"), 0, nil)
			return err
		},
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	asked := 0
	for _, c := range monitor.Commands() {
		if c.Lua || !strings.Contains(strings.Join(c.Args, " "), "fresh-key") {
			continue
		}
		asked++
		if !strings.EqualFold(c.Args[0], "EVALSHA") {
			t.Errorf("%s of %q want the script by its hash", c.Args[0], c.Args[3:])
		}
	}
	if asked == 0 {
		t.Error("no call was seen")
	}
}

// Calls of a store that is closed say so. It is no outage.
func TestFleetClosed(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	m := join(t, server.URL(), []policy.Component{oneSlot()})
	flow := m.start(t, "ann")
	if err := m.store.Close(); err != nil {
		t.Fatal(err)
	}
	for name, call := range calls() {
		if err := call(t.Context(), m.store, 1); !errors.Is(err, shared.ErrClosed) {
			t.Errorf("%s = %v want that the store is closed", name, err)
		}
	}
	_, _ = flow.End(t.Context())
	if s := m.engine.Stats().Store; s.Failures != 0 || s.Down {
		t.Errorf("%+v want no outage", s)
	}
}

// A process counts on its lease for so long that a quarter of it is left by then at the server, whether a renewal or a call that took a
// slot was the last. It counts on a session's leases no longer than they last.
func TestFleetLeasesOutlastWhatIsCountedOn(t *testing.T) {
	t.Parallel()
	const lease = time.Second
	client := newClient(t, startServer(t))
	s := newStore(t, client, redisstore.WithLease(lease))
	session := shared.Holder{1}
	rule := slots(1e6)
	confirmed := 0
	for began := time.Now(); time.Since(began) < 3*lease; <-time.After(5 * time.Millisecond) {
		known := s.Renew(session, lease)
		takeSlot(t, s, keyOf("s", "a"), rule, shared.Holder{})
		takeSlot(t, s, keyOf("s", "b"), rule, session)
		kept := s.Kept()
		leases, err := client.Do(t.Context(), client.B().Zrange().Key("{"+t.Name()+"}#l").Min("0").Max("-1").Withscores().Build()).AsZScores()
		if err != nil || len(leases) != 2 {
			t.Fatalf("leases = %v, %v want one of the process and one of the session", leases, err)
		}
		for _, one := range leases {
			ends := time.UnixMicro(int64(one.Score)) // by the same clock
			if one.Member == string(session[:]) {
				if !known.IsZero() {
					confirmed++
				}
				if left := ends.Sub(known.Round(0)); left < 0 {
					t.Errorf("the session's slots count as kept until %v after its lease", -left)
				}
			} else if left := ends.Sub(kept.Round(0)); left < lease/4 {
				t.Errorf("the process counts on a lease of which %v are left by then want a quarter of %v", left, lease)
			}
		}
	}
	if confirmed == 0 {
		t.Error("no renewal of the session was confirmed")
	}
}
