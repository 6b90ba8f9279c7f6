package headgate_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// newClient is for the examples: a client of an engine with one limiter, and a function that closes the engine. A
// program makes both once, when it starts; the example of Guard shows how.
func newClient(limiter policy.Component) (client *flowctl.Client, done func()) {
	limits, err := engine.New([]policy.Policy{{Name: "example", Components: []policy.Component{limiter}}})
	if err != nil {
		panic(err)
	}
	client, err = flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	return client, func() { _ = limits.Close() }
}

// Two orders a minute, and the third caller learns that it was one too many.
func ExampleGuard() {
	limits, err := engine.New([]policy.Policy{{
		Name: "orders",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("checkout"), Capacity: 2, Fill: 2, Interval: time.Minute,
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
	charge := func(context.Context) (string, error) { return "receipt", nil }

	checkout := headgate.Guard(client, "checkout", flowctl.Params{}, charge, nil)
	for range 3 {
		receipt, err := checkout(ctx)
		if errors.Is(err, flowctl.ErrRejected) {
			fmt.Println("come back in a minute")
			continue
		}
		fmt.Println(receipt, err)
	}
	// Output:
	// receipt <nil>
	// receipt <nil>
	// come back in a minute
}

// Work at night waits for its turn, and a user does not.
func ExampleGuard_maxWait() {
	client, done := newClient(policy.ConcurrencyScheduler{Selectors: policy.At("render"), Max: 1, MaxInflight: time.Minute})
	defer done()

	ctx := context.Background()
	render := func(context.Context) (string, error) { return "a page", nil }
	nightly := headgate.Guard(client, "render", flowctl.Params{MaxWait: 10 * time.Minute}, render, nil)
	live := headgate.Guard(client, "render", flowctl.Params{MaxWait: flowctl.NoWait}, render, nil)

	queued := make(chan string)
	err := headgate.Do(ctx, client, "render", flowctl.Params{}, func(ctx context.Context, _ *flowctl.Flow) error {
		go func() {
			page, err := nightly(ctx)
			queued <- fmt.Sprint(page, ", ", err)
		}()
		_, err := live(ctx)
		fmt.Println(err)
		return nil
	})
	fmt.Println(err)
	fmt.Println(<-queued)
	// Output:
	// headgate: start "render": rejected: no tokens
	// <nil>
	// a page, <nil>
}

// Rejected callers get the last quote that was fetched, if it is recent, and else a plain answer.
func ExampleGuard_fallback() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("quote"), Capacity: 1, Fill: 1, Interval: time.Minute,
	})
	defer done()

	ctx := context.Background()
	fetch := func(context.Context) (string, error) { return "HDGT 42.00", nil }

	lastGood := fallback.NewLastGood[string](5 * time.Minute)
	quote := headgate.Guard(client, "quote", flowctl.Params{}, lastGood.Watch(fetch),
		fallback.First(lastGood.Func, fallback.Value("no quote right now")))

	fmt.Println(quote(ctx)) // fetched
	fmt.Println(quote(ctx)) // rejected, so remembered
	// Output:
	// HDGT 42.00 <nil>
	// HDGT 42.00 <nil>
}

// An error of the application's own hides flow control from its callers; errors.Is and errors.As still find both.
func ExampleGuard_error() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("quote"), Capacity: 1, Fill: 1, Interval: time.Minute,
	})
	defer done()

	ctx := context.Background()
	fetch := func(context.Context) (string, error) { return "HDGT 42.00", nil }

	errBusy := errors.New("the exchange is busy")
	quote := headgate.Guard(client, "quote", flowctl.Params{}, fetch, fallback.Error[string](errBusy))

	fmt.Println(quote(ctx))
	_, err := quote(ctx)
	fmt.Println(err)
	fmt.Println(errors.Is(err, errBusy), errors.Is(err, flowctl.ErrRejected))
	// Output:
	// HDGT 42.00 <nil>
	// the exchange is busy
	// true true
}

// Rejected callers get an answer with a status of its own.
func ExampleGuard_answer() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("report"), Interval: time.Minute}) // no capacity
	defer done()

	type answer struct {
		body   string
		status int
	}
	render := func(context.Context) (answer, error) { return answer{"the report", http.StatusOK}, nil }

	report := headgate.Guard(client, "report", flowctl.Params{CheckTimeout: 2 * time.Second}, render,
		fallback.Value(answer{"come back later", http.StatusServiceUnavailable}))

	fmt.Println(report(context.Background()))
	// Output:
	// {come back later 503} <nil>
}

// A nil client is flow control switched off: the same code runs, and nobody is asked.
func ExampleGuard_off() {
	var client *flowctl.Client

	charge := func(context.Context) (string, error) { return "receipt", nil }
	checkout := headgate.Guard(client, "checkout", flowctl.Params{}, charge, nil)

	fmt.Println(checkout(context.Background()))
	// Output:
	// receipt <nil>
}

// Each tenant has a bucket of its own, found by a label that comes from the argument.
func ExampleGuardFunc() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("search"), Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "tenant",
	})
	defer done()

	ctx := context.Background()
	type query struct{ tenant, text string }
	find := func(_ context.Context, q query) (string, error) { return "results for " + q.text, nil }

	search := headgate.GuardFunc(client, "search",
		func(_ context.Context, q query) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"tenant": q.tenant}}
		},
		find,
		func(_ context.Context, q query, _ error) (string, error) {
			return "popular results instead of " + q.text, nil
		})

	fmt.Println(search(ctx, query{"acme", "anvils"}))
	fmt.Println(search(ctx, query{"acme", "rockets"}))
	fmt.Println(search(ctx, query{"other", "rockets"}))
	// Output:
	// results for anvils <nil>
	// popular results instead of rockets <nil>
	// results for rockets <nil>
}

// fallback.For fits a fallback that does not look at the argument.
func ExampleGuardFunc_fallback() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("greet"), Interval: time.Minute}) // no capacity
	defer done()

	greet := func(_ context.Context, name string) (string, error) { return "Hello, " + name, nil }

	limited := headgate.GuardFunc(client, "greet", nil, greet, fallback.For[string](fallback.Value("Hello")))

	fmt.Println(limited(context.Background(), "Ann"))
	// Output:
	// Hello <nil>
}

// The flow looks a report up with the check, and stores what it had to make.
func ExampleDo() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("report"), Capacity: 10, Fill: 10, Interval: time.Minute,
	})
	defer done()

	ctx := context.Background()
	render := func(month string) []byte {
		fmt.Println("rendering", month)
		return []byte("report of " + month)
	}

	report := func(month string) (report []byte, err error) {
		err = headgate.Do(ctx, client, "report", flowctl.Params{ResultCacheKey: month},
			func(ctx context.Context, flow *flowctl.Flow) error {
				if cached, ok, _ := flow.ResultCache(); ok {
					report = cached
					return nil
				}
				report = render(month)
				_ = flow.SetResultCache(ctx, report, time.Hour) // if not, the next flow renders it again
				return nil
			})
		return report, err
	}

	for range 2 {
		page, err := report("October")
		fmt.Printf("%s %v\n", page, err)
	}
	// Output:
	// rendering October
	// report of October <nil>
	// report of October <nil>
}

// Do has no fallback: what to do instead is up to the code after it.
func ExampleDo_rejected() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("mail"), Interval: time.Minute}) // no capacity
	defer done()

	err := headgate.Do(context.Background(), client, "mail", flowctl.Params{},
		func(context.Context, *flowctl.Flow) error {
			fmt.Println("sent")
			return nil
		})
	if errors.Is(err, flowctl.ErrRejected) {
		fmt.Println("put into the outbox")
	}
	// Output:
	// put into the outbox
}

// A result that can be used again is stored, and calls that find it do not run the function.
func ExampleCached() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("report"), Capacity: 100, Fill: 100, Interval: time.Minute,
	})
	defer done()

	runs := 0
	report := headgate.Cached(client, "report", flowctl.Params{ResultCacheKey: "may"},
		func(context.Context) (string, error) {
			runs++
			return "the report for May", nil
		}, nil, headgate.CachePolicy[string]{TTL: time.Hour}) // no fallback, and values as JSON
	text, err := report(context.Background())
	fmt.Println(text, err, runs)
	// Output: the report for May <nil> 1
}

// Each result has a key of its own, here the argument. Calls that look for the same one share a run.
func ExampleCachedFunc() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("report"), Capacity: 100, Fill: 100, Interval: time.Minute,
	})
	defer done()

	render := func(_ context.Context, month string) (string, error) {
		fmt.Println("rendering", month)
		return "the report for " + month, nil
	}

	report := headgate.CachedFunc(client, "report",
		func(_ context.Context, month string) flowctl.Params {
			return flowctl.Params{ResultCacheKey: month}
		},
		render, nil, headgate.CachePolicy[string]{TTL: time.Hour})

	ctx := context.Background()
	fmt.Println(report(ctx, "May"))
	fmt.Println(report(ctx, "April"))
	fmt.Println(report(ctx, "May"))
	// Output:
	// rendering May
	// the report for May <nil>
	// rendering April
	// the report for April <nil>
	// the report for May <nil>
}

// Callers share one run, and it is one flow: a limit of one lets all of them in.
func ExampleCached_shared() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("model"), Capacity: 1, Fill: 1, Interval: time.Hour,
	})
	defer done()

	answers := headgate.Cached(client, "model", flowctl.Params{ResultCacheKey: "the same prompt"},
		func(context.Context) (string, error) {
			<-time.After(100 * time.Millisecond)
			return "answer", nil
		}, nil, headgate.CachePolicy[string]{})

	var callers sync.WaitGroup
	var answered atomic.Int64
	for range 50 {
		callers.Go(func() {
			if _, err := answers(context.Background()); err == nil {
				answered.Add(1)
			}
		})
	}
	callers.Wait()
	fmt.Println(answered.Load(), "answered")
	// Output: 50 answered
}

// Rejected callers get the last report, also when that has expired some minutes ago, and else a plain answer.
func ExampleCached_stale() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("report"), Capacity: 1, Fill: 1, Interval: time.Hour,
	})
	defer done()

	ctx := context.Background()
	const ttl = 10 * time.Millisecond
	render := func(context.Context) (string, error) { return "the report for May", nil }

	report := headgate.Cached(client, "report", flowctl.Params{}, render,
		fallback.First(fallback.Stale[string](5*time.Minute), fallback.Value("no report right now")),
		headgate.CachePolicy[string]{TTL: ttl})

	fmt.Println(report(ctx)) // rendered
	<-time.After(2 * ttl)
	fmt.Println(report(ctx)) // expired and rejected, so stale
	// Output:
	// the report for May <nil>
	// the report for May <nil>
}

// A call that comes too early waits until it may run, as long as its caller has time.
func ExampleRetrying() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("quote"), Capacity: 1, Fill: 1, Interval: 20 * time.Millisecond,
	})
	defer done()

	fetch := func(context.Context) (string, error) { return "HDGT 42.00", nil }

	patient := headgate.Retrying(client, headgate.RetryPolicy{})
	quote := headgate.Guard(patient, "quote", flowctl.Params{}, fetch, nil)

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for range 3 {
		fmt.Println(quote(ctx))
	}
	// Output:
	// HDGT 42.00 <nil>
	// HDGT 42.00 <nil>
	// HDGT 42.00 <nil>
}

// A call that would have to wait longer than its caller does, does not wait at all.
func ExampleRetrying_deadline() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("quote"), Capacity: 1, Fill: 1, Interval: time.Hour,
	})
	defer done()

	fetch := func(context.Context) (string, error) { return "HDGT 42.00", nil }
	quote := headgate.Guard(headgate.Retrying(client, headgate.RetryPolicy{}), "quote", flowctl.Params{}, fetch, fallback.Value("no quote right now"))

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println(quote(ctx))
	fmt.Println(quote(ctx)) // at once
	// Output:
	// HDGT 42.00 <nil>
	// no quote right now <nil>
}

// Workers that have nothing else to do wait their turn, however often that takes. They are few, so they need no budget.
func ExampleRetryPolicy() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("import"), Capacity: 1, Fill: 1, Interval: 10 * time.Millisecond,
	})
	defer done()

	var rows atomic.Int64
	read := func(context.Context) (int64, error) { return rows.Add(1), nil }

	patient := headgate.Retrying(client, headgate.RetryPolicy{Attempts: -1, Budget: -1, MaxWait: time.Minute})
	row := headgate.Guard(patient, "import", flowctl.Params{}, read, nil)

	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			if _, err := row(context.Background()); err != nil {
				fmt.Println(err)
			}
		})
	}
	workers.Wait()
	fmt.Println(rows.Load(), "rows")
	// Output:
	// 4 rows
}
