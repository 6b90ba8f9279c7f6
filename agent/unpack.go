package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// The bounds of messages that are decompressed.
const (
	maxMessage        = 4 << 20  // bytes
	maxForeignMessage = 64 << 10 // bytes of one for a service other than the agent's
)

// GRPC would decompress a message where it reads it, for any number of calls at a time: 4 KiB become 4 MiB, which takes 10 ms and more. So
// the server's decompressor leaves the message as it is, behind a mark, and what decodes it decompresses it.
type mark struct{}

// packed is the mark. No message of Protocol Buffers begins with it, because no field has the number 0.
const packed = 0

func (mark) Type() string { return gzip.Name }

func (mark) Do(r io.Reader) ([]byte, error) {
	room := 512
	if sized, ok := r.(interface{ Remaining() int }); ok {
		room = sized.Remaining()
	}
	b := bytes.NewBuffer(make([]byte, 0, 1+room+bytes.MinRead)) // with the room that ReadFrom wants before it sees the end
	b.WriteByte(packed)
	_, err := b.ReadFrom(r)
	return b.Bytes(), err
}

// isPacked reports whether the message has the mark.
func isPacked(data mem.BufferSlice) bool {
	for _, b := range data {
		if b.Len() > 0 {
			return b.ReadOnlyData()[0] == packed
		}
	}
	return false
}

var (
	errPacked = status.Error(codes.Internal, "the message cannot be decompressed")
	errLarge  = status.Error(codes.ResourceExhausted, "the message is too large when it is decompressed")
)

// A bale is a message that is being decompressed.
type bale struct {
	from  io.Reader
	plain bytes.Buffer // its beginning
	whole bool
}

// open begins to decompress a message with the mark.
func (b *bale) open(data io.Reader) error {
	if _, err := io.ReadFull(data, make([]byte, 1)); err != nil {
		return errPacked
	}
	from, err := encoding.GetCompressor(gzip.Name).Decompress(data)
	if err != nil {
		return errPacked
	}
	b.from, b.whole = from, false
	b.plain.Reset()
	return nil
}

// read decompresses into the buffer until the message is whole, or has that many bytes and one more.
func (b *bale) read(into *bytes.Buffer, most int) error {
	_, err := io.CopyN(into, b.from, int64(most+1-into.Len()))
	switch {
	case errors.Is(err, io.EOF):
		b.whole = true
		return nil
	case err != nil:
		return errPacked
	default:
		return nil
	}
}

func (b *bale) close() {
	if c, ok := b.from.(io.Closer); ok {
		_ = c.Close() // has gRPC use the reader again
	}
	b.from = nil
}

// takeBale returns one from the pool, or a new one.
func takeBale(pool *sync.Pool) *bale {
	if b, ok := pool.Get().(*bale); ok {
		return b
	}
	return new(bale)
}

// unpack decompresses a message of at most so many bytes, without a turn.
func (b *bale) unpack(data io.Reader, most int) error {
	if err := b.open(data); err != nil {
		return err
	}
	defer b.close()
	if err := b.read(&b.plain, most); err != nil {
		return err
	}
	if !b.whole {
		return errLarge
	}
	return nil
}

// unpack decompresses a message of the agent's, and reads it by the function. A message that becomes large is a large request from there
// on, which waits as such: see read.
func (c *call) unpack(data []byte, by func(plain []byte) error) (fits bool, err error) {
	if c == nil { // it came by ServeHTTP of gRPC's server, which calls no tap handle
		b := new(bale)
		if err := b.unpack(bytes.NewReader(data), maxMessage); err != nil {
			return true, err
		}
		return true, by(b.plain.Bytes())
	}
	b := takeBale(&c.gate.bales)
	defer c.gate.bales.Put(b)
	if err := b.open(bytes.NewReader(data)); err != nil {
		return true, err
	}
	defer b.close()
	if len(data) < large { // else even a little can take long
		if err := b.read(&b.plain, large-1); err != nil {
			return true, err
		}
		if b.whole {
			return true, by(b.plain.Bytes())
		}
	}
	return c.read(len(data)+2*large, func() error {
		whole, _ := c.gate.buffers.Get().(*bytes.Buffer) // not the bale's: thousands may wait, and few have their turns
		if whole == nil {
			whole = new(bytes.Buffer)
		}
		defer c.gate.buffers.Put(whole)
		whole.Reset()
		_, _ = b.plain.WriteTo(whole)
		switch err := b.read(whole, maxMessage); {
		case err != nil:
			return err
		case !b.whole:
			return errLarge
		default:
			return by(whole.Bytes())
		}
	})
}

// Readers read large requests: so many at a time, and the others wait. The next is of the connection that has taken the least of late. They
// are safe for concurrent use.
type readers struct {
	most int

	mu      sync.Mutex
	busy    int
	waiting []*reader
	taken   map[any]time.Duration // by connection; halved each second
	halved  time.Time
}

// A reader is a call that waits to read its request.
type reader struct {
	connection any
	turn       chan struct{}
}

// enter waits for a turn, which leave ends.
func (r *readers) enter(ctx context.Context, connection any) error {
	r.mu.Lock()
	if r.busy < r.most {
		r.busy++
		r.mu.Unlock()
		return nil
	}
	one := &reader{connection, make(chan struct{})}
	r.waiting = append(r.waiting, one)
	r.mu.Unlock()
	select {
	case <-one.turn:
		return nil
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.waiting, one); i >= 0 {
		r.waiting = slices.Delete(r.waiting, i, i+1)
	} else {
		r.next()
	}
	return ctx.Err()
}

// leave ends a turn that has taken so long.
func (r *readers) leave(connection any, took time.Duration) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if seconds := min(now.Sub(r.halved)/time.Second, 63); seconds > 0 {
		r.halved = now
		for connection, taken := range r.taken {
			if taken >>= seconds; taken < time.Millisecond {
				delete(r.taken, connection)
			} else {
				r.taken[connection] = taken
			}
		}
	}
	if r.taken == nil {
		r.taken = make(map[any]time.Duration)
	}
	r.taken[connection] += took
	r.next()
}

// next gives a turn that has ended to the next call.
func (r *readers) next() {
	if len(r.waiting) == 0 {
		r.busy--
		return
	}
	least := 0
	for i, one := range r.waiting {
		if r.taken[one.connection] < r.taken[r.waiting[least].connection] {
			least = i
		}
	}
	one := r.waiting[least]
	r.waiting = slices.Delete(r.waiting, least, least+1)
	close(one.turn)
}
