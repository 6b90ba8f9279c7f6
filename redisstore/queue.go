package redisstore

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/deadline"
	"github.com/headgate-go/headgate/internal/shared"
)

//go:embed queue.lua
var queueLua string

// What queue.lua is to do.
const (
	queueDraw   = 1
	queueReturn = 2
)

const (
	mostFlows     = 32 // of a workload that a call lists
	drawnSize     = 8 + 1 + 8 + 8
	grantSize     = 2 + 1 + 8
	workloadBytes = 8 // of the hash by which the server knows a workload: names may be values of labels
)

// A drawing is a call of queue.lua.
type drawing struct {
	*shared.Drawing

	name name
	ids  [][]uint64 // names for the slots of flows, by workload
}

// newDrawing makes up names for slots: the process must know them if the answer is lost.
func newDrawing(d *shared.Drawing, n name) *drawing {
	c := &drawing{Drawing: d, name: n}
	if d.Rule.Kind != shared.Slots {
		return c
	}
	c.ids = make([][]uint64, len(d.Waiting))
	for i, w := range d.Waiting {
		c.ids[i] = make([]uint64, min(len(w.Costs), mostFlows))
		for j := range c.ids[i] {
			c.ids[i][j] = slotName()
		}
	}
	return c
}

// slotName returns a random number that is not 0.
func slotName() uint64 {
	for {
		if n := rand.Uint64(); n != 0 {
			return n
		}
	}
}

// queueKeys returns the keys of a queue's script.
func queueKeys(n name, kind shared.Kind, leases string) []string {
	if kind == shared.Slots {
		return []string{n.all + suffixSlots, n.all + suffixEnds, n.all + suffixQueue, leases}
	}
	return []string{n.all, n.all + suffixQueue}
}

// queueHead returns what calls of queue.lua begin with. Last is the last time that the call counts at; 0 for any.
func queueHead(r *shared.Rule, last float64, channels string, mode byte) []byte {
	e := newEncoder()
	e.rule(r, time.Time{})
	arg := appendFloats(make([]byte, 0, 512), last)
	arg = binary.LittleEndian.AppendUint16(arg, 1)
	arg = append(arg, e.rules...)
	arg = binary.LittleEndian.AppendUint16(arg, uint16(len(channels)))
	arg = append(arg, channels...)
	return append(arg, mode)
}

// encode returns the numbers of the call, by an instance. TTL is how long the instance is believed; 0 for the script's own. Lease is how
// long a holder holds its slots.
func (c *drawing) encode(last float64, channels string, own shared.Holder, ttl time.Duration, lease func(shared.Holder) time.Duration) []byte {
	arg := queueHead(c.Rule, last, channels, queueDraw)
	arg = append(arg, own[:]...)
	arg = appendFloats(arg, float64(ttl.Microseconds()))
	once := byte(0)
	if c.Once {
		once = 1
	}
	arg = append(arg, once)
	arg = appendFloats(arg, c.Owed, math.Round(float64(c.Since)/1000))

	unneeded := 0
	for _, g := range c.Unneeded {
		unneeded += len(g.Tokens)
	}
	arg = binary.LittleEndian.AppendUint16(arg, uint16(unneeded))
	for _, g := range c.Unneeded {
		for i, tokens := range g.Tokens {
			slot := uint64(0)
			if i < len(g.Slots) {
				slot = g.Slots[i]
			}
			arg = binary.LittleEndian.AppendUint64(appendFloats(arg, tokens), slot)
		}
	}

	places, holders := c.holders()
	arg = binary.LittleEndian.AppendUint16(arg, uint16(len(holders)))
	for _, h := range holders {
		is := h
		if is == (shared.Holder{}) {
			is = own
		}
		arg = appendFloats(append(arg, is[:]...), float64(lease(h).Microseconds()))
	}

	arg = binary.LittleEndian.AppendUint16(arg, uint16(len(c.Waiting)))
	for i, w := range c.Waiting {
		arg = appendFloats(arg, w.Weight)
		hash := sha256.Sum256([]byte(w.Workload))
		arg = append(append(arg, workloadBytes), hash[:workloadBytes]...)
		costs := w.Costs[:min(len(w.Costs), mostFlows)]
		arg = append(arg, byte(len(costs)))
		for j, cost := range costs {
			arg = appendFloats(arg, cost)
			if c.ids != nil {
				arg = binary.LittleEndian.AppendUint64(arg, c.ids[i][j])
				arg = binary.LittleEndian.AppendUint16(arg, uint16(places[holderOf(w, j)]))
			}
		}
	}
	return arg
}

// holders returns those of the call's slots, and their places from 1 on.
func (c *drawing) holders() (places map[shared.Holder]int, holders []shared.Holder) {
	if c.ids == nil {
		return nil, nil
	}
	places = make(map[shared.Holder]int)
	for i, w := range c.Waiting {
		for j := range c.ids[i] {
			h := holderOf(w, j)
			if places[h] == 0 {
				holders = append(holders, h)
				places[h] = len(holders)
			}
		}
	}
	return places, holders
}

// holderOf returns the session of a workload's flow; zero for none.
func holderOf(w shared.Waiting, flow int) shared.Holder {
	if w.Holders == nil {
		return shared.Holder{}
	}
	return w.Holders[flow]
}

// decode returns what fell to the caller, and the asks and answers of its slots.
func (c *drawing) decode(reply []byte) (d shared.Drawn, asks []asked, answers []shared.Answer, err error) {
	if len(reply) < drawnSize || (len(reply)-drawnSize)%grantSize != 0 {
		return d, nil, nil, errReply
	}
	flags := reply[8]
	if err := undecided(flags); err != nil {
		return d, nil, nil, err
	}
	grants := make([]shared.Grant, len(c.Waiting))
	for r := reply[drawnSize:]; len(r) > 0; r = r[grantSize:] {
		w, flow := int(binary.LittleEndian.Uint16(r))-1, int(r[2])-1
		if w < 0 || w >= len(c.Waiting) || flow < 0 || flow >= min(len(c.Waiting[w].Costs), mostFlows) {
			return d, nil, nil, errReply
		}
		g := &grants[w]
		g.Workload, g.Tokens = c.Waiting[w].Workload, append(g.Tokens, floatAt(r[3:]))
		if c.ids != nil {
			g.Slots = append(g.Slots, c.ids[w][flow])
			asks, answers = append(asks, c.asked(w, flow)), append(answers, shared.Answer{OK: true, Slot: c.ids[w][flow]})
		}
	}
	d.Differs, d.Left, d.Next = flags&replyDiffers != 0, floatAt(reply[9:]), micros(floatAt(reply[17:]))
	for _, g := range grants {
		if len(g.Tokens) > 0 {
			d.Grants = append(d.Grants, g)
		}
	}
	return d, asks, answers, nil
}

// asked returns a flow's wish for a slot.
func (c *drawing) asked(w, flow int) asked {
	return asked{
		Ask:  shared.Ask{Key: c.Key, Rule: c.Rule, Tokens: c.Waiting[w].Costs[flow], Holder: holderOf(c.Waiting[w], flow)},
		name: c.name, id: c.ids[w][flow], queued: true,
	}
}

// Draw does what [shared.Queues] says. If the answer is lost, so are the tokens that it had. Slots come back.
func (s *Store) Draw(ctx context.Context, d *shared.Drawing) (shared.Drawn, error) {
	n := s.name(d.Key)
	for _, g := range d.Unneeded {
		for _, slot := range g.Slots {
			s.drop(slot)
		}
	}
	c := newDrawing(d, n)
	leases := s.leases(n)
	var drawn shared.Drawn
	err := s.queueCall(ctx, n, d.Rule.Kind, func(last float64, sent time.Time) []byte {
		return c.encode(last, s.wakes(), s.own, 0, func(h shared.Holder) time.Duration { return s.leaseOf(h, sent) })
	}, func(reply []byte, sent time.Time) error {
		got, asks, answers, err := c.decode(reply)
		for i := range asks {
			asks[i].leases = leases
		}
		s.hold(asks, answers, sent)
		drawn = got
		return err
	})
	if mayHaveCounted(err) {
		var lost []asked
		for w := range c.ids {
			for flow := range c.ids[w] {
				lost = append(lost, c.asked(w, flow))
			}
		}
		s.lose(lost, time.Now())
	}
	return drawn, err
}

// queueCall runs queue.lua, within the store's bound. A server that has decided nothing, because the call came too late by its clock, is
// called once more.
func (s *Store) queueCall(ctx context.Context, n name, kind shared.Kind, encode func(last float64, sent time.Time) []byte,
	decode func(reply []byte, sent time.Time) error,
) error {
	sh := s.lanesFor(n).take.shard()
	if sh.gate.Open() {
		return shared.ErrDown
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	keys := queueKeys(n, kind, s.leases(n))
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	script := s.scripts.queue
	if kind == shared.Bucket {
		script = s.scripts.queueTokens
	}
	for again := false; ; again = true {
		sent := time.Now()
		last := 0.0
		if sh.heard.Load() {
			last = float64(s.serverTime(sh, sent).Add(2 * s.timeout).UnixMicro())
		}
		reply, err := s.run(unbounded{bounded}, script, keys, encode(last, sent))
		if ctx.Err() != nil && err != nil {
			return deadline.Errorf("%w: %w", errTimeout, ctx.Err()) // it may have been done, and says nothing about the server
		}
		var undone error
		switch {
		case err != nil:
		case len(reply) < 8:
			err = errReply
		default:
			sh.learn(floatAt(reply), s.micros(sent), s.micros(time.Now()))
			if undone = decode(reply, sent); errors.Is(undone, errReply) {
				err = undone
			}
		}
		if err := s.evidence(sh, err, sent); err != nil {
			return err
		}
		if again || !errors.Is(undone, errLate) {
			return undone
		}
	}
}

// encodeQueued returns the numbers of a call that gives back what flows of a queue have taken. It counts whenever it comes.
func encodeQueued(r *shared.Rule, channels string, returns []returned) []byte {
	arg := queueHead(r, 0, channels, queueReturn)
	arg = binary.LittleEndian.AppendUint16(arg, uint16(len(returns)))
	for i := range returns {
		one := &returns[i]
		unused := byte(0)
		if one.Unused {
			unused = 1
		}
		arg = appendFloats(append(arg, unused), one.Tokens, one.Cost)
		arg = binary.LittleEndian.AppendUint64(arg, one.Slot)
	}
	return arg
}

// decodeQueued fills the results of such a call.
func decodeQueued(reply []byte, results []shared.Result) error {
	if len(reply) != 8+returnedSize*len(results) {
		return errReply
	}
	reply = reply[8:]
	for i := range results {
		if err := undecided(reply[0]); err != nil {
			return err
		}
		results[i] = shared.Result{Returned: reply[0]&replyOK != 0, Forgiven: floatAt(reply[1:]), Held: micros(floatAt(reply[9:]))}
		reply = reply[returnedSize:]
	}
	return nil
}

// returnQueued gives back what flows of one queue have taken, to those that wait there.
func (s *Store) returnQueued(ctx context.Context, rs []returned, results []shared.Result) error {
	n, rule := rs[0].name, rs[0].Rule
	return s.queueCall(ctx, n, rule.Kind, func(float64, time.Time) []byte {
		return encodeQueued(rule, s.wakes(), rs)
	}, func(reply []byte, _ time.Time) error { return decodeQueued(reply, results) })
}

// What wakes instances: a channel for each, and one for all. A message is the name of a ledger.

// wakes is what the channels of instances begin with.
func (s *Store) wakes() string { return "{" + s.namespace + "}#w:" }

// wakeCommand has those called that wait at a key.
func (s *Store) wakeCommand(n name) rueidis.Completed {
	return s.client.B().Publish().Channel(s.wakes()).Message(n.all + suffixQueue).Build()
}

// waiters are the functions that are called when something came back.
type waiters struct {
	mu    sync.Mutex
	of    map[string]map[*waiter]bool // by the name of a ledger
	hears bool                        // a goroutine listens
}

type waiter struct{ f func() }

// resubscribe is how long the store waits before it listens again, after the connection has failed.
const resubscribe = 100 * time.Millisecond

// Wake does what [shared.Queues] says.
func (s *Store) Wake(key shared.Key, f func()) (stop func()) {
	at, w := s.name(key).all+suffixQueue, &waiter{f}
	q := &s.waiters
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.of[at] == nil {
		q.of[at] = make(map[*waiter]bool, 1)
	}
	q.of[at][w] = true
	if !q.hears {
		q.hears = s.start(s.hear)
	}
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if delete(q.of[at], w); len(q.of[at]) == 0 {
			delete(q.of, at)
		}
	}
}

// hear calls functions as messages come, until the store is closed. While it does not listen, messages may be lost, so it calls
// all of them when it listens again.
func (s *Store) hear() {
	own := s.wakes() + rueidis.BinaryString(s.own[:])
	ctx := rueidis.WithOnSubscriptionHook(s.ctx, func(sub rueidis.PubSubSubscription) {
		if strings.HasSuffix(sub.Kind, "subscribe") && sub.Channel == own {
			s.wake("")
		}
	})
	pause := time.NewTimer(0)
	defer pause.Stop()
	for s.ctx.Err() == nil {
		_ = s.client.Receive(ctx, s.client.B().Subscribe().Channel(own, s.wakes()).Build(), func(m rueidis.PubSubMessage) { s.wake(m.Message) })
		pause.Reset(resubscribe)
		select {
		case <-s.ctx.Done():
		case <-pause.C:
		}
	}
}

// wake calls the functions of a ledger; all if it is "".
func (s *Store) wake(at string) {
	q := &s.waiters
	var fs []func()
	q.mu.Lock()
	add := func(all map[*waiter]bool) {
		for w := range all {
			fs = append(fs, w.f)
		}
	}
	if at == "" {
		for _, all := range q.of {
			add(all)
		}
	} else {
		add(q.of[at])
	}
	q.mu.Unlock()
	for _, f := range fs {
		f()
	}
}
