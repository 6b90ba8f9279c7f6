package redisstore_test

import (
	"context"
	"errors"
	"strconv"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// openCluster returns instances of one cluster.
func openCluster(t *testing.T, cluster *redistest.Cluster, opts ...redisstore.Option) *redisstore.Store {
	t.Helper()
	opts = append([]redisstore.Option{redisstore.WithNamespace(t.Name()), redisstore.WithTimeout(5 * time.Second)}, opts...)
	s, err := redisstore.Open(t.Context(), cluster.URL(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestFleetCluster(t *testing.T) {
	t.Parallel()
	cluster := redistest.StartCluster(t, redistest.Options{})
	t.Run("conforms", func(t *testing.T) {
		conform(t, func(t *testing.T) [2]shared.Store {
			t.Helper()
			return [2]shared.Store{openCluster(t, cluster), openCluster(t, cluster)}
		})
	})
	t.Run("queues", func(t *testing.T) { testDrawSlots(t, openCluster(t, cluster), openCluster(t, cluster)) })
	t.Run("gives back what another shard refuses", func(t *testing.T) { testGivesBack(t, openCluster(t, cluster)) })
	t.Run("sessions", func(t *testing.T) {
		testClusterSessions(t, cluster, openCluster(t, cluster, redisstore.WithLease(time.Second)), openCluster(t, cluster, redisstore.WithLease(time.Second)))
	})
	t.Run("caches", func(t *testing.T) {
		s := openCluster(t, cluster)
		var keys []shared.CacheKey
		for i := range 20 {
			keys = append(keys, shared.CacheKey{Key: strconv.Itoa(i)})
			if err := s.Set(t.Context(), keys[i], []byte(keys[i].Key), time.Hour); err != nil {
				t.Fatal(err)
			}
		}
		values, err := s.Get(t.Context(), keys)
		for i, v := range values {
			if string(v) != keys[i].Key {
				t.Errorf("value %d = %q", i, v)
			}
		}
		if err != nil || len(values) != 20 {
			t.Errorf("Get = %d values, %v", len(values), err)
		}
	})
}

// Keys of a flow are in many slots of a cluster. If one refuses, the others get back what they gave, before the answer.
func testGivesBack(t *testing.T, s *redisstore.Store) {
	bucket := &shared.Rule{Kind: shared.Bucket, Capacity: 10, Interval: time.Hour}
	slots := &shared.Rule{Kind: shared.Slots, Capacity: 10, MaxInflight: time.Hour}
	var asks []shared.Ask
	for i := range 12 {
		key := shared.Key{Policy: "p", Component: "c", Label: "l" + strconv.Itoa(i), Value: "v"}
		rule := bucket
		if i%2 == 1 {
			rule = slots
		}
		asks = append(asks, shared.Ask{Key: key, Rule: rule, Tokens: 1})
	}
	answers := make([]shared.Answer, len(asks))
	if err := s.Take(t.Context(), asks, answers); err != nil {
		t.Fatal(err)
	}
	left := func(want float64) {
		t.Helper()
		for i, a := range asks {
			if u, err := s.Look(t.Context(), a.Key, a.Rule); err != nil || u.Remaining != want {
				t.Errorf("key %d has %+v, %v want %v", i, u, err, want)
			}
		}
	}
	left(9)
	asks[4].Tokens = 11
	if err := s.Take(t.Context(), asks, answers); err != nil || answers[4].OK || !answers[3].OK || answers[3].Slot != 0 {
		t.Errorf("Take = %+v, %v", answers, err)
	}
	left(9)
	asks[2].Ahead = 3
	if err := s.Take(t.Context(), asks, answers); err != nil || answers[2].Drawn != 0 {
		t.Errorf("Take of tokens ahead = %+v, %v", answers, err)
	}
	left(9)
	asks[2].Ahead, asks[4].Dry = 0, true
	if err := s.Take(t.Context(), asks, answers); err != nil || answers[4].OK || answers[3].Slot == 0 {
		t.Errorf("Take with a dry ask = %+v, %v", answers, err)
	}
	if u, _ := s.Look(t.Context(), asks[3].Key, slots); u.InFlight != 2 {
		t.Errorf("%d slots are held want 2", u.InFlight)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Take(ctx, asks, answers); !errors.Is(err, context.Canceled) {
		t.Errorf("Take with a context that has ended = %v", err)
	}
}

// A session's slots live by the renewals of the instance that it is at, whichever instances have taken them. That one knows until when all
// leases of the session last.
func testClusterSessions(t *testing.T, cluster *redistest.Cluster, a, b *redisstore.Store) {
	rule := &shared.Rule{Kind: shared.Slots, Capacity: 2, MaxInflight: time.Hour}
	session := shared.Holder{7}
	values := []string{"a", "b", "c", "d", "e", "f"}
	for _, v := range values {
		if _, ok := takeSlot(t, a, keyOf("s", v), rule, session); !ok {
			t.Fatal("no slot")
		}
	}
	inFlight := func() (n int) {
		for _, v := range values {
			u, err := a.Look(t.Context(), keyOf("s", v), rule)
			if err != nil {
				t.Fatal(err)
			}
			n += u.InFlight
		}
		return n
	}
	eventually(t, "it is known beside which tags the session holds slots", func() bool {
		for _, server := range cluster.Servers {
			keys, err := server.Do("KEYS", "{"+t.Name()+":session:*")
			if err != nil {
				t.Fatal(err)
			}
			for _, key := range keys.([]any) {
				if n, err := server.Do("ZCARD", key.(string)); err == nil && n == int64(len(values)) {
					return true
				}
			}
		}
		return false
	})
	known := 0
	for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); <-time.After(100 * time.Millisecond) {
		kept := b.Renew(session, 2*time.Second)
		if got := inFlight(); got != len(values) {
			t.Fatalf("%d slots are held want %d", got, len(values))
		}
		if kept.IsZero() {
			continue
		}
		known++
		leases := 0
		for _, server := range cluster.Servers {
			keys, err := server.Do("KEYS", "{"+t.Name()+"*#l")
			if err != nil {
				t.Fatal(err)
			}
			for _, key := range keys.([]any) {
				score, err := server.Do("ZSCORE", key.(string), string(session[:]))
				if err != nil || score == nil {
					continue
				}
				leases++
				ends, err := strconv.ParseFloat(score.(string), 64)
				if left := time.UnixMicro(int64(ends)).Sub(kept.Round(0)); err != nil || left < 0 {
					t.Errorf("a lease ends %v before the slots count as kept, %v", -left, err)
				}
			}
		}
		if leases != len(values) {
			t.Errorf("%d leases of the session want one for each of %d tags", leases, len(values))
		}
	}
	if known == 0 {
		t.Error("nothing is known of the session's leases")
	}
	b.Renew(session, 0)
	eventually(t, "the session's slots come back", func() bool { return inFlight() == 0 })
}
