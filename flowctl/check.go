package flowctl

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/internal/wire"
)

// A check is one question to a remote agent, and what is kept of the answer until the flow has ended. It is one object,
// because all that a check costs beyond gRPC's own call is what is allocated here.
type check struct {
	agentapi.VerdictDetails
	response checkv1.CheckResponse          // to Check
	http     *checkhttpv1.CheckHTTPResponse // to CheckHTTP; nil: the question was Check
	raw      []byte                         // response as it came: telemetry has it without encoding it anew; nil where it was not kept
	start    time.Time
	returned time.Time // when the check came back

	// Whether anything came from the agent meanwhile: on a connection of ours anything at all, also what is for other
	// calls, and on another's only what this call got.
	remote          *remote
	seen            uint64
	header, trailer metadata.MD

	ctx   context.Context // of the call
	codec grpc.ForceCodecV2CallOption
	limit grpc.MaxRecvMsgSizeCallOption // of the answer; 0: the connection's own, for one with cached values
	room  [6]grpc.CallOption
}

// ask asks the agent.
func (c *check) ask(ctx context.Context, req *agentapi.Request) error {
	c.ctx = ctx
	defer func() { c.ctx = nil }() // the flow outlives it
	if req.Labels.HTTP() == nil {
		m := wire.Request(req)
		if req.Lookup() == nil {
			c.limit.MaxRecvMsgSize = maxAnswer + 2*textSize(m.GetLabels()) // which telemetry wants to see, keys twice
		}
		return clipError(c.remote.conn.Invoke(ctx, checkv1.FlowControlService_Check_FullMethodName, m, &c.response, c.options()...))
	}
	m := wire.HTTPRequest(req)
	c.http = new(checkhttpv1.CheckHTTPResponse)
	// The answer has its check response once more, in base64, and the labels in a header.
	c.limit.MaxRecvMsgSize = maxAnswer + 5*textSize(m.GetRequest().GetHeaders())
	err := c.remote.conn.Invoke(ctx, checkhttpv1.FlowControlServiceHTTP_CheckHTTP_FullMethodName, m, c.http, c.options()...)
	clipDenied(c.http)
	return clipError(err)
}

// textSize is about how many bytes an encoded map has.
func textSize(m map[string]string) int {
	n := 0
	for key, value := range m {
		n += len(key) + len(value) + 12
	}
	return n
}

// answer is what the agent decided, when it has answered.
func (c *check) answer() *checkv1.CheckResponse {
	if c.http != nil {
		return c.http.GetCheckResponse()
	}
	return &c.response
}

// options are those of the call. It is made once.
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

// heard reports whether anything came from the agent since the check began, if so much has come by now.
func (c *check) heard(received uint64) bool {
	return received != c.seen || len(c.header) > 0 || len(c.trailer) > 0
}

// record is the answer as telemetry reports it: without the values of caches.
func (c *check) record() ([]byte, error) {
	if c.raw != nil && c.answer().GetCacheLookupResponse() == nil {
		return c.raw, nil
	}
	return proto.Marshal(wire.WithoutValues(c.answer()))
}

// The check is the call's codec: gRPC's own for Protocol Buffers, which bounds the answer, and remembers its bytes where
// telemetry wants them.
var _ encoding.CodecV2 = (*check)(nil)

func (c *check) Marshal(v any) (mem.BufferSlice, error) { return c.remote.codec.Marshal(v) }

func (c *check) Unmarshal(data mem.BufferSlice, v any) error {
	err := c.remote.decode(c.ctx, data, v)
	if err == nil && c.remote.exporter != nil && c.http == nil && c.limit.MaxRecvMsgSize > 0 {
		c.raw = data.Materialize()
	}
	return err
}

func (c *check) Name() string { return c.remote.codec.Name() }
