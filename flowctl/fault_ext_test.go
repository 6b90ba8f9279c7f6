package flowctl_test

import (
	"bytes"
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

// farConn is a connection over which everything comes late.
type farConn struct {
	net.Conn
	delay  time.Duration
	chunks chan chunk
	rest   []byte
}

type chunk struct {
	data []byte
	due  time.Time
	err  error
}

// far is a dialer of the agent's by way of the moon.
func far(agent *flowtest.Agent, delay time.Duration) grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		near, err := agent.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		c := &farConn{Conn: near, delay: delay, chunks: make(chan chunk, 1024)}
		go c.receive()
		return c, nil
	})
}

func (c *farConn) receive() {
	for {
		data := make([]byte, 32<<10)
		n, err := c.Conn.Read(data)
		c.chunks <- chunk{data[:n], time.Now().Add(c.delay), err}
		if err != nil {
			return
		}
	}
}

func (c *farConn) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		next := <-c.chunks
		if next.err != nil {
			return 0, next.err
		}
		<-time.After(time.Until(next.due))
		c.rest = next.data
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// A saturated agent's answers come after their flows have gone on without, but they come: such an agent is not dead, and
// goes on being asked, however seldom that is.
func TestSaturatedAgent(t *testing.T) {
	for _, pause := range []time.Duration{0, 10 * time.Millisecond, time.Second, time.Minute} {
		t.Run(pause.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := flowtest.NewAgent(t)
				var log bytes.Buffer
				client := agent.Client(logTo(&log), flowctl.WithoutTelemetry(), flowctl.WithDialOptions(far(agent, 250*time.Millisecond)))
				if err := client.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				for range 50 {
					if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Unreachable {
						t.Fatalf("%v want unreachable", flow)
					}
					<-time.After(pause)
				}
				if got := len(agent.Checks()); got != 50 || strings.Contains(log.String(), "does not answer") {
					t.Errorf("the agent was asked %d times want 50; log:\n%s", got, &log)
				}
			})
		})
	}
}
