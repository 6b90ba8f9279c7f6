package sharedtest

import (
	"context"
	"strconv"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/ledger"
)

// A queue is what is known of the flows that wait at a key.
type queue struct {
	ledger.Ledger

	wakes map[*waker]bool
}

// A waker is a function of an instance that is called when something came back.
type waker struct {
	of *Store
	f  func()
}

// queue returns that of the key.
func (s *Server) queue(key shared.Key) *queue {
	q := s.queues[key]
	if q == nil {
		q = &queue{wakes: make(map[*waker]bool)}
		s.queues[key] = q
	}
	return q
}

// woken returns the functions of the instances that the ledger wakes. They are called without the server's lock.
func (s *Server) woken(q *queue) (fs []func()) {
	for _, id := range q.Woken() {
		i, _ := strconv.Atoi(id)
		for w := range q.wakes {
			if w.of == s.instances[i] && w.of.is.Err == nil {
				fs = append(fs, w.f)
			}
		}
	}
	return fs
}

func callAll(fs []func()) {
	for _, f := range fs {
		f()
	}
}

// Draw does what shared.Queues says. What an answer has that the caller does not get, is lost, except slots.
func (s *Store) Draw(ctx context.Context, d *shared.Drawing) (shared.Drawn, error) {
	var drawn shared.Drawn
	var wake []func()
	err := s.call(ctx, &s.counted.Draw, func(now time.Time) error {
		drawn, wake = s.draw(now, d)
		return nil
	})
	callAll(wake)
	if err == nil {
		return drawn, nil
	}
	if d.Rule.Kind == shared.Slots {
		s.server.mu.Lock()
		for _, g := range drawn.Grants {
			for _, slot := range g.Slots {
				s.server.state(time.Now(), d.Key, d.Rule).giveBack(time.Now(), shared.Return{Slot: slot})
			}
		}
		wake = s.server.serve(time.Now(), d.Key, d.Rule)
		s.server.mu.Unlock()
		callAll(wake)
	}
	return shared.Drawn{}, err
}

func (s *Store) draw(now time.Time, d *shared.Drawing) (drawn shared.Drawn, wake []func()) {
	st, q := s.server.state(now, d.Key, d.Rule), s.server.queue(d.Key)
	drawn.Differs = st.follow(now, d.Rule, d.Since)
	st.owe(now, d.Owed)
	for _, g := range d.Unneeded {
		for i, tokens := range g.Tokens {
			back := shared.Return{Tokens: tokens, Unused: true}
			if i < len(g.Slots) {
				back.Slot = g.Slots[i]
			}
			st.giveBack(now, back)
		}
	}
	t := st.tokensFor(q, now)
	drawn.Grants, drawn.Next = q.Draw(s.server.at(now), s.id, d.Waiting, d.Once, t)
	for i, g := range drawn.Grants {
		if d.Rule.Kind != shared.Slots {
			break
		}
		w, flow := waitingOf(d, g.Workload), 0
		for _, tokens := range g.Tokens {
			by := owner{store: s}
			if w.Holders != nil && w.Holders[flow] != (shared.Holder{}) {
				by = owner{holder: w.Holders[flow]}
			}
			flow++
			slot := slot{name(), tokens, now, by}
			st.slots = append(st.slots, slot)
			drawn.Grants[i].Slots = append(drawn.Grants[i].Slots, slot.name)
		}
	}
	if drawn.Left = st.tokens; d.Rule.Kind == shared.Slots {
		drawn.Left = d.Rule.Capacity - t.held
	}
	return drawn, s.server.woken(q)
}

func waitingOf(d *shared.Drawing, workload string) *shared.Waiting {
	for i := range d.Waiting {
		if d.Waiting[i].Workload == workload {
			return &d.Waiting[i]
		}
	}
	return nil
}

// serve hands out what came back to a key at which flows may wait.
func (s *Server) serve(now time.Time, key shared.Key, rule *shared.Rule) (wake []func()) {
	q, st := s.queue(key), s.state(now, key, rule)
	st.renew(now)
	q.Serve(s.at(now), st.tokensFor(q, now))
	return s.woken(q)
}

// at returns a time as ledgers count it.
func (s *Server) at(now time.Time) time.Duration { return now.Sub(s.epoch) }

// Wake does what shared.Queues says.
func (s *Store) Wake(key shared.Key, f func()) (stop func()) {
	w := &waker{s, f}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.server.queue(key).wakes[w] = true
	return func() {
		s.server.mu.Lock()
		defer s.server.mu.Unlock()
		delete(s.server.queue(key).wakes, w)
	}
}

// tokens are what a ledger hands out of a state.
type tokens struct {
	*state

	now  time.Time
	held float64 // of slots, those in boxes included
}

func (st *state) tokensFor(q *queue, now time.Time) *tokens {
	return &tokens{st, now, st.used() + q.Boxed()}
}

func (t *tokens) Take(cost float64) bool {
	if t.rule.Kind == shared.Slots {
		if t.rule.Capacity-t.held > slack || t.held <= slack && t.rule.Capacity > 0 {
			t.held += cost
			return true
		}
		return false
	}
	ok, _ := t.room(t.now, cost)
	if ok {
		t.take(t.now, cost, owner{})
	}
	return ok
}

func (t *tokens) Never(cost float64) bool {
	return t.rule.Capacity <= 0 || t.rule.Kind == shared.Bucket && cost > t.rule.Capacity+slack
}

func (t *tokens) Return(tokens float64) {
	if t.rule.Kind == shared.Slots {
		t.held -= tokens
		return
	}
	t.state.tokens = min(t.state.tokens+tokens, t.rule.Capacity)
}

func (t *tokens) Until(tokens float64) time.Duration {
	switch {
	case t.rule.Kind == shared.Slots:
		return 0
	case t.rule.Fill <= 0:
		return -1
	}
	return t.until(t.now, tokens)
}
