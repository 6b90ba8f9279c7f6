package redisstore

import (
	"context"
	"errors"

	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// Draw does what [shared.Queues] says.
func (*Store) Draw(context.Context, *shared.Drawing) (shared.Drawn, error) {
	return shared.Drawn{}, errors.New("the store has no queues")
}

// Wake does what [shared.Queues] says.
func (*Store) Wake(shared.Key, func()) (stop func()) { return func() {} }

// wakeCommand has those called that wait at a key.
func (s *Store) wakeCommand(n name) rueidis.Completed {
	if s.cluster {
		return s.client.B().Spublish().Channel(n.all + suffixWake).Message("").Build()
	}
	return s.client.B().Publish().Channel(n.all + suffixWake).Message("").Build()
}
