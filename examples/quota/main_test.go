package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// By priority people get an answer to each prompt, and soon; in order most of them give up. All tokens are used.
func TestOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stdout strings.Builder
		if err := run(t.Context(), []string{"-for", "20s"}, &stdout); err != nil {
			t.Fatal(err)
		}
		var rows [][]float64
		for line := range strings.Lines(stdout.String()) {
			if words := strings.Fields(line); len(words) > 4 && (words[0] == "chat" || words[0] == "batch") {
				var row []float64
				for _, word := range words[1:5] {
					n, err := strconv.ParseFloat(strings.TrimSuffix(word, "s"), 64)
					if err != nil {
						t.Fatalf("%q: %v", line, err)
					}
					row = append(row, n)
				}
				rows = append(rows, row)
			}
		}
		if len(rows) != 4 {
			t.Fatalf("%d rows want 4:\n%s", len(rows), &stdout)
		}
		const answered, rejected, wait, tokens = 0, 1, 2, 3
		if chat := rows[0]; chat[rejected] < 3*chat[answered] {
			t.Errorf("first come, first served: %v prompts of people were answered and %v were not", chat[answered], chat[rejected])
		}
		if chat := rows[2]; chat[rejected] > 0 || chat[wait] > 0.2 || chat[answered] < 90 {
			t.Errorf("by priority: %v prompts of people were answered after %vs and %v were not", chat[answered], chat[wait], chat[rejected])
		}
		for i := 0; i < 4; i += 2 {
			if all := rows[i][tokens] + rows[i+1][tokens]; all < 1000 || all > 1060 { // the first thousand is there at once
				t.Errorf("%v tokens a second want 1000", all)
			}
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
