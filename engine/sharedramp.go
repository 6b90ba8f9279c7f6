package engine

import (
	"context"
	"errors"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// A sharedRamp is a load ramp whose position is in the store. The engine follows it. While the store does not answer, the ramp goes on as
// it did.
type sharedRamp struct {
	engine *Engine
	key    shared.Key
	course *ramp

	// One call at a time is under way, so that no answer is older than what the ramp has gone by. Calls receives while there is none.
	calls chan struct{}
	known bool // the store has said where the ramp stands; guarded by calls
}

func newSharedRamp(e *Engine, key shared.Key, course *ramp) *sharedRamp {
	s := &sharedRamp{engine: e, key: key, course: course, calls: make(chan struct{}, 1)}
	s.calls <- struct{}{}
	return s
}

// followEvery is how often the engine asks where ramps stand.
const followEvery = time.Second

// followRamps has ramps stand where the store says, until the engine is closed.
func (e *Engine) followRamps() {
	ctx := e.store.detached()
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		for _, p := range e.rules.Load().installed {
			if p.ramp != nil {
				p.ramp.follow(ctx)
			}
		}
		select {
		case <-e.done:
			return
		case <-e.ramped:
		case <-tick.C:
		}
	}
}

// follow asks the store where the ramp stands. If the store does not know, it begins now if it begins by itself, and goes on if the store
// knew before.
func (s *sharedRamp) follow(ctx context.Context) {
	<-s.calls
	defer func() { s.calls <- struct{}{} }()
	var to *shared.Position
	if s.known || s.course.starts {
		to = positionOf(s.course, s.course.now.Load(), s.engine.now())
	}
	at, err := s.engine.store.Move(ctx, s.key, 0, to)
	if s.engine.answered(ctx, err); err == nil {
		s.adopt(&at)
	}
}

// adopt puts the ramp where the store says.
func (s *sharedRamp) adopt(at *shared.Position) {
	if at.Version > 0 {
		s.known = true
		s.course.now.Store(s.course.position(at, s.engine.now()))
	}
}

// position returns where the ramp stands by the store.
func (r *ramp) position(at *shared.Position, now int64) *position {
	return &position{at: min(max(int64(at.At), 0), r.length), since: now, direction: int64(min(max(at.Direction, -1), 1)), left: at.Left}
}

// positionOf returns what the store is to know of a position.
func positionOf(r *ramp, p *position, now int64) *shared.Position {
	return &shared.Position{At: time.Duration(r.along(p, now)), Direction: int(p.direction), Left: p.left}
}

// mostMoves is how often a move is tried while others move the ramp too.
const mostMoves = 10

var errMoved = errors.New("others move the ramp all the time")

// move moves the store's ramp from where it stands. Next returns where it goes on, from a position.
func (s *sharedRamp) move(ctx context.Context, next func(p *position, now int64) *position) error {
	select {
	case <-s.calls:
	case <-ctx.Done():
		return componentError(s.key.Policy, s.key.Component, ctx.Err())
	}
	defer func() { s.calls <- struct{}{} }()
	err := errMoved
	at, asked := s.engine.store.Move(ctx, s.key, 0, nil)
	for range mostMoves {
		s.engine.answered(ctx, asked)
		if asked != nil {
			err = asked
			break
		}
		now := s.engine.now()
		from := s.course.now.Load()
		if at.Version > 0 {
			from = s.course.position(&at, now)
		}
		to := positionOf(s.course, next(from, now), now)
		version := at.Version
		at, asked = s.engine.store.Move(ctx, s.key, version, to)
		if asked == nil && at.Version == version+1 && at.Direction == to.Direction && at.Left == to.Left {
			s.engine.answered(ctx, nil)
			s.adopt(&at)
			return nil
		}
	}
	return componentError(s.key.Policy, s.key.Component, err)
}
