package redisstore_test

import (
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// A server that fails in the middle of a script keeps what it has done until then. Slots that it has given come back.
func TestFleetRefusedInTheMiddle(t *testing.T) {
	rule := &shared.Rule{Kind: shared.Slots, Capacity: 2, MaxInflight: time.Hour}
	for name, ask := range map[string]func(t *testing.T, s shared.Store, key shared.Key) error{
		"Take": func(t *testing.T, s shared.Store, key shared.Key) error {
			t.Helper()
			return s.Take(t.Context(), []shared.Ask{{Key: key, Rule: rule, Tokens: 1}}, make([]shared.Answer, 1))
		},
		"Draw": func(t *testing.T, s shared.Store, key shared.Key) error {
			t.Helper()
			d := &shared.Drawing{Key: key, Rule: rule, Waiting: []shared.Waiting{{Workload: "w", Weight: 1, Costs: []float64{1, 1}}}}
			_, err := s.Draw(t.Context(), d)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			client := newClient(t, startServer(t))
			s := newStore(t, client)
			key := keyOf("slots", "a")
			// Leases are the last that the script writes.
			leases := "{" + t.Name() + "}#l"
			do(t, client, "SET", leases, "this is none")
			if err := ask(t, s, key); err == nil {
				t.Fatal("no error from a script that failed")
			}
			if held := do(t, client, "HLEN", "{"+t.Name()+":user=a}:checkout/slots#s"); held < "2" {
				t.Fatalf("the script has done nothing: %s fields", held)
			}
			do(t, client, "DEL", leases)
			eventually(t, "slots that are free", func() bool {
				usage, err := s.Look(t.Context(), key, rule)
				return err == nil && usage.InFlight == 0
			})
		})
	}
}
