//go:build unix

package redisstore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
	"github.com/headgate-go/headgate/redisstore"
	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

// waiting starts flows that wait for as long as it takes, and returns how they were decided.
func (m *member) waiting(t *testing.T, flows int) <-chan *flowctl.Flow {
	t.Helper()
	decided := make(chan *flowctl.Flow, flows)
	for range flows {
		go func() {
			flow := m.client.Start(t.Context(), "point", flowctl.Params{
				Labels: map[string]string{"user": "u"}, CheckTimeout: time.Minute, MaxWait: time.Minute, OnUnreachable: flowctl.FailClosed,
			})
			_, _ = flow.End(context.WithoutCancel(t.Context()))
			decided <- flow
		}()
	}
	return decided
}

// Flows that wait in queues of several engines get what they wait for, whatever becomes of the server meanwhile.
func TestFleetQueueFaults(t *testing.T) {
	t.Parallel()
	components := map[string]policy.Component{ // each of two engines has a part while the server is away
		"tokens": policy.QuotaScheduler{Selectors: policy.At("point"), Capacity: 1, Fill: 100, Interval: time.Second, LimitBy: "user"},
		"slots":  policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: 2, MaxInflight: time.Minute, LimitBy: "user"},
	}
	for _, tt := range []struct {
		name  string
		fault func(*redistest.Server)
	}{
		{"killed", func(s *redistest.Server) {
			s.Kill()
			<-time.After(100 * time.Millisecond)
			s.Restart()
		}},
		{"stopped", func(s *redistest.Server) {
			s.Stop()
			<-time.After(500 * time.Millisecond)
			s.Continue()
		}},
		{"FLUSHALL", func(s *redistest.Server) { s.Text("FLUSHALL") }},
		{"SCRIPT FLUSH", func(s *redistest.Server) { s.Text("SCRIPT", "FLUSH") }},
		{"connections closed", func(s *redistest.Server) {
			s.Text("CLIENT", "KILL", "TYPE", "normal")
			s.Text("CLIENT", "KILL", "TYPE", "pubsub")
		}},
	} {
		for kind, component := range components {
			t.Run(kind+", "+tt.name, func(t *testing.T) {
				t.Parallel()
				server := redistest.Start(t, redistest.Options{AOF: true})
				const flows = 50
				var decided []<-chan *flowctl.Flow
				for range 2 {
					m := join(t, server.URL(), []policy.Component{component}, redisstore.WithTimeout(100*time.Millisecond), redisstore.WithLease(lease))
					decided = append(decided, m.waiting(t, flows))
				}
				check := func(flow *flowctl.Flow) {
					t.Helper()
					if flow.Decision() != flowctl.Accepted {
						var rejected *flowctl.RejectedError
						_ = errors.As(flow.Err(), &rejected)
						t.Errorf("%v, %v (%v) want it accepted", flow, flow.Err(), rejected.Cause())
					}
				}
				check(<-decided[0])
				check(<-decided[1])
				tt.fault(server)
				for _, d := range decided {
					for range flows - 1 {
						select {
						case flow := <-d:
							check(flow)
						case <-time.After(time.Minute):
							t.Fatal("a flow waits for ever")
						}
					}
				}
			})
		}
	}
}

// asHolder is the URL of the store of which this test's process holds slots that others wait for.
const asHolder = "HEADGATE_TEST_HOLDER"

func placesFor(n float64) policy.Component {
	return policy.ConcurrencyScheduler{Selectors: policy.At("point"), Max: n, MaxInflight: time.Hour, LimitBy: "user"}
}

// The slots of an instance that was killed fall to the flows that wait for them at others.
func TestFleetQueueInstanceGone(t *testing.T) {
	if url := os.Getenv(asHolder); url != "" {
		m := join(t, url, []policy.Component{placesFor(3)}, redisstore.WithLease(lease))
		for range 3 {
			if flow := m.start(t, "u"); flow.Decision() != flowctl.Accepted {
				t.Fatal(flow.Err())
			}
		}
		fmt.Println("holds all")
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	t.Parallel()
	server := redistest.Start(t, redistest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestFleetQueueInstanceGone$")
	cmd.Env = append(os.Environ(), asHolder+"="+server.URL())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := new(lines)
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = in.Close()
		_ = cmd.Wait() // it was killed
	}()
	eventually(t, "an instance that holds slots", func() bool { return strings.Contains(out.String(), "holds all") })

	m := join(t, server.URL(), []policy.Component{placesFor(3)}, redisstore.WithTimeout(patient), redisstore.WithLease(lease))
	decided := m.waiting(t, 10)
	select {
	case flow := <-decided:
		t.Fatalf("%v while another instance holds all slots", flow)
	case <-time.After(2 * lease):
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	for i := range 10 {
		select {
		case flow := <-decided:
			if flow.Decision() != flowctl.Accepted {
				t.Errorf("%v, %v want it accepted", flow, flow.Err())
			}
		case <-time.After(time.Minute):
			t.Fatal("a flow waits for ever")
		}
		if i == 0 {
			t.Logf("the first flow runs %v after the instance was killed; its lease is %v", time.Since(killed).Round(time.Millisecond), lease)
		}
	}
}
