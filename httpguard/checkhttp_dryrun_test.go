package httpguard_test

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/httpguard"
)

// The headers that an agent adds to an accepted request reach the handler, but not in a dry run.
func TestCheckHTTPAddsNothingInADryRun(t *testing.T) {
	for _, dry := range []bool{false, true} {
		agent := flowtest.NewAgent(t)
		agent.Answer(flowtest.Answer{HTTPResponse: &checkhttpv1.CheckHTTPResponse{
			HttpResponse:  &checkhttpv1.CheckHTTPResponse_OkResponse{OkResponse: &checkhttpv1.OkHttpResponse{Headers: map[string]string{"x-added": "1"}}},
			CheckResponse: new(checkv1.CheckResponse),
		}})
		opts := []flowctl.Option{flowctl.WithCheckTimeout(time.Minute)}
		if dry {
			opts = append(opts, flowctl.WithDryRun())
		}
		var got string
		h := httpguard.Middleware(agent.Client(opts...), "point", httpguard.WithCheckHTTP())(http.HandlerFunc(
			func(_ http.ResponseWriter, r *http.Request) { got = r.Header.Get("X-Added") }))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
		if (got == "1") == dry {
			t.Errorf("dry run %v: the handler's request has the header %q", dry, got)
		}
	}
}
