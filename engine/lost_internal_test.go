package engine

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
)

// After the process stood still, a lease that lasts again says nothing about the time between. The first that looks finds that.
func TestLeaseAfterAPause(t *testing.T) {
	const lease = 10 * time.Second
	for _, tt := range []struct {
		name  string
		pause time.Duration
		began time.Duration // the check of the flow that finds it, before now
		lost  []int         // slots of the flows that are lost when it joins
	}{
		{name: "in time", pause: lease - time.Millisecond},
		{name: "too late", pause: lease, lost: []int{1}},
		{name: "much too late", pause: time.Hour, lost: []int{1}},
		{name: "a check that began before", pause: time.Hour, began: time.Minute, lost: []int{1, 2}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				first, second := new(agentapi.Verdict), new(agentapi.Verdict)
				l := watched{limited: func(v *agentapi.Verdict) int {
					if v == second {
						return 2
					}
					return 1
				}}
				kept := func() time.Time { return time.Now().Add(lease) }
				still := func() {} // the timer does nothing while the process stands still
				if lost := l.join(kept, first, nil, time.Now(), still); lost != nil {
					t.Errorf("lost = %v at once", lost)
				}
				<-time.After(tt.pause)
				var got []int
				for _, f := range l.join(kept, second, nil, time.Now().Add(-tt.began), still) {
					got = append(got, f.slots)
				}
				if len(got) != len(tt.lost) || len(got) > 0 && got[len(got)-1] != tt.lost[len(tt.lost)-1] {
					t.Errorf("lost = %v want %v", got, tt.lost)
				}
				if lost := l.look(kept); lost != nil {
					t.Errorf("lost = %v later", lost)
				}
				l.close()
			})
		})
	}
}
