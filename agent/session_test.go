package agent_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

// A network is what clients reach an agent by. It can stop to carry anything, as if it were unplugged.
type network struct {
	listener *bufconn.Listener

	mu    sync.Mutex
	open  chan struct{} // closed while it carries
	conns []net.Conn
}

func newNetwork() *network {
	n := &network{listener: bufconn.Listen(1 << 16), open: make(chan struct{})}
	close(n.open)
	return n
}

func (n *network) dialer() flowctl.Option {
	return flowctl.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := n.listener.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		w := &cable{Conn: conn, network: n, closed: make(chan struct{})}
		n.mu.Lock()
		n.conns = append(n.conns, w)
		n.mu.Unlock()
		return w, nil
	}))
}

// unplug has nothing carried until it is plugged in again.
func (n *network) unplug() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open = make(chan struct{})
}

func (n *network) plug() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.open)
}

// cut ends all connections.
func (n *network) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, conn := range n.conns {
		_ = conn.Close()
	}
	n.conns = nil
}

// A cable is a connection by the network.
type cable struct {
	net.Conn
	network *network
	once    sync.Once
	closed  chan struct{}
}

func (w *cable) carry() error {
	w.network.mu.Lock()
	open := w.network.open
	w.network.mu.Unlock()
	select {
	case <-open:
		return nil
	case <-w.closed:
		return net.ErrClosed
	}
}

func (w *cable) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err == nil {
		err = w.carry()
	}
	return n, err
}

func (w *cable) Write(p []byte) (int, error) {
	if err := w.carry(); err != nil {
		return 0, err
	}
	return w.Conn.Write(p)
}

func (w *cable) Close() error {
	w.once.Do(func() { close(w.closed) })
	return w.Conn.Close()
}

// An agentOfSessions is an agent with one slot, which lasts for an hour.
type agentOfSessions struct {
	*network
	engine  *engine.Engine
	service *agent.Service
	server  *grpc.Server
}

func newAgentOfSessions(t *testing.T, components []policy.Component, opts ...agent.Option) *agentOfSessions {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: components}})
	if err != nil {
		t.Fatal(err)
	}
	a := &agentOfSessions{network: newNetwork(), engine: e, server: grpc.NewServer(agent.ServerOptions(opts...)...)}
	a.service = agent.Register(a.server, e)
	served := make(chan error, 1)
	go func() { served <- a.server.Serve(a.listener) }()
	t.Cleanup(func() {
		a.server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
		_ = e.Close()
	})
	return a
}

func (a *agentOfSessions) dial(t *testing.T, opts ...flowctl.Option) *flowctl.Client {
	t.Helper()
	client, err := flowctl.Dial("passthrough:///localhost",
		append([]flowctl.Option{flowctl.WithInsecure(), flowctl.WithoutTelemetry(), a.dialer()}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	synctest.Wait() // for the session
	return client
}

// inFlight is how many flows hold a slot.
func (a *agentOfSessions) inFlight() int {
	return a.engine.Stats().Components[0].Usage.InFlight
}

func oneSlot(lasts time.Duration) []policy.Component {
	return []policy.Component{policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 1, MaxInflight: lasts}}
}

// The slots of a client that is gone come back 10 s after its last heartbeat, and those of one that lives do not, to
// flows that wait and to flows that come.
func TestSlotsOfClientsThatAreGone(t *testing.T) {
	for _, tt := range []struct {
		name   string
		lasts  time.Duration // the slot
		gone   func(*agentOfSessions)
		again  func(*agentOfSessions)
		within [2]time.Duration // the slot is back, after the client is gone
	}{
		{"a client that lives", 5 * time.Minute, func(*agentOfSessions) {}, nil, [2]time.Duration{4 * time.Minute, 4 * time.Minute}},
		{"a network that is unplugged", time.Hour, (*agentOfSessions).unplug, nil, [2]time.Duration{9 * time.Second, 10 * time.Second}},
		{"a slot that lasts no longer anyway", time.Minute + 5*time.Second, (*agentOfSessions).unplug, nil, [2]time.Duration{5 * time.Second, 5 * time.Second}},
		{"a network that is plugged in again in time", 5 * time.Minute, (*agentOfSessions).unplug, (*agentOfSessions).plug, [2]time.Duration{4 * time.Minute, 4 * time.Minute}},
		{"a connection that is cut", 5 * time.Minute, (*agentOfSessions).cut, nil, [2]time.Duration{4 * time.Minute, 4 * time.Minute}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, oneSlot(tt.lasts))
				client := a.dial(t)
				local, err := flowctl.New(a.engine)
				if err != nil {
					t.Fatal(err)
				}
				if flow := client.Start(t.Context(), "point", flowctl.Params{}); flow.Decision() != flowctl.Accepted {
					t.Fatal(flow, flow.Err())
				}
				<-time.After(time.Minute)
				if got := a.inFlight(); got != 1 {
					t.Fatalf("%d flows hold a slot after a minute want 1", got)
				}
				tt.gone(a)
				begin := time.Now()
				if tt.again != nil {
					time.AfterFunc(7*time.Second, func() { tt.again(a) })
				}
				next := local.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Hour})
				if took := time.Since(begin); next.Decision() != flowctl.Accepted || took < tt.within[0] || took > tt.within[1] {
					t.Errorf("%v after %v want accepted after %v", next, took, tt.within)
				}
				_, _ = next.End(t.Context())
				if a.inFlight() != 0 {
					t.Error("the lost slot still counts")
				}
				a.cut()
			})
		})
	}
}
