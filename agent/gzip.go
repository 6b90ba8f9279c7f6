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

// keepGzip is the server's decompressor. It keeps a message as it is, and puts a mark before it. What decodes the message decompresses
// it. GRPC would decompress messages of any number of calls at a time. 4 KiB become 4 MiB, which takes 10 ms and more.
type keepGzip struct{}

// gzipMark is the mark. No message of Protocol Buffers begins with it, because no field has the number 0.
const gzipMark = 0

func (keepGzip) Type() string { return gzip.Name }

func (keepGzip) Do(r io.Reader) ([]byte, error) {
	room := 512
	if sized, ok := r.(interface{ Remaining() int }); ok {
		room = sized.Remaining()
	}
	b := bytes.NewBuffer(make([]byte, 0, 1+room+bytes.MinRead)) // with the room that ReadFrom wants before it sees the end
	b.WriteByte(gzipMark)
	_, err := b.ReadFrom(r)
	return b.Bytes(), err
}

// isGzip reports whether the message has the mark.
func isGzip(data mem.BufferSlice) bool {
	for _, b := range data {
		if b.Len() > 0 {
			return b.ReadOnlyData()[0] == gzipMark
		}
	}
	return false
}

var (
	errGzip  = status.Error(codes.Internal, "the message cannot be decompressed")
	errLarge = status.Error(codes.ResourceExhausted, "the message is too large when it is decompressed")
)

// A decompression is a message that is being decompressed.
type decompression struct {
	from  io.Reader
	plain bytes.Buffer // its beginning
	whole bool
}

// open begins to decompress a message with the mark.
func (d *decompression) open(data io.Reader) error {
	if _, err := io.ReadFull(data, make([]byte, 1)); err != nil {
		return errGzip
	}
	from, err := encoding.GetCompressor(gzip.Name).Decompress(data)
	if err != nil {
		return errGzip
	}
	d.from, d.whole = from, false
	d.plain.Reset()
	return nil
}

// read decompresses into the buffer until the message is whole, or has that many bytes and one more.
func (d *decompression) read(into *bytes.Buffer, most int) error {
	_, err := io.CopyN(into, d.from, int64(most+1-into.Len()))
	switch {
	case errors.Is(err, io.EOF):
		d.whole = true
		return nil
	case err != nil:
		return errGzip
	default:
		return nil
	}
}

func (d *decompression) close() {
	if c, ok := d.from.(io.Closer); ok {
		_ = c.Close() // gives the reader back to its pool
	}
	d.from = nil
}

// takeDecompression returns one from the pool, or a new one.
func takeDecompression(pool *sync.Pool) *decompression {
	if d, ok := pool.Get().(*decompression); ok {
		return d
	}
	return new(decompression)
}

// decompress decompresses a message of at most so many bytes, without a turn.
func (d *decompression) decompress(data io.Reader, most int) error {
	if err := d.open(data); err != nil {
		return err
	}
	defer d.close()
	if err := d.read(&d.plain, most); err != nil {
		return err
	}
	if !d.whole {
		return errLarge
	}
	return nil
}

// decompress decompresses a message of the agent's, and reads it by the function. A message that becomes large waits as a large request
// does: see read.
func (c *call) decompress(data []byte, by func(plain []byte) error) (fits bool, err error) {
	if c == nil { // it came by ServeHTTP of gRPC's server, which calls no tap handle
		d := new(decompression)
		if err := d.decompress(bytes.NewReader(data), maxMessage); err != nil {
			return true, err
		}
		return true, by(d.plain.Bytes())
	}
	d := takeDecompression(&c.gate.decompressions)
	defer c.gate.decompressions.Put(d)
	if err := d.open(bytes.NewReader(data)); err != nil {
		return true, err
	}
	defer d.close()
	if len(data) < large { // otherwise the first bytes alone can take long
		if err := d.read(&d.plain, large-1); err != nil {
			return true, err
		}
		if d.whole {
			return true, by(d.plain.Bytes())
		}
	}
	return c.read(len(data)+2*large, func() error {
		whole, _ := c.gate.buffers.Get().(*bytes.Buffer) // not d.plain: thousands of calls may wait, and few have turns
		if whole == nil {
			whole = new(bytes.Buffer)
		}
		defer c.gate.buffers.Put(whole)
		whole.Reset()
		_, _ = d.plain.WriteTo(whole)
		switch err := d.read(whole, maxMessage); {
		case err != nil:
			return err
		case !d.whole:
			return errLarge
		default:
			return by(whole.Bytes())
		}
	})
}

// readers lets so many calls at a time read large requests. The other calls wait. The next turn goes to the connection that has lately
// taken the least time. It is safe for concurrent use.
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
