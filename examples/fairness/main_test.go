package main

import (
	"context"
	"errors"
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var percent = regexp.MustCompile(`(\d+) %`)

// In order a tenant gets what its callers are of all callers; fairly all get a fifth. Slots are busy either way.
func TestOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stdout strings.Builder
		if err := run(t.Context(), []string{"-for", "20s"}, &stdout); err != nil {
			t.Fatal(err)
		}
		all := 0
		for _, tenant := range tenants {
			all += tenant.callers
		}
		want := map[string][2]float64{"slots": {100, 100}}
		for _, tenant := range tenants {
			want[tenant.name] = [2]float64{100 * float64(tenant.callers) / float64(all), 20}
		}
		for line := range strings.Lines(stdout.String()) {
			name, _, _ := strings.Cut(line, " ")
			found := percent.FindAllStringSubmatch(line, -1)
			if len(found) != 2 {
				continue
			}
			for i, m := range found {
				got, err := strconv.ParseFloat(m[1], 64)
				// A tenant of two callers has a moment without one that waits, where both end at the same time.
				if err != nil || math.Abs(got-want[name][i]) > 4 {
					t.Errorf("%s, %s: %v %% want %.0f", name, points[i], got, want[name][i])
				}
			}
			delete(want, name)
		}
		if len(want) > 0 {
			t.Errorf("no shares of %v", want)
		}
		if t.Failed() {
			t.Log(&stdout)
		}
	})
}

// No time at all would be divided by.
func TestNoTime(t *testing.T) {
	for _, last := range []string{"0s", "1ns", "-1s"} {
		if err := run(t.Context(), []string{"-for", last}, new(strings.Builder)); err == nil || !strings.HasPrefix(err.Error(), "-for "+last) {
			t.Errorf("-for %s: run = %v", last, err)
		}
	}
}

func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := run(ctx, nil, new(strings.Builder)); !errors.Is(err, context.Canceled) {
			t.Errorf("run = %v want %v", err, context.Canceled)
		}
	})
}
