package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
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
	sessionMessages    = 1000            // that are read of a stream each second, and at once after a pause
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
	owners   map[string]int // how many sessions each has
	draining chan struct{}  // closed by drain
	drained  bool

	charged atomic.Int64 // bytes that the charges and grants of all sessions take
}

// A session is one client's.
type session struct {
	id    [16]byte
	owner string
	heard atomic.Int64 // when the client last said that it lives, in nanoseconds since began
	began time.Time

	// Guarded by sessions.mu.
	streams int
	end     *time.Timer // forgets the session when it has run out; nil while no stream has ended

	charges charges
	grants  grants
}

func newSessions(engine agentapi.Local) *sessions {
	s := &sessions{
		engine: engine, by: make(map[[16]byte]*session), owners: make(map[string]int), draining: make(chan struct{}),
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
	lives := one != nil && one.streams > 0
	s.mu.RUnlock()
	if !lives || one.owner != ownerOf(ctx) {
		return nil
	}
	if now := time.Since(one.began); now-time.Duration(one.heard.Load()) >= wire.HeartbeatEvery {
		s.renew(one)
	}
	return one
}

// renew notes that the client lives. Checks at the same time go by heard, so the engine hears of it first: a slot that is bound to
// a session which has run out is lost at once.
func (s *sessions) renew(one *session) {
	now := int64(time.Since(one.began))
	s.engine.Renew(one.id, wire.SessionLasts)
	one.heard.Store(now)
}

// open begins a stream of the session.
func (s *sessions) open(id [16]byte, owner string) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.by[id]
	switch {
	case s.drained:
		return nil, errDraining
	case one != nil && one.owner != owner:
		return nil, errOthersSession
	case one == nil && (len(s.by) >= maxSessions || s.owners[owner] >= maxSessionsByOne):
		return nil, errSessions
	case one == nil:
		one = &session{id: id, owner: owner, began: time.Now()}
		s.by[id] = one
		s.owners[owner]++
	case one.streams >= maxSessionStreams:
		return nil, errSessions
	}
	one.streams++
	s.renew(one)
	return one, nil
}

// close ends a stream of the session. The session outlasts its last stream until it runs out.
func (s *sessions) close(one *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if one.streams--; one.streams > 0 {
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
	if one.streams > 0 || s.by[one.id] != one {
		return
	}
	if left := one.left(); left > 0 { // a check has renewed it while its last stream ended
		one.end.Reset(left)
		return
	}
	delete(s.by, one.id)
	if s.owners[one.owner]--; s.owners[one.owner] == 0 {
		delete(s.owners, one.owner)
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
	one, err := all.open(id, ownerOf(ctx))
	if err != nil {
		return err
	}
	defer all.close(one)
	messages, ended := make(chan []byte), make(chan error, 1)
	go func() { // it ends with the stream
		for {
			data, err := receive(stream, wire.MaxSessionMessage)
			if err != nil {
				ended <- err
				return
			}
			select {
			case messages <- data:
			case <-ctx.Done():
				return
			}
		}
	}()
	silence := time.NewTimer(sessionBegin)
	defer silence.Stop()
	var pace pace
	draining, beats := all.draining, uint64(0)
	for {
		response := &sessionv1.SessionResponse{AgentId: all.agentID}
		select {
		case data := <-messages:
			silence.Reset(sessionSilence)
			if err := pace.wait(ctx); err != nil {
				return status.FromContextError(err).Err()
			}
			m := new(sessionv1.SessionRequest)
			if protofield.Count(data, maxSessionElements) > maxSessionElements || proto.Unmarshal(data, m) != nil {
				return errMessage
			}
			if m.GetHeartbeat() != nil {
				all.renew(one)
				beats++
				response.Heartbeat = &sessionv1.Heartbeat{Number: beats, Acknowledges: m.GetHeartbeat().GetNumber()}
			}
			slots := 0
			for _, back := range m.GetReturns() {
				if slots += len(back.GetSlots()); slots > maxSessionElements {
					return errMessage
				}
				for _, ref := range back.GetSlots() {
					s.service.end(ctx, ref)
				}
				if number := back.GetCheck(); number != 0 {
					all.giveUp(ctx, one, number)
				}
				response.Returned = append(response.Returned, back.GetId())
			}
			for _, settlement := range m.GetSettlements() {
				response.Results = append(response.Results, &sessionv1.SettlementResult{
					Id: settlement.GetId(), Settled: one.settle(ctx, settlement, &s.service.outcomes),
				})
			}
		case <-draining:
			draining = nil
			response.Drain = true
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-s.service.engine.Closed():
			return closed(agentapi.ErrClosed)
		case <-silence.C:
			return errSilent
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

// A pace bounds how often messages of a stream are read. A peer that sends more waits. The zero value is ready.
type pace struct{ due time.Time }

func (p *pace) wait(ctx context.Context) error {
	now := time.Now()
	const each = time.Second / sessionMessages
	if ahead := now.Add(-time.Second); p.due.Before(ahead) {
		p.due = ahead
	}
	p.due = p.due.Add(each)
	wait := p.due.Sub(now)
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
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
