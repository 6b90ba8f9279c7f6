package agent

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// No two checks have the same start, however many begin at one time, and each has its own time if that is free.
func TestStarts(t *testing.T) {
	epoch := time.Now()
	s := starts{epoch: epoch}
	for _, tt := range []struct{ after, want time.Duration }{
		{0, 0}, {0, 1}, {1, 2}, {time.Second, time.Second}, {time.Second - 1, time.Second + 1}, {time.Minute, time.Minute},
	} {
		if got := time.Duration(s.next(epoch.Add(tt.after)) - epoch.UnixNano()); got != tt.want {
			t.Errorf("the start after %v is %v want %v", tt.after, got, tt.want)
		}
	}
	var mu sync.Mutex
	var all []int64
	var done sync.WaitGroup
	for range 8 {
		done.Go(func() {
			for range 1000 {
				start := s.next(epoch)
				mu.Lock()
				all = append(all, start)
				mu.Unlock()
			}
		})
	}
	done.Wait()
	slices.Sort(all)
	if got := len(slices.Compact(all)); got != 8000 {
		t.Errorf("8000 checks of one time have %d starts", got)
	}
}
