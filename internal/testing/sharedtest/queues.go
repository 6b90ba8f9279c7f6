package sharedtest

import (
	"context"
	"errors"

	"github.com/headgate-go/headgate/internal/shared"
)

// noQueues are the queues of a store that has none.
type noQueues struct{}

func (noQueues) Draw(context.Context, *shared.Drawing) (shared.Drawn, error) {
	return shared.Drawn{}, errors.New("the store has no queues")
}

func (noQueues) Wake(shared.Key, func()) (stop func()) { return func() {} }
