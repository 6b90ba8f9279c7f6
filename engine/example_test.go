package engine_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// Two orders in half a minute, for each user.
func ExampleNew() {
	limits, err := engine.New([]policy.Policy{{
		Name: "orders-per-user",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("checkout"), Capacity: 2, Fill: 2, Interval: 30 * time.Second, LimitBy: "user_id",
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()

	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	for _, user := range []string{"ann", "ann", "ann", "bob"} {
		flow := client.Start(ctx, "checkout", flowctl.Params{Labels: map[string]string{"user_id": user}})
		fmt.Println(user, flow.Decision())
		_, _ = flow.End(ctx)
	}
	// Output:
	// ann accepted
	// ann accepted
	// ann rejected
	// bob accepted
}

// Files hold the policies in Aperture's format. What a file says that is of no use to the engine is a warning.
func ExampleLoad() {
	limits, err := engine.Load("testdata/limits.yaml")
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	for _, warning := range limits.Warnings() {
		fmt.Println("warning:", warning)
	}

	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	for range 2 {
		flow := client.Start(ctx, "export", flowctl.Params{Labels: map[string]string{"tenant": "acme"}})
		fmt.Println(flow.Decision())
		defer func() { _, _ = flow.End(ctx) }()
	}
	// Output:
	// accepted
	// rejected
}

// The limits follow their file. A change that is wrong leaves them as they are.
func ExampleEngine_Watch() {
	const path = "testdata/limits.yaml"
	ctx, stop := context.WithCancel(context.Background())
	defer stop()

	limits, err := engine.Load(path)
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	if err := limits.Watch(ctx, path, engine.WatchParams{OnReload: func(err error) {
		if err != nil {
			slog.Error("the limits stay as they were", "error", err)
		}
	}}); err != nil {
		panic(err)
	}

	fmt.Println(limits.Stats().Reloads.Applied)
	// Output: 1
}

// Policies that the program reads itself come into force when they are applied. If they are wrong, those before stay.
func ExampleEngine_Apply() {
	limits, err := engine.Load("testdata/limits.yaml")
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	reload := func(path string) error {
		policies, err := policy.Load(path)
		if err != nil {
			return err
		}
		return limits.Apply(policies)
	}
	fmt.Println(reload("testdata/limits.yaml"))
	fmt.Println(reload("testdata/typo.yaml") == nil)
	// Output:
	// <nil>
	// false
}

// A mistake in a file is an error that says where it is.
func ExampleLoad_mistake() {
	_, err := engine.Load("testdata/typo.yaml")
	fmt.Println(err)
	// Output:
	// testdata/typo.yaml:7:11: policies[0].components[0].rate_limiter.limit_on: unknown key; did you mean "limit_by"?
}

// One export at a time: the second is rejected until the first has ended.
func ExampleNew_concurrency() {
	limits, err := engine.New([]policy.Policy{{
		Name: "export-slots",
		Components: []policy.Component{policy.ConcurrencyLimiter{
			Selectors: policy.At("export"), Max: 1, MaxInflight: 5 * time.Minute,
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	first := client.Start(ctx, "export", flowctl.Params{})
	second := client.Start(ctx, "export", flowctl.Params{})
	fmt.Println(first.Decision(), second.Decision())
	_, _ = second.End(ctx)

	slots, err := first.End(ctx)
	fmt.Printf("%+v %v\n", slots, err)

	third := client.Start(ctx, "export", flowctl.Params{})
	fmt.Println(third.Decision())
	_, _ = third.End(ctx)
	// Output:
	// accepted rejected
	// {Held:1 Returned:1 Settled:false} <nil>
	// accepted
}

// Flows that cost different amounts say how much in a label.
func ExampleNew_tokens() {
	limits, err := engine.New([]policy.Policy{{
		Name: "prompt-tokens",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("prompt"), Capacity: 1000, Fill: 1000, Interval: time.Hour, TokensLabel: "cost",
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	for _, cost := range []string{"900", "200", "2000", "100"} {
		flow := client.Start(ctx, "prompt", flowctl.Params{Labels: map[string]string{"cost": cost}})
		fmt.Println(cost, flow.Decision(), flow.RetryAfter().Round(time.Minute))
		_, _ = flow.End(ctx)
	}
	// Output:
	// 900 accepted 0s
	// 200 rejected 6m0s
	// 2000 rejected 0s
	// 100 accepted 0s
}

// A selector picks flows by their control point and, where that is not enough, by their labels.
func ExampleNew_matching() {
	limits, err := engine.New([]policy.Policy{{
		Name: "robots",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: []policy.Selector{{
				ControlPoint: "search",
				Labels: policy.LabelMatcher{
					Equal:      map[string]string{"plan": "free"},
					Require:    []policy.Requirement{{Key: "region", Operator: policy.NotIn, Values: []string{"eu", "us"}}},
					Expression: policy.LabelMatches{Label: "user_agent", Regex: "(?i)bot"},
				},
			}},
			Interval: time.Second, // no capacity: refuse them all
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	for _, labels := range []map[string]string{
		{"plan": "free", "user_agent": "SearchBot/1.0"},
		{"plan": "free", "user_agent": "SearchBot/1.0", "region": "eu"},
		{"plan": "paid", "user_agent": "SearchBot/1.0"},
	} {
		flow := client.Start(ctx, "search", flowctl.Params{Labels: labels})
		fmt.Println(flow.Decision())
		_, _ = flow.End(ctx)
	}
	// Output:
	// rejected
	// accepted
	// accepted
}

// A new limiter runs dry first: it decides, and rejects no flow.
func ExampleNew_dryRun() {
	limits, err := engine.New([]policy.Policy{{
		Name: "orders",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("checkout"), Capacity: 1, Fill: 1, Interval: time.Minute, DryRun: true,
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	for range 3 {
		flow := client.Start(ctx, "checkout", flowctl.Params{})
		fmt.Println(flow.Decision())
		_, _ = flow.End(ctx)
	}
	// Output:
	// accepted
	// accepted
	// accepted
}

// Bounds for an engine that sees many users, and keeps little.
func ExampleWithKeyCap() {
	limits, err := engine.New(nil,
		engine.WithKeyCap(100_000),           // for each limiter
		engine.WithCacheBounds(1_000, 8<<20), // for each of the two caches
		engine.WithLogger(slog.Default()))    // says so when a limiter has more keys than that
	if err != nil {
		panic(err)
	}
	fmt.Println(limits.Close())
	// Output: <nil>
}

// Numbers of single customers that a program keeps in memory. After a customer's plan has changed, Apply asks again.
func ExampleWithOverrides() {
	var plans sync.Map // of customers who have another one, by their names
	plans.Store("acme", policy.Override{Capacity: 3})

	policies := []policy.Policy{{Name: "per-customer", Components: []policy.Component{policy.RateLimiter{
		ID: "exports", Selectors: policy.At("export"), LimitBy: "customer",
		Capacity: 1, Fill: 1, Interval: time.Hour,
	}}}}
	limits, err := engine.New(policies, engine.WithOverrides(func(component, value string) (policy.Override, bool) {
		plan, ok := plans.Load(value)
		if !ok || component != "exports" {
			return policy.Override{}, false
		}
		return plan.(policy.Override), true
	}))
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	exports, err := limits.Component("per-customer", "exports")
	if err != nil {
		panic(err)
	}
	show := func(customer string) {
		usage, err := exports.Peek(context.Background(), customer)
		if err != nil {
			panic(err)
		}
		fmt.Printf("%s: %v\n", customer, usage.Capacity)
	}
	show("acme")
	show("globex")

	plans.Store("globex", policy.Override{Capacity: 2})
	if err := limits.Apply(policies); err != nil {
		panic(err)
	}
	show("globex")
	// Output:
	// acme: 3
	// globex: 1
	// globex: 2
}

// A new page for a tenth of the users at first, and for all of them after ten minutes, unless an operator holds the
// ramp. A user that has seen the new page goes on seeing it.
func ExampleComponent_Ramp() {
	limits, err := engine.New([]policy.Policy{{
		Name: "new-page",
		Components: []policy.Component{policy.LoadRamp{
			Selectors: policy.At("page"), SessionLabel: "user_id", PassThroughValues: []string{"tester"},
			Steps: []policy.RampStep{{Target: 10}, {Target: 100, Duration: 10 * time.Minute}},
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	component, err := limits.Component("new-page", "load_ramp.0")
	if err != nil {
		panic(err)
	}
	ramp, _ := component.Ramp()
	fmt.Printf("at %.0f %%\n", ramp.Percentage())
	ctx := context.Background()
	if err := ramp.Forward(ctx); err != nil {
		panic(err)
	}

	for _, user := range []string{"ann", "bob", "tester"} {
		flow := client.Start(ctx, "page", flowctl.Params{RampMode: true, Labels: map[string]string{"user_id": user}})
		fmt.Println(user, flow.Decision())
		_, _ = flow.End(ctx)
	}
	// Output:
	// at 10 %
	// ann accepted
	// bob rejected
	// tester accepted
}

// A user pays for more today: an operator looks at the user's bucket, and makes it full again.
func ExampleComponent_Reset() {
	limits, err := engine.New([]policy.Policy{{
		Name: "per-user",
		Components: []policy.Component{policy.RateLimiter{
			ID: "uploads", Selectors: policy.At("upload"), Capacity: 3, Fill: 3, Interval: 24 * time.Hour, StepFill: true, LimitBy: "user_id",
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	flow := client.Start(ctx, "upload", flowctl.Params{Labels: map[string]string{"user_id": "ann"}})
	_, _ = flow.End(ctx)

	uploads, err := limits.Component("per-user", "uploads")
	if err != nil {
		panic(err)
	}
	usage, err := uploads.Peek(ctx, "ann")
	if err != nil {
		panic(err)
	}
	fmt.Printf("%v of %v left\n", usage.Remaining, usage.Capacity)
	if err := uploads.Reset(ctx, "ann"); err != nil {
		panic(err)
	}

	usage, err = uploads.Peek(ctx, "ann")
	fmt.Println(usage.Remaining, err)
	// Output:
	// 2 of 3 left
	// 3 <nil>
}

// A quota that chats and batch jobs share, by what their prompts cost. Chats get nine times as much when both wait, and
// tenants share alike. The call that would have to wait for half a minute is rejected at once.
func ExampleNew_quota() {
	limits, err := engine.New([]policy.Policy{{
		Name: "llm-quota",
		Components: []policy.Component{policy.QuotaScheduler{
			Selectors: policy.At("prompt"), Capacity: 100, Fill: 100, Interval: time.Minute,
			Scheduler: policy.Scheduler{
				Workloads: []policy.Workload{{
					Name:               "chat",
					Labels:             policy.LabelMatcher{Equal: map[string]string{"kind": "chat"}},
					WorkloadParameters: policy.WorkloadParameters{Priority: 9},
				}},
				TokensLabel: "cost", FairnessLabel: "tenant",
			},
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	for _, cost := range []string{"100", "50"} {
		flow := client.Start(ctx, "prompt", flowctl.Params{
			Labels:       map[string]string{"kind": "chat", "tenant": "acme", "cost": cost},
			CheckTimeout: 5 * time.Second, // the longest that it waits
		})
		fmt.Println(flow.Decision(), flow.RetryAfter().Round(time.Second))
		_, _ = flow.End(ctx)
	}
	// Output:
	// accepted 0s
	// rejected 30s
}

// Fewer searches are let in while more than eight are at work, and step by step more again afterwards. The program
// provides how many are at work; the engine measures mean latencies itself.
func ExampleWithSignal() {
	var searches atomic.Int64 // at work

	limits, err := engine.New([]policy.Policy{{
		Name: "protect-search",
		Components: []policy.Component{policy.AIMDLoadScheduler{
			Selectors: policy.At("search"), Signal: policy.Named("searches"), Setpoint: policy.Constant(8),
		}},
	}}, engine.WithSignal("searches", func() float64 { return float64(searches.Load()) }))
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	flow := client.Start(ctx, "search", flowctl.Params{})
	if flow.ShouldRun() {
		searches.Add(1)
		fmt.Println("searching")
		searches.Add(-1)
	}
	_, _ = flow.End(ctx)
	// Output: searching
}

// The decisions about four flows, for an admin page.
func ExampleEngine_Stats() {
	limits, err := engine.New([]policy.Policy{{
		Name: "per-user",
		Components: []policy.Component{policy.RateLimiter{
			ID: "orders", Selectors: policy.At("checkout"), Capacity: 2, Fill: 2, Interval: 30 * time.Second, LimitBy: "user_id",
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	for _, user := range []string{"ann", "ann", "ann", "bob"} {
		flow := client.Start(ctx, "checkout", flowctl.Params{Labels: map[string]string{"user_id": user}})
		_, _ = flow.End(ctx)
	}

	for _, c := range limits.Stats().Components {
		fmt.Printf("%s/%s: %d passed, %d did not\n", c.Policy, c.ID, c.Accepted, c.Dropped)
	}
	// Output: per-user/orders: 3 passed, 1 did not
}

// Whose flows a limiter rejects most, and which flows meet no limit.
func ExampleComponent_Top() {
	limits, err := engine.New([]policy.Policy{{
		Name: "per-user",
		Components: []policy.Component{policy.RateLimiter{
			ID: "orders", Capacity: 2, Fill: 2, Interval: 30 * time.Second, LimitBy: "user_id",
			Selectors: []policy.Selector{{ControlPoint: "checkout", Labels: policy.LabelMatcher{Equal: map[string]string{"tier": "free"}}}},
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	for range 5 {
		flow := client.Start(ctx, "checkout", flowctl.Params{Labels: map[string]string{"user_id": "ann", "tier": "free"}})
		_, _ = flow.End(ctx)
	}
	_, _ = client.Start(ctx, "checkout", flowctl.Params{Labels: map[string]string{"user_id": "bob", "tier": "Free"}}).End(ctx)

	orders, err := limits.Component("per-user", "orders")
	if err != nil {
		panic(err)
	}
	for _, top := range orders.Top() {
		fmt.Printf("%s: about %d rejections, %d of them uncertain\n", top.Value, top.Rejected, top.Excess)
	}

	stats := limits.Stats()
	for _, at := range stats.ControlPoints {
		fmt.Printf("%q: %d accepted, %d of them met no limit\n", at.ControlPoint, at.Accepted, at.Unpicked)
	}
	for _, c := range stats.Components {
		for _, s := range c.Selectors {
			fmt.Printf("%s/%s acts at %q where %s: %d flows missed it\n", c.Policy, c.ID, s.ControlPoint, s.Labels, s.Missed)
		}
		fmt.Printf("%d flows lacked the label %s\n", c.Unlimited, c.LabelKey)
	}
	// Output:
	// ann: about 3 rejections, 0 of them uncertain
	// "": 0 accepted, 0 of them met no limit
	// "checkout": 3 accepted, 1 of them met no limit
	// per-user/orders acts at "checkout" where tier = "free": 0 flows missed it
	// 0 flows lacked the label user_id
}

// The host of an engine that package agent serves says where to show it: there is no client in the process.
func ExampleEngine_Instrument() {
	serve := func(limits *engine.Engine) error {
		if err := limits.Instrument(otel.GetMeterProvider()); err != nil {
			return err
		}
		// Register it with package agent, and serve.
		return nil
	}

	limits, err := engine.New(nil)
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	fmt.Println(serve(limits))
	// Output: <nil>
}
