package slots

import (
	"math"
	"sync"
)

// Leases are the sessions that live, and until when each is known to. The zero value is ready. It is safe for concurrent
// use.
type Leases struct {
	mu   sync.Mutex
	by   map[[16]byte]lease
	most int // how many there are when those that have run out are forgotten
}

// A lease is how long a session lives. A session that ran out and was renewed later is another one to slots: those from
// before since stay lost, because its client has counted them as lost.
type lease struct{ since, until int64 }

// end is when a slot runs out that was taken at the time.
func (l lease) end(taken int64) int64 {
	if taken < l.since {
		return l.since
	}
	return l.until
}

// fewest is how many leases are kept without looking for those that have run out.
const fewest = 64

// Renew has the session live until then.
func (l *Leases) Renew(session [16]byte, now, until int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by == nil {
		l.by, l.most = make(map[[16]byte]lease), fewest
	}
	of, ok := l.by[session]
	if !ok && len(l.by) >= l.most {
		for session, of := range l.by {
			if of.until <= now {
				delete(l.by, session)
			}
		}
		l.most = max(2*len(l.by), fewest)
	}
	if of.until <= now {
		of.since = now
	}
	of.until = max(of.until, until)
	l.by[session] = of
}

// revive has a session live for revival at the least, whose slots were restored. They were taken before this process knew the session,
// and are not lost.
func (l *Leases) revive(session [16]byte, now int64) {
	l.Renew(session, now, now+int64(revival))
	l.mu.Lock()
	defer l.mu.Unlock()
	of := l.by[session]
	of.since = math.MinInt64
	l.by[session] = of
}

// of returns the session's lease; zero if it has run out so long ago that it was forgotten.
func (l *Leases) of(session [16]byte) lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.by[session]
}
