package agent_test

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// Flows that wait with one deadline are rejected one after the other, each in time for its answer: a flow whose client
// hears nothing would run. Checks of other control points are answered meanwhile, however many flows wait.
func TestBurstsThatWaitInVain(t *testing.T) {
	const timeout = 10 * time.Second
	flows := race.Pick(300, 1200) // more than HTTP/2 servers usually have streams
	synctest.Test(t, func(t *testing.T) {
		client := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
			policy.ConcurrencyScheduler{Selectors: policy.At("slow"), Max: 1, MaxInflight: time.Hour},
			policy.RateLimiter{Selectors: policy.At("none"), Interval: time.Hour},
		}}}).client(t)
		params := flowctl.Params{CheckTimeout: timeout}
		begin := time.Now()
		if holder := client.Start(t.Context(), "slow", params); holder.Decision() != flowctl.Accepted {
			t.Fatal(holder.Err())
		}
		var mu sync.Mutex
		var ends []time.Duration
		var waiting sync.WaitGroup
		for range flows {
			waiting.Go(func() {
				flow := client.Start(t.Context(), "slow", params)
				if flow.Decision() != flowctl.Rejected {
					t.Errorf("%v, %v want rejected", flow, flow.Err())
				}
				mu.Lock()
				defer mu.Unlock()
				ends = append(ends, time.Since(begin))
			})
		}
		synctest.Wait()
		if flow := client.Start(t.Context(), "none", params); flow.Decision() != flowctl.Rejected {
			t.Errorf("another control point: %v, %v want rejected", flow, flow.Err())
		}
		waiting.Wait()
		slices.Sort(ends)
		spread := ends[len(ends)-1] - ends[0]
		if want := time.Duration(flows) * 400 * time.Microsecond; spread < want || spread > timeout/4 {
			t.Errorf("the flows end within %v want at least %v", spread, want)
		}
		if last := ends[len(ends)-1]; last > timeout-timeout/20 { // those that came first too
			t.Errorf("the last flow ends after %v want a twentieth before its deadline", last)
		}
	})
}

// Flows that give up before their deadline do so at their time, however many they are.
func TestBurstsOfShortWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{policy.ConcurrencyScheduler{
			Selectors: policy.At("slow"), Max: 1, MaxInflight: time.Hour,
			Scheduler: policy.Scheduler{Default: policy.WorkloadParameters{QueueTimeout: time.Second}},
		}}}}).client(t)
		params := flowctl.Params{CheckTimeout: 10 * time.Second}
		client.Start(t.Context(), "slow", params)
		var waiting sync.WaitGroup
		for range 20 {
			waiting.Go(func() {
				begin := time.Now()
				flow := client.Start(t.Context(), "slow", params)
				if took := time.Since(begin); flow.Decision() != flowctl.Rejected || took != time.Second {
					t.Errorf("%v after %v want rejected after %v", flow, took, time.Second)
				}
			})
		}
		waiting.Wait()
	})
}

// The header with baggage counts in whichever case it is written, as all headers do.
func TestBaggageInAnyCase(t *testing.T) {
	for _, name := range []string{"baggage", "Baggage", "BAGGAGE"} {
		t.Run(name, func(t *testing.T) {
			client := serve(t, []policy.Policy{{Name: "p", Components: []policy.Component{
				policy.RateLimiter{Selectors: policy.At("point"), Capacity: 1, Interval: time.Hour, LimitBy: "user"},
			}}}).stubHTTP(t)
			for _, want := range []int32{0, 429} {
				m, err := client.CheckHTTP(t.Context(), &checkhttpv1.CheckHTTPRequest{ControlPoint: "point", Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
					Method: "GET", Path: "/", Headers: map[string]string{name: "user=ann"},
				}})
				if err != nil || m.GetDeniedResponse().GetStatus() != want {
					t.Errorf("CheckHTTP() = %v, %v want status %d", m, err, want)
				}
			}
		})
	}
}
