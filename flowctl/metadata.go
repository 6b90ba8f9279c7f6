package flowctl

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc/metadata"

	"github.com/headgate-go/headgate/internal/wire"
)

// keyHeader is the metadata that carries the API key.
const keyHeader = "x-api-key"

// maxMetadata is how many bytes of the caller's metadata go with a call, counted as HTTP/2 does: with fieldOverhead for each
// value. It leaves room below the 24 KiB that Headgate's agents read of headers.
const (
	maxMetadata   = 16 << 10
	fieldOverhead = 32
)

// sendable returns the context for a call to the agent, without the caller's outgoing metadata that cannot travel. A
// proxy may pass on metadata of a stranger, and gRPC or the agent would refuse the whole call because of it. A flow
// whose check is refused has no limits.
func (r *remote) sendable(ctx context.Context) context.Context { return r.sendableWith(ctx, nil) }

// A sessionContext is a context with the metadata that names a session. It is part of a check, so that a check allocates
// nothing for it.
type sessionContext struct {
	context.Context
	sent context.Context // has the metadata
}

// Value finds the metadata, and then what the caller's context has. It has no metadata, or the context would be another
// one.
func (c *sessionContext) Value(key any) any {
	if v := c.sent.Value(key); v != nil {
		return v
	}
	return c.Context.Value(key)
}

// sendableWith is sendable for a check, which is part of the session. Room is for the context.
func (r *remote) sendableWith(ctx context.Context, room *sessionContext) context.Context {
	var names []string
	if room != nil && !r.session.foreign.Load() {
		room.sent = r.session.sent
		names = r.session.names
	}
	md, ok := metadata.FromOutgoingContext(ctx) // a copy, with keys in lower case
	switch {
	case !ok && names == nil:
		return ctx
	case !ok:
		room.Context = ctx
		return room
	}
	delete(md, wire.SessionHeader) // another client's, if it is there
	left, size := 0, 0
	for key, values := range md {
		switch {
		case ignored(key), r.ownKey && key == keyHeader:
			delete(md, key)
		case !travels(key, values):
			left += max(len(values), 1)
			delete(md, key)
		default:
			size += fieldsSize(key, values)
		}
	}
	if size > maxMetadata {
		left += shrink(md, size)
	}
	if left > 0 {
		r.metadataLog.warn(r.logger, "headgate: metadata did not go with a call to the agent", "left_out", left)
	}
	if names != nil {
		md[wire.SessionHeader] = names
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// shrink takes out the largest keys until the rest may travel, and counts their values.
func shrink(md metadata.MD, size int) (left int) {
	keys := make([]string, 0, len(md))
	for key := range md {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b string) int {
		return cmp.Or(fieldsSize(b, md[b])-fieldsSize(a, md[a]), strings.Compare(b, a))
	})
	for _, key := range keys {
		if size <= maxMetadata {
			break
		}
		size -= fieldsSize(key, md[key])
		left += len(md[key])
		delete(md, key)
	}
	return left
}

func fieldsSize(key string, values []string) int {
	size := 0
	for _, value := range values {
		n := len(value)
		if strings.HasSuffix(key, "-bin") {
			n = (n + 2) / 3 * 4 // in base64
		}
		size += len(key) + n + fieldOverhead
	}
	return size
}

// ignored reports whether gRPC never sends metadata of this key, because it sets that header itself. Metadata that a
// server received has some of these keys. So they are not logged when a program passes all of it on.
func ignored(key string) bool {
	switch key {
	case "content-type", "user-agent", "te", "grpc-message-type", "grpc-encoding", "grpc-accept-encoding", "grpc-message",
		"grpc-status", "grpc-timeout":
		return true
	default:
		return strings.HasPrefix(key, ":")
	}
}

// travels reports whether metadata may be sent: by the rules of gRPC, and by those of HTTP/2 for headers that are about one
// connection or one body.
func travels(key string, values []string) bool {
	switch key {
	case "", "connection", "content-length", "host", "http2-settings", "keep-alive", "proxy-connection", "trailer", "transfer-encoding", "upgrade":
		return false
	}
	for i := range len(key) {
		if c := key[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' {
			return false
		}
	}
	if strings.HasSuffix(key, "-bin") {
		return true
	}
	for _, value := range values {
		for i := range len(value) {
			if value[i] < ' ' || value[i] > '~' {
				return false
			}
		}
	}
	return true
}
