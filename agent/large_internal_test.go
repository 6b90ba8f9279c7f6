package agent

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	checkhttpv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/checkhttp/v1"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/internal/wire"
	"github.com/headgate-go/headgate/policy"
)

const largest = 4<<20 - 64 // bytes of a request's labels, headers or baggage

// fill is as many elements as fit.
func fill(element func(i int) []byte) []byte {
	m := make([]byte, 0, largest)
	for i := 0; ; i++ {
		e := element(i)
		if len(m)+len(e) > largest {
			return m
		}
		m = append(m, e...)
	}
}

func entry(key, value string) []byte {
	return append(bytesField(1, []byte(key)), bytesField(2, []byte(value))...)
}

// A largeRequest is one of 4 MiB.
type largeRequest struct {
	name string
	data []byte
	m    proto.Message
}

// largeRequests are requests that consist of many small things, or of one that is large. Policies name the labels "a",
// "user_id" and "http.request.header.a".
func largeRequests() []largeRequest {
	point := bytesField(1, []byte("point"))
	web := bytesField(4, []byte("web"))
	label := func(key, value string) []byte { return bytesField(2, entry(key, value)) }
	descending := func(i int) string { return fmt.Sprintf("%06x", 1<<24-1-i) }
	var all []largeRequest
	add := func(name string, label func(i int) []byte) {
		all = append(all, largeRequest{"labels/" + name, append(slices.Clone(point), fill(label)...), new(checkv1.CheckRequest)})
		all = append(all, largeRequest{"headers/" + name, append(slices.Clone(web), bytesField(3, fill(label))...), new(checkhttpv1.CheckHTTPRequest)})
	}
	add("empty", func(int) []byte { return []byte{0x12, 0} })
	add("that one key has", func(int) []byte { return []byte{0x12, 3, 0x0a, 1, 'b'} })
	add("that a policy's key has", func(int) []byte { return []byte{0x12, 3, 0x0a, 1, 'a'} })
	add("ascending", func(i int) []byte { return label(fmt.Sprintf("%06x", i), "") })
	add("descending", func(i int) []byte { return label(descending(i), "") })
	add("in capitals", func(i int) []byte { return label(fmt.Sprintf("K%X", i), "v") })
	add("like a policy's key", func(i int) []byte { return label(string(rune('b'+i%20))+"ser_id", "") })
	add("with two-byte keys", func(i int) []byte { return []byte{0x12, 4, 0x0a, 2, byte(i>>8) & 127, byte(i) & 127} })
	add("that are no UTF-8", func(i int) []byte { return append([]byte{0x12, 4, 0x0a, 2}, fmt.Sprintf("%c\xff", 'a'+i%26)...) })
	add("without a key", func(int) []byte { return []byte{0x12, 2, 0x12, 0} })
	add("with long keys", func(i int) []byte { return label(fmt.Sprintf("%0250d", i), "") })
	add("with keys of 300 bytes", func(i int) []byte { return label(fmt.Sprintf("%0300d", i), "") })
	add("with numbers", func(i int) []byte { return []byte{0x12, 2, 0x18, 0} })
	add("one, with many keys", func(i int) []byte {
		if i > 0 {
			return bytes.Repeat([]byte{0}, largest)
		}
		return bytesField(2, bytes.Repeat([]byte{0x0a, 0}, largest/2-8))
	})
	for name, value := range map[string]string{"x": "x", "no UTF-8": "x\xff", "runes": "ü"} {
		for _, key := range []string{"a", "b"} {
			add("one value of key "+key+", "+name, func(i int) []byte {
				if i > 0 {
					return bytes.Repeat([]byte{0}, largest)
				}
				return label(key, strings.Repeat(value, largest/len(value)-16))
			})
		}
	}
	baggage := func(name string, member func(i int) []byte) {
		all = append(all, largeRequest{"baggage/" + name, append(slices.Clone(web), bytesField(3, bytesField(2, append(bytesField(1, []byte("baggage")), bytesField(2, fill(member)[:largest-64])...)))...), new(checkhttpv1.CheckHTTPRequest)})
	}
	baggage("empty", func(int) []byte { return []byte(",") })
	baggage("without values", func(i int) []byte { return []byte("a,") })
	baggage("that one key has", func(int) []byte { return []byte("b=,") })
	baggage("that a policy's key has", func(int) []byte { return []byte("a=,") })
	baggage("of three keys", func(int) []byte { return []byte("a=,b=,c=,") })
	baggage("ascending", func(i int) []byte { return fmt.Appendf(nil, "%06x=,", i) })
	baggage("descending", func(i int) []byte { return []byte(descending(i) + "=,") })
	baggage("like a policy's key", func(i int) []byte { return fmt.Appendf(nil, "%cser_id=1,", 'b'+i%20) })
	baggage("escaped", func(i int) []byte { return []byte("%61=,") })
	baggage("escaped badly", func(i int) []byte { return []byte("a=%,") })
	baggage("escaped values", func(i int) []byte { return []byte("a=%61,") })
	baggage("with properties", func(i int) []byte { return []byte("a=;=,") })
	baggage("with blanks", func(i int) []byte { return []byte(" a = ,") })
	baggage("no UTF-8", func(i int) []byte { return []byte("\xff=\xff,") })
	baggage("a value", func(i int) []byte {
		return append([]byte(nil), "a="+strings.Repeat("v", largest-2)...)
	})
	baggage("an escaped value", func(i int) []byte { return []byte("a=" + strings.Repeat("%61", largest/3-2)) })
	baggage("a value of blanks", func(i int) []byte { return []byte("a=" + strings.Repeat(" ", largest-2)) })
	return append(all,
		largeRequest{"lookups", append(slices.Clone(point), repeat([]byte{0x22, 0})...), new(checkv1.CheckRequest)},
		largeRequest{"keys", append(slices.Clone(point), bytesField(4, repeat([]byte{0x1a, 0}))...), new(checkv1.CheckRequest)},
		largeRequest{"points", repeat([]byte{0x0a, 1, 'p'}), new(checkv1.CheckRequest)},
		largeRequest{"numbers", append(slices.Clone(point), repeat([]byte{0x18, 0})...), new(checkv1.CheckRequest)},
		largeRequest{"groups", append(slices.Clone(point), repeat([]byte{0x5b, 0x5c})...), new(checkv1.CheckRequest)},
		largeRequest{"deep groups", append(slices.Clone(point), repeat(slices.Concat(bytes.Repeat([]byte{0x5b}, 5000), bytes.Repeat([]byte{0x5c}, 5000)))...), new(checkv1.CheckRequest)},
		largeRequest{"fixed", append(slices.Clone(point), repeat([]byte{0x5d, 0, 0, 0, 0})...), new(checkv1.CheckRequest)},
		largeRequest{"requests", append(slices.Clone(web), repeat([]byte{0x1a, 0})...), new(checkhttpv1.CheckHTTPRequest)},
		largeRequest{"paths", append(slices.Clone(web), bytesField(3, repeat([]byte{0x1a, 0}))...), new(checkhttpv1.CheckHTTPRequest)},
		largeRequest{"many paths", append(slices.Clone(web), bytesField(3, repeat(bytesField(3, bytes.Repeat([]byte{'p'}, 120))))...), new(checkhttpv1.CheckHTTPRequest)},
		largeRequest{"baggage headers", append(slices.Clone(web), bytesField(3, repeat(bytesField(2, entry("baggage", "a=b"))))...), new(checkhttpv1.CheckHTTPRequest)},
		largeRequest{"Baggage headers", append(slices.Clone(web), bytesField(3, repeat(bytesField(2, entry("Baggage", "a=b"))))...), new(checkhttpv1.CheckHTTPRequest)},
		largeRequest{"labels beside a request", append(slices.Clone(web), repeat(bytesField(1003, entry("a", "b")))...), new(checkhttpv1.CheckHTTPRequest)},
		largeRequest{"a body", append(slices.Clone(web), bytesField(3, bytesField(8, make([]byte, largest)))...), new(checkhttpv1.CheckHTTPRequest)},
	)
}

func largeService(tb testing.TB) handler {
	tb.Helper()
	var components []policy.Component
	for _, key := range []string{"a", "user_id", "http.request.header.a"} {
		for _, point := range []string{"point", "web"} {
			components = append(components, policy.RateLimiter{Selectors: policy.At(point), Capacity: 1e9, Fill: 1e9, Interval: time.Second, LimitBy: key})
		}
	}
	e, err := engine.New([]policy.Policy{{Name: "p", Components: components}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = e.Close() })
	return handler{service: &Service{engine: e.Agent(), sessions: newSessions(e.Agent())}}
}

func BenchmarkLargeRequest(b *testing.B) {
	s := largeService(b)
	named := s.service.engine.NamedLabels()
	for _, tt := range largeRequests() {
		b.Run(tt.name, func(b *testing.B) {
			if len(tt.data) > 4<<20 || len(tt.data) < 4<<20-1024 {
				b.Fatalf("%d bytes", len(tt.data))
			}
			b.ReportAllocs()
			for b.Loop() {
				m := tt.m.ProtoReflect().New().Interface()
				err := readRequest(tt.data, m, named)
				switch m := m.(type) {
				case *checkv1.CheckRequest:
					_, _ = s.Check(context.Background(), m)
				case *checkhttpv1.CheckHTTPRequest:
					_, _ = s.CheckHTTP(context.Background(), m)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A large request costs few allocations, whatever it consists of.
func TestLargeRequestsAreReadWithFewAllocations(t *testing.T) {
	if race.Enabled {
		t.Skip("nothing runs at the same time here, and the race detector makes a minute of it: make test-long runs it")
	}
	s := largeService(t)
	named := s.service.engine.NamedLabels()
	for _, tt := range largeRequests() {
		t.Run(tt.name, func(t *testing.T) {
			got := testing.AllocsPerRun(1, func() {
				m := tt.m.ProtoReflect().New().Interface()
				if err := readRequest(tt.data, m, named); err != nil {
					t.Fatal(err)
				}
				if m, ok := m.(*checkhttpv1.CheckHTTPRequest); ok {
					carriedLabels(baggageOf(m.GetRequest().GetHeaders()), named)
				}
			})
			if most := 5.0 * maxLooked; got > most {
				t.Errorf("%v allocations want at most %v", got, most)
			}
		})
	}
}

// Of a request with more labels, headers or members than are looked at, those that policies name are as if there were no
// others: wherever they are, however they are written, and the last of several.
func TestLargeRequestsKeepWhatPoliciesName(t *testing.T) {
	named := map[string]bool{"a": true, "user_id": true, "\uFFFDq": true, "50%": true, "k k": true, wire.HeaderLabel + "x_user": true, wire.HeaderLabel + "user_id": true, wire.HeaderLabel + "n\uFFFD": true, wire.HeaderLabel + "a": false}
	keys := []string{"a", "b", "user_id", "User_ID", "\uFFFDq", "\xffq", "50%", "k k", "uzer_id", "x-user", "X_User", "x_user", "n\xff", "N\uFFFD", "n-", "A", ":a", "", wire.HeaderLabel + "a"}
	members := []string{"a=%s", " a = %s;p", "user_id=%s,", "us%%65r_id=%s", "50%%=%s", "50%%25=%s", "%%ffq=%s", "\xffq=%s", "a=%%zz%s", "a=%s%%6", "a=%%e2%%82%s", "k%%20k=%s", "=%s", "b=%s", ";a=%s", "A=%s", "a;=%s", "a"}
	junk := map[string]func(i int) string{
		"before": func(i int) string { return fmt.Sprint("junk", i) },
		"of one": func(int) string { return "junk" },
	}
	for name, junk := range junk {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			for range race.Pick(40, 200) {
				var labels, beside, headers []byte
				var header, few strings.Builder
				for i := range maxLooked + r.IntN(3) - 1 {
					labels = append(labels, bytesField(2, entry(junk(i), ""))...)
					beside = append(beside, bytesField(1003, entry(junk(i), ""))...)
					headers = append(headers, bytesField(2, entry(junk(i), ""))...)
					fmt.Fprintf(&header, "%s=,", junk(i))
				}
				fmt.Fprintf(&header, "z=%s,", strings.Repeat("z", wire.MaxBaggage))
				want, wantHeaders := picked{named: named}, headersRead{named: named}
				for i := range 1 + r.IntN(12) {
					key, value := keys[r.IntN(len(keys))], fmt.Sprint(i)
					labels = append(labels, bytesField(2, entry(key, value))...)
					beside = append(beside, bytesField(1003, entry(key, value))...)
					want.add([]byte(key), []byte(value))
					name, value := keys[r.IntN(len(keys))], fmt.Sprint(i)
					headers = append(headers, bytesField(2, entry(name, value))...)
					wantHeaders.add([]byte(name), []byte(value))
					member := strings.ReplaceAll(strings.ReplaceAll(members[r.IntN(len(members))], "%s", fmt.Sprint(i)), "%%", "%") + ","
					header.WriteString(member)
					few.WriteString(member)
				}
				check, checkHTTP := new(checkv1.CheckRequest), new(checkhttpv1.CheckHTTPRequest)
				if err := readRequest(labels, check, named); err != nil {
					t.Fatal(err)
				}
				if err := readRequest(append(beside, bytesField(3, headers)...), checkHTTP, named); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(onlyNamed(want.labels(), named), onlyNamed(check.GetLabels(), named)); diff != "" {
					t.Fatalf("labels (-of few +of many):\n%s", diff)
				}
				if diff := cmp.Diff(check.GetLabels(), checkHTTP.GetLabels()); diff != "" {
					t.Fatalf("labels (-Check +CheckHTTP):\n%s", diff)
				}
				chosen, ok := headersOf(wantHeaders.headers())
				wantLabels := requestLabels(&checkhttpv1.CheckHTTPRequest_HttpRequest{Headers: wantHeaders.headers()}, chosen, named)
				chosen, gotOK := headersOf(checkHTTP.GetRequest().GetHeaders())
				gotLabels := requestLabels(checkHTTP.GetRequest(), chosen, named)
				if diff := cmp.Diff(onlyNamed(wantLabels, named), onlyNamed(gotLabels, named)); diff != "" || gotOK != ok {
					t.Fatalf("headers, ok %v want %v (-of few +of many):\n%s", gotOK, ok, diff)
				}
				carried, _ := carriedLabels(text([]byte(header.String())), named)
				if diff := cmp.Diff(onlyNamed(w3cbaggage.Read(text([]byte(few.String()))), named), onlyNamed(carried, named)); diff != "" {
					t.Fatalf("baggage %q (-of few +of many):\n%s", few.String(), diff)
				}
			}
		})
	}
}

func onlyNamed(labels map[string]string, named map[string]bool) map[string]string {
	m := make(map[string]string)
	for key, value := range labels {
		if _, ok := named[key]; ok {
			m[key] = value
		}
	}
	return m
}

func FuzzText(f *testing.F) {
	f.Add([]byte("a\xff\xfeb\xed\xa0\x80\uFFFD"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if got, want := text(data), strings.ToValidUTF8(string(data), replacement); got != want {
			t.Errorf("%q becomes %q want %q", data, got, want)
		}
	})
}
