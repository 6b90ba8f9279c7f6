package policy_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// TestManyErrors expects that a broken file needs little more than one that is well: no work and no memory for each of its errors, and
// none for what is well in it. Each row has a file and what breaks it.
func TestManyErrors(t *testing.T) {
	const (
		head    = "headgate: 1\npolicies:\n"
		limiter = "rate_limiter: {id: k%[1]d, at: [a], capacity: 1, fill: 1, interval: 1s}"
		one     = head + "- name: p\n  components:\n  - rate_limiter:\n      capacity: 1\n      fill: 1\n      interval: 1s\n"
		keyed   = one + "      at: [a]\n      limit_by: l\n      overrides:\n"
	)
	lines := func(format string) string {
		var b strings.Builder
		for i := range race.Pick(500, 5_000) {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	components := head + "- name: p\n  components:\n" + lines("  - "+limiter+"\n")
	policies := head + lines("- {name: p%[1]d, components: ["+limiter+"]}\n")
	overrides := keyed + lines("        k%d: {capacity: 2}\n")
	when := one + "      selectors:\n      - control_point: a\n        when:\n" + lines("          k%d: v\n")
	points := one + "      at:\n" + lines("      - k%d\n")
	circuit := "circuit:\n  components:\n" + lines("  - flow_control: {rate_limiter: {selectors: [{control_point: a%d}], parameters: {interval: 1s}, "+
		"in_ports: {bucket_capacity: {constant_signal: {value: 1}}, fill_amount: {constant_signal: {value: 1}}}}}\n")
	for _, tt := range []struct {
		name, file string
		old, new   string // in each place
	}{
		{"unknown keys at the top", components + lines("x-k%d: 1\n"), "x-k", "k"},
		{"unknown keys of components", components, "capacity", "capacit"},
		{"unknown keys of overrides", overrides, "{capacity", "{capacit"},
		{"unknown keys of Aperture's components", circuit, "parameters", "params"},
		{"unknown kinds", components, "rate_limiter", "rate"},
		{"keys that are not there", components, ", fill: 1", ""},
		{"numbers that are none", components, "capacity: 1", "capacity: a"},
		{"numbers that are negative", components, "capacity: 1", "capacity: -1"},
		{"nothing instead of overrides", overrides, " {capacity: 2}", ""},
		{"overrides that are empty", overrides, "capacity: 2", ""},
		{"nothing instead of values", when, ": v", ":"},
		{"mappings instead of names", points, "- k", "- k: "},
		{"policies of one name", policies, "name: p", "name: p, x: "},
		{"components of one ID", components, "id: k", "id: k, on_outage: "},
		{"placeholders", points, "- k", "- __REQUIRED_FIELD__"},
		{"one placeholder in a good file", "x-a: b\n" + overrides, "x-a: b", "x-a: __REQUIRED_FIELD__"},
		{"one key in a good file", overrides + "      dry_run: true\n", "dry_run", "dryrun"},
		{"one field of a good file", overrides + "      denied_status: 429\n", "denied_status: 429", "denied_status: 200"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			parse := func(text string) (uint64, error) {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				_, err := policy.Parse("x.yaml", []byte(text))
				runtime.ReadMemStats(&after)
				return after.TotalAlloc - before.TotalAlloc, err
			}
			_, _ = policy.Parse("x.yaml", []byte(one)) // what is made once
			good, err := parse(tt.file)
			if err != nil {
				t.Fatalf("Parse of the good file = %.300v", err)
			}
			broken, err := parse(strings.ReplaceAll(tt.file, tt.old, tt.new))
			if err == nil {
				t.Fatal("Parse of the broken file = no error")
			}
			const fixed = 4 << 20 // for 200 errors, and their hints
			if most := 2*good + fixed; broken > most {
				t.Errorf("Parse of the broken file allocates %d bytes, want at most %d: that of the good one allocates %d\n%.300v", broken, most, good, err)
			}
		})
	}
}
