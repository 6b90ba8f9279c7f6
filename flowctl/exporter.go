package flowctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/telemetry"
)

// The bounds of the exporter. Bytes are those of spans as they are sent.
const (
	exportEvery   = time.Second
	exportTimeout = 10 * time.Second
	hurryBytes    = 28 << 10 // wake the exporter before its time: gRPC has buffers of 32 KiB at hand, and the next are of 1 MiB
	batchBytes    = 3 << 20  // messages end at 4 MiB
	maxRecords    = 8192     // that wait to be sent
	maxBytes      = 8 << 20  // twice, while some are being sent
)

// An exporter sends a record of each flow to the agent. The agent's policies on latency and load need these records.
// Recording never blocks: what does not fit is dropped and counted. Flows are encoded here rather than handed to an
// OpenTelemetry SDK, because the agent needs all of them, whatever the application samples.
type exporter struct {
	invoke   invoker
	logger   *slog.Logger
	answered func()

	mu      sync.Mutex
	waiting []telemetry.Record
	bytes   int // of waiting, as spans
	dropped int64
	closed  bool

	wake   chan struct{} // records wait; has room for one
	hurry  chan struct{} // there are many of them; has room for one
	stop   chan struct{}
	idle   chan struct{} // closed when run has returned
	cancel context.CancelFunc
	drops  limitedLog
	spare  []telemetry.Record // the buffer that is not in use
	batch  telemetry.Batch    // of the flush that is under way: run's, and when run has returned, close's
	last   error              // of the flush that was under way when close was called; for close, when run has returned
}

// An invoker makes a call to the agent.
type invoker func(ctx context.Context, method string, req, m any, opts ...grpc.CallOption) error

func newExporter(invoke invoker, logger *slog.Logger, answered func()) *exporter {
	ctx, cancel := context.WithCancel(context.Background()) //nolint:forbidigo // the exporter sends for all callers; close cancels it
	x := &exporter{
		invoke: invoke, logger: logger, answered: answered,
		wake: make(chan struct{}, 1), hurry: make(chan struct{}, 1),
		stop: make(chan struct{}), idle: make(chan struct{}), cancel: cancel,
	}
	go x.run(ctx)
	return x
}

// record adds the record of a flow that ends now.
func (x *exporter) record(c *check, ended agentapi.Ended, dryRun bool) {
	check, err := c.record()
	start := c.start.UnixNano()
	r := telemetry.Record{
		Start:  start,
		Work:   start + int64(c.returned.Sub(c.start)), // by the monotonic clock, even if the wall clock is set
		End:    start + int64(time.Since(c.start)),
		Status: telemetry.Error,
		DryRun: dryRun,
		Check:  check,

		Canceled: !ended.Told(),
	}
	if ended == agentapi.EndedOK || ended == agentapi.EndedUnknown {
		r.Status = telemetry.OK
	}
	size := telemetry.Size(len(check))
	x.mu.Lock()
	fits := err == nil && !x.closed && len(x.waiting) < maxRecords && x.bytes+size <= maxBytes && size < batchBytes
	if !fits {
		x.dropped++
		closed := x.closed
		x.mu.Unlock()
		if closed { // there will be no flush to say so
			x.drops.warn(x.logger, "headgate: telemetry of flows was dropped", "error", agentapi.ErrClosed)
		}
		return
	}
	x.waiting = append(x.waiting, r)
	x.bytes += size
	first, many := len(x.waiting) == 1, x.bytes > hurryBytes
	x.mu.Unlock()
	if first {
		signal(x.wake)
	}
	if many {
		signal(x.hurry)
	}
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run sends records every second while there are any, until stop.
func (x *exporter) run(ctx context.Context) {
	defer close(x.idle)
	for {
		select {
		case <-x.stop:
			return
		case <-x.wake:
		}
		timer := time.NewTimer(exportEvery)
		select {
		case <-x.stop:
			timer.Stop()
			return
		case <-x.hurry:
			timer.Stop()
		case <-timer.C:
		}
		err := x.flush(ctx)
		select {
		case <-x.stop:
			x.last = err
			return
		default: // the log has it
		}
	}
}

// close sends what is waiting, until ctx ends.
func (x *exporter) close(ctx context.Context) error {
	x.mu.Lock()
	x.closed = true
	x.mu.Unlock()
	close(x.stop)
	stopCancel := context.AfterFunc(ctx, x.cancel) // an export that hangs must not outlast ctx
	<-x.idle
	stopCancel()
	x.cancel()
	err := errors.Join(x.last, x.flush(ctx))
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	return err
}

// flush sends all that is waiting, in as many batches as it takes, until ctx ends. What cannot be sent is dropped, because the agent's
// view of the load is one of now.
func (x *exporter) flush(ctx context.Context) error {
	x.mu.Lock()
	records := x.waiting
	x.waiting, x.bytes, x.spare = x.spare[:0], 0, nil
	x.mu.Unlock()

	var failed error
	lost := 0
	for rest := records; len(rest) > 0; {
		if err := ctx.Err(); err != nil { // a batch can take long to encode
			failed = cmp.Or(failed, err)
			lost += len(rest)
			break
		}
		var message []byte
		var n int
		message, n = x.batch.Encode(rest, batchBytes)
		if err := x.send(ctx, message); err != nil {
			failed = err
			lost += n
		}
		rest = rest[n:]
	}
	clear(records)
	x.mu.Lock()
	if cap(records) <= maxRecords {
		x.spare = records[:0]
	}
	x.dropped += int64(lost)
	dropped := x.dropped
	x.mu.Unlock()
	if dropped > 0 && x.drops.warn(x.logger, "headgate: telemetry of flows was dropped", "flows", dropped, "error", failed) {
		x.mu.Lock()
		x.dropped -= dropped
		x.mu.Unlock()
	}
	if lost > 0 {
		return fmt.Errorf("%w: %w", ownError(fmt.Sprintf("telemetry of %d flows was not sent", lost)), failed)
	}
	return nil
}

func (x *exporter) send(ctx context.Context, message []byte) error {
	ctx, cancel := context.WithTimeout(ctx, exportTimeout)
	defer cancel()
	// Fields that a message does not know are sent as they are, and of the answer nothing is read.
	req := new(emptypb.Empty)
	req.ProtoReflect().SetUnknown(message)
	err := x.invoke(ctx, telemetry.Export, req, new(emptypb.Empty))
	if err == nil {
		x.answered()
	}
	return err
}
