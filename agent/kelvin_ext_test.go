package agent_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// Only ASCII letters have a case in the names of headers, for all that read them. The Kelvin sign is a K in lower case
// elsewhere: so a stranger's header would count as the one that a proxy sets, or make the request ambiguous.
func TestHeadersHaveOnlyASCIICase(t *testing.T) {
	const limited = "http.request.header.x_key"
	limits := []policy.Policy{{Name: "p", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("web"), Capacity: 2, Interval: time.Hour, LimitBy: limited},
	}}}
	headers := func(i int) map[string]string {
		return map[string]string{"X-Key": "mallory", "X-\u212aey": fmt.Sprint(i), "Baggag\u0117": "user_id=u"}
	}
	ask := func(t *testing.T, more int) func(i int) bool {
		stub := serve(t, limits).stubHTTP(t)
		return func(i int) bool {
			h := headers(i)
			for j := range more {
				h[fmt.Sprint("a-", j)] = ""
			}
			m, err := stub.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "web", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: h}})
			if err != nil {
				t.Fatal(err)
			}
			if m.GetDeniedResponse().GetStatus() == 400 {
				t.Fatal("the headers are ambiguous")
			}
			return m.GetStatus().GetCode() == 0
		}
	}
	start := func(t *testing.T, c *flowctl.Client) func(i int) bool {
		return func(i int) bool {
			flow := c.Start(t.Context(), "web", flowctl.Params{HTTP: &flowctl.HTTPRequest{Headers: headers(i)}})
			defer func() { _, _ = flow.End(t.Context()) }()
			return flow.Decision() == flowctl.Accepted
		}
	}
	for name, accepts := range map[string]func(t *testing.T) func(i int) bool{
		"CheckHTTP":                    func(t *testing.T) func(i int) bool { return ask(t, 0) },
		"CheckHTTP, of many headers":   func(t *testing.T) func(i int) bool { return ask(t, 5000) },
		"a client's request, remotely": func(t *testing.T) func(i int) bool { return start(t, serve(t, limits).client(t)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				accepts := accepts(t)
				for i := range 4 {
					if got, want := accepts(i), i < 2; got != want {
						t.Errorf("request %d accepted: %v want %v", i, got, want)
					}
				}
			})
		})
	}
}
