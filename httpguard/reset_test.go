package httpguard_test

import (
	"errors"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/httpguard"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// Requests whose clients leave while the agent's answers are on their way leave no slot taken.
func TestResetRequests(t *testing.T) {
	const slots = 20
	requests := race.Pick(slots+10, 200)
	components := map[string]policy.Component{
		"limiter":   policy.ConcurrencyLimiter{Selectors: policy.At(point), Max: slots, MaxInflight: time.Hour},
		"scheduler": policy.ConcurrencyScheduler{Selectors: policy.At(point), Max: slots, MaxInflight: time.Hour},
	}
	questions := map[string][]httpguard.MiddlewareOption{"Check": nil, "CheckHTTP": {httpguard.WithCheckHTTP()}}
	for name, component := range components {
		for question, opts := range questions {
			t.Run(name+"/"+question, func(t *testing.T) {
				setup := sides.Setup{Policies: sides.Policies(component), Travel: 5 * time.Millisecond}
				setup.InBubbles(t, []sides.Kind{sides.Embedded, sides.Served}, func(t *testing.T, side *sides.Side) {
					if err := side.Client.Ready(t.Context()); err != nil {
						t.Fatal(err)
					}
					listener := bufconn.Listen(1 << 10)
					server := &http.Server{
						ReadHeaderTimeout: time.Second,
						Handler: httpguard.Middleware(side.Client, point, opts...)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
							<-r.Context().Done() // with an embedded engine requests get here
						})),
					}
					served := make(chan error)
					go func() { served <- server.Serve(listener) }()
					defer func() {
						_ = server.Close()
						if err := <-served; !errors.Is(err, http.ErrServerClosed) {
							t.Error(err)
						}
					}()
					for range requests {
						conn, err := listener.DialContext(t.Context())
						if err != nil {
							t.Fatal(err)
						}
						if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: example\r\n\r\n"); err != nil {
							t.Fatal(err)
						}
						synctest.Wait() // until the agent has decided
						_ = conn.Close()
					}
					for waited := time.Duration(0); side.Held() > 0; waited += time.Millisecond {
						if waited > time.Second {
							t.Fatalf("%d slots are held", side.Held())
						}
						<-time.After(time.Millisecond)
					}
					for i := range slots {
						flow := side.Client.Start(t.Context(), point, flowctl.Params{})
						defer func() { _, _ = flow.End(t.Context()) }()
						if flow.Decision() != flowctl.Accepted {
							t.Errorf("flow %d: %v, %v want it accepted", i, flow, flow.Err())
						}
					}
				})
			})
		}
	}
}
