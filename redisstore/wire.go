package redisstore

import (
	"fmt"
	"net"
	"sync"
)

// A wire is a connection to a server that is not trusted. It follows the commands and the replies, and ends at the first byte that shows
// a reply that is beyond the bounds, that is malformed, or that belongs to no command. The client would panic at such a reply, in a
// goroutine of its own, or take all memory for it. It allocates nothing.
type wire struct {
	net.Conn

	link *link

	mu       sync.Mutex // the client writes and reads at the same time
	awaited  awaited
	commands commands
	replies  replies
}

// Read reads what has been checked.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	bad := w.replies.follow(p[:n], &w.awaited)
	w.mu.Unlock()
	if bad != nil {
		_ = w.Close()
		return 0, bad
	}
	return n, err
}

// Write counts commands before they leave.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	err := w.commands.follow(p, &w.awaited)
	w.mu.Unlock()
	if err != nil {
		_ = w.Close()
		return 0, err
	}
	return w.Conn.Write(p)
}

// Close ends the connection, and lets the link know.
func (w *wire) Close() error {
	w.link.ended.Add(1)
	return w.Conn.Close()
}

// Why connections end.
var (
	errLarge     = fmt.Errorf("%w: a reply is too large", errConnection)
	errMalformed = fmt.Errorf("%w: a reply is malformed", errConnection)
	errUnasked   = fmt.Errorf("%w: a reply does not belong to a command", errConnection)
	errCommand   = fmt.Errorf("%w: a command cannot be followed", errConnection)
)

// awaited is which commands have no reply yet.
//
// The client panics at a reply that it does not await, and the same if it confirms a subscription that is none. A reply to UNSUBSCRIBE is
// not one to count: the client sends PING after that command, and takes the reply to PING for both. What the client does with replies is
// in _backgroundRead of rueidis, and this does the same.
type awaited struct {
	sent, answered uint64
	first          uint64 // the place of the first command that is no greeting; places begin at 1, and 0 is none
	alone          bool   // subscriptions have the connection for themselves: they come as arrays, by version 2 of the protocol
	special        [maxSpecial]special
	specials       int
	skip           int  // how many more subscriptions the last command has confirmed
	pong           bool // the reply to a PING after UNSUBSCRIBE is left over
	until          uint64
	cost           int64 // of replies since the window began, which ends with the one in the place until
}

// A special command is one whose reply the client relies on.
type special struct {
	place uint64
	kind  commandKind
	args  int
}

type commandKind uint8

const (
	plain commandKind = iota
	greeting
	subscribe
	unsubscribe
	list // of so many elements, or more
)

// maxSpecial is how many special commands may have no reply: the client waits for all of them but a subscription.
const maxSpecial = 16

// add notes a command that is about to leave.
func (a *awaited) add(s special) error {
	a.sent++
	if s.kind != greeting && a.first == 0 {
		a.first = a.sent
	}
	if s.kind == plain || s.kind == greeting {
		return nil
	}
	if a.specials == maxSpecial {
		return errCommand
	}
	s.place = a.sent
	a.special[a.specials] = s
	a.specials++
	return nil
}

// next returns the command whose reply is the next one.
func (a *awaited) next() special {
	if a.specials > 0 && a.special[0].place == a.answered+1 {
		return a.special[0]
	}
	return special{}
}

// greets reports whether the next reply is one to a greeting. The client does not look for messages then.
func (a *awaited) greets() bool {
	return a.answered < a.sent && (a.first == 0 || a.answered+1 < a.first)
}

// take takes a whole reply or message of that cost.
func (a *awaited) take(r *reply, cost int64) error {
	if r.typ == typePush || a.alone && r.size > 0 && r.word != wordPong && !a.greets() {
		return a.takeMessage(r)
	}
	next := a.next()
	switch {
	case a.answered == a.sent:
		if !a.pong || !r.pong() {
			return errUnasked
		}
		a.pong = false
		return nil
	case r.word == wordQueued && (next.kind == subscribe || next.kind == unsubscribe):
		return errUnasked
	case next.kind == unsubscribe && !r.pong():
		a.pong = true
	case a.pong:
		if !r.pong() {
			return errUnasked
		}
		a.pong = false
		return nil
	case next.kind == list && r.array() && r.size < next.args:
		return errMalformed
	}
	a.done(cost)
	return nil
}

// done notes that the next command has its reply. A window has all commands that were under way when it began.
func (a *awaited) done(cost int64) {
	if a.next().kind != plain {
		copy(a.special[:], a.special[1:a.specials])
		a.specials--
	}
	a.answered++
	if a.cost += cost; a.answered >= a.until {
		a.cost, a.until = 0, a.sent
	}
}

func (a *awaited) takeMessage(r *reply) error {
	if r.size < 2 {
		return nil
	}
	begins, ends := r.word == wordSubscribe, r.word == wordUnsubscribe
	next := a.next()
	switch {
	case r.word == wordMessage && r.size > 2 && r.words < r.wants:
		return errMalformed
	case (begins || ends) && a.skip > 0:
		a.skip--
	case begins && next.kind != subscribe:
		return errUnasked
	case begins:
		a.skip = next.args - 1
		a.done(0)
	}
	return nil
}
