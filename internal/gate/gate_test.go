package gate_test

import (
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/gate"
)

func TestGate(t *testing.T) {
	const answer = -1
	for _, tt := range []struct {
		name string
		// The events: a failure, at so many ms, of a call that took 50 ms, or an answer.
		events []int
		open   bool
	}{
		{"closed at first", nil, false},
		{"failures in a row for the span", []int{50, 100, 150}, true},
		{"too few", []int{50, 200}, false},
		{"many at once", []int{50, 51, 52, 53}, false},
		{"many at once, and one later", []int{50, 51, 52, 100}, true},
		{"an answer between them", []int{50, 100, answer, 150, 200}, false},
		{"an answer closes it", []int{50, 100, 150, answer}, false},
		{"it opens again", []int{50, 100, 150, answer, 200, 250, 300}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := gate.New(3, 100*time.Millisecond)
			epoch := time.Now()
			changed := false
			for _, at := range tt.events {
				was := g.Open()
				if at == answer {
					changed = g.Answered()
				} else {
					now := epoch.Add(time.Duration(at) * time.Millisecond)
					changed = g.Failed(now.Add(-50*time.Millisecond), now)
				}
				if is := g.Open(); changed != (was != is) {
					t.Errorf("at %d: changed = %v, open before %v, after %v", at, changed, was, is)
				}
			}
			if got := g.Open(); got != tt.open {
				t.Errorf("Open() = %v want %v", got, tt.open)
			}
		})
	}
}
