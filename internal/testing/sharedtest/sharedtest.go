// Package sharedtest is a store in memory that several engines of one test share. It decides as engines do, by the time of the
// test's bubble, and misbehaves on demand:
//
//	server := sharedtest.New()
//	a, b := server.Instance(), server.Instance() // of two engines
//	b.Behave(sharedtest.Behavior{Err: shared.ErrDown})
//
// It has no goroutines.
package sharedtest

import (
	"context"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
	"github.com/headgate-go/headgate/internal/testing/ledger"
)

// Lease is how long slots of an instance outlive its last renewal, and CountOn is how long the instance counts on them.
const (
	Lease   = 10 * time.Second
	CountOn = Lease * 2 / 3
)

// Bound is how long an instance waits for an answer.
const Bound = 50 * time.Millisecond

// A Server has the state that instances share. It is safe for concurrent use.
type Server struct {
	epoch time.Time

	mu        sync.Mutex
	queues    map[shared.Key]*queue
	states    map[shared.Key]*state
	values    map[shared.CacheKey]cached
	ramps     map[shared.Key]*ramp
	sessions  map[shared.Holder]session
	instances []*Store
}

// New returns a server without any state.
func New() *Server {
	s := &Server{epoch: time.Now(), queues: make(map[shared.Key]*queue)}
	s.forget()
	return s
}

func (s *Server) forget() {
	s.states = make(map[shared.Key]*state)
	s.values = make(map[shared.CacheKey]cached)
	s.ramps = make(map[shared.Key]*ramp)
	s.sessions = make(map[shared.Holder]session)
	for _, q := range s.queues {
		q.Ledger = ledger.Ledger{}
	}
}

// Forget loses all that the server keeps, as a restart without a file does.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget()
}

// Instance returns another instance that uses the server.
func (s *Server) Instance() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := &Store{server: s, id: strconv.Itoa(len(s.instances)), renewed: make(map[shared.Holder]renewal)}
	s.instances = append(s.instances, one)
	return one
}

// A session is a client's: until when it lives, and since when. Slots of before are lost.
type session struct{ since, until time.Time }

// A renewal is what an instance last wrote of a session: when, and until when the instance knows its slots to be kept.
type renewal struct{ at, kept time.Time }

// Behavior is how an instance's calls go. The zero value is well.
type Behavior struct {
	// Late is how long each answer takes. The server has decided by then. After Bound, or when the context ends, the call fails.
	Late time.Duration

	// Err is what calls fail with, and the server does not learn of them. An instance is down while this is shared.ErrDown.
	Err error

	// Lost is what calls fail with after the server has done what they ask.
	Lost error

	// Cut has the instance's lease run out, and those of the sessions there.
	Cut bool

	// Failures is how many calls of the instance's own have failed.
	Failures uint64
}

// Counted is how often an instance was called.
type Counted struct{ Take, Draw, Return, Look, Reset, Get, Set, Delete, Move int }

// A Store is one instance. It is safe for concurrent use.
type Store struct {
	server *Server
	id     string

	// All are guarded by the server's lock.
	is      Behavior
	counted Counted
	asks    []shared.Ask
	cutAt   time.Time // since when its lease is not renewed; zero while it is
	renewed map[shared.Holder]renewal
}

var _ shared.Store = (*Store)(nil)

// Behave has the instance behave so from now on.
func (s *Store) Behave(is Behavior) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.is = is
	switch {
	case !is.Cut:
		s.cutAt = time.Time{}
	case s.cutAt.IsZero():
		s.cutAt = time.Now()
	}
}

// Counted returns how often the instance was called.
func (s *Store) Counted() Counted {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return s.counted
}

// Asked returns what was asked by Take since the last call of Asked, in its order.
func (s *Store) Asked() []shared.Ask {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	asks := s.asks
	s.asks = nil
	return asks
}

// call runs do with the server locked, as the instance behaves. What do writes to its caller is written before the answer is late.
func (s *Store) call(ctx context.Context, count *int, do func(now time.Time) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.server.mu.Lock()
	*count++
	is := s.is
	if is.Err != nil {
		s.server.mu.Unlock()
		return is.Err
	}
	err := do(time.Now())
	s.server.mu.Unlock()
	if is.Late > 0 {
		wait := time.NewTimer(min(is.Late, Bound))
		defer wait.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-wait.C:
		}
		if is.Late > Bound {
			return context.DeadlineExceeded
		}
	}
	if is.Lost != nil {
		return is.Lost
	}
	return err
}

// Take does what shared.Limits says.
func (s *Store) Take(ctx context.Context, asks []shared.Ask, answers []shared.Answer) error {
	decided := make([]shared.Answer, len(asks)) // so that a late caller does not see what it was not told
	err := s.call(ctx, &s.counted.Take, func(now time.Time) error {
		s.asks = append(s.asks, asks...)
		s.take(now, asks, decided)
		return nil
	})
	if err == nil {
		copy(answers, decided)
	}
	return err
}

func (s *Store) take(now time.Time, asks []shared.Ask, answers []shared.Answer) {
	refused := 0
	for i := range asks {
		ask := &asks[i]
		st := s.server.state(now, ask.Key, ask.Rule)
		answers[i] = shared.Answer{Differs: st.follow(now, ask.Rule, ask.Since)}
		st.owe(now, ask.Owed)
		answers[i].OK, answers[i].Wait = st.room(now, ask.Tokens)
		if !answers[i].OK && !ask.Dry {
			refused++
		}
	}
	for i := range asks {
		ask := &asks[i]
		st := s.server.state(now, ask.Key, ask.Rule)
		taken := refused == 0 && answers[i].OK
		if taken {
			answers[i].OK, answers[i].Wait = st.room(now, ask.Tokens) // another ask may have the same key
			if answers[i].OK {
				answers[i].Slot = st.take(now, ask.Tokens, owner{s, ask.Holder})
			}
		}
		if ask.Rule.Kind == shared.Bucket && (taken || !answers[i].OK && refused <= 1) {
			answers[i].Drawn, answers[i].After = st.draw(now, ask, taken, len(s.server.instances))
		}
		answers[i].Left = st.left(ask.Rule)
	}
}

// Return does what shared.Limits says. A call that fails returns slots nevertheless, unless the instance is down: a store repeats it
// later.
func (s *Store) Return(ctx context.Context, returns []shared.Return, results []shared.Result) error {
	done := make([]shared.Result, len(returns))
	var wake []func()
	err := s.call(ctx, &s.counted.Return, func(now time.Time) error {
		for i, r := range returns {
			st := s.server.state(now, r.Key, r.Rule)
			st.renew(now)
			done[i] = st.giveBack(now, r)
			if r.Queued {
				wake = append(wake, s.server.serve(now, r.Key, r.Rule)...)
			}
		}
		return nil
	})
	callAll(wake)
	if err == nil {
		copy(results, done)
	}
	return err
}

// Look does what shared.Limits says.
func (s *Store) Look(ctx context.Context, key shared.Key, rule *shared.Rule) (u shared.Usage, err error) {
	err = s.call(ctx, &s.counted.Look, func(now time.Time) error {
		st := s.server.states[key]
		if st == nil || st.rule.Kind != rule.Kind {
			u = shared.Usage{Remaining: rule.Capacity}
			return nil
		}
		seen := *st // what looks changes nothing
		seen.follow(now, rule, 0)
		u = shared.Usage{Remaining: seen.left(rule), InFlight: len(seen.slots)}
		return nil
	})
	if err != nil {
		return shared.Usage{}, err
	}
	return u, nil
}

// Reset does what shared.Limits says.
func (s *Store) Reset(ctx context.Context, key shared.Key) error {
	var wake []func()
	err := s.call(ctx, &s.counted.Reset, func(time.Time) error {
		delete(s.server.states, key)
		if q := s.server.queues[key]; q != nil {
			q.Ledger = ledger.Ledger{}
			for w := range q.wakes {
				wake = append(wake, w.f)
			}
		}
		return nil
	})
	callAll(wake)
	return err
}

// Renew does what shared.Holders says. It writes until when a session lasts if the session is new to the instance, and again after a
// third of that time. In between, the server keeps the session for as long as was written.
func (s *Store) Renew(of shared.Holder, lasts time.Duration) (kept time.Time) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	now, last := time.Now(), s.renewed[of]
	if s.is.Err != nil || s.is.Cut || lasts > 0 && now.Before(last.at.Add(lasts/3)) {
		return last.kept
	}
	one := s.server.sessions[of]
	if !one.until.After(now) {
		one.since = now
	}
	lease := lasts + lasts/3
	if end := now.Add(lease); end.After(one.until) {
		one.until = end
	}
	s.server.sessions[of] = one
	s.renewed[of] = renewal{now, now.Add(lease - lease/12)}
	return last.kept // as the next call says
}

// Failures does what shared.Holders says.
func (s *Store) Failures() uint64 {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return s.is.Failures
}

// Kept does what shared.Holders says. A lease is renewed all the time while the instance is not cut off.
func (s *Store) Kept() time.Time {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	held := false
	for _, st := range s.server.states {
		for _, one := range st.slots {
			held = held || one.by == owner{store: s}
		}
	}
	switch {
	case !s.cutAt.IsZero():
		return s.cutAt.Add(CountOn)
	case held:
		return time.Now().Add(CountOn)
	default:
		return time.Time{}
	}
}

// Instances returns how many there are.
func (s *Store) Instances() int {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return len(s.server.instances)
}

// Down reports whether the instance fails at once.
func (s *Store) Down() bool {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return s.is.Err == shared.ErrDown //nolint:errorlint // a test sets it as it is
}

// name returns a random number that is not 0.
func name() uint64 {
	for {
		if n := rand.Uint64(); n != 0 {
			return n
		}
	}
}
