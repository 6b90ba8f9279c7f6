package agent

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/internal/testing/race"
)

func bytesField(number protowire.Number, data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), data)
}

// manySize is the size of messages of many elements. They would take more than twice as much in memory.
var manySize = race.Pick(1<<20, 4<<20) - 64

func repeat(element []byte) []byte { return bytes.Repeat(element, manySize/len(element)) }

func distinct(number protowire.Number) []byte {
	var m []byte
	for i := 0; len(m) < manySize; i++ {
		m = append(m, bytesField(number, append(bytesField(1, fmt.Append(nil, "k", i)), bytesField(2, nil)...))...)
	}
	return m
}

// A message of megabytes becomes little in memory, whatever it holds many of.
func TestRequestsAreBoundedInMemory(t *testing.T) {
	point := bytesField(1, []byte("point"))
	for _, tt := range []struct {
		name string
		data []byte
		m    proto.Message
	}{
		{"empty labels", append(point, repeat([]byte{0x12, 0})...), new(checkv1.CheckRequest)},
		{"labels", append(point, distinct(2)...), new(checkv1.CheckRequest)},
		{"one label", append(point, bytesField(2, append(bytesField(1, []byte("k")), bytesField(2, make([]byte, 4<<20-64))...))...), new(checkv1.CheckRequest)},
		{"a check's empty keys", append(point, bytesField(4, repeat([]byte{0x1a, 0}))...), new(checkv1.CheckRequest)},
		{"waits", append(point, repeat(bytesField(1002, nil))...), new(checkv1.CheckRequest)},
		{"lookups", append(point, repeat([]byte{0x22, 0})...), new(checkv1.CheckRequest)},
		{"a control point", bytesField(1, make([]byte, 4<<20-64)), new(checkv1.CheckRequest)},
		{"headers", bytesField(3, distinct(2)), new(checkhttpv1.CheckHTTPRequest)},
		{"headers' names", bytesField(3, repeat(bytesField(2, bytesField(1, bytes.Repeat([]byte{'n'}, 300))))), new(checkhttpv1.CheckHTTPRequest)},
		{"a body", bytesField(3, bytesField(8, make([]byte, 4<<20-64))), new(checkhttpv1.CheckHTTPRequest)},
		{"a path", bytesField(3, bytesField(3, make([]byte, 4<<20-64))), new(checkhttpv1.CheckHTTPRequest)},
		{"addresses", repeat([]byte{0x0a, 0, 0x12, 0}), new(checkhttpv1.CheckHTTPRequest)},
		{"slots", repeat([]byte{0x12, 0}), new(checkv1.FlowEndRequest)},
		{"as many slots as may be", bytes.Repeat([]byte{0x12, 0}, maxEndSize/2), new(checkv1.FlowEndRequest)},
		{"keys", repeat([]byte{0x1a, 0}), new(checkv1.CacheLookupRequest)},
		{"as many keys as may be", bytes.Repeat([]byte{0x1a, 0}, maxKeysSize/2), new(checkv1.CacheLookupRequest)},
		{"deleted keys", repeat([]byte{0x1a, 0}), new(checkv1.CacheDeleteRequest)},
		{"entries", repeat([]byte{0x1a, 0}), new(checkv1.CacheUpsertRequest)},
		{"distinct entries", distinct(3), new(checkv1.CacheUpsertRequest)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_ = readRequest(tt.data, tt.m, nil)
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20 {
				t.Errorf("%d KiB are allocated for a message of %d", n>>10, len(tt.data)>>10)
			}
		})
	}
}

// A message that is no check is refused before it is decoded if it has many fields, wherever they are and whether or not
// they are known.
func TestMessagesOfManyFieldsAreRefused(t *testing.T) {
	of := func(field []byte) []byte { return bytes.Repeat(field, maxEndSize/len(field)-1) }
	for _, m := range []proto.Message{new(checkv1.FlowEndRequest), new(checkv1.CacheLookupRequest), new(checkv1.CacheDeleteRequest), new(checkv1.CacheUpsertRequest)} {
		for name, fields := range map[string][]byte{
			"numbers":          of([]byte{0x78, 0}),
			"text":             of([]byte{0x7a, 0}),
			"groups":           of([]byte{0x7b, 0x7c}),
			"groups in groups": of(append(bytes.Repeat([]byte{0x7b}, 5000), bytes.Repeat([]byte{0x7c}, 5000)...)),
		} {
			if err := readRequest(fields, m, nil); !errors.Is(err, errFields) {
				t.Errorf("%T with many %s: %v want %v", m, name, err, errFields)
			}
		}
	}
	many := repeat([]byte{0x78, 0})
	for name, data := range map[string][]byte{
		"in an entry":              bytesField(2, many),
		"in an entry of a map":     bytesField(3, many),
		"in the entry's value":     bytesField(3, bytesField(2, many)),
		"in a duration":            bytesField(2, bytesField(3, many)),
		"in many entries of a map": repeat(bytesField(3, bytes.Repeat([]byte{0x78, 0}, 100))),
	} {
		if err := readRequest(data, new(checkv1.CacheUpsertRequest), nil); !errors.Is(err, errFields) {
			t.Errorf("many fields %s: %v want %v", name, err, errFields)
		}
	}
}

// What is read by hand is what protobuf reads, where nothing is left out.
func TestRequestsAreReadAsProtobufReadsThem(t *testing.T) {
	for _, want := range []proto.Message{
		new(checkv1.CheckRequest),
		&checkv1.CheckRequest{
			ControlPoint: "point", Labels: map[string]string{"a": "1", "": "empty", "b": ""}, RampMode: true, ExpectEnd: true, DryRun: true,
			CacheLookupRequest: &checkv1.CacheLookupRequest{ControlPoint: "point", ResultCacheKey: "r", GlobalCacheKeys: []string{"g", "", "h"}},
			MaxWait:            &durationpb.Duration{Seconds: -3, Nanos: -7},
		},
		&checkv1.CheckRequest{MaxWait: new(durationpb.Duration)},
		&checkhttpv1.CheckHTTPRequest{MaxWait: durationpb.New(time.Minute + 1)},
		&checkv1.CheckRequest{CacheLookupRequest: new(checkv1.CacheLookupRequest)},
		&checkhttpv1.CheckHTTPRequest{
			ControlPoint: "web", RampMode: true, ExpectEnd: true, DryRun: true,
			Request: &checkhttpv1.CheckHTTPRequest_HttpRequest{
				Method: "GET", Path: "/", Host: "h", Scheme: "https", Size: -1, Protocol: "HTTP/2",
				Headers: map[string]string{"x-user": "u", "X-User": "v", "x_user": "w", "baggage": "a=b"},
			},
		},
		&checkv1.FlowEndRequest{ControlPoint: "p", InflightRequests: []*checkv1.InflightRequestRef{{Label: "l", Tokens: 1}, {}}},
	} {
		data, err := proto.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got := want.ProtoReflect().New().Interface()
		if err := readRequest(data, got, map[string]bool{"b": false}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.FilterField(new(checkv1.CheckRequest), "labels", cmp.Comparer(func(a, b map[string]string) bool { return fmt.Sprint(a) == fmt.Sprint(b) }))); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		for cut := range data {
			_ = readRequest(data[:cut], want.ProtoReflect().New().Interface(), nil) // does not panic
		}
	}
}
