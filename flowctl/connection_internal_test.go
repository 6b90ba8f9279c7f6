package flowctl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/internal/frames"
)

func encodeFrame(kind, flags byte, stream uint32, payload ...byte) []byte {
	n := len(payload)
	f := []byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}
	return append(binary.BigEndian.AppendUint32(f, stream), payload...)
}

const frameSettingsKind = 4

// follow is a connection on which the client has said what it says, and reads what the agent says, in pieces.
func follow(t *testing.T, said, answered []byte, piece int) (*connection, []byte, error) {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { _ = near.Close() })
	cs := newConnections(new(atomic.Uint64))
	c := &connection{Conn: near, raw: near, connections: cs, streams: make(map[uint32]stream), credit: frameCredit}
	cs.open[c] = struct{}{}
	go func() {
		defer far.Close()
		if _, err := io.ReadFull(far, make([]byte, len(said))); err != nil {
			return
		}
		for part := range slices.Chunk(answered, piece) {
			if _, err := far.Write(part); err != nil {
				return
			}
		}
	}()
	if _, err := c.Write(said); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	return c, got, err
}

// The messages that begin on a stream are counted, however they come. The first is the call.
func TestFraming(t *testing.T) {
	said := []byte{0, 0, 0, 0, 2, 'a', 'b', 1, 0, 0, 0, 0, 0, 0, 0, 1, 4}
	said = append(said, make([]byte, 260)...)
	said = append(said, 0, 0, 0)
	for piece := 1; piece <= len(said); piece++ {
		var f framing
		got := 0
		for part := range slices.Chunk(said, piece) {
			got += f.follow(part)
		}
		if got != 3 {
			t.Errorf("in pieces of %d bytes: %d more messages want 3", piece, got)
		}
	}
}

// A compressed answer is refused, unless the question was compressed, and however it comes.
func TestCompressedAnswersAreRefused(t *testing.T) {
	question := func(compressed byte) []byte {
		return slices.Concat(encodeFrame(frames.Headers, 4, 1, 'h'), encodeFrame(frames.Data, frames.EndStream, 1, compressed, 0, 0, 0, 1, 'q'))
	}
	plain := []byte{0, 0, 0, 0, 1, 'a'}
	zipped := []byte{1, 0, 0, 0, 1, 'a'}
	for _, tt := range []struct {
		name     string
		said     []byte
		answered []byte
		want     byte // of the last message
	}{
		{"plain", question(0), encodeFrame(frames.Data, 0, 1, plain...), formatPlain},
		{"compressed", question(0), encodeFrame(frames.Data, 0, 1, zipped...), formatRefused},
		{"asked for", question(1), encodeFrame(frames.Data, 0, 1, zipped...), 1},
		{"the second message", question(0), encodeFrame(frames.Data, 0, 1, append(plain, zipped...)...), formatRefused},
		{"behind padding", question(0), slices.Concat(encodeFrame(frames.Data, frames.Padded, 1, 3, 0, 0, 0), encodeFrame(frames.Data, 0, 1, zipped...)), formatRefused},
		{"with the end of the stream", question(0), encodeFrame(frames.Data, frames.EndStream, 1, zipped...), formatRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for piece := 1; piece <= len(tt.answered); piece++ {
				_, got, err := follow(t, tt.said, tt.answered, piece)
				if err != nil || len(got) != len(tt.answered) {
					t.Fatalf("in pieces of %d bytes: %q, %v", piece, got, err)
				}
				if format := got[len(got)-len(zipped)]; format != tt.want {
					t.Errorf("in pieces of %d bytes: format %d want %d", piece, format, tt.want)
				}
			}
		})
	}
}

// What of large answers has come is counted until they are whole or over.
func TestAnswersUnderWay(t *testing.T) {
	asked := slices.Concat(encodeFrame(frames.Headers, 4, 1, 'h'), encodeFrame(frames.Headers, 4, 3, 'h'))
	begun := encodeFrame(frames.Data, 0, 1, 0, 0, 0, 0, 3, 'a', 'b')
	message := func(text string) []byte { return append([]byte{0, 0, 0, 0, byte(len(text))}, text...) }
	says := func(data ...byte) []byte { return slices.Concat(asked, encodeFrame(frames.Data, 0, 1, data...)) }
	for _, tt := range []struct {
		name     string
		said     []byte
		answered []byte
		want     int64
	}{
		{"begun", asked, begun, 2},
		{"whole", asked, append(slices.Clone(begun), encodeFrame(frames.Data, 0, 1, 'c')...), 0},
		{"reset by the agent", asked, append(slices.Clone(begun), encodeFrame(frames.RSTStream, 0, 1, 0, 0, 0, 0)...), 0},
		{"ended by trailers", asked, append(slices.Clone(begun), encodeFrame(frames.Headers, frames.EndStream, 1, 't')...), 0},
		{"ended by data", asked, encodeFrame(frames.Data, frames.EndStream, 1, 0, 0, 0, 0, 3, 'a', 'b'), 0},
		{"of two", asked, append(slices.Clone(begun), encodeFrame(frames.Data, 0, 3, 0, 0, 0, 0, 3, 'a')...), 3},
		{"not asked for", asked, encodeFrame(frames.Data, 0, 5, 0, 0, 0, 0, 3, 'a', 'b'), 0},
		{"an empty answer", asked, encodeFrame(frames.Data, 0, 1, 0, 0, 0, 0, 0), 0},
		{"messages behind the answer", asked, encodeFrame(frames.Data, 0, 1, 0, 0, 0, 0, 1, 'a', 0, 0, 0, 0, 1, 'b', 0, 0, 0, 0, 0), 11},
		{"a part of a message behind the answer", asked, encodeFrame(frames.Data, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 'a'), 6},
		{"empty messages behind the answers of two", asked, slices.Concat(encodeFrame(frames.Data, 0, 1, make([]byte, 15)...), encodeFrame(frames.Data, 0, 3, make([]byte, 7)...)), 12},
		{"a message behind the answer, ended by trailers", asked, append(encodeFrame(frames.Data, 0, 1, make([]byte, 10)...), encodeFrame(frames.Headers, frames.EndStream, 1, 't')...), 0},
		{"several messages of a session", says(append(message("q"), message("r")...)...), encodeFrame(frames.Data, 0, 1, append(message("a"), message("bc")...)...), 0},
		{"a part of a message of a session", says(append(message("q"), message("")...)...), encodeFrame(frames.Data, 0, 1, append(message("a"), 0, 0, 0, 0, 3, 'b')...), 1},
		{"messages behind the answer to one message", says(message("question")...), encodeFrame(frames.Data, 0, 1, append(message("a"), message("b")...)...), 6},
		{"messages behind the answer to a part of one", says(0, 0, 0, 0, 9, 'q', 0, 0, 0, 0, 0, 0), encodeFrame(frames.Data, 0, 1, append(message("a"), message("b")...)...), 6},
		{"a message behind the answer, reset by the agent", asked, append(encodeFrame(frames.Data, 0, 1, make([]byte, 10)...), encodeFrame(frames.RSTStream, 0, 1, 0, 0, 0, 0)...), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _, err := follow(t, tt.said, tt.answered, 4)
			if err != nil {
				t.Fatal(err)
			}
			if got := c.connections.underWay.Load(); got != tt.want {
				t.Errorf("%d bytes are under way want %d", got, tt.want)
			}
			_ = c.Close()
			if got := c.connections.underWay.Load(); got != 0 {
				t.Errorf("%d bytes are under way after the end", got)
			}
		})
	}
	cs := newConnections(new(atomic.Uint64))
	cs.underWay.Store(maxUnderWay)
	near, far := net.Pipe()
	defer near.Close()
	go func() { _, _ = io.Copy(io.Discard, far) }() // ends with near
	c := &connection{Conn: near, connections: cs, streams: map[uint32]stream{1: {}, 3: {}}, credit: frameCredit}
	if err := c.arrived(encodeFrame(frames.Data, 0, 1, 0, 0, 0, 0, 1, 'a'), 0); err != nil {
		t.Errorf("an answer that comes whole, beside much that has not: %v", err)
	}
	if err := c.arrived(encodeFrame(frames.Data, 0, 3, make([]byte, 10)...), 0); !errors.Is(err, errUnderWay) {
		t.Errorf("a message behind an answer, beside much that has not come whole: %v want %v", err, errUnderWay)
	}
	if _, err := c.Write(encodeFrame(frames.RSTStream, 0, 3, 0, 0, 0, 8)); err != nil {
		t.Fatal(err)
	}
	if got := cs.underWay.Load(); got != maxUnderWay {
		t.Errorf("%d bytes are under way want %d, after a reset by the client", got, maxUnderWay)
	}
	if err := c.arrived(begun, 0); !errors.Is(err, errUnderWay) {
		t.Errorf("a byte too much is under way: %v want %v", err, errUnderWay)
	}
}

// Frames that nobody asked for end the connection, and those of many answers do not.
func TestFloods(t *testing.T) {
	ping := encodeFrame(6, 0, 0, make([]byte, 8)...)
	headers := encodeFrame(frames.Headers, frames.EndStream, 1, make([]byte, 200)...)
	ask := encodeFrame(frames.Headers, 4, 1, 'h')
	for _, tt := range []struct {
		name           string
		said, answered []byte
		want           error
	}{
		{"pings", ask, bytes.Repeat(ping, 2*frameCredit), errFlood},
		{"some pings", ask, bytes.Repeat(ping, frameCredit/2), nil},
		{"headers", ask, bytes.Repeat(headers, 2*frameCredit), errFlood},
		{"empty data", ask, bytes.Repeat(encodeFrame(frames.Data, 0, 1), 2*frameCredit), errFlood},
		{"data that nobody asked for", ask, bytes.Repeat(encodeFrame(frames.Data, 0, 3, make([]byte, 16384)...), frameCredit/16), errFlood},
		{"messages behind an answer", ask, bytes.Repeat(encodeFrame(frames.Data, 0, 1, make([]byte, 16384)...), frameCredit/16), errFlood},
		{"a large answer", ask, slices.Concat(
			encodeFrame(frames.Data, 0, 1, append([]byte{0, 1, 0, 0, 0}, make([]byte, 16379)...)...),
			bytes.Repeat(encodeFrame(frames.Data, 0, 1, make([]byte, 16384)...), 1<<10-1)), nil},
		{"padding", ask, bytes.Repeat(encodeFrame(frames.Data, frames.Padded, 1, append([]byte{255}, make([]byte, 255)...)...), 2*frameCredit), errFlood},
		{"two answers to each question", bytes.Repeat(ask, 1000), bytes.Repeat(encodeFrame(frames.Data, 0, 1, make([]byte, 10)...), 1000), nil},
		{"answers with pings", bytes.Repeat(ask, 1000), bytes.Repeat(append(slices.Clone(headers), ping...), 1000), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if _, _, err := follow(t, tt.said, tt.answered, 1<<15); !errors.Is(err, tt.want) {
					t.Errorf("%v want %v", err, tt.want)
				}
			})
		})
	}
}

// What a connection brings counts for the breaker when there was an answer, or when it lasts.
func TestConnectionsProveThemselves(t *testing.T) {
	settings := encodeFrame(frameSettingsKind, 0, 0)
	ask := encodeFrame(frames.Headers, 4, 1, 'h')
	for _, tt := range []struct {
		name     string
		frames   []byte
		age      time.Duration
		stirred  bool
		received uint64
	}{
		{"settings", settings, 0, true, 0},
		{"an answer", encodeFrame(frames.Headers, frames.EndStream, 1, 'h'), 0, false, 1},
		{"a reset", encodeFrame(frames.RSTStream, 0, 1, 0, 0, 0, 0), 0, false, 1},
		{"an answer to nothing", encodeFrame(frames.Headers, frames.EndStream, 3, 'h'), 0, true, 0},
		{"goes away", append(slices.Clone(settings), encodeFrame(frames.GoAway, 0, 0, make([]byte, 8)...)...), 0, false, 0},
		{"old", settings, time.Second, false, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				defer near.Close()
				defer far.Close()
				cs := newConnections(new(atomic.Uint64))
				c := &connection{Conn: near, raw: near, connections: cs, streams: make(map[uint32]stream), credit: frameCredit}
				cs.open[c] = struct{}{}
				go func() {
					_, _ = far.Read(make([]byte, 100))
					<-time.After(tt.age)
					_, _ = far.Write(tt.frames)
				}()
				_, _ = c.Write(ask)
				begin := time.Now()
				if _, err := c.Read(make([]byte, 100)); err != nil {
					t.Fatal(err)
				}
				if got := cs.stirred(begin); got != tt.stirred {
					t.Errorf("stirred() = %v want %v", got, tt.stirred)
				}
				if got := cs.received.Load(); got != tt.received {
					t.Errorf("%d reads count want %d", got, tt.received)
				}
				_ = c.Close()
				if cs.stirred(begin) {
					t.Error("stirred() although the connection has ended")
				}
			})
		})
	}
}

// Connections to an address follow each other with pauses, after some that need none.
func TestConnectionsHavePauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cs := newConnections(new(atomic.Uint64))
		begin := time.Now()
		for i, want := range []time.Duration{0, 0, 0, connectEvery, 2 * connectEvery} {
			if err := cs.await(t.Context(), "a"); err != nil || time.Since(begin) != want {
				t.Errorf("connection %d after %v, %v want %v", i, time.Since(begin), err, want)
			}
		}
		begin = time.Now()
		for i := range 100 {
			if err := cs.await(t.Context(), fmt.Sprint(i)); err != nil || time.Since(begin) != 0 {
				t.Errorf("the first connection to another address after %v, %v", time.Since(begin), err)
			}
		}
		<-time.After(time.Minute)
		_ = cs.await(t.Context(), "b")
		if n := len(cs.next); n != 1 {
			t.Errorf("%d addresses are remembered want that of now", n)
		}
	})
}
