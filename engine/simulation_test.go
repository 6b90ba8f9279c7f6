package engine_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// A crowd is a number of equal clients.
type crowd struct {
	name    string
	labels  string
	clients int           // that start a flow, and the next one when it has ended
	every   time.Duration // or: a flow is started so often, whatever is decided
	timeout time.Duration
	tokens  int // a flow costs 1 to so many, by the label "tokens"; 0: what the policy says

	want, within float64 // percent of all that is admitted
}

// A tally counts the decisions about a crowd's flows.
type tally struct {
	started, admitted int
	tokens            float64
	busy, longest     time.Duration // of all slots together, and between admissions
}

// warmUp is not counted: at first there is enough for all.
const warmUp = 5 * time.Second

// simulate has the crowds come for a while; an admitted flow takes hold, more or less. It prints a table, with a line about
// them all.
func simulate(t *testing.T, components []policy.Component, crowds []crowd, hold, last time.Duration,
	total func(all tally) string,
) (rows []tally, all tally) {
	rows = make([]tally, len(crowds))
	synctest.Test(t, func(t *testing.T) {
		c := open(t, components)
		begin := time.Now().Add(warmUp)
		over := begin.Add(last)
		var mu sync.Mutex
		var wg sync.WaitGroup
		latest := make([]time.Time, len(crowds))
		flow := func(i int, rng *rand.Rand) {
			labels, tokens := labelled(crowds[i].labels), 1
			if crowds[i].tokens > 0 {
				tokens = 1 + rng.IntN(crowds[i].tokens)
				labels["tokens"] = fmt.Sprint(tokens)
			}
			f := c.Start(t.Context(), "point", flowctl.Params{Labels: labels, CheckTimeout: crowds[i].timeout})
			defer end(f)
			now := time.Now()
			takes := time.Duration(float64(hold) * (0.5 + rng.Float64()))
			mu.Lock()
			if row := &rows[i]; now.After(begin) && !now.After(over) {
				row.started++
				if f.ShouldRun() {
					row.admitted++
					row.tokens += float64(tokens)
					if !latest[i].IsZero() {
						row.longest = max(row.longest, now.Sub(latest[i]))
					}
					latest[i] = now
				}
			}
			if f.ShouldRun() {
				from, to := now, now.Add(takes)
				if from.Before(begin) {
					from = begin
				}
				if to.After(over) {
					to = over
				}
				rows[i].busy += max(to.Sub(from), 0)
			}
			mu.Unlock()
			if f.ShouldRun() {
				<-time.After(takes)
			}
		}
		for i, crowd := range crowds {
			for n := range crowd.clients {
				wg.Go(func() {
					for rng := rand.New(rand.NewPCG(uint64(i), uint64(n))); time.Now().Before(over); {
						flow(i, rng)
					}
				})
			}
			if crowd.every > 0 {
				wg.Go(func() {
					for n := uint64(0); time.Now().Before(over); n++ {
						wg.Go(func() { flow(i, rand.New(rand.NewPCG(uint64(i), n))) })
						<-time.After(crowd.every)
					}
				})
			}
		}
		wg.Wait()
	})
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, row := range rows {
		all.started += row.started
		all.admitted += row.admitted
		all.tokens += row.tokens
		all.busy += row.busy
	}
	largest := 1
	for _, c := range crowds {
		largest = max(largest, c.tokens)
	}
	// The end of the simulation may fall just before or just after one flow of the largest cost.
	cut := 100 * float64(largest) / all.tokens
	fmt.Fprintf(w, "\n\tflows\tadmitted\tshare %%\twant %%\t longest pause\t\n")
	for i, row := range rows {
		share := 100 * row.tokens / all.tokens
		fmt.Fprintf(w, "%s\t%d\t%d\t%.2f\t%.2f\t%v\t\n", crowds[i].name, row.started, row.admitted, share, crowds[i].want, row.longest.Round(time.Millisecond))
		if within := crowds[i].within + cut; math.Abs(share-crowds[i].want) > within {
			t.Errorf("%s: %.2f %% of what is admitted want %.2f ± %.2f", crowds[i].name, share, crowds[i].want, within)
		}
	}
	fmt.Fprintf(w, "all\t%d\t%d\t\t\t\t\n", all.started, all.admitted)
	_ = w.Flush()
	text.WriteString(total(all) + "\n")
	t.Log(text.String())
	return rows, all
}

// tenUsers want the same share, each with another demand.
func tenUsers(demand func(i int, c *crowd)) []crowd {
	users := make([]crowd, 10)
	for i := range users {
		name := fmt.Sprint("user=", i)
		users[i] = crowd{name: name, labels: name, timeout: never, want: 10, within: 2}
		demand(i, &users[i])
	}
	return users
}

// checkPauses fails the test if one client had to wait for much longer than others that want the same.
func checkPauses(t *testing.T, rows []tally, crowds []crowd, last time.Duration) {
	t.Helper()
	for i, row := range rows {
		usual := last / time.Duration(max(row.admitted, 1))
		if row.longest > 3*usual+200*time.Millisecond { // which the largest flow may take
			t.Errorf("%s: none was admitted for %v, where one is each %v", crowds[i].name, row.longest, usual)
		}
	}
}

func TestSimulations(t *testing.T) {
	const fill, slots, hold = 100.0, 10, 50 * time.Millisecond
	last := race.Pick(6*time.Second, time.Minute)
	tokens := quota(func(q *policy.QuotaScheduler) { q.Capacity, q.Fill, q.Scheduler = fill, fill, byLabels })
	places := concurrency(func(c *policy.ConcurrencyScheduler) { c.Max, c.Scheduler = slots, byLabels })
	oneToThree := []crowd{
		{name: "priority 1", labels: "workload=a priority=1", clients: 30, timeout: never, want: 25, within: 1},
		{name: "priority 3", labels: "workload=b priority=3", clients: 30, timeout: never, want: 75, within: 1},
	}
	doubling := tenUsers(func(i int, c *crowd) { c.clients = 4 << i })
	demanding := tenUsers(func(i int, c *crowd) {
		c.every, c.timeout = time.Second/time.Duration(int(fill)/10*(i+2)), time.Second
	})
	oneAndNine := tenUsers(func(i int, c *crowd) {
		c.labels, c.clients, c.want, c.within = c.labels+" workload=nine", 20, 50.0/9, 1
		if i == 0 {
			c.labels, c.want = c.name+" workload=one", 50
		}
	})
	costs := []crowd{
		{name: "costs 1", labels: "workload=a", clients: 30, tokens: 1, timeout: never, want: 50, within: 1},
		{name: "costs 1 to 20", labels: "workload=b", clients: 30, tokens: 20, timeout: never, want: 50, within: 1},
	}
	extremes := []crowd{
		{name: "priority 1", labels: "workload=a priority=1", clients: 30, timeout: never, want: 100.0 / 1001, within: 0.02},
		{name: "priority 1000", labels: "workload=b priority=1000", clients: 30, timeout: never, want: 100 - 100.0/1001, within: 0.02},
	}
	for _, tt := range []struct {
		name   string
		crowds []crowd
		last   time.Duration
	}{
		{"two workloads", oneToThree, last},
		{"ten users, each with twice as many clients", doubling, last},
		{"ten users who want 2 to 11 times their share within a second", demanding, last / 2},
		{"a workload of one user and one of nine", oneAndNine, last},
		{"costs", costs, max(last, 30*time.Second)}, // in less, one flow is more than a percent
		{"extremes", extremes, 100 * time.Second},
	} {
		t.Run("quota/"+tt.name, func(t *testing.T) {
			rows, all := simulate(t, []policy.Component{tokens}, tt.crowds, 0, tt.last, func(all tally) string {
				return fmt.Sprintf("used: %.0f of %.0f tokens", all.tokens, fill*tt.last.Seconds())
			})
			came := fill * tt.last.Seconds()
			if math.Abs(all.tokens-came) > 20 { // of which the first flow may have had some to wait for
				t.Errorf("%v of %v tokens were used although there was always somebody who waited", all.tokens, came)
			}
			checkPauses(t, rows, tt.crowds, tt.last)
		})
		if tt.crowds[0].tokens > 0 {
			continue // a slot that is free admits large ones too
		}
		t.Run("concurrency/"+tt.name, func(t *testing.T) {
			rows, all := simulate(t, []policy.Component{places}, tt.crowds, hold, tt.last, func(all tally) string {
				return fmt.Sprintf("busy: %.2f %% of the slots' time", 100*all.busy.Seconds()/(slots*tt.last.Seconds()))
			})
			busy := 100 * all.busy.Seconds() / (slots * tt.last.Seconds())
			if busy < 98 {
				t.Errorf("slots were busy for %.2f %% of the time want 98", busy)
			}
			checkPauses(t, rows, tt.crowds, tt.last)
		})
	}
}
