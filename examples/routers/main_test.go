package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/policy"
)

func TestMain(m *testing.M) {
	gin.SetMode(gin.TestMode)
	goleak.VerifyTestMain(m)
}

func get(t *testing.T, server *httptest.Server, path string) (*http.Response, string) {
	t.Helper()
	resp, err := server.Client().Get(server.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

// Whatever the router, the limit of a route holds, and only for that route.
func TestLimits(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			limited := orders
			limited.Components = []policy.Component{policy.RateLimiter{
				Selectors: policy.At("GET /orders/{id}", "/orders/{id}", "/orders/:id"), Capacity: 2, Fill: 2, Interval: time.Hour,
			}}
			e, err := engine.New([]policy.Policy{limited})
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			client, err := flowctl.New(e)
			if err != nil {
				t.Fatal(err)
			}
			server := httptest.NewServer(newRouter(client))
			defer server.Close()
			for range 2 {
				if resp, text := get(t, server, "/orders/7"); resp.StatusCode != http.StatusOK || text != "order 7\n" {
					t.Errorf("got %s, %q", resp.Status, text)
				}
			}
			resp, text := get(t, server, "/orders/8")
			if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" ||
				text != `{"title":"Too Many Requests","status":429,"detail":"rate limited"}`+"\n" {
				t.Errorf("got %s, %v, %q; want 429", resp.Status, resp.Header, text)
			}
			if resp, _ := get(t, server, "/broken"); resp.StatusCode != http.StatusInternalServerError {
				t.Errorf("/broken: %s", resp.Status)
			}
			if resp, _ := get(t, server, "/unknown"); resp.StatusCode != http.StatusNotFound {
				t.Errorf("/unknown: %s", resp.Status)
			}
		})
	}
}

// Whatever the router, flows have the route as their control point, end once, and as Error when the response says so.
func TestFlows(t *testing.T) {
	type flow struct {
		ControlPoint string
		Status       string
	}
	tests := map[string][]flow{
		"servemux": {{"GET /orders/{id}", "OK"}, {"GET /broken", "Error"}},
		"chi":      {{"/orders/{id}", "OK"}, {"/broken", "Error"}},
		"gorilla":  {{"/orders/{id}", "OK"}, {"/broken", "Error"}},
		"gin":      {{"/orders/:id", "OK"}, {"/broken", "Error"}, {"shop", "OK"}},
		"echo":     {{"/orders/:id", "OK"}, {"/broken", "Error"}, {"shop", "OK"}},
	}
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			agent := flowtest.NewAgent(t)
			agent.Answer(flowtest.Answer{Slots: 1})
			client := agent.Client()
			server := httptest.NewServer(newRouter(client))
			for _, path := range []string{"/orders/7", "/broken", "/unknown"} {
				get(t, server, path)
			}
			server.Close()
			if err := client.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			var got []flow
			for _, s := range agent.Spans() {
				got = append(got, flow{s.Response.GetControlPoint(), s.Status.String()})
			}
			if diff := cmp.Diff(tests[name], got); diff != "" {
				t.Errorf("flows (-want +got):\n%s", diff)
			}
			if agent.Held() != 0 || len(agent.Ends()) != len(got) {
				t.Errorf("%d slots held, %d ends; want 0, %d", agent.Held(), len(agent.Ends()), len(got))
			}
		})
	}
}

// gin's Stream asks the ResponseWriter for an old interface, also where the middleware is around the whole router.
func TestAroundGin(t *testing.T) {
	agent := flowtest.NewAgent(t)
	router := gin.New()
	heard := make(chan struct{})
	router.GET("/stream", func(c *gin.Context) {
		lines := 0
		c.Stream(func(w io.Writer) bool {
			_, _ = io.WriteString(w, "line\n")
			c.Writer.Flush()
			select {
			case <-heard:
				lines++
				return lines < 3
			case <-c.Request.Context().Done():
				return false
			}
		})
	})
	server := httptest.NewServer(httpguard.Middleware(agent.Client(), "shop")(router))
	defer server.Close()
	resp, err := server.Client().Get(server.URL + "/stream")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body := bufio.NewReader(resp.Body)
	for range 3 {
		if line, err := body.ReadString('\n'); line != "line\n" {
			t.Fatalf("%q, %v", line, err)
		}
		heard <- struct{}{}
	}
}

func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name := range routers {
		if err := run(ctx, []string{"-listen", "127.0.0.1:0", "-router", name}, io.Discard); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := run(ctx, []string{"-router", "bus"}, io.Discard); err == nil {
		t.Error("there is a router named bus")
	}
}
