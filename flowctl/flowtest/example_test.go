package flowtest_test

import (
	"errors"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

// t is what a test function gets: the bodies of these examples are bodies of tests.
var t *testing.T

func TestExamples(outer *testing.T) {
	for name, example := range map[string]func(){
		"NewAgent":     ExampleNewAgent,
		"Answer":       ExampleAnswer,
		"Agent_Checks": ExampleAgent_Checks,
		"Agent_Spans":  ExampleAgent_Spans,
		"Agent_Freeze": ExampleAgent_Freeze,
	} {
		outer.Run(name, func(inner *testing.T) {
			t = inner
			example()
		})
	}
}

var errNoSuchOrder = errors.New("no such order")

// newOrderPage is what the examples test. It takes a headgate.Starter, which an agent's client is.
func newOrderPage(client headgate.Starter, find func(id string) (string, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		flow := client.Start(r.Context(), "order-page", flowctl.Params{
			Labels:    map[string]string{"user_id": r.Header.Get("User")},
			IsFailure: func(err error) bool { return !errors.Is(err, errNoSuchOrder) },
		})
		var err error
		defer flow.EndWith(&err)
		if !flow.ShouldRun() {
			if wait := flow.RetryAfter(); wait > 0 { // else nobody knows
				w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
			}
			http.Error(w, "busy", flow.HTTPStatus())
			return
		}
		page, err := find(r.PathValue("id"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = io.WriteString(w, page)
	})
}

func found(id string) (string, error) { return "order " + id, nil }

func missing(string) (string, error) { return "", errNoSuchOrder }

// What does the page do when the agent rejects it? Here, t is the test's.
func ExampleNewAgent() {
	agent := flowtest.NewAgent(t)
	agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: 2 * time.Second})
	page := newOrderPage(agent.Client(), found)

	w := httptest.NewRecorder()
	page.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/orders/7", nil))

	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "2" {
		t.Errorf("status %d, Retry-After %q want 429, 2", w.Code, w.Header().Get("Retry-After"))
	}
}

// And when the first flow is accepted, the second fails at the agent, and all others are rejected?
func ExampleAnswer() {
	agent := flowtest.NewAgent(t)
	agent.Answer(
		flowtest.Answer{},
		flowtest.Answer{Fail: status.Error(codes.Unavailable, "restarting")},
		flowtest.Answer{Reason: flowctl.ReasonNoTokens},
	)
	page := newOrderPage(agent.Client(), found)

	for _, want := range []int{http.StatusOK, http.StatusOK, http.StatusServiceUnavailable} {
		w := httptest.NewRecorder()
		page.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/orders/7", nil))
		if w.Code != want || w.Header().Get("Retry-After") != "" {
			t.Errorf("status %d, Retry-After %q want %d and none", w.Code, w.Header().Get("Retry-After"), want)
		}
	}
}

// What does the page tell the agent about a flow?
func ExampleAgent_Checks() {
	agent := flowtest.NewAgent(t)
	page := newOrderPage(agent.Client(), found)

	r := httptest.NewRequest(http.MethodGet, "/orders/7", nil)
	r.Header.Set("User", "42")
	page.ServeHTTP(httptest.NewRecorder(), r)

	checks := agent.Checks()
	if len(checks) != 1 {
		t.Fatalf("%d checks want 1", len(checks))
	}
	if got := checks[0].Request.GetLabels()["user_id"]; got != "42" {
		t.Errorf("user_id = %q want 42", got)
	}
}

// How do flows end? The client sends their records when it closes, if not before.
func ExampleAgent_Spans() {
	agent := flowtest.NewAgent(t)
	client := agent.Client()
	page := newOrderPage(client, missing)

	w := httptest.NewRecorder()
	page.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/orders/7", nil))
	if err := client.Close(t.Context()); err != nil {
		t.Fatal(err)
	}

	spans := agent.Spans()
	if len(spans) != 1 || spans[0].Status != flowctl.StatusOK {
		t.Errorf("spans = %v want one that is OK: a missing order is no failure", spans)
	}
}

// What does an agent that hangs cost? The clock of testing/synctest tells exactly, in no time.
func ExampleAgent_Freeze() {
	synctest.Test(t, func(t *testing.T) {
		agent := flowtest.NewAgent(t)
		client := agent.Client(flowctl.WithCheckTimeout(50 * time.Millisecond))
		if err := client.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		agent.Freeze()

		began := time.Now()
		flow := client.Start(t.Context(), "order-page", flowctl.Params{})
		if took := time.Since(began); took != 50*time.Millisecond || !flow.ShouldRun() {
			t.Errorf("the check took %v, ShouldRun() = %v want 50ms, true", took, flow.ShouldRun())
		}
		_, _ = flow.End(t.Context())
	})
}
