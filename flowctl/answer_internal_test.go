package flowctl

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
)

// An answer that is not small is not decoded after its check's time. A small one is, because it may name slots.
func TestLateAnswersAreNotDecoded(t *testing.T) {
	inTime := t.Context()
	late, cancel := context.WithCancel(inTime)
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context
		size int // of a label's value
		want error
	}{
		{"small", late, smallAnswer / 2, nil},
		{"larger", late, smallAnswer, errLate},
		{"larger and in time", inTime, smallAnswer, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answer := &checkv1.CheckResponse{TelemetryFlowLabels: map[string]string{"k": strings.Repeat("v", tt.size)}}
			data, err := proto.Marshal(answer)
			if err != nil {
				t.Fatal(err)
			}
			r := &remote{codec: boundedCodec{encoding.GetCodecV2("proto")}}
			got := new(checkv1.CheckResponse)
			err = r.decode(tt.ctx, mem.BufferSlice{mem.SliceBuffer(data)}, got, 0)
			if !errors.Is(err, tt.want) || proto.Equal(got, answer) != (tt.want == nil) {
				t.Errorf("decode() = %v want %v; %v", err, tt.want, got)
			}
		})
	}
}
