// Package flowtest helps to test code that is guarded by flows. Its agent answers as the test says, over a real gRPC
// connection in memory, and records what it was asked.
//
//	agent := flowtest.NewAgent(t)
//	agent.Answer(flowtest.Answer{Reason: flowctl.ReasonRateLimited, RetryAfter: time.Second})
//	handler := NewHandler(agent.Client())
//
// It works within a bubble of testing/synctest as well as outside.
package flowtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/telemetry"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/internal/wire"
)

// An Answer is how the agent answers a call. The zero value accepts at once.
type Answer struct {
	// Reason rejects a check, unless it is ReasonNone.
	Reason flowctl.RejectReason

	// Cause, HTTPStatus and RetryAfter go with a rejection; zero sends none.
	Cause      flowctl.RejectCause
	HTTPStatus int
	RetryAfter time.Duration

	// Slots is how many concurrency slots the flow holds until it ends, even if it is rejected.
	Slots int

	// Delay is how long the agent takes to answer.
	Delay time.Duration

	// Hang makes the agent never answer, not even when the call's time is up. The call ends when its caller gives up.
	Hang bool

	// Drop breaks the connection instead of answering.
	Drop bool

	// Fail is the error that the call fails with, a gRPC status.
	Fail error

	// Response is the whole answer to a check, right or wrong. A check of an HTTP request gets it inside the answer.
	Response *checkv1.CheckResponse

	// HTTPResponse is the whole answer to a check of an HTTP request, right or wrong.
	HTTPResponse *checkhttpv1.CheckHTTPResponse
}

// A Check is what the agent was asked. It leaves out the number that the check may have in a session, because an Agent has none.
type Check struct {
	// Request is the question. In a check of an HTTP request it has the labels of the baggage header, and nothing else
	// of the HTTP request.
	Request *checkv1.CheckRequest

	// HTTP is the question if it was about an HTTP request, and else nil.
	HTTP *checkhttpv1.CheckHTTPRequest

	Metadata metadata.MD

	// Timeout is the time that the call had left; 0 if it had no deadline.
	Timeout time.Duration
}

// A Span is the record of a flow that has ended.
type Span struct {
	Start, WorkloadStart, End time.Time
	Status                    flowctl.Status
	Response                  *checkv1.CheckResponse

	Proto    *tracev1.Span // the span as it came
	Metadata metadata.MD   // of the call that brought it
}

// An Agent answers as the test says. It is safe for concurrent use.
type Agent struct {
	t        testing.TB
	server   *grpc.Server
	listener *listener
	stopping chan struct{} // ends the calls that hang
	once     sync.Once     // closes it

	mu      sync.Mutex
	scripts map[string][]Answer // by control point; "" for all others
	onEnd   []Answer
	onSpans []Answer
	checks  []Check
	ends    []*checkv1.FlowEndRequest
	spans   []Span
	held    map[string]bool // slots, by request id
	slots   int             // how many there have been
	cache   map[cacheKey][]byte
}

type cacheKey struct{ controlPoint, key string }

// NewAgent starts an agent that accepts every flow. It stops when the test ends.
func NewAgent(t testing.TB) *Agent {
	t.Helper()
	a := &Agent{
		t:        t,
		listener: &listener{Listener: bufconn.Listen(1 << 16)},
		stopping: make(chan struct{}),
		scripts:  make(map[string][]Answer),
		held:     make(map[string]bool),
		cache:    make(map[cacheKey][]byte),
	}
	a.server = grpc.NewServer(
		grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}),
	)
	checkv1.RegisterFlowControlServiceServer(a.server, service{Agent: a})
	checkhttpv1.RegisterFlowControlServiceHTTPServer(a.server, service{Agent: a})
	telemetry.Register(a.server, a.export)
	served := make(chan struct{})
	go func() {
		defer close(served)
		// A test may be over before its agent has begun to serve.
		if err := a.server.Serve(a.listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("flowtest: serve: %v", err)
		}
	}()
	t.Cleanup(func() {
		a.release()
		a.server.Stop()
		<-served
	})
	return a
}

// Client dials the agent. The client closes when the test ends, and sends its telemetry then at the latest.
func (a *Agent) Client(opts ...flowctl.Option) *flowctl.Client {
	a.t.Helper()
	opts = append([]flowctl.Option{flowctl.WithInsecure(), flowctl.WithDialOptions(a.Dialer())}, opts...)
	client, err := flowctl.Dial("passthrough:///localhost", opts...)
	if err != nil {
		a.t.Fatalf("flowtest: %v", err)
	}
	a.t.Cleanup(func() {
		a.release()                                            // what hangs must not hold up the client's last telemetry
		_ = client.Close(context.WithoutCancel(a.t.Context())) // which has ended by now
	})
	return client
}

// release ends the calls that hang: the test is over.
func (a *Agent) release() {
	a.once.Do(func() { close(a.stopping) })
	a.Thaw()
}

// Dialer returns a dial option that connects to this agent, whatever the address is.
func (a *Agent) Dialer() grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return a.DialContext(ctx)
	})
}

// DialContext opens a connection to the agent. It is for dialers of a test's own.
func (a *Agent) DialContext(ctx context.Context) (net.Conn, error) {
	return a.listener.DialContext(ctx)
}

// Answer sets the answers to checks from now on: the first check gets the first answer, and so on; the last answer
// stays. Without answers every check is accepted. Control points of [Agent.AnswerAt] have answers of their own.
func (a *Agent) Answer(answers ...Answer) { a.AnswerAt("", answers...) }

// AnswerAt is [Agent.Answer] for one control point.
func (a *Agent) AnswerAt(controlPoint string, answers ...Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.scripts[controlPoint] = slices.Clone(answers)
}

// AnswerEnds sets the answers to calls that end flows. Only Delay, Hang, Drop and Fail count.
func (a *Agent) AnswerEnds(answers ...Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.onEnd = slices.Clone(answers)
}

// AnswerSpans sets the answers to calls that bring telemetry. Only Delay, Hang, Drop and Fail count.
func (a *Agent) AnswerSpans(answers ...Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.onSpans = slices.Clone(answers)
}

// Checks gives the checks so far, in the order in which they came.
func (a *Agent) Checks() []Check {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.checks)
}

// Ends gives the calls so far that ended flows. Only flows that hold slots are ended by a call.
func (a *Agent) Ends() []*checkv1.FlowEndRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.ends)
}

// Spans gives the telemetry so far. Clients send it once a second, and when they close.
func (a *Agent) Spans() []Span {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.spans)
}

// Held is how many slots flows hold now.
func (a *Agent) Held() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.held)
}

// SetResult puts a value into the result cache of a control point; a nil value removes it. It never expires.
func (a *Agent) SetResult(controlPoint, key string, value []byte) {
	a.set(cacheKey{controlPoint, key}, value)
}

// SetGlobal puts a value into the cache that control points share; a nil value removes it. It never expires.
func (a *Agent) SetGlobal(key string, value []byte) { a.set(cacheKey{"", key}, value) }

func (a *Agent) set(k cacheKey, value []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if value == nil {
		delete(a.cache, k)
		return
	}
	a.cache[k] = slices.Clone(value)
}

// Result is what the result cache of a control point holds, set by the test or by a flow.
func (a *Agent) Result(controlPoint, key string) (value []byte, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	value, ok = a.cache[cacheKey{controlPoint, key}]
	return slices.Clone(value), ok
}

// Global is what the cache that control points share holds.
func (a *Agent) Global(key string) (value []byte, ok bool) { return a.Result("", key) }

// Drop breaks all connections. Clients dial again for their next call.
func (a *Agent) Drop() { a.listener.drop() }

// Freeze makes the agent act like a machine that hangs: its connections stay open, and nothing comes over them any
// more.
func (a *Agent) Freeze() { a.listener.setFrozen(true) }

// Thaw ends [Agent.Freeze]. What the agent would have sent meanwhile comes now.
func (a *Agent) Thaw() { a.listener.setFrozen(false) }

// next takes the next answer of a script.
func next(script *[]Answer) Answer {
	s := *script
	if len(s) == 0 {
		return Answer{}
	}
	if len(s) > 1 {
		*script = s[1:]
	}
	return s[0]
}

// act applies the Delay, Drop, Hang and Fail of an answer.
func (a *Agent) act(ctx context.Context, n Answer) error {
	if n.Delay > 0 {
		timer := time.NewTimer(n.Delay)
		defer timer.Stop()
		select {
		case <-a.stopping:
		case <-timer.C:
		}
	}
	if n.Drop {
		a.Drop()
	}
	if n.Drop || n.Hang {
		<-a.stopping
	}
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	return n.Fail
}

// service is the agent's side of the protocol.
type service struct {
	checkv1.UnimplementedFlowControlServiceServer
	checkhttpv1.UnimplementedFlowControlServiceHTTPServer
	*Agent
}

func (a service) Check(ctx context.Context, req *checkv1.CheckRequest) (*checkv1.CheckResponse, error) {
	start := time.Now()
	n, err := a.asked(ctx, Check{Request: proto.CloneOf(req)})
	if err != nil {
		return nil, err
	}
	if n.Response != nil {
		return n.Response, nil
	}
	return a.answer(req, n, start), nil
}

func (a service) CheckHTTP(ctx context.Context, req *checkhttpv1.CheckHTTPRequest) (*checkhttpv1.CheckHTTPResponse, error) {
	start := time.Now()
	carried := req.GetRequest().GetHeaders()[wire.HeaderBaggage]
	same := &checkv1.CheckRequest{
		ControlPoint: req.GetControlPoint(),
		Labels:       maps.Clone(req.GetLabels()),
		RampMode:     req.GetRampMode(),
		ExpectEnd:    req.GetExpectEnd(),
		DryRun:       req.GetDryRun(),
	}
	if len(same.GetLabels()) == 0 {
		same.Labels = w3cbaggage.Read(carried)
	}
	n, err := a.asked(ctx, Check{Request: proto.CloneOf(same), HTTP: proto.CloneOf(req)})
	switch {
	case err != nil:
		return nil, err
	case n.HTTPResponse != nil:
		return n.HTTPResponse, nil
	case n.Response != nil:
		return wire.HTTPResponse(proto.CloneOf(n.Response), carried, nil), nil
	default:
		return wire.HTTPResponse(a.answer(same, n, start), carried, nil), nil
	}
}

// asked records a check, takes the next answer, and applies it by act.
func (a *Agent) asked(ctx context.Context, c Check) (Answer, error) {
	c.Metadata, _ = metadata.FromIncomingContext(ctx)
	c.Request.SessionCheck = 0 // the first checks have one, until the client learns that there are no sessions
	if c.HTTP != nil {
		c.HTTP.SessionCheck = 0
	}
	if deadline, ok := ctx.Deadline(); ok {
		c.Timeout = time.Until(deadline)
	}
	a.mu.Lock()
	a.checks = append(a.checks, c)
	point := c.Request.GetControlPoint()
	if _, ok := a.scripts[point]; !ok {
		point = ""
	}
	script := a.scripts[point]
	n := next(&script)
	a.scripts[point] = script
	a.mu.Unlock()
	return n, a.act(ctx, n)
}

func (a *Agent) answer(req *checkv1.CheckRequest, n Answer, start time.Time) *checkv1.CheckResponse {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := &checkv1.CheckResponse{
		Start:               timestamppb.New(start),
		End:                 timestamppb.Now(),
		ControlPoint:        req.GetControlPoint(),
		TelemetryFlowLabels: req.GetLabels(),
		ExpectEnd:           req.GetExpectEnd(),
	}
	for range n.Slots {
		a.slots++
		id := fmt.Sprintf("slot-%d", a.slots)
		a.held[id] = true
		m.LimiterDecisions = append(m.LimiterDecisions, &checkv1.LimiterDecision{
			PolicyName:  "flowtest",
			PolicyHash:  "flowtest",
			ComponentId: "root.0",
			Details: &checkv1.LimiterDecision_ConcurrencyLimiterInfo_{ConcurrencyLimiterInfo: &checkv1.LimiterDecision_ConcurrencyLimiterInfo{
				Label:      "default",
				RequestId:  id,
				TokensInfo: &checkv1.LimiterDecision_TokensInfo{Consumed: 1},
			}},
		})
	}
	if n.Reason != flowctl.ReasonNone {
		m.DecisionType = checkv1.CheckResponse_DECISION_TYPE_REJECTED
		m.RejectReason = checkv1.CheckResponse_RejectReason(n.Reason)
		m.Cause = checkv1.CheckResponse_Cause(n.Cause)
		m.DeniedResponseStatusCode = checkv1.StatusCode(n.HTTPStatus)
		if n.RetryAfter != 0 {
			m.WaitTime = durationpb.New(n.RetryAfter)
		}
		m.LimiterDecisions = append(m.LimiterDecisions, &checkv1.LimiterDecision{
			PolicyName:  "flowtest",
			PolicyHash:  "flowtest",
			ComponentId: "root.1",
			Dropped:     true,
			WaitTime:    durationpb.New(n.RetryAfter),
		})
		return m
	}
	if ask := req.GetCacheLookupRequest(); ask != nil {
		m.CacheLookupResponse = a.lookup(req.GetControlPoint(), ask)
	}
	return m
}

func (a *Agent) lookup(controlPoint string, ask *checkv1.CacheLookupRequest) *checkv1.CacheLookupResponse {
	find := func(k cacheKey) *checkv1.KeyLookupResponse {
		if value, ok := a.cache[k]; ok {
			return &checkv1.KeyLookupResponse{Value: value}
		}
		return &checkv1.KeyLookupResponse{LookupStatus: checkv1.CacheLookupStatus_MISS}
	}
	m := &checkv1.CacheLookupResponse{GlobalCacheResponses: make(map[string]*checkv1.KeyLookupResponse)}
	if key := ask.GetResultCacheKey(); key != "" {
		m.ResultCacheResponse = find(cacheKey{controlPoint, key})
	}
	for _, key := range ask.GetGlobalCacheKeys() {
		m.GlobalCacheResponses[key] = find(cacheKey{"", key})
	}
	return m
}

func (a service) FlowEnd(ctx context.Context, req *checkv1.FlowEndRequest) (*checkv1.FlowEndResponse, error) {
	a.mu.Lock()
	a.ends = append(a.ends, proto.CloneOf(req))
	n := next(&a.onEnd)
	a.mu.Unlock()
	if err := a.act(ctx, n); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	m := new(checkv1.FlowEndResponse)
	for _, ref := range req.GetInflightRequests() {
		m.TokenReturnStatuses = append(m.TokenReturnStatuses, &checkv1.TokenReturnStatus{
			InflightRequestRef: ref,
			Returned:           a.held[ref.GetRequestId()],
		})
		delete(a.held, ref.GetRequestId())
	}
	return m, nil
}

func (a service) CacheLookup(_ context.Context, req *checkv1.CacheLookupRequest) (*checkv1.CacheLookupResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lookup(req.GetControlPoint(), req), nil
}

func (a service) CacheUpsert(_ context.Context, req *checkv1.CacheUpsertRequest) (*checkv1.CacheUpsertResponse, error) {
	m := &checkv1.CacheUpsertResponse{GlobalCacheResponses: make(map[string]*checkv1.KeyUpsertResponse)}
	if e := req.GetResultCacheEntry(); e.GetKey() != "" {
		a.set(cacheKey{req.GetControlPoint(), e.GetKey()}, slices.Concat([]byte{}, e.GetValue()))
		m.ResultCacheResponse = new(checkv1.KeyUpsertResponse)
	}
	for key, e := range req.GetGlobalCacheEntries() {
		a.set(cacheKey{"", key}, slices.Concat([]byte{}, e.GetValue()))
		m.GlobalCacheResponses[key] = new(checkv1.KeyUpsertResponse)
	}
	return m, nil
}

func (a service) CacheDelete(_ context.Context, req *checkv1.CacheDeleteRequest) (*checkv1.CacheDeleteResponse, error) {
	m := &checkv1.CacheDeleteResponse{GlobalCacheResponses: make(map[string]*checkv1.KeyDeleteResponse)}
	if key := req.GetResultCacheKey(); key != "" {
		a.set(cacheKey{req.GetControlPoint(), key}, nil)
		m.ResultCacheResponse = new(checkv1.KeyDeleteResponse)
	}
	for _, key := range req.GetGlobalCacheKeys() {
		a.set(cacheKey{"", key}, nil)
		m.GlobalCacheResponses[key] = new(checkv1.KeyDeleteResponse)
	}
	return m, nil
}

// export takes telemetry.
func (a *Agent) export(ctx context.Context, data *tracev1.TracesData) error {
	md, _ := metadata.FromIncomingContext(ctx)
	a.mu.Lock()
	n := next(&a.onSpans)
	a.mu.Unlock()
	if err := a.act(ctx, n); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range data.GetResourceSpans() {
		for _, s := range r.GetScopeSpans() {
			for _, p := range s.GetSpans() {
				span, err := readSpan(p)
				if err != nil {
					return status.Error(codes.InvalidArgument, err.Error())
				}
				span.Metadata = md
				a.spans = append(a.spans, span)
			}
		}
	}
	return nil
}

// readSpan reads a flow's span as agents do.
func readSpan(p *tracev1.Span) (Span, error) {
	data, err := proto.Marshal(p)
	if err != nil {
		return Span{}, err
	}
	r, err := telemetry.Read(data)
	if err != nil {
		return Span{}, err
	}
	s := Span{Start: timeOf(r.Start), WorkloadStart: timeOf(r.Work), End: timeOf(r.End), Proto: p, Response: new(checkv1.CheckResponse)}
	switch r.Status {
	case telemetry.OK:
		s.Status = flowctl.StatusOK
	case telemetry.Error:
		s.Status = flowctl.StatusError
	}
	if r.JSON != nil {
		return s, protojson.Unmarshal(r.JSON, s.Response)
	}
	return s, proto.Unmarshal(r.Check, s.Response)
}

// timeOf is a time in Unix nanoseconds; 0 is none.
func timeOf(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// listener keeps its connections, so that they can be broken and frozen.
type listener struct {
	*bufconn.Listener
	mu     sync.Mutex
	conns  []net.Conn
	frozen chan struct{} // closed when it thaws; nil unless frozen
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, c)
	return &conn{c, l}, nil
}

func (l *listener) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		_ = c.Close()
	}
	l.conns = nil
}

func (l *listener) setFrozen(frozen bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case frozen && l.frozen == nil:
		l.frozen = make(chan struct{})
	case !frozen && l.frozen != nil:
		close(l.frozen)
		l.frozen = nil
	}
}

// conn is the agent's end of a connection.
type conn struct {
	net.Conn
	listener *listener
}

func (c *conn) Write(p []byte) (int, error) {
	c.listener.mu.Lock()
	thawed := c.listener.frozen
	c.listener.mu.Unlock()
	if thawed != nil {
		<-thawed
	}
	return c.Conn.Write(p)
}
