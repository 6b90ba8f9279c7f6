package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
)

// newHandler has the routes.
func newHandler(client *flowctl.Client, forecasts *forecasts, reportTime time.Duration) http.Handler {
	orders := httpguard.Middleware(client, "orders", httpguard.WithParams(byTenant))
	report := httpguard.Middleware(client, "report")

	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "Healthy") })
	mux.HandleFunc("GET /connected", connected(client))
	mux.HandleFunc("GET /super", super(client))
	mux.Handle("GET /orders", orders(http.HandlerFunc(listOrders)))
	mux.Handle("GET /report", report(makeReport(reportTime)))
	mux.Handle("GET /weather", forecasts)
	return mux
}

// connectTime is how long /connected waits for an agent, which an idle connection takes to come up.
const connectTime = 500 * time.Millisecond

// connected answers whether flows can be decided.
func connected(client *flowctl.Client) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), connectTime)
		defer cancel()
		if err := client.Ready(ctx); err != nil {
			http.Error(w, "not connected", http.StatusServiceUnavailable) // the error is not for strangers
			return
		}
		fmt.Fprintln(w, "connected")
	}
}

// super guards a feature and not the request: the feature could be called from anywhere. If no agent can be asked, it
// runs, as flows do by default.
func super(client headgate.Starter) http.HandlerFunc {
	feature := headgate.Guard(client, "awesomeFeature", flowctl.Params{}, awesome, nil)
	return func(w http.ResponseWriter, r *http.Request) {
		result, err := feature(r.Context())
		switch {
		case err == nil:
			w.WriteHeader(http.StatusAccepted)
			fmt.Fprintln(w, result)
		case errors.Is(err, flowctl.ErrRejected):
			unavailable(w, err)
		default:
			http.Error(w, "internal error", http.StatusInternalServerError)
		}
	}
}

// awesome is the feature.
func awesome(context.Context) (string, error) { return "awesome", nil }

// unavailable answers a request for which err let nothing run, and says when to retry if that is known. Behind the
// middleware it is not needed.
func unavailable(w http.ResponseWriter, err error) {
	if wait, ok := fallback.RetryAfter(err); ok {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	}
	http.Error(w, "come back later", http.StatusServiceUnavailable)
}

// byTenant labels the flow with the tenant that this service knows, and not with one that the request names.
func byTenant(r *http.Request) flowctl.Params {
	return flowctl.Params{Labels: map[string]string{"tenant": tenantOf(r.Header.Get("X-API-Key"))}}
}

// tenantOf returns the tenant of a key. All callers without a good key are one tenant, because a flow without the label
// would pass its limiter.
func tenantOf(key string) string {
	switch key {
	case "key-of-acme":
		return "acme"
	case "key-of-globex":
		return "globex"
	default:
		return "anonymous"
	}
}

func listOrders(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "no orders") }

// makeReport is slow, so the number of reports at a time is limited. It stops when its client has disconnected.
func makeReport(reportTime time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "working on it")
		_ = http.NewResponseController(w).Flush() // if not, it comes with the rest
		done := time.NewTimer(reportTime)
		defer done.Stop()
		select {
		case <-done.C:
			fmt.Fprintln(w, "all is well")
		case <-r.Context().Done():
		}
	}
}

// forecasts are those of a third party, which allows only a few requests.
type forecasts struct {
	client *http.Client
	url    string
}

// newForecasts guards the requests to the API at the address. To stay within the third party's limits matters more than
// a forecast, so no request is sent when no agent can be asked.
func newForecasts(client headgate.Starter, address string) *forecasts {
	politely := httpguard.WithParams(func(*http.Request) flowctl.Params {
		return flowctl.Params{OnUnreachable: flowctl.FailClosed}
	})
	transport := httpguard.NewTransport(client, "weather-api", &http.Transport{MaxIdleConnsPerHost: 64}, politely)
	return &forecasts{&http.Client{Transport: transport, Timeout: 5 * time.Second}, "http://" + address}
}

// ServeHTTP passes a forecast on.
func (f *forecasts) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	out, err := http.NewRequestWithContext(r.Context(), http.MethodGet, f.url, http.NoBody)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	resp, err := f.client.Do(out)
	switch {
	case errors.Is(err, flowctl.ErrRejected), errors.Is(err, flowctl.ErrUnreachable): // it was not sent
		unavailable(w, err)
		return
	case err != nil:
		http.Error(w, "bad gateway", http.StatusBadGateway)
		return
	}
	defer resp.Body.Close() // which ends the flow
	for _, name := range []string{"Content-Type", "Retry-After"} {
		if value := resp.Header.Get(name); value != "" {
			w.Header().Set(name, value)
		}
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

// serveUpstream stands for the third party's API, so that this program needs none. It serves until it is closed.
func serveUpstream(ctx context.Context) (address string, closeServer func() error, err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "sunny") }),
		ReadHeaderTimeout: 10 * time.Second,
	}
	go func() { _ = server.Serve(listener) }() // its callers see an error
	return listener.Addr().String(), server.Close, nil
}
