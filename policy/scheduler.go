package policy

import (
	"strconv"
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// Scheduler says which of the flows that wait for tokens goes first: the one with the smallest virtual finish time by
// self-clocked fair queueing (Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994).
// Workloads share the tokens in proportion to their priorities, and within a workload the values of a fairness label
// share alike. The zero value serves flows in the order in which they come.
type Scheduler struct {
	// Workloads are tried in order: a flow belongs to the first that matches its labels, and to Default when none does.
	Workloads []Workload

	// Default is for flows that no workload matches.
	Default WorkloadParameters

	// Margin is how long before its deadline a flow gives up waiting, so that the answer arrives. Zero means
	// DefaultMargin. Not negative.
	Margin time.Duration

	// TokensLabel, PriorityLabel and WorkloadLabel are labels that override the workload's Tokens, Priority and Name. A value
	// that is no decimal number, a negative number of tokens, and a priority that is not above 0 are ignored. Accept these labels
	// only from callers that you trust: a flow takes the tokens that it asks for, and a load scheduler counts them as load.
	// Flow.Settle of package flowctl sets the real cost of a flow. That cost corrects the bucket of a quota scheduler, and the
	// queue prices later flows of the workload by it. It changes neither slots nor the share that a load scheduler lets in.
	TokensLabel, PriorityLabel, WorkloadLabel string

	// FairnessLabel is the label whose values get equal shares of a workload's tokens. Empty: first come, first served.
	FairnessLabel string

	// MaxQueue is how many flows may wait at once, for all values of the component's label together, because callers may make up
	// values. If there is no room, the newest flow of the largest share is rejected. The share is found in three steps: the value
	// of the component's label with the most waiting flows, the largest workload in it, and the largest fairness value in that.
	// Zero means DefaultMaxQueue. Not negative, and at most 2,147,483,647. Aperture's files have no key for it.
	MaxQueue int

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 503.
	DeniedStatus int
}

// Defaults of a Scheduler.
const (
	// DefaultMargin is the margin when Margin is zero.
	DefaultMargin = 10 * time.Millisecond
	// DefaultMaxQueue is the bound when MaxQueue is zero.
	DefaultMaxQueue = 10_000
)

// A Workload is a class of flows with a share of its own.
type Workload struct {
	// Name identifies the workload in decisions and metrics. Default: its index. Unique within the scheduler, and
	// neither "default" nor another workload's index.
	Name string

	// Labels say which flows belong to it. The zero value matches all.
	Labels LabelMatcher

	WorkloadParameters
}

// WorkloadParameters say how the flows of a workload wait.
type WorkloadParameters struct {
	// Priority is the workload's weight among the workloads that wait. Zero means 1. Not negative.
	Priority float64

	// Tokens is what a flow costs. Zero means 1; NoTokens (or any negative value) lets flows in for free, and at once.
	Tokens float64

	// QueueTimeout is the longest that a flow waits. Zero leaves it to the flow's own deadline; NoQueue (or any
	// negative value) does not let it wait at all.
	QueueTimeout time.Duration
}

// Values of WorkloadParameters.
const (
	// NoQueue as a QueueTimeout accepts a flow at once or not at all.
	NoQueue time.Duration = -1
	// NoTokens as a workload's Tokens means that its flows cost nothing, unless a label sets their cost.
	NoTokens float64 = -1
)

func (s Scheduler) check(wrong report) {
	names := map[string]int{}
	for i, w := range s.Workloads {
		wrong := wrong.at(".Workloads", i)
		w.Labels.check(wrong.sub(".Labels"))
		w.WorkloadParameters.check(wrong)
		if w.Name == "" {
			continue
		}
		first, taken := names[w.Name]
		index, err := strconv.Atoi(w.Name)
		switch {
		case w.Name == "default":
			wrong(".Name", `"default" is what flows without a workload have`)
		case taken:
			wrong(".Name", "%s is the name of workload %d too", quote(w.Name), first)
		case err == nil && strconv.Itoa(index) == w.Name && 0 <= index && index < len(s.Workloads) && index != i:
			wrong(".Name", "%s is the index of another workload", quote(w.Name))
		default:
			names[w.Name] = i
		}
	}
	s.Default.check(wrong.sub(".Default"))
	checkNotNegative(wrong.sub(".Margin"), s.Margin)
	checkName(wrong.sub(".TokensLabel"), s.TokensLabel)
	checkName(wrong.sub(".PriorityLabel"), s.PriorityLabel)
	checkName(wrong.sub(".WorkloadLabel"), s.WorkloadLabel)
	checkName(wrong.sub(".FairnessLabel"), s.FairnessLabel)
	checkCount(wrong.sub(".MaxQueue"), s.MaxQueue)
	checkStatus(wrong.sub(".DeniedStatus"), s.DeniedStatus)
}

func (p WorkloadParameters) check(wrong report) {
	checkAmount(wrong.sub(".Priority"), p.Priority)
	checkNumber(wrong.sub(".Tokens"), p.Tokens)
}

// scheduler reads the key of that name.
func (d *decoder) scheduler(of value) Scheduler {
	f := d.fields(d.fill(of, "Scheduler", "scheduler"), "workloads default_workload_parameters decision_deadline_margin "+
		"tokens_label_key priority_label_key workload_label_key fairness_label_key denied_response_status_code", "")
	s := Scheduler{
		Default:       d.workloadParameters(d.fill(f, "Default", "default_workload_parameters")),
		Margin:        d.optional(d.fill(f, "Margin", "decision_deadline_margin"), time.Nanosecond), // practically none
		TokensLabel:   d.text(d.fill(f, "TokensLabel", "tokens_label_key")),
		PriorityLabel: d.text(d.fill(f, "PriorityLabel", "priority_label_key")),
		WorkloadLabel: d.text(d.fill(f, "WorkloadLabel", "workload_label_key")),
		FairnessLabel: d.text(d.fill(f, "FairnessLabel", "fairness_label_key")),
		DeniedStatus:  d.status(d.fill(f, "DeniedStatus", "denied_response_status_code")),
	}
	for _, item := range d.items(d.fill(f, "Workloads", "workloads")) {
		w := d.fields(item, "name label_matcher parameters", "")
		s.Workloads = append(s.Workloads, Workload{
			Name:               d.text(d.fill(w, "Name", "name")),
			Labels:             d.labelMatcher(d.need(d.fill(w, "Labels", "label_matcher"))),
			WorkloadParameters: d.workloadParameters(w.get("parameters")),
		})
	}
	return s
}

func (d *decoder) workloadParameters(v value) WorkloadParameters {
	f := d.fields(v, "priority tokens queue_timeout", "")
	p := WorkloadParameters{
		Priority:     d.positive(d.fill(f, "Priority", "priority")),
		QueueTimeout: d.optional(f.get("queue_timeout"), NoQueue),
	}
	if tokens := d.fill(f, "Tokens", "tokens"); tokens.node != nil {
		if p.Tokens = d.number(tokens); p.Tokens == 0 {
			p.Tokens = NoTokens
		} else if p.Tokens < 0 {
			d.errorf(tokens, "must be a number from 0 up, is %v", p.Tokens)
		}
	}
	return p
}

// reads calls read with the labels that the scheduler reads. Workloads is a further role of its workloads' labels.
func (s *Scheduler) reads(workloads components.Role, read func(components.Role, string)) {
	read(components.CostsBy, s.TokensLabel)
	for _, key := range []string{s.PriorityLabel, s.WorkloadLabel, s.FairnessLabel} {
		read(components.SchedulesBy, key)
	}
	for _, w := range s.Workloads {
		w.Labels.reads(components.SchedulesBy, read)
		w.Labels.reads(workloads, read)
	}
}
