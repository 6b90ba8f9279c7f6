package agent_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/headgate-go/headgate/agent"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// A network is what clients reach an agent by. It can stop to carry anything, as if it were unplugged.
type network struct {
	listener *bufconn.Listener

	mu    sync.Mutex
	open  chan struct{} // closed while it carries
	mute  bool          // it carries what clients say
	conns []net.Conn
}

func newNetwork() *network {
	n := &network{listener: bufconn.Listen(1 << 16), open: make(chan struct{})}
	close(n.open)
	return n
}

func (n *network) dialer() flowctl.Option {
	return flowctl.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		n.mu.Lock()
		listener := n.listener
		n.mu.Unlock()
		conn, err := listener.DialContext(ctx)
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

// muzzle has nothing carried that agents say.
func (n *network) muzzle() {
	n.unplug()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mute = true
}

func (n *network) plug() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mute = false
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

func (w *cable) carry(ofAgent bool) error {
	w.network.mu.Lock()
	open, mute := w.network.open, w.network.mute
	w.network.mu.Unlock()
	if mute && !ofAgent {
		return nil
	}
	select {
	case <-open:
		return nil
	case <-w.closed:
		return net.ErrClosed
	}
}

func (w *cable) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err != nil {
		return n, err
	}
	if err := w.carry(true); err != nil { // what is lost is not read, either
		return 0, err
	}
	return n, nil
}

func (w *cable) Write(p []byte) (int, error) {
	if err := w.carry(false); err != nil {
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
	return serveSessions(t, components, agent.ServerOptions(opts...)...)
}

func serveSessions(t *testing.T, components []policy.Component, opts ...grpc.ServerOption) *agentOfSessions {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: components}})
	if err != nil {
		t.Fatal(err)
	}
	return serveEngine(t, e, opts...)
}

func serveEngine(t *testing.T, e *engine.Engine, opts ...grpc.ServerOption) *agentOfSessions {
	t.Helper()
	a := &agentOfSessions{network: newNetwork(), engine: e, server: grpc.NewServer(opts...)}
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

func slotsFor(flows float64) []policy.Component {
	return []policy.Component{policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: flows, MaxInflight: time.Hour}}
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

// stream opens a stream of a session by the protocol alone.
func (a *agentOfSessions) stream(t *testing.T, session, key string) sessionv1.SessionService_SessionClient {
	t.Helper()
	stream, err := sessionv1.NewSessionServiceClient(a.conn(t)).Session(withSession(t.Context(), session, key))
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func (a *agentOfSessions) conn(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func withSession(ctx context.Context, session, key string) context.Context {
	if session != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "headgate-session", session)
	}
	if key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-api-key", key)
	}
	return ctx
}

// say sends a message, and returns the answer.
func say(t *testing.T, stream sessionv1.SessionService_SessionClient, m *sessionv1.SessionRequest) *sessionv1.SessionResponse {
	t.Helper()
	if err := stream.Send(m); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

var (
	sessionA  = strings.Repeat("0a", 16)
	sessionB  = strings.Repeat("0b", 16)
	heartbeat = &sessionv1.SessionRequest{Heartbeat: &sessionv1.Heartbeat{Number: 1}}
)

func keysOf(key string) (string, bool) {
	name, ok := map[string]string{"ka": "a", "ka2": "a", "kb": "b"}[key]
	return name, ok
}

// Only streams and checks that name a session with its owner's key are part of it.
func TestSessionsHaveOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAgentOfSessions(t, oneSlot(time.Hour), agent.WithKeys(keysOf))
		first := say(t, a.stream(t, sessionA, "ka"), heartbeat)
		if first.GetAgentId() == 0 || first.GetHeartbeat().GetAcknowledges() != 1 {
			t.Errorf("%v want an answer that names the agent and acknowledges the heartbeat", first)
		}
		stub := checkv1.NewFlowControlServiceClient(a.conn(t))
		for _, tt := range []struct {
			name, session, key string
			part               bool
		}{
			{"the owner", sessionA, "ka", true},
			{"the owner's other key", sessionA, "ka2", true},
			{"another owner", sessionA, "kb", false},
			{"a session that does not live", sessionB, "ka", false},
			{"no session", "", "ka", false},
			{"no name of a session", "session", "ka", false},
			{"capitals", strings.ToUpper(sessionA), "ka", false},
			{"zero", strings.Repeat("0", 32), "ka", false},
		} {
			answer, err := stub.Check(withSession(t.Context(), tt.session, tt.key), &checkv1.CheckRequest{ControlPoint: "other"})
			if err != nil || (answer.GetAgentId() == first.GetAgentId()) != tt.part || !tt.part && answer.GetAgentId() != 0 {
				t.Errorf("%s: %v, %v want it part of the session: %v", tt.name, answer, err, tt.part)
			}
			stream := a.stream(t, tt.session, tt.key)
			_ = stream.Send(heartbeat)
			_, err = stream.Recv()
			want := codes.OK
			switch {
			case tt.session == sessionA && !tt.part:
				want = codes.PermissionDenied
			case tt.session != sessionA && tt.session != sessionB:
				want = codes.InvalidArgument
			}
			if status.Code(err) != want {
				t.Errorf("%s: a stream ends with %v want %v", tt.name, err, want)
			}
		}
	})
}

// A settlement counts once, also on another stream, and only in its own session.
func TestSettlementsCountOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAgentOfSessions(t, []policy.Component{
			policy.RateLimiter{Selectors: policy.At("point"), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens"},
		})
		stub := checkv1.NewFlowControlServiceClient(a.conn(t))
		one, other := a.stream(t, sessionA, ""), a.stream(t, sessionB, "")
		say(t, one, heartbeat)
		say(t, other, heartbeat)
		check := func(tokens string) *checkv1.CheckResponse {
			answer, err := stub.Check(withSession(t.Context(), sessionA, ""),
				&checkv1.CheckRequest{ControlPoint: "point", Labels: map[string]string{"tokens": tokens}})
			if err != nil {
				t.Fatal(err)
			}
			return answer
		}
		id := check("10").GetSettlementId()
		if rejected := check("1000"); id == 0 || rejected.GetSettlementId() != 0 || rejected.GetAgentId() != 0 {
			t.Errorf("an accepted flow has the id %d, and a rejected one %v", id, rejected)
		}
		costs := func(label string, tokens float64) []*sessionv1.Cost {
			return []*sessionv1.Cost{{Label: label, Tokens: tokens}}
		}
		again := a.stream(t, sessionA, "")
		for _, tt := range []struct {
			name    string
			stream  sessionv1.SessionService_SessionClient
			id      uint64
			costs   []*sessionv1.Cost
			settled bool
			left    float64
		}{
			{"an unknown id", one, id + 1, costs("tokens", 5), false, 90},
			{"no id", one, 0, costs("tokens", 5), false, 90},
			{"another session", other, id, costs("tokens", 5), false, 90},
			{"a negative cost", one, id, costs("tokens", -5), false, 90},
			{"no number", one, id, costs("tokens", math.NaN()), false, 90},
			{"no label", one, id, costs("", 5), false, 90},
			{"its own", one, id, costs("tokens", 5), true, 95},
			{"again", one, id, costs("tokens", 5), true, 95},
			{"again, another cost", one, id, costs("tokens", 50), true, 95},
			{"again, on another stream", again, id, costs("tokens", 5), true, 95},
		} {
			answer := say(t, tt.stream, &sessionv1.SessionRequest{Settlements: []*sessionv1.Settlement{{Id: tt.id, Costs: tt.costs}}})
			if len(answer.GetResults()) != 1 || answer.GetResults()[0].GetId() != tt.id || answer.GetResults()[0].GetSettled() != tt.settled || answer.GetHeartbeat() != nil {
				t.Errorf("%s: %v want settled %v", tt.name, answer, tt.settled)
			}
			if got := a.engine.Stats().Components[0].Usage.Remaining; got != tt.left {
				t.Errorf("%s: %v tokens are left want %v", tt.name, got, tt.left)
			}
		}
	})
}

// What a peer can do to a session, and how its stream ends.
func TestHostileSessions(t *testing.T) {
	many := func(n int) *sessionv1.SessionRequest {
		m := new(sessionv1.SessionRequest)
		for range n {
			m.Settlements = append(m.Settlements, new(sessionv1.Settlement))
		}
		return m
	}
	large := &sessionv1.SessionRequest{Settlements: []*sessionv1.Settlement{{Costs: []*sessionv1.Cost{{Label: strings.Repeat("x", 16<<10-64)}}}}}
	long := many(1)
	long.Settlements[0].Costs = []*sessionv1.Cost{{Label: strings.Repeat("x", 20<<10)}}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, stream sessionv1.SessionService_SessionClient)
		want codes.Code
		took time.Duration
	}{
		{"it says nothing", func(*testing.T, sessionv1.SessionService_SessionClient) {}, codes.DeadlineExceeded, 10 * time.Second},
		{"it falls silent", func(t *testing.T, s sessionv1.SessionService_SessionClient) { say(t, s, heartbeat) }, codes.DeadlineExceeded, 3 * time.Minute},
		{"a long message", func(_ *testing.T, s sessionv1.SessionService_SessionClient) { _ = s.Send(long) }, codes.InvalidArgument, 0},
		{"many settlements", func(_ *testing.T, s sessionv1.SessionService_SessionClient) { _ = s.Send(many(1000)) }, codes.InvalidArgument, 0},
		{"no message", func(_ *testing.T, s sessionv1.SessionService_SessionClient) {
			_ = s.SendMsg(wrapperspb.String("no heartbeat")) // whose place it has
		}, codes.InvalidArgument, 0},
		{"messages at once", func(t *testing.T, s sessionv1.SessionService_SessionClient) {
			for range 2064 { // of which 64 are handled at once
				say(t, s, heartbeat)
			}
			_ = s.CloseSend()
		}, codes.OK, 2 * time.Second},
		{"messages that wait for no answers", func(_ *testing.T, s sessionv1.SessionService_SessionClient) {
			for range 200 { // of which 64 are handled, and 64 wait
				_ = s.Send(heartbeat)
			}
			readAll(s)
		}, codes.ResourceExhausted, 0},
		{"more large messages than a client sends", func(_ *testing.T, s sessionv1.SessionService_SessionClient) {
			for range 64 {
				_ = s.Send(heartbeat)
			}
			for range 3 { // the pace has the others wait
				_ = s.Send(large)
			}
			readAll(s)
		}, codes.ResourceExhausted, 0},
		{"as many large messages as a client sends", func(t *testing.T, s sessionv1.SessionService_SessionClient) {
			for range 64 {
				say(t, s, heartbeat)
			}
			for range 2 {
				_ = s.Send(large)
			}
			_ = s.CloseSend()
			readAll(s)
		}, codes.OK, 2 * time.Millisecond},
		{"more than a window of large messages", func(t *testing.T, s sessionv1.SessionService_SessionClient) {
			for range 20 {
				say(t, s, &sessionv1.SessionRequest{Settlements: []*sessionv1.Settlement{{Costs: []*sessionv1.Cost{{Label: strings.Repeat("x", 15<<10)}}}}})
			}
			_ = s.CloseSend()
		}, codes.OK, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, oneSlot(time.Hour))
				stream := a.stream(t, sessionA, "")
				begin := time.Now()
				tt.do(t, stream)
				_, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					err = nil
				}
				if took := time.Since(begin); status.Code(err) != tt.want || took < tt.took || took > tt.took+tt.took/100 {
					t.Errorf("it ends with %v after %v want %v after %v", err, took, tt.want, tt.took)
				}
			})
		})
	}
}

// readAll reads what the agent says, up to the last. The next Recv has the stream's end.
func readAll(s sessionv1.SessionService_SessionClient) {
	for err := error(nil); err == nil; {
		_, err = s.Recv()
	}
}

// A session has few streams: the oldest makes room for one more.
func TestStreamsOfASessionAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAgentOfSessions(t, oneSlot(time.Hour))
		var streams []sessionv1.SessionService_SessionClient
		for range 5 {
			stream := a.stream(t, sessionA, "")
			say(t, stream, heartbeat)
			streams = append(streams, stream)
		}
		if _, err := streams[0].Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the oldest stream: %v want Unavailable", err)
		}
		for _, stream := range streams[1:] {
			say(t, stream, heartbeat)
		}
	})
}

// A client that has nothing to do keeps its session all the same.
func TestSessionsOfIdleClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAgentOfSessions(t, oneSlot(time.Hour))
		client := a.dial(t)
		<-time.After(24*time.Hour + 30*time.Second)
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		if flow.Decision() != flowctl.Accepted || flow.CheckResponse().GetAgentId() == 0 {
			t.Errorf("%v, %v want it part of the session", flow, flow.CheckResponse())
		}
		<-time.After(time.Minute)
		if a.inFlight() != 1 {
			t.Error("its slot is lost")
		}
		a.unplug()
		<-time.After(10 * time.Second)
		if a.inFlight() != 0 {
			t.Error("the slot of a client that is gone is still held")
		}
		a.cut()
	})
}

// A client takes its slots for lost 9 s after the last heartbeat that was acknowledged, before anybody else can have them.
func TestLostSlots(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []flowctl.Option
		cancels bool
	}{
		{"and says so", nil, false},
		{"and cancels", []flowctl.Option{flowctl.WithCancelOnLostSlot()}, true},
	} {
		for _, disturbance := range []struct {
			name string
			by   func(*network)
		}{{"unplugged", (*network).unplug}, {"muzzled", (*network).muzzle}} {
			t.Run(tt.name+"/"+disturbance.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var log lockedBuffer
					meter := new(metertest.Provider)
					a := newAgentOfSessions(t, oneSlot(time.Hour))
					client := a.dial(t, append(tt.options, flowctl.WithMeterProvider(meter),
						flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))...)
					flow := client.Start(t.Context(), "point", flowctl.Params{})
					<-time.After(20*time.Second + 300*time.Millisecond)
					disturbance.by(a.network)
					begin := time.Now()
					<-time.After(8*time.Second - time.Millisecond)
					const lost = "flowcontrol_lost_slots_total"
					if err := flow.Context().Err(); err != nil || meter.Read(t.Context())[lost] != 0 {
						t.Errorf("the slot is lost too early: %v", err)
					}
					if tt.cancels {
						<-flow.Context().Done()
						if took := time.Since(begin); took > 9*time.Second || !errors.Is(context.Cause(flow.Context()), flowctl.ErrSlotLost) {
							t.Errorf("canceled after %v, by %v", took, context.Cause(flow.Context()))
						}
					} else {
						<-time.After(time.Second)
						if err := flow.Context().Err(); err != nil {
							t.Error(err)
						}
					}
					if a.inFlight() != 1 {
						t.Error("the agent gives the slot to others before the client takes it for lost")
					}
					<-time.After(time.Minute)
					if got := meter.Read(t.Context())[lost]; got != 1 || strings.Count(log.String(), "has not acknowledged a heartbeat") != 1 {
						t.Errorf("%v slots were counted as lost, logged:\n%s", got, log.String())
					}
					a.plug()
					<-time.After(10 * time.Second)
					if r, err := flow.End(t.Context()); r.Held != 1 || r.Returned != 0 || err != nil {
						t.Errorf("End() = %+v, %v", r, err)
					}
					next := client.Start(t.Context(), "point", flowctl.Params{})
					<-time.After(time.Minute)
					if r, err := next.End(t.Context()); r.Returned != 1 || err != nil {
						t.Errorf("End() = %+v, %v of a flow that began when the agent was back", r, err)
					}
					if next.Context().Err() != nil != tt.cancels {
						t.Errorf("the context of a flow that has ended: %v", next.Context().Err())
					}
				})
			})
		}
	}
}

// A settlement that got lost is sent again on the next stream, and one whose answer got lost counts once.
func TestSettlementsAreSentAgain(t *testing.T) {
	for name, disturb := range map[string]func(*network){"before it arrives": (*network).unplug, "after it has arrived": (*network).muzzle} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAgentOfSessions(t, []policy.Component{
					policy.RateLimiter{Selectors: policy.At("point"), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens"},
				})
				client := a.dial(t, flowctl.WithEndTimeout(20*time.Second))
				flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"tokens": "10"}})
				flow.Settle("tokens", 2)
				disturb(a.network)
				time.AfterFunc(time.Second, func() {
					a.cut()
					a.plug()
				})
				begin := time.Now()
				r, err := flow.End(t.Context())
				if took := time.Since(begin); !r.Settled || err != nil || took < time.Second || took > 5*time.Second {
					t.Errorf("End() = %+v, %v after %v", r, err, took)
				}
				if got := a.engine.Stats().Components[0].Usage.Remaining; got != 98 {
					t.Errorf("%v tokens are left want 98", got)
				}
			})
		})
	}
}

// Another agent behind the same address, as after a restart, settles nothing of the one before. What is not answered does
// not hold up flows for longer than the end timeout.
func TestSettlementsOfAnotherAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := []policy.Component{policy.RateLimiter{Selectors: policy.At("point"), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens"}}
		a := newAgentOfSessions(t, limit)
		client := a.dial(t)
		flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"tokens": "10"}})
		next := newAgentOfSessions(t, limit)
		a.mu.Lock()
		a.listener = next.listener
		a.mu.Unlock()
		a.cut()
		<-time.After(5 * time.Second)
		flow.Settle("tokens", 2)
		begin := time.Now()
		if r, err := flow.End(t.Context()); r.Settled || err != nil || time.Since(begin) != time.Second {
			t.Errorf("End() = %+v, %v after %v", r, err, time.Since(begin))
		}
		if got := next.engine.Stats().Components[0].Usage.Remaining; got != 100 {
			t.Errorf("%v tokens are left want 100", got)
		}
	})
}

// An agent that knows no sessions is asked once on a connection. Its slots last for as long as they say.
func TestAgentsWithoutSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		a := serveSessions(t, oneSlot(time.Hour), append(agent.ServerOptions(), grpc.ChainStreamInterceptor(
			func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
				asked.Add(1)
				return handle(server, stream)
			}), sides.WithoutSessions())...)
		client := a.dial(t, flowctl.WithCancelOnLostSlot())
		for i := range int32(3) {
			flow := client.Start(t.Context(), "point", flowctl.Params{})
			<-time.After(20 * time.Minute) // connections without calls end after 30
			if got := asked.Load(); got != i+1 {
				t.Errorf("it was asked %d times on %d connections", got, i+1)
			}
			if r, err := flow.End(t.Context()); r.Returned != 1 || err != nil {
				t.Errorf("End() = %+v, %v", r, err)
			}
			if err := flow.Context().Err(); err != nil {
				t.Error(err)
			}
			a.cut()
			<-time.After(5 * time.Second)
		}
	})
}

// What checks get whose answers are lost comes back by the session, also in a client's dry run, and also the place of a probe. Else other
// clients' flows are rejected meanwhile.
func TestLostAnswersHoldNothing(t *testing.T) {
	const probes = 2
	components := []policy.Component{
		policy.ConcurrencyLimiter{Selectors: policy.At("point"), Max: probes, MaxInflight: time.Hour},
		policy.CircuitBreaker{Selectors: policy.At("point"), FailureCount: 1, Window: time.Minute, OpenDuration: time.Second, Probes: probes, ProbeTimeout: time.Hour},
	}
	for _, tt := range []struct {
		name string
		opts []flowctl.Option
	}{
		{"in force", nil},
		{"dry run", []flowctl.Option{flowctl.WithDryRun()}},
		{"dry run without telemetry", []flowctl.Option{flowctl.WithDryRun(), flowctl.WithoutTelemetry()}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var late atomic.Bool
				a := serveSessions(t, components, append(agent.ServerOptions(), grpc.ChainUnaryInterceptor(
					func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
						answer, err := handle(context.WithoutCancel(ctx), req)
						if late.Load() {
							<-time.After(time.Second)
						}
						return answer, err
					}))...)
				client, other := a.dial(t, append(tt.opts, flowctl.WithCheckTimeout(50*time.Millisecond))...), a.dial(t)
				failed := other.Start(t.Context(), "point", flowctl.Params{})
				failed.SetStatus(flowctl.StatusError)
				_, _ = failed.End(t.Context())
				<-time.After(2 * time.Second) // the circuit is half-open
				late.Store(true)
				for range probes {
					flow := client.Start(t.Context(), "point", flowctl.Params{})
					if flow.Decision() != flowctl.Unreachable {
						t.Errorf("%v want it unreachable", flow)
					}
					_, _ = flow.End(t.Context())
				}
				<-time.After(2 * time.Second)
				late.Store(false)
				flow := other.Start(t.Context(), "point", flowctl.Params{})
				if flow.Decision() != flowctl.Accepted {
					t.Errorf("%v want it accepted, as a probe", flow)
				}
				_, _ = flow.End(t.Context())
			})
		})
	}
}

// Sessions say how flows in a client's dry run ended. Else a circuit would stay half-open, and keep out the flows of others.
func TestProbesOfDryRuns(t *testing.T) {
	for name, opts := range map[string][]flowctl.Option{"telemetry": {flowctl.WithDryRun()}, "no telemetry": {flowctl.WithDryRun(), flowctl.WithoutTelemetry()}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := serveSessions(t, []policy.Component{policy.CircuitBreaker{
					Selectors: policy.At("point"), FailureCount: 1, Window: time.Minute, OpenDuration: time.Second, ProbeTimeout: time.Hour,
				}}, agent.ServerOptions()...)
				client, other := a.dial(t, opts...), a.dial(t)
				failed := other.Start(t.Context(), "point", flowctl.Params{})
				failed.SetStatus(flowctl.StatusError)
				_, _ = failed.End(t.Context())
				<-time.After(2 * time.Second)
				for range 3 {
					for _, by := range []*flowctl.Client{client, other} {
						flow := by.Start(t.Context(), "point", flowctl.Params{})
						if flow.Decision() != flowctl.Accepted {
							t.Errorf("%v want it accepted", flow)
						}
						_, _ = flow.End(t.Context())
						<-time.After(10 * time.Millisecond)
					}
				}
			})
		})
	}
}

// When a server has a client connect anew, the client keeps its old stream or has another one before the session runs
// out. Nothing is lost, and the old connection ends when nothing needs it.
func TestSessionsOutlastConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		meter := new(metertest.Provider)
		a := serveSessions(t, oneSlot(time.Hour), append(agent.ServerOptions(),
			grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 30 * time.Second, MaxConnectionAgeGrace: time.Hour}))...)
		client := a.dial(t, flowctl.WithMeterProvider(meter))
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		<-time.After(10 * time.Minute)
		if r, err := flow.End(t.Context()); r.Returned != 1 || err != nil {
			t.Errorf("End() = %+v, %v", r, err)
		}
		if lost := meter.Read(t.Context())["flowcontrol_lost_slots_total"]; lost != 0 {
			t.Errorf("%v slots were lost", lost)
		}
	})
}

// A draining agent rejects flows that wait with a time to come back, lets its clients keep their slots, and then stops.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		meter := new(metertest.Provider)
		a := newAgentOfSessions(t, oneSlot(time.Hour))
		client := a.dial(t, flowctl.WithMeterProvider(meter))
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		stub := checkv1.NewFlowControlServiceClient(a.conn(t)) // of another SDK
		begin := time.Now()
		time.AfterFunc(time.Minute, a.service.Drain)
		var waiting sync.WaitGroup
		waiting.Go(func() {
			next := client.Start(t.Context(), "point", flowctl.Params{CheckTimeout: time.Hour})
			rejected, ok := errors.AsType[*flowctl.RejectedError](next.Err())
			if !ok || rejected.Cause() != flowctl.CauseClosed || rejected.RetryAfter() < time.Second || rejected.RetryAfter() > 2*time.Second ||
				time.Since(begin) != time.Minute {
				t.Errorf("%v, %+v after %v", next, next.Err(), time.Since(begin))
			}
		})
		waiting.Go(func() {
			answer, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point"})
			if err != nil || answer.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_REJECTED || answer.GetWaitTime().AsDuration() < time.Second {
				t.Errorf("%v, %v want a rejection with a time to wait", answer, err)
			}
		})
		waiting.Wait()
		answer, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "point"})
		if err != nil || answer.GetCause() != checkv1.CheckResponse_CAUSE_CLOSED {
			t.Errorf("%v, %v of a flow that comes afterwards want the same", answer, err)
		}
		if answer, err := stub.Check(t.Context(), &checkv1.CheckRequest{ControlPoint: "other"}); err != nil || answer.GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED {
			t.Errorf("%v, %v of a flow that need not wait", answer, err)
		}
		stopped := make(chan time.Duration, 1)
		go func() {
			a.server.GracefulStop()
			stopped <- time.Since(begin)
		}()
		<-time.After(9 * time.Minute)
		select {
		case took := <-stopped:
			t.Errorf("the server stopped after %v, while a flow held a slot", took)
		default:
		}
		if r, _ := flow.End(t.Context()); r.Held != 1 { // the server takes no calls any more, and its slots end with it
			t.Errorf("End() = %+v", r)
		}
		if took := <-stopped; took > 10*time.Minute+2*time.Second {
			t.Errorf("the server stopped after %v", took)
		}
		if lost := meter.Read(t.Context())["flowcontrol_lost_slots_total"]; lost != 0 {
			t.Errorf("%v slots were lost", lost)
		}
	})
}

// While a flow waits at an agent of Headgate, heartbeats say that the agent lives. It is asked nothing else, and one that
// falls silent is found within the check timeout and 2 s.
func TestHeartbeatsAreSignsOfLife(t *testing.T) {
	for name, disturb := range map[string]func(*network){"unplugged": (*network).unplug, "muzzled": (*network).muzzle} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var calls atomic.Int32
				a := serveSessions(t, oneSlot(time.Hour), append(agent.ServerOptions(), grpc.ChainUnaryInterceptor(
					func(ctx context.Context, m any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
						calls.Add(1)
						return handle(ctx, m)
					}))...)
				client := a.dial(t)
				client.Start(t.Context(), "point", flowctl.Params{})
				begin := time.Now()
				time.AfterFunc(5*time.Minute, func() { disturb(a.network) })
				flow := client.Start(t.Context(), "point", flowctl.Params{MaxWait: time.Hour})
				if took := time.Since(begin) - 5*time.Minute; flow.Decision() != flowctl.Unreachable || took < 0 || took > 2*time.Second+200*time.Millisecond {
					t.Errorf("%v, %v %v after the agent fell silent", flow, flow.Err(), took)
				}
				if got := calls.Load(); got != 2 {
					t.Errorf("the agent had %d calls want only the checks of two flows", got)
				}
			})
		})
	}
}

// late has streams begin late.
func late(by time.Duration) grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
		<-time.After(by)
		return handle(server, stream)
	})
}

// The first check of a client waits for its session, so that it is part of it. It does not wait for an agent that
// has no sessions, nor for long for one that does not answer.
func TestFirstChecks(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []grpc.ServerOption
		ready   bool // the client has waited for the agent
		took    time.Duration
		part    bool
	}{
		{"agent", nil, false, 0, true},
		{"agent that is ready", nil, true, 0, true},
		{"agent that is slow", []grpc.ServerOption{late(40 * time.Millisecond)}, false, 40 * time.Millisecond, true},
		{"agent that is slow and ready", []grpc.ServerOption{late(90 * time.Millisecond)}, true, 0, true},
		{"agent that is too slow", []grpc.ServerOption{late(time.Minute)}, false, 50 * time.Millisecond, false},
		{"agent that is too slow and ready", []grpc.ServerOption{late(time.Minute)}, true, 0, false},
		{"agent without sessions", []grpc.ServerOption{sides.WithoutSessions()}, false, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := serveSessions(t, oneSlot(time.Hour), append(agent.ServerOptions(), tt.options...)...)
				client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithoutTelemetry(), a.dialer())
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = client.Close(context.WithoutCancel(t.Context())) }()
				if tt.ready {
					if err := client.Ready(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				begin := time.Now()
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				if part := flow.CheckResponse().GetAgentId() != 0; part != tt.part || flow.Decision() != flowctl.Accepted {
					t.Errorf("%v, part of the session: %v want %v", flow, part, tt.part)
				}
				if took := time.Since(begin); took != tt.took {
					t.Errorf("it took %v want %v", took, tt.took)
				}
				_, _ = flow.End(t.Context())
			})
		})
	}
}

// So do the checks after a connection has taken the place of another one.
func TestChecksOnNewConnections(t *testing.T) {
	for name, options := range map[string][]grpc.ServerOption{
		"lost":    nil,
		"go away": {grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 2 * time.Second, MaxConnectionAgeGrace: time.Hour})},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := serveSessions(t, slotsFor(1000), append(agent.ServerOptions(), append(options, late(20*time.Millisecond))...)...)
				client := a.dial(t)
				accepted := 0
				for i := range 1200 {
					if i%400 == 300 && options == nil {
						a.cut()
						synctest.Wait() // a check that is under way goes on by the next connection
					}
					flow := client.Start(t.Context(), "point", flowctl.Params{OnUnreachable: flowctl.FailClosed})
					if flow.Decision() == flowctl.Accepted {
						accepted++
						if flow.CheckResponse().GetAgentId() == 0 {
							t.Fatalf("check %d is no part of the session", i)
						}
					}
					if _, err := flow.End(t.Context()); err != nil {
						t.Error(err)
					}
					<-time.After(5 * time.Millisecond)
				}
				if accepted < 600 {
					t.Errorf("%d flows were accepted", accepted)
				}
			})
		})
	}
}

// A client whose stream was refused, as by an agent that drains, does not wait until it has another one at the next agent.
func TestSessionsOnNewConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, next := newAgentOfSessions(t, oneSlot(time.Hour)), newAgentOfSessions(t, slotsFor(10))
		client := a.dial(t)
		<-time.After(2 * time.Second)
		a.service.Drain() // which refuses the next stream
		<-time.After(time.Second / 10)
		a.mu.Lock()
		a.listener = next.listener
		a.mu.Unlock()
		a.cut()
		<-time.After(time.Second / 10)
		first := client.Start(t.Context(), "point", flowctl.Params{}) // which may be what connects
		_, _ = first.End(t.Context())
		<-time.After(time.Second / 10)
		flow := client.Start(t.Context(), "point", flowctl.Params{})
		if flow.Decision() != flowctl.Accepted || flow.CheckResponse().GetAgentId() == 0 {
			t.Errorf("%v, %v want it part of the session", flow, flow.CheckResponse())
		}
		_, _ = flow.End(t.Context())
	})
}
