package agent_test

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/flowctl"
)

// lastFlow is a client that keeps the flow it started last, for a worker to look at.
type lastFlow struct {
	*flowctl.Client
	flow *flowctl.Flow
}

func (c *lastFlow) Start(ctx context.Context, controlPoint string, params flowctl.Params) *flowctl.Flow {
	c.flow = c.Client.Start(ctx, controlPoint, params)
	return c.flow
}

// TestSoak keeps 64 flows in flight for as long as HEADGATE_SOAK says, over a real connection to an agent that is killed
// every 20 s. Run it with make soak.
func TestSoak(t *testing.T) {
	text := os.Getenv("HEADGATE_SOAK")
	if text == "" {
		t.Skip("takes minutes: make soak")
	}
	length, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("HEADGATE_SOAK: %v", err)
	}
	before := runtime.NumGoroutine()
	p, address := startProcess(t, "127.0.0.1:0")
	client, err := flowctl.Dial(address, flowctl.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	params := flowctl.Params{Labels: map[string]string{"user_id": "u"}}
	errWork := errors.New("work failed")
	var started, ended, answered, refused atomic.Int64

	ctx, stop := context.WithTimeout(t.Context(), length)
	defer stop()
	var load sync.WaitGroup
	for w := range 64 {
		load.Go(func() {
			last := &lastFlow{Client: client}
			for n := w; ctx.Err() == nil; n++ {
				started.Add(1)
				func() {
					defer func() { _ = recover() }()
					_ = headgate.Do(t.Context(), last, "point", params, func(context.Context, *flowctl.Flow) error {
						switch n % 3 {
						case 0:
							return errWork
						case 1:
							panic(errWork)
						default:
							return nil
						}
					})
				}()
				switch last.flow.Decision() {
				case flowctl.Accepted:
					answered.Add(1)
				case flowctl.Rejected: // it came too late for the agent to let it in
					refused.Add(1)
				default:
				}
				if _, err := last.flow.End(t.Context()); errors.Is(err, flowctl.ErrEnded) {
					ended.Add(1)
				}
			}
		})
	}
	kills := time.NewTicker(20 * time.Second)
	defer kills.Stop()
	killed := 0
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-kills.C:
			p.kill(t)
			killed++
			select {
			case <-ctx.Done():
			case <-time.After(2 * time.Second):
			}
			p, _ = startProcess(t, address)
		}
	}
	load.Wait()
	if err := client.Close(t.Context()); err != nil {
		t.Logf("telemetry: %v", err)
	}
	t.Logf("%d flows in %v, %d accepted, %d too late, %d kills", started.Load(), length, answered.Load(), refused.Load(), killed)
	if started.Load() != ended.Load() || answered.Load() == 0 {
		t.Errorf("%d flows were started, %d ended, %d accepted", started.Load(), ended.Load(), answered.Load())
	}
	<-time.After(maxInflight)
	if got := p.inFlight(t); got != 0 {
		t.Errorf("%v slots are held", got)
	}
	p.kill(t)
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines want %d as before", runtime.NumGoroutine(), before)
		}
	}
}
