package flowctl

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/testing/hostile"
	"github.com/headgate-go/headgate/internal/wire"
)

// An agentOf has sessions as the function says.
type agentOf struct {
	sessionv1.UnimplementedSessionServiceServer
	session func(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse], first *sessionv1.SessionRequest) error

	mu     sync.Mutex
	opened int
}

func (a *agentOf) Session(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse]) error {
	a.mu.Lock()
	a.opened++
	a.mu.Unlock()
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	return a.session(stream, first)
}

func (a *agentOf) streams() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.opened
}

// dial connects a client to the agent, and returns its session.
func (a *agentOf) dial(t *testing.T) *session {
	t.Helper()
	return a.dialBy(t, func(ctx context.Context, agent *bufconn.Listener) (net.Conn, error) { return agent.DialContext(ctx) })
}

// dialBy connects a client by connections that the function makes.
func (a *agentOf) dialBy(t *testing.T, connect func(ctx context.Context, agent *bufconn.Listener) (net.Conn, error)) *session {
	t.Helper()
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	sessionv1.RegisterSessionServiceServer(server, a)
	listener := bufconn.Listen(1 << 16)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
	client, err := Dial("passthrough:///localhost", WithInsecure(), WithoutTelemetry(),
		WithLogger(slog.New(slog.DiscardHandler)), WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return connect(ctx, listener) })))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close(context.WithoutCancel(t.Context())) })
	synctest.Wait()
	return client.remote.session
}

func (s *session) count() (lines, stays int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.lines), len(s.stays)
}

// An agent that keeps telling the client to open another stream gets few, and not many at a time.
func TestDrainsAreBounded(t *testing.T) {
	for name, slots := range map[string]int{"without slots": 0, "while a flow holds a slot": 1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := &agentOf{session: func(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse], first *sessionv1.SessionRequest) error {
					for number := uint64(1); ; number++ {
						_ = stream.Send(&sessionv1.SessionResponse{
							AgentId: 7, Drain: true, Heartbeat: &sessionv1.Heartbeat{Number: number, Acknowledges: first.GetHeartbeat().GetNumber()},
						})
						select {
						case <-time.After(time.Second):
						case <-stream.Context().Done(): // and not when the client has said all
							return stream.Context().Err()
						}
					}
				}}
				s := a.dial(t)
				if slots > 0 {
					of := s.join(place{agent: 7}, slots, time.Now())
					defer func() { s.leave(of, &check{slots: slots}) }()
				}
				most := 0
				for range 600 {
					<-time.After(time.Second)
					lines, _ := s.count()
					most = max(most, lines)
				}
				if most > maxLines {
					t.Errorf("there were %d streams at a time", most)
				}
				if n := a.streams(); n > 30 || n < 10 {
					t.Errorf("%d streams in 10 minutes want fewer and fewer, up to one a minute", n)
				}
			})
		})
	}
}

// A stream is at one agent.
func TestAgentsThatBecomeOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agentOf{session: func(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse], _ *sessionv1.SessionRequest) error {
			for id := uint64(1); stream.Context().Err() == nil; id++ {
				if err := stream.Send(&sessionv1.SessionResponse{AgentId: id}); err != nil {
					return err
				}
			}
			return stream.Context().Err()
		}}
		s := a.dial(t)
		<-time.After(10 * time.Second)
		if n := a.streams(); n < 5 || n > 11 {
			t.Errorf("%d streams in 10s want each to end at once", n)
		}
		if lines, stays := s.count(); lines > 1 || stays > 0 {
			t.Errorf("%d streams and %d agents are remembered", lines, stays)
		}
	})
}

// Whatever agents answer, little is kept when flows have ended.
func TestMadeUpAgentsLeaveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agentOf{session: func(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse], _ *sessionv1.SessionRequest) error {
			for { // it takes settlements, and never says what has become of them
				if _, err := stream.Recv(); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
				if err := stream.Send(&sessionv1.SessionResponse{AgentId: 7}); err != nil {
					return err
				}
			}
		}}
		s := a.dial(t)
		<-time.After(2 * time.Minute) // the first heartbeat is not answered
		for id := range uint64(1000) {
			s.leave(s.join(place{agent: 1000 + id}, 1, time.Now()), &check{slots: 1})
		}
		if _, stays := s.count(); stays > 1 {
			t.Errorf("%d agents are remembered want none of those that were made up", stays)
		}
		costs := new(agentapi.Costs)
		costs.Say("tokens", 1)
		of := costs.Close()
		same := []*settlement{s.settle(7, 1, 1, of, nil), s.settle(7, 1, 1, of, nil)}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if same[0].await(ctx) || ctx.Err() != nil {
			t.Error("a settlement whose id was given to another flow too is waited for")
		}
		for id := range uint64(10_000) {
			if one := s.settle(7, 2+id, 2+id, of, nil); one == nil {
				t.Fatal("no room for a settlement")
			}
			<-time.After(100 * time.Millisecond)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		kept := 0
		for l := range s.lines {
			kept += len(l.fresh)
		}
		const most = 10 * 45 // settlements begin each second
		if len(s.pending) > most || kept > most {
			t.Errorf("%d settlements are pending, and %d to be sent, want at most those of 45s: %d", len(s.pending), kept, most)
		}
		if !t.Failed() && kept == 0 {
			t.Error("the agent takes all settlements: nothing is tested")
		}
	})
}

// An agent may answer a new heartbeat before the client's own timer finds that slots are lost, as after a pause of the process. The agent
// has given the slots to others by then.
func TestLostSlotsStayLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSession(&remote{logger: slog.New(slog.DiscardHandler)})
		defer s.close()
		of := s.join(place{agent: 7}, 1, time.Now())
		cancelled := make(chan error, 1)
		s.watch(of, new(check), func(cause error) { cancelled <- cause })
		<-time.After(wire.SessionLost - time.Nanosecond)
		s.mu.Lock()
		for !of.isOver() { // so that the timer waits for the mutex
			of.until = of.until.Add(-time.Second)
		}
		s.acknowledged(7, time.Now(), 0)
		s.mu.Unlock()
		<-time.After(time.Second)
		select {
		case err := <-cancelled:
			if !errors.Is(err, ErrSlotLost) {
				t.Errorf("the flow was canceled with %v", err)
			}
		default:
			t.Error("slots that were lost are held again")
		}
	})
}

// Slots at an agent last as long as the session. Slots that the agent has from a store last as the agent says, and no longer than that.
func TestSlotsLastAsTheAgentSays(t *testing.T) {
	for _, tt := range []struct {
		name   string
		leased time.Duration
		want   time.Duration // after the heartbeat that was acknowledged
	}{
		{"nothing is known", 0, 0},
		{"for less than nothing", -time.Hour, 0},
		{"for a part of the session", 8 * time.Second, 7 * time.Second},
		{"for less than a client needs", time.Second / 2, 0},
		{"for as long as the session", wire.SessionLasts, wire.SessionLost},
		{"for longer", time.Hour, wire.SessionLost},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSession(&remote{logger: slog.New(slog.DiscardHandler)})
				defer s.close()
				began := time.Now()
				at, far := s.join(place{7, false}, 1, began), s.join(place{7, true}, 1, began)
				defer s.leave(at, &check{slots: 1})
				defer s.leave(far, &check{slots: 1})
				<-time.After(5 * time.Second)
				sent := time.Now()
				s.mu.Lock()
				defer s.mu.Unlock()
				s.acknowledged(7, sent, tt.leased)
				if got := at.until.Sub(sent); got != wire.SessionLost {
					t.Errorf("slots at the agent last for %v want %v", got, wire.SessionLost)
				}
				want := max(tt.want, began.Add(wire.SessionLost).Sub(sent)) // which the check's answer has said
				if got := far.until.Sub(sent); got != want {
					t.Errorf("slots in the store last for %v want %v", got, want)
				}
			})
		})
	}
}

// Acknowledgments of what was not sent count for nothing.
func TestAcknowledgmentsOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSession(&remote{logger: slog.New(slog.DiscardHandler)})
		defer s.close()
		began := time.Now()
		l := &line{session: s, cancel: func() {}, woken: make(chan struct{}, 1), number: 1, unacked: []beat{{1, began}}}
		s.lines[l] = struct{}{}
		of := s.join(place{agent: 7}, 1, began.Add(-time.Second))
		defer s.leave(of, &check{slots: 1})
		<-time.After(time.Second)
		for _, number := range []uint64{0, 2, math.MaxUint64} {
			l.heard(&sessionv1.SessionResponse{AgentId: 7, Heartbeat: &sessionv1.Heartbeat{Number: math.MaxUint64, Acknowledges: number}})
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if until := of.until; !until.Equal(began.Add(wire.SessionLost - time.Second)) {
			t.Errorf("a heartbeat that was not sent is acknowledged: slots are kept for %v", until.Sub(began))
		}
	})
}

// streamOf is a session's stream on which an agent says so much, and which then ends. It calls next before each of them.
type streamOf struct {
	grpc.BidiStreamingClient[sessionv1.SessionRequest, sessionv1.SessionResponse]
	answers []*sessionv1.SessionResponse
	next    func()
}

func (s *streamOf) Recv() (*sessionv1.SessionResponse, error) {
	s.next()
	if len(s.answers) == 0 {
		return nil, io.EOF
	}
	answer := s.answers[0]
	s.answers = s.answers[1:]
	return answer, nil
}

// Checks wait for a stream that has just been opened. What an agent says on one that leaves, as on a connection that goes away, does not
// end that wait: the agent may take the check on the next connection, when that stream has ended there.
func TestChecksWaitForTheNewestStream(t *testing.T) {
	for _, tt := range []struct {
		name    string
		leaves  bool
		answers []*sessionv1.SessionResponse
		want    []bool // before each answer, and after the end: whether checks wait
	}{
		{"refused", false, nil, []bool{true, false}},
		{"begins and ends", false, []*sessionv1.SessionResponse{{AgentId: 7}}, []bool{true, false, true}},
		{"leaves and ends", true, nil, []bool{true, true}},
		{"begins when it leaves", true, []*sessionv1.SessionResponse{{AgentId: 7}}, []bool{true, true, true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSession(&remote{logger: slog.New(slog.DiscardHandler), breaker: newBreaker(AgentBreaker{}, time.Second)})
			defer s.close()
			var got []bool
			note := func() { got = append(got, !s.waited.Load()) }
			l := &line{
				session: s, leaves: tt.leaves, cancel: func() {}, woken: make(chan struct{}, 1), ended: make(chan struct{}),
				stream: &streamOf{answers: tt.answers, next: note},
			}
			s.lines[l] = struct{}{}
			l.receive()
			note()
			if !slices.Equal(got, tt.want) {
				t.Errorf("checks wait: %v want %v", got, tt.want)
			}
		})
	}
}

// A stream that no agent has taken ends, and leaves its place to another one. gRPC must not hold it back for a retry until there is a
// connection: what is to be said next would wait for that in a mutex, and the time of this bubble would stand still.
func TestStreamsThatNoAgentTakes(t *testing.T) {
	const away = 2 * wire.RestingEvery // so that there is something to be said next
	synctest.Test(t, func(t *testing.T) {
		a := &agentOf{session: func(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse], _ *sessionv1.SessionRequest) error {
			if err := stream.Send(&sessionv1.SessionResponse{AgentId: 7}); err != nil {
				return err
			}
			<-stream.Context().Done()
			return stream.Context().Err()
		}}
		all := hostile.Agents()
		before := all[slices.IndexFunc(all, func(one hostile.Agent) bool { return one.Name == "goes away soon" })]
		first := bufconn.Listen(1 << 16)
		go func() {
			conn, err := first.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			before.Serve(t.Context(), conn)
			_, _ = conn.Close(), first.Close()
		}()
		begin := time.Now()
		s := a.dialBy(t, func(ctx context.Context, agent *bufconn.Listener) (net.Conn, error) {
			if time.Since(begin) < away {
				return first.DialContext(ctx)
			}
			return agent.DialContext(ctx)
		})
		s.giveUp(1) // so that the stream is still of use when its agent goes away
		<-time.After(away + 3*time.Second)
		s.mu.Lock()
		reaches := s.reaches(7)
		s.mu.Unlock()
		if !reaches || a.streams() != 1 {
			t.Errorf("the session reaches the agent: %v, by %d streams want true, by 1", reaches, a.streams())
		}
	})
}
