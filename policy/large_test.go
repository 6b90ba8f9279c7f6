package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// TestManyLimiters reads 100,000 limiters, in as many policies as may be and in one, fewer in a short file, and JSON in a line.
func TestManyLimiters(t *testing.T) {
	if race.Enabled {
		t.Skip("skipped under the race detector, which makes it slow: TestSections reads files on several goroutines, and TestLarge reads large ones")
	}
	const (
		limiters = 100_000
		ports    = "x-ports: &ports {bucket_capacity: {constant_signal: {value: 5}}, fill_amount: {constant_signal: {value: 5}}}\n"
		head     = "apiVersion: fluxninja.com/v1alpha1\nkind: Policy\nmetadata: {name: p%d}\n" + ports + "spec:\n  circuit:\n    components:\n"
		item     = "- flow_control: {rate_limiter: {selectors: [{control_point: c%d}], in_ports: *ports, parameters: {interval: 1m}}}\n"
		json     = `{"flow_control":{"rate_limiter":{"selectors":[{"control_point":"a"}],"in_ports":{"bucket_capacity":` +
			`{"constant_signal":{"value":10}},"fill_amount":{"constant_signal":{"value":5}}},"parameters":{"interval":"1s"}}}}`
	)
	var documents, one, short strings.Builder
	short.WriteString("headgate: 1\npolicies:\n")
	for i := range limiters {
		if i%5 == 0 {
			fmt.Fprintf(&documents, "---\n"+head, i/5)
		}
		if i < limiters/10 && i%100 == 0 {
			fmt.Fprintf(&short, "  - name: p%d\n    components:\n", i)
		}
		fmt.Fprintf(&documents, "    "+item, i)
		if i < limiters/10 {
			fmt.Fprintf(&short, "      - rate_limiter: {at: [c%d], capacity: 5, fill: 5, interval: 1m}\n", i)
		}
	}
	one.WriteString(ports + "circuit:\n  components:\n")
	for i := range limiters {
		fmt.Fprintf(&one, "  "+item, i)
	}
	for _, tt := range []struct {
		name, data         string
		policies, limiters int
	}{
		{"20000 policies", documents.String(), limiters / 5, limiters},
		{"one policy", one.String(), 1, limiters},
		{"a short file", short.String(), limiters / 1000, limiters / 10},
		{"JSON in a line", `{"circuit":{"components":[` + strings.TrimSuffix(strings.Repeat(json+",", 70_000), ",") + "]}}", 1, 70_000},
		{"words without quotes in a line", `{"circuit":{"components":[` +
			strings.TrimSuffix(strings.Repeat(strings.Replace(json, `"a"`, "GET /a", 1)+",", 70_000), ",") + "]}}", 1, 70_000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			policies, err := policy.Parse("x.yaml", []byte(tt.data))
			if err != nil {
				t.Fatal(err)
			}
			have := 0
			for _, p := range policies {
				have += len(p.Components)
			}
			if len(policies) != tt.policies || have != tt.limiters {
				t.Errorf("Parse = %d policies with %d limiters, want %d with %d", len(policies), have, tt.policies, tt.limiters)
			}
			e, err := engine.New(policies)
			if err != nil {
				t.Fatal(err)
			}
			_ = e.Close()
		})
	}
}
