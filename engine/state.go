package engine

import (
	"encoding/binary"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/headgate-go/headgate/engine/internal/breaker"
	"github.com/headgate-go/headgate/engine/internal/keys"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/statefile"
)

// longestRestart is how much time between writing and reading counts at the most. It bounds the work for a clock that was wrong
// by decades: a calendar quota that is in debt looks at each period.
const longestRestart = int64(366 * 24 * time.Hour)

// WriteState writes the state of the components in force. Those with slots come first, because they are few, and nothing else
// ends them.
func (a *agent) WriteState(to io.Writer, h statefile.Header, limit int) (agentapi.StateCount, error) {
	e := a.engine()
	now := e.now()
	h.Written, h.Secret = time.Now(), e.secret.Bytes()
	w := statefile.NewWriter(to, h, limit)
	n, installed := agentapi.StateCount{}, e.rules.Load().installed
	for _, slots := range []bool{true, false} {
		for _, in := range installed {
			l, ok := in.component.(lasting)
			if !ok || in.kind.slots != slots {
				continue
			}
			if mode, ok := l.lasts(); ok {
				w.Component(in.written(mode))
				n.Keys += l.save(w, now)
			}
		}
	}
	n.Dropped = w.Omitted()
	return n, w.Close()
}

// written is what a file says of the component.
func (p *installed) written(mode string) statefile.Component {
	return statefile.Component{
		Policy: p.named.policy, ID: p.named.id, Hash: p.named.hash,
		Kind: p.name, Label: p.identity().LabelKey, Mode: mode,
	}
}

// ReadState restores the components in force that the file has. The numbers are those of the policies in force.
func (a *agent) ReadState(f *statefile.File) agentapi.StateCount {
	e := a.engine()
	e.applying.Lock() // the components stay in force
	defer e.applying.Unlock()
	e.secret.Set(f.Secret)
	installed := e.rules.Load().installed
	for _, in := range installed {
		if r, ok := in.component.(renamed); ok {
			r.rename()
		}
	}
	now := e.now()
	at := source.Restoring{
		Now: now,
		// A clock that went back must not give limits more than was written, so no time has passed then.
		Then: now - min(max(int64(time.Since(f.Written)), 0), longestRestart),
		Copy: !f.Drained,
	}
	var all agentapi.StateCount
	var lost []*lostState
	f.Each(func(c statefile.Component) func(statefile.Record) {
		in, why := e.rules.Load().match(c)
		of := &lostState{component: c, why: why}
		lost = append(lost, of)
		if in == nil {
			return func(statefile.Record) { of.states++ }
		}
		e.alias(in, c.Hash)
		l, _ := in.component.(lasting)
		return func(r statefile.Record) {
			slots, ok := l.restore(&r, at)
			if !ok {
				of.states++
				return
			}
			all.Keys++
			all.Slots += slots
		}
	})
	for _, in := range installed {
		if k, ok := in.component.(asker); ok && e.overrides != nil { // about the keys that were read
			k.askAgain()
		}
	}
	for _, l := range lost {
		if l.states > 0 {
			all.Dropped += l.states
			e.logger.Warn("headgate: what the state file has of a component is dropped, and counts no more", "policy", l.component.Policy,
				"component", l.component.ID, "states", l.states, "reason", l.why)
		}
	}
	return all
}

// A renamed component knows values by names that the engine's secret makes.
type renamed interface{ rename() }

// lostState counts the states of a component that were not taken.
type lostState struct {
	component statefile.Component
	states    int
	why       string
}

// match finds the component in force that the states are of. Otherwise why says what is different.
func (r *rules) match(c statefile.Component) (in *installed, why string) {
	in = r.byName[componentName{c.Policy, c.ID}]
	if in == nil {
		return nil, "no policy has the component"
	}
	mode, ok := "", false
	if l, is := in.component.(lasting); is {
		mode, ok = l.lasts()
	}
	switch {
	case in.name == c.Kind && !ok:
		return nil, "its state is in a store now"
	case in.name != c.Kind:
		return nil, "it is of another kind now"
	case in.identity().LabelKey != c.Label:
		return nil, "it goes by another label now"
	case mode != c.Mode:
		return nil, "it fills in another way now"
	default:
		return in, "there is no room for their keys, or they are of a longer or shorter window"
	}
}

// alias has clients end flows at the component by a hash that its configuration had before.
func (e *Engine) alias(in *installed, hash string) {
	before := identity{in.named.policy, hash, in.named.id}
	if !in.kind.slots || before == in.named {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	in.before = append(in.before, before)
	e.holders[before] = append(slices.Clip(e.holders[before]), in.component)
}

// forget removes the component from those that clients end flows at. The caller holds e.mu.
func (e *Engine) forget(in *installed) {
	for _, named := range append(in.before, in.named) {
		left := slices.DeleteFunc(slices.Clone(e.holders[named]), func(c component) bool { return c == in.component })
		if e.holders[named] = left; len(left) == 0 {
			delete(e.holders, named)
		}
	}
}

// HoldOff has no flow get slots before so much time has passed.
func (a *agent) HoldOff(d time.Duration) {
	e := a.engine()
	e.hold.Until(e.now() + min(int64(d), source.Century))
}

// HeldOff returns how many flows were rejected because of HoldOff.
func (a *agent) HeldOff() uint64 { return a.engine().hold.Rejected() }

// Logger returns the engine's logger.
func (a *agent) Logger() *slog.Logger { return a.engine().logger }

// save writes the states of all keys. The function appends one, and nothing if it is as good as fresh.
func (k *keyed[S, R]) save(w *statefile.Writer, appendState func(b []byte, e *keys.Entry[S]) []byte) (n int) {
	var b []byte
	if k.table != nil {
		for e := range k.table.Entries {
			if !e.LockLive() {
				continue
			}
			b = appendState(b[:0], e)
			e.Unlock()
			if key, _ := e.Key(); len(b) > 0 && w.Key(key, b) {
				n++
			}
		}
	}
	e := k.single
	if k.table != nil {
		e = k.table.Spill()
	}
	e.Lock()
	b = appendState(b[:0], e)
	e.Unlock()
	if len(b) > 0 && w.Shared(b) {
		n++
	}
	return n
}

// restore calls take with the entry that the state is of, locked. It reports false if there is no room for its key.
func (k *keyed[S, R]) restore(r *statefile.Record, now int64, take func(*keys.Entry[S]) bool) bool {
	var e *keys.Entry[S]
	switch {
	case r.Shared && k.table == nil:
		e = k.single
		e.Lock()
	case r.Shared:
		e = k.table.Spill()
		e.Lock()
	case k.table == nil || len(r.Key) > keys.MaxName:
		return false
	default:
		if e = k.table.LockOwn(string(r.Key), now, nil); e == nil {
			return false
		}
	}
	defer e.Unlock()
	return take(e)
}

func (l *limiter[S]) lasts() (string, bool) { return modeOf(l.terms.Load().own.rule) }

func (l *limiter[S]) save(w *statefile.Writer, now int64) int {
	return l.keyed.save(w, func(b []byte, e *keys.Entry[S]) []byte {
		return lastingOf(l.of(e)).Append(b, &e.State, now)
	})
}

func (l *limiter[S]) restore(r *statefile.Record, at source.Restoring) (slots int, ok bool) {
	ok = l.keyed.restore(r, at.Now, func(e *keys.Entry[S]) (ok bool) {
		slots, ok = lastingOf(l.of(e)).Restore(&e.State, r.State, at)
		return ok
	})
	return slots, ok
}

func (s *scheduler[S]) lasts() (string, bool) { return modeOf(s.terms.Load().own.rule) }

// save writes what flows have taken. Flows that wait are not written: they end with the process.
func (s *scheduler[S]) save(w *statefile.Writer, now int64) int {
	return s.keyed.save(w, func(b []byte, e *keys.Entry[line[S]]) []byte {
		return lastingOf(s.of(e)).Append(b, &e.State.tokens, now)
	})
}

func (s *scheduler[S]) restore(r *statefile.Record, at source.Restoring) (slots int, ok bool) {
	ok = s.keyed.restore(r, at.Now, func(e *keys.Entry[line[S]]) (ok bool) {
		slots, ok = lastingOf(s.of(e)).Restore(&e.State.tokens, r.State, at)
		return ok
	})
	return slots, ok
}

// lastingOf returns the source of a key, whose states are written.
func lastingOf[S any](n *numbers[source.Source[S]]) source.Lasting[S] {
	l, _ := n.rule.(source.Lasting[S])
	return l
}

// modeOf returns the mode of the source; ok is false if its states are not written.
func modeOf[S any](from source.Source[S]) (mode string, ok bool) {
	l, ok := from.(source.Lasting[S])
	if !ok {
		return "", false
	}
	return l.Mode(), true
}

func (b *circuitBreaker) lasts() (string, bool) { return "", true }

func (b *circuitBreaker) save(w *statefile.Writer, now int64) int {
	return b.keyed.save(w, func(to []byte, e *keys.Entry[breaker.State]) []byte {
		return b.of(e).rule.Append(to, &e.State, now)
	})
}

func (b *circuitBreaker) restore(r *statefile.Record, at source.Restoring) (slots int, ok bool) {
	ok = b.keyed.restore(r, at.Now, func(e *keys.Entry[breaker.State]) bool {
		opened, ok := b.of(e).rule.Restore(&e.State, r.State, at)
		if opened {
			b.unclosed.Add(1)
		}
		return ok
	})
	return 0, ok
}

// lasts returns how the ramp begins: by itself, or when the host moves it. A ramp whose Start has changed begins anew. A store outlives the
// process without a file.
func (l *loadRamp) lasts() (string, bool) {
	if l.ramp.shared != nil {
		return "", false
	}
	if l.ramp.starts {
		return "starts", true
	}
	return "waits", true
}

// save writes how far the ramp is, its direction, and whether it has left its beginning.
func (l *loadRamp) save(w *statefile.Writer, now int64) int {
	p := l.ramp.now.Load()
	b := binary.AppendVarint(nil, l.ramp.along(p, now))
	b = binary.AppendVarint(b, p.direction)
	left := byte(0)
	if p.left {
		left = 1
	}
	if !w.Shared(append(b, left)) {
		return 0
	}
	return 1
}

// restore puts the ramp where it would be now. It has gone on meanwhile.
func (l *loadRamp) restore(r *statefile.Record, at source.Restoring) (slots int, ok bool) { //nolint:unparam // it is a lasting
	c := statefile.NewCursor(r.State)
	p := &position{at: c.Varint(), since: at.Then, direction: c.Varint(), left: c.Byte() != 0}
	if !c.Done() || p.direction < -1 || p.direction > 1 || !r.Shared {
		return 0, false
	}
	p.at = min(max(p.at, 0), l.ramp.length)
	l.ramp.now.Store(p)
	return 0, true
}
