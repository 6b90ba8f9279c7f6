package frames_test

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"testing"

	"golang.org/x/net/http2"

	"github.com/headgate-go/headgate/internal/frames"
)

// encode is a frame, whatever is in it.
func encode(kind, flags byte, stream uint32, payload ...byte) []byte {
	var b bytes.Buffer
	_ = http2.NewFramer(&b, nil).WriteRawFrame(http2.FrameType(kind), http2.Flags(flags), stream, payload)
	return b.Bytes()
}

// However the bytes come in pieces, the frames and their data are the same.
func TestFollower(t *testing.T) {
	const (
		settings = byte(http2.FrameSettings)
		data     = byte(http2.FrameData)
		headers  = byte(http2.FrameHeaders)
		end      = byte(http2.FlagDataEndStream)
		padded   = byte(http2.FlagDataPadded)
	)
	long, largest := bytes.Repeat([]byte{'z'}, 300), make([]byte, 1<<24-1)
	for _, tt := range []struct {
		name       string
		bytes      []byte
		begin, all []string // without and with data
	}{
		{"nothing", nil, nil, nil},
		{"settings", encode(settings, 0, 0, 1, 2, 3, 4, 5, 6), []string{"4 0 0"}, []string{"4 0 0"}},
		{"data", encode(data, 0, 1, 'a', 'b', 'c'), []string{"0 0 1"}, []string{"0 0 1", "data 1 abc end"}},
		{"no data", encode(data, end, 1), []string{"0 1 1"}, []string{"0 1 1", "data 1  end"}},
		{"long data", encode(data, 0, 7, long...), []string{"0 0 7"}, []string{"0 0 7", "data 7 " + string(long) + " end"}},
		{"padding", encode(data, padded, 3, 2, 'd', 'e', 0, 0), []string{"0 8 3"}, []string{"0 8 3", "data 3 de end"}},
		{"only padding", encode(data, padded, 3, 3, 0, 0, 0), []string{"0 8 3"}, []string{"0 8 3", "data 3  end"}},
		{"more padding than there is room for", encode(data, padded, 3, 9, 'x'), []string{"0 8 3"}, []string{"0 8 3", "data 3  end"}},
		{"a frame behind padding", append(encode(data, padded, 3, 1, 'd', 0), encode(6, 1, 0, make([]byte, 8)...)...), []string{"0 8 3", "6 1 0"}, []string{"0 8 3", "data 3 d end", "6 1 0"}},
		{"a stream with the reserved bit", encode(headers, end, 1<<31|5, 'h'), []string{"1 1 5"}, []string{"1 1 5"}},
		{"empty frames", slices.Repeat(encode(9, 0, 1), 3), []string{"9 0 1", "9 0 1", "9 0 1"}, []string{"9 0 1", "9 0 1", "9 0 1"}},
		{"the longest frame", append(encode(2, 0, 1, largest...), encode(6, 0, 0)...), []string{"2 0 1", "6 0 0"}, []string{"2 0 1", "6 0 0"}},
		{"a part of a header", encode(6, 0, 0)[:8], nil, nil},
	} {
		for _, preface := range []int{0, frames.PrefaceBytes} {
			for _, piece := range []int{1, 2, 3, 4, 5, 8, 9, 10, 23, 24, 25, 64, 1 << 25} {
				if piece < 64 && len(tt.bytes) > 1<<20 {
					continue // it takes seconds
				}
				for i, want := range [][]string{tt.begin, tt.all} {
					f := frames.After(preface)
					var got []string
					var held []byte
					data := func(f frames.Frame, p []byte, end bool) {
						held = append(held, p...)
						if end {
							got = append(got, fmt.Sprintf("data %d %s end", f.Stream, held))
							held = nil
						}
					}
					if i == 0 {
						data = nil
					}
					for part := range slices.Chunk(append(make([]byte, preface), tt.bytes...), piece) {
						f.Each(part, func(f frames.Frame) { got = append(got, fmt.Sprintf("%d %d %d", f.Kind, f.Flags, f.Stream)) }, data)
					}
					if !slices.Equal(got, want) {
						t.Fatalf("%s behind %d bytes, in pieces of %d: %.100q want %.100q", tt.name, preface, piece, got, want)
					}
				}
			}
		}
	}
}

// What begins is what x/net reads, however the bytes come.
func FuzzFollower(f *testing.F) {
	f.Add(append(encode(1, 4, 1, 'h'), encode(0, 1, 1, 0, 0, 0, 0, 0)...), []byte{1, 5, 100})
	f.Add(slices.Repeat(encode(9, 0, 1), 4), []byte{9})
	f.Add(encode(0, 8, 3, 2, 'd', 'e', 0, 0), []byte{})
	f.Fuzz(func(t *testing.T, all, pieces []byte) {
		var want []frames.Frame
		for r := bytes.NewReader(all); ; {
			h, err := http2.ReadFrameHeader(r)
			if err != nil {
				break
			}
			want = append(want, frames.Frame{Length: int(h.Length), Kind: byte(h.Type), Flags: byte(h.Flags), Stream: h.StreamID})
			if _, err := io.CopyN(io.Discard, r, int64(h.Length)); err != nil {
				break
			}
		}
		for _, data := range []func(frames.Frame, []byte, bool){nil, func(frames.Frame, []byte, bool) {}} {
			var follower frames.Follower
			var got []frames.Frame
			for rest, i := all, 0; len(rest) > 0; i++ {
				n := len(rest)
				if len(pieces) > 0 {
					n = min(n, 1+int(pieces[i%len(pieces)]))
				}
				follower.Each(rest[:n], func(f frames.Frame) { got = append(got, f) }, data)
				rest = rest[n:]
			}
			if !slices.Equal(got, want) {
				t.Errorf("%v want %v", got, want)
			}
		}
	})
}

// Following allocates nothing. Its time is that of one small frame.
func BenchmarkFollower(b *testing.B) {
	all := slices.Repeat(encode(6, 1, 0, make([]byte, 7)...), 2048)
	f := frames.After(0)
	count := 0
	begin := func(frames.Frame) { count++ }
	b.ReportAllocs()
	for b.Loop() {
		f.Each(all, begin, nil)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(count), "ns/frame")
}
