package redisstore

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// A holding is who holds slots, beside which tag. The store's own instance is the zero holder.
type holding struct {
	leases string
	holder shared.Holder
}

// held is how many slots a holding has, as far as this process knows, and until when they are certainly kept.
type held struct {
	count int
	kept  time.Time
}

// A slotHeld is a slot that this process has taken.
type slotHeld struct {
	holding
	until time.Time
}

// hold takes note of slots that were taken by a call that was sent then.
func (s *Store) hold(as []asked, answers []shared.Answer, sent time.Time) {
	for i := range as {
		a := &as[i]
		if a.Rule.Kind != shared.Slots || answers[i].Slot == 0 {
			continue
		}
		of := holding{a.leases, a.Holder}
		s.mu.Lock()
		h := s.held[of]
		if h == nil {
			h = new(held)
			s.held[of] = h
		}
		h.count++
		// The script leaves a lease alone that lasts for two thirds.
		if kept := sent.Add(s.lease * 2 / 3); kept.After(h.kept) {
			h.kept = kept
		}
		s.slots[a.id] = slotHeld{of, sent.Add(a.Rule.MaxInflight)}
		s.mu.Unlock()
	}
}

// drop takes note that a slot is not held any more.
func (s *Store) drop(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(id)
}

func (s *Store) dropLocked(id uint64) {
	one, ok := s.slots[id]
	if !ok {
		return
	}
	delete(s.slots, id)
	if h := s.held[one.holding]; h != nil {
		if h.count--; h.count == 0 {
			delete(s.held, one.holding)
		}
	}
}

// leaseOf returns how long a holder's slots are kept from now on.
func (s *Store) leaseOf(h shared.Holder, now time.Time) time.Duration {
	if h == (shared.Holder{}) {
		return s.lease
	}
	s.mu.Lock()
	until, ok := s.sessions[h]
	s.mu.Unlock()
	if !ok {
		return s.lease
	}
	return max(until.Sub(now), time.Millisecond)
}

// Renew does what [shared.Holders] says.
func (s *Store) Renew(session shared.Holder, lasts time.Duration) {
	s.mu.Lock()
	_, known := s.sessions[session]
	s.sessions[session] = time.Now().Add(max(lasts, 0))
	s.mu.Unlock()
	if !known || lasts < s.lease {
		s.renewSoon.Store(true)
		s.kick()
	}
}

// Kept does what [shared.Holders] says.
func (s *Store) Kept() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	var kept time.Time
	for of, h := range s.held {
		if of.holder == (shared.Holder{}) && (kept.IsZero() || h.kept.Before(kept)) {
			kept = h.kept
		}
	}
	return kept
}

// Instances does what [shared.Holders] says.
func (s *Store) Instances() int { return int(s.instances.Load()) }

// Down does what [shared.Holders] says.
func (s *Store) Down() bool {
	for _, sh := range s.shards() {
		if sh.gate.Open() {
			return true
		}
	}
	return false
}

// A renewal is the leases of one key that are renewed.
type renewal struct {
	key     string
	holders []holding
	arg     []byte
	n       int
}

func (r *renewal) add(h shared.Holder, lasts time.Duration) {
	r.arg = append(r.arg, h[:]...)
	r.arg = appendFloats(r.arg, float64(lasts.Microseconds()))
	r.n++
}

// renew renews the leases of all who hold slots, and of the instance, by one batch.
func (s *Store) renew(ctx context.Context) {
	now := time.Now()
	renewals := s.renewals(now)
	multi := func(byText bool) []rueidis.Completed {
		commands := make([]rueidis.Completed, len(renewals))
		for i, r := range renewals {
			arg := append(binary.LittleEndian.AppendUint16(nil, uint16(r.n)), r.arg...)
			commands[i] = s.scripts.lease.command(s.client, byText, []string{r.key}, arg)
		}
		return commands
	}
	ctx, cancel := context.WithTimeout(ctx, min(s.lease/3, time.Second))
	defer cancel()
	results := s.client.DoMulti(unbounded{ctx}, multi(false)...)
	for _, r := range results {
		if unknownScript(r.Error()) { // to renew twice is harmless
			results = s.client.DoMulti(unbounded{ctx}, multi(true)...)
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, r := range results {
		reply, err := r.AsBytes()
		if err != nil || len(reply) != 16 {
			continue
		}
		if i == 0 {
			s.instances.Store(max(int64(floatAt(reply[8:])), 1))
		}
		for _, of := range renewals[i].holders {
			if h := s.held[of]; h != nil && of.holder == (shared.Holder{}) {
				h.kept = now.Add(s.lease)
			}
		}
	}
}

// maxHolders is how many leases one call of the script renews.
const maxHolders = 1000

// renewals returns what is to be renewed now, the instance first.
func (s *Store) renewals(now time.Time) []*renewal {
	instance := &renewal{key: s.instancesKey()}
	instance.add(s.own, s.lease)
	all := []*renewal{instance}
	byKey := make(map[string]*renewal)
	add := func(of holding, h shared.Holder, lasts time.Duration) {
		r := byKey[of.leases]
		if r == nil || r.n == maxHolders {
			r = &renewal{key: of.leases}
			byKey[of.leases] = r
			all = append(all, r)
		}
		r.holders = append(r.holders, of)
		r.add(h, lasts)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, one := range s.slots {
		if !now.Before(one.until) {
			s.dropLocked(id)
		}
	}
	for of := range s.held {
		if of.holder == (shared.Holder{}) {
			add(of, s.own, s.lease)
		} else if until, ok := s.sessions[of.holder]; ok && s.cluster {
			add(of, of.holder, max(until.Sub(now), 0))
		}
	}
	for session, until := range s.sessions {
		lasts := until.Sub(now)
		if !s.cluster { // another instance may have taken slots for the session
			add(holding{s.leases(name{}), session}, session, max(lasts, 0))
		}
		if lasts <= 0 {
			delete(s.sessions, session)
		}
	}
	return all
}
