package httpguard_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

// newClient is for the examples: a client of an engine with one limiter, and a function that closes the engine. A
// program makes both once, when it starts.
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

// send has a handler answer a request.
func send(h http.Handler, method, target string, header ...string) *http.Response {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

// One order a minute. The second answer says when to retry.
func ExampleMiddleware() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute,
	})
	defer done()
	order := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "order", r.PathValue("id"))
	})

	guard := httpguard.Middleware(client, "orders")

	mux := http.NewServeMux()
	mux.Handle("GET /orders/{id}", guard(order))

	for range 2 {
		resp := send(mux, http.MethodGet, "/orders/7")
		body, _ := io.ReadAll(resp.Body)
		fmt.Printf("%d %s\n%s", resp.StatusCode, resp.Header["Retry-After"], body)
	}
	// Output:
	// 200 []
	// order 7
	// 429 [60]
	// {"title":"Too Many Requests","status":429,"detail":"rate limited"}
}

// Each user has a bucket. The label comes from what the service knows, not from what requests say of themselves.
func ExampleWithParams() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "user_id",
	})
	defer done()
	userOf := func(r *http.Request) string { return r.Header.Get("X-Authenticated-User") }

	guard := httpguard.Middleware(client, "orders",
		httpguard.WithParams(func(r *http.Request) flowctl.Params {
			return flowctl.Params{
				Labels:        map[string]string{"user_id": userOf(r)},
				OnUnreachable: flowctl.FailClosed,
			}
		}),
	)

	h := guard(http.NotFoundHandler())
	for _, user := range []string{"ann", "ann", "bob"} {
		fmt.Println(user, send(h, http.MethodGet, "/", "X-Authenticated-User", user).Status)
	}
	// Output:
	// ann 404 Not Found
	// ann 429 Too Many Requests
	// bob 404 Not Found
}

// A header becomes a label when it is listed.
func ExampleWithHeaders() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 1, Fill: 1, Interval: time.Minute, LimitBy: "http.request.header.x_tenant",
	})
	defer done()

	guard := httpguard.Middleware(client, "orders", httpguard.WithHeaders("X-Tenant"))

	h := guard(http.NotFoundHandler())
	for _, tenant := range []string{"acme", "acme", "other"} {
		fmt.Println(tenant, send(h, http.MethodGet, "/", "X-Tenant", tenant).Status)
	}
	// Output:
	// acme 404 Not Found
	// acme 429 Too Many Requests
	// other 404 Not Found
}

// Each route is a control point. Middleware around a mux must ask the mux for the route, because it runs before the
// routing.
func ExampleWithControlPoint() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("GET /reports/{month}"), Interval: time.Minute}) // no capacity
	defer done()

	mux := http.NewServeMux()
	mux.Handle("GET /reports/{month}", http.NotFoundHandler())
	mux.Handle("GET /orders/{id}", http.NotFoundHandler())

	guard := httpguard.Middleware(client, "unknown route", httpguard.WithControlPoint(
		func(r *http.Request) string {
			_, pattern := mux.Handler(r)
			return pattern
		}))
	h := guard(mux)

	fmt.Println(send(h, http.MethodGet, "/orders/7").Status)
	fmt.Println(send(h, http.MethodGet, "/reports/may").Status)
	// Output:
	// 404 Not Found
	// 429 Too Many Requests
}

func ExampleWithSkip() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("all"), Interval: time.Minute}) // no capacity
	defer done()

	guard := httpguard.Middleware(client, "all",
		httpguard.WithSkipPaths("/health", "/ready"),
		httpguard.WithSkipPatterns(regexp.MustCompile(`/static/.*\.css`)),
		httpguard.WithSkip(func(r *http.Request) bool { return r.Method == http.MethodOptions }),
	)

	h := guard(http.NotFoundHandler())
	for _, path := range []string{"/health", "/healthy", "/static/app.css", "/my/static/app.css"} {
		fmt.Println(path, send(h, http.MethodGet, path).Status)
	}
	// Output:
	// /health 404 Not Found
	// /healthy 429 Too Many Requests
	// /static/app.css 404 Not Found
	// /my/static/app.css 429 Too Many Requests
}

// A page that looks like the rest of the site. Retry-After is in the header already.
func ExampleWithOnReject() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("shop"), Interval: time.Minute}) // no capacity
	defer done()

	guard := httpguard.Middleware(client, "shop", httpguard.WithOnReject(
		func(w http.ResponseWriter, r *http.Request, flow *flowctl.Flow) {
			if flow.Decision() != flowctl.Rejected {
				httpguard.Problem(w, r, flow)
				return
			}
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(flow.HTTPStatus())
			fmt.Fprintln(w, "<h1>We are sold out for a moment</h1>")
		}))

	resp := send(guard(http.NotFoundHandler()), http.MethodGet, "/")
	body, _ := io.ReadAll(resp.Body)
	fmt.Printf("%s\n%s", resp.Status, body)
	// Output:
	// 429 Too Many Requests
	// <h1>We are sold out for a moment</h1>
}

// Clients see what is left of their limits before they run into them.
func ExampleWithRateLimitHeaders() {
	client, done := newClient(policy.RateLimiter{
		ID: "burst", Selectors: policy.At("orders"), Capacity: 10, Fill: 10, Interval: time.Minute,
	})
	defer done()

	guard := httpguard.Middleware(client, "orders", httpguard.WithRateLimitHeaders())

	resp := send(guard(http.NotFoundHandler()), http.MethodGet, "/")
	fmt.Println("RateLimit:", resp.Header.Get("RateLimit"))
	fmt.Println("RateLimit-Policy:", resp.Header.Get("RateLimit-Policy"))
	// Output:
	// RateLimit: "example/burst";r=9
	// RateLimit-Policy: "example/burst";q=10
}

// An agent whose policies classify requests gets the request, and answers it.
func ExampleWithCheckHTTP() {
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("orders"), Capacity: 10, Fill: 10, Interval: time.Minute, LimitBy: "http.request.header.x_tenant",
	})
	defer done()
	order := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ordered") })

	guard := httpguard.Middleware(client, "orders",
		httpguard.WithCheckHTTP(), httpguard.WithHeaders("X-Tenant", "Content-Type"))

	fmt.Println(send(guard(order), http.MethodPost, "/orders", "X-Tenant", "acme").Status)
	// Output:
	// 200 OK
}

// A service that asks only for what it has stored treats 404 as a failure.
func ExampleStatusError() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("store"), Capacity: 1, Fill: 1, Interval: time.Minute})
	defer done()

	isFailure := func(err error) bool {
		response, ok := errors.AsType[*httpguard.StatusError](err)
		return !ok || response.StatusCode == http.StatusNotFound || response.StatusCode >= 500
	}
	store := &http.Client{Transport: httpguard.NewTransport(client, "store", nil,
		httpguard.WithParams(func(*http.Request) flowctl.Params {
			return flowctl.Params{IsFailure: isFailure}
		}))}

	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	resp, err := store.Get(server.URL)
	if err != nil {
		panic(err)
	}
	_ = resp.Body.Close()
	for _, code := range []int{http.StatusConflict, resp.StatusCode, http.StatusBadGateway} {
		fmt.Println(code, isFailure(&httpguard.StatusError{StatusCode: code}))
	}
	// Output:
	// 409 false
	// 404 true
	// 502 true
}

// A third party's API allows one call a minute. Calls beyond that are not sent.
func ExampleNewTransport() {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "EUR 0.92")
	}))
	defer api.Close()
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("exchange-rates"), Capacity: 1, Fill: 1, Interval: time.Minute,
	})
	defer done()

	rates := &http.Client{Transport: httpguard.NewTransport(client, "exchange-rates", nil)}

	for range 2 {
		resp, err := rates.Get(api.URL)
		if wait, ok := fallback.RetryAfter(err); ok {
			fmt.Println("the quota is used up, for", wait.Round(time.Second))
			continue
		}
		if err != nil {
			panic(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close() // which ends the flow
		fmt.Printf("%s\n", body)
	}
	// Output:
	// EUR 0.92
	// the quota is used up, for 1m0s
}

// The API asks for a pause, and gets it.
func ExampleTransport_retryAfter() {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Println("the API is called")
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer api.Close()
	client, done := newClient(policy.ConcurrencyLimiter{Selectors: policy.At("rates"), Max: 10, MaxInflight: time.Minute})
	defer done()

	rates := &http.Client{Transport: httpguard.NewTransport(client, "rates", nil)}
	for range 2 {
		resp, err := rates.Get(api.URL)
		if paused, ok := errors.AsType[*httpguard.PausedError](err); ok {
			fmt.Println("not again in the next", paused.RetryAfter().Round(time.Second))
			continue
		}
		if err != nil {
			panic(err)
		}
		_ = resp.Body.Close()
	}
	// Output:
	// the API is called
	// not again in the next 30s
}

// An upstream counts what a response costs while it streams it, and says so in a trailer.
func ExampleWithCostHeader() {
	model := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Tokens-Used")
		fmt.Fprint(w, "Gladly.")
		w.Header().Set("X-Tokens-Used", "150")
	}))
	defer model.Close()
	client, done := newClient(policy.RateLimiter{
		Selectors: policy.At("model"), Capacity: 100, Fill: 100, Interval: time.Hour, TokensLabel: "tokens",
	})
	defer done()

	prompts := &http.Client{Transport: httpguard.NewTransport(client, "model", nil,
		httpguard.WithCostHeader("tokens", "X-Tokens-Used"))}

	for range 2 {
		resp, err := prompts.Get(model.URL)
		if wait, ok := fallback.RetryAfter(err); ok { // for 51 tokens
			fmt.Println("in debt, for", wait.Round(time.Minute))
			continue
		}
		if err != nil {
			panic(err)
		}
		answer, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		fmt.Printf("%s\n", answer)
	}
	// Output:
	// Gladly.
	// in debt, for 31m0s
}

// Requests wait while the upstream pauses, and are sent again if it says when. All waits of a request come to 10 seconds at most.
func ExampleWithRetries() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("rates"), Capacity: 10, Fill: 10, Interval: time.Second})
	defer done()

	rates := &http.Client{Transport: httpguard.NewTransport(client, "rates", nil,
		httpguard.WithMaxWait(10*time.Second),
		httpguard.WithRetries(headgate.RetryPolicy{}),
	)}

	resp, err := rates.Get("https://rates.example/EUR")
	if err != nil {
		fmt.Println("no rates:", err)
		return
	}
	defer resp.Body.Close()
	fmt.Println(resp.Status) // still 429 or 503 if no retry helped
}

// A handler whose work is guarded within answers as a middleware does. Other errors are its own.
func ExampleAnswer() {
	client, done := newClient(policy.RateLimiter{Selectors: policy.At("reports"), Interval: time.Minute}) // no capacity
	defer done()
	report := headgate.Guard(client, "reports", flowctl.Params{}, func(context.Context) (string, error) { return "fine", nil }, nil)

	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := report(r.Context())
		switch {
		case err == nil:
			fmt.Fprintln(w, text)
		case httpguard.Answer(w, r, err):
		default:
			http.Error(w, "the report failed", http.StatusInternalServerError)
		}
	})

	resp := send(h, http.MethodGet, "/")
	body, _ := io.ReadAll(resp.Body)
	fmt.Printf("%s\n%s", resp.Status, body)
	// Output:
	// 429 Too Many Requests
	// {"title":"Too Many Requests","status":429,"detail":"rate limited"}
}

// A proxy in front of a language model. The model streams server-sent events, and says in one of the last how many tokens the
// answer took. Until then a request counts as 100 tokens. If the stream is cut, nobody knows the cost, and these stay taken.
func ExampleTransport_streamedUsage() {
	model := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"text\":\"Gladly.\"}\n\n")
		if r.URL.Path == "/cut" {
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, "data: {\"usage\":{\"total_tokens\":30}}\n\n")
		fmt.Fprint(w, "data: [DONE]\n\n")
	}))
	defer model.Close()
	client, done := newClient(policy.RateLimiter{
		ID: "budget", Selectors: policy.At("model"), Capacity: 1000, Interval: time.Hour, TokensLabel: "tokens",
	})
	defer done()

	// usage is what a line of the stream says of the tokens.
	usage := func(line []byte) (tokens float64, ok bool) {
		var event struct {
			Usage *struct {
				Tokens float64 `json:"total_tokens"`
			} `json:"usage"`
		}
		data, ok := bytes.CutPrefix(line, []byte("data: "))
		if !ok || json.Unmarshal(data, &event) != nil || event.Usage == nil {
			return 0, false
		}
		return event.Usage.Tokens, true
	}
	prompts := &http.Client{Transport: httpguard.NewTransport(client, "model", nil,
		httpguard.WithParams(func(*http.Request) flowctl.Params {
			return flowctl.Params{Labels: map[string]string{"tokens": "100"}} // an estimate
		}))}
	proxy := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		prompt, err := http.NewRequestWithContext(r.Context(), http.MethodPost, model.URL+r.URL.Path, r.Body)
		if err != nil {
			http.Error(w, "no prompt", http.StatusBadRequest)
			return
		}
		answer, err := prompts.Do(prompt)
		if err != nil {
			if !httpguard.Answer(w, r, err) {
				http.Error(w, "the model does not answer", http.StatusBadGateway)
			}
			return
		}
		defer answer.Body.Close()
		flow, guarded := flowctl.FromContext(answer.Request.Context())

		w.Header().Set("Content-Type", answer.Header.Get("Content-Type"))
		w.WriteHeader(answer.StatusCode)
		lines := bufio.NewReader(answer.Body)
		for err == nil {
			var line []byte
			line, err = lines.ReadBytes('\n')
			if tokens, ok := usage(line); ok && guarded {
				flow.Settle("tokens", tokens) // before the read that finds the end, which ends the flow
			}
			_, _ = w.Write(line)
			_ = http.NewResponseController(w).Flush()
		}
		if !errors.Is(err, io.EOF) {
			panic(http.ErrAbortHandler) // the caller must see that the answer was cut
		}
	})

	server := httptest.NewServer(proxy)
	defer server.Close()
	for _, path := range []string{"/whole", "/cut"} {
		resp, err := http.Post(server.URL+path, "text/plain", strings.NewReader("Hello"))
		if err != nil {
			panic(err)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		fmt.Printf("%s: complete %t\n", path, err == nil)
	}
	for _, tokens := range []string{"871", "870"} { // 1000, less 30 and 100
		flow := client.Start(context.Background(), "model", flowctl.Params{Labels: map[string]string{"tokens": tokens}})
		fmt.Println(tokens, "tokens are there:", flow.ShouldRun())
		_, _ = flow.End(context.Background())
	}
	// Output:
	// /whole: complete true
	// /cut: complete false
	// 871 tokens are there: false
	// 870 tokens are there: true
}
