package engine_test

import (
	"container/heap"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

var update = flag.Bool("update", false, "write the pictures of the documents anew")

// A service has workers. Each serves one request at a time, in the order in which they come. What a request takes
// varies. When more come than the workers can serve, each waits longer than the one before it; and those that are
// served too late have cost as much as the others.
type service struct {
	random   *rand.Rand
	free     times   // when each of the workers is
	finishes returns // of what is in the service
	inside   atomic.Int64
}

const (
	workers  = 4
	takes    = 200 * time.Millisecond // on average
	patience = time.Second            // of the callers
	capacity = float64(workers) / 0.2 // requests each second
)

type times []time.Time

func (h times) Len() int           { return len(h) }
func (h times) Less(i, j int) bool { return h[i].Before(h[j]) }
func (h times) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *times) Push(x any)        { *h = append(*h, x.(time.Time)) }
func (h *times) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// A request is in the service until it is done.
type request struct {
	flow       *flowctl.Flow
	came, done time.Time
}

type returns []request

func (h returns) Len() int           { return len(h) }
func (h returns) Less(i, j int) bool { return h[i].done.Before(h[j].done) }
func (h returns) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *returns) Push(x any)        { *h = append(*h, x.(request)) }
func (h *returns) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// come lets a request in.
func (s *service) come(flow *flowctl.Flow) {
	now := time.Now()
	begin := s.free[0]
	if begin.Before(now) {
		begin = now
	}
	done := begin.Add(time.Duration(s.random.ExpFloat64() * float64(takes)))
	s.free[0] = done
	heap.Fix(&s.free, 0)
	heap.Push(&s.finishes, request{flow, now, done})
	s.inside.Add(1)
}

// finish waits for the request that is done next, before another comes.
func (s *service) finish(before time.Time) (request, bool) {
	if len(s.finishes) == 0 || !s.finishes[0].done.Before(before) {
		return request{}, false
	}
	r := heap.Pop(&s.finishes).(request)
	<-time.After(time.Until(r.done))
	s.inside.Add(-1)
	return r, true
}

// A phase is a while of so many requests each second.
type phase struct {
	last time.Duration
	rate float64
}

var overload = []phase{{30 * time.Minute, capacity / 2}, {10 * time.Minute, 2 * capacity}, {10 * time.Minute, capacity / 2}}

// An outcome counts requests in each bin of time: those that came, that were admitted, and that were answered in time.
type outcome struct {
	offered, admitted, good []float64
}

const bin = 10 * time.Second

// endure has the service endure the overload behind a guard.
func endure(t *testing.T, open func(s *service) *engine.Engine) (o outcome) {
	synctest.Test(t, func(t *testing.T) {
		s := &service{random: rand.New(rand.NewPCG(1, 2))}
		for range workers {
			s.free = append(s.free, time.Now())
		}
		e := open(s)
		defer e.Close()
		c, err := flowctl.New(e)
		if err != nil {
			t.Fatal(err)
		}
		var last time.Duration
		for _, p := range overload {
			last += p.last
		}
		bins := int(last / bin)
		o = outcome{make([]float64, bins), make([]float64, bins), make([]float64, bins)}
		begin := time.Now()
		count := func(in []float64) {
			if i := int(time.Since(begin) / bin); i < bins {
				in[i]++
			}
		}
		arrivals := rand.New(rand.NewPCG(3, 4))
		until := begin
		for _, p := range overload {
			until = until.Add(p.last)
			for next := time.Now(); ; {
				next = next.Add(time.Duration(arrivals.ExpFloat64() / p.rate * float64(time.Second)))
				if next.After(until) {
					break
				}
				for r, ok := s.finish(next); ok; r, ok = s.finish(next) {
					if r.done.Sub(r.came) <= patience {
						count(o.good)
					}
					end(r.flow)
				}
				<-time.After(time.Until(next))
				count(o.offered)
				if flow := c.Start(t.Context(), "search", flowctl.Params{}); flow.ShouldRun() {
					count(o.admitted)
					s.come(flow)
				} else {
					end(flow)
				}
			}
		}
	})
	return o
}

// rate is how many there were each second from one time to another.
func rate(of []float64, from, to time.Duration) float64 {
	sum := 0.0
	for _, n := range of[from/bin : to/bin] {
		sum += n
	}
	return sum / (to - from).Seconds()
}

// A service that is asked for twice as much as it can do answers almost no request in time, and for long afterwards,
// unless a load scheduler keeps most of them out.
func TestOverload(t *testing.T) {
	opened := func(e *engine.Engine, err error) *engine.Engine {
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	rows := []struct {
		name, color string
		open        func(s *service) *engine.Engine
		least, most float64 // in time, of what the service can do, in percent
		after       float64 // and of what is asked for afterwards, at the least
		outcome
	}{
		{name: "unprotected", color: "#d55e00", most: 5, open: func(*service) *engine.Engine {
			return opened(engine.New(nil))
		}},
		{name: "AIMD on mean latency", color: "#0072b2", least: 45, most: 100, after: 95, open: func(*service) *engine.Engine {
			return opened(engine.Load("testdata/overload.yaml"))
		}},
		{name: "AIMD on requests inside", color: "#009e73", least: 60, most: 100, after: 95, open: func(s *service) *engine.Engine {
			return opened(engine.New([]policy.Policy{{Name: "protect-search", Components: []policy.Component{policy.AIMDLoadScheduler{
				Selectors: policy.At("search"), Signal: policy.Named("inside"), Setpoint: policy.Constant(1.5 * workers), Scheduler: nowOrNever,
			}}}}, engine.WithSignal("inside", func() float64 { return float64(s.inside.Load()) })))
		}},
	}
	from := overload[0].last
	to := from + overload[1].last
	end := to + overload[2].last
	plot := chart{
		title: fmt.Sprintf("A service for %.0f requests/s, asked for %.0f/s during %v minutes: answered within %v", capacity, overload[1].rate, overload[1].last.Minutes(), patience),
		x:     "minutes", y: "requests/s", left: -2, right: (end - from).Minutes(), top: 45,
	}
	minutes := func(of []float64) (xy [][2]float64) {
		for i, n := range of {
			xy = append(xy, [2]float64{(time.Duration(i)*bin + bin/2 - from).Minutes(), n / bin.Seconds()})
		}
		return xy
	}
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\n\tadmitted/s\tin time/s\tof capacity %%\tin time/s afterwards\t\n")
	for i := range rows {
		r := &rows[i]
		r.outcome = endure(t, r.open)
		good, after := rate(r.good, from, to), rate(r.good, to, end)
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.0f\t%.1f\t\n", r.name, rate(r.admitted, from, to), good, 100*good/capacity, after)
		if share := 100 * good / capacity; share < r.least || share > r.most {
			t.Errorf("%s: %.0f %% of what the service can do is in time want %v to %v", r.name, share, r.least, r.most)
		}
		if share := 100 * after / rate(r.offered, to, end); share < r.after {
			t.Errorf("%s: afterwards %.0f %% of the requests are answered in time want %v", r.name, share, r.after)
		}
		if i == 0 {
			plot.add("asked for", "#999999", minutes(r.offered))
		}
		plot.add(r.name, r.color, minutes(r.good))
	}
	_ = w.Flush()
	t.Log(text.String())
	comparePicture(t, "../docs/overload.svg", plot.svg())
}

// comparePicture compares a picture of the documents with what draws it, and writes it anew with -update.
func comparePicture(t *testing.T, name, drawn string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(drawn), 0o644); err != nil {
			t.Error(err)
		}
		return
	}
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "386" {
		return // other processors may fuse a product with a sum, and so round differently
	}
	shown, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if string(shown) != drawn {
		t.Errorf("%s is not what this test draws: go test ./engine -run '^%s$' -update", name, t.Name())
	}
}
