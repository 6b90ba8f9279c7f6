package httpguard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// A response watches what a handler answers.
type response struct {
	http.ResponseWriter
	request http.Request
	ctx     requestContext // of the request
	flow    started
	obeyed  bool // the request's headers are the agent's
	decided bool // the final status is known, or there will be none
	failed  bool // the flow knows that the handler has failed
}

// A requestContext is the flow's context. A request keeps it in an unexported field, where package fmt calls no method. It shows
// what a pointer there leads to, which is another pointer here, and not the flow with its labels.
type requestContext struct{ context.Context }

func (c *requestContext) String() string             { return "httpguard.Context" }
func (c *requestContext) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, c.String()) }

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// handBack makes the original request look as if the handler had got it, and not a copy. Then middleware around this
// one can log the pattern and path values that a mux found, and the server can remove the files of a parsed form. The
// context stays. The headers stay too if the agent changed those of the copy.
func (w *response) handBack(r *http.Request) {
	header, trailer := r.Header, r.Trailer
	*r = *w.request.WithContext(r.Context())
	if w.obeyed {
		r.Header = header
	}
	if r.Trailer == nil { // net/http sets trailers that were not announced in the request that came
		r.Trailer = trailer
	}
}

// decide notes the response's status. The first final one counts.
func (w *response) decide(status int) {
	if status >= 100 && status < 200 && status != http.StatusSwitchingProtocols || w.decided {
		return
	}
	w.decided = true
	err := w.flow.failure(status)
	if err == nil {
		return
	}
	if ctx := w.request.Context(); errors.Is(ctx.Err(), context.Canceled) {
		err = errors.Join(err, context.Cause(ctx)) // so that the flow sees whose cancellation it was
	}
	w.fail(err)
}

// fail tells the flow of an error at once, because the client may leave before the handler returns.
func (w *response) fail(err error) {
	if w.flow.ShouldRun() {
		w.flow.SetError(err)
		w.failed = true
	}
}

func (w *response) WriteHeader(status int) {
	w.decide(status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	w.decide(http.StatusOK)
	return w.ResponseWriter.Write(p)
}

func (w *response) WriteString(s string) (int, error) {
	w.decide(http.StatusOK)
	return io.WriteString(w.ResponseWriter, s)
}

// ReadFrom leads to the ReaderFrom below, which may have the kernel send a file.
func (w *response) ReadFrom(src io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, src)
	if n > 0 { // else nothing was written, and the status may still change
		w.decide(http.StatusOK)
	}
	return n, err
}

// FlushError is for http.ResponseController, which asks for it first.
func (w *response) FlushError() error {
	err := http.NewResponseController(w.ResponseWriter).Flush()
	if !errors.Is(err, http.ErrNotSupported) {
		w.decide(http.StatusOK)
	}
	return err
}

// CloseNotify is for gin's Stream. The request's context has the same information.
func (w *response) CloseNotify() <-chan bool {
	gone := make(chan bool, 1)
	context.AfterFunc(w.request.Context(), func() { gone <- true })
	return gone
}

func (w *response) hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	w.decided = true
	if err != nil {
		w.fail(err)
	}
	return conn, rw, err
}

// visible returns the ResponseWriter for the handler. Handlers find out by type assertions whether they can stream or
// take over the connection. So it has these methods only if the ResponseWriter below has them.
func (w *response) visible() http.ResponseWriter {
	_, flusher := w.ResponseWriter.(http.Flusher)
	_, hijacker := w.ResponseWriter.(http.Hijacker)
	_, pusher := w.ResponseWriter.(http.Pusher)
	switch {
	case flusher && hijacker && pusher:
		return withAll{withFlushHijack{withFlush{w}}}
	case flusher && hijacker:
		return withFlushHijack{withFlush{w}}
	case flusher && pusher:
		return withFlushPush{withFlush{w}}
	case hijacker && pusher:
		return withHijackPush{withHijack{w}}
	case flusher:
		return withFlush{w}
	case hijacker:
		return withHijack{w}
	case pusher:
		return withPush{w}
	default:
		return w
	}
}

// Each of these is one pointer, and costs no allocation.
type (
	withFlush       struct{ *response }
	withHijack      struct{ *response }
	withPush        struct{ *response }
	withFlushHijack struct{ withFlush }
	withFlushPush   struct{ withFlush }
	withHijackPush  struct{ withHijack }
	withAll         struct{ withFlushHijack }
)

func (w withFlush) Flush() { _ = w.FlushError() }

func (w withHijack) Hijack() (net.Conn, *bufio.ReadWriter, error)      { return w.hijack() }
func (w withFlushHijack) Hijack() (net.Conn, *bufio.ReadWriter, error) { return w.hijack() }

func (w *response) push(target string, opts *http.PushOptions) error {
	if p, ok := w.ResponseWriter.(http.Pusher); ok {
		return p.Push(target, opts)
	}
	return http.ErrNotSupported
}

func (w withPush) Push(target string, opts *http.PushOptions) error { return w.push(target, opts) }

func (w withFlushPush) Push(target string, opts *http.PushOptions) error { return w.push(target, opts) }

func (w withHijackPush) Push(target string, opts *http.PushOptions) error {
	return w.push(target, opts)
}
func (w withAll) Push(target string, opts *http.PushOptions) error { return w.push(target, opts) }
