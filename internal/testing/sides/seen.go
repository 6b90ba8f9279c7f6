package sides

import (
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
)

// A Check is what an agent was asked.
type Check struct {
	ControlPoint string
	Labels       map[string]string
}

// An End is how a flow that an agent had answered was ended, as the agent learned of it.
type End struct {
	ControlPoint string
	Status       flowctl.Status
}

// Checks are the checks so far, also those that were rejected or failed.
func (s *Side) Checks() []Check {
	if s.Script == nil {
		s.log.mu.Lock()
		defer s.log.mu.Unlock()
		return slices.Clone(s.log.checks)
	}
	var all []Check
	for _, c := range s.Script.Checks() {
		all = append(all, Check{c.Request.GetControlPoint(), maps.Clone(c.Request.GetLabels())})
	}
	return all
}

// Asked is how many checks there were so far.
func (s *Side) Asked() int {
	if s.Script != nil {
		return len(s.Script.Checks())
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return len(s.log.checks)
}

// Ends returns how flows were ended. It closes the client, which then sends what it has not sent yet.
func (s *Side) Ends() []End {
	s.t.Helper()
	if err := s.Client.Close(context.WithoutCancel(s.t.Context())); err != nil {
		s.t.Errorf("Close() = %v", err)
	}
	if s.Script == nil {
		s.log.mu.Lock()
		defer s.log.mu.Unlock()
		return slices.Clone(s.log.ends)
	}
	var all []End
	for _, span := range s.Script.Spans() {
		all = append(all, End{span.Response.GetControlPoint(), span.Status})
	}
	return all
}

// Held is how many slots flows hold.
func (s *Side) Held() int {
	if s.Script != nil {
		return s.Script.Held()
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return s.log.held
}

// Returned returns how many calls have ended flows, and how many slots these gave back. An agent across a connection is
// called only for flows that hold slots.
func (s *Side) Returned() (calls, slots int) {
	if s.Script == nil {
		s.log.mu.Lock()
		defer s.log.mu.Unlock()
		return s.log.calls, s.log.returned
	}
	ended := s.Script.Ends()
	seen := make(map[string]bool)
	for _, end := range ended {
		for _, ref := range end.GetInflightRequests() {
			if seen[ref.GetRequestId()] {
				s.t.Errorf("the slot %s was given back twice", ref.GetRequestId())
			}
			seen[ref.GetRequestId()] = true
		}
	}
	return len(ended), len(seen)
}

// A log is what an engine's side saw, and the answers that come before the engine's.
type log struct {
	mu       sync.Mutex
	answers  []flowtest.Answer
	checks   []Check
	ends     []End
	held     int
	calls    int
	returned int
}

func (l *log) script(answers []flowtest.Answer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers = slices.Clone(answers)
}

// asked notes a check, and gives what becomes of it.
func (l *log) asked(c Check) flowtest.Answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.checks = append(l.checks, c)
	if len(l.answers) == 0 {
		return flowtest.Answer{}
	}
	first := l.answers[0]
	if len(l.answers) > 1 {
		l.answers = l.answers[1:]
	}
	return first
}

func (l *log) took(slots int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held += slots
}

// gave notes a call that ended a flow.
func (l *log) gave(slots int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls++
	l.held -= slots
	l.returned += slots
}

func (l *log) ended(e End) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ends = append(l.ends, e)
}
