//go:build linux

package attack_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/testing/attack"
	"github.com/headgate-go/headgate/internal/testing/hostile"
)

// The bounds of a client with 64 flows, whatever its agent does.
const (
	clientMemory      = 256 // MiB
	clientLate        = 50 * time.Millisecond
	clientConnections = 5   // a second
	clientProcessor   = 0.1 // of a core, where connections end or are flooded
	clientError       = 2 << 10
	clientsTogether   = 4 // so many run at the same time
	clientClose       = attack.CloseTimeout + 50*time.Millisecond
)

func TestClients(t *testing.T) {
	length := length(t)
	program := build(t)
	machine := start(t, program, "machine")
	defer machine.stop(t)
	machine.read(t, new(attack.Stats))
	for some := range slices.Chunk(hostile.Agents(), clientsTogether) {
		t.Run("with "+some[0].Name, func(t *testing.T) {
			runClients(t, program, length, machine, some)
		})
	}
}

// runClients runs a client against each of the agents, at the same time.
func runClients(t *testing.T, program string, length time.Duration, machine *victim, agents []hostile.Agent) {
	t.Helper()
	type run struct {
		client      *victim
		report      attack.Report
		peak        int
		connections float64 // a second
		processor   float64 // of a core
	}
	machine.stats(t)
	begin := time.Now()
	var runs []*run
	var servers []*hostile.Server
	for _, a := range agents {
		server := hostile.Serve(t, a)
		servers = append(servers, server)
		args := []string{"-address", server.Address, "-for", length.String()}
		if a.Secure {
			args = append(args, "-tls")
		}
		runs = append(runs, &run{client: start(t, program, append(args, "client")...)})
	}
	for i, r := range runs {
		r.client.read(t, &r.report)
		took := time.Since(begin)
		r.peak, r.connections = r.client.peak(t), float64(servers[i].Connections())/length.Seconds()
		r.processor = r.client.stop(t).Seconds() / took.Seconds()
	}
	slack := starvationsMixed * max(0, machine.stats(t).Starved-quiet)
	for i, a := range agents {
		t.Run(a.Name, func(t *testing.T) {
			r, peak, connections, processor := runs[i].report, runs[i].peak, runs[i].connections, runs[i].processor
			t.Logf("%d flows, %v; peak %d MiB, Start at most %v after its timeout, %.1f connections/s, %.0f %% of a core, Close %v; slack %v",
				r.Flows, r.Decisions, peak, r.Late.Round(time.Millisecond), connections, 100*processor,
				r.Close.Round(time.Millisecond), slack.Round(time.Millisecond))
			if peak > clientMemory {
				t.Errorf("peak %d MiB want at most %d", peak, clientMemory)
			}
			if length >= holdsTimes && r.Late > clientLate+slack {
				t.Errorf("a Start outlasted its timeout by %v want at most %v", r.Late, clientLate+slack)
			}
			if connections > clientConnections {
				t.Errorf("%.1f connections a second want at most %d", connections, clientConnections)
			}
			busy := strings.HasPrefix(a.Name, "answers") || a.Name == "resets each question" // each flow is answered, at once
			if processor > clientProcessor && !busy {
				t.Errorf("%.0f %% of a core want at most %.0f %%", 100*processor, 100*clientProcessor)
			}
			if r.LongestError > clientError {
				t.Errorf("an error has %d bytes want at most %d", r.LongestError, clientError)
			}
			if length >= holdsTimes && r.Close > clientClose+slack {
				t.Errorf("Close took %v want at most %v", r.Close, clientClose+slack)
			}
			if r.Goroutines > 0 {
				t.Errorf("%d goroutines are left", r.Goroutines)
			}
			if n := r.Decisions["canceled"] + r.Decisions["invalid"]; n > 0 {
				t.Errorf("%d flows were canceled or invalid", n)
			}
		})
	}
}
