package flowctl

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/version"
	"github.com/headgate-go/headgate/internal/wire"
)

// Dial makes a client of an agent that speaks the Aperture protocol over gRPC. The address is host:port, or any target
// that gRPC knows; the connection uses TLS unless [WithInsecure] says otherwise. Dial does not wait for the connection:
// see [Client.Ready].
func Dial(address string, opts ...Option) (*Client, error) {
	cfg, err := newConfig(true, opts)
	if err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	return dial(address, cfg)
}

func dial(address string, cfg *config) (*Client, error) {
	r, err := newRemote(address, cfg)
	if err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	c, err := newClient(r, cfg)
	if err != nil {
		return nil, errors.Join(err, r.release())
	}
	c.remote = r
	r.start(cfg)
	return c, nil
}

// The variables that DialEnv reads.
const (
	envAddress    = "APERTURE_AGENT_ADDRESS"
	envAPIKey     = "APERTURE_API_KEY"
	envInsecure   = "APERTURE_AGENT_INSECURE"
	envSkipVerify = "APERTURE_AGENT_SKIP_VERIFY"
)

// DialEnv is [Dial] as the environment says: the agent's address in APERTURE_AGENT_ADDRESS, which must be set, and
// where they are set the key in APERTURE_API_KEY, plaintext instead of TLS for a true APERTURE_AGENT_INSECURE, and TLS
// that trusts any certificate for a true APERTURE_AGENT_SKIP_VERIFY. Options override the environment. An error
// names the variable that it is about, and not what is in it.
func DialEnv(opts ...Option) (*Client, error) {
	address := os.Getenv(envAddress)
	if address == "" {
		return nil, fmt.Errorf("headgate: dial: %s is not set", envAddress)
	}
	cfg, err := newConfig(true, opts)
	if err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	if err := checkAddress(address, cfg); err != nil {
		return nil, fmt.Errorf("headgate: dial: %s: %w", envAddress, err)
	}
	if err := cfg.readEnv(); err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	return dial(address, cfg)
}

// readEnv sets what no option has set.
func (c *config) readEnv() error {
	if key := os.Getenv(envAPIKey); key != "" && c.apiKey == "" {
		if err := checkAPIKey(key); err != nil {
			return fmt.Errorf("%s: %w", envAPIKey, err)
		}
		c.apiKey, c.plaintextEnv = key, envAPIKey
	}
	plaintext, err := envBool(envInsecure)
	if err != nil {
		return err
	}
	skipVerify, err := envBool(envSkipVerify)
	if err != nil {
		return err
	}
	switch {
	case c.insecure || c.tls != nil || c.creds != nil:
	case plaintext:
		c.insecure, c.plaintextEnv = true, envInsecure
	case skipVerify:
		c.tls = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // asked for by name
	}
	return nil
}

func envBool(name string) (bool, error) {
	text := os.Getenv(name)
	if text == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(strings.ToLower(strings.TrimSpace(text)))
	if err != nil {
		return false, fmt.Errorf("%s is neither true nor false", name)
	}
	return b, nil
}

// remote is an agent across the network.
type remote struct {
	conn       grpc.ClientConnInterface
	dialled    *grpc.ClientConn  // conn, when it is ours to close
	links      *connections      // those of dialled; nil: they are another's
	calls      []grpc.CallOption // of every call
	bounded    []grpc.CallOption // of calls that are no checks
	codec      encoding.CodecV2
	decoding   atomic.Int64  // bytes of large answers that are being decoded
	timeout    time.Duration // of calls that no check timeout bounds
	breaker    *breaker
	address    string         // where it is no more than host:port: other targets may hold secrets
	received   *atomic.Uint64 // counts what comes from the agent, at the level of the connection where that is ours
	logger     *slog.Logger
	refusals   limitedLog
	breakerLog limitedLog
	shown      metric.Registration // of the breaker; nil where nobody wants to see it
	dryDrops   metric.Int64Counter // nil where nobody wants to see it
	backLog    limitedLog
	exporter   *exporter // nil: no telemetry
}

var _ agentapi.Agent = (*remote)(nil)

func newRemote(address string, cfg *config) (*remote, error) {
	r := &remote{
		conn:     cfg.conn,
		timeout:  cfg.endTimeout,
		codec:    boundedCodec{encoding.GetCodecV2(protocodec.Name)},
		received: new(atomic.Uint64),
		logger:   cfg.logger,
	}
	span := cfg.checkTimeout
	if span < 0 {
		span = defaultCheckTimeout
	}
	r.breaker = newBreaker(cfg.breaker, span)
	if _, _, err := net.SplitHostPort(address); err == nil {
		r.address = address
	}
	plaintextKey := cfg.plaintextKey
	if cfg.conn != nil {
		if address != "" {
			return nil, errors.New("WithConn brings the connection: the address must be empty")
		}
	} else {
		if err := checkAddress(address, cfg); err != nil {
			return nil, err
		}
		creds := transportCredentials(cfg)
		if creds.Info().SecurityProtocol == "insecure" {
			plaintextKey = plaintextKey || isLoopback(address)
			if cfg.apiKey != "" && !plaintextKey {
				err := errors.New("the API key would travel in plaintext: use TLS, or WithInsecureAPIKey")
				if cfg.plaintextEnv != "" {
					err = fmt.Errorf("%s: %w", cfg.plaintextEnv, err)
				}
				return nil, err
			}
		}
		r.links = newConnections(r.received)
		opts := append([]grpc.DialOption{
			grpc.WithTransportCredentials(&trackedCredentials{creds, r.links}),
			grpc.WithKeepaliveParams(cfg.keepalive),
			grpc.WithConnectParams(connectParams(r.breaker)),
			grpc.WithUserAgent("headgate-go/" + version.Version),
			grpc.WithMaxHeaderListSize(maxHeaderList),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxCachedAnswer)),
		}, cfg.dialOptions...)
		conn, err := grpc.NewClient(address, opts...)
		if err != nil {
			return nil, err
		}
		conn.Connect() // so that the first flow need not wait for it
		r.conn, r.dialled = conn, conn
	}
	r.calls = []grpc.CallOption{grpc.StaticMethod()}
	if cfg.apiKey != "" {
		r.calls = append(r.calls, grpc.PerRPCCredentials(&keyCredentials{
			metadata:  map[string]string{"x-api-key": cfg.apiKey},
			plaintext: plaintextKey,
		}))
	}
	r.bounded = append(slices.Clone(r.calls), grpc.ForceCodecV2(r.codec), grpc.MaxCallRecvMsgSize(maxAnswer))
	return r, nil
}

// invoke makes a call that is no check.
func (r *remote) invoke(ctx context.Context, method string, req, m any, opts ...grpc.CallOption) error {
	return clipError(r.conn.Invoke(ctx, method, req, m, append(slices.Clip(r.bounded), opts...)...))
}

// start runs what the remote has in the background.
func (r *remote) start(cfg *config) {
	if !cfg.noTelemetry {
		r.exporter = newExporter(r.invoke, cfg.logger, r.answered)
	}
}

// Instrument shows whether the agent breaker is open, and counts what dry runs let pass. The client calls it, once.
func (r *remote) Instrument(provider metric.MeterProvider) error {
	meter := provider.Meter(scope, metric.WithInstrumentationVersion(version.Version))
	open, err := meter.Int64ObservableGauge("flowcontrol_gate_open",
		metric.WithDescription("1 while the agent breaker is open, for the agent does not answer, and 0 else."))
	if err != nil {
		return err
	}
	if r.dryDrops, err = meter.Int64Counter("flowcontrol_dry_run_drops_total",
		metric.WithDescription("Flows that components would have dropped without a dry run.")); err != nil {
		return err
	}
	at := metric.WithAttributes(attribute.String("server_address", r.address))
	r.shown, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		var n int64
		if r.breaker.open.Load() {
			n = 1
		}
		o.ObserveInt64(open, n, at)
		return nil
	}, open)
	return err
}

func transportCredentials(cfg *config) credentials.TransportCredentials {
	switch {
	case cfg.creds != nil:
		return cfg.creds
	case cfg.insecure:
		return insecure.NewCredentials()
	case cfg.tls != nil:
		return credentials.NewTLS(cfg.tls)
	default:
		return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})
	}
}

// connectParams has the pauses between attempts to connect grow to the time between two probes of the breaker, and not to
// gRPC's two minutes: a probe, and a Ready, would fail without having tried. ClientConn.ResetConnectBackoff, which is
// meant for that, races with new addresses (grpc-go 1.85).
func connectParams(g *breaker) grpc.ConnectParams {
	pauses := backoff.DefaultConfig
	pauses.MaxDelay = max(min(g.Probe, pauses.MaxDelay), time.Second)
	pauses.BaseDelay = min(pauses.BaseDelay, pauses.MaxDelay)
	return grpc.ConnectParams{Backoff: pauses, MinConnectTimeout: 20 * time.Second}
}

// checkAddress tells why the address is none. One is host:port, or a target with a scheme that gRPC knows. One that it does
// not know it would take for a host's name, and never find it. The errors do not say the address: there are secrets in
// some.
func checkAddress(address string, cfg *config) error {
	if address == "" {
		return errors.New("the address is empty")
	}
	scheme, rest, _ := strings.Cut(address, ":")
	switch known := resolver.Get(scheme) != nil; {
	case known:
		return nil
	case strings.HasPrefix(rest, "//") && (len(cfg.dialOptions) == 0 || strings.HasPrefix(scheme, "http")):
		return errors.New("the address is a URL, or has a scheme that gRPC does not know")
	case strings.HasPrefix(rest, "//"):
		return nil // for a resolver in the options
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("the address is not host:port")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return errors.New("the address has no port from 1 to 65535")
	}
	if strings.ContainsAny(host, " /\\@") {
		return errors.New("the address has a host that cannot be one")
	}
	return nil
}

// isLoopback reports whether the target can only be this machine.
func isLoopback(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "passthrough:///", "dns:", "passthrough:"} {
		if rest, ok := strings.CutPrefix(target, scheme); ok {
			target = rest
			break
		}
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = target
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// keyCredentials adds the API key to each call, besides what the caller's context brings.
type keyCredentials struct {
	metadata  map[string]string
	plaintext bool
}

func (k *keyCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return k.metadata, nil
}

func (k *keyCredentials) RequireTransportSecurity() bool { return !k.plaintext }

// Check asks the agent.
func (r *remote) Check(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) error {
	start, seen := time.Now(), r.received.Load()
	r.catchUp(seen)
	if !r.breaker.admit(start) {
		return errBreakerOpen
	}
	call := ctx
	if req.Timeout > 0 {
		var cancel context.CancelFunc
		call, cancel = context.WithTimeout(ctx, req.Timeout)
		defer cancel()
	}
	c := &check{remote: r, start: start, seen: seen}
	err := c.ask(call, req)
	c.returned = time.Now()
	if err != nil {
		r.failed(ctx, call, err, c)
		return err
	}
	r.answered()
	c.Wire = c
	v.Start, v.Details = start.UnixNano(), &c.VerdictDetails
	if c.http != nil {
		wire.ReadHTTP(req, c.http, v)
	} else {
		wire.Read(req, &c.response, v)
	}
	if req.DryRun() && v.Rejected() && req.Lookup() != nil && c.answer().GetCacheLookupResponse() == nil {
		r.lookUp(call, req, v)
		c.returned = time.Now()
	}
	if r.dryDrops != nil {
		r.countDryRuns(ctx, req, c.answer())
	}
	return nil
}

// lookUp asks for what the caches have. An agent that does not know of dry runs does not tell when it rejects a flow.
func (r *remote) lookUp(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict) {
	m := new(checkv1.CacheLookupResponse)
	opts := append(slices.Clip(r.calls), grpc.ForceCodecV2(r.codec))
	err := r.conn.Invoke(ctx, checkv1.FlowControlService_CacheLookup_FullMethodName, wire.Lookup(req), m, opts...)
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

// countDryRuns counts the components that would have dropped the flow, had they been in force for it.
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

// catchUp notes what has come from the agent while nobody looked.
func (r *remote) catchUp(received uint64) {
	if r.breaker.outdated(received) {
		r.answered()
	}
}

// answered notes that the agent is there.
func (r *remote) answered() {
	if r.breaker.answered() {
		r.backLog.log(r.logger.Info, "headgate: the agent answers again")
	}
}

// failed judges a check that got no answer: does it speak against the agent?
func (r *remote) failed(ctx, call context.Context, err error, c *check) {
	received, code := r.received.Load(), status.Code(err)
	switch {
	case c.heard(received):
		r.answered()
	case r.links != nil && r.links.stirred(c.start):
		// There is a connection, and nothing is known of it. That speaks neither against the agent nor for it.
	case code == codes.Unavailable && ctx.Err() == nil,
		code == codes.DeadlineExceeded && !callerEnded(ctx, err) && call.Err() != nil:
		if r.breaker.failed(c.returned, received) {
			r.breakerLog.warn(r.logger, "headgate: the agent does not answer; flows are Unreachable at once", "error", err)
		}
	}
	if refused(code) {
		r.refusals.warn(r.logger, "headgate: the agent refuses to decide", "error", err)
	}
}

// refused reports whether an agent that answers with the code decides about no flow at all.
func refused(code codes.Code) bool {
	return code == codes.Unauthenticated || code == codes.PermissionDenied || code == codes.Unimplemented
}

// End gives back what the flow holds at the agent, and records it for telemetry.
func (r *remote) End(ctx context.Context, req *agentapi.Request, v *agentapi.Verdict, failed bool) (agentapi.Returns, error) {
	c, ok := v.More().Wire.(*check)
	if !ok {
		return agentapi.Returns{}, nil
	}
	if r.exporter != nil {
		r.exporter.record(c, failed, req.DryRun() && v.Rejected())
	}
	refs := wire.Held(c.answer())
	if len(refs) == 0 {
		return agentapi.Returns{}, nil
	}
	returns := agentapi.Returns{Held: len(refs)}
	if r.spares() {
		return returns, errNotEnded
	}
	// Detached: a slot must come back although, and just when, the caller has gone.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
	defer cancel()
	m := new(checkv1.FlowEndResponse)
	err := r.invoke(call, checkv1.FlowControlService_FlowEnd_FullMethodName,
		&checkv1.FlowEndRequest{ControlPoint: req.ControlPoint, InflightRequests: refs}, m)
	if err != nil {
		return returns, err
	}
	r.answered()
	for _, s := range m.GetTokenReturnStatuses() {
		if s.GetReturned() && returns.Returned < returns.Held { // it may tell of more than it was asked about
			returns.Returned++
		}
	}
	return returns, nil
}

// Store puts a value into the agent's cache.
func (r *remote) Store(ctx context.Context, key agentapi.CacheKey, value []byte, ttl time.Duration) error {
	entry := &checkv1.CacheEntry{Key: key.Key, Value: value}
	if ttl > 0 {
		entry.Ttl = durationpb.New(ttl)
	}
	req := &checkv1.CacheUpsertRequest{ControlPoint: key.ControlPoint}
	if key.Global {
		req.GlobalCacheEntries = map[string]*checkv1.CacheEntry{key.Key: entry}
	} else {
		req.ResultCacheEntry = entry
	}
	m := new(checkv1.CacheUpsertResponse)
	if err := r.callCache(ctx, checkv1.FlowControlService_CacheUpsert_FullMethodName, req, m); err != nil {
		return err
	}
	if key.Global {
		return cacheStatus(m.GetGlobalCacheResponses()[key.Key])
	}
	return cacheStatus(m.GetResultCacheResponse())
}

// Delete removes a value from the agent's cache.
func (r *remote) Delete(ctx context.Context, key agentapi.CacheKey) error {
	req := &checkv1.CacheDeleteRequest{ControlPoint: key.ControlPoint}
	if key.Global {
		req.GlobalCacheKeys = []string{key.Key}
	} else {
		req.ResultCacheKey = key.Key
	}
	m := new(checkv1.CacheDeleteResponse)
	if err := r.callCache(ctx, checkv1.FlowControlService_CacheDelete_FullMethodName, req, m); err != nil {
		return err
	}
	if key.Global {
		return cacheStatus(m.GetGlobalCacheResponses()[key.Key])
	}
	return cacheStatus(m.GetResultCacheResponse())
}

// spares reports whether a call that is no check is not to be made, for the agent is dead.
func (r *remote) spares() bool {
	r.catchUp(r.received.Load())
	return r.breaker.spares(time.Now())
}

// callCache makes a call about the cache.
func (r *remote) callCache(ctx context.Context, method string, req, m proto.Message) error {
	if r.spares() {
		return errBreakerOpen
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	if err := r.invoke(ctx, method, req, m); err != nil {
		return err
	}
	r.answered()
	return nil
}

const errCacheSilence = ownError("the agent does not say what became of the entry")

// cacheStatus is the error in what the agent says of one entry. An agent that says nothing has done nothing, although
// success is the wire's zero.
func cacheStatus[M interface {
	comparable
	GetOperationStatus() checkv1.CacheOperationStatus
	GetError() string
}](said M) error {
	var nothing M
	switch {
	case said == nothing:
		return errCacheSilence
	case said.GetOperationStatus() != checkv1.CacheOperationStatus_SUCCESS || said.GetError() != "":
		return wire.CacheError(said.GetError())
	default:
		return nil
	}
}

// Expect does nothing: the protocol has no place for it, and each check has its deadline.
func (r *remote) Expect(time.Duration) {}

// Ready makes a call that asks for nothing, as soon as there is a connection.
func (r *remote) Ready(ctx context.Context) error {
	err := r.invoke(ctx, checkv1.FlowControlService_CacheLookup_FullMethodName,
		&checkv1.CacheLookupRequest{}, new(checkv1.CacheLookupResponse), grpc.WaitForReady(true))
	switch code := status.Code(err); {
	case err == nil:
		r.answered()
	case code == codes.Unauthenticated, code == codes.PermissionDenied:
		return fmt.Errorf("%w: %w", ownError("it refuses the API key"), err)
	case code == codes.Unimplemented && strings.HasPrefix(status.Convert(err).Message(), "unknown service"):
		// So say servers in Go, as agents are. Of one that lacks just this method nothing follows for checks.
		return fmt.Errorf("%w: %w", ownError("it does not speak the protocol"), err)
	case code == codes.Unavailable, code == codes.DeadlineExceeded, code == codes.Canceled:
		return err
	}
	return nil
}

// closeGrace is how long the connection has to close, when ctx has ended already.
const closeGrace = 10 * time.Millisecond

// close sends what telemetry there is until ctx ends, and closes the connection that is ours. gRPC takes seconds for that
// where the agent reads nothing: when ctx ends they are left to a goroutine, and the connection is cut, which ends it.
func (r *remote) close(ctx context.Context) error {
	var flushed error
	if r.exporter != nil {
		flushed = r.exporter.close(ctx)
	}
	released := make(chan error, 1)
	go func() { released <- r.release() }()
	select {
	case err := <-released:
		return errors.Join(flushed, err)
	case <-ctx.Done():
	}
	grace := time.NewTimer(closeGrace)
	defer grace.Stop()
	select {
	case err := <-released:
		return errors.Join(flushed, err)
	case <-grace.C:
		if r.links != nil {
			r.links.abandon()
		}
		return errors.Join(flushed, fmt.Errorf("the connection was cut: %w", ctx.Err()))
	}
}

// release gives up what the remote has outside of itself.
func (r *remote) release() error {
	if r.shown != nil {
		_ = r.shown.Unregister() // fails where the provider is gone already
	}
	if r.dialled == nil {
		return nil
	}
	return r.dialled.Close()
}
