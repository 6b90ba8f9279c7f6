//go:build unix

package redisstore_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/witness"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// A member is an engine with its client. Several of them share a store.
type member struct {
	engine *engine.Engine
	client *flowctl.Client
	store  *redisstore.Store
}

// join makes an engine that has its policies' components at "point".
func join(t *testing.T, url string, components []policy.Component, opts ...redisstore.Option) *member {
	t.Helper()
	store := open(t, url, opts...)
	e, err := engine.New(at(components), engine.WithStore(store))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	client, err := flowctl.New(e)
	if err != nil {
		t.Fatal(err)
	}
	return &member{e, client, store}
}

func at(components []policy.Component) []policy.Policy {
	return []policy.Policy{{Name: "policy", Components: components}}
}

// start starts a flow of a user.
func (m *member) start(t *testing.T, user string) *flowctl.Flow {
	t.Helper()
	return m.client.Start(t.Context(), "point", flowctl.Params{
		Labels: map[string]string{"user": user}, CheckTimeout: time.Minute, OnUnreachable: flowctl.FailClosed,
	})
}

// admitted has flows start and end, and returns how many of so many were let in.
func (m *member) admitted(t *testing.T, user string, flows int) (n int) {
	t.Helper()
	for range flows {
		flow := m.start(t, user)
		if flow.Decision() == flowctl.Accepted {
			n++
		}
		_, _ = flow.End(context.WithoutCancel(t.Context()))
	}
	return n
}

func limiter(capacity float64, outage policy.Outage) policy.Component {
	return policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: capacity, Fill: 1e-6, Interval: time.Hour, LimitBy: "user", OnOutage: outage,
	}
}

// While the server is gone, all engines together let in what the limit is, and not each of them; or all, or nothing, where the policy
// says so. What they have let in is owed when it is back.
func TestFleetOutage(t *testing.T) {
	t.Parallel()
	const members = 4
	for _, tt := range []struct {
		outage policy.Outage
		name   string
		let    int  // in, by each of 4 engines, of 30 flows
		spent  bool // nothing is left when the server is back
	}{
		{policy.OutageShare, "share", 5, true},
		{policy.OutageOpen, "open", 30, true},
		{policy.OutageClosed, "closed", 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, redistest.Options{AOF: true})
			components := []policy.Component{limiter(20, tt.outage)}
			all := make([]*member, members)
			for i := range all {
				all[i] = join(t, server.URL(), components, redisstore.WithTimeout(200*time.Millisecond), redisstore.WithLease(lease))
			}
			for _, m := range all {
				eventually(t, "engines that know of each other", func() bool { return m.store.Instances() == members })
			}
			server.Kill()
			for i, m := range all {
				if got := m.admitted(t, "u", 30); got != tt.let {
					t.Errorf("engine %d let in %d of 30 while the server was gone; want %d", i, got, tt.let)
				}
				if s := m.engine.Stats(); s.Store.Unanswered != 30 || s.Components[0].LocalDecisions != 30 {
					t.Errorf("stats = %+v, %+v want 30 flows without the store", s.Store, s.Components[0])
				}
			}
			flow := all[0].start(t, "u")
			var rejected *flowctl.RejectedError
			if errors.As(flow.Err(), &rejected) && tt.outage == policy.OutageClosed && (rejected.Cause() != flowctl.CauseNoStore || rejected.HTTPStatus != 503) {
				t.Errorf("%v want status 503, because there is no store", rejected)
			}
			_, _ = flow.End(t.Context())
			server.Restart()
			for _, m := range all {
				eventually(t, "engine whose store is there", func() bool { // its first flow tells what it has let in
					before := m.engine.Stats().Store.Unanswered
					m.admitted(t, "u", 1)
					s := m.engine.Stats().Store
					return s.Unanswered == before && !s.Down
				})
			}
			for i, m := range all {
				if flow := m.start(t, "u"); tt.spent == (flow.Decision() == flowctl.Accepted) {
					t.Errorf("engine %d: %v, %v when the server is back", i, flow, flow.Err())
				}
			}
		})
	}
}

// New policies use the connections that there are, and the limits go on.
func TestFleetReload(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	m := join(t, server.URL(), []policy.Component{limiter(100, "")})
	if got := m.admitted(t, "u", 30); got != 30 {
		t.Fatalf("%d of 30 were let in", got)
	}
	connections := func() string { return server.Info("connected_clients") }
	before := connections()
	for i := range 50 {
		if err := m.engine.Apply(at([]policy.Component{limiter(100+float64(i), "")})); err != nil {
			t.Fatal(err)
		}
		if got := m.admitted(t, "u", 1); got != 1 {
			t.Fatalf("a flow after %d reloads was rejected", i)
		}
	}
	if after := connections(); after != before {
		t.Errorf("%s connections after 50 reloads, %s before", after, before)
	}
	if err := m.engine.Apply(at([]policy.Component{limiter(100, "")})); err != nil {
		t.Fatal(err)
	}
	if got := m.admitted(t, "u", 30); got != 20 {
		t.Errorf("%d were let in after 80 of 100 want 20", got)
	}
}

// Engines in one namespace have one limit, and those in another one have another.
func TestFleetNamespaces(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	components := []policy.Component{limiter(10, "")}
	a, b := join(t, server.URL(), components), join(t, server.URL(), components)
	other := join(t, server.URL(), components, redisstore.WithNamespace("other"))
	if got := a.admitted(t, "u", 7) + b.admitted(t, "u", 7); got != 10 {
		t.Errorf("%d were let in by two engines want 10", got)
	}
	if got := other.admitted(t, "u", 14); got != 10 {
		t.Errorf("%d were let in by the engine of another namespace want 10", got)
	}
}

// Whatever becomes of the server and of connections, no more is let in within any span than the limit says.
func TestFleetBound(t *testing.T) {
	t.Parallel()
	const members = 3
	bound := witness.Bound{Capacity: 20, Rate: 100}
	server := redistest.Start(t, redistest.Options{AOF: true})
	proxy := redistest.StartProxy(t, server)
	components := []policy.Component{policy.RateLimiter{
		Selectors: policy.At("point"), Capacity: bound.Capacity, Fill: bound.Rate, Interval: time.Second, LimitBy: "user", OnOutage: policy.OutageClosed,
	}}
	var mu sync.Mutex
	var admitted []witness.Admission
	var ended atomic.Bool
	var flows sync.WaitGroup
	begun := time.Now()
	for i := range members {
		url := server.URL()
		if i == 0 {
			url = proxy.URL()
		}
		m := join(t, url, components, redisstore.WithTimeout(100*time.Millisecond))
		for range 4 {
			flows.Go(func() {
				for !ended.Load() {
					asked := time.Since(begun)
					flow := m.start(t, "u")
					told := time.Since(begun)
					_, _ = flow.End(context.WithoutCancel(t.Context()))
					if flow.Decision() == flowctl.Accepted {
						mu.Lock()
						admitted = append(admitted, witness.Admission{Asked: asked, Told: told, Tokens: 1})
						mu.Unlock()
					}
					<-time.After(time.Duration(rand.IntN(int(10 * time.Millisecond))))
				}
			})
		}
	}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(admitted)
	}
	more := func() { // let in, as a sign of life
		t.Helper()
		n := count()
		eventually(t, "flow that is let in", func() bool { return count() > n+20 })
	}
	more()
	for range 3 {
		proxy.Cut(rand.IntN(40))
		more()
		proxy.Lose()
		more()
		proxy.Close()
		server.Stop()
		<-time.After(300 * time.Millisecond)
		server.Continue()
		more()
		server.Text("SCRIPT", "FLUSH")
		server.Kill()
		server.Restart()
		more()
	}
	ended.Store(true)
	flows.Wait()
	worst := bound.Worst(admitted)
	t.Logf("%d let in within %v; closest to the bound, %.0f of %.1f within %v", len(admitted), time.Since(begun), worst.Tokens, worst.Allowed, worst.To-worst.From)
	if worst.Broken() {
		t.Errorf("%.0f were let in within %v; the bound is %.3f", worst.Tokens, worst.To-worst.From, worst.Allowed)
	}
}
