package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answers reads the table: the calls answered in time each second, in the rows from some second on, of each lane.
func answers(t *testing.T, table string, from float64) (rows [][]float64) {
	t.Helper()
	for line := range strings.Lines(table) {
		var numbers []float64
		for word := range strings.FieldsSeq(line) {
			if n, err := strconv.ParseFloat(strings.TrimSuffix(word, "s"), 64); err == nil {
				numbers = append(numbers, n)
			}
		}
		if len(numbers) > 2 && numbers[0] >= from {
			rows = append(rows, numbers[2:])
		}
	}
	return rows
}

// mean is that of one lane.
func mean(rows [][]float64, lane int) float64 {
	sum := 0.0
	for _, row := range rows {
		sum += row[lane]
	}
	return sum / float64(max(len(rows), 1))
}

func TestOutput(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		from float64 // second, when what the rush brings about has settled
		rows int
		want [][2]float64 // of each lane, at the least and at the most
	}{
		{"a fixed share", nil, 2, 5, [][2]float64{{0, 0}, {25, 50}}},
		{"a load scheduler", []string{"-aimd"}, 55, 14, [][2]float64{{0, 0}, {25, 50}, {25, 50}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var stdout strings.Builder
				if err := run(t.Context(), tt.args, &stdout); err != nil {
					t.Fatal(err)
				}
				rows := answers(t, stdout.String(), tt.from)
				if len(rows) != tt.rows || len(rows[0]) != len(tt.want) {
					t.Fatalf("%d rows want %d, each of %d lanes:\n%s", len(rows), tt.rows, len(tt.want), &stdout)
				}
				for _, row := range rows { // no lane that is protected falls back, not even for a while
					for lane, got := range row[1:] {
						if got < 15 {
							t.Errorf("lane %d: a row with %v answers a second:\n%s", lane+1, got, &stdout)
						}
					}
				}
				for lane, want := range tt.want {
					if got := mean(rows, lane); got < want[0] || got > want[1] {
						t.Errorf("lane %d: %v answers a second want %v:\n%s", lane, got, want, &stdout)
					}
				}
			})
		})
	}
}

func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := run(ctx, nil, new(strings.Builder)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("run = %v want %v", err, context.DeadlineExceeded)
		}
	})
}
