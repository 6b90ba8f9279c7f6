package flowctl_test

import (
	"bytes"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/labels"
)

// Labels of peers are bounded by bytes, and not by number: of too many the largest give way, those of baggage first.
func TestLabelsOfPeers(t *testing.T) {
	numbered := func(prefix string, n int, value string) map[string]string {
		m := make(map[string]string, n)
		for i := range n {
			m[fmt.Sprintf("%s%05d", prefix, i)] = value
		}
		return m
	}
	large := strings.Repeat("v", 4096)
	for _, tt := range []struct {
		name               string
		transport, baggage map[string]string
		left               int
	}{
		{"thousands", numbered("t", 5_000, "1"), numbered("b", 5_000, "1"), 0},
		{"large ones of baggage", numbered("t", 10, large), numbered("b", 300, large), 57},
		{"large ones of the transport", numbered("t", 300, large), nil, 47},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var logged bytes.Buffer
			sides.Setup{
				Options: []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), flowctl.WithBaggage(), logTo(&logged)},
			}.Over(t, sides.All, func(t *testing.T, side *sides.Side) {
				logged.Reset()
				transport := maps.Clone(tt.transport)
				transport["ts"] = "small"
				header := "bs=small"
				for key, value := range tt.baggage {
					header += "," + key + "=" + value
				}
				ctx := w3cbaggage.With(labels.WithTransport(t.Context(), transport), header)
				flow := side.Client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"own": "1"}})
				if flow.Decision() != flowctl.Accepted {
					t.Fatalf("%s: %v want accepted", flow.Decision(), flow.Err())
				}
				if n := strings.Count(logged.String(), "labels were left out"); (n == 1) != (tt.left > 0) {
					t.Errorf("the log has %q", logged.String())
				}
				if side.Kind == sides.Served { // which keeps 64, and those that policies name
					return
				}
				got := side.Checks()[0].Labels
				for key, want := range map[string]string{"own": "1", "ts": "small", "bs": "small"} {
					if tt.baggage == nil && key == "bs" {
						continue
					}
					if got[key] != want {
						t.Errorf("label %s = %q want %q", key, got[key], want)
					}
				}
				if want := len(tt.transport) + len(tt.baggage) + 3 - tt.left; len(got) != want && tt.baggage != nil {
					t.Errorf("%d labels arrived want %d", len(got), want)
				}
			})
		})
	}
}
