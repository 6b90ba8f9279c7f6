package headgate_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/big"
	"net/netip"
	"net/url"
	"reflect"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/headgate-go/headgate"
	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/flowctl/flowtest"
	"github.com/headgate-go/headgate/internal/testing/sides"
)

// runsOfTwoCalls calls a cached function that makes v, twice, and gives back how often that ran and what the second call
// returned.
func runsOfTwoCalls[T any](t *testing.T, client *flowctl.Client, v T, policy headgate.CachePolicy[T]) (runs int, found T) {
	t.Helper()
	cached := headgate.Cached(client, "value", flowctl.Params{}, func(context.Context) (T, error) {
		runs++
		return v, nil
	}, nil, policy)
	for range 2 {
		var err error
		if found, err = cached(t.Context()); err != nil {
			t.Error(err)
		}
		synctest.Wait() // until it is stored
	}
	return runs, found
}

// An embedded value is encoded by the methods of the time. Those of the nil pointer that it is decoded into panic.
type embedded struct{ *time.Time }

type panicking struct{}

func (panicking) MarshalJSON() ([]byte, error) { panic(errWork) }

// A row is a value, and whether it is stored.
type row struct {
	name   string
	stored bool
	run    func(t *testing.T, client *flowctl.Client) (runs int)
}

// value is a row of a value that is stored as JSON or not.
func value[T any](name string, stored bool, v T) row {
	return row{name, stored, func(t *testing.T, client *flowctl.Client) int {
		runs, found := runsOfTwoCalls(t, client, v, headgate.CachePolicy[T]{TTL: time.Minute})
		printed := fmt.Sprintf("%#v", v)
		if !strings.Contains(printed, "0x") && !strings.Contains(printed, "time.Date") && fmt.Sprintf("%#v", found) != printed {
			t.Errorf("made %s, found %#v", printed, found)
		}
		if at, ok := any(v).(time.Time); ok && !at.Equal(any(found).(time.Time)) {
			t.Errorf("made %v, found %v", v, found)
		}
		return runs
	}}
}

type (
	price struct {
		Currency string
		cents    int
	}
	record struct {
		At    time.Time
		Items []string `json:"items,omitempty"`
		Next  *record
		Extra any               `json:"extra"`
		Tags  map[string]string `json:"tags"`
		Call  func()            `json:"-"`
	}
	oneWay struct{ N int } // which JSON encodes, and does not decode
	secret struct {
		at time.Time
		n  int
	}
	badText string
	moment  time.Time
	span    struct{ from moment } // a key of maps
	kept    struct{ by any }
)

func (m moment) MarshalText() ([]byte, error) { return time.Time(m).MarshalText() }

func (m *moment) UnmarshalText(text []byte) error { return (*time.Time)(m).UnmarshalText(text) }

func (o oneWay) MarshalJSON() ([]byte, error) { return fmt.Appendf(nil, `"number %d"`, o.N), nil }

// secret encodes its fields, though they are not exported.
func (s secret) MarshalJSON() ([]byte, error) { return json.Marshal([]any{s.at, s.n}) }

func (s *secret) UnmarshalJSON(data []byte) error {
	return json.Unmarshal(data, &[]any{&s.at, &s.n})
}

// badText hides what it is: decoding gives another value, without an error.
func (b badText) MarshalText() ([]byte, error) { return []byte(strings.ToUpper(string(b))), nil }

func (b *badText) UnmarshalText(text []byte) error { *b = badText(text); return nil }

// A value is stored if decoding gives it back, and else made anew for each call.
func TestCodecValues(t *testing.T) {
	now := time.Now()
	utc := time.Date(2026, 11, 29, 12, 0, 0, 1, time.UTC)
	rows := []row{
		value("text", true, "Grüße"),
		value("bytes that are no UTF-8", false, "\x1f\x8b\x08\x00\xff"),
		value("bytes", true, []byte("\x1f\x8b\x08\x00\xff")),
		value("bytes in an array", true, [3]byte{1, 2, 255}),
		value("JSON", true, json.RawMessage(`{"a":1}`)),
		value("JSON with spaces", false, json.RawMessage(`{"a": 1}`)),
		value("keys that are no UTF-8", false, map[string]int{"caf\xe9": 1, "caf\xe8": 2}),
		value("an unexported field", false, price{"EUR", 995}),
		value("an unexported field that is zero", true, price{Currency: "EUR"}),
		value("unexported fields with methods", true, secret{utc, 42}),
		value("a pointer", true, &price{Currency: "EUR"}),
		value("a pointer to less", false, &price{"EUR", 995}),
		value("nil pointer", true, (*price)(nil)),
		value("an int in an any", false, any(int64(9007199254740993))),
		value("a float in an any", true, any(1.5)),
		value("text in an any", true, any("text")),
		value("nil in an any", true, any(nil)),
		value("a struct in an any", false, any(price{Currency: "EUR"})),
		value("a list in an any", true, any([]any{"a", 1.0, nil, map[string]any{"b": true}})),
		value("a list with an int in an any", false, any([]any{"a", 1})),
		value("a large int", true, int64(9007199254740993)),
		value("the least int", true, int64(math.MinInt64)),
		value("the largest uint", true, uint64(math.MaxUint64)),
		value("a float", true, 0.1),
		value("the least float", true, math.SmallestNonzeroFloat64),
		value("a float32", true, float32(0.1)),
		value("minus zero", true, math.Copysign(0, -1)),
		value("NaN", false, math.NaN()),
		value("infinity", false, math.Inf(1)),
		value("a time", true, utc),
		value("a time with a monotonic reading", true, now),
		value("a time elsewhere", true, utc.In(time.FixedZone("there", 3600))),
		value("a time with odd seconds of offset", false, utc.In(time.FixedZone("then", 3601))),
		value("a time after JSON's", false, utc.AddDate(9000, 0, 0)),
		value("a time in a struct", true, record{At: now}),
		value("times in lists and maps", true, map[string][]time.Time{"a": {now}}),
		value("a time behind a pointer", true, &now),
		value("an unexported time with a monotonic reading", true, secret{now, 42}),
		value("a type defined as a time", true, moment(now)),
		value("times as keys", true, map[time.Time]int{now: 1, utc: 2}),
		value("keys of a type defined as a time", true, map[moment]moment{moment(now): moment(utc)}),
		value("two keys of one instant", false, map[time.Time]int{now: 1, now.UTC(): 2}),
		value("a nil slice", true, []string(nil)),
		value("an empty slice", true, []string{}),
		value("an empty slice that is left out", false, record{Items: []string{}}),
		value("a nil map", true, record{}),
		value("an empty map", true, record{Tags: map[string]string{}}),
		value("a list of records", true, []record{{Next: &record{Items: []string{"a"}}}}),
		value("a list of records, one with less", false, []record{{Next: &record{Extra: 1}}}),
		value("a field that is left out", false, record{Call: func() {}}),
		value("a function", false, func() {}),
		value("no function", false, (func())(nil)),
		value("a channel", false, make(chan int)),
		value("MarshalJSON alone", false, oneWay{42}),
		value("other text", false, badText("lower")),
		value("the same text", true, badText("UPPER")),
		value("a map by number", true, map[int]string{1: "a"}),
		value("a big number", true, *big.NewInt(42)),
		value("an address", true, netip.MustParseAddr("fe80::1%eth0")),
		value("a URL", true, url.URL{Scheme: "https", Host: "example.com"}),
		value("a URL with a user", false, url.URL{Scheme: "https", Host: "example.com", User: url.User("u")}),
		value("a time that is embedded by a pointer", false, embedded{&now}),
		value("a MarshalJSON that panics", false, panicking{}),
		value("a duration", true, time.Second),
		value("a complex number", false, complex(1, 2)),
		value("an error in an any", false, any(errors.New("text"))),
		value("nothing", true, struct{}{}),
		value("a loop", false, loop()),
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			overAll(t, func(t *testing.T, client *flowctl.Client) {
				want := 2
				if r.stored {
					want = 1
				}
				if runs := r.run(t, client); runs != want {
					t.Errorf("%d runs for two calls want %d", runs, want)
				}
			})
		})
	}
}

// loop is a list that never ends.
func loop() *record {
	r := &record{}
	r.Next = r
	return r
}

// gobCodec gives back loops of nothing, and NaN.
type gobCodec[T any] struct{}

func (gobCodec[T]) Encode(v T) ([]byte, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(&v)
	return b.Bytes(), err
}

func (gobCodec[T]) Decode(data []byte) (v T, err error) {
	err = gob.NewDecoder(bytes.NewReader(data)).Decode(&v)
	return v, err
}

// memory is a codec that gives back the very value.
type memory[T any] struct{ v *T }

func (m memory[T]) Encode(v T) ([]byte, error) { *m.v = v; return []byte{1}, nil }
func (m memory[T]) Decode([]byte) (T, error)   { return *m.v, nil }

// untidy is a codec that writes over what it decodes.
type untidy struct{}

func (untidy) Encode(v string) ([]byte, error) { return []byte(v), nil }

func (untidy) Decode(data []byte) (string, error) {
	v := string(data)
	clear(data)
	return v, nil
}

// What other codecs give back is stored too, and of what is exact nothing is compared.
func TestCodecExact(t *testing.T) {
	channel := make(chan int)
	rows := []row{
		{"NaN with gob", true, func(t *testing.T, client *flowctl.Client) int {
			runs, _ := runsOfTwoCalls(t, client, math.NaN(), headgate.CachePolicy[float64]{Codec: gobCodec[float64]{}})
			return runs
		}},
		{"complex NaN with gob", true, func(t *testing.T, client *flowctl.Client) int {
			runs, _ := runsOfTwoCalls(t, client, complex(math.NaN(), 1), headgate.CachePolicy[complex128]{Codec: gobCodec[complex128]{}})
			return runs
		}},
		{"an empty slice with gob", false, func(t *testing.T, client *flowctl.Client) int {
			runs, _ := runsOfTwoCalls(t, client, record{Items: []string{}}, headgate.CachePolicy[record]{Codec: gobCodec[record]{}})
			return runs
		}},
		{"an empty slice with gob, exact as it is", true, func(t *testing.T, client *flowctl.Client) int {
			runs, _ := runsOfTwoCalls(t, client, price{"EUR", 995}, headgate.CachePolicy[price]{Codec: gobCodec[price]{}, Exact: true})
			return runs
		}},
		{"JSON, exact by the function's word", true, func(t *testing.T, client *flowctl.Client) int {
			runs, found := runsOfTwoCalls(t, client, price{"EUR", 995}, headgate.CachePolicy[price]{Exact: true})
			if found.cents != 0 {
				t.Error("the test's value is no example")
			}
			return runs
		}},
		{"a loop and a channel, the very same", true, func(t *testing.T, client *flowctl.Client) int {
			r := loop()
			r.Extra = channel
			var kept *record
			runs, _ := runsOfTwoCalls(t, client, r, headgate.CachePolicy[*record]{Codec: memory[*record]{&kept}})
			return runs
		}},
		{"two loops that are alike", true, func(t *testing.T, client *flowctl.Client) int {
			one, other := loop(), loop()
			runs, _ := runsOfTwoCalls(t, client, one, headgate.CachePolicy[*record]{Codec: constant[*record]{other}})
			return runs
		}},
		{"two loops that differ", false, func(t *testing.T, client *flowctl.Client) int {
			one, other := loop(), loop()
			other.Tags = map[string]string{"a": "b"}
			runs, _ := runsOfTwoCalls(t, client, one, headgate.CachePolicy[*record]{Codec: constant[*record]{other}})
			return runs
		}},
		{"a codec that writes over its data", true, func(t *testing.T, client *flowctl.Client) int {
			runs, found := runsOfTwoCalls(t, client, "text", headgate.CachePolicy[string]{Codec: untidy{}})
			if found != "text" {
				t.Errorf("found %q", found)
			}
			return runs
		}},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			overAll(t, func(t *testing.T, client *flowctl.Client) {
				want := 2
				if r.stored {
					want = 1
				}
				if runs := r.run(t, client); runs != want {
					t.Errorf("%d runs for two calls want %d", runs, want)
				}
			})
		})
	}
}

// constant is a codec that decodes one value.
type constant[T any] struct{ v T }

func (constant[T]) Encode(T) ([]byte, error)   { return []byte{1}, nil }
func (c constant[T]) Decode([]byte) (T, error) { return c.v, nil }

// The comparison is at least as strict as reflect.DeepEqual where neither times nor NaN are.
func TestCodecIsAsStrictAsDeepEqual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := engineClient(t)
		f := func() {}
		ch := make(chan int)
		n := 1
		values := []any{
			nil, 1, int64(1), uint8(1), 1.5, "a", []byte("a"),
			[]byte{},
			[]byte(nil),
			[]int{1},
			[]int{1, 2},
			[]int(nil),
			[]int{},
			[1]int{1},
			[1]any{nil},
			map[string]int{"a": 1},
			map[string]int{"b": 1},
			map[string]int{"a": 2},
			map[string]int(nil),
			map[string]int{},
			price{"EUR", 1},
			price{"EUR", 2},
			&price{"EUR", 1}, (*price)(nil), f, (func())(nil), ch, make(chan int),
			true, false, &n,
			[]any{1, "a"},
			[]any{1, []any{2}},
			complex(1, 2), uintptr(1), reflect.TypeFor[int](), math.Inf(1),
		}
		for _, made := range values {
			for _, back := range values {
				if stored := storesAs(t, client, made, back); stored != reflect.DeepEqual(made, back) {
					t.Errorf("%#v for %#v: stored %v", back, made, stored)
				}
			}
		}
	})
}

// Times are the same if they are the same instant, wherever they are in a value.
func TestCodecTimes(t *testing.T) {
	now := time.Now()
	same, later := now.In(time.FixedZone("there", 3600)), now.Add(1)
	values := []struct {
		name string
		of   func(time.Time) any
	}{
		{"alone", func(at time.Time) any { return at }},
		{"a type of its own", func(at time.Time) any { return moment(at) }},
		{"unexported", func(at time.Time) any { return secret{at: at} }},
		{"unexported in an unexported field", func(at time.Time) any { return kept{secret{at: at}} }},
		{"unexported in an unexported map", func(at time.Time) any { return kept{map[int]secret{1: {at: at}}} }},
		{"unexported in an unexported array", func(at time.Time) any { return kept{[1]secret{{at: at}}} }},
		{"behind an unexported pointer", func(at time.Time) any { return kept{&kept{&at}} }},
		{"in an unexported list", func(at time.Time) any { return kept{[]any{at}} }},
		{"a key", func(at time.Time) any { return map[time.Time]int{at: 1} }},
		{"a key of a type of its own", func(at time.Time) any { return map[moment]int{moment(at): 1} }},
		{"an unexported key", func(at time.Time) any { return kept{map[time.Time]int{at: 1}} }},
		{"unexported in a key", func(at time.Time) any { return map[span]int{{from: moment(at)}: 1} }},
		{"in an array that is a key", func(at time.Time) any { return map[[1]time.Time]int{{at}: 1} }},
		{"in an any that is a key", func(at time.Time) any { return map[any]int{at: 1, "b": 2} }},
		{"in a struct in an any that is a key", func(at time.Time) any { return map[any]int{kept{span{from: moment(at)}}: 1} }},
		{"below a key", func(at time.Time) any { return map[time.Time]moment{at: moment(at)} }},
		{"one of two keys", func(at time.Time) any { return map[time.Time]int{at: 1, now.Add(time.Hour): 2} }},
	}
	synctest.Test(t, func(t *testing.T) {
		client := engineClient(t)
		for _, v := range values {
			if stored := storesAs(t, client, v.of(now), v.of(same)); !stored {
				t.Errorf("%s: the same instant is not stored", v.name)
			}
			if stored := storesAs(t, client, v.of(now), v.of(later)); stored {
				t.Errorf("%s: another instant is stored", v.name)
			}
		}
		for _, tt := range []struct {
			name       string
			made, back any
		}{
			{"two keys of one instant", map[time.Time]int{now: 1, same: 1}, map[time.Time]int{now: 1, later: 1}},
			{"two keys of one instant, decoded", map[time.Time]int{now: 1, later: 1}, map[time.Time]int{now: 1, same: 1}},
			{"another type", moment(now), now},
			{"another value below a key", map[time.Time]int{now: 1}, map[time.Time]int{same: 2}},
			{"a key of another type", map[any]int{now: 1}, map[any]int{moment(now): 1}},
		} {
			if storesAs(t, client, tt.made, tt.back) {
				t.Errorf("%s is stored", tt.name)
			}
		}
	})
}

// The time to compare values is not exponential where interfaces share what they hold.
func TestCodecOfSharedValues(t *testing.T) {
	type pair struct{ Left, Right any }
	nested := func(join func(v any) any, leaf any) any {
		for range 100 {
			leaf = join(leaf)
		}
		return leaf
	}
	for name, join := range map[string]func(v any) any{
		"structs":   func(v any) any { return pair{v, v} },
		"arrays":    func(v any) any { return [2]any{v, v} },
		"errors":    func(v any) any { return pair{Left: fmt.Stringer(twins{v, v}), Right: v} },
		"in slices": func(v any) any { return []any{pair{v, 1}, pair{v, 2}} },
		"in maps":   func(v any) any { return map[int]any{1: pair{v, 1}, 2: pair{v, 2}} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := engineClient(t)
				if !storesAs(t, client, nested(join, 1), nested(join, 1)) {
					t.Error("equal values are not stored")
				}
				if storesAs(t, client, nested(join, 1), nested(join, 2)) {
					t.Error("values that differ are stored")
				}
			})
		})
	}
}

// twins are held by interfaces with methods.
type twins struct{ left, right any }

func (twins) String() string { return "" }

// storesAs reports whether a value is stored that is decoded as another one.
func storesAs(t *testing.T, client *flowctl.Client, made, back any) bool {
	t.Helper()
	runs := 0
	cached := headgate.Cached(client, "value", flowctl.Params{}, func(context.Context) (any, error) {
		runs++
		return made, nil
	}, nil, headgate.CachePolicy[any]{TTL: time.Second, Codec: constant[any]{back}})
	for range 2 {
		_, _ = cached(t.Context())
		synctest.Wait()
	}
	<-time.After(2 * time.Second) // until it has expired
	return runs == 1
}

// messageCodec is the codec of protobuf messages that their package has.
type messageCodec struct{}

func (messageCodec) Encode(m *checkv1.CheckRequest) ([]byte, error) { return proto.Marshal(m) }

func (messageCodec) Decode(data []byte) (*checkv1.CheckRequest, error) {
	m := new(checkv1.CheckRequest)
	return m, proto.Unmarshal(data, m)
}

// request is a struct that embeds a message.
type request struct {
	*checkv1.CheckRequest
	Extra int
}

// Protobuf messages have state of their own in unexported fields, which does not count.
func TestCodecMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := engineClient(t)
		message := func(point string) *checkv1.CheckRequest {
			m := &checkv1.CheckRequest{ControlPoint: point, Labels: map[string]string{"a": "b"}}
			_ = m.ProtoReflect().Descriptor() // which sets the state
			return m
		}
		fresh := func(point string) *checkv1.CheckRequest {
			return &checkv1.CheckRequest{ControlPoint: point, Labels: map[string]string{"a": "b"}}
		}
		if runs, _ := runsOfTwoCalls(t, client, fresh("p"), headgate.CachePolicy[*checkv1.CheckRequest]{TTL: time.Second, Codec: messageCodec{}}); runs != 1 {
			t.Error("a message is not stored")
		}
		<-time.After(2 * time.Second) // until it has expired
		for _, tt := range []struct {
			name       string
			made, back any
			stored     bool
		}{
			{"in a list", []any{message("p")}, []any{fresh("p")}, true},
			{"unexported", kept{message("p")}, kept{fresh("p")}, true},
			{"another", message("p"), fresh("q"), false},
			{"embedded", request{message("p"), 1}, request{fresh("p"), 1}, true},
			{"embedded, beside another value", &request{message("p"), 1}, &request{fresh("p"), 2}, false},
			{"embedded nil", &request{Extra: 1}, &request{Extra: 1}, true},
			{"dynamic", dynamicpb.NewMessage(message("p").ProtoReflect().Descriptor()), dynamicpb.NewMessage(message("p").ProtoReflect().Descriptor()), true},
		} {
			if stored := storesAs(t, client, tt.made, tt.back); stored != tt.stored {
				t.Errorf("%s: stored %v want %v", tt.name, stored, tt.stored)
			}
		}
	})
}

// What is nested too deep to be compared is not stored, and does not end the program.
func TestCodecDepth(t *testing.T) {
	chain := func(n int, of func(any) any) (v any) {
		for range n {
			v = of(v)
		}
		return v
	}
	links := map[string]func(any) any{
		"pointers":   func(v any) any { return &v },
		"structs":    func(v any) any { return kept{v} },
		"slices":     func(v any) any { return []any{v} },
		"arrays":     func(v any) any { return [1]any{v} },
		"maps":       func(v any) any { return map[string]any{"": v} },
		"fields":     func(v any) any { next, _ := v.(*record); return &record{Next: next} },
		"interfaces": func(v any) any { return &record{Extra: v} },
	}
	for name, of := range links {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				client := engineClientWith(t, flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
				if !storesAs(t, client, chain(10_000, of), chain(10_000, of)) {
					t.Errorf("10,000 are not stored: %s", &log)
				}
				if storesAs(t, client, chain(50_000, of), chain(50_000, of)) {
					t.Error("50,000 are stored")
				}
				if !strings.Contains(log.String(), "is nested more than") {
					t.Errorf("logged: %s", &log)
				}
			})
		})
	}
	t.Run("a difference far inside", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			client := engineClientWith(t, flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
			below := func(n int) any {
				r := &record{Extra: n}
				for range 20_000 {
					r = &record{Next: r}
				}
				return r
			}
			if storesAs(t, client, below(1), below(2)) || !strings.Contains(log.String(), "Next: Extra: int has another value") || log.Len() > 1000 {
				t.Errorf("it is stored, or logged in %d bytes", log.Len())
			}
		})
	})
}

// broken is a codec that ends otherwise than by returning, in one of its methods.
type broken struct {
	encode, decode func()
	decodes        *atomic.Int64
}

func (b broken) Encode(n int) ([]byte, error) {
	if b.encode != nil {
		b.encode()
	}
	return fmt.Append(nil, n), nil
}

func (b broken) Decode([]byte) (int, error) {
	b.decodes.Add(1)
	if b.decode != nil {
		b.decode()
	}
	return 42, nil
}

// A codec that panics when a result is encoded, or decoded to compare it, is like a function that does.
func TestCodecPanics(t *testing.T) {
	for name, end := range map[string]func(){"panic": func() { panic(errWork) }, "Goexit": runtime.Goexit} {
		for _, method := range []string{"Encode", "Decode"} {
			t.Run(name+" in "+method, func(t *testing.T) {
				overAll(t, func(t *testing.T, client *flowctl.Client) {
					codec := broken{decodes: new(atomic.Int64)}
					if method == "Encode" {
						codec.encode = end
					} else {
						codec.decode = end
					}
					starts := &starter{client: client}
					cached := headgate.Cached(starts, "value", flowctl.Params{}, func(context.Context) (int, error) {
						<-time.After(time.Second)
						return 42, nil
					}, nil, headgate.CachePolicy[int]{Codec: codec})
					var results [3]result
					done := make(chan struct{})
					for i := range results {
						go func() {
							defer func() { done <- struct{}{} }()
							observe(&results[i], func() (int, error) { return cached(t.Context()) })
						}()
						synctest.Wait() // the first leads
					}
					for range results {
						<-done
					}
					if name == "panic" && results[0].recovered != any(errWork) || name == "Goexit" && !results[0].exited {
						t.Errorf("the first call got %+v", results[0])
					}
					for _, r := range results[1:] {
						if r.err == nil || !strings.Contains(r.err.Error(), "did not return") {
							t.Errorf("another call got %+v want an error", r)
						}
					}
					allEnded(t, starts)
				})
			})
		}
	}
}

// What is not stored is logged, once a minute at the most, and by type: nothing of the value is.
func TestCodecLogsWhatIsNotStored(t *testing.T) {
	const payload = "payload"
	tests := map[string]struct {
		call func(ctx context.Context, client *flowctl.Client) error
		want string
	}{
		"not given back": {func(ctx context.Context, client *flowctl.Client) error {
			_, err := headgate.Cached(client, "value", flowctl.Params{}, func(context.Context) ([]price, error) {
				return []price{{payload, 995}}, nil
			}, nil, headgate.CachePolicy[[]price]{})(ctx)
			return err
		}, "cents: int has another value"},
		"not encoded": {func(ctx context.Context, client *flowctl.Client) error {
			_, err := headgate.Cached(client, "value", flowctl.Params{}, func(context.Context) (any, error) {
				return map[string]any{payload: func() {}}, nil
			}, nil, headgate.CachePolicy[any]{})(ctx)
			return err
		}, "it holds a func()"},
		"not decoded": {func(ctx context.Context, client *flowctl.Client) error {
			_, err := headgate.Cached(client, "value", flowctl.Params{}, func(context.Context) (oneWay, error) {
				return oneWay{995}, nil
			}, nil, headgate.CachePolicy[oneWay]{})(ctx)
			return err
		}, "oneWay cannot be decoded again"},
	}
	for name, tt := range tests {
		for _, side := range []string{"remote", "embedded"} {
			t.Run(name+"/"+side, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var log bytes.Buffer
					option := flowctl.WithLogger(slog.New(slog.NewTextHandler(&log, nil)))
					var client *flowctl.Client
					if side == "remote" {
						client = flowtest.NewAgent(t).Client(option)
					} else {
						client = engineClientWith(t, option)
					}
					for range 10 {
						if err := tt.call(t.Context(), client); err != nil {
							t.Error(err)
						}
					}
					if n := strings.Count(log.String(), "\n"); n != 1 {
						t.Errorf("%d lines want 1:\n%s", n, &log)
					}
					for _, want := range []string{"level=WARN", `"headgate: a result was not stored in the cache"`, "control_point=value", tt.want} {
						if !strings.Contains(log.String(), want) {
							t.Errorf("the log lacks %q:\n%s", want, &log)
						}
					}
					<-time.After(time.Minute)
					if err := tt.call(t.Context(), client); err != nil {
						t.Error(err)
					}
					if !strings.Contains(log.String(), "unlogged_before=9") {
						t.Errorf("a minute later the log does not say how many were not logged:\n%s", &log)
					}
					if strings.Contains(log.String(), payload) || strings.Contains(log.String(), "995") {
						t.Errorf("the log has something of the value:\n%s", &log)
					}
				})
			})
		}
	}
}

// What is not stored is kept for the fallback all the same.
func TestCodecKeepsWhatIsNotStored(t *testing.T) {
	sides.Setup{}.InBubbles(t, sides.All, func(t *testing.T, side *sides.Side) {
		cached := headgate.Cached(side.Client, "report", flowctl.Params{}, func(context.Context) (price, error) {
			return price{"EUR", 995}, nil
		}, fallback.Stale[price](time.Minute), headgate.CachePolicy[price]{})
		_, _ = cached(t.Context())
		synctest.Wait()
		side.Answer(rejected(0))
		if got, err := cached(t.Context()); got != (price{"EUR", 995}) || err != nil {
			t.Errorf("cached() = %v, %v want what was made last", got, err)
		}
	})
}
