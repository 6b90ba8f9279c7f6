//go:build unix

package redisstore_test

import (
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/witness"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

func leasedLimiter(bound witness.Bound) []policy.Component {
	return []policy.Component{policy.RateLimiter{
		ID: "c", Selectors: policy.At("point"), Capacity: bound.Capacity, Fill: bound.Rate, Interval: time.Second, LimitBy: "user",
		Share: policy.ShareLeased, OnOutage: policy.OutageClosed,
	}}
}

// scriptsRun returns how many scripts the server has run.
func scriptsRun(t *testing.T, server *redistest.Server) (n int) {
	t.Helper()
	for _, command := range []string{"evalsha", "eval"} {
		_, after, _ := strings.Cut(server.Info("cmdstat_"+command), "calls=")
		number, _, _ := strings.Cut(after, ",")
		calls, _ := strconv.Atoi(number) // none yet
		n += calls
	}
	return n
}

// Whatever becomes of the server, of connections and of engines, no more leased tokens are used than there were since the beginning, and in any
// span no more than half of the capacity beyond that.
func TestFleetLeasedBound(t *testing.T) {
	t.Parallel()
	bound := witness.Bound{Capacity: 200, Rate: 1000}
	server := redistest.Start(t, redistest.Options{AOF: true})
	proxy := redistest.StartProxy(t, server)
	var mu sync.Mutex
	var admitted []witness.Admission
	var flows atomic.Int64
	var ended atomic.Bool
	var running sync.WaitGroup
	begun := time.Now()
	run := func(m *member, goroutines int, crashed *atomic.Bool) {
		for range goroutines {
			running.Go(func() {
				for !ended.Load() && !crashed.Load() {
					asked := time.Since(begun)
					flow := m.start(t, "u")
					told := time.Since(begun)
					_, _ = flow.End(context.WithoutCancel(t.Context()))
					flows.Add(1)
					if flow.Decision() == flowctl.Accepted {
						mu.Lock()
						admitted = append(admitted, witness.Admission{Asked: asked, Told: told, Tokens: 1})
						mu.Unlock()
					}
					<-time.After(time.Duration(rand.IntN(int(8 * time.Millisecond))))
				}
			})
		}
	}
	var crashed, never atomic.Bool
	var crashes *member
	for i, goroutines := range []int{28, 4, 4, 4} { // 70, 10, 10 and 10 %
		url, gone := server.URL(), &never
		if i == 1 {
			url = proxy.URL()
		}
		m := join(t, url, leasedLimiter(bound), redisstore.WithTimeout(100*time.Millisecond))
		if i == 2 {
			gone, crashes = &crashed, m
		}
		run(m, goroutines, gone)
	}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(admitted)
	}
	more := func() { // let in, as a sign of life
		t.Helper()
		n := count()
		eventually(t, "flows that are let in", func() bool { return count() > n+200 })
	}
	calls, before := scriptsRun(t, server), flows.Load()
	more()
	more()
	t.Logf("%d calls for %d flows", scriptsRun(t, server)-calls, flows.Load()-before)
	for i := range 3 {
		proxy.Cut(rand.IntN(40))
		more()
		proxy.Lose()
		more()
		proxy.Close()
		server.Stop()
		<-time.After(300 * time.Millisecond)
		server.Continue()
		more()
		if i == 1 { // what the engine has drawn ahead is lost
			crashed.Store(true)
			_ = crashes.store.Close()
			more()
		}
		server.Kill()
		server.Restart()
		more()
	}
	ended.Store(true)
	running.Wait()
	span := witness.Bound{Capacity: 1.5 * bound.Capacity, Rate: bound.Rate}
	if worst := span.Worst(admitted); worst.Broken() {
		t.Errorf("%.0f were let in within %v; the bound is %.3f", worst.Tokens, worst.To-worst.From, worst.Allowed)
	}
	for i := range admitted {
		admitted[i].Asked = 0
	}
	worst := bound.Worst(admitted)
	t.Logf("%d of %d flows let in within %v; closest to the bound, %.0f of %.1f up to %v", len(admitted), flows.Load(), time.Since(begun), worst.Tokens, worst.Allowed, worst.To)
	if worst.Broken() {
		t.Errorf("%.0f were let in up to %v; the bound is %.3f", worst.Tokens, worst.To, worst.Allowed)
	}
}

// What an engine has drawn ahead and does not use goes back to the server, and so does what it has when it is closed.
func TestFleetLeasedTokensGoBack(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	components := leasedLimiter(witness.Bound{Capacity: 1000, Rate: 1e-9})
	a, b := join(t, server.URL(), components), join(t, server.URL(), components)
	left := func(m *member) float64 {
		t.Helper()
		c, err := m.engine.Component("policy", "c")
		if err != nil {
			t.Fatal(err)
		}
		u, err := c.Peek(t.Context(), "u")
		if err != nil {
			t.Fatal(err)
		}
		return u.Remaining
	}
	if n := a.admitted(t, "u", 100); n != 100 {
		t.Errorf("%d of 100 were let in", n)
	}
	if n := scriptsRun(t, server); n > 90 {
		t.Errorf("100 flows ran %d scripts", n)
	}
	eventually(t, "tokens that go back", func() bool { return left(b) > 900-1e-6 })
	a.admitted(t, "u", 100)
	if err := a.engine.Close(); err != nil {
		t.Fatal(err)
	}
	if n := left(b); n < 800-1e-6 || n > 800+1e-3 {
		t.Errorf("%v tokens are left after Close want 800", n)
	}
}
