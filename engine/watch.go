package engine

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/deadline"
	"github.com/headgate-go/headgate/internal/policyfiles"
	"github.com/headgate-go/headgate/policy"
)

// DefaultWatchInterval is how often [Engine.Watch] reads the files if WatchParams set no interval.
const DefaultWatchInterval = 2 * time.Second

// WatchParams are the parameters of [Engine.Watch]. The zero value has the defaults.
type WatchParams struct {
	// Interval is the time between two looks at the files. 0 means [DefaultWatchInterval]; a negative one is an error.
	Interval time.Duration

	// OnReload is called after each change that Watch finds. Its argument is nil if the changed policies are in force, and the
	// error otherwise. OnReload may be nil. The goroutine that watches calls it, under no lock. It must not close the engine,
	// because Close waits for that goroutine.
	OnReload func(error)
}

// Watch puts the policies of a file or a directory into force, and again whenever they change, until ctx ends or the engine is
// closed. It applies them once before it returns, and continues in a goroutine of the engine. If the first time fails, Watch
// returns the error. Then the policies in force stay, and nothing is watched.
//
// Watch reads the files at each interval and goes by their content, so it also notices the new content of mounted config maps, of
// files on network file systems and of files that an editor has replaced. Which files of a directory count, and how large they
// may be, is as in [policy.Load]. It applies a change by [Engine.Apply] when it has read the same content twice in a row, which
// takes one to two intervals. So it does not apply a file that is still being written. All files are applied at once, or none. If
// a file is missing or wrong, the policies in force stay, and the error is reported once. Reports go to the callback, to the log
// (see [WithLogger]) and to [Stats].
//
// A file that is not regular, such as a FIFO, is an error. If a file system does not answer, Watch and Close do not wait for it
// after ctx has ended or the engine is closed. The read then continues in a goroutine until it fails, and its result is dropped.
//
// An engine watches one path at a time; a second call is an error. If Apply puts other policies into force, they stay until the
// files change.
func (e *Engine) Watch(ctx context.Context, path string, params WatchParams) error {
	w := &watch{engine: e, path: path, interval: params.Interval, onReload: params.OnReload}
	switch {
	case params.Interval < 0:
		return w.failed(errors.New("the interval is negative"))
	case params.Interval == 0:
		w.interval = DefaultWatchInterval
	}
	if err := ctx.Err(); err != nil {
		return w.failed(err)
	}
	if !e.reloads.begin() {
		return w.failed(errors.New("the engine watches a path already"))
	}
	if err := w.first(ctx); err != nil {
		e.reloads.end()
		return w.failed(err)
	}
	return nil
}

// A watch is a path whose policies are kept in force.
type watch struct {
	engine   *Engine
	path     string
	interval time.Duration
	onReload func(error)

	reported finding // what is in force, or was reported as an error
	seen     finding // by the last look
}

// A finding is what a look at the files found.
type finding struct {
	digest policyfiles.Digest
	err    string
}

func (w *watch) failed(err error) error {
	return deadline.Errorf("headgate: engine: watch %q: %w", w.path, err)
}

// look is what is in the files now. The error says that the watch is to end.
func (w *watch) look(ctx context.Context) (finding, error) {
	return whileOpen(ctx, w.engine, func() finding {
		digest, err := policyfiles.DigestOf(w.path)
		if err != nil {
			return finding{err: err.Error()}
		}
		return finding{digest: digest}
	})
}

// errEnded is why a watch that has begun to read does not go on.
var errEnded = errors.New("the watch has ended")

// whileOpen calls read, and waits for it until ctx ends or the engine is closed. Nothing can end a read of a file system
// that does not answer, so read has a goroutine of its own, which may outlive the engine.
func whileOpen[T any](ctx context.Context, e *Engine, read func() T) (T, error) {
	result := make(chan T, 1)
	go func() { result <- read() }()
	select {
	case got := <-result:
		return got, nil
	case <-ctx.Done():
		return *new(T), errors.Join(errEnded, ctx.Err())
	case <-e.done:
		return *new(T), errors.Join(errEnded, agentapi.ErrClosed)
	}
}

// mostTries is how often the first look is repeated if the files change while they are read.
const mostTries = 10

// first applies the policies, and begins to watch them.
func (w *watch) first(ctx context.Context) error {
	for tries := 1; ; tries++ {
		var err error
		if w.seen, err = w.look(ctx); err != nil {
			return whyEnded(ctx)
		}
		settled, err := w.apply(ctx)
		if errors.Is(err, errEnded) {
			return whyEnded(ctx)
		}
		if err != nil {
			return err
		}
		if settled {
			break
		}
		if tries == mostTries {
			return errors.New("the files change while they are read")
		}
	}
	w.reported = w.seen
	e := w.engine
	e.applying.Lock()
	defer e.applying.Unlock()
	if e.closed.Load() {
		return agentapi.ErrClosed
	}
	e.reloads.note(nil)
	e.running.Go(func() { w.run(ctx) })
	return nil
}

// whyEnded is why the first look has not ended.
func whyEnded(ctx context.Context) error { return cmp.Or(ctx.Err(), agentapi.ErrClosed) }

// run looks at the files until ctx ends or the engine is closed.
func (w *watch) run(ctx context.Context) {
	defer w.engine.reloads.end()
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		select {
		case <-w.engine.done:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := w.look(ctx)
		if err != nil {
			return
		}
		before := w.seen
		w.seen = now
		if now == w.reported || now != before { // a change must last for two looks: the file may be half written
			continue
		}
		settled, err := w.apply(ctx)
		if errors.Is(err, errEnded) || errors.Is(err, agentapi.ErrClosed) {
			return
		}
		if !settled && err != nil {
			again, ended := w.look(ctx)
			if ended != nil {
				return
			}
			settled = again == now
		}
		if settled {
			w.reported = now
			w.report(err)
		}
	}
}

// apply puts the policies into force. It reports false if the files have changed since the last look: then it has put
// nothing into force.
func (w *watch) apply(ctx context.Context) (settled bool, err error) {
	type loaded struct {
		policies []policy.Policy
		err      error
	}
	files, err := whileOpen(ctx, w.engine, func() (l loaded) {
		l.policies, l.err = policy.Load(w.path)
		return l
	})
	if err = cmp.Or(err, files.err); err != nil {
		return false, err
	}
	switch now, err := w.look(ctx); {
	case err != nil:
		return false, err
	case now != w.seen:
		return false, nil
	}
	return true, w.engine.Apply(files.policies)
}

// report says what has become of a change.
func (w *watch) report(err error) {
	w.engine.reloads.note(err)
	if err != nil {
		w.engine.logger.Warn("headgate: the changed policies are not in force; those before stay", "path", w.path, "error", err)
	} else {
		w.engine.logger.Info("headgate: the changed policies are in force", "path", w.path)
	}
	if w.onReload != nil {
		w.onReload(err)
	}
}

// ReloadStats say which changes of the files [Engine.Watch] has applied.
type ReloadStats struct {
	// Applied counts how often policies were put into force, the first time included. LastApplied is when that was last.
	Applied     uint64
	LastApplied time.Time

	// Failed counts the changes that were not put into force. LastFailed is when that was last.
	Failed     uint64
	LastFailed time.Time

	// Error says why the present content of the files is not in force. It is "" if the content is in force.
	Error string
}

// reloads are the watch's place in the engine. The zero value is ready.
type reloads struct {
	mu       sync.Mutex
	watching bool
	stats    ReloadStats
}

// begin reports whether nothing is watched yet.
func (r *reloads) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	again := r.watching
	r.watching = true
	return !again
}

func (r *reloads) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watching = false
}

// note counts what has become of a change.
func (r *reloads) note(err error) {
	now := time.Now().Round(0)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.stats.Failed++
		r.stats.LastFailed, r.stats.Error = now, err.Error()
		return
	}
	r.stats.Applied++
	r.stats.LastApplied, r.stats.Error = now, ""
}

func (r *reloads) read() ReloadStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}
