package wire

import (
	"encoding/hex"
	"time"
)

// What both sides of a session go by.
const (
	// SessionHeader is the metadata that names a client's session.
	SessionHeader = "headgate-session"

	// HeartbeatEvery is how often a client that has anything to do with the agent sends a heartbeat, and RestingEvery how
	// often one that has not.
	HeartbeatEvery = time.Second
	RestingEvery   = time.Minute

	// SessionLasts is how long a session lives at the agent after a heartbeat. SessionLost is how long after the sending
	// of the last heartbeat that the agent has acknowledged a client takes it for lost. It is sooner by SessionSpare, so
	// that the client knows first. A client takes slots in a store for lost SessionSpare before
	// the store may give them to others.
	SessionLasts = 10 * time.Second
	SessionSpare = time.Second
	SessionLost  = SessionLasts - SessionSpare

	// MaxSessionMessage is the most bytes of a message of a session, and MostSettlements the most settlements in it, or the most returns,
	// with as many slots in all.
	MaxSessionMessage = 16 << 10
	MostSettlements   = 256
)

// SessionText is a session as metadata.
func SessionText(session [16]byte) string { return hex.EncodeToString(session[:]) }

// ReadSession reads what SessionText wrote, and reports whether the text is a session.
func ReadSession(text string) (session [16]byte, ok bool) {
	if len(text) != 2*len(session) {
		return session, false
	}
	for i := range len(text) {
		if c := text[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return session, false
		}
	}
	_, _ = hex.Decode(session[:], []byte(text)) // it has such digits only
	return session, session != [16]byte{}
}
