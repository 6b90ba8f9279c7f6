package flowctl

import (
	"context"
	"time"

	"github.com/headgate-go/headgate/internal/flowinfo"
)

// pauses shows the pauses of package httpguard's Transports for their client. It does not show the host of an upstream,
// which is a label's value.
type pauses Client

var _ flowinfo.Pauses = (*pauses)(nil)

// Began counts a pause, and logs it.
func (p *pauses) Began(ctx context.Context, controlPoint string, status int, pause time.Duration) {
	if p.observer != nil && p.observer.pauses != nil {
		p.observer.pauses.Add(ctx, 1, p.observer.set(outcome{controlPoint: controlPoint}))
	}
	p.pauseLog.warn(p.logger, "headgate: an upstream asks for a pause",
		"control_point", controlPoint, "status", status, "pause", pause)
}

// Refused counts a request that was not sent, and logs it: a pause may last for hours.
func (p *pauses) Refused(ctx context.Context, controlPoint string, left time.Duration) {
	if p.observer != nil && p.observer.paused != nil {
		p.observer.paused.Add(ctx, 1, p.observer.set(outcome{controlPoint: controlPoint}))
	}
	p.pausedLog.warn(p.logger, "headgate: a request was not sent because of a pause",
		"control_point", controlPoint, "left", left)
}
