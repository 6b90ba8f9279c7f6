package agent

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/runtime/protoiface"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/protofield"
	"github.com/headgate-go/headgate/internal/wire"
)

// The bounds of messages, besides gRPC's own of 4 MiB. A check has no other bound, because an error would let the flow
// run. Elements are counted before they are decoded, because two bytes of a message can become a hundred in memory.
const (
	maxSlots        = 1 << 12   // that one FlowEnd gives back
	maxKeysSize     = 320 << 10 // bytes of a CacheLookup or CacheDelete: as many of the longest keys as are looked up
	maxKeysRead     = 1 << 12   // global keys that are decoded; the refused ones among them are answered
	maxEntriesRead  = 1 << 12   // entries of a CacheUpsert that are decoded
	maxFields       = 1 << 16   // of a message and those in it, known or not, besides checks
	maxPoint        = 4096      // bytes of a control point; no policy names one that is longer than 255
	maxRequestField = 4096      // bytes of the request's method, host and so on that no policy names

	// The bytes of a FlowEnd. SDKs send one FlowEnd for a flow, so it has room for all slots of an answer: a slot takes
	// less than the decision that holds it. The rest is for the control point.
	maxEndSize = wire.MaxDecisions + 64<<10
)

// One FlowEnd gives back all slots of an answer.
const _ = uint(maxSlots - wire.MostDecisions)

// bounded returns the service with requests that are read by readRequest and pass the gate of ServerOptions.
func bounded(service grpc.ServiceDesc, named func() map[string]bool) *grpc.ServiceDesc {
	service.Methods = slices.Clone(service.Methods)
	for i := range service.Methods {
		handle := service.Methods[i].Handler
		service.Methods[i].Handler = func(server any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			return through(ctx, decode, func(decode func(any) error) (any, error) {
				return handle(server, ctx, decode, intercept)
			}, func(data []byte, m proto.Message) error { return readRequest(data, m, named()) })
		}
	}
	return &service
}

// through handles a call. Its message is read when the gate admits it, or at once on a server without the gate.
func through(ctx context.Context, decode func(any) error, handle func(decode func(any) error) (any, error), read func([]byte, proto.Message) error) (any, error) {
	if err := refusalOf(ctx); err != nil {
		return nil, err
	}
	c := callOf(ctx)
	c.find(ctx)
	err := errEncoding
	if c == nil || !compresses(ctx) {
		err = c.enter()
	}
	if err != nil {
		c.ready()
		c.over()
		return nil, err
	}
	size := 0
	response, err := handle(func(into any) error {
		m, ok := into.(proto.Message)
		if !ok {
			return decode(into)
		}
		var refused error // gRPC has a status of its own for what a codec returns
		err := decode(message{m, func(data []byte, m proto.Message) error {
			size = len(data)
			zipped := size > 0 && data[0] == gzipMark
			if !zipped && (c == nil || size < large) {
				return read(data, m)
			}
			// The time in which it is read is not the network's. Then gRPC waits for the end of the stream.
			if c.leave() {
				refused = errEvicted
				return nil
			}
			by := func(plain []byte) error {
				size = len(plain)
				return read(plain, m)
			}
			var fits bool
			var err error
			if zipped {
				fits, err = c.decompress(data, by)
			} else {
				fits, err = c.read(size, func() error { return by(data) })
			}
			_, isStatus := status.FromError(err)
			again := c.enter()
			switch {
			case !fits && !isCheck(m):
				refused = errFull
			case isStatus && err != nil:
				refused = err
			case err != nil:
				return err
			default:
				refused = again
			}
			return nil
		}})
		if c.ready() {
			return errEvicted
		}
		if refused != nil {
			return refused
		}
		if err == nil && !c.hold(m, size) && !isCheck(m) {
			return errFull
		}
		return err
	})
	c.ready()
	c.done()
	m, ok := response.(proto.Message)
	if err == nil && ok {
		return c.answer(ctx, m)
	}
	c.over()
	return response, err
}

// isCheck reports whether the message is a check. A check that finds no room is answered with a rejection.
func isCheck(m proto.Message) bool {
	switch m.(type) {
	case *checkv1.CheckRequest, *checkhttpv1.CheckHTTPRequest:
		return true
	}
	return false
}

var errFull = status.Error(codes.ResourceExhausted, "too many large requests are under way")

// A message is what the codec decodes into. It reads the bytes by a function, and not as protobuf does.
type message struct {
	proto.Message
	read func([]byte, proto.Message) error
}

func (m message) ProtoReflect() protoreflect.Message {
	return reflection{m.Message.ProtoReflect(), m.read}
}

type reflection struct {
	protoreflect.Message
	read func([]byte, proto.Message) error
}

func (r reflection) Interface() protoreflect.ProtoMessage {
	return message{r.Message.Interface(), r.read}
}

func (r reflection) ProtoMethods() *protoiface.Methods {
	return &protoiface.Methods{Unmarshal: func(in protoiface.UnmarshalInput) (protoiface.UnmarshalOutput, error) {
		return protoiface.UnmarshalOutput{Flags: protoiface.UnmarshalInitialized}, r.read(in.Buf, r.Message.Interface())
	}}
}

// readRequest decodes a request. Of a check it decodes what is needed: the labels that policies name, whole, and of the
// others those that the answer reports. It decodes as protobuf does, but is less strict. If an entry of a label or
// header is malformed, what comes before the error counts. A field that is not needed may hold anything.
func readRequest(data []byte, m proto.Message, named map[string]bool) error {
	switch m := m.(type) {
	case *checkv1.CheckRequest:
		return readCheckRequest(data, m, named)
	case *checkhttpv1.CheckHTTPRequest:
		return readCheckHTTPRequest(data, m, named)
	case *checkv1.FlowEndRequest:
		return readFew(data, m, 2, maxSlots, maxEndSize)
	case *checkv1.CacheLookupRequest:
		return readFew(data, m, 3, maxKeysRead, maxKeysSize)
	case *checkv1.CacheDeleteRequest:
		return readFew(data, m, 3, maxKeysRead, maxKeysSize)
	case *checkv1.CacheUpsertRequest:
		return readFew(data, m, 3, maxEntriesRead, len(data))
	case *emptypb.Empty: // an export: what reads it looks at few of its fields
		if protofield.Count(data, maxFields) > maxFields {
			return errFields
		}
		m.ProtoReflect().SetUnknown(slices.Clone(data))
		return nil
	default:
		return unmarshal(data, m)
	}
}

// readFew decodes a message of at most size bytes, with at most most elements of the field that repeats.
func readFew(data []byte, m proto.Message, repeats protowire.Number, most, size int) error { //nolint:unparam // the bounds are of different things
	if len(data) > size {
		return status.Error(codes.ResourceExhausted, fmt.Sprintf("message of %d bytes is larger than %d", len(data), size))
	}
	left := maxFields
	if countFields(data, m.ProtoReflect().Descriptor(), &left); left < 0 {
		return errFields
	}
	n := 0
	few, err := protofield.Filter(data, func(number protowire.Number, _ []byte) bool {
		if number == repeats {
			n++
		}
		return number != repeats || n <= most
	})
	if err != nil {
		return err
	}
	return unmarshal(few, m)
}

var errFields = status.Error(codes.ResourceExhausted, fmt.Sprintf("the message has more than %d fields", maxFields))

// countFields subtracts how many fields a message and those in it have, and ends when none are left.
func countFields(data []byte, of protoreflect.MessageDescriptor, left *int) {
	if *left -= protofield.Count(data, *left); *left < 0 {
		return
	}
	protofield.Walk(data, func(field protowire.Number, data []byte, _ uint64) {
		if *left < 0 || len(data) == 0 {
			return
		}
		if d := of.Fields().ByNumber(field); d != nil && d.Message() != nil {
			countFields(data, d.Message(), left)
		}
	})
}

// Field numbers. The two kinds of checks share only the numbers of our own fields.
const (
	checkRequestPoint     protowire.Number = 1
	checkRequestLabels    protowire.Number = 2
	checkRequestRampMode  protowire.Number = 3
	checkRequestLookup    protowire.Number = 4
	checkRequestExpectEnd protowire.Number = 5

	httpRequestRequest   protowire.Number = 3
	httpRequestPoint     protowire.Number = 4
	httpRequestRampMode  protowire.Number = 5
	httpRequestExpectEnd protowire.Number = 6

	requestMethod   protowire.Number = 1
	requestHeaders  protowire.Number = 2
	requestPath     protowire.Number = 3
	requestHost     protowire.Number = 4
	requestScheme   protowire.Number = 5
	requestSize     protowire.Number = 6
	requestProtocol protowire.Number = 7

	requestDryRun  protowire.Number = 1001
	requestMaxWait protowire.Number = 1002
	requestNumber  protowire.Number = 1004

	httpRequestLabels protowire.Number = 1003

	durationSeconds protowire.Number = 1
	durationNanos   protowire.Number = 2

	lookupPoint  protowire.Number = 1
	lookupResult protowire.Number = 2
	lookupGlobal protowire.Number = 3
)

func readCheckRequest(data []byte, m *checkv1.CheckRequest, named map[string]bool) error {
	labels := picked{named: named}
	var controlPoint []byte
	var lookup *lookupReader
	for rest := data; len(rest) > 0; {
		field, data, n, after, ok := protofield.Next(rest)
		if !ok {
			return protofield.ErrMalformed
		}
		rest = after
		if data == nil {
			switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
			case checkRequestRampMode:
				m.RampMode = n != 0
			case checkRequestExpectEnd:
				m.ExpectEnd = n != 0
			case requestDryRun:
				m.DryRun = n != 0
			case requestNumber:
				m.SessionCheck = n
			}
			continue
		}
		switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
		case checkRequestPoint:
			controlPoint = data
		case checkRequestLabels:
			key, value := entryOf(data)
			labels.add(key, value)
		case checkRequestLookup:
			if lookup == nil {
				lookup = &lookupReader{m: new(checkv1.CacheLookupRequest)}
			}
			if !lookup.read(data) {
				return protofield.ErrMalformed
			}
		case requestMaxWait:
			if m.GetMaxWait() == nil {
				m.MaxWait = new(durationpb.Duration)
			}
			if !readDuration(m.GetMaxWait(), data) {
				return protofield.ErrMalformed
			}
		}
	}
	m.ControlPoint = point(controlPoint)
	m.Labels = labels.labels()
	if lookup != nil {
		m.CacheLookupRequest = lookup.done()
	}
	return nil
}

// readDuration reads more of a duration, and reports whether it is well-formed.
func readDuration(d *durationpb.Duration, data []byte) bool {
	return protofield.Walk(data, func(field protowire.Number, data []byte, n uint64) {
		switch {
		case data != nil:
		case field == durationSeconds:
			d.Seconds = int64(n)
		case field == durationNanos:
			d.Nanos = int32(n)
		}
	})
}

// A lookupReader reads the lookup of a check, as far as an answer can report it.
type lookupReader struct {
	m             *checkv1.CacheLookupRequest
	point, result []byte
}

// read reads more of the lookup, and reports whether it is well-formed.
func (l *lookupReader) read(data []byte) bool {
	for rest := data; len(rest) > 0; {
		field, data, _, after, ok := protofield.Next(rest)
		if !ok {
			return false
		}
		rest = after
		if data == nil {
			continue // a number where text belongs
		}
		switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
		case lookupPoint:
			l.point = data
		case lookupResult:
			l.result = data
		case lookupGlobal:
			if len(l.m.GetGlobalCacheKeys()) < maxKeysRead && len(data) <= maxRefused {
				l.m.GlobalCacheKeys = append(l.m.GlobalCacheKeys, text(data))
			}
		}
	}
	return true
}

func (l *lookupReader) done() *checkv1.CacheLookupRequest {
	l.m.ControlPoint = point(l.point)
	l.m.ResultCacheKey = text(l.result[:min(len(l.result), maxRefused)])
	return l.m
}

// point returns a control point. If it is too long for any policy, the beginning is enough.
func point(data []byte) string { return text(data[:min(len(data), maxPoint)]) }

// entryOf is an entry of a map from text to text.
func entryOf(data []byte) (key, value []byte) {
	for rest := data; len(rest) > 0; {
		field, data, _, after, ok := protofield.Next(rest)
		if !ok {
			break
		}
		rest = after
		if data == nil {
			continue
		}
		switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
		case 1:
			key = data
		case 2:
			value = data
		}
	}
	return key, value
}

func readCheckHTTPRequest(data []byte, m *checkhttpv1.CheckHTTPRequest, named map[string]bool) error {
	request := httpReader{headers: headersRead{named: named}}
	labels := picked{named: named}
	var controlPoint []byte
	for rest := data; len(rest) > 0; {
		field, data, n, after, ok := protofield.Next(rest)
		if !ok {
			return protofield.ErrMalformed
		}
		rest = after
		if data == nil {
			switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
			case httpRequestRampMode:
				m.RampMode = n != 0
			case httpRequestExpectEnd:
				m.ExpectEnd = n != 0
			case requestDryRun:
				m.DryRun = n != 0
			case requestNumber:
				m.SessionCheck = n
			}
			continue
		}
		switch field { //nolint:exhaustive // of the numbers of fields that there are, a few are of interest
		case httpRequestRequest:
			if m.GetRequest() == nil {
				m.Request = new(checkhttpv1.CheckHTTPRequest_HttpRequest)
			}
			if !request.read(data) {
				return protofield.ErrMalformed
			}
		case httpRequestPoint:
			controlPoint = data
		case httpRequestLabels:
			key, value := entryOf(data)
			labels.add(key, value)
		case requestMaxWait:
			if m.GetMaxWait() == nil {
				m.MaxWait = new(durationpb.Duration)
			}
			if !readDuration(m.GetMaxWait(), data) {
				return protofield.ErrMalformed
			}
		}
	}
	m.ControlPoint = point(controlPoint)
	m.Labels = labels.labels()
	if m.GetRequest() != nil {
		request.fill(m.GetRequest())
	}
	return nil
}

// An httpReader reads the request of a CheckHTTP, all but the body.
type httpReader struct {
	headers headersRead
	texts   [requestProtocol + 1][]byte // by number
	size    int64
}

// read reads more of the request, and reports whether it is well-formed.
func (h *httpReader) read(data []byte) bool {
	for rest := data; len(rest) > 0; {
		field, data, n, after, ok := protofield.Next(rest)
		if !ok {
			return false
		}
		rest = after
		switch {
		case data == nil:
			if field == requestSize {
				h.size = int64(n)
			}
		case field == requestHeaders:
			name, value := entryOf(data)
			h.headers.add(name, value)
		case int(field) < len(h.texts):
			h.texts[field] = data
		}
	}
	return true
}

func (h *httpReader) fill(m *checkhttpv1.CheckHTTPRequest_HttpRequest) {
	value := func(number protowire.Number, label string) string {
		data := h.texts[number]
		if _, ok := h.headers.named[label]; !ok {
			data = data[:min(len(data), maxRequestField)]
		}
		return text(data)
	}
	m.Method = value(requestMethod, "http.method")
	m.Path = value(requestPath, "http.target")
	m.Host = value(requestHost, "http.host")
	m.Scheme = value(requestScheme, "http.scheme")
	m.Protocol = value(requestProtocol, "http.flavor")
	m.Size = h.size
	m.Headers = h.headers.headers()
}

// cutValue returns a value that is only reported.
func cutValue(data []byte) string {
	return wire.Cut(text(data[:min(len(data), wire.MaxReportedValue+4)]), wire.MaxReportedValue)
}
