package agent_test

import (
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/agent"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/metertest"
	"github.com/headgate-go/headgate/policy"
)

// A remembering is an agent with a state file on a network, from its start to its end.
type remembering struct {
	engine  *engine.Engine
	service *agent.Service
	server  *grpc.Server
	done    chan error
}

func (n *network) serve(t *testing.T, file string, components ...policy.Component) *remembering {
	t.Helper()
	e, err := engine.New([]policy.Policy{{Name: "p", Components: components}})
	if err != nil {
		t.Fatal(err)
	}
	s := &remembering{engine: e, server: grpc.NewServer(append(agent.ServerOptions(), grpc.WaitForHandlers(true))...), done: make(chan error, 1)}
	if s.service, err = agent.New(e, agent.WithState(file)); err != nil {
		t.Fatal(err)
	}
	s.service.Register(s.server)
	n.mu.Lock()
	n.listener = bufconn.Listen(1 << 16)
	l := n.listener
	n.mu.Unlock()
	go func() { s.done <- s.server.Serve(l) }()
	return s
}

// stop ends the agent in good order, but cuts what is in flight.
func (s *remembering) stop(t *testing.T) {
	t.Helper()
	s.service.Drain()
	s.server.Stop()
	if err := errors.Join(<-s.done, s.engine.Close(), s.service.Close()); err != nil {
		t.Error(err)
	}
}

// kill ends the agent, and leaves its last copy.
func (s *remembering) kill(t *testing.T) {
	t.Helper()
	s.server.Stop()
	if err := errors.Join(<-s.done, s.engine.Close()); err != nil {
		t.Error(err)
	}
}

// Flows in flight keep their slots when their agent is stopped in good order and starts again before their session runs out. They
// count as lost when it was killed, because its last copy may not have their slots.
func TestFlowsOutlastRestarts(t *testing.T) {
	for _, tt := range []struct {
		name string
		stop func(*remembering, *testing.T)
		away time.Duration
		lost float64
		ends bool // the flow ends while the agent is away
		held int  // of its slots, long after the restart
	}{
		{"stopped", (*remembering).stop, 0, 0, false, 1},
		{"stopped for a while", (*remembering).stop, 5 * time.Second, 0, false, 1},
		{"stopped for too long", (*remembering).stop, 10 * time.Second, 1, false, 1},
		{"stopped, and the flow ends meanwhile", (*remembering).stop, 5 * time.Second, 0, true, 0},
		{"stopped for long, and the flow ends meanwhile", (*remembering).stop, 5 * time.Minute, 0, true, 0},
		{"killed", (*remembering).kill, 5 * time.Second, 1, false, 1},
		{"killed, and the flow ends meanwhile", (*remembering).kill, time.Second, 0, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file, n := filepath.Join(t.TempDir(), "state"), newNetwork()
				a := n.serve(t, file, slotsFor(4)...)
				meter := new(metertest.Provider)
				client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithoutTelemetry(),
					flowctl.WithMeterProvider(meter), flowctl.WithCancelOnLostSlot(), n.dialer())
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := client.Close(t.Context()); err != nil {
						t.Error(err)
					}
					synctest.Wait()
				}()
				synctest.Wait() // for the session
				flow := client.Start(t.Context(), "point", flowctl.Params{})
				<-time.After(time.Minute)
				if flow.Decision() != flowctl.Accepted || flow.Context().Err() != nil {
					t.Fatal(flow, flow.Err())
				}
				tt.stop(a, t)
				if tt.ends {
					if r, err := flow.End(t.Context()); r.Returned != 0 || err == nil {
						t.Errorf("End() = %+v, %v without an agent", r, err)
					}
				}
				<-time.After(tt.away)
				a = n.serve(t, file, slotsFor(4)...)
				if got := a.engine.Stats().Components[0].Usage.InFlight; got != 1 {
					t.Errorf("%d slots are in the file want 1", got)
				}
				defer func() { a.stop(t) }()
				<-time.After(3 * time.Second)                                // for a connection
				next := client.Start(t.Context(), "point", flowctl.Params{}) // which has the session live
				<-time.After(20 * time.Second)
				if got := meter.Read(t.Context())["flowcontrol_lost_slots_total"]; got != tt.lost {
					t.Errorf("%v slots were lost want %v", got, tt.lost)
				}
				if canceled := flow.Context().Err() != nil; !tt.ends && canceled != (tt.lost > 0) {
					t.Errorf("the flow's context: %v", flow.Context().Err())
				}
				if got := a.engine.Stats().Components[0].Usage.InFlight; got != tt.held+1 {
					t.Errorf("%d slots are held want %d", got, tt.held+1)
				}
				if r, err := next.End(t.Context()); r.Returned != 1 || err != nil {
					t.Errorf("End() = %+v, %v of the next flow", r, err)
				}
				if tt.ends {
					return
				}
				if r, err := flow.End(t.Context()); r.Returned != tt.held || err != nil {
					t.Errorf("End() = %+v, %v", r, err)
				}
			})
		})
	}
}

// What a flow has cost counts once, whatever becomes of the agent meanwhile: in the file of an agent that was stopped in good order it
// has counted, also where the client did not hear of that. The next agent settles nothing of the one before.
func TestSettlementsOverRestarts(t *testing.T) {
	limit := policy.RateLimiter{Selectors: policy.At("point"), Capacity: 100, Interval: time.Hour, TokensLabel: "tokens"}
	for _, tt := range []struct {
		name string
		stop func(*remembering, *testing.T)
		late bool    // the flow ends when the agent is back; else its settlement arrives before, and the answer is lost
		left float64 // of 100 tokens, of which the flow took 10 and cost 2
	}{
		{"stopped, the answer is lost", (*remembering).stop, false, 98},
		{"stopped, and the flow ends later", (*remembering).stop, true, 90},
		{"killed, the answer is lost", (*remembering).kill, false, 90}, // as in the last copy
		{"killed, and the flow ends later", (*remembering).kill, true, 90},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file, n := filepath.Join(t.TempDir(), "state"), newNetwork()
				a := n.serve(t, file, limit)
				client, err := flowctl.Dial("passthrough:///localhost", flowctl.WithInsecure(), flowctl.WithoutTelemetry(),
					flowctl.WithEndTimeout(20*time.Second), n.dialer())
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := client.Close(t.Context()); err != nil {
						t.Error(err)
					}
					synctest.Wait()
				}()
				synctest.Wait() // for the session
				flow := client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"tokens": "10"}})
				flow.Settle("tokens", 2)
				<-time.After(11 * time.Second) // a copy has the charge
				restarted := make(chan struct{})
				restart := func() {
					tt.stop(a, t)
					n.cut()
					n.plug()
					a = n.serve(t, file, limit)
					close(restarted)
				}
				n.muzzle()
				if tt.late {
					restart()
					<-time.After(3 * time.Second) // for a connection
				} else {
					time.AfterFunc(time.Second, restart)
				}
				if r, err := flow.End(t.Context()); r.Settled || err != nil {
					t.Errorf("End() = %+v, %v want it to be settled by no answer", r, err)
				}
				<-restarted
				if got := a.engine.Stats().Components[0].Usage.Remaining; got != tt.left {
					t.Errorf("%v tokens are left want %v", got, tt.left)
				}
				a.stop(t)
			})
		})
	}
}
