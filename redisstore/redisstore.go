// Package redisstore keeps the state of engines in Redis, or in a server that speaks its protocol and runs its scripts, such as
// Valkey. Engines with the same store and namespace have one limit.
package redisstore

import (
	"github.com/redis/rueidis"

	"github.com/headgate-go/headgate/internal/shared"
)

// A Store is such a state. It is safe for concurrent use.
type Store struct {
	client rueidis.Client
	key    shared.Key
}
