package redisstore

import (
	"cmp"
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/gate"
	"github.com/headgate-go/headgate/internal/shared"
)

const (
	// maxBatch is how many flows one script decides about, or how many returns it does. The server does nothing else meanwhile: for
	// about 200 µs.
	maxBatch = 128

	// maxKeys is how many keys the flows of a batch have together, about.
	maxKeys = 512

	// maxOnWire is how many batches of a lane are on the wire at most. Another one than the first begins when it has minBatch calls: the
	// server decides about one batch while this process makes the next. With 64 calls in flight that took 5.5 µs a call, and 9.3 µs with
	// one batch at a time, where both had a processor of their own. The server's time for a call was the same.
	maxOnWire = 4
	minBatch  = 16

	// maxOwnBound is the longest bound of a store whose callers send calls themselves although their contexts may be canceled: until
	// the bound such a call does not notice that.
	maxOwnBound = 100 * time.Millisecond
)

// A shard is a server that has a part of the keys.
type shard struct {
	address string // in a cluster
	gate    *gate.Gate

	offset atomic.Int64 // the server's clock less this process's, in microseconds
	heard  atomic.Bool  // the offset is known

	renewing  turn        // of renewing leases there
	unrenewed atomic.Bool // some have yet to be renewed, because that has failed
	renewed   time.Time   // when that began last; only one goroutine uses it

	logged atomic.Bool // the last line about the shard says that it does not answer
}

// A call is what a flow wants of one shard, or gives back there.
type call struct {
	asks    []asked
	returns []returned

	answers []shared.Answer
	results []shared.Result
	again   bool // it was asked again, because nothing was decided

	err  error
	sent time.Time
	done chan struct{}

	// state is guarded by the lane's lock.
	state callState
}

type callState uint8

const (
	callQueued callState = iota
	callSent
	callDone
	callLeft // nobody waits for it
)

// A lane is the way to a shard for calls of one script. While one batch is on the wire, the next gathers. A lone call leaves at once. Its
// caller sends it if the store has a connection for that.
//
// A flow with one bucket takes almost four times as much of a server's time in a call of its own as in a batch of 32. The script reads
// the call and the time once, and the server reads all keys by one command.
type lane struct {
	store  *Store
	script *script
	shard  func() *shard

	mu      sync.Mutex
	queue   []*call
	running int
}

// do has the shard do what the call says, within the store's bound. Maybe reports, if there is an error, whether the shard may have
// done it all the same.
func (l *lane) do(ctx context.Context, c *call) (maybe bool, err error) {
	if l.shard().gate.Open() {
		return false, shared.ErrDown
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	c.done = make(chan struct{})
	began := time.Now()
	left := l.store.timeout
	if l.sendOwn(ctx, c, began) {
		left -= time.Since(began) // it is sent again if the server has decided nothing
	} else {
		l.submit(c)
	}
	select {
	case <-c.done:
		return mayHaveCounted(c.err), c.err
	default:
	}
	bound := l.store.timer(left)
	defer l.store.stop(bound)
	select {
	case <-c.done:
	case <-ctx.Done():
		err = ctx.Err()
	case <-bound.C:
		err = errTimeout
		// A batch may wait for a connection for longer.
		l.store.silent(l.shard(), began)
	}
	if err == nil {
		return mayHaveCounted(c.err), c.err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.state == callDone {
		return mayHaveCounted(c.err), c.err
	}
	maybe = c.state == callSent
	c.state = callLeft
	return maybe, err
}

// sendOwn has the caller send its call if it may, and reports whether it has.
//
// A caller that sends does not see that its context has ended, because the answer would be lost then, and with it what the flow got. So the
// bound has to be short, and to come before the context's deadline. The client ends such a call after writeTimeout, whatever the bound is.
func (l *lane) sendOwn(ctx context.Context, c *call, now time.Time) bool {
	s := l.store
	if s.lone == nil || s.timeout > writeTimeout {
		return false
	}
	if ctx.Done() != nil {
		if deadline, ok := ctx.Deadline(); s.timeout > maxOwnBound || ok && deadline.Before(now.Add(s.timeout)) {
			return false
		}
	}
	if !s.lone.take() {
		return false
	}
	defer s.lone.free()
	l.mu.Lock()
	alone := l.running == 0
	if alone {
		l.running++
		c.state = callSent
	}
	l.mu.Unlock()
	if !alone {
		return false
	}
	if !s.begin() {
		l.finish([]*call{c}, errClosed)
		l.leave()
		return true
	}
	defer s.goes.Done()
	l.send([]*call{c}, true)
	l.leave()
	return true
}

// leave ends the turn of a caller that has sent its call. Another goroutine sends what has gathered meanwhile.
func (l *lane) leave() {
	l.mu.Lock()
	more := len(l.queue) > 0
	if !more {
		l.running--
	}
	l.mu.Unlock()
	if more {
		l.goOn()
	}
}

func (l *lane) submit(c *call) {
	l.mu.Lock()
	l.queue = append(l.queue, c)
	start := l.running == 0 || len(l.queue) >= minBatch && l.running < maxOnWire
	if start {
		l.running++
	}
	l.mu.Unlock()
	if start {
		l.goOn()
	}
}

// goOn has a goroutine send what is in the queue.
func (l *lane) goOn() {
	if !l.store.hand(l) {
		l.mu.Lock()
		l.running--
		left := l.queue
		l.queue = nil
		l.mu.Unlock()
		l.finish(left, errClosed)
	}
}

// maxIdle is how many goroutines of a store stay for the next call at most.
const maxIdle = 8

// hand has a goroutine send the lane's batches, and reports whether the store is not closed. One that has sent those of another lane, and
// has stayed, takes less time to begin than a new one. A call by itself waits for that.
func (s *Store) hand(l *lane) bool {
	select {
	case s.runs <- l:
		return true
	default:
		return s.start(func() { s.sending(l) })
	}
}

// sending sends the batches of lanes until the store is closed, or enough other goroutines stay.
func (s *Store) sending(l *lane) {
	for {
		l.run()
		if s.idle.Add(1) > maxIdle {
			s.idle.Add(-1)
			return
		}
		select {
		case l = <-s.runs:
			s.idle.Add(-1)
		case <-s.ctx.Done():
			return
		}
	}
}

// timer returns a timer, for stop.
func (s *Store) timer(d time.Duration) *time.Timer {
	if t, ok := s.timers.Get().(*time.Timer); ok {
		t.Reset(d)
		return t
	}
	return time.NewTimer(d)
}

func (s *Store) stop(t *time.Timer) {
	t.Stop()
	s.timers.Put(t)
}

// A span is a context that the batches of some time share. To make one for each takes about 1 µs.
type span struct {
	ctx   context.Context //nolint:containedctx // it is what is shared
	until time.Time       // when the last of them begins
}

// bounded returns the context of a batch that begins now. It ends after the store's bound, or an eighth of it later. Calls do not wait
// for that: they have their own timers.
func (s *Store) bounded(now time.Time) context.Context {
	if sp := s.span.Load(); sp != nil && now.Before(sp.until) {
		return sp.ctx
	}
	ctx, cancel := context.WithDeadline(s.ctx, now.Add(s.timeout+s.timeout/8))
	context.AfterFunc(ctx, cancel)
	sp := &span{unbounded{ctx}, now.Add(s.timeout / 8)}
	s.span.Store(sp)
	return sp.ctx
}

// run sends batches until there are no more calls.
func (l *lane) run() {
	for {
		batch := l.next()
		if batch == nil {
			return
		}
		l.send(batch, false)
	}
}

// next takes the next batch from the queue. It is nil if there is none, and then the lane does not run.
func (l *lane) next() (batch []*call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys, n := 0, 0
	for _, c := range l.queue {
		size := len(c.asks) + len(c.returns)
		if len(batch) == maxBatch || keys > 0 && keys+size > maxKeys {
			break
		}
		if c.state == callQueued { // nobody waits for the others any more
			c.state = callSent
			batch = append(batch, c)
			keys += size
		}
		n++
	}
	rest := copy(l.queue, l.queue[n:])
	clear(l.queue[rest:])
	l.queue = l.queue[:rest]
	if batch == nil {
		l.running--
	}
	return batch
}

// send has the shard do what a batch of calls say. Own reports whether it is the one call of a caller.
func (l *lane) send(batch []*call, own bool) {
	s, sh := l.store, l.shard()
	if sh.gate.Open() {
		l.finish(batch, shared.ErrDown)
		return
	}
	sent := time.Now()
	at := s.serverTime(sh, sent)
	e, _ := s.encoders.Get().(*encoder)
	if e == nil {
		e = newEncoder()
	}
	var head []byte
	n := 0
	for _, c := range batch {
		c.sent = sent
		if c.asks != nil {
			e.flow(c.asks, at, s.own, func(h shared.Holder) time.Duration { return s.leaseOf(h, sent) }, s.Instances())
			n++
			continue
		}
		for i := range c.returns {
			e.giveBack(&c.returns[i], at)
			n++
		}
	}
	sc := l.script
	if sc == s.scripts.take {
		if !e.others {
			sc = s.scripts.takeTokens
		}
		last := 0.0 // what comes later must not count: nobody waits for it
		if sh.heard.Load() {
			last = float64(at.Add(2 * s.timeout).UnixMicro())
		}
		head = appendFloats(nil, last)
	}
	keys, arg := e.call(head, n) // nothing else keeps what it has: the client copies the names of keys
	var reply []byte
	var err error
	if own {
		reply, err = runAt(until{s.ctx, sent.Add(s.timeout)}, s.lone.client, sc, keys, arg)
	} else {
		reply, err = s.run(s.bounded(sent), sc, keys, arg)
	}
	e.reset()
	s.encoders.Put(e)
	if err == nil && !s.decode(sh, batch, reply, sent) {
		err = errReply
	}
	l.finish(batch, s.evidence(sh, err, sent))
}

// evidence takes what became of a call to a shard as evidence of how the shard is, and returns the error that callers get. A refusal is an
// answer. One that makes no sense is none: no flow could use it.
func (s *Store) evidence(sh *shard, err error, sent time.Time) error {
	answer, refused := rueidis.IsRedisErr(err)
	switch {
	case err == nil || refused:
		if sh.gate.Answered() {
			s.renewLater()
		}
		if sh.logged.Load() && sh.logged.Swap(false) {
			s.logger.Info("headgate: the store's server answers again")
		}
		if err == nil {
			return nil
		}
		return refusal(answer)
	case s.ctx.Err() != nil:
		return errClosed
	}
	s.silent(sh, sent)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return errTimeout
	case errors.Is(err, errReply), rueidis.IsParseErr(err):
		return errReply
	case errors.Is(err, errConnection): // it says what the server has sent
		return err
	default:
		return errConnection
	}
}

// silent notes that a shard has not answered since then.
func (s *Store) silent(sh *shard, since time.Time) {
	now := time.Now()
	if sh.gate.Failed(since, now) {
		s.kick()
	}
	if sh.gate.Open() && s.logs(sh, now) {
		s.logger.Warn("headgate: the store's server does not answer, and is asked again once in a while")
	}
}

// logPeriod is how often the store logs that a server does not answer, at most.
const logPeriod = time.Minute

// logs reports whether to log now that a shard does not answer. That is logged once for each outage, and at most once a minute for all
// shards. So an outage that ends within the minute may not be logged.
func (s *Store) logs(sh *shard, now time.Time) bool {
	if sh.logged.Load() {
		return false
	}
	last, at := s.logged.Load(), max(now.Sub(s.epoch), 1)
	if last != 0 && at-time.Duration(last) < logPeriod || !s.logged.CompareAndSwap(last, int64(at)) {
		return false
	}
	sh.logged.Store(true)
	return true
}

// decode gives each call what became of it. It reports whether the reply makes sense.
func (s *Store) decode(sh *shard, batch []*call, reply []byte, sent time.Time) bool {
	if len(reply) < 8 {
		return false
	}
	sh.learn(floatAt(reply), s.micros(sent), s.micros(time.Now()))
	reply = reply[8:]
	for _, c := range batch {
		c.err = nil
		if c.asks != nil {
			c.answers = make([]shared.Answer, len(c.asks))
			for i := range c.asks {
				n, err := decodeAnswer(&c.asks[i], &c.answers[i], reply)
				if n == 0 {
					return false
				}
				c.err = cmp.Or(c.err, err)
				reply = reply[n:]
			}
			continue
		}
		if len(reply) < returnedSize*len(c.returns) {
			return false
		}
		c.results = make([]shared.Result, len(c.returns))
		for i := range c.returns {
			flags := reply[0]
			c.results[i] = shared.Result{Returned: flags&replyOK != 0, Forgiven: floatAt(reply[1:]), Held: micros(floatAt(reply[9:]))}
			c.err = cmp.Or(c.err, undecided(flags))
			reply = reply[returnedSize:]
		}
	}
	return len(reply) == 0
}

// undecided returns why a server has done nothing, and nil if it has.
func undecided(flags byte) error {
	switch {
	case flags&replyNewer != 0:
		return errNewer
	case flags&replyLate != 0:
		return errLate
	case flags&replyAgain != 0:
		return errCalendar
	default:
		return nil
	}
}

// decodeAnswer returns how long the answer is, which is 0 if it makes no sense, and why it is none.
func decodeAnswer(a *asked, answer *shared.Answer, reply []byte) (n int, undone error) {
	n = takenSize
	if len(reply) < n {
		return 0, nil
	}
	flags := reply[0]
	*answer = shared.Answer{OK: flags&replyOK != 0, Differs: flags&replyDiffers != 0, Left: floatAt(reply[1:])}
	var period float64
	if flags&replyMore != 0 {
		if n = takenMore; len(reply) < n {
			return 0, nil
		}
		answer.Wait = micros(floatAt(reply[9:]))
		period = floatAt(reply[17:])
		answer.Drawn = floatAt(reply[25:])
		answer.After = micros(floatAt(reply[33:]))
	}
	switch {
	case a.look || a.Rule.Kind == shared.Quota:
		answer.Slot = uint64(period)
	case a.Rule.Kind == shared.Slots && answer.OK && a.Tokens != 0:
		answer.Slot = a.id
	}
	return n, undecided(flags)
}

// finish ends calls, or sends them again: once, if the server has decided nothing because of its clock, which is known now. Those
// that nobody waits for any more give back what they got.
func (l *lane) finish(batch []*call, err error) {
	var left, again []*call
	l.mu.Lock()
	for _, c := range batch {
		if err != nil {
			c.err = err
		}
		if c.state == callLeft {
			left = append(left, c)
			continue
		}
		if !c.again && (errors.Is(c.err, errLate) || errors.Is(c.err, errCalendar)) {
			c.again, c.state = true, callQueued
			again = append(again, c)
			continue
		}
		c.state = callDone
		close(c.done)
	}
	if again != nil {
		l.queue = append(again, l.queue...)
	}
	l.mu.Unlock()
	for _, c := range left {
		l.store.leave(c)
	}
}

// learn takes the server's time into the offset.
func (sh *shard) learn(server float64, sent, received int64) {
	if server <= 0 || server > math.MaxInt64 {
		return
	}
	sh.offset.Store(int64(server) - (sent+received)/2)
	sh.heard.Store(true)
}

// micros returns a time of this process in microseconds. The wall clock's steps do not change it.
func (s *Store) micros(t time.Time) int64 { return s.epoch.UnixMicro() + t.Sub(s.epoch).Microseconds() }

// serverTime returns the shard's time at a time of this process.
func (s *Store) serverTime(sh *shard, t time.Time) time.Time {
	return time.UnixMicro(s.micros(t) + sh.offset.Load())
}
