package agent_test

import (
	"context"
	"errors"
	"os"
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
	const (
		inFlight = 64
		life     = 20 * time.Second // of an agent
		outage   = 2 * time.Second
	)
	text := os.Getenv("HEADGATE_SOAK")
	if text == "" {
		t.Skip("takes minutes: make soak")
	}
	length, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("HEADGATE_SOAK: %v", err)
	}
	p, address := startProcess(t, "127.0.0.1:0")
	client := dialProcess(t, address, flowctl.WithAgentBreaker(flowctl.AgentBreaker{Span: 400 * time.Millisecond}))
	params := flowctl.Params{Labels: map[string]string{"user_id": "u"}}
	errWork := errors.New("work failed")
	var started, ended, accepted, unreachable atomic.Int64
	decided := make(decisions)

	ctx, stop := context.WithTimeout(t.Context(), length+time.Minute) // for a soak has no other limit, should no agent be found again
	defer stop()
	var load sync.WaitGroup
	for w := range inFlight {
		load.Go(func() {
			last := &lastFlow{Client: client}
			for n := w; ctx.Err() == nil; n++ {
				started.Add(1)
				func() {
					defer func() { _ = recover() }()
					_ = headgate.Do(t.Context(), last, "point", params, func(context.Context, *flowctl.Flow) error {
						switch n % 4 {
						case 0:
							return errWork
						case 1:
							panic(errWork)
						case 2:
							<-time.After(time.Millisecond) // so that agents die while flows hold slots
						}
						return nil
					})
				}()
				switch last.flow.Decision() {
				case flowctl.Accepted:
					accepted.Add(1)
				case flowctl.Unreachable:
					unreachable.Add(1)
				default:
					t.Errorf("%v, %v want accepted or unreachable", last.flow, last.flow.Err())
					stop()
				}
				decided.tell(last.flow.Decision())
				if _, err := last.flow.End(t.Context()); errors.Is(err, flowctl.ErrEnded) {
					ended.Add(1)
				}
			}
		})
	}
	decided.await(ctx, t, inFlight, flowctl.Accepted)
	kills := 0
	for end := time.Now().Add(length); ; kills++ {
		<-time.After(min(life, time.Until(end)))
		if !time.Now().Before(end) {
			break
		}
		p.kill(t)
		<-time.After(outage)
		p, _ = startProcess(t, address)
		decided.await(ctx, t, inFlight, flowctl.Accepted)
	}
	stop()
	load.Wait()
	if err := client.Close(t.Context()); err != nil {
		t.Logf("telemetry: %v", err) // that of the time without an agent is lost, as it may be
	}
	t.Logf("%d flows in %v, %d accepted, %d without an agent, %d kills", started.Load(), length, accepted.Load(), unreachable.Load(), kills)
	if started.Load() != ended.Load() {
		t.Errorf("%d flows were started, %d ended", started.Load(), ended.Load())
	}
	if kills > 0 && unreachable.Load() == 0 {
		t.Error("no flow went on without an agent: the soak needs some")
	}
	if got := p.inFlight(t); got != 0 {
		t.Errorf("%v slots are held when all flows have ended", got)
	}
	p.kill(t)
}
