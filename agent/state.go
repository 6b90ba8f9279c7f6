package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/statefile"
)

// copyEvery is how often the state is copied to its file.
const copyEvery = 10 * time.Second

// logEvery is how often a copy that fails is logged at most.
const logEvery = time.Minute

// A ServiceOption changes what [New] makes. If an option is given twice, the last one counts.
type ServiceOption func(*serviceOptions)

type serviceOptions struct {
	state   string
	kept    bool // WithState was given
	holdOff time.Duration
}

// WithState makes the agent keep the state of its limits in a file, over a restart: buckets that are not full, calendar quotas,
// slots of flows in flight, circuit breakers, and the positions of load ramps. New reads the file, if there is one. The agent
// copies its state to the file every 10 s, and [Service.Close] writes it for the last time. By default it remembers nothing.
//
// A component finds its state by the names of its policy and itself. The numbers are those of the policies in force. A state is
// dropped if the component now has another kind, label, calendar or way to fill. The state of a value is also dropped if there is
// no room for it, see engine.WithKeyCap. The engine logs dropped states, [Service.State] counts them, and [Service.Warnings]
// lists them.
//
// The time between writing and reading counts, by the wall clock: buckets fill, and slots run out. If the clock was set back
// meanwhile, no time has passed.
//
// If the file cannot be read, the agent starts all the same. Then its limits begin anew, and the engine logs why. If a program
// should not start then, let it check State.Unread.
//
// The folder must exist. The file has values of labels, and only its owner can read it. It has at most 256 MiB; what does not fit
// is left out, slots last. Two agents must not share a file.
func WithState(file string) ServiceOption {
	return func(o *serviceOptions) { o.state, o.kept = file, true }
}

// WithHoldOff makes concurrency limiters and concurrency schedulers admit no flow for the time d after New. This does not apply
// if the agent starts from the state of an agent that was closed in good order; see [WithState] and [Service.Close]. So flows
// that an agent admitted before it was killed can end before other flows take their slots. Meanwhile flows are rejected, with the
// rest of d as RetryAfter. Flows that may wait in the queue of a scheduler can wait until d has passed. Other limits hold as
// usual. The default is 0, which means no hold-off.
func WithHoldOff(d time.Duration) ServiceOption {
	return func(o *serviceOptions) { o.holdOff = d }
}

// A State says what an agent remembers: see [WithState].
type State struct {
	// Written is when the file that New has read was written; zero if it has read none.
	Written time.Time

	// Drained means that the agent that wrote it was closed in good order.
	Drained bool

	// Keys is how many values of labels had a state in the file that counts now. Components without a label count as one.
	// Slots is how many slots of flows in flight are among them.
	Keys, Slots int

	// Dropped is how many states of the file count no more.
	Dropped int

	// HeldOff is how many flows were rejected because of [WithHoldOff].
	HeldOff uint64

	// Copies is how often the state has been written, and Omitted is how many states had no room in the file then.
	Copies  uint64
	Omitted int

	// Unread is why the file could not be read, and Uncopied why the latest copy could not be written; nil if there is no such
	// problem. They name the file.
	Unread, Uncopied error
}

// A memory is what an agent remembers in a file. Its zero value remembers nothing.
type memory struct {
	engine agentapi.Local
	file   string // "" for none
	agent  uint64 // the number of the agent in its clients' sessions

	writing sync.Mutex // one copy at a time; guards logged
	logged  time.Time  // when a problem of a copy was logged

	mu    sync.Mutex // guards state
	state State

	once    sync.Once
	stop    chan struct{} // closed by close; nil for no goroutine
	running sync.WaitGroup
}

// check reports options that make no sense.
func (o *serviceOptions) check() error {
	var errs []error
	if o.holdOff < 0 {
		errs = append(errs, fmt.Errorf("WithHoldOff(%v): negative", o.holdOff))
	}
	if o.kept {
		if o.state == "" {
			errs = append(errs, errors.New("WithState: no file"))
		} else if folder, err := os.Stat(filepath.Dir(o.state)); err != nil {
			errs = append(errs, fmt.Errorf("WithState: %w", err))
		} else if !folder.IsDir() {
			errs = append(errs, fmt.Errorf("WithState: %s is no folder", filepath.Dir(o.state)))
		} else if of, err := os.Stat(o.state); err == nil && !of.Mode().IsRegular() {
			errs = append(errs, fmt.Errorf("WithState: %s is no file", o.state))
		}
	}
	return errors.Join(errs...)
}

// start reads the file and begins to copy to it.
func (m *memory) start(e agentapi.Local, o serviceOptions) {
	m.engine, m.file = e, o.state
	if m.file != "" {
		m.read()
	}
	if !m.state.Drained && o.holdOff > 0 {
		e.HoldOff(o.holdOff)
		e.Logger().Info("headgate: concurrency limits admit no flows until those of before must have ended", "time", o.holdOff)
	}
	if m.file == "" {
		return
	}
	// At once, because the file must not be taken for that of an agent that was closed in good order if this one is killed.
	_ = m.write(false) // it logs
	m.stop = make(chan struct{})
	m.running.Go(m.keep)
}

// keep copies the state until the memory or the engine is closed.
func (m *memory) keep() {
	tick := time.NewTicker(copyEvery)
	defer tick.Stop()
	for {
		select {
		case <-m.stop:
			return
		case <-m.engine.Closed():
			return
		case <-tick.C:
			_ = m.write(false) // it logs
		}
	}
}

// close writes the state for the last time.
func (m *memory) close(drained bool) (err error) {
	m.once.Do(func() {
		if m.stop != nil {
			close(m.stop)
			m.running.Wait()
			err = m.write(drained)
		}
	})
	return err
}

// read takes what is in the file.
func (m *memory) read() {
	log := m.engine.Logger()
	f, err := statefile.Load(m.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		log.Info("headgate: there is no state file yet: limits start afresh", "file", m.file)
		return
	case err != nil:
		m.state.Unread = fmt.Errorf("headgate: agent: the state was not read: %w", err)
		log.Error("headgate: the state file cannot be read: limits start afresh", "error", err)
		return
	}
	n := m.engine.ReadState(f)
	if f.Drained && f.Agent != 0 { // so that clients know their slots again
		m.agent = f.Agent
	}
	m.state = State{Written: f.Written, Drained: f.Drained, Keys: n.Keys, Slots: n.Slots, Dropped: n.Dropped}
	log.Info("headgate: limits go on from the state file", "file", m.file, "written", f.Written, "drained", f.Drained,
		"states", n.Keys, "slots", n.Slots, "dropped", n.Dropped)
}

// write copies the state to the file. It logs what goes wrong, once in a while.
func (m *memory) write(drained bool) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	var n agentapi.StateCount
	err := statefile.Save(m.file, func(to io.Writer) (err error) {
		h := statefile.Header{Drained: drained}
		if drained { // after a kill, slots of flows in flight may be lost, so that clients must not find the same agent
			h.Agent = m.agent
		}
		n, err = m.engine.WriteState(to, h, statefile.MaxSize)
		return err
	})
	if err != nil {
		err = fmt.Errorf("headgate: agent: the state was not written: %w", err)
	}
	if now := time.Now(); (err != nil || n.Dropped > 0) && now.Sub(m.logged) >= logEvery {
		m.logged = now
		if err != nil {
			m.engine.Logger().Error("headgate: the state file cannot be written: a restart would forget what limits hold", "error", err)
		} else {
			m.engine.Logger().Warn("headgate: the state file is full: a restart would forget some keys", "file", m.file, "states", n.Dropped)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Uncopied = err
	if err == nil {
		m.state.Copies++
		m.state.Omitted = n.Dropped
	}
	return err
}

// now returns what the agent remembers.
func (m *memory) now() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.state
	s.HeldOff = m.engine.HeldOff()
	return s
}

// warnings lists what a restart has lost, or would lose.
func (m *memory) warnings() (all []string) {
	s := m.now()
	for _, err := range []error{s.Unread, s.Uncopied} {
		if err != nil {
			all = append(all, err.Error())
		}
	}
	if s.Dropped > 0 {
		all = append(all, fmt.Sprintf("state file %s: %d states are dropped, and count no more", m.file, s.Dropped))
	}
	if s.Omitted > 0 {
		all = append(all, fmt.Sprintf("state file %s: %d states have no room in it", m.file, s.Omitted))
	}
	return all
}
