// Package flowctl is the client. It starts flows, reports whether they should run, and ends them. Most programs wrap
// functions with package headgate, which uses this package. Use this package directly if your code needs the flow
// itself.
//
//	client, err := flowctl.Dial("agent.example:443", flowctl.WithAPIKey(key))
//	…
//	flow := client.Start(ctx, "checkout", flowctl.Params{Labels: map[string]string{"user_id": id}})
//	defer flow.EndWith(&err)
//	if !flow.ShouldRun() {
//		return flow.Err()
//	}
//
// A client asks an agent. [Dial] connects to one across the network that speaks the Aperture protocol. [New] takes an
// engine that runs in this process. All else is the same for both.
//
// # What is decided
//
//	decision     when                               ShouldRun                                  Err
//	Accepted     the agent said yes                 yes                                        nil
//	Rejected     the agent said no                  no                                         *RejectedError, ErrRejected
//	Unreachable  no usable answer came              yes, unless RampMode or FailClosed is set  *UnreachableError, ErrUnreachable
//	Canceled     the caller's context ended first   no                                         matches ctx.Err() and context.Cause(ctx)
//	Invalid      the agent could not be asked       no                                         ErrInvalid
//
// With [WithDryRun], and with a nil client, every flow runs. The decision of a flow in a dry run is what it would have been
// without the dry run.
//
// A remote agent may have admitted a flow when the caller's context ends. So the check continues for up to 200 ms, and no longer
// than its timeout. Start returns when the answer has come, or when that time has passed. The flow is Canceled, and ending it
// gives back the slots that it holds. If the answer comes later, or after the check timeout, the client's session tells an agent
// of Headgate that the flow does not run. Any other agent takes the slots back when its own limit on the age of flows has passed.
package flowctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/bounds"
	"github.com/headgate-go/headgate/internal/flight"
	"github.com/headgate-go/headgate/labels"
)

// An Agent decides about flows in this process: an engine. Only Headgate implements it, so that it can grow.
type Agent interface {
	agentapi.Host
}

// A Client starts flows. It is safe for concurrent use. A nil client switches flow control off: it accepts every flow
// and asks no agent.
type Client struct {
	agent        agentapi.Agent
	remote       *remote // the agent, when it is one
	checkTimeout time.Duration
	forget       func()           // has the agent forget the check timeout; nil if it does not know it
	shared       *agentapi.Shared // what every flow has; nil when that is nothing
	patient      atomic.Pointer[patient]
	baggage      bool
	baggageKeys  []string
	dryRun       bool
	logger       *slog.Logger
	observer     *observer // nil without a tracer and a meter
	onDecision   func(context.Context, *Flow)
	cancelLost   bool            // flows whose slots are lost
	leaser       agentapi.Leaser // the agent, if flows may lose their slots there; nil otherwise
	endLog       limitedLog
	silenceLog   limitedLog
	invalidLog   limitedLog
	unstoredLog  limitedLog
	pauseLog     limitedLog
	pausedLog    limitedLog
	labelLog     limitedLog
	settleLog    limitedLog
	closed       atomic.Bool
	done         chan struct{} // closed by Close
	runs         flight.Runs   // of package headgate's cached functions
}

// New makes a client of an agent in this process. Closing the client leaves the agent open.
func New(agent Agent, opts ...Option) (*Client, error) {
	if v := reflect.ValueOf(agent); !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil() {
		return nil, errors.New("headgate: new client: no agent")
	}
	cfg, err := newConfig(false, opts)
	if err != nil {
		return nil, fmt.Errorf("headgate: new client: %w", err)
	}
	return newClient(agent.Agent(), cfg)
}

func newClient(agent agentapi.Agent, cfg *config) (*Client, error) {
	c := &Client{
		agent:        agent,
		checkTimeout: cfg.checkTimeout,
		baggage:      cfg.baggage,
		baggageKeys:  cfg.baggageKeys,
		dryRun:       cfg.dryRun,
		logger:       cfg.logger,
		onDecision:   cfg.onDecision,
		cancelLost:   cfg.cancelLost,
		done:         make(chan struct{}),
	}
	if l, ok := agent.(agentapi.Leaser); ok && l.Leases() {
		c.leaser = l
	}
	c.runs.Unstored = c.unstored
	c.runs.Closed = c.isClosed
	c.runs.DryRun = cfg.dryRun
	cfg.shared.DryRun = cfg.dryRun
	if len(cfg.shared.Defaults) > 0 || cfg.shared.Service != "" || cfg.shared.DryRun {
		c.shared = &cfg.shared
	}
	var err error
	if c.observer, err = newObserver(cfg.tracer, cfg.meter); err != nil {
		return nil, fmt.Errorf("headgate: new client: %w", err)
	}
	if cfg.meter != nil {
		if err := agent.Instrument(cfg.meter); err != nil {
			return nil, fmt.Errorf("headgate: new client: %w", err)
		}
	}
	if !cfg.dryRun { // no flow of a dry run waits
		c.forget = agent.Expect(cfg.checkTimeout)
	}
	return c, nil
}

// Start asks the agent about a flow, and returns the flow with its decision. It waits for the answer for at most the check
// timeout, or longer if [Params].MaxWait allows it. If ctx ends first, it waits up to 200 ms more for a remote agent's answer.
// The control point has 1 to 255 bytes. Every flow must be ended, whatever the decision; see [Flow.End] and [Flow.EndWith].
func (c *Client) Start(ctx context.Context, controlPoint string, params Params) *Flow {
	f := &Flow{parent: ctx, client: c, fails: params.IsFailure}
	f.req.ControlPoint = controlPoint
	if c == nil {
		f.decision, f.run = Accepted, true
		return f
	}
	if c.observer != nil {
		c.observer.start(f)
	}
	started := false
	defer func() { // a function of the program's panicked, so the caller never gets the flow
		if !started {
			_, _ = f.end(f.parent, true)
		}
	}()
	var err error
	if f.decision, err = c.decide(f.parent, f, &params); err != nil {
		_ = f.verdict.Fail(err)
	}
	switch {
	case f.decision == Accepted, c.dryRun:
		f.run = true
	case f.decision == Unreachable:
		f.run = !params.RampMode && params.OnUnreachable == FailOpen
	}
	switch {
	case c.leaser != nil:
		f.watchSlots()
	case c.cancelLost:
		f.cancelOnLostSlot()
	}
	if f.decision == Invalid {
		c.invalidLog.warn(c.logger, "headgate: a flow cannot be asked about", "error", err)
	}
	if c.observer != nil {
		c.observer.decided(f)
	}
	if c.onDecision != nil {
		c.onDecision(f.parent, f)
	}
	started = true
	return f
}

// decide gets the agent's decision into the flow.
func (c *Client) decide(ctx context.Context, f *Flow, params *Params) (Decision, error) {
	if err := c.prepare(ctx, &f.req, params); err != nil {
		return Invalid, &invalidError{f.req.ControlPoint, err}
	}
	if ctx.Err() != nil {
		return Canceled, newCanceledError(ctx, f.req.ControlPoint)
	}
	if c.closed.Load() {
		return Unreachable, newUnreachableError(f.req.ControlPoint, agentapi.ErrClosed)
	}
	err := c.agent.Check(ctx, &f.req, &f.verdict)
	switch {
	case err == nil && f.verdict.Rejected():
		return Rejected, nil
	case err == nil:
		return Accepted, nil
	case callerEnded(ctx, err):
		return Canceled, newCanceledError(ctx, f.req.ControlPoint)
	case c.closed.Load() && c.remote != nil: // during the check: a shutdown must not let flows run that limits held back
		f.verdict.Reject(byClose())
		return Rejected, nil
	default:
		if !errors.Is(err, errBreakerOpen) && !refused(status.Code(err)) { // which are logged by themselves
			c.silenceLog.warn(c.logger, "headgate: the agent did not decide about a flow",
				"control_point", f.req.ControlPoint, "error", err)
		}
		return Unreachable, newUnreachableError(f.req.ControlPoint, err)
	}
}

// byClose is the rejection of flows that waited when their client or engine was closed.
func byClose() agentapi.Rejection {
	return agentapi.Rejection{Reason: agentapi.ReasonNoTokens, Cause: agentapi.CauseClosed}
}

// callerEnded reports whether a check failed because the caller's context ended, and not by the check's own timeout.
// The deadline's timer may not have fired yet when the answer is in.
func callerEnded(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return true
	}
	deadline, ok := ctx.Deadline()
	return ok && status.Code(err) == codes.DeadlineExceeded && !time.Now().Before(deadline)
}

// prepare fills the request. The error is what is wrong with it.
func (c *Client) prepare(ctx context.Context, req *agentapi.Request, params *Params) error {
	if err := bounds.CheckControlPoint(req.ControlPoint); err != nil {
		return err
	}
	looks, err := params.looksUp()
	if err != nil {
		return err
	}
	if looks { // also where the labels are wrong: a dry run still uses the caches
		own := &looking{lookup: agentapi.Lookup{Result: params.ResultCacheKey, Global: params.GlobalCacheKeys}}
		own.Lookup = &own.lookup
		req.Labels.Shared = &own.Shared
	}
	if err := params.checkLabels(); err != nil {
		return err
	}
	explicit, transport, err := labels.FromContext(ctx)
	if err != nil {
		return err
	}
	waits := c.bound(req, params)
	req.Labels.Params, req.Labels.Context = params.Labels, explicit
	if transport == nil && !c.baggage && !looks && !params.RampMode && params.HTTP == nil {
		if req.Labels.Shared = c.shared; waits != nil {
			req.Labels.Shared = &waits.Shared
		}
		return c.fit(&req.Labels)
	}
	own := req.Labels.Shared
	if own == nil {
		own = new(agentapi.Shared)
		req.Labels.Shared = own
	}
	own.RampMode = params.RampMode
	if waits != nil {
		own.Waiting = &waits.waiting
	}
	if c.shared != nil {
		own.Defaults, own.Service, own.DryRun = c.shared.Defaults, c.shared.Service, c.shared.DryRun
	}
	if params.HTTP != nil && c.remote != nil {
		return c.describe(ctx, &req.Labels, params.HTTP)
	}
	own.Transport = transport
	if c.baggage {
		own.Baggage = labels.FromBaggage(ctx, c.baggageKeys...)
	}
	return c.fit(&req.Labels)
}

// bound sets how long the check may take. It returns how long the flow may wait if that is apart, and nil otherwise.
func (c *Client) bound(req *agentapi.Request, params *Params) *patient {
	switch {
	case params.CheckTimeout > 0:
		req.Timeout = params.CheckTimeout
	case params.CheckTimeout == 0 && c.checkTimeout > 0:
		req.Timeout = c.checkTimeout
	case c.dryRun: // an agent that does not know dry runs could hold the flow without limit
		req.Timeout = defaultCheckTimeout
	}
	if params.MaxWait == 0 || c.dryRun {
		return nil
	}
	waiting := agentapi.Waiting{MaxWait: max(params.MaxWait, 0)}
	switch {
	case c.remote == nil:
		req.Timeout = 0
	case params.MaxWait < 0:
		waiting.Silence, req.Timeout = req.Timeout, 0
	default: // bounded in any case, because the agent may not know MaxWait
		waiting.Silence = req.Timeout
		req.Timeout = cmp.Or(req.Timeout, defaultCheckTimeout)
		req.Timeout += min(params.MaxWait, math.MaxInt64-req.Timeout)
	}
	if waiting == (agentapi.Waiting{}) {
		return nil
	}
	p := c.patient.Load()
	if p == nil || p.waiting != waiting {
		p = &patient{waiting: waiting}
		if c.shared != nil {
			p.Shared = *c.shared
		}
		p.Waiting = &p.waiting
		c.patient.Store(p)
	}
	return p
}

// patient is what flows with the same MaxWait and CheckTimeout share. A client keeps the one that it made last, because
// most programs have only one MaxWait.
type patient struct {
	agentapi.Shared
	waiting agentapi.Waiting
}

// looking is what a flow with cache keys has of its own, in one object.
type looking struct {
	agentapi.Shared
	lookup agentapi.Lookup
}

// end is Flow.End, once. An unused flow did not run although it was let in.
func (c *Client) end(ctx context.Context, f *Flow, unused bool) (EndResponse, error) {
	s := f.endStatus()
	if c.observer != nil {
		ctx = c.observer.ending(ctx, f)
		defer c.observer.end(f, s)
	}
	if !f.Success() && !f.holds() {
		return EndResponse{}, nil
	}
	if unused {
		if r, ok := c.agent.(agentapi.Reverter); ok {
			r.Revert(ctx, &f.req, &f.verdict)
			return EndResponse{}, nil
		}
	}
	o := agentapi.Outcome{Ended: agentapi.EndedUnused}
	if !unused {
		o.Ended = f.ending(s)
	}
	if f.run && !unused {
		if o.Costs = f.costs.Close(); o.Costs != nil {
			o.Labels = &f.req.Labels
		}
	}
	r, err := c.agent.End(ctx, &f.req, &f.verdict, o)
	if err != nil {
		c.endLog.warn(c.logger, "headgate: slots may not have been given back", "control_point", f.req.ControlPoint, "error", err)
		// The end is detached from ctx, so ctx is not why it failed.
		err = c.callError(context.WithoutCancel(ctx), opEnd, f.req.ControlPoint, err)
	}
	return EndResponse{Held: r.Held, Returned: r.Returned, Settled: r.Settled}, err
}

// Ready waits until the agent can be asked. If ctx ends first, the error matches the context's. Its method Cause() error says why
// the agent was not ready, and log/slog shows that too. Give ctx a deadline: Ready waits for an agent that is down, and also for
// a server that does not speak gRPC, or that has TLS if the client has none, or the reverse. It does not wait if the agent
// refuses the API key, or if the gRPC server does not speak the protocol. A nil client is always ready.
func (c *Client) Ready(ctx context.Context) error {
	if c == nil {
		return nil
	}
	if c.closed.Load() {
		return ErrClosed
	}
	return c.callError(ctx, opReady, "", c.agent.Ready(ctx))
}

// Close closes the client. It sends the remaining telemetry. For up to the end timeout, it also sends an agent of Headgate the
// costs and outcomes of flows that have ended, and their slots. Then it closes the connection if Dial opened it. If ctx ends
// first, Close cuts the connection and returns an error that matches the context's. A second Close does nothing.
//
// Close does not wait for flows. End them first: slots that they hold at a remote agent cannot be given back
// afterwards. Flows that start afterwards are Unreachable. Flows that a remote agent has not answered yet are Rejected,
// with [CauseClosed], so that a shutdown does not let them run. An agent in this process still decides about the flows
// that it was asked about.
func (c *Client) Close(ctx context.Context) error {
	if c == nil || c.closed.Swap(true) {
		return nil
	}
	close(c.done)
	if c.forget != nil {
		c.forget()
	}
	if c.remote == nil {
		return nil
	}
	err := c.remote.close(ctx)
	if err == nil {
		return nil
	}
	e := newCallError(callDetails{op: opClose, cause: err})
	if ended := ctx.Err(); ended != nil && errors.Is(err, ended) {
		e.match = ended
	}
	return e
}

// isClosed reports whether the client or its agent in this process is closed.
func (c *Client) isClosed() bool {
	if c.closed.Load() {
		return true
	}
	if agent, ok := c.agent.(agentapi.Closer); ok {
		select {
		case <-agent.Closed():
			return true
		default:
		}
	}
	return false
}

// A limitedLog logs one kind of event once a minute at most. The zero value is ready.
type limitedLog struct {
	mu      sync.Mutex
	last    time.Time
	skipped int
}

// warn logs a warning, and reports whether it was time to log.
func (l *limitedLog) warn(logger *slog.Logger, msg string, args ...any) bool {
	return l.log(logger.Warn, msg, args...)
}

// log logs by one of a logger's methods.
func (l *limitedLog) log(by func(msg string, args ...any), msg string, args ...any) bool {
	now := time.Now()
	l.mu.Lock()
	if !l.last.IsZero() && now.Sub(l.last) < time.Minute {
		l.skipped++
		l.mu.Unlock()
		return false
	}
	skipped := l.skipped
	l.last, l.skipped = now, 0
	l.mu.Unlock()
	by(msg, append(args, "unlogged_before", skipped)...)
	return true
}
