// Package frames follows the frames of an HTTP/2 connection in the bytes that it carries.
package frames

import "encoding/binary"

// The types and flags of frames that are looked at.
const (
	Data         = 0
	Headers      = 1
	RSTStream    = 3
	Settings     = 4
	GoAway       = 7
	Continuation = 9

	EndStream  = 1
	EndHeaders = 4
	Padded     = 8
)

const headerBytes = 9

// PrefaceBytes is the length of what a client sends before its first frame.
const PrefaceBytes = 24

// A Frame is a frame's header.
type Frame struct {
	Length int // bytes of the payload
	Kind   byte
	Flags  byte
	Stream uint32
}

// A Follower finds the frames in a sequence of bytes that comes in pieces. It allocates nothing. The zero value begins
// with a frame. It is not safe for concurrent use.
type Follower struct {
	frame  Frame
	have   int // bytes of the next header
	skip   int // bytes that are not looked at, before all else
	padded bool
	data   int // bytes of a DATA frame to come
	tail   int // bytes of its padding
	bytes  [headerBytes]byte
}

// After returns a Follower of frames that come after so many other bytes.
func After(bytes int) Follower { return Follower{skip: bytes} }

// Left is how many bytes of the frame are to come whose header came last, if no payload is looked at.
func (f *Follower) Left() int { return f.skip }

// Each calls begin with each frame whose header ends in p. It calls data with the pieces of DATA frames that are not
// padding. If data is nil, no payload is looked at.
func (f *Follower) Each(p []byte, begin func(Frame), data func(f Frame, p []byte, end bool)) {
	for len(p) > 0 {
		switch {
		case f.skip > 0:
			n := min(f.skip, len(p))
			f.skip -= n
			p = p[n:]
		case f.padded:
			f.padded = false
			f.tail = min(int(p[0]), f.data)
			f.data -= f.tail
			p = p[1:]
			if f.data == 0 {
				f.skip, f.tail = f.tail, 0
				data(f.frame, nil, true)
			}
		case f.data > 0:
			n := min(f.data, len(p))
			f.data -= n
			if f.data == 0 {
				f.skip, f.tail = f.tail, 0
			}
			data(f.frame, p[:n], f.data == 0)
			p = p[n:]
		default:
			header := p
			if f.have == 0 && len(p) >= headerBytes { // most headers come whole
				p = p[headerBytes:]
			} else {
				n := copy(f.bytes[f.have:], p)
				f.have += n
				p = p[n:]
				if f.have < headerBytes {
					return
				}
				f.have, header = 0, f.bytes[:]
			}
			f.frame = Frame{
				Length: int(header[0])<<16 | int(header[1])<<8 | int(header[2]),
				Kind:   header[3],
				Flags:  header[4],
				Stream: binary.BigEndian.Uint32(header[5:]) &^ (1 << 31),
			}
			begin(f.frame)
			switch length := f.frame.Length; {
			case f.frame.Kind != Data || data == nil:
				f.skip = length
			case length == 0:
				data(f.frame, nil, true)
			case f.frame.Flags&Padded != 0:
				f.padded, f.data = true, length-1
			default:
				f.data = length
			}
		}
	}
}
