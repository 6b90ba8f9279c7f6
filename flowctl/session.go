package flowctl

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// A session tells agents of Headgate that the client lives, what flows have cost, and how they have ended where that is awaited. It learns from their heartbeats
// whether they live. Agents that do not know sessions refuse the first stream, and are not asked again on that
// connection.
type session struct {
	remote *remote
	id     [16]byte
	names  []string        // the metadata that names the session
	sent   context.Context // has this metadata, and nothing else
	began  time.Time

	ctx  context.Context // ends when the client is closed
	stop context.CancelFunc
	runs sync.WaitGroup // of its goroutines

	foreign atomic.Bool   // the agent knows no sessions
	checks  atomic.Int64  // that are under way
	checked atomic.Int64  // when the last one began, since began
	resting atomic.Bool   // heartbeats are rare, because there is nothing at the agent
	waited  atomic.Bool   // no check waits for a stream
	number  atomic.Uint64 // of the newest check
	answers chan struct{} // receives when an agent has said anything, or a stream has ended

	mu       sync.Mutex
	trying   chan struct{}      // closed by tried
	lines    map[*line]struct{} // those that are open
	stays    map[place]*stay
	pending  map[uint64]*settlement
	returns  map[uint64]*returning // by their ids
	newest   uint64                // id of a return
	oldest   uint64                // id before that of any return
	pruned   time.Time             // when the pending ones were last looked at
	lostLog  limitedLog
	isClosed bool

	pendingKept, returnsKept int // bytes in memory
}

// The times of a session, besides those that both sides go by.
const (
	busyFor      = 10 * time.Second // after a check, heartbeats are not rare
	reopenFirst  = time.Second
	reopenMost   = time.Minute
	maxUnacked   = 64      // heartbeats whose times are kept
	maxPending   = 1 << 16 // settlements, as many as an agent remembers
	settledBy    = 30 * time.Second
	settlingSize = 64 // bytes of a settlement on the wire, besides its labels, at the most

	maxPendingBytes = 48 << 20 // of settlements in memory: as many as there may be, with a short label
	settlingKept    = 512      // bytes of a settlement in memory, besides what it takes on the wire

	maxLines = 16               // streams at a time; agents that drain keep theirs for a while
	endsBy   = 10 * time.Second // after the client has said all, an agent ends a stream
)

func newSession(r *remote) *session {
	s := &session{
		remote: r, began: time.Now(),
		lines: make(map[*line]struct{}), stays: make(map[place]*stay), pending: make(map[uint64]*settlement),
		returns: make(map[uint64]*returning), answers: make(chan struct{}, 1), trying: make(chan struct{}),
	}
	_, _ = rand.Read(s.id[:])          // it does not fail
	background := context.Background() //nolint:forbidigo // the session is no caller's; it ends when the client is closed
	s.names = []string{wire.SessionText(s.id)}
	s.sent = metadata.AppendToOutgoingContext(background, wire.SessionHeader, s.names[0])
	s.ctx, s.stop = context.WithCancel(s.sent)
	return s
}

// flush waits until agents have answered what they were told of flows, as far as there is a stream.
func (s *session) flush(ctx context.Context) error {
	for {
		s.mu.Lock()
		awaits := s.awaits()
		s.mu.Unlock()
		if !awaits {
			return nil
		}
		select {
		case <-s.answers:
		case <-ctx.Done():
			s.mu.Lock()
			left := s.unanswered() // not in each round, because there can be 65,536
			s.mu.Unlock()
			if left == 0 {
				return nil
			}
			return fmt.Errorf("%w: %w", ownError(fmt.Sprintf("the agent has not answered what it was told at the end of %d flows", left)), ctx.Err())
		}
	}
}

// awaits reports whether anything is on the way on a stream.
func (s *session) awaits() bool {
	for _, one := range s.pending {
		if s.reaches(one.agent) {
			return true
		}
	}
	for _, one := range s.returns {
		if s.reaches(one.agent) {
			return true
		}
	}
	return false
}

// unanswered counts the flows of which something is on the way on a stream.
func (s *session) unanswered() int {
	flows := make(map[uint64]struct{})
	for _, one := range s.pending {
		if s.reaches(one.agent) {
			flows[one.flow] = struct{}{}
		}
	}
	for _, one := range s.returns {
		if s.reaches(one.agent) {
			flows[one.flow] = struct{}{}
		}
	}
	return len(flows)
}

// close ends all streams, and waits for that.
func (s *session) close() {
	s.mu.Lock()
	s.isClosed = true
	for _, at := range s.stays {
		at.timer.Stop()
	}
	for _, one := range s.pending {
		s.resolve(one, false)
	}
	s.mu.Unlock()
	s.stop()
	s.runs.Wait()
}

// tried has checks not wait for a stream any more: there is one, or it has failed, or they have waited for long enough. The caller
// holds the mutex.
func (s *session) tried() {
	if !s.waited.Swap(true) {
		close(s.trying)
	}
}

// tries has checks wait for a stream again, because the last one has ended or is about to. The caller holds the mutex.
func (s *session) tries() {
	if s.waited.Load() {
		s.trying = make(chan struct{})
		s.waited.Store(false)
	}
}

// beginsBy is how long checks wait for a stream once there is a connection. A check waits no longer than a quarter of its time.
const beginsBy = 100 * time.Millisecond

// await waits for a stream, because the agent takes a check for part of a session only if that has one. It waits no longer than gRPC
// would for the connection, and then briefly.
func (s *session) await(ctx context.Context) {
	conn := s.remote.dialled
	for conn != nil && !s.waited.Load() { // nothing is seen of the application's connection
		switch state := conn.GetState(); state {
		case connectivity.Connecting:
			if !conn.WaitForStateChange(ctx, state) {
				return
			}
		case connectivity.Idle: // as after a connection was lost
			conn.Connect()
			soon, cancel := context.WithTimeout(ctx, beginsBy)
			changed := conn.WaitForStateChange(soon, state)
			cancel()
			if !changed {
				return
			}
		case connectivity.Ready:
			s.awaitStream(ctx)
			return
		case connectivity.TransientFailure, connectivity.Shutdown: // the check finds out
			return
		}
	}
}

func (s *session) awaitStream(ctx context.Context) {
	s.mu.Lock()
	trying := s.trying
	s.mu.Unlock()
	wait := beginsBy
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline)/4)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-trying:
	case <-ctx.Done():
	case <-timer.C:
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.trying == trying {
			s.tried()
		}
	}
}

// begins notes that a check begins. It returns the check's number; 0 if the agent knows no sessions. The first checks have one too: they
// are part of the session at the agent, although its first answer is still on the way.
func (s *session) begins(at time.Time) (number uint64) {
	s.checks.Add(1)
	s.checked.Store(int64(at.Sub(s.began)))
	if s.resting.Load() {
		s.wake()
	}
	if !s.foreign.Load() {
		number = s.number.Add(1)
	}
	return number
}

// ends notes that a check has ended.
func (s *session) ends() { s.checks.Add(-1) }

// wake has the lines look at what is to be done.
func (s *session) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.lines {
		l.poke()
	}
}

// busy reports whether the client has anything at an agent, or is about to.
func (s *session) busy(now time.Time) bool {
	if s.checks.Load() > 0 || len(s.pending) > 0 || now.Sub(s.began)-time.Duration(s.checked.Load()) < busyFor {
		return true
	}
	for _, at := range s.stays {
		if at.slots > 0 {
			return true
		}
	}
	return false
}

// keep has a stream open until the client is closed.
func (s *session) keep() {
	pause := reopenFirst
	for s.ctx.Err() == nil {
		l, err := s.open()
		begin, often := time.Now(), false
		if err != nil {
			s.mu.Lock()
			s.tried()
			s.mu.Unlock()
		}
		if err == nil {
			select {
			case <-l.retired: // the next one takes its place, and it goes on for a while
				if often = time.Since(begin) < reopenFirst; !often {
					pause = reopenFirst
				}
			case <-l.ended:
				err = l.err
				if l.told {
					pause = reopenFirst
				}
				if l.told && time.Since(begin) >= reopenFirst { // it was lost
					err = nil
				}
			case <-s.ctx.Done():
			}
		}
		switch {
		case s.ctx.Err() != nil:
			return
		case status.Code(err) == codes.Unimplemented:
			s.foreign.Store(true)
			if !s.remote.nextConnection(s.ctx) {
				return
			}
			s.foreign.Store(false)
			continue
		case err == nil && !often: // at once, because checks wait for it
		case s.idle(pause + mathrand.N(pause/4)):
			pause = min(2*pause, reopenMost)
		}
	}
}

// idle waits, and reports whether the session goes on. A new connection ends the wait: it may be to another agent.
func (s *session) idle(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	var fresh <-chan struct{}
	if s.remote.links != nil {
		fresh = s.remote.links.fresh
	}
	select {
	case <-timer.C:
		return true
	case <-fresh:
		s.mu.Lock()
		s.tries()
		s.mu.Unlock()
		return true
	case <-s.ctx.Done():
		return false
	}
}

// nextConnection waits for a connection that is made from now on. It reports false if ctx ends first, or if connections are the
// application's.
func (r *remote) nextConnection(ctx context.Context) bool {
	if r.links == nil {
		return false
	}
	select {
	case <-r.links.fresh:
		return true
	case <-ctx.Done():
		return false
	}
}

// A line is one stream of the session.
type line struct {
	session *session
	opened  time.Time
	on      uint64 // the connection, of those that were made
	stream  grpc.BidiStreamingClient[sessionv1.SessionRequest, sessionv1.SessionResponse]
	cancel  context.CancelFunc
	woken   chan struct{}
	retired chan struct{} // closed when another stream is to take its place
	ended   chan struct{} // closed after err is set
	err     error

	// Guarded by the session's mutex.
	told     bool   // the agent has answered
	agent    uint64 // 0 until then
	leaves   bool   // another stream is to take its place
	number   uint64 // of heartbeats that were sent
	theirs   uint64 // the agent's newest heartbeat
	beaten   time.Time
	unacked  []beat
	asked    []*sign
	fresh    []*settlement // that are to be sent
	underWay int           // settlements of the batch that was sent
	returns  []*returning  // that are to be sent
	bringing int           // returns of the batch that was sent
}

// A beat is a heartbeat that the agent has not acknowledged.
type beat struct {
	number uint64
	at     time.Time
}

// A sign is wanted of the agent: that it acknowledges a heartbeat after this one.
type sign struct {
	after uint64
	given chan struct{}
}

// open opens a stream, when there is a connection.
func (s *session) open() (*line, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	r := s.remote
	var before uint64 // the connection that there was
	if r.links != nil && r.dialled.GetState() == connectivity.Ready {
		before = r.links.made.Load()
	}
	stream, err := sessionv1.NewSessionServiceClient(r.conn).Session(ctx, append(slices.Clip(r.bounded),
		grpc.WaitForReady(true), grpc.UseCompressor(encoding.Identity),
		grpc.MaxRetryRPCBufferSize(0), // see begin
	)...)
	if err != nil {
		cancel()
		return nil, err
	}
	on := uint64(0)
	if r.links != nil {
		if on = r.links.made.Load(); before == 0 || on == before { // else the stream may be on the one before, and ends soon
			forget(r.links.fresh)
		}
	}
	l := &line{
		on:      on,
		session: s, opened: time.Now(), stream: stream, cancel: cancel,
		woken: make(chan struct{}, 1), retired: make(chan struct{}), ended: make(chan struct{}),
	}
	s.mu.Lock()
	s.makeRoom()
	s.lines[l] = struct{}{}
	s.mu.Unlock()
	s.runs.Go(l.begin)
	return l, nil
}

// makeRoom ends the oldest stream if there are too many, as with agents that keep telling the client to open another one.
func (s *session) makeRoom() {
	if len(s.lines) < maxLines {
		return
	}
	var oldest *line
	for l := range s.lines {
		if oldest == nil || l.opened.Before(oldest.opened) {
			oldest = l
		}
	}
	oldest.cancel()
}

func (l *line) poke() {
	select {
	case l.woken <- struct{}{}:
	default:
	}
}

// retire has another stream take the place of this one.
func (l *line) retire() {
	if !l.leaves {
		l.leaves = true
		close(l.retired)
		l.session.tries()
	}
	l.poke()
}

// begin sends the first message, and only then has the stream read. gRPC retries a stream by itself that no agent has taken, such as one
// on a connection that ends. It holds the stream's mutex until there is another connection, so a second goroutine could do nothing
// meanwhile, not even end. After the first message it does not retry, because nothing is kept to be sent again.
func (l *line) begin() {
	m, next := l.message(time.Now())
	if m != nil {
		_ = l.stream.Send(m) // its error is the stream's
	} else { // another stream has taken its place already
		l.cancel()
	}
	l.session.runs.Go(l.receive)
	l.send(next)
}

// send sends what there is to be said until the stream ends. There is nothing before the time next.
func (l *line) send(next time.Duration) {
	s := l.session
	defer l.cancel()
	var goAway <-chan struct{}
	if s.remote.links != nil {
		goAway = s.remote.links.goAway
	}
	timer := time.NewTimer(next)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-l.woken:
		case <-goAway:
			s.mu.Lock()
			for one := range s.lines {
				if one.on <= s.remote.links.gone.Load() { // an agent asks twice, and the stream may be on the next connection by then
					one.retire()
				}
			}
			s.mu.Unlock()
		case <-l.ended:
			return
		}
		m, next := l.message(time.Now())
		if m == nil && next == 0 {
			_ = l.stream.CloseSend() // the agent then ends the stream
			timer.Reset(endsBy)
			select {
			case <-l.ended:
			case <-s.ctx.Done():
			case <-timer.C: // it does not
			}
			return
		}
		if m != nil {
			if err := l.stream.Send(m); err != nil {
				select { // whose error is the stream's
				case <-l.ended:
				case <-s.ctx.Done():
				}
				return
			}
		}
		timer.Reset(next)
	}
}

// message returns what is to be said now, nil for nothing, and when there will be more. No time means that nothing more is
// to be said.
func (l *line) message(now time.Time) (m *sessionv1.SessionRequest, next time.Duration) {
	s := l.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.leaves && l.over() {
		return nil, 0
	}
	s.prune(now)
	m = new(sessionv1.SessionRequest)
	if l.underWay == 0 && len(l.fresh) > 0 {
		m.Settlements = l.batch()
		l.underWay = len(m.GetSettlements())
	}
	if l.bringing == 0 && len(l.returns) > 0 {
		if len(m.GetSettlements()) > 0 { // one message has no room for both
			l.poke()
		} else {
			m.Returns = l.batchReturns()
			l.bringing = len(m.GetReturns())
		}
	}
	s.resting.Store(true)
	every := wire.RestingEvery
	if s.busy(now) { // after resting is set, so that a check which begins wakes the line
		s.resting.Store(false)
		every = wire.HeartbeatEvery
	}
	next = every - now.Sub(l.beaten)
	if next <= 0 || len(l.asked) > 0 && l.asked[len(l.asked)-1].after == l.number {
		l.number++
		l.beaten, next = now, every
		l.unacked = append(l.unacked, beat{l.number, now})
		if len(l.unacked) > maxUnacked {
			l.unacked = l.unacked[1:]
		}
		m.Heartbeat = &sessionv1.Heartbeat{Number: l.number, Acknowledges: l.theirs}
	}
	if m.GetHeartbeat() == nil && len(m.GetSettlements()) == 0 && len(m.GetReturns()) == 0 {
		m = nil
	}
	return m, next
}

// over reports whether the line is of no use any more: another one has taken its place, or the agent drains, and nothing of the
// client's is left at its agent.
func (l *line) over() bool {
	s := l.session
	for other := range s.lines {
		if other != l && other.told && !other.leaves && other.agent == l.agent {
			return true
		}
	}
	for _, stored := range []bool{false, true} {
		if at := s.stays[place{l.agent, stored}]; at != nil && at.slots > 0 {
			return false
		}
	}
	for _, one := range s.pending {
		if one.agent == l.agent {
			return false
		}
	}
	return !s.brings(l.agent)
}

// receive reads what the agent says until the stream ends.
func (l *line) receive() {
	s := l.session
	for {
		m, err := l.stream.Recv()
		if err != nil {
			s.mu.Lock()
			delete(s.lines, l)
			for _, one := range l.asked {
				close(one.given)
			}
			l.asked = nil
			l.err = clipError(err)
			switch {
			case l.leaves: // checks wait for the next stream already
			case l.told:
				s.tries()
			default:
				s.tried()
			}
			s.mu.Unlock()
			close(l.ended)
			signal(s.answers)
			return
		}
		s.remote.answered()
		l.heard(m)
		signal(s.answers)
	}
}

// heard notes what the agent says.
func (l *line) heard(m *sessionv1.SessionResponse) {
	s := l.session
	s.mu.Lock()
	defer s.mu.Unlock()
	id := m.GetAgentId()
	if l.told && id != l.agent { // nobody goes by this: a stream is at one agent
		l.cancel()
		return
	}
	if id != 0 && !l.told {
		l.told, l.agent, l.fresh = true, id, nil
		for _, one := range s.pending {
			if one.agent == id {
				l.fresh = append(l.fresh, one)
			}
		}
		l.underWay = 0
		l.takeReturns(time.Now())
		if !l.leaves { // else checks wait for the next stream
			s.tried()
		}
		for other := range s.lines {
			if other != l && other.leaves {
				other.poke()
			}
		}
	}
	if h := m.GetHeartbeat(); h != nil {
		l.theirs = max(l.theirs, h.GetNumber())
		for len(l.unacked) > 0 && l.unacked[0].number <= h.GetAcknowledges() {
			if l.unacked[0].number == h.GetAcknowledges() {
				s.acknowledged(l.agent, l.unacked[0].at, m.GetLeased().AsDuration())
			}
			l.unacked = l.unacked[1:]
		}
		for len(l.asked) > 0 && l.asked[0].after < h.GetAcknowledges() && h.GetAcknowledges() <= l.number {
			close(l.asked[0].given)
			l.asked = l.asked[1:]
		}
	}
	for _, result := range m.GetResults() {
		if one := s.pending[result.GetId()]; one != nil && one.agent == l.agent {
			s.resolve(one, result.GetSettled())
		}
		l.underWay = max(l.underWay-1, 0)
	}
	if m.GetDrain() {
		l.retire()
	}
	l.returned(m.GetReturned())
	if len(l.fresh) > 0 && l.underWay == 0 || len(l.returns) > 0 && l.bringing == 0 || l.leaves && len(m.GetReturned()) > 0 {
		l.poke()
	}
}

// alive asks the agent for a sign of life. Known is false if no agent is known to have a session.
func (s *session) alive(ctx context.Context) (alive, known bool) {
	s.mu.Lock()
	var by *line
	for l := range s.lines {
		if l.told && (by == nil || by.leaves && !l.leaves) {
			by = l
		}
	}
	if by == nil {
		s.mu.Unlock()
		return false, false
	}
	one := &sign{after: by.number, given: make(chan struct{})}
	by.asked = append(by.asked, one)
	by.poke()
	s.mu.Unlock()
	select {
	case <-one.given:
		select {
		case <-by.ended:
			return false, false
		default:
			return true, true
		}
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		by.asked = slices.DeleteFunc(by.asked, func(other *sign) bool { return other == one })
		return false, true
	}
}

// A place is where slots are: at an agent, or in the store that it has them from.
type place struct {
	agent  uint64
	stored bool
}

// A stay is the time in which a place has the session's slots, as far as the client knows.
type stay struct {
	at    place
	until time.Time // when the slots are lost, unless the agent says more
	slots int       // of flows that have not ended
	lost  bool
	timer *time.Timer // while there are slots
	flows map[*check]context.CancelCauseFunc
}

// acknowledged notes that the agent has acknowledged a heartbeat that was sent at the time. From its arrival, the agent's
// store keeps the session's slots for at least the lease. Leased is 0 if the agent has no store, or does not know.
func (s *session) acknowledged(agent uint64, sent time.Time, leased time.Duration) {
	s.extend(place{agent, false}, sent.Add(wire.SessionLost))
	if leased > 0 {
		s.extend(place{agent, true}, sent.Add(min(leased, wire.SessionLasts)-wire.SessionSpare))
	}
}

// extend notes that slots at the place are not lost until then.
func (s *session) extend(at place, until time.Time) {
	of := s.stays[at]
	if of == nil {
		for id, other := range s.stays {
			if other.slots == 0 && !time.Now().Before(other.until) {
				delete(s.stays, id)
			}
		}
		of = s.newStay(at)
	}
	if until.After(of.until) && !of.isOver() {
		of.until = until
	}
}

// isOver reports whether slots of the stay are lost. After a pause of the process, the agent's answer to a new heartbeat may come
// before the timer does.
func (of *stay) isOver() bool { return of.slots > 0 && !time.Now().Before(of.until) }

func (s *session) newStay(at place) *stay {
	of := &stay{at: at, flows: make(map[*check]context.CancelCauseFunc)}
	of.timer = time.AfterFunc(wire.SessionLost, func() { s.judge(of) })
	of.timer.Stop()
	s.stays[at] = of
	return of
}

// join notes that a flow holds slots at the place. The agent's answer says that they last as long as the session. The check began at the
// time, and the answer acknowledges it as it does a heartbeat. A store has just renewed its lease by then.
func (s *session) join(at place, slots int, began time.Time) *stay {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosed {
		return nil
	}
	of := s.stays[at]
	if of == nil || of.isOver() { // which its timer finds
		of = s.newStay(at)
	}
	if until := began.Add(wire.SessionLost); until.After(of.until) {
		of.until = until
	}
	if of.slots == 0 {
		of.timer.Reset(time.Until(of.until))
	}
	of.slots += slots
	return of
}

// leave notes that a flow with slots has ended.
func (s *session) leave(of *stay, c *check) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(of.flows, c)
	if of.slots -= c.slots; of.slots == 0 && !of.lost {
		of.timer.Stop()
		for l := range s.lines {
			if l.leaves {
				l.poke()
			}
		}
		if s.stays[of.at] == of && !s.reaches(of.at.agent) { // so that answers with made-up agents leave nothing behind
			delete(s.stays, of.at)
		}
	}
}

// reaches reports whether there is a stream at the agent.
func (s *session) reaches(agent uint64) bool {
	for l := range s.lines {
		if l.told && l.agent == agent {
			return true
		}
	}
	return false
}

// watch has the function called if the slots of a flow are lost.
func (s *session) watch(of *stay, c *check, cancel context.CancelCauseFunc) {
	s.mu.Lock()
	lost := of.lost
	if !lost {
		of.flows[c] = cancel
	}
	s.mu.Unlock()
	if lost {
		cancel(ErrSlotLost)
	}
}

// judge takes the slots for lost if the agent has not said in time that they are kept.
func (s *session) judge(of *stay) {
	s.mu.Lock()
	if of.slots == 0 || of.lost || s.isClosed {
		s.mu.Unlock()
		return
	}
	if left := time.Until(of.until); left > 0 {
		of.timer.Reset(left)
		s.mu.Unlock()
		return
	}
	of.lost = true
	if s.stays[of.at] == of {
		delete(s.stays, of.at)
	}
	slots, flows := of.slots, of.flows
	of.flows = nil
	s.mu.Unlock()
	for _, cancel := range flows {
		cancel(ErrSlotLost)
	}
	r := s.remote
	if r.lostSlots != nil {
		r.lostSlots.Add(s.ctx, int64(slots))
	}
	message := "headgate: the agent has not acknowledged a heartbeat for 9s: it may give slots of flows that run to others"
	if of.at.stored {
		message = "headgate: the agent has not said in time that the store keeps the slots of flows that run: the store may give them to others"
	}
	s.lostLog.warn(r.logger, message, "slots", slots)
}

// A settlement is on its way to the agent.
type settlement struct {
	message *sessionv1.Settlement // nil when it is settled, because streams may still have it in their lists
	flow    uint64                // the number of its check
	agent   uint64
	kept    int // bytes in memory
	since   time.Time
	taken   bool
	done    chan struct{} // closed when the agent has answered, or never will
}

// settle sends what a flow has cost and how it has ended, and again after a stream was lost. It is nil if that cannot be sent.
func (s *session) settle(agent, id, number uint64, costs *agentapi.Cost, outcome *sessionv1.Outcome) *settlement {
	m := &sessionv1.Settlement{Id: id, Outcome: outcome}
	size := settlingSize
	for label, tokens := range costs.All() {
		m.Costs = append(m.Costs, &sessionv1.Cost{Label: label, Tokens: tokens})
		size += len(label) + settlingSize
	}
	one := &settlement{message: m, flow: number, agent: agent, kept: size + settlingKept, since: time.Now(), done: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prune(one.since)
	if s.isClosed || size > wire.MaxSessionMessage || len(s.pending) >= maxPending || s.pendingKept+one.kept > maxPendingBytes {
		return nil
	}
	if other := s.pending[id]; other != nil { // agents make ids at random, but one may be hostile
		s.resolve(other, false)
	}
	s.pending[id] = one
	s.pendingKept += one.kept
	for l := range s.lines {
		if l.told && l.agent == agent {
			l.fresh = append(l.fresh, one)
			l.poke()
			break
		}
	}
	return one
}

// prune gives up settlements that no agent has answered.
func (s *session) prune(now time.Time) {
	if len(s.pending) == 0 || now.Sub(s.pruned) < settledBy/3 {
		return
	}
	s.pruned = now
	for _, old := range s.pending {
		if now.Sub(old.since) >= settledBy {
			s.resolve(old, false)
		}
	}
	for l := range s.lines { // an agent may never answer a batch
		l.fresh = slices.DeleteFunc(l.fresh, func(one *settlement) bool { return one.message == nil })
	}
}

// await waits for the agent's answer, and reports whether it has taken the settlement.
func (one *settlement) await(ctx context.Context) bool {
	select {
	case <-one.done:
		return one.taken
	case <-ctx.Done():
		return false
	}
}

func (s *session) resolve(one *settlement, taken bool) {
	if one.message == nil {
		return
	}
	delete(s.pending, one.message.GetId())
	s.pendingKept -= one.kept
	one.message, one.taken = nil, taken
	close(one.done)
}

// batch takes as many settlements as fit into one message.
func (l *line) batch() []*sessionv1.Settlement {
	var batch []*sessionv1.Settlement
	size := settlingSize // a heartbeat goes with it
	for len(l.fresh) > 0 && len(batch) < wire.MostSettlements {
		one := l.fresh[0]
		if one.message == nil { // it was answered on another stream, or given up
			l.fresh = l.fresh[1:]
			continue
		}
		need := settlingSize
		for _, cost := range one.message.GetCosts() {
			need += len(cost.GetLabel()) + settlingSize
		}
		if size += need; size > wire.MaxSessionMessage && len(batch) > 0 {
			break
		}
		l.fresh, batch = l.fresh[1:], append(batch, one.message)
	}
	return batch
}
