package redisstore

import (
	"context"
	"encoding/binary"
	"math"
	"time"

	"github.com/headgate-go/headgate/internal/shared"
)

// Move does what [shared.Ramps] says. Where a ramp stands is kept for good.
func (s *Store) Move(ctx context.Context, key shared.Key, from uint64, to *shared.Position) (shared.Position, error) {
	n := s.name(key)
	sh := s.lanesFor(n).take.shard()
	if sh.gate.Open() {
		return shared.Position{}, shared.ErrDown
	}
	arg := make([]byte, 19)
	if to != nil {
		arg[0] = 1
		binary.LittleEndian.PutUint64(arg[9:], math.Float64bits(float64(to.At)))
		arg[17] = byte(int8(to.Direction))
		if to.Left {
			arg[18] = 1
		}
	}
	binary.LittleEndian.PutUint64(arg[1:], math.Float64bits(float64(from)))
	sent := time.Now()
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	reply, err := s.run(unbounded{bounded}, s.scripts.ramp, []string{n.all}, arg)
	if err != nil && ctx.Err() != nil {
		return shared.Position{}, ctx.Err()
	}
	if err == nil && len(reply) != 19 {
		err = errReply
	}
	switch err = s.evidence(sh, err, sent); {
	case err != nil:
		return shared.Position{}, err
	case reply[0]&replyNewer != 0:
		return shared.Position{}, errNewer
	}
	return shared.Position{
		Version:   uint64(floatAt(reply[1:])),
		At:        time.Duration(floatAt(reply[9:])),
		Direction: int(int8(reply[17])),
		Left:      reply[18] != 0,
	}, nil
}
