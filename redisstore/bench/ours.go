package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/benchtable"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// patient is longer than any call takes here: one that fails would end the run.
const patient = 10 * time.Second

// instances is how many instances the rows with several have.
const instances = 3

// The control points, each with what its name says.
const (
	oneLimiter    = "one"
	threeLimiters = "three"
	concurrency   = "concurrency"
	leased        = "leased"   // a limiter that no flow reaches
	overloaded    = "overload" // a leased limiter of overloadRate
)

// overloadRate is how many flows a second the overloaded limiter lets in.
const overloadRate = 1000

// policies let every call through.
func policies() []policy.Policy {
	limiters := func(at string, n int) policy.Policy {
		p := policy.Policy{Name: at}
		for range n {
			p.Components = append(p.Components, policy.RateLimiter{
				Selectors: policy.At(at), Capacity: capacity, Fill: fill, Interval: time.Second, LimitBy: "user",
			})
		}
		return p
	}
	return []policy.Policy{
		queuePolicy(),
		limiters(oneLimiter, 1), limiters(threeLimiters, 3),
		{Name: concurrency, Components: []policy.Component{policy.ConcurrencyLimiter{
			Selectors: policy.At(concurrency), Max: 1e6, MaxInflight: time.Minute, LimitBy: "user",
		}}},
		{Name: leased, Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At(leased), Capacity: capacity, Fill: fill, Interval: time.Second, LimitBy: "user", Share: policy.ShareLeased,
		}}},
		{Name: overloaded, Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At(overloaded), Capacity: overloadRate / 5, Fill: overloadRate, Interval: time.Second, LimitBy: "user", Share: policy.ShareLeased,
		}}},
	}
}

// A guarded is an engine, and its client.
type guarded struct {
	store  io.Closer // nil without one
	engine *engine.Engine
	client *flowctl.Client
}

// openGuarded makes an engine with the store, if there is one.
func openGuarded(store *redisstore.Store) (_ *guarded, err error) {
	g := &guarded{}
	var opts []engine.Option
	if store != nil {
		g.store, opts = store, append(opts, engine.WithStore(store))
	}
	if g.engine, err = engine.New(policies(), opts...); err != nil {
		return nil, err
	}
	g.client, err = flowctl.New(g.engine)
	return g, err
}

func (g *guarded) close() error {
	err := g.engine.Close()
	if g.store != nil {
		err = errors.Join(err, g.store.Close())
	}
	return err
}

// do is a Do for a user at a control point.
func (g *guarded) do(ctx context.Context, at string, user func() string) func() error {
	return func() error {
		params := flowctl.Params{Labels: map[string]string{"user": user()}, CheckTimeout: -1, OnUnreachable: flowctl.FailClosed}
		return headgate.Do(ctx, g.client, at, params, func(context.Context, *flowctl.Flow) error { return nil })
	}
}

// hot returns the one key of the rows with a hot one.
func hot() string { return "hot" }

// ours are the rows of the store, and of engines with and without one.
type ours struct {
	ctx    context.Context //nolint:containedctx // the run's
	stores [instances]*redisstore.Store
	shared [instances]*guarded
	local  *guarded
	down   *guarded // its server is stopped
}

// openOurs opens the rows' stores at the server, and one at another server, which it stops.
func openOurs(ctx context.Context, server, stopped *redistest.Server) (_ *ours, err error) {
	// With the bound of 50 ms that is the default, callers send lone calls themselves. The bound is longer here, and they do so only if
	// their context cannot end.
	o := &ours{ctx: context.WithoutCancel(ctx)}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	for i := range instances {
		if o.stores[i], err = openStore(ctx, server, "take", redisstore.WithTimeout(patient)); err != nil {
			return nil, err
		}
		engines, err := openStore(ctx, server, "guard", redisstore.WithTimeout(patient))
		if err != nil {
			return nil, err
		}
		if o.shared[i], err = openGuarded(engines); err != nil {
			return nil, err
		}
	}
	if o.local, err = openGuarded(nil); err != nil {
		return nil, err
	}
	silent, err := openStore(ctx, stopped, "guard")
	if err != nil {
		return nil, err
	}
	if o.down, err = openGuarded(silent); err != nil {
		return nil, err
	}
	if err := o.down.do(ctx, oneLimiter, hot)(); err != nil {
		return nil, err
	}
	stopped.Stop()
	for begin := time.Now(); !silent.Down(); { // a few flows find it out
		_ = o.down.do(ctx, oneLimiter, hot)()
		if time.Since(begin) > patient {
			return nil, errors.New("a store whose server is stopped is not down")
		}
	}
	return o, nil
}

func (o *ours) close() (err error) {
	for _, g := range append(o.shared[:], o.local, o.down) {
		if g != nil {
			err = errors.Join(err, g.close())
		}
	}
	for _, s := range o.stores {
		if s != nil {
			err = errors.Join(err, s.Close())
		}
	}
	return err
}

const (
	takeThree = "Take, three buckets of one label"
	takeOne   = "Take, one bucket"
	doOne     = "Do, one shared limiter"
	doLocal   = "Do, one local limiter"
	doStopped = "Do, one shared limiter, the store stopped"
)

func (o *ours) rows() []*benchtable.Row {
	return []*benchtable.Row{
		{Name: takeOne, ByTurns: true, InFlight: inFlight, Call: o.take(1, 1, anyUser), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, bareRueidis, 1.15),
			benchtable.Beside(benchtable.InTime, barePooled),
			benchtable.AtMost(benchtable.InParallel, bareRueidis, 1),
			benchtable.AtMost(benchtable.InParallel, redisRate, 1/2.5),
		}},
		{Name: takeThree, ByTurns: true, InFlight: inFlight, Call: o.take(1, 3, anyUser), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, takeOne, 1.3),
			benchtable.Beside(benchtable.InParallel, takeOne),
		}},
		{Name: "Take, one hot bucket", ByTurns: true, InFlight: inFlight, Call: o.take(1, 1, hot), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InParallel, redisHot, 1/2.5),
		}},
		{Name: "Take, one bucket, three instances", ByTurns: true, InFlight: instances * inFlight, Call: o.take(instances, 1, anyUser), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InParallel, takeOne),
		}},
		{Name: doOne, ByTurns: true, InFlight: inFlight, Call: o.do(o.shared[:1], oneLimiter, anyUser), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, bareRueidis, 1.15),
			benchtable.Beside(benchtable.InTime, barePooled),
			benchtable.AtMost(benchtable.InParallel, bareRueidis, 1),
			benchtable.AtMost(benchtable.InParallel, redisRate, 1/2.5),
			benchtable.Beside(benchtable.InParallel, throttling),
		}},
		{Name: "Do, three shared limiters of one label", ByTurns: true, InFlight: inFlight, Call: o.do(o.shared[:1], threeLimiters, anyUser), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, doOne, 1.3),
			benchtable.Beside(benchtable.InParallel, doOne),
		}},
		{Name: "Do, one shared limiter, three instances", ByTurns: true, InFlight: instances * inFlight, Call: o.do(o.shared[:], oneLimiter, anyUser), Targets: []benchtable.Target{
			benchtable.Beside(benchtable.InParallel, doOne),
		}},
		{Name: "Do, one shared concurrency limiter", ByTurns: true, InFlight: inFlight, Call: o.do(o.shared[:1], concurrency, anyUser)},
		{Name: "Do, one leased limiter, one hot key", InFlight: inFlight, Call: o.do(o.shared[:1], leased, hot), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.InTime, doLocal, 2),
			benchtable.Beside(benchtable.InParallel, doLocal),
		}},
		{Name: doLocal, InFlight: inFlight, Call: o.do([]*guarded{o.local}, oneLimiter, hot)},
		{Name: doStopped, InFlight: inFlight, Call: o.do([]*guarded{o.down}, oneLimiter, hot), Targets: []benchtable.Target{
			benchtable.AtMost(benchtable.MoreTime, doLocal, 1000),
		}},
	}
}

// turns makes a call for each goroutine of a row, of each of so many things in turn.
func turns(of int, call func(i int) func() error) func() func() error {
	var next atomic.Int64
	return func() func() error { return call(int(next.Add(1)) % of) }
}

// take takes from so many buckets of one user, by one of so many instances for each goroutine.
func (o *ours) take(instances, buckets int, user func() string) func() func() error {
	rule := &shared.Rule{Kind: shared.Bucket, Capacity: capacity, Fill: fill, Interval: time.Second}
	return turns(instances, func(i int) func() error {
		return func() error {
			asks, answers := make([]shared.Ask, buckets), make([]shared.Answer, buckets)
			of := user()
			for k := range asks {
				asks[k] = shared.Ask{Key: shared.Key{Policy: "policy", Component: strconv.Itoa(k), Label: "user", Value: of}, Rule: rule, Tokens: 1}
			}
			if err := o.stores[i].Take(o.ctx, asks, answers); err != nil {
				return err
			}
			for _, a := range answers {
				if !a.OK {
					return errRejected
				}
			}
			return nil
		}
	})
}

// do is a Do by one of the engines for each goroutine.
func (o *ours) do(engines []*guarded, at string, user func() string) func() func() error {
	return turns(len(engines), func(i int) func() error { return engines[i].do(o.ctx, at, user) })
}

// measureLeases prints how often instances ask the store about a key whose tokens they draw ahead: below the limit, where each instance
// has a thousand flows a second, and beyond it, where all together have three times what it lets in.
func measureLeases(ctx context.Context, stdout io.Writer, server *redistest.Server, engines []*guarded, lasts time.Duration) error {
	warm := lasts / 4 // they learn what their demand is
	// All stores renew their leases besides.
	renewed := scripts(server)
	<-time.After(lasts)
	idle := scripts(server) - renewed
	for _, row := range []struct {
		at   string
		rate float64 // of each instance's flows
	}{
		{leased, 1000},
		{overloaded, 3 * overloadRate / instances},
	} {
		var flows, admitted atomic.Int64
		failures := make(chan error, len(engines))
		begun := time.Now()
		for _, g := range engines {
			go func() {
				for n := 0; time.Since(begun) < warm+lasts; <-time.After(time.Millisecond) {
					for ; float64(n) < row.rate*time.Since(begun).Seconds(); n++ {
						err := g.do(ctx, row.at, hot)()
						if err != nil && !errors.Is(err, flowctl.ErrRejected) {
							failures <- err
							return
						}
						if time.Since(begun) < warm {
							continue
						}
						flows.Add(1)
						if err == nil {
							admitted.Add(1)
						}
					}
				}
				failures <- nil
			}()
		}
		<-time.After(warm)
		asked := scripts(server)
		var err error
		for range engines {
			err = errors.Join(err, <-failures)
		}
		if err != nil {
			return err
		}
		calls := scripts(server) - asked - idle
		fmt.Fprintf(stdout, "leased, %d instances, one key, %s: %d flows in %v, %d let in, %.0f calls of the store",
			len(engines), row.at, flows.Load(), lasts, admitted.Load(), calls)
		if row.at == leased {
			each := calls / lasts.Seconds() / float64(len(engines))
			fmt.Fprintf(stdout, ": %.1f a second and instance; target ≤ 25: %s\n", each, benchtable.Verdict(each <= 25))
		} else {
			each := 100 * calls / float64(flows.Load())
			fmt.Fprintf(stdout, ": %.1f for 100 flows; target ≤ 2: %s\n", each, benchtable.Verdict(each <= 2))
		}
	}
	return nil
}

// scripts returns how many scripts the server has run.
func scripts(server *redistest.Server) (n float64) {
	for _, command := range []string{"evalsha", "eval"} {
		_, after, _ := strings.Cut(server.Info("cmdstat_"+command), "calls=")
		number, _, _ := strings.Cut(after, ",")
		calls, _ := strconv.ParseFloat(number, 64) // none yet
		n += calls
	}
	return n
}

// measureMemory prints how much memory of the server a bucket takes, and slots that are held.
func measureMemory(ctx context.Context, stdout io.Writer, server *redistest.Server, keys int) (err error) {
	store, err := openStore(ctx, server, "memory", redisstore.WithTimeout(patient))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	for _, row := range []struct {
		name string
		rule *shared.Rule
		most float64
	}{
		{"a bucket", &shared.Rule{Kind: shared.Bucket, Capacity: 1e9, Fill: 1, Interval: time.Hour}, 200},
		{"a slot of a key by itself", &shared.Rule{Kind: shared.Slots, Capacity: 10, MaxInflight: time.Hour}, 0},
	} {
		server.Text("FLUSHALL")
		before, err := usedMemory(server)
		if err != nil {
			return err
		}
		const batch = 100
		for i := 0; i < keys; i += batch {
			asks, answers := make([]shared.Ask, batch), make([]shared.Answer, batch)
			for k := range asks {
				asks[k] = shared.Ask{Key: shared.Key{Policy: "checkout", Component: "0", Label: "user", Value: fmt.Sprintf("user-%08d", i+k)}, Rule: row.rule, Tokens: 1}
			}
			if err := store.Take(ctx, asks, answers); err != nil {
				return err
			}
		}
		after, err := usedMemory(server)
		if err != nil {
			return err
		}
		each := (after - before) / float64(keys)
		fmt.Fprintf(stdout, "memory in the server with %d keys: %.0f bytes for %s, with its name", keys, each, row.name)
		if row.most > 0 {
			fmt.Fprintf(stdout, "; target ≤ %.0f: %s", row.most, benchtable.Verdict(each <= row.most))
		}
		fmt.Fprintln(stdout)
	}
	server.Text("FLUSHALL")
	return nil
}

// saturated is how many calls are in flight while the server's processor time is measured.
const saturated = 256

// measureServer prints how much of the server's processor time a call takes, with many in flight: a server does no more calls than
// that. It does not depend on what else the machine does.
func measureServer(stdout io.Writer, server *redistest.Server, rows []*benchtable.Row, calls int) error {
	took := map[string]float64{}
	for _, r := range rows {
		before, err := usedTime(server)
		if err != nil {
			return err
		}
		errs := make(chan error, saturated)
		for range saturated {
			go func() {
				call := r.Call()
				for range calls / saturated {
					if err := call(); err != nil {
						errs <- err
						return
					}
				}
				errs <- nil
			}()
		}
		for range saturated {
			err = errors.Join(err, <-errs)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
		after, err := usedTime(server)
		if err != nil {
			return err
		}
		took[r.Name] = float64(after-before) / float64(calls/saturated*saturated)
		fmt.Fprintf(stdout, "%s, %d in flight: %.1f µs of the server's processor, at most %.0f thousand a second",
			r.Name, saturated, took[r.Name]/1e3, 1e6/took[r.Name])
		if one := took[takeOne]; r.Name == takeThree && one > 0 {
			ratio := took[takeThree] / one
			fmt.Fprintf(stdout, "; %.2f× %s; target ≤ 1.8×: %s", ratio, takeOne, benchtable.Verdict(ratio <= 1.8))
		}
		fmt.Fprintln(stdout)
	}
	return nil
}

// usedTime returns the processor time that the server has used.
func usedTime(server *redistest.Server) (time.Duration, error) {
	user, err := strconv.ParseFloat(server.Info("used_cpu_user"), 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(server.Info("used_cpu_sys"), 64)
	return time.Duration((user + system) * float64(time.Second)), err
}

// usedMemory returns how many bytes the server has in use.
func usedMemory(server *redistest.Server) (float64, error) {
	return strconv.ParseFloat(server.Info("used_memory"), 64)
}

// openStore opens a store in a namespace of its own.
func openStore(ctx context.Context, server *redistest.Server, namespace string, opts ...redisstore.Option) (*redisstore.Store, error) {
	return redisstore.Open(ctx, server.URL(), append(opts, redisstore.WithNamespace(namespace))...)
}
