package flowctl_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/baggage"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/labels"
	"github.com/headgate-go/headgate/policy"
)

// newLimits is for the examples: an engine that lets so many flows pass at a control point each minute. The example of
// New shows how it is made.
func newLimits(controlPoint string, flows float64) *engine.Engine {
	limits, err := engine.New([]policy.Policy{{
		Name: "example",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At(controlPoint), Capacity: flows, Fill: flows, Interval: time.Minute,
		}},
	}})
	if err != nil {
		panic(err)
	}
	return limits
}

// newClient is a client of newLimits, with a function that closes the engine.
func newClient(controlPoint string, flows float64) (client *flowctl.Client, done func()) {
	limits := newLimits(controlPoint, flows)
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	return client, func() { _ = limits.Close() }
}

// A client of an engine in the same process.
func ExampleNew() {
	limits, err := engine.New([]policy.Policy{{
		Name: "exports",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("export"), Capacity: 1, Fill: 1, Interval: time.Minute,
		}},
	}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()

	client, err := flowctl.New(limits, flowctl.WithLabels(map[string]string{"region": "eu"}))
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	for range 2 {
		flow := client.Start(ctx, "export", flowctl.Params{})
		fmt.Println(flow.Decision())
		_, _ = flow.End(ctx)
	}
	// Output:
	// accepted
	// rejected
}

// A client of an agent across the network, over TLS. Dial does not wait for the agent, Ready does.
func ExampleDial() {
	client, err := flowctl.Dial("agent.example:443",
		flowctl.WithAPIKey(os.Getenv("AGENT_KEY")),
		flowctl.WithLogger(slog.Default()))
	if err != nil {
		panic(err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := client.Ready(ctx); err != nil {
		slog.Warn("going on without flow control", "error", err)
	}

	// When the program ends: send what telemetry there is, and close the connection.
	if err := client.Close(context.Background()); err != nil {
		slog.Warn("some telemetry was lost", "error", err)
	}
}

// Where the agent is, is left to the deployment: APERTURE_AGENT_ADDRESS=localhost:8089 APERTURE_AGENT_INSECURE=true.
func ExampleDialEnv() {
	client, err := flowctl.DialEnv(flowctl.WithLogger(slog.Default()))
	if err != nil {
		panic(err) // headgate: dial: APERTURE_AGENT_ADDRESS is not set
	}
	defer func() { _ = client.Close(context.Background()) }()

	flow := client.Start(context.Background(), "checkout", flowctl.Params{})
	if !flow.ShouldRun() {
		fmt.Println(flow.Err())
	}
	_, _ = flow.End(context.Background())
}

func TestExampleDialEnv(t *testing.T) {
	t.Setenv("APERTURE_AGENT_ADDRESS", "unix:///no/agent.sock")
	t.Setenv("APERTURE_AGENT_INSECURE", "true")
	t.Setenv("APERTURE_AGENT_SKIP_VERIFY", "")
	t.Setenv("APERTURE_API_KEY", "")
	ExampleDialEnv()
}

// The two steps of which the guards of package headgate are made.
func ExampleClient_Start() {
	client, done := newClient("resize", 10)
	defer done()

	ctx := context.Background()
	flow := client.Start(ctx, "resize", flowctl.Params{Labels: map[string]string{"user_id": "42"}})
	if flow.ShouldRun() {
		fmt.Println("resizing")
		flow.SetError(nil) // or the error that the work ended with
	}
	if _, err := flow.End(ctx); err != nil {
		fmt.Println(err)
	}
	// Output:
	// resizing
}

// Deferred right after Start, EndWith sees the error that the function returns, and a panic.
func ExampleFlow_EndWith() {
	client, done := newClient("import", 1)
	defer done()

	read := func(context.Context) error { return errors.New("line 7: no such account") }

	load := func(ctx context.Context) (err error) {
		flow := client.Start(ctx, "import", flowctl.Params{})
		defer flow.EndWith(&err)
		if !flow.ShouldRun() {
			return flow.Err()
		}
		return read(flow.Context())
	}

	fmt.Println(load(context.Background()))
	fmt.Println(errors.Is(load(context.Background()), flowctl.ErrRejected))
	// Output:
	// line 7: no such account
	// true
}

// Nobody listens at the address. The flow runs all the same, unless it fails closed.
func ExampleParams_onUnreachable() {
	client, err := flowctl.Dial("unix:///no/agent.sock", flowctl.WithInsecure())
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	defer func() { _ = client.Close(ctx) }()

	for _, params := range []flowctl.Params{
		{},
		{OnUnreachable: flowctl.FailClosed},
	} {
		flow := client.Start(ctx, "payout", params)
		fmt.Println(flow.Decision(), flow.ShouldRun(), errors.Is(flow.Err(), flowctl.ErrUnreachable))
		_, _ = flow.End(ctx)
	}
	// Output:
	// unreachable true true
	// unreachable false true
}

// A file that is not there is no failure of the work: the flow ends as OK. The error comes back unchanged.
func ExampleParams_isFailure() {
	client, done := newClient("read", 10)
	defer done()

	read := headgate.Guard(client, "read",
		flowctl.Params{IsFailure: func(err error) bool { return !errors.Is(err, fs.ErrNotExist) }},
		func(context.Context) (string, error) { return "", fs.ErrNotExist },
		nil)

	_, err := read(context.Background())
	fmt.Println(err)
	// Output:
	// file does not exist
}

// Code below a guard gets at the flow by its context.
func ExampleFromContext() {
	client, done := newClient("page", 10)
	defer done()

	render := func(ctx context.Context) (string, error) {
		if flow, ok := flowctl.FromContext(ctx); ok {
			return "page of " + flow.String(), nil
		}
		return "page", nil
	}
	page := headgate.Guard(client, "page", flowctl.Params{}, render, nil)

	fmt.Println(page(context.Background()))
	fmt.Println(render(context.Background()))
	// Output:
	// page of flow "page": accepted <nil>
	// page <nil>
}

// Work can fail without an error in Go's sense. What SetStatus says goes before what follows from the error.
func ExampleFlow_SetStatus() {
	client, done := newClient("proxy", 10)
	defer done()

	code := 0
	forward := func(context.Context) (int, error) { return http.StatusBadGateway, nil }

	err := headgate.Do(context.Background(), client, "proxy", flowctl.Params{},
		func(ctx context.Context, flow *flowctl.Flow) (err error) {
			code, err = forward(ctx)
			if code >= 500 {
				flow.SetStatus(flowctl.StatusError)
			}
			return err
		})
	fmt.Println(code, err)
	// Output:
	// 502 <nil>
}

// What a call to a language model costs is known when the answer is there. The label has an estimate.
func ExampleFlow_Settle() {
	limits, err := engine.New([]policy.Policy{{
		Name: "per-tenant",
		Components: []policy.Component{policy.RateLimiter{
			Selectors: policy.At("prompt"), LimitBy: "tenant", Capacity: 1000, Fill: 1000, Interval: time.Hour, TokensLabel: "tokens",
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
	// complete asks a language model, and counts the tokens that the answer has taken.
	complete := func(context.Context, string) (answer string, tokens int, err error) { return "Gladly.", 1500, nil }

	ask := headgate.GuardFunc(client, "prompt",
		func(_ context.Context, question string) flowctl.Params { // the estimate
			tokens := strconv.Itoa(len(question) / 4)
			return flowctl.Params{Labels: map[string]string{"tenant": "acme", "tokens": tokens}}
		},
		func(ctx context.Context, question string) (string, error) {
			answer, tokens, err := complete(ctx, question)
			if flow, ok := flowctl.FromContext(ctx); ok && err == nil {
				flow.Settle("tokens", float64(tokens)) // what it really cost
			}
			return answer, err
		}, nil)

	for range 2 {
		answer, err := ask(context.Background(), "Write a poem about bridges.")
		if wait, ok := fallback.RetryAfter(err); ok {
			fmt.Println("in debt, for", wait.Round(time.Minute))
			continue
		}
		fmt.Println(answer)
	}
	// Output:
	// Gladly.
	// in debt, for 30m0s
}

// The first flow finds nothing and stores a value, the second finds it.
func ExampleFlow_ResultCache() {
	client, done := newClient("thumbnail", 10)
	defer done()

	ctx := context.Background()
	for range 2 {
		flow := client.Start(ctx, "thumbnail", flowctl.Params{ResultCacheKey: "photo-7"})
		value, ok, err := flow.ResultCache()
		fmt.Printf("%q %v %v\n", value, ok, err)
		if !ok {
			err := flow.SetResultCache(ctx, []byte("small photo"), time.Hour)
			fmt.Println("stored:", err)
		}
		_, _ = flow.End(ctx)
	}
	// Output:
	// "" false <nil>
	// stored: <nil>
	// "small photo" true <nil>
}

// Entries of the global cache are the same at all control points.
func ExampleFlow_SetGlobalCache() {
	client, done := newClient("import", 10)
	defer done()

	ctx := context.Background()
	flow := client.Start(ctx, "import", flowctl.Params{})
	if err := flow.SetGlobalCache(ctx, "rates", []byte("EUR 1.08"), time.Hour); err != nil {
		fmt.Println(err)
	}
	_, _ = flow.End(ctx)

	flow = client.Start(ctx, "checkout", flowctl.Params{GlobalCacheKeys: []string{"rates"}})
	rates, ok, err := flow.GlobalCache("rates")
	fmt.Printf("%s %v %v\n", rates, ok, err)
	_, _ = flow.End(ctx)
	// Output:
	// EUR 1.08 true <nil>
}

// A rejection says what rejected the flow, and what to answer an HTTP request with.
func ExampleRejectedError() {
	client, done := newClient("checkout", 1)
	defer done()

	charge := func(context.Context) (string, error) { return "receipt", nil }
	checkout := headgate.Guard(client, "checkout", flowctl.Params{}, charge, nil)

	handler := func(w http.ResponseWriter, r *http.Request) {
		receipt, err := checkout(r.Context())
		if rejected, ok := errors.AsType[*flowctl.RejectedError](err); ok {
			if wait, ok := fallback.RetryAfter(err); ok {
				w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
			}
			http.Error(w, "too many orders", rejected.HTTPStatus)
			return
		}
		if err != nil {
			http.Error(w, "out of order", http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, receipt)
	}

	for range 2 {
		w := httptest.NewRecorder()
		handler(w, httptest.NewRequest(http.MethodPost, "/checkout", nil))
		fmt.Println(w.Code, w.Header().Get("Retry-After") != "")
	}

	_, err := checkout(context.Background())
	if rejected, ok := errors.AsType[*flowctl.RejectedError](err); ok {
		fmt.Println(rejected.ControlPoint, "is", rejected.Reason, "by", rejected.Policy(), rejected.Component())
	}
	// Output:
	// 200 false
	// 429 true
	// checkout is rate limited by example rate_limiter.0
}

// A gRPC handler returns the error as it is: callers get a status that fits, with a RetryInfo where
// the wait is known, and do not learn which policy it was.
func ExampleRejectedError_GRPCStatus() {
	client, done := newClient("Checkout", 0)
	defer done()

	handler := func(ctx context.Context) (reply string, err error) {
		err = headgate.Do(ctx, client, "Checkout", flowctl.Params{}, func(context.Context, *flowctl.Flow) error {
			reply = "receipt"
			return nil
		})
		return reply, err
	}

	_, err := handler(context.Background())
	s := status.Convert(err)
	fmt.Println(s.Code())
	fmt.Println(s.Message())
	// Output:
	// ResourceExhausted
	// headgate: start "Checkout": rejected: rate limited
}

// The second flow runs as well; its decision tells what would have become of it.
func ExampleWithDryRun() {
	limits := newLimits("signup", 1)
	defer limits.Close()
	client, err := flowctl.New(limits, flowctl.WithDryRun())
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	for range 2 {
		flow := client.Start(ctx, "signup", flowctl.Params{})
		fmt.Println(flow.Decision(), flow.ShouldRun())
		_, _ = flow.End(ctx)
	}
	// Output:
	// accepted true
	// rejected true
}

// Labels come from several sources. For each key, what the flow itself says goes before the context, and the client's
// defaults come last.
func ExampleWithLabels() {
	limits := newLimits("search", 10)
	defer limits.Close()
	client, err := flowctl.New(limits, flowctl.WithLabels(map[string]string{"region": "eu", "tier": "free", "user_id": "nobody"}))
	if err != nil {
		panic(err)
	}

	ctx := labels.With(context.Background(), "tier", "gold", "user_id", "42")
	flow := client.Start(ctx, "search", flowctl.Params{Labels: map[string]string{"user_id": "43"}})

	all := flow.CheckResponse().GetTelemetryFlowLabels()
	fmt.Println(all["region"], all["tier"], all["user_id"])
	_, _ = flow.End(ctx)
	// Output:
	// eu gold 43
}

// One member of the baggage becomes a label, the other does not.
func ExampleWithBaggage() {
	limits := newLimits("search", 10)
	defer limits.Close()
	client, err := flowctl.New(limits, flowctl.WithBaggage("tenant"))
	if err != nil {
		panic(err)
	}

	members, err := baggage.Parse("tenant=acme,cart=5d41")
	if err != nil {
		panic(err)
	}
	ctx := baggage.ContextWithBaggage(context.Background(), members)
	flow := client.Start(ctx, "search", flowctl.Params{})

	fmt.Println(flow.CheckResponse().GetFlowLabelKeys())
	_, _ = flow.End(ctx)
	// Output:
	// [tenant]
}

// What an operator should know is logged, each kind once a minute at most.
func ExampleWithLogger() {
	var lines bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&lines, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{} // to have the same output each time
			}
			return a
		},
	}))
	limits := newLimits("search", 10)
	defer limits.Close()
	client, err := flowctl.New(limits, flowctl.WithLogger(logger))
	if err != nil {
		panic(err)
	}

	ctx := context.Background()
	for range 3 {
		_, _ = client.Start(ctx, "", flowctl.Params{}).End(ctx)
	}
	fmt.Print(lines.String())
	// Output:
	// level=WARN msg="headgate: a flow cannot be asked about" error.control_point="" error.problem="control point is empty" unlogged_before=0
}

// Who was rejected, and by which limit, for the people who answer customers.
func ExampleWithOnDecision() {
	type customerKey struct{}
	customerOf := func(ctx context.Context) any { return ctx.Value(customerKey{}) }

	audit := flowctl.WithOnDecision(func(ctx context.Context, flow *flowctl.Flow) {
		if rejected, ok := errors.AsType[*flowctl.RejectedError](flow.Err()); ok {
			fmt.Println(customerOf(ctx), rejected.ControlPoint, rejected.Policy(), rejected.Component(), rejected.Reason)
		}
	})
	limits := newLimits("search", 1)
	defer limits.Close()
	client, err := flowctl.New(limits, audit)
	if err != nil {
		panic(err)
	}
	for _, customer := range []string{"ann", "bob"} {
		ctx := context.WithValue(context.Background(), customerKey{}, customer)
		_, _ = client.Start(ctx, "search", flowctl.Params{}).End(ctx)
	}
	// Output: bob search example rate_limiter.0 rate limited
}

// The application's own traces get a span for each flow, its metrics a count of decisions.
func ExampleWithTracerProvider() {
	limits := newLimits("search", 10)
	defer limits.Close()
	client, err := flowctl.New(limits,
		flowctl.WithTracerProvider(otel.GetTracerProvider()),
		flowctl.WithMeterProvider(otel.GetMeterProvider()))
	if err != nil {
		panic(err)
	}

	flow := client.Start(context.Background(), "search", flowctl.Params{})
	fmt.Println(flow.Decision())
	_, _ = flow.End(flow.Context())
	// Output:
	// accepted
}

// An agent that is told of HTTP requests makes labels of them by itself. This one limits tenants, whom it knows by a
// header.
func ExampleFlow_HTTPAnswer() {
	limits, err := engine.New([]policy.Policy{{Name: "per-tenant", Components: []policy.Component{policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: 30 * time.Second, LimitBy: "http.request.header.x_tenant",
	}}}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	address, stop := serve(limits)
	defer stop()
	client, err := flowctl.Dial(address, flowctl.WithInsecure(), flowctl.WithCheckTimeout(10*time.Second))
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	defer client.Close(ctx)

	for range 2 {
		flow := client.Start(ctx, "orders", flowctl.Params{HTTP: &flowctl.HTTPRequest{
			Method: http.MethodGet, Path: "/orders", Host: "shop.example", Scheme: "https", Protocol: "HTTP/2",
			Headers: map[string]string{"x-tenant": "acme"},
		}})
		answer, _ := flow.HTTPAnswer()
		fmt.Println(flow.Decision(), answer.Status, answer.Header)
		_, _ = flow.End(ctx)
	}
	// Output:
	// accepted 0 map[]
	// rejected 429 map[retry-after:30]
}

// serve is for the example above: an agent that serves an engine, and a function that stops it. The example of
// agent.Register shows how that is done.
func serve(limits *engine.Engine) (address string, stop func()) {
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	server := grpc.NewServer(agent.ServerOptions()...)
	agent.Register(server, limits)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		_ = server.Serve(listener)
	}()
	return listener.Addr().String(), func() {
		server.Stop()
		<-stopped
	}
}

// A program that must not start without its agent waits for it.
func ExampleClient_Ready() {
	client, done := newClient("checkout", 10)
	defer done()

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	fmt.Println(client.Ready(ctx))

	_ = client.Close(ctx)
	fmt.Println(client.Ready(ctx))
	// Output:
	// <nil>
	// headgate: client closed
}

// A service shuts down from the outside in: first those who start flows, then the client, then the engine.
func ExampleClient_Close() {
	limits, err := engine.New(nil)
	if err != nil {
		panic(err)
	}
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Second} // with handlers that use the client

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = errors.Join(
		server.Shutdown(ctx), // waits for the requests in flight, and so for their flows
		client.Close(ctx),    // sends what telemetry there is
		limits.Close(),
	)
	fmt.Println(err)
	// Output:
	// <nil>
}

// An agent whose certificate comes from an authority of one's own.
func ExampleWithTLSConfig() {
	roots := x509.NewCertPool() // with the authority's certificate in it
	client, err := flowctl.Dial("agent.internal:443", flowctl.WithTLSConfig(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}))
	if err != nil {
		panic(err)
	}
	fmt.Println(client.Close(context.Background()))
	// Output: <nil>
}

// A connection that the program has already.
func ExampleWithConn() {
	conn, err := grpc.NewClient("agent.internal:443", grpc.WithTransportCredentials(credentials.NewTLS(nil)))
	if err != nil {
		panic(err)
	}
	client, err := flowctl.Dial("", flowctl.WithConn(conn))
	if err != nil {
		panic(err)
	}
	fmt.Println(client.Close(context.Background()), conn.Close())
	// Output: <nil> <nil>
}

// A breaker that waits longer before it takes an agent for dead, and asks less often whether it is back.
func ExampleWithAgentBreaker() {
	client, err := flowctl.Dial("agent.internal:443", flowctl.WithAgentBreaker(flowctl.AgentBreaker{
		Failures: 20, Span: 2 * time.Second, Probe: 5 * time.Second,
	}))
	if err != nil {
		panic(err)
	}
	fmt.Println(client.Close(context.Background()))
	// Output: <nil>
}

// Timeouts for a service whose own callers wait for 300 ms, and for one of its flows that may queue at the agent.
func ExampleWithCheckTimeout() {
	client, err := flowctl.Dial("agent.internal:443",
		flowctl.WithCheckTimeout(50*time.Millisecond), // then flows fail open, with time left to do the work
		flowctl.WithEndTimeout(500*time.Millisecond))  // for flows that hold slots
	if err != nil {
		panic(err)
	}
	nightly := flowctl.Params{MaxWait: 30 * time.Second} // nobody waits for this one

	fmt.Println(nightly.MaxWait, client.Close(context.Background()))
	// Output: 30s <nil>
}
