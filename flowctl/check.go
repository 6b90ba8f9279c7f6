package flowctl

import (
	"context"
	"maps"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/labels"
)

// A check is one question to a remote agent, and what is kept of the answer until the flow has ended. It is one object,
// so that a check allocates nothing else beyond gRPC's own call. It is also the call's codec: gRPC's own for Protocol
// Buffers, which bounds the answer and keeps its bytes if telemetry needs them.
type check struct {
	agentapi.VerdictDetails
	response checkv1.CheckResponse          // to Check
	http     *checkhttpv1.CheckHTTPResponse // to CheckHTTP; nil: the question was Check
	raw      []byte                         // response as it came, for telemetry; nil if it was not kept
	start    time.Time
	returned time.Time // when the check came back

	// What came from the agent meanwhile. On a connection of ours this is anything at all, for other calls too. On the
	// application's it is only what this call got.
	remote          *remote
	seen            uint64
	header, trailer metadata.MD

	number uint64                  // in the session; 0: it has none
	stay   *stay                   // at the agent, whose slots last as long as the session; nil if the flow has none
	slots  int                     // those
	cancel context.CancelCauseFunc // of the flow's context; nil if nothing cancels it

	late bool // the caller's context had ended; the answer only says what to give back

	ctx      context.Context // of the call
	detached detachedContext // above ctx, if the caller's can end
	named    sessionContext  // ctx, if the caller has no metadata to send
	end      context.CancelFunc
	unhook   func() bool // after it, the end of the caller's context does not end the call; nil: it never does
	codec    grpc.ForceCodecV2CallOption
	repeated int                           // elements that the answer may repeat of the question
	limit    grpc.MaxRecvMsgSizeCallOption // of the answer; 0: the connection's own, for one with cached values
	room     [6]grpc.CallOption
}

var (
	_ agentapi.RemoteAnswer = (*check)(nil)
	_ encoding.CodecV2      = (*check)(nil)
)

// Check asks the agent.
func (r *remote) Check(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) error {
	start, seen := time.Now(), r.received.Load()
	r.catchUp(seen)
	if !r.breaker.admit(start) {
		return errBreakerOpen
	}
	c := &check{remote: r, start: start, seen: seen}
	call := c.outlast(ctx, req.Timeout)
	defer c.release()
	r.session.await(call)
	c.number = r.session.begins(start)
	defer r.session.ends()
	if silence := req.Silence(); silence > 0 {
		var leave func()
		call, leave = r.vigil.attend(call, silence)
		defer leave()
	}
	err := c.ask(call, req)
	c.returned = time.Now()
	if err != nil {
		if silent := silenceOf(call); silent != nil {
			err = silent
		}
		r.failed(ctx, call, err, c)
		if c.number != 0 && !refused(status.Code(err)) {
			r.session.giveUp(c.number) // the agent may have admitted the flow all the same
		}
		return err
	}
	r.answered()
	c.Remote = c
	if agent := c.answer().GetAgentId(); agent != 0 && !req.DryRun() { // no slot is lost in a dry run: others may have what its flows hold
		if c.slots = wire.Holds(c.answer()); c.slots > 0 {
			c.stay = r.session.join(place{agent, c.answer().GetStoredSlots()}, c.slots, start)
		}
	}
	v.Start, v.Details = start.UnixNano(), &c.VerdictDetails
	if err := ctx.Err(); err != nil {
		c.late = true
		return err
	}
	c.read(req, v)
	if req.DryRun() && v.Rejected() && req.Lookup() != nil && c.answer().GetCacheLookupResponse() == nil {
		r.lookUp(call, req, v)
		c.returned = time.Now()
	}
	if r.dryDrops != nil {
		r.countDryRuns(ctx, req, c.answer())
	}
	return nil
}

// abandonAfter is how long a check goes on after its caller's context has ended. Only the answer names the slots that
// the flow holds if the agent has admitted it. Then the call is canceled, and the flow leaves the agent's queues. It is
// the default check timeout, so that a check with that timeout ends in the agent first: a call that is canceled earlier
// can lose the answer to a flow that leaves a queue at that moment.
const abandonAfter = defaultCheckTimeout

// outlast makes the context of the call for a caller. It ends abandonAfter later than the caller's, and at the latest
// after the timeout, if that is positive. Its Deadline is the caller's if that is earlier, because the agent gets it.
// Call release when the call has ended.
func (c *check) outlast(caller context.Context, timeout time.Duration) context.Context {
	parent, ends := caller, caller.Done() != nil
	if ends {
		c.detached.Context = caller
		parent = &c.detached
	}
	var call context.Context
	if timeout > 0 {
		call, c.end = context.WithTimeout(parent, timeout)
	} else {
		call, c.end = context.WithCancel(parent)
	}
	if !ends {
		return call
	}
	if timeout <= 0 || timeout > abandonAfter { // else the call ends by then anyway
		end := c.end
		c.unhook = context.AfterFunc(caller, func() { time.AfterFunc(abandonAfter, end) })
	}
	if deadline, ok := caller.Deadline(); ok {
		if own, ok := call.Deadline(); !ok || deadline.Before(own) {
			call = &toldContext{call, deadline}
		}
	}
	return call
}

// release frees what the call's context has.
func (c *check) release() {
	if c.unhook != nil {
		c.unhook()
	}
	c.end()
}

// A detachedContext has the values of a context, and never ends. It is [context.WithoutCancel] as a part of a check, so
// that a check allocates nothing for it.
type detachedContext struct{ context.Context }

func (*detachedContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (*detachedContext) Done() <-chan struct{}       { return nil }
func (*detachedContext) Err() error                  { return nil }

// A toldContext has a deadline that is for the agent alone.
type toldContext struct {
	context.Context
	deadline time.Time
}

func (c *toldContext) Deadline() (time.Time, bool) { return c.deadline, true }

// lookUp looks the keys up by a call of its own, for an agent that does not know dry runs: it sends no values with a
// rejection.
func (r *remote) lookUp(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) {
	m := new(checkv1.CacheLookupResponse)
	opts := append(slices.Clip(r.calls), grpc.ForceCodecV2(r.codec))
	err := r.conn.Invoke(r.sendable(ctx), checkv1.FlowControlService_CacheLookup_FullMethodName, wire.Lookup(req), m, opts...)
	if err = clipError(err); err != nil {
		v.More().Result.Err = err
		v.More().Global = make(map[string]agentapi.CacheAnswer)
		for _, key := range req.Lookup().Global {
			v.More().Global[key] = agentapi.CacheAnswer{Err: err}
		}
		return
	}
	wire.ReadLookup(req, m, v)
}

// countDryRuns counts the components that would have dropped the flow without a dry run.
func (r *remote) countDryRuns(ctx context.Context, req *agentapi.Request, m *checkv1.CheckResponse) {
	for _, d := range m.GetLimiterDecisions() {
		if d.GetDropped() && (d.GetDryRun() || req.DryRun()) {
			r.dryDrops.Add(ctx, 1, metric.WithAttributes(
				attribute.String("policy_name", d.GetPolicyName()),
				attribute.String("policy_hash", d.GetPolicyHash()),
				attribute.String("component_id", d.GetComponentId()),
			))
		}
	}
}

// ask asks the agent.
func (c *check) ask(ctx context.Context, req *agentapi.Request) error {
	c.ctx = c.remote.sendableWith(ctx, &c.named)
	defer func() { c.ctx = nil }() // the flow outlives it
	if req.Labels.HTTP() == nil {
		m := wire.Request(req)
		m.SessionCheck = c.number
		if req.Lookup() == nil {
			c.limit.MaxRecvMsgSize = maxAnswer + 2*textSize(m.GetLabels()) // the answer repeats the labels for telemetry, keys twice
		}
		if n := len(m.GetLabels()); n > labels.MaxLabels { // maxElements has room for that many
			c.repeated = 2 * n
		}
		return clipError(c.remote.conn.Invoke(c.ctx, checkv1.FlowControlService_Check_FullMethodName, m, &c.response, c.options()...))
	}
	m := wire.HTTPRequest(req)
	m.SessionCheck = c.number
	c.http = new(checkhttpv1.CheckHTTPResponse)
	// The answer has its check response twice, once in base64, and the labels in a header.
	c.limit.MaxRecvMsgSize = maxAnswer + 5*(textSize(m.GetRequest().GetHeaders())+textSize(m.GetLabels()))
	err := c.remote.conn.Invoke(c.ctx, checkhttpv1.FlowControlServiceHTTP_CheckHTTP_FullMethodName, m, c.http, c.options()...)
	clipDenied(c.http)
	return clipError(err)
}

// read reads the answer into v.
func (c *check) read(req *agentapi.Request, v *agentapi.Verdict) {
	if c.http != nil {
		wire.ReadHTTP(req, c.http, v)
	} else {
		wire.Read(req, &c.response, v)
	}
}

// textSize is about how many bytes an encoded map has.
func textSize(m map[string]string) int {
	n := 0
	for key, value := range m {
		n += len(key) + len(value) + 12
	}
	return n
}

// answer is the agent's decision; empty until the agent has answered.
func (c *check) answer() *checkv1.CheckResponse {
	if c.http != nil {
		return c.http.GetCheckResponse()
	}
	return &c.response
}

// options returns the options of the call. It is called once.
func (c *check) options() []grpc.CallOption {
	opts := append(c.room[:0], c.remote.calls...)
	c.codec.CodecV2 = c
	opts = append(opts, &c.codec)
	if c.limit.MaxRecvMsgSize > 0 {
		opts = append(opts, &c.limit)
	}
	if c.remote.dialled == nil {
		opts = append(opts, grpc.Header(&c.header), grpc.Trailer(&c.trailer))
	}
	return opts
}

// heard reports whether anything came from the agent since the check began. received is how much has come by now.
func (c *check) heard(received uint64) bool {
	return received != c.seen || len(c.header) > 0 || len(c.trailer) > 0
}

// CheckResponse is the answer, encoded.
func (c *check) CheckResponse() ([]byte, error) {
	if c.raw != nil {
		return c.raw, nil
	}
	return proto.Marshal(c.answer())
}

// HTTP is what the agent wants done with the HTTP request of the check.
func (c *check) HTTP(r *agentapi.HTTPRequest) *agentapi.HTTPAnswer {
	switch {
	case c.http == nil:
		return nil
	case c.answer().GetDecisionType() != checkv1.CheckResponse_DECISION_TYPE_ACCEPTED:
		denied := c.http.GetDeniedResponse()
		return &agentapi.HTTPAnswer{Header: maps.Clone(denied.GetHeaders()), Body: denied.GetBody()}
	default:
		return &agentapi.HTTPAnswer{Header: wire.OKHeaders(r, c.http)}
	}
}

// record is the answer as telemetry reports it: without the values of caches.
func (c *check) record() ([]byte, error) {
	if c.answer().GetCacheLookupResponse() == nil {
		return c.CheckResponse()
	}
	return proto.Marshal(wire.WithoutValues(c.answer()))
}

func (c *check) Marshal(v any) (mem.BufferSlice, error) { return c.remote.codec.Marshal(v) }

func (c *check) Unmarshal(data mem.BufferSlice, v any) error {
	err := c.remote.decode(c.ctx, data, v, c.repeated)
	if err == nil && c.remote.exporter != nil && c.http == nil && c.limit.MaxRecvMsgSize > 0 {
		c.raw = data.Materialize()
	}
	return err
}

// Name is empty, so that the content type is application/grpc, as gRPC's own clients have it. Agents take that for
// Protocol Buffers.
func (c *check) Name() string { return "" }
