package fallback_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
)

// Each of these goes where a guard takes its onReject. The examples call them as a guard does, with the error of a flow
// that may be retried after two seconds.
var flowErr error = waitError(2 * time.Second)

func ExampleValue() {
	onReject := fallback.Value("the usual suggestions")

	fmt.Println(onReject(context.Background(), flowErr))
	// Output:
	// the usual suggestions <nil>
}

func ExampleError() {
	errBusy := errors.New("the shop is busy, come back soon")
	onReject := fallback.Error[string](errBusy)

	_, err := onReject(context.Background(), flowErr)
	fmt.Println(err)
	fmt.Println(errors.Is(err, errBusy), errors.Is(err, flowErr))
	// Output:
	// the shop is busy, come back soon
	// true true
}

func ExampleCall() {
	replica := func(context.Context) (string, error) { return "from the replica", nil }
	onReject := fallback.Call(replica)

	fmt.Println(onReject(context.Background(), flowErr))
	// Output:
	// from the replica <nil>
}

func ExampleFirst() {
	var lastGood fallback.LastGood[string] // has seen nothing yet
	replica := func(context.Context) (string, error) { return "", errors.New("replica down") }
	onReject := fallback.First(lastGood.Func, fallback.Call(replica), fallback.Value("the usual suggestions"))

	fmt.Println(onReject(context.Background(), flowErr))
	// Output:
	// the usual suggestions <nil>
}

func ExampleRescue() {
	price := func(context.Context) (int, error) { return 0, flowctl.ErrRejected } // guarded

	offer := fallback.Rescue(func(ctx context.Context) (string, error) {
		cents, err := price(ctx)
		if err != nil {
			return "", fmt.Errorf("offer: %w", err)
		}
		return fmt.Sprintf("%d cents", cents), nil
	}, fallback.Value("ask in the shop"))

	fmt.Println(offer(context.Background()))
	// Output:
	// ask in the shop <nil>
}

func ExampleFor() {
	// A guard of func(ctx, userID string) (int, error) has a fallback that gets the userID too; this one ignores it.
	onReject := fallback.For[string](fallback.Value(1))

	fmt.Println(onReject(context.Background(), "user 42", flowErr))
	// Output:
	// 1 <nil>
}

func ExampleLastGood() {
	prices := func(context.Context) (string, error) { return "prices of today", nil }

	// Guard lastGood.Watch(prices) instead of prices, with lastGood.Func as its onReject.
	lastGood := fallback.NewLastGood[string](5 * time.Minute)
	watched := lastGood.Watch(prices)

	fmt.Println(lastGood.Func(context.Background(), flowErr))
	fmt.Println(watched(context.Background()))
	fmt.Println(lastGood.Func(context.Background(), flowErr))
	// Output:
	//  rejected
	// prices of today <nil>
	// prices of today <nil>
}

// headgate.Cached calls its fallback with what it has kept. A guard of one's own does it like this.
func ExampleStale() {
	onReject := fallback.First(fallback.Stale[string](5*time.Minute), fallback.Value("no report yet"))

	ctx := context.Background()
	fmt.Println(onReject(ctx, flowErr))

	ctx = fallback.WithLast(ctx, "the report for May", time.Now().Add(-time.Minute)) // when it has expired
	fmt.Println(onReject(ctx, flowErr))
	// Output:
	// no report yet <nil>
	// the report for May <nil>
}

func ExampleRetryAfter() {
	after, ok := fallback.RetryAfter(fmt.Errorf("loading the page: %w", flowErr))
	fmt.Println(after, ok)

	_, ok = fallback.RetryAfter(errors.New("something else"))
	fmt.Println(ok)
	// Output:
	// 2s true
	// false
}
