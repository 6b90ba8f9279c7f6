package redisstore

import "testing"

// Calls that nobody waits for any more are not sent, and keep no others from it. A batch has a bound.
func TestLaneNext(t *testing.T) {
	one := func(state callState, asks int) *call { return &call{state: state, asks: make([]asked, asks)} }
	many := func(n int, state callState, asks int) (calls []*call) {
		for range n {
			calls = append(calls, one(state, asks))
		}
		return calls
	}
	for _, tt := range []struct {
		name    string
		queue   []*call
		batches []int
	}{
		{"none", nil, nil},
		{"one", many(1, callQueued, 1), []int{1}},
		{"many", many(300, callQueued, 1), []int{128, 128, 44}},
		{"many keys", many(6, callQueued, 200), []int{2, 2, 2}},
		{"too many keys for others", append(many(1, callQueued, 1000), many(1, callQueued, 1)...), []int{1, 1}},
		{"behind those that are left", append(many(300, callLeft, 1), one(callQueued, 1)), []int{1}},
		{"all left", many(300, callLeft, 1), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &lane{queue: tt.queue, running: 1}
			for i, want := range tt.batches {
				if got := l.next(); len(got) != want {
					t.Fatalf("batch %d has %d calls want %d", i, len(got), want)
				}
			}
			if got := l.next(); got != nil || l.running != 0 || len(l.queue) != 0 {
				t.Errorf("then %d calls, %d run, and %d wait want none", len(got), l.running, len(l.queue))
			}
		})
	}
}
