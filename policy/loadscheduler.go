package policy

import (
	"github.com/headgate-go/headgate/internal/components"
)

// LoadScheduler lets in a share of the load: tokens come at LoadMultiplier times the rate at which flows have asked for
// them over the last 30 seconds. Flows that find too few tokens wait for them by weighted fair queueing; see
// [Scheduler]. Until it has seen 30 seconds of load, and after as long a silence, it accepts every flow, including
// those that wait.
type LoadScheduler struct {
	// ID names the component within its policy. Default: "load_scheduler.<index>", its place
	// among the policy's LoadSchedulers.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// LoadMultiplier is the share, read every 10 seconds. Below 0 counts as 0, which lets nothing in. While it is not a
	// number, every flow is accepted. Required.
	LoadMultiplier Signal

	// WorkloadLatencyTokens makes a flow cost its workload's mean latency of the last 30 minutes, in milliseconds, once
	// there is one. It does not apply if a label says the cost, or the workload has NoTokens.
	WorkloadLatencyTokens bool

	// Scheduler says which flow goes first. The zero value serves all flows alike.
	Scheduler Scheduler

	// DryRun decides and counts, but drops no flow, and no flow waits: one that would have to wait counts as dropped.
	// See [RateLimiter].
	DryRun bool
}

func (LoadScheduler) kind() index  { return loadScheduler }
func (s LoadScheduler) id() string { return s.ID }
func (LoadScheduler) sheds()       {}

func (s LoadScheduler) reads(read func(components.Role, string)) {
	loadReads(s.Selectors, &s.Scheduler, s.WorkloadLatencyTokens, read)
	signalReads(s.LoadMultiplier, read)
}

func (s LoadScheduler) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), s.Selectors)
	checkSignal(wrong.sub(".LoadMultiplier"), s.LoadMultiplier)
	s.Scheduler.check(wrong.sub(".Scheduler"))
}

func (d *decoder) loadScheduler(c component) Component {
	s := d.load(c.get("parameters"))
	s.ID = c.id
	s.LoadMultiplier = d.signal(d.fill(c.ports, "LoadMultiplier", "load_multiplier"))
	s.DryRun = d.dryRun(c)
	return s
}

// load reads the parameters of a load scheduler.
func (d *decoder) load(v value) LoadScheduler {
	f := d.fields(v, "selectors scheduler workload_latency_based_tokens", "")
	return LoadScheduler{
		Selectors:             d.selectors(d.fill(f, "Selectors", "selectors")),
		WorkloadLatencyTokens: d.boolean(f.get("workload_latency_based_tokens"), false),
		Scheduler:             d.scheduler(f),
	}
}

// loadReads calls read with the labels that a load scheduler reads, except those of its signals.
func loadReads(selectors []Selector, s *Scheduler, byLatency bool, read func(components.Role, string)) {
	selectorsRead(selectors, components.SelectsBy, read)
	workloads := components.SchedulesBy
	if byLatency {
		workloads = components.MeasuresBy
		selectorsRead(selectors, components.MeasuresBy, read)
	}
	s.reads(workloads, read)
}
