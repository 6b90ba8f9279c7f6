// Package bounds checks names of control points and keys of cache entries, by the rules of clients and servers.
package bounds

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// MaxLabelValue is the longest value of a label that clients send, in bytes. They cut longer values of peers.
const MaxLabelValue = 4096

// MaxControlPoint is the longest control point, in bytes.
const MaxControlPoint = 255

// CheckControlPoint says what is wrong with a control point; nil when nothing is. Clients and servers agree on it.
func CheckControlPoint(controlPoint string) error {
	switch {
	case controlPoint == "":
		return errors.New("control point is empty")
	case len(controlPoint) > MaxControlPoint:
		return fmt.Errorf("control point of %d bytes is longer than %d", len(controlPoint), MaxControlPoint)
	case !utf8.ValidString(controlPoint):
		return errors.New("control point is not valid UTF-8")
	default:
		return nil
	}
}

// The bounds of a lookup: bytes of a key, and global keys.
const (
	maxCacheKey  = 255
	maxCacheKeys = 64
)

// CheckCacheKeys says what is wrong with cache keys, and not what they are; nil when nothing is. Empty keys are none.
// Clients and servers agree on it, for a check that a server refuses goes unlimited where flows fail open.
func CheckCacheKeys(result string, global ...string) error {
	if len(global) > maxCacheKeys {
		return fmt.Errorf("%d global cache keys are more than %d", len(global), maxCacheKeys)
	}
	if err := checkCacheKey(result); err != nil {
		return err
	}
	for _, key := range global {
		if err := checkCacheKey(key); err != nil {
			return err
		}
	}
	return nil
}

func checkCacheKey(key string) error {
	switch {
	case len(key) > maxCacheKey:
		return fmt.Errorf("cache key of %d bytes is longer than %d", len(key), maxCacheKey)
	case !utf8.ValidString(key):
		return errors.New("cache key is not valid UTF-8")
	default:
		return nil
	}
}
