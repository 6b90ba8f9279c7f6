package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/test/bufconn"

	"github.com/headgate-go/headgate/internal/testing/race"
)

// frame is a frame of so many bytes.
func frame(kind http2.FrameType, length int) []byte {
	var b bytes.Buffer
	_ = http2.NewFramer(&b, nil).WriteRawFrame(kind, 0, 1, make([]byte, length))
	return b.Bytes()
}

// encoded is frame with flags.
func encoded(kind http2.FrameType, flags http2.Flags, length int) []byte {
	f := frame(kind, length)
	f[4] = byte(flags)
	return f
}

// A source is a connection that brings the same bytes again and again.
type source struct {
	net.Conn
	address net.Addr
	bytes   []byte
	at      int
	reads   []int // the largest that each read brings, in turn; any number if there are none
	count   int   // of bytes that were read
}

func (s *source) RemoteAddr() net.Addr             { return s.address }
func (s *source) Close() error                     { return nil }
func (s *source) Write(p []byte) (int, error)      { return len(p), nil }
func (s *source) SetDeadline(time.Time) error      { return nil }
func (s *source) SetReadDeadline(time.Time) error  { return nil }
func (s *source) SetWriteDeadline(time.Time) error { return nil }

func (s *source) Read(p []byte) (int, error) {
	if len(s.reads) > 0 {
		p = p[:min(len(p), s.reads[0])]
		s.reads = append(s.reads[1:], s.reads[0])
	}
	n := 0
	for n < len(p) {
		more := copy(p[n:], s.bytes[s.at:])
		s.at = (s.at + more) % len(s.bytes)
		n += more
	}
	s.count += n
	return n, nil
}

// paced is a connection that brings the frames again and again, behind a preface, to a server whose calls find their connections.
func paced(p *pacer, all []byte) (*pacedConn, *source) {
	p.finds.Store(true)
	s := &source{address: new(net.TCPAddr), bytes: all}
	c := newPacedConn(s, s, p)
	c.frames.Each(make([]byte, 24), c.count, nil)
	return c, s
}

// What arrives costs units, however it comes in pieces. Reads that bring little cost more.
func TestUnits(t *testing.T) {
	for _, tt := range []struct {
		name       string
		bytes      []byte
		units      int
		data, left int // bytes of large DATA frames that are free, before and after
	}{
		{"a priority", frame(http2.FramePriority, 5), 1, 0, 0},
		{"an empty continuation", frame(http2.FrameContinuation, 0), 1, 0, 0},
		{"a ping", frame(http2.FramePing, 8), 1, 0, 0},
		{"an unknown frame", frame(200, 3), 1, 0, 0},
		{"many settings", frame(http2.FrameSettings, 600), 1 + 100*64, 0, 0},
		{"settings as clients begin with", frame(http2.FrameSettings, 36), 1 + 6*64, 0, 0},
		{"an acknowledgement of settings", frame(http2.FrameSettings, 0), 1, 0, 0},
		{"a call", frame(http2.FrameHeaders, 50), 17, 0, 0},
		{"a call with much metadata", append(frame(http2.FrameHeaders, 16384), frame(http2.FrameContinuation, 8192)...), 17 + 256 + 1 + 128, 0, 0},
		{"a byte of data", frame(http2.FrameData, 1), 1, mostData, mostData},
		{"data", frame(http2.FrameData, 1023), 1, mostData, mostData},
		{"large data of a message", frame(http2.FrameData, 16384), 0, 20000, 20000 - 16384},
		{"large data of nothing", frame(http2.FrameData, 16384), 5, 0, 0},
		{"large data of nothing, as small as may be", frame(http2.FrameData, 1024), 1, 1000, 1000},
		{"several", slices.Concat(frame(http2.FrameHeaders, 50), frame(http2.FrameData, 5), frame(http2.FrameData, 50), frame(http2.FrameRSTStream, 4)), 20, 0, 0},
	} {
		for _, piece := range []int{1, 5, 9, 13, 511, 512, 1 << 20} {
			c, s := paced(new(pacer), tt.bytes)
			a := c.opened()
			a.balance, a.data, a.known = mostUnits, tt.data, mostRead-firstRead
			a.seen = mostUnits
			want := float64(mostUnits - tt.units)
			for rest := len(tt.bytes); rest > 0; {
				n := min(piece, rest)
				if _, err := c.Read(make([]byte, n)); err != nil {
					t.Fatal(err)
				}
				if rest -= n; n < smallRead {
					want -= readUnits
				}
			}
			if s.count != len(tt.bytes) {
				t.Fatalf("%s: %d bytes were read want %d", tt.name, s.count, len(tt.bytes))
			}
			if a.balance != want || a.data != tt.left {
				t.Errorf("%s in pieces of %d: %v units and %d bytes are left want %v, %d", tt.name, piece, a.balance, a.data, want, tt.left)
			}
		}
	}
}

// Clients that make calls, as fast as they can, never wait.
func TestCallsDoNotWait(t *testing.T) {
	const (
		data, headers, reset = http2.FrameData, http2.FrameHeaders, http2.FrameRSTStream
		update, ping         = http2.FrameWindowUpdate, http2.FramePing
	)
	small := []byte{}
	for _, n := range []int{5, 60} {
		small = append(small, frame(data, n)...)
	}
	for _, tt := range []struct {
		name     string
		metadata int // bytes of the list
		header   []byte
		rest     []byte
		reads    []int
		answer   []byte
		messages int // of a session, which the handler has handled
	}{
		{name: "unary calls", metadata: 150, header: frame(headers, 60), rest: frame(data, 40)},
		{name: "unary calls one by one", metadata: 150, header: frame(headers, 60), rest: frame(data, 40), reads: []int{118}},
		{name: "calls with a frame for everything", metadata: 150, header: frame(headers, 120), rest: slices.Concat(small, frame(data, 0), frame(update, 4), frame(update, 4), frame(ping, 8), frame(reset, 4))},
		{name: "the same, in reads of a frame", metadata: 150, header: frame(headers, 120), rest: slices.Concat(small, frame(data, 0), frame(update, 4), frame(update, 4), frame(ping, 8)), reads: []int{129, 14, 69, 9, 13, 13, 17}},
		{name: "calls with 16 KiB of metadata", metadata: 16<<10 + 400, header: append(frame(headers, 16384), frame(http2.FrameContinuation, 200)...), rest: frame(data, 40)},
		{name: "calls that are canceled", metadata: 150, header: frame(headers, 60), rest: frame(reset, 4)},
		{name: "messages of 4 MiB", metadata: 150, header: frame(headers, 60), rest: append(slices.Repeat(frame(data, 16384), 256), frame(data, 5)...), reads: []int{1448}},
		{name: "answers of 3 MiB", metadata: 150, header: frame(headers, 60), rest: append(frame(data, 40), slices.Repeat(frame(update, 4), 2*192)...), answer: slices.Repeat(frame(data, 16384), 192)},
		{name: "sessions", metadata: 150, header: frame(headers, 60), rest: slices.Repeat(append(frame(data, 5), frame(data, 30)...), 1000), messages: 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, s := paced(new(pacer), append(slices.Clone(tt.header), tt.rest...))
				s.reads = tt.reads
				begin := time.Now()
				p := make([]byte, 32<<10)
				handled := 0
				for handled < race.Pick(2000, 20_000) && s.count < 1<<27 {
					if _, err := c.Read(p); err != nil {
						t.Fatal(err)
					}
					// gRPC handles what it has read before it reads on: calls when their headers have come.
					for begun := (s.count + len(tt.rest)) / len(s.bytes); handled < begun; handled++ {
						c.opened().see()
						c.opened().admit(4 * tt.metadata)
						_, _ = c.Write(tt.answer)
					}
					if tt.messages > 0 {
						for range len(p) / (len(tt.rest) / tt.messages) {
							c.opened().earn(messageEarns, 0)
						}
					}
				}
				if took := time.Since(begin); took > 0 {
					t.Errorf("%d calls waited for %v", handled, took)
				}
			})
		})
	}
}

// Frames that belong to no call wait, and all connections have equal shares of what there is.
func TestOtherFramesWait(t *testing.T) {
	const length = 2 * time.Second // connections are behind, but not for so long that they end
	shared := float64(sharedUnits * runtime.GOMAXPROCS(0))
	for _, tt := range []struct {
		name  string
		frame []byte
		units int
	}{
		{"priorities", frame(http2.FramePriority, 5), 1},
		{"empty frames", frame(http2.FrameContinuation, 0), 1},
		{"calls that are refused", frame(http2.FrameHeaders, 20), 17},
		{"settings", frame(http2.FrameSettings, 18), 1 + 3*64},
		{"data of calls that have ended", frame(http2.FrameData, 16384), 5},
	} {
		for _, connections := range []int{1, 10, race.Pick(50, 100), race.Pick(100, 1000)} {
			t.Run(tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := new(pacer)
					units := make([]float64, connections)
					done := make(chan struct{})
					for i := range connections {
						c, s := paced(p, tt.frame)
						go func() {
							defer func() { done <- struct{}{} }()
							buf := make([]byte, 32<<10)
							for begin := time.Now(); time.Since(begin) < length && units[i] < 100*unitsPerSecond; {
								if _, err := c.Read(buf); errors.Is(err, errBehind) {
									break // one frame can cost what there is for seconds
								} else if err != nil {
									t.Error(err)
									return
								}
								units[i] = float64(s.count / len(tt.frame) * tt.units)
								c.opened().seen = s.count // no more than were seen count
							}
							_ = c.Close()
						}()
					}
					for range connections {
						<-done
					}
					each := min(unitsPerSecond, ownUnits+shared/float64(connections))*length.Seconds() + firstUnits
					once := float64(max(firstUnits*9/len(tt.frame)*tt.units, 1024*tt.units/len(tt.frame), tt.units)) // what one read brings
					for i, n := range units {
						if most := 2*each + 2*once; n > most || n < each/4 && n < 2*once {
							t.Fatalf("connection %d of %d spends %v units want about %v", i, connections, n, each)
						}
					}
					total := 0.0
					for _, n := range units {
						total += n
					}
					most := float64(connections)*(ownUnits*length.Seconds()+firstUnits+2*once) + shared*(length.Seconds()+1)
					if total > most {
						t.Errorf("%d connections spend %v units want at most %v", connections, total, most)
					}
				})
			})
		}
	}
}

// Calls that the tap handle has not seen, although gRPC is done with their headers, cost much.
func TestCallsThatAreNotSeenCost(t *testing.T) {
	call := encoded(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 20)
	begun := encoded(http2.FrameHeaders, 0, 20)
	more := encoded(http2.FrameContinuation, 0, 20)
	end := encoded(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 20)
	ping := frame(http2.FramePing, 8)
	goAway := frame(http2.FrameGoAway, 8)
	for _, tt := range []struct {
		name   string
		bytes  []byte
		seen   int
		writes [][]byte
		alone  bool // calls find no connections
		want   int  // calls
	}{
		{name: "no call", bytes: ping},
		{name: "a call", bytes: call, want: 1},
		{name: "several", bytes: slices.Concat(call, call, ping, call), want: 3},
		{name: "that are seen", bytes: slices.Concat(call, call, call), seen: 3},
		{name: "some of which are seen", bytes: slices.Concat(call, call, call), seen: 2, want: 1},
		{name: "the last one has not come", bytes: slices.Concat(call, call[:len(call)-1]), want: 1},
		{name: "the last one has only its frame's header", bytes: call[:9]},
		{name: "the last one's header goes on", bytes: slices.Concat(call, begun), want: 1},
		{name: "and on", bytes: slices.Concat(call, begun, more), want: 1},
		{name: "and has not come to its end", bytes: slices.Concat(call, begun, more, end[:len(end)-1]), want: 1},
		{name: "it has ended", bytes: slices.Concat(call, begun, more, end), want: 2},
		{name: "the server says that it will end", bytes: call, writes: [][]byte{goAway}, want: 1},
		{name: "the server takes no more calls", bytes: call, writes: [][]byte{goAway, goAway}},
		{name: "calls find no connections", bytes: call, alone: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := new(pacer)
			c, _ := paced(p, tt.bytes)
			p.finds.Store(!tt.alone)
			a := c.opened()
			a.balance, a.known = mostUnits, mostRead-firstRead
			if _, err := c.Read(make([]byte, len(tt.bytes))); err != nil {
				t.Fatal(err)
			}
			for range tt.seen {
				a.see()
			}
			for _, p := range tt.writes {
				_, _ = c.Write(p)
			}
			before := a.balance
			if c.handled(a); before-a.balance != float64(tt.want*unseenUnits) || a.seen != 0 {
				t.Errorf("%v units want those of %d calls; %d calls are left", before-a.balance, tt.want, a.seen)
			}
			if want := tt.want == 0; (a.known > 0) != want {
				t.Errorf("the connection is known: %v want %v", !want, want)
			}
			if c.handled(a); before-a.balance != float64(tt.want*unseenUnits) {
				t.Error("calls cost units twice")
			}
		})
	}
}

// Connections that have an allowance together pay for their own calls.
func TestCallsOfOthersAreSeen(t *testing.T) {
	p := new(pacer)
	p.finds.Store(true)
	a := p.open("a")
	for range 5 {
		a.see()
	}
	a.unseen(2, false)
	a.unseen(3, false)
	if a.balance != firstUnits {
		t.Errorf("%v units are left want %v", a.balance, firstUnits)
	}
	if a.unseen(1, false); a.balance != firstUnits-unseenUnits {
		t.Errorf("%v units are left want %v", a.balance, firstUnits-unseenUnits)
	}
}

// A connection reads little at once until calls are let in, besides the rest of a frame.
func TestReadsBecomeLarger(t *testing.T) {
	p := new(pacer)
	p.finds.Store(true)
	a := p.open("a")
	read := func(left, want int) {
		t.Helper()
		if n, _, _ := a.read(mostRead, left, false); n != want {
			t.Errorf("read() = %d want %d", n, want)
		}
	}
	read(0, firstRead)
	read(100, 100+firstRead)
	a.see()
	a.admit(0)
	a.unseen(1, false)
	read(0, firstRead+callReads)
	for range mostRead {
		a.admit(0)
	}
	read(0, mostRead)
	read(100, mostRead)
	a.unseen(1, false)
	read(0, firstRead)
}

// The header of an answer costs units by its length, unless a handler has answered or the client has reset the call.
func TestAnswersWithLongHeadersCost(t *testing.T) {
	headers := func(flags http2.Flags, length int) []byte { return encoded(http2.FrameHeaders, flags, length) }
	end := http2.FlagHeadersEndHeaders | http2.FlagHeadersEndStream
	reset := encoded(http2.FrameRSTStream, 0, 4)
	for _, tt := range []struct {
		name   string
		handle bool
		more   []byte // that arrives
		answer []byte
		want   int
	}{
		{name: "short", answer: headers(end, answerHeader)},
		{name: "long", answer: headers(end, answerHeader+100*answerBytes), want: 100},
		{name: "two frames", answer: append(headers(http2.FlagHeadersEndStream, 16384), encoded(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 160)...), want: (16384-answerHeader)/answerBytes + 10},
		{name: "long, by a handler", handle: true, answer: append(headers(http2.FlagHeadersEndStream, 16384), encoded(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 160)...)},
		{name: "long, of a call that is reset", more: reset, answer: headers(end, 8192)},
		{name: "data", answer: encoded(http2.FrameData, 0, 8192)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _ := paced(new(pacer), append(headers(http2.FlagHeadersEndHeaders, 20), tt.more...))
			a := c.opened()
			a.balance, a.known = mostUnits/2, mostRead-firstRead
			if _, err := c.Read(make([]byte, 29+len(tt.more))); err != nil {
				t.Fatal(err)
			}
			if tt.handle {
				c.outbox.handle(1)
			}
			before := a.balance
			_, _ = c.Write(tt.answer)
			earned := 0.0
			if len(tt.answer) >= answerPerUnit {
				earned = float64(len(tt.answer)) / answerPerUnit
			}
			if got := before + earned - a.balance; got != float64(tt.want) {
				t.Errorf("the answer costs %v units want %d", got, tt.want)
			}
		})
	}
}

// A connection that goes on for long ends. One that makes calls again does not.
func TestConnectionsThatAreBehindEnd(t *testing.T) {
	for _, tt := range []struct {
		name   string
		pause  time.Duration // after each second
		others int           // that end before it would
		want   error
	}{
		{"no pause", 0, 0, errBehind},
		{"pauses", time.Second, 0, nil},
		{"no pause, and then fewer others", 0, 100, errBehind},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(pacer)
				c, _ := paced(p, frame(http2.FrameHeaders, 20)) // which waits for long each time
				begin, last := time.Now(), time.Now()
				for range tt.others {
					other, _ := paced(p, frame(http2.FramePriority, 5))
					go func() {
						for buf := make([]byte, 1024); time.Since(begin) < behindFor/3; {
							_, _ = other.Read(buf)
						}
						_ = other.Close()
					}()
				}
				for i := 0; time.Since(begin) < 10*behindFor && i < 100_000; i++ {
					if _, err := c.Read(make([]byte, 1024)); err != nil {
						if !errors.Is(err, tt.want) || time.Since(begin) < behindFor || time.Since(begin) > behindFor+longestWait {
							t.Errorf("after %v: %v want %v", time.Since(begin), err, tt.want)
						}
						return
					}
					if time.Since(last) > time.Second && tt.pause > 0 {
						<-time.After(tt.pause)
						last = time.Now()
					}
				}
				if tt.want != nil {
					t.Errorf("the connection lasts want %v", tt.want)
				}
			})
		})
	}
}

// A connection that had to wait once is not behind from then on, also beside so many others that it gets few units.
func TestConnectionsCatchUp(t *testing.T) {
	for _, tt := range []struct {
		name   string
		pause  time.Duration
		waited bool // all the time
		want   error
	}{
		{"a short time ago", time.Second, false, nil},
		{"long ago", time.Hour, false, nil},
		{"all the time", behindFor, true, errBehind},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(pacer)
				p.finds.Store(true)
				a := p.open("a")
				read := func() error {
					p.begin, p.last = time.Now(), 1<<20
					a.balance = -10 * ownUnits
					_, wait, err := a.read(1024, 0, false)
					if wait == 0 && err == nil {
						t.Error("read() does not wait")
					}
					return err
				}
				if err := read(); err != nil {
					t.Fatal(err)
				}
				left := tt.pause
				for ; tt.waited && left > longestWait; left -= longestWait {
					<-time.After(longestWait)
					if err := read(); err != nil {
						t.Fatal(err)
					}
				}
				<-time.After(left)
				if err := read(); !errors.Is(err, tt.want) {
					t.Errorf("read() = %v want %v", err, tt.want)
				}
			})
		})
	}
}

// A read that waits ends with its connection, and when its deadline passes.
func TestReadsThatWaitEnd(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(c *pacedConn)
		want error
	}{
		{"closed", func(c *pacedConn) { _ = c.Close() }, net.ErrClosed},
		{"a deadline", func(c *pacedConn) { _ = c.SetReadDeadline(time.Now().Add(time.Nanosecond)) }, os.ErrDeadlineExceeded},
		{"a deadline for all", func(c *pacedConn) { _ = c.SetDeadline(time.Now()) }, os.ErrDeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := new(pacer)
				c, _ := paced(p, frame(http2.FramePriority, 5))
				c.opened().balance = -mostUnits
				ended := make(chan error)
				begin := time.Now()
				go func() {
					_, err := c.Read(make([]byte, 100))
					ended <- err
				}()
				synctest.Wait()
				tt.end(c)
				if err := <-ended; !errors.Is(err, tt.want) || time.Since(begin) > time.Nanosecond {
					t.Errorf("Read() = %v after %v want %v at once", err, time.Since(begin), tt.want)
				}
				_ = c.Close()
				if _, err := c.Read(nil); !errors.Is(err, net.ErrClosed) {
					t.Errorf("Read() = %v want %v", err, net.ErrClosed)
				}
				p.allowances.Range(func(any, any) bool {
					t.Error("an allowance is left")
					return true
				})
			})
		})
	}
}

// addressed accepts connections that have addresses of their own, as those of a network do.
type addressed struct{ *bufconn.Listener }

func (l addressed) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return remote{conn}, nil
}

// A remote connection makes a new address each time, as those of some libraries do.
type remote struct{ net.Conn }

func (remote) RemoteAddr() net.Addr { return new(net.TCPAddr) }

// On a server, calls of a client do not wait, whatever others send. The others do, also those whose calls are refused.
func TestServersPace(t *testing.T) {
	for _, named := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			l := bufconn.Listen(1 << 16)
			var listener net.Listener = l
			if named {
				listener = addressed{l}
			}
			server := grpc.NewServer(ServerOptions(WithKeys(func(key string) (string, bool) { return "", key == "sesame" }))...)
			healthv1.RegisterHealthServer(server, health.NewServer())
			go func() { _ = server.Serve(listener) }()
			defer server.Stop()
			conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			check := func(n int) (took time.Duration) {
				begin := time.Now()
				ctx := metadata.AppendToOutgoingContext(t.Context(), keyHeader, "sesame")
				for range n {
					if _, err := healthv1.NewHealthClient(conn).List(ctx, new(healthv1.HealthListRequest)); err != nil {
						t.Fatal(err)
					}
				}
				return time.Since(begin)
			}
			if took := check(1500); took > 0 {
				t.Errorf("calls took %v", took)
			}
			if !named {
				return
			}
			// What the others send ends up in a buffer of 64 KiB, and then waits.
			priorities := slices.Repeat(frame(http2.FramePriority, 5), 1000)
			greeting := append([]byte(http2.ClientPreface), make([]byte, 9)...)
			greeting[len(http2.ClientPreface)+3] = byte(http2.FrameSettings)
			const others = 3
			var sent [others]atomic.Int64
			for i := range others {
				other, err := l.DialContext(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
				go func() { _, _ = io.Copy(io.Discard, other) }()
				go func() {
					_, _ = other.Write(greeting)
					for sent[i].Load() < 100*unitsPerSecond { // time would not pass if the server read everything
						n, err := other.Write(priorities)
						sent[i].Add(int64(n / 14))
						if err != nil {
							return
						}
					}
				}()
			}
			<-time.After(2 * time.Second)
			if took := check(500); took > 0 {
				t.Errorf("calls took %v beside others", took)
			}
			for i := range sent {
				if n := sent[i].Load(); n < 5000 || n > 2*unitsPerSecond+firstUnits+64<<10/14+2000 {
					t.Errorf("%d frames were taken within 2s want about %d", n, 2*unitsPerSecond)
				}
			}
		})
	}
}

// On a server, a connection ends that goes on with calls that gRPC refuses before the tap handle. Calls that the tap handle
// refuses cost less.
func TestServersChargeForCallsThatAreNotSeen(t *testing.T) {
	header := func(pairs ...string) []string {
		return append([]string{":method", "POST", ":scheme", "http", ":path", "/a/b", ":authority", "x"}, pairs...)
	}
	for _, tt := range []struct {
		name   string
		header []string
		ends   bool
	}{
		{"no key", header("content-type", "application/grpc"), false},
		{"no method", []string{":method", "POST", ":scheme", "http", ":path", "%", ":authority", "x", "content-type", "application/grpc"}, false},
		{"another content type", header("content-type", "text/plain"), true},
		{"a malformed time", header("content-type", "application/grpc", "grpc-timeout", "%"), true},
		{"malformed binary metadata", header("content-type", "application/grpc", "x-bin", "%"), true},
		{"another HTTP method", []string{":method", "GET", ":scheme", "http", ":path", "/a/b", ":authority", "x", "content-type", "application/grpc"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := bufconn.Listen(1 << 16)
				server := grpc.NewServer(ServerOptions(WithKeys(func(key string) (string, bool) { return "", key == "sesame" }))...)
				go func() { _ = server.Serve(addressed{l}) }()
				defer server.Stop()
				conn, err := l.DialContext(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				framer := http2.NewFramer(conn, conn)
				if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
					t.Fatal(err)
				}
				if err := framer.WriteSettings(); err != nil {
					t.Fatal(err)
				}
				var block bytes.Buffer
				encoder := hpack.NewEncoder(&block)
				call := func(stream uint32, pairs []string) error {
					block.Reset()
					for i := 0; i < len(pairs); i += 2 {
						_ = encoder.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
					}
					return framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
				}
				begin, answers := time.Now(), 0
				err = call(1, header("content-type", "application/grpc", keyHeader, "sesame")) // so that calls have found their connections
				for err == nil && answers < 100 {
					var f http2.Frame
					if f, err = framer.ReadFrame(); err == nil && f.Header().Type == http2.FrameHeaders {
						answers++
						err = call(uint32(2*answers+1), tt.header)
					}
				}
				if took := time.Since(begin); (err != nil) != tt.ends || took < behindFor && tt.ends || took > behindFor/3 && !tt.ends {
					t.Errorf("after %d answers and %v: %v want the connection to end: %v", answers, took, err, tt.ends)
				}
			})
		})
	}
}

// What credentials say of themselves and of connections is what the application's do.
func TestCredentialsPassThrough(t *testing.T) {
	site := httptest.NewUnstartedServer(nil)
	site.StartTLS()
	defer site.Close()
	roots := x509.NewCertPool()
	roots.AddCert(site.Certificate())
	secure := credentials.NewServerTLSFromCert(&site.TLS.Certificates[0])
	for _, tt := range []struct {
		name   string
		opts   []grpc.ServerOption
		client credentials.TransportCredentials
		want   func(info credentials.AuthInfo) bool
	}{
		{"none", ServerOptions(), insecure.NewCredentials(), func(info credentials.AuthInfo) bool { return info == nil }},
		{"nil", ServerOptions(WithCredentials(nil)), insecure.NewCredentials(), func(info credentials.AuthInfo) bool { return info == nil }},
		{"insecure", ServerOptions(WithCredentials(insecure.NewCredentials())), insecure.NewCredentials(), func(info credentials.AuthInfo) bool { return info != nil && info.AuthType() == "insecure" }},
		{"TLS", ServerOptions(WithCredentials(secure)), credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "example.com"}), isTLS},
		{"TLS by gRPC's option", append(ServerOptions(), grpc.Creds(secure)), credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "example.com"}), isTLS},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seen atomic.Pointer[peer.Peer]
			server := grpc.NewServer(append(tt.opts, grpc.ChainUnaryInterceptor(func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
				p, _ := peer.FromContext(ctx)
				seen.Store(p)
				return handle(ctx, request)
			}))...)
			healthv1.RegisterHealthServer(server, health.NewServer())
			l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			go func() { _ = server.Serve(l) }()
			defer server.Stop()
			conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(tt.client))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for range 100 {
				if _, err := healthv1.NewHealthClient(conn).Check(t.Context(), new(healthv1.HealthCheckRequest)); err != nil {
					t.Fatal(err)
				}
			}
			if p := seen.Load(); !tt.want(p.AuthInfo) || p.Addr.Network() != "tcp" {
				t.Errorf("the peer is %v, %#v", p.Addr, p.AuthInfo)
			}
		})
	}
	c := newPacedCredentials(secure, new(pacer))
	clone, ok := c.Clone().(*pacedCredentials)
	if !ok || clone.pacer != c.pacer || clone.plain || clone.TransportCredentials == c.TransportCredentials {
		t.Errorf("Clone() = %#v", clone)
	}
	if got, want := c.Info().SecurityProtocol, secure.Info().SecurityProtocol; got != want {
		t.Errorf("Info() = %q want %q", got, want)
	}
}

func isTLS(info credentials.AuthInfo) bool {
	_, ok := info.(credentials.TLSInfo)
	return ok
}

// A failure of the application's handshake is gRPC's to judge.
func TestHandshakesFail(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	_ = far.Close()
	secure := credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})
	if conn, _, err := newPacedCredentials(secure, new(pacer)).ServerHandshake(near); err == nil || conn != nil {
		t.Errorf("ServerHandshake() = %v, %v want an error", conn, err)
	}
}

// countingPool counts its buffers that are out.
type countingPool struct{ out int }

func (p *countingPool) Get(size int) *[]byte {
	p.out++
	buf := make([]byte, size)
	return &buf
}

func (p *countingPool) Put(*[]byte) { p.out-- }

var _ mem.BufferPool = new(countingPool)

// gRPC's own way to read brings what Read brings, and takes a buffer only when there is something.
func TestReadOnReady(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "pipe"} {
		t.Run(network, func(t *testing.T) {
			near, far := ends(t, network)
			c := newPacedConn(near, near, new(pacer))
			pool := new(countingPool)
			written := make(chan error, 1)
			go func() {
				_, err := far.Write([]byte("some text"))
				written <- err
			}()
			var got []byte
			for len(got) < 9 {
				buf, n, err := c.ReadOnReady(6, pool)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, (*buf)[:n]...)
				pool.Put(buf)
			}
			if string(got) != "some text" || <-written != nil {
				t.Errorf("%q was read", got)
			}
			if err := c.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if buf, n, err := c.ReadOnReady(6, pool); !errors.Is(err, os.ErrDeadlineExceeded) || n != 0 || buf != nil {
				t.Errorf("ReadOnReady() = %v, %d, %v want %v", buf, n, err, os.ErrDeadlineExceeded)
			}
			if err := c.SetReadDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			_ = far.Close()
			if buf, n, err := c.ReadOnReady(6, pool); !errors.Is(err, io.EOF) || n != 0 || buf != nil {
				t.Errorf("ReadOnReady() = %v, %d, %v want %v", buf, n, err, io.EOF)
			}
			if _, err := c.SyscallConn(); (err == nil) != (network != "pipe") {
				t.Errorf("SyscallConn(): %v", err)
			}
			_ = c.Close()
			if buf, n, err := c.ReadOnReady(6, pool); !errors.Is(err, net.ErrClosed) || n != 0 || buf != nil {
				t.Errorf("ReadOnReady() = %v, %d, %v want %v", buf, n, err, net.ErrClosed)
			}
			if pool.out != 0 {
				t.Errorf("%d buffers were not put back", pool.out)
			}
		})
	}
}

// ends returns both ends of a connection.
func ends(t *testing.T, network string) (near, far net.Conn) {
	t.Helper()
	if network == "pipe" {
		near, far = net.Pipe()
		return near, far
	}
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	far, err = new(net.Dialer).DialContext(t.Context(), network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	near, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	return near, far
}

// Reads allocate nothing, whether they bring calls or not.
func TestReadsDoNotAllocate(t *testing.T) {
	c, _ := paced(new(pacer), append(frame(http2.FrameHeaders, 60), frame(http2.FrameData, 40)...))
	p := make([]byte, 32<<10)
	if n := testing.AllocsPerRun(100, func() {
		_, _ = c.Read(p)
		for range 300 {
			c.opened().see()
			c.opened().admit(1600)
		}
	}); n > 0 {
		t.Errorf("a read allocates %v times", n)
	}
}

// BenchmarkReads reads frames of 16 bytes, and of 118 bytes with their calls.
func BenchmarkReads(b *testing.B) {
	for _, bb := range []struct {
		name  string
		bytes []byte
		calls bool
	}{
		{"small frames", frame(http2.FramePing, 7), false},
		{"calls", append(frame(http2.FrameHeaders, 60), frame(http2.FrameData, 40)...), true},
	} {
		for _, wrapped := range []bool{false, true} {
			name := bb.name + "/bare"
			if wrapped {
				name = bb.name + "/paced"
			}
			b.Run(name, func(b *testing.B) {
				c, s := paced(new(pacer), bb.bytes)
				var conn net.Conn = s
				if wrapped {
					conn = c
				}
				p := make([]byte, 32<<10)
				done := 0
				b.ReportAllocs()
				for b.Loop() {
					if !bb.calls {
						c.opened().earn(mostUnits, 0)
					}
					if _, err := conn.Read(p); err != nil {
						b.Fatal(err)
					}
					for ; bb.calls && wrapped && done < s.count/len(bb.bytes); done++ {
						a := c.pacer.allowance(c.address)
						a.see()
						a.admit(1600)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(s.count/len(bb.bytes)), "ns/each")
			})
		}
	}
}
