package flowctl_test

import (
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

// Labels of peers are bounded by bytes, and not by number. Beyond the bound the flow is Invalid: which labels policies
// limit by is not known, and so none is left out.
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
		invalid            bool
	}{
		{"thousands", numbered("t", 5_000, "1"), numbered("b", 5_000, "1"), false},
		{"large ones", numbered("t", 10, large), numbered("b", 200, large), false},
		{"too large ones of baggage", numbered("t", 0, ""), numbered("b", 300, large), true},
		{"too many small ones of baggage", numbered("t", 0, ""), numbered("b", 30_000, ""), true},
		{"too large ones of the transport", numbered("t", 300, large), nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var header strings.Builder
			header.WriteString("bs=small")
			for key, value := range tt.baggage {
				header.WriteString("," + key + "=" + value)
			}
			sides.Setup{
				Options: []flowctl.Option{flowctl.WithCheckTimeout(time.Minute), flowctl.WithBaggage()},
			}.Over(t, sides.All, func(t *testing.T, side *sides.Side) {
				transport := maps.Clone(tt.transport)
				transport["ts"] = "small"
				ctx := w3cbaggage.With(labels.WithTransport(t.Context(), transport), header.String())
				flow := side.Client.Start(ctx, "point", flowctl.Params{Labels: map[string]string{"own": "1"}})
				if tt.invalid {
					if flow.Decision() != flowctl.Invalid || flow.ShouldRun() || !strings.Contains(fmt.Sprint(flow.Err()), "peers") {
						t.Errorf("%s: %v want invalid", flow.Decision(), flow.Err())
					}
					return
				}
				if flow.Decision() != flowctl.Accepted {
					t.Fatalf("%s: %v want accepted", flow.Decision(), flow.Err())
				}
				if side.Kind == sides.Served { // which keeps 64, and those that policies name
					return
				}
				got := side.Checks()[0].Labels
				for key, want := range map[string]string{"own": "1", "ts": "small", "bs": "small"} {
					if got[key] != want {
						t.Errorf("label %s = %q want %q", key, got[key], want)
					}
				}
				if want := len(tt.transport) + len(tt.baggage) + 3; len(got) != want {
					t.Errorf("%d labels arrived want %d", len(got), want)
				}
			})
		})
	}
}
