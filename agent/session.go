package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	sessionv1 "github.com/headgate-go/headgate/api/headgate/session/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/protofield"
	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of sessions.
const (
	maxSessions        = 8192
	maxSessionsByOne   = maxSessions / 4 // of one API key, of one certificate, or of all clients without either
	maxSessionStreams  = 4               // of one session
	maxSpares          = maxSessions / 4 // streams besides the first of each session
	maxSparesByOne     = maxSpares / 4   // of one owner
	sessionMessages    = 1000            // that are handled of a stream each second
	sessionBurst       = 64              // that are handled at once after a pause
	sessionBegin       = 10 * time.Second
	sessionSilence     = 3 * wire.RestingEvery
	comeBack           = time.Second // after which the flows that a draining agent has rejected come back, and up to twice that
	maxSessionElements = 2 * wire.MostSettlements
)

// sessions are the clients that say that they live. A session is its owner's: nobody else's checks, heartbeats and
// settlements are part of it.
type sessions struct {
	agentID uint64
	engine  agentapi.Local

	mu       sync.RWMutex
	by       map[[16]byte]*session
	owners   map[string]*owner
	spares   int           // streams besides the first of each session
	draining chan struct{} // closed by drain
	drained  bool

	charged   atomic.Int64  // bytes that the charges and grants of all sessions take
	unhandled atomic.Int64  // bytes of messages that are not handled
	turns     chan struct{} // has an element for each message that is handled

	floodsMu    sync.Mutex
	flooded     map[any]int // how many streams of a connection have ended since then because they send too fast
	floodsSince time.Time
}

// A session is one client's.
type session struct {
	id    [16]byte
	owner *owner
	heard atomic.Int64 // when the client last said that it lives, in nanoseconds since began
	began time.Time

	// Guarded by sessions.mu.
	lines []*line     // the oldest first
	end   *time.Timer // forgets the session when it has run out; nil while no stream has ended

	charges charges
	grants  grants
}

func newSessions(engine agentapi.Local) *sessions {
	s := &sessions{
		engine: engine, by: make(map[[16]byte]*session), owners: make(map[string]*owner), draining: make(chan struct{}),
		turns: make(chan struct{}, maxHandled),
	}
	for s.agentID == 0 {
		s.agentID = rand.Uint64()
	}
	return s
}

// The errors that end a session's stream.
var (
	errNoSession     = status.Error(codes.InvalidArgument, "the metadata "+wire.SessionHeader+" names no session")
	errOthersSession = status.Error(codes.PermissionDenied, "the session is another client's")
	errSessions      = status.Error(codes.ResourceExhausted, "there are too many sessions")
	errDraining      = status.Error(codes.Unavailable, "the agent is about to stop")
	errSilent        = status.Error(codes.DeadlineExceeded, "the client says nothing")
	errGivenUp       = status.Error(codes.Canceled, "the client has given the check up")
	errMessage       = status.Error(codes.InvalidArgument, "the message is malformed, compressed or too long")
)

// sessionNamed returns the session that the call's metadata names.
func sessionNamed(ctx context.Context) (id [16]byte, ok bool) {
	sent := metadata.ValueFromIncomingContext(ctx, wire.SessionHeader)
	if len(sent) != 1 {
		return id, false
	}
	return wire.ReadSession(sent[0])
}

// ownerOf returns who makes the call: the owner of its API key or, where there are no keys, of the key of its
// certificate. It is empty for clients without either.
func ownerOf(ctx context.Context) string {
	if c := callOf(ctx); c != nil && c.hasKey {
		return "key " + c.owner
	}
	if p, ok := peer.FromContext(ctx); ok {
		if tls, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(tls.State.PeerCertificates) > 0 {
			sum := sha256.Sum256(tls.State.PeerCertificates[0].RawSubjectPublicKeyInfo)
			return "certificate " + string(sum[:])
		}
	}
	return ""
}

// of returns the session that a check is part of, and renews it, because the check says that the client lives. It is nil
// if the check names none that lives here. A session without a stream is about to end: the client may be at another
// agent by now, and only balanced here.
func (s *sessions) of(ctx context.Context) *session {
	id, ok := sessionNamed(ctx)
	if !ok {
		return nil
	}
	s.mu.RLock()
	one := s.by[id]
	lives := one != nil && len(one.lines) > 0
	s.mu.RUnlock()
	if !lives || one.owner.name != ownerOf(ctx) {
		return nil
	}
	if now := time.Since(one.began); now-time.Duration(one.heard.Load()) >= wire.HeartbeatEvery {
		s.renew(one)
	}
	return one
}

// renew notes that the client lives. Checks at the same time go by heard, so the engine hears of it first: a slot that is bound to
// a session which has run out is lost at once.
//
// It returns for how long from now on a store certainly keeps the session's slots.
func (s *sessions) renew(one *session) (leased time.Duration) {
	now := int64(time.Since(one.began))
	leased = s.engine.Renew(one.id, wire.SessionLasts)
	one.heard.Store(now)
	return leased
}

// open begins a stream of the session. The function cancel ends its call, if not nil. If the session has as many streams as it may,
// or its owner has, its oldest one ends: after the client has lost a connection, the agent takes long to notice that.
func (s *sessions) open(id [16]byte, by string, cancel context.CancelFunc) (*line, error) {
	l, oldest, err := s.begin(id, by, cancel)
	if oldest != nil {
		oldest.fail(errReplaced)
	}
	return l, err
}

func (s *sessions) begin(id [16]byte, by string, cancel context.CancelFunc) (l, oldest *line, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one, of := s.by[id], s.owners[by]
	switch {
	case s.drained:
		return nil, nil, errDraining
	case one != nil && one.owner.name != by:
		return nil, nil, errOthersSession
	case one == nil && (len(s.by) >= maxSessions || of != nil && of.sessions >= maxSessionsByOne):
		return nil, nil, errSessions
	case one == nil:
		if of == nil {
			of = &owner{name: by, turns: make(chan struct{}, maxHandledByOne)}
			s.owners[by] = of
		}
		one = &session{id: id, owner: of, began: time.Now()}
		s.by[id] = one
		of.sessions++
	}
	if n := len(one.lines); n >= maxSessionStreams || n > 0 && (of.spares >= maxSparesByOne || s.spares >= maxSpares) {
		oldest = one.lines[0]
		s.remove(oldest)
	}
	l = &line{session: one, all: s, cancel: cancel, messages: make(chan []byte, maxUnhandled), failed: make(chan struct{})}
	if one.lines = append(one.lines, l); len(one.lines) > 1 {
		of.spares++
		s.spares++
	}
	s.renew(one)
	return l, oldest, nil
}

// remove removes the stream from its session, unless a newer one has taken its place.
func (s *sessions) remove(l *line) {
	one := l.session
	i := slices.Index(one.lines, l)
	if i < 0 {
		return
	}
	if one.lines = slices.Delete(one.lines, i, i+1); len(one.lines) > 0 {
		one.owner.spares--
		s.spares--
	}
}

// close ends a stream of the session. The session outlasts its last stream until it runs out.
func (s *sessions) close(l *line) {
	l.over()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(l)
	one := l.session
	if len(one.lines) > 0 {
		return
	}
	if one.end == nil { // one for all streams, because a peer may open and close many
		one.end = time.AfterFunc(one.left(), func() { s.forget(one) })
	} else {
		one.end.Reset(one.left())
	}
}

// left is how long the session lives if the client says nothing more.
func (one *session) left() time.Duration {
	return wire.SessionLasts - (time.Since(one.began) - time.Duration(one.heard.Load()))
}

func (s *sessions) forget(one *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(one.lines) > 0 || s.by[one.id] != one {
		return
	}
	if left := one.left(); left > 0 { // a check has renewed it while its last stream ended
		one.end.Reset(left)
		return
	}
	delete(s.by, one.id)
	if one.owner.sessions--; one.owner.sessions == 0 {
		delete(s.owners, one.owner.name)
	}
	s.charged.Add(-one.charges.drop() - one.grants.drop())
}

// drain has flows not wait any more, and tells the clients.
func (s *sessions) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.drained {
		s.drained = true
		close(s.draining)
	}
}

// Session serves a stream of a session.
func (s handler) Session(stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse]) error {
	ctx, all := stream.Context(), s.service.sessions
	id, ok := sessionNamed(ctx)
	if !ok {
		return errNoSession
	}
	var cancel context.CancelFunc
	var credit *allowance
	if c := callOf(ctx); c != nil {
		cancel, credit = c.cancel, c.allowance
	}
	l, err := all.open(id, ownerOf(ctx), cancel)
	if err != nil {
		return err
	}
	defer all.close(l)
	go l.read(stream) // it ends with the stream
	silence := time.NewTimer(sessionBegin)
	defer silence.Stop()
	var pace pace
	draining, beats := all.draining, uint64(0)
	for {
		response := &sessionv1.SessionResponse{AgentId: all.agentID}
		select {
		case data, ok := <-l.messages:
			if !ok {
				if errors.Is(l.readErr, io.EOF) {
					return nil
				}
				return l.readErr
			}
			silence.Reset(sessionSilence)
			elements := protofield.Count(data, maxSessionElements)
			if elements > maxSessionElements {
				return errMessage
			}
			if err := pace.wait(ctx, 1, sessionMessages, sessionBurst); err != nil {
				return l.reason(status.FromContextError(err).Err())
			}
			done, err := all.turn(ctx, l.session.owner, elements)
			if err != nil {
				return l.reason(err)
			}
			err = s.hear(stream, l.session, data, &beats, response)
			done()
			l.handled(len(data) + unhandledSize)
			credit.earn(messageEarns, wire.MaxSessionMessage)
			if err != nil {
				return l.reason(err)
			}
		case <-draining:
			draining = nil
			response.Drain = true
		case <-l.failed:
			return l.reason(nil)
		case <-s.service.engine.Closed():
			return closed(agentapi.ErrClosed)
		case <-silence.C:
			return errSilent
		case <-ctx.Done():
			return l.reason(status.FromContextError(ctx.Err()).Err())
		}
		if err := stream.Send(response); err != nil {
			return l.reason(err)
		}
	}
}

// hear does what a message says, and puts the answers into the response. It sends the answer to a heartbeat at once if there is more to do,
// which may wait for a store. The stream has had so many heartbeats.
func (s handler) hear(
	stream grpc.BidiStreamingServer[sessionv1.SessionRequest, sessionv1.SessionResponse], one *session, data []byte, beats *uint64,
	response *sessionv1.SessionResponse,
) error {
	m := new(sessionv1.SessionRequest)
	if proto.Unmarshal(data, m) != nil || slotsIn(m.GetReturns()) > maxSessionElements {
		return errMessage
	}
	more := len(m.GetReturns())+len(m.GetSettlements()) > 0
	if m.GetHeartbeat() != nil {
		if leased := s.service.sessions.renew(one); leased > 0 {
			response.Leased = durationpb.New(leased)
		}
		*beats++
		response.Heartbeat = &sessionv1.Heartbeat{Number: *beats, Acknowledges: m.GetHeartbeat().GetNumber()}
		if more {
			if err := stream.Send(response); err != nil {
				return err
			}
			response.Heartbeat, response.Leased = nil, nil
		}
	}
	if more {
		response.Returned = s.service.carryOut(stream.Context(), one, m.GetReturns())
		response.Results = s.service.settle(stream.Context(), one, m.GetSettlements())
	}
	return nil
}

func slotsIn(returns []*sessionv1.Return) (slots int) {
	for _, back := range returns {
		slots += len(back.GetSlots())
	}
	return slots
}

// carryOut gives back what the client's flows have held, all together, and returns the ids of the returns.
func (s *Service) carryOut(ctx context.Context, one *session, returns []*sessionv1.Return) (ids []uint64) {
	var slots []*checkv1.InflightRequestRef
	var ends []agentapi.Settling
	for _, back := range returns {
		slots = append(slots, back.GetSlots()...)
		if number := back.GetCheck(); number != 0 {
			ends = s.sessions.giveUp(one, number, ends)
		}
		ids = append(ids, back.GetId())
	}
	s.engine.EndSlots(ctx, slotNames(slots))
	s.engine.Settle(ctx, ends)
	return ids
}

// settle corrects what the client's flows took, all together, and tells how they ended.
func (s *Service) settle(ctx context.Context, one *session, settlements []*sessionv1.Settlement) (results []*sessionv1.SettlementResult) {
	var all []agentapi.Settling
	for _, m := range settlements {
		var ok bool
		all, ok = one.settle(ctx, m, &s.outcomes, all)
		results = append(results, &sessionv1.SettlementResult{Id: m.GetId(), Settled: ok})
	}
	s.engine.Settle(ctx, all)
	return results
}

// A pace bounds how much is handled in a second. What is more waits. The zero value is ready. It is safe for concurrent use.
type pace struct {
	mu  sync.Mutex
	due time.Time
}

// wait waits for units of which there are so many a second, and some at once after a pause.
func (p *pace) wait(ctx context.Context, units, perSecond, atOnce int) error {
	now := time.Now()
	each := func(n int) time.Duration { return time.Duration(n) * time.Second / time.Duration(perSecond) }
	p.mu.Lock()
	if ahead := now.Add(-each(atOnce)); p.due.Before(ahead) {
		p.due = ahead
	}
	p.due = p.due.Add(each(units))
	wait := p.due.Sub(now)
	p.mu.Unlock()
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done(): // what a stream does not use any more is left to others
		p.mu.Lock()
		defer p.mu.Unlock()
		p.due = p.due.Add(-each(units))
		return ctx.Err()
	}
}

// Drain prepares the agent for its end. Flows that wait in queues are rejected with the cause "closed", and so are flows that
// would wait from now on. Their RetryAfter leaves time for another agent to start. Other checks are decided as before. Clients of
// Headgate open their next sessions elsewhere. They end their sessions here when their flows have given back their slots. Drain
// does not wait for that: stop the server gracefully afterwards. A second Drain does nothing.
func (s *Service) Drain() { s.sessions.drain() }

// comesBack says when the flow can come back, if it is rejected because the agent is about to stop. Not all flows come
// back at the same time.
func (s *sessions) comesBack(v *agentapi.Verdict) {
	if !v.Rejected() || v.Rejection().Cause != agentapi.CauseClosed {
		return
	}
	select {
	case <-s.draining:
		r := v.Rejection()
		r.RetryAfter = comeBack + rand.N(comeBack)
		v.Reject(r)
	default:
	}
}
