package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/redisstore/internal/redistest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Two processes, which are two runs here, have one limit.
func TestFleetRun(t *testing.T) {
	url := redistest.Start(t, redistest.Options{}).URL()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var running sync.WaitGroup
	var mu sync.Mutex
	begin, ran := time.Now(), [2]int{}
	for i := range ran {
		out, printed := io.Pipe()
		running.Go(func() {
			defer printed.Close()
			if err := run(ctx, url, printed); err != nil {
				t.Error(err)
			}
		})
		running.Go(func() {
			for lines := bufio.NewScanner(out); lines.Scan(); {
				var n int
				if _, err := fmt.Sscanf(lines.Text(), "%d calls of this process ran", &n); err != nil {
					t.Error(err)
				}
				mu.Lock()
				ran[i] += n
				enough := ran[0] > 5 && ran[1] > 5
				mu.Unlock()
				if enough {
					stop()
				}
			}
		})
	}
	running.Wait()
	if limit := 10 + 10*time.Since(begin).Seconds(); float64(ran[0]+ran[1]) > limit {
		t.Errorf("%d and %d calls ran want at most %v together", ran[0], ran[1], limit)
	}
}
