package httpguard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/internal/adaptor"
	"github.com/headgate-go/headgate/internal/retries"
)

// A Transport is an http.RoundTripper that makes each request a flow. It can keep the quota of a third party, or bound
// what is in flight to it. Make one with [NewTransport].
//
// A request is sent if its flow runs. Before that, it may wait in a queue of the agent, for as long as the check
// timeout of [WithParams] and the request's context allow. If the flow does not run, the request is not sent, and fails
// with the flow's error. http.Client wraps the error in a *url.Error: errors.Is finds flowctl.ErrRejected in it, and
// errors.AsType a *flowctl.RejectedError. Each redirect is a request and a flow of its own.
//
// The flow ends when the response's body is closed or read to its end, or when there is no response. So bodies must be
// closed, as net/http requires anyway: until then the flow holds its slot. If a connection switches protocols, the flow
// ends when the connection is closed. The flow is in the context of the response's Request, for flowctl.FromContext. A body
// that says what the request cost can settle it: when Read returns the last bytes, the flow has not ended.
//
// A flow's status is Error if the request fails and its own context was not canceled, if the body breaks off, or if the
// response's status is 429, or 500 or more. Params.IsFailure can decide otherwise, see [WithParams].
//
// # Retry-After
//
// When an upstream answers 429 or 503 with a Retry-After, requests for the same host and port at the same control point are
// not sent before that time, however they spell the host. They fail at once with a [PausedError], start no flow and take
// nothing from a limit. With [WithMaxWait] they wait instead. The request that got the answer can be sent again, see
// [WithRetries].
//
// If a flow waits in a queue when the pause begins, its request fails when its turn comes, or waits until the pause is over
// and starts another flow. The flow gives back what it got: tokens and slots of an engine in this process, and slots of a remote agent. Tokens of a remote agent stay taken,
// because the protocol has no message to give them back.
//
// A pause lasts a minute at most. [WithMaxPause] changes that, or turns pauses off. A Transport remembers 1024 pauses,
// and drops those that end first if there are more. If the client is nil or in dry run, there are no pauses. The client
// counts pauses by its meter provider, and logs them.
type Transport struct {
	guard  *guard
	base   http.RoundTripper
	rules  *retries.Rules // of waits and retries
	pauses pauses
}

var _ http.RoundTripper = (*Transport)(nil)

// NewTransport makes a Transport that sends by base; nil means http.DefaultTransport. A nil client switches flow control
// off.
func NewTransport(client headgate.Starter, controlPoint string, base http.RoundTripper, opts ...TransportOption) *Transport {
	if base == nil {
		base = http.DefaultTransport //nolint:forbidigo // what nil means to http.Client too
	}
	g := newGuard(client, controlPoint, func(status int) bool {
		return status == http.StatusTooManyRequests || status >= http.StatusInternalServerError
	})
	for _, o := range opts {
		if o != nil {
			o.applyToTransport(g)
		}
	}
	g.ready()
	return &Transport{guard: g, base: base, rules: retries.New(retries.Policy(g.retryPolicy))}
}

// CloseIdleConnections closes those of the base, if it can. http.Client calls it.
func (t *Transport) CloseIdleConnections() {
	if c, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// RoundTrip sends the request when its flow runs, and again where [WithRetries] says so. It does not change the request,
// and closes its body in any case.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.guard.Skip(r.Context(), r) {
		return t.base.RoundTrip(r)
	}
	s := sending{transport: t, request: r, controlPoint: t.guard.ControlPoint(r.Context(), r)}
	if t.guard.retries {
		t.rules.Budget.Deposit()
	}
	for {
		flow, err := s.admit()
		if err != nil {
			closeBody(s.request)
			return nil, err
		}
		s.attempt++
		resp, sent, err := t.send(s.request, flow, s.controlPoint)
		if err != nil || resp == nil || !t.guard.retries {
			return resp, err
		}
		again, err := s.again(resp, sent)
		if err != nil {
			closeBody(s.request)
			return nil, err
		}
		if !again {
			return resp, nil
		}
	}
}

// send sends a request whose flow runs. If the response has a body, the body ends the flow.
func (t *Transport) send(r *http.Request, flow started, controlPoint string) (*http.Response, *trip, error) {
	trip := &trip{flow: adaptor.NewEnder(r.Context(), flow.Flow)}
	ctx := flow.Context()
	if t.guard.retries {
		ctx, trip.cancel = context.WithCancel(ctx)
	}
	returned := false
	defer func() {
		if !returned {
			trip.fail()
		}
	}()
	resp, err := t.base.RoundTrip(r.WithContext(ctx))
	if err != nil || resp == nil {
		returned = true
		if err == nil { // http.Client says what is wrong with that
			trip.end(errNoResponse)
		} else {
			trip.end(err)
		}
		return resp, trip, err
	}
	t.pauses.heed(flow.Context(), r, controlPoint, resp, t.guard.maxPause) // before the flow ends: then the next may have its slot
	if err := flow.failure(resp.StatusCode); err != nil {
		flow.SetError(err) // now, because the caller may cancel before the body has ended
		trip.failed = true
	}
	returned = true
	if len(t.guard.costs) > 0 {
		t.guard.costs.settle(flow.Flow, resp.Header)
		trip.response, trip.costs = resp, t.guard.costs
	}
	body, both := resp.Body.(io.ReadWriteCloser)
	switch {
	case resp.Body == nil, resp.Body == http.NoBody:
		trip.end(nil)
	case both && resp.StatusCode == http.StatusSwitchingProtocols:
		resp.Body = &switched{body, trip}
	default:
		resp.Body = &content{resp.Body, trip}
	}
	return resp, trip, nil
}

var errNoResponse = errors.New("the transport gave neither a response nor an error")

// outgoing returns the request as it will be sent. A request that a reverse proxy passes on still has fields of the
// request that it received.
func outgoing(r *http.Request) *http.Request {
	if r.RequestURI == "" && r.TLS == nil {
		return r
	}
	sent := *r
	sent.RequestURI, sent.TLS = "", nil
	return &sent
}

func closeBody(r *http.Request) {
	if r.Body != nil {
		_ = r.Body.Close()
	}
}

// A trip is the flow of a request that was sent.
type trip struct {
	flow   adaptor.Ender
	cancel context.CancelFunc // ends the request, where it may be retried; else nil
	failed bool               // by the response's status, which the flow knows
	closed atomic.Bool
	read   atomic.Bool // the body, to its end, which the caller has not seen

	// Where there may be a trailer that says what the flow costs.
	response *http.Response
	costs    costHeaders
}

// end ends the flow, the first time.
func (t *trip) end(err error) {
	if t.cancel != nil {
		defer t.cancel()
	}
	if t.failed {
		t.flow.EndAsIs()
	} else {
		t.flow.End(err)
	}
}

// fail ends the flow after a panic.
func (t *trip) fail() {
	if t.cancel != nil {
		defer t.cancel()
	}
	t.flow.Fail()
}

// complete ends the flow of a body that has been read to its end.
func (t *trip) complete() {
	if t.response != nil {
		t.costs.settle(t.flow.Flow, t.response.Trailer)
	}
	t.end(nil)
}

// broke is called with the errors of a body.
func (t *trip) broke(err error) {
	if !t.closed.Load() { // a body that is closed while it is read was not cut off
		t.end(err)
	}
}

func (t *trip) close(body io.Closer) error {
	t.closed.Store(true)
	defer t.end(nil)
	return body.Close()
}

// content is the body of a response. It returns the last bytes without io.EOF, so that the flow has not ended when they are read:
// they may say what it costs.
type content struct {
	io.ReadCloser
	trip *trip
}

func (c *content) Read(p []byte) (int, error) {
	if c.trip.read.Load() {
		c.trip.complete()
		return 0, io.EOF
	}
	n, err := c.ReadCloser.Read(p)
	switch {
	case err == nil:
	case err != io.EOF: // a wrapped one is no end
		c.trip.broke(err)
	case n > 0:
		c.trip.read.Store(true)
		return n, nil
	default:
		c.trip.complete()
	}
	return n, err
}

func (c *content) Close() error {
	if c.trip.read.Load() {
		c.trip.complete()
	}
	return c.trip.close(c.ReadCloser)
}

// switched is the body of a response after which the connection speaks another protocol. When reading has ended,
// writing can go on.
type switched struct {
	io.ReadWriteCloser
	trip *trip
}

func (s *switched) Read(p []byte) (int, error) {
	n, err := s.ReadWriteCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.trip.broke(err)
	}
	return n, err
}

func (s *switched) Close() error { return s.trip.close(s.ReadWriteCloser) }

// CloseWrite ends writing, if the connection can do that. Reverse proxies call it.
func (s *switched) CloseWrite() error {
	if c, ok := s.ReadWriteCloser.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return fmt.Errorf("CloseWrite: %w", http.ErrNotSupported)
}
