package w3cbaggage_test

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
)

func TestRead(t *testing.T) {
	type members = map[string]string
	for _, tt := range []struct {
		name, header string
		want         members
	}{
		{"nothing", "", nil},
		{"a member", "a=1", members{"a": "1"}},
		{"members", "a=1,b=2,c=3", members{"a": "1", "b": "2", "c": "3"}},
		{"one key twice", "a=1,b=2,a=3", members{"a": "3", "b": "2"}},
		{"one key twice, the last one bad", "a=1,a=%", members{"a": "1"}},
		{"an empty value", "a=,b= ;p", members{"a": "", "b": ""}},
		{"a value with an equals sign", "a=b=c", members{"a": "b=c"}},
		{"keys in two cases", "A=1,a=2", members{"A": "1", "a": "2"}},

		{"blanks", " a\t=\t1 , b = 2 ", members{"a": "1", "b": "2"}},
		{"blanks within", "a b=1 2", members{"a b": "1 2"}},
		{"line breaks are no blanks", "a=1\r\n,\nb=2", members{"a": "1\r\n", "\nb": "2"}},
		{"escaped blanks stay", "%20a=%201%09", members{" a": " 1\t"}},

		{"a property", "a=1;p", members{"a": "1"}},
		{"properties", "a=1 ; p = q ;r=s,b=2;;", members{"a": "1", "b": "2"}},
		{"a property before the value", "a;p=1,b=2", members{"b": "2"}},
		{"a property without a member", ";p=1,b=2", members{"b": "2"}},

		{"escapes", "a=%31%2c%3B%3d%25", members{"a": "1,;=%"}},
		{"hexadecimal digits", "a=%4a%4A%fF,b=%0g", members{"a": "JJ\uFFFD"}},
		{"plus", "a=1+2", members{"a": "1+2"}},
		{"once", "a=%2541", members{"a": "%41"}},
		{"an escaped key", "user%20id=1,%61=2", members{"user id": "1", "a": "2"}},
		{"a key that only looks escaped", "50%=1,%zz=2,%4=3", members{"50%": "1", "%zz": "2", "%4": "3"}},
		{"a value that only looks escaped", "a=50%,b=%zz,c=%4,d=%%41,e=1", members{"e": "1"}},

		{"runes", "ä=%C3%A4", members{"ä": "ä"}},
		{"not UTF-8", "\xffa=\xff1\xfe,b=%ff%fe", members{"\uFFFDa": "\uFFFD1\uFFFD", "b": "\uFFFD"}},
		{"escaped to what is not UTF-8", "%ff=%c3", members{"\uFFFD": "\uFFFD"}},

		{"commas", ",,a=1,,", members{"a": "1"}},
		{"no key", "=1,a=2, =3,=,b=4", members{"a": "2", "b": "4"}},
		{"no equals sign", "a,b=1,c", members{"b": "1"}},
		{"nothing but signs", "=,;=;,;;,==,%=%", nil},
		{"control characters", "a\x00=\x001", members{"a\x00": "\x001"}},

		{"more members than OpenTelemetry reads", strings.Repeat("a=1,", 300) + "b=2", members{"a": "1", "b": "2"}},
		{"longer than OpenTelemetry reads", "a=" + strings.Repeat("v", 1<<20) + ",b=2", members{"a": strings.Repeat("v", 1<<20), "b": "2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := w3cbaggage.Read(tt.header); !maps.Equal(got, tt.want) {
				t.Errorf("Read(%.100q) = %.100q want %.100q", tt.header, got, tt.want)
			}
		})
	}
}

// All gives every member, in the order of the header, and no more than is asked for.
func TestAll(t *testing.T) {
	const header = "b=1,a=%,a=2,b=3"
	var got []string
	for key, value := range w3cbaggage.All(header) {
		got = append(got, key+"="+value)
	}
	if want := []string{"b=1", "a=2", "b=3"}; !slices.Equal(got, want) {
		t.Errorf("All(%q) gives %q want %q", header, got, want)
	}
	for range w3cbaggage.All(header) {
		break // All panics if it goes on
	}
}

// A member is where it is written, and the rest of the header is behind its comma.
func TestNextMember(t *testing.T) {
	const header = "x, a = %31 ;p=q,=,b=2"
	type member struct {
		key, value string
		rest       int
	}
	var got []member
	for m, rest := w3cbaggage.NextMember(header, 0); rest > 0; m, rest = w3cbaggage.NextMember(header, rest) {
		got = append(got, member{header[m.KeyFrom:m.KeyTo], header[m.ValueFrom:m.ValueTo], rest})
	}
	want := []member{{"a", "%31", strings.Index(header, "=,b")}, {"b", "2", len(header) + 1}}
	if !slices.Equal(got, want) {
		t.Errorf("NextMember() gives %v want %v", got, want)
	}
}

// What is unescaped is appended, and nothing is where an escape is none.
func TestUnescape(t *testing.T) {
	for _, tt := range []struct {
		escaped, want string
		ok            bool
	}{
		{"", "", true},
		{"a+b", "a+b", true},
		{"%41%62%2b", "Ab+", true},
		{"%", "", false},
		{"a%4", "", false},
		{"a%41%4g", "", false},
		{"a%g4", "", false},
		{"%41%", "", false},
	} {
		got, ok := w3cbaggage.Unescape([]byte("before "), tt.escaped)
		if string(got) != "before "+tt.want || ok != tt.ok || w3cbaggage.Unescapes([]byte(tt.escaped)) != tt.ok {
			t.Errorf("Unescape(%q) appends %q, %v want %q, %v", tt.escaped, got, ok, tt.want, tt.ok)
		}
	}
}

// A header exceeds what OpenTelemetry reads exactly if OpenTelemetry does not read its last member.
func TestExceeds(t *testing.T) {
	members := func(n int) string {
		var all []string
		for i := range n {
			all = append(all, fmt.Sprintf("k%d=v", i))
		}
		return strings.Join(all, ",")
	}
	for _, tt := range []struct {
		name, header string
		want         bool
	}{
		{"a member", "last=1", false},
		{"64 members", members(63) + ",last=1", false},
		{"65 members", members(64) + ",last=1", true},
		{"8192 bytes", "a=" + strings.Repeat("v", 8192-len("a=,last=1")) + ",last=1", false},
		{"8193 bytes", "a=" + strings.Repeat("v", 8193-len("a=,last=1")) + ",last=1", true},
	} {
		bag, _ := baggage.Parse(tt.header) // which keeps what it can read
		if got, read := w3cbaggage.Exceeds(tt.header), bag.Member("last").Value() == "1"; got != tt.want || read == tt.want {
			t.Errorf("%s: Exceeds() = %v, OpenTelemetry reads the last member: %v want %v, %v", tt.name, got, read, tt.want, !tt.want)
		}
	}
}

func TestFrom(t *testing.T) {
	if got := w3cbaggage.From(t.Context()); got != "" {
		t.Errorf("From() = %q without a header", got)
	}
	outer := w3cbaggage.With(t.Context(), "a=1")
	if got, inner := w3cbaggage.From(outer), w3cbaggage.From(w3cbaggage.With(outer, "b=2")); got != "a=1" || inner != "b=2" {
		t.Errorf("From() = %q, and within %q want each context's own", got, inner)
	}
}

// FuzzRead compares what is read in one pass with what package strings makes of the header.
func FuzzRead(f *testing.F) {
	f.Add("a=1,b=2")
	f.Add(" a = %31 ;p=q,=,;=,b")
	f.Add("a=%zz,50%=1,\xff=%ff,a=2")
	f.Fuzz(func(t *testing.T, header string) {
		want := make(map[string]string)
		for member := range strings.SplitSeq(header, ",") {
			member, _, _ = strings.Cut(member, ";")
			key, value, _ := strings.Cut(member, "=")
			value, err := url.PathUnescape(strings.Trim(value, " \t"))
			if key = strings.Trim(key, " \t"); key == "" || err != nil || !strings.Contains(member, "=") {
				continue
			}
			if plain, err := url.PathUnescape(key); err == nil {
				key = plain
			}
			want[strings.ToValidUTF8(key, "\uFFFD")] = strings.ToValidUTF8(value, "\uFFFD")
		}
		if got := w3cbaggage.Read(header); !maps.Equal(got, want) {
			t.Errorf("Read(%q) = %q want %q", header, got, want)
		}
	})
}

func FuzzUnescape(f *testing.F) {
	f.Add("a%41b%")
	f.Add("%zz+%2B%c3%bc")
	f.Fuzz(func(t *testing.T, s string) {
		want, err := url.PathUnescape(s)
		got, ok := w3cbaggage.Unescape([]byte("x"), s)
		if ok != (err == nil) || string(got) != "x"+want || w3cbaggage.Unescapes([]byte(s)) != ok {
			t.Errorf("%q becomes %q, %v want %q, %v", s, got, ok, want, err)
		}
	})
}
