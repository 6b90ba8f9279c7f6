package flowctl

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/version"
)

// remote is an agent across the network.
type remote struct {
	conn        grpc.ClientConnInterface
	dialled     *grpc.ClientConn  // conn, when it is ours to close
	links       *connections      // those of dialled; nil if conn is the application's
	calls       []grpc.CallOption // of every call
	bounded     []grpc.CallOption // of calls other than checks
	codec       boundedCodec
	decoding    atomic.Int64  // bytes of large answers that are being decoded
	timeout     time.Duration // of calls that no check timeout bounds
	breaker     *breaker
	address     string         // what metrics show of it: see shownAddress
	received    *atomic.Uint64 // counts what comes from the agent, at the level of the connection where that is ours
	logger      *slog.Logger
	ownKey      bool // an API key goes with each call
	refusals    limitedLog
	breakerLog  limitedLog
	metadataLog limitedLog
	shown       metric.Registration // of the breaker; nil without a meter
	dryDrops    metric.Int64Counter // nil without a meter
	backLog     limitedLog
	lostSlots   metric.Int64Counter // nil without a meter
	vigil       vigil               // over the checks that wait for long
	session     *session
	exporter    *exporter // nil: no telemetry
}

var _ agentapi.Agent = (*remote)(nil)

// invoke makes a call other than a check.
func (r *remote) invoke(ctx context.Context, method string, req, m any, opts ...grpc.CallOption) error {
	return clipError(r.conn.Invoke(r.sendable(ctx), method, req, m, append(slices.Clip(r.bounded), opts...)...))
}

// start runs what the remote has in the background.
func (r *remote) start(cfg *config) {
	r.session.runs.Go(r.session.keep)
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
	if r.lostSlots, err = meter.Int64Counter("flowcontrol_lost_slots_total",
		metric.WithDescription("Slots of flows in flight that may be given to others, because they were not renewed in time.")); err != nil {
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

// Expect does nothing: the protocol has no place for it, and each check has its deadline.
func (r *remote) Expect(time.Duration) (forget func()) { return func() {} }

// Ready makes a call that asks for nothing, as soon as there is a connection.
func (r *remote) Ready(ctx context.Context) error {
	err := r.askNothing(ctx, grpc.WaitForReady(true))
	switch code := status.Code(err); {
	case err == nil:
		r.answered()
		r.session.await(ctx)
	case code == codes.Unauthenticated, code == codes.PermissionDenied:
		return fmt.Errorf("%w: %w", ownError("it refuses the API key"), err)
	case code == codes.Unimplemented && strings.HasPrefix(status.Convert(err).Message(), "unknown service"):
		// Servers in Go answer so, and agents are such servers. If only this method is missing, checks may still work.
		return fmt.Errorf("%w: %w", ownError("it does not speak the protocol"), err)
	case code == codes.Unavailable, code == codes.DeadlineExceeded, code == codes.Canceled:
		return err
	}
	return nil
}

// alive asks for a sign of life, and reports whether the agent gave it. It returns false at once if there is no
// connection, and when ctx ends. What else comes from the agent meanwhile does not end it.
func (r *remote) alive(ctx context.Context) bool {
	if alive, known := r.session.alive(ctx); known {
		return alive
	}
	err := r.askNothing(ctx)
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled: // of the codes, gRPC itself makes these
		return false
	default:
		r.answered()
		return true
	}
}

// askNothing makes a call that changes nothing, and that every agent answers.
func (r *remote) askNothing(ctx context.Context, opts ...grpc.CallOption) error {
	return r.invoke(ctx, checkv1.FlowControlService_CacheLookup_FullMethodName,
		&checkv1.CacheLookupRequest{}, new(checkv1.CacheLookupResponse), opts...)
}

// closeGrace is how long the connection has to close, when ctx has ended already.
const closeGrace = 10 * time.Millisecond

// close sends what the session and telemetry have left until ctx ends, and closes the connection if it is ours. gRPC takes seconds for
// that if the agent reads nothing. When ctx ends, close leaves that to a goroutine, and cuts the connection, which ends
// the goroutine.
func (r *remote) close(ctx context.Context) error {
	flush, cancel := context.WithTimeout(ctx, r.timeout) // as long as any end may take
	flushed := r.session.flush(flush)
	cancel()
	if r.exporter != nil {
		flushed = errors.Join(flushed, r.exporter.close(ctx))
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

// release closes the connection if it is ours, and unregisters the metrics.
func (r *remote) release() error {
	r.session.close()
	if r.shown != nil {
		_ = r.shown.Unregister() // fails where the provider is gone already
	}
	if r.dialled == nil {
		return nil
	}
	return r.dialled.Close()
}
