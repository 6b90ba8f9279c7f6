package w3cbaggage_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
)

// parsed is what OpenTelemetry reads of a header.
func parsed(header string) map[string]string {
	m := make(map[string]string)
	bag, _ := baggage.Parse(header) // which keeps the good members of a bad header
	for _, member := range bag.Members() {
		m[member.Key()] = member.Value()
	}
	return m
}

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
		{"an empty value", "a=,b= ;p", members{"a": "", "b": ""}},
		{"a value with an equals sign", "a=b=c", members{"a": "b=c"}},
		{"keys in two cases", "A=1,a=2", members{"A": "1", "a": "2"}},
		{"a key of all signs", "!#$%&'*+-.^_`|~=1", members{"!#$%&'*+-.^_`|~": "1"}},

		{"one key twice, the last one with a bad escape", "a=1,a=%", members{"a": "1"}},
		{"one key twice, the last one with a quotation mark", `a=1,a="x`, members{"a": "1"}},
		{"one key twice, the last one with a blank", "a=1,a=2 3", members{"a": "1"}},
		{"one key twice, the last one not ASCII", "a=1,a=ä", members{"a": "1"}},
		{"one key twice, the last one with a bad property", `a=1,a=2;",a=3; ,a=4;p q,a=5;=,a=6;p=%`, members{"a": "1"}},
		{"one key twice, the last one without a value", "a=1,a,a;p=2", members{"a": "1"}},

		{"blanks", " a\t=\t1 , b = 2 ", members{"a": "1", "b": "2"}},
		{"blanks within", "a b=1 2", nil},
		{"line breaks", "a=1\r\n,\nb=2", members{"a": "1", "b": "2"}},
		{"blanks that are not ASCII", "\u00a0a\u3000=\u20031\u0085,\xa0b=2", members{"a": "1"}},
		{"escaped blanks stay", "a=%201%09", members{"a": " 1\t"}},

		{"a property", "a=1;p", members{"a": "1"}},
		{"properties", "a=1 ; p = q ;r=s,b=2;;", members{"a": "1", "b": "2"}},
		{"a property before the value", "a;p=1,b=2", members{"b": "2"}},
		{"a property without a member", ";p=1,b=2", members{"b": "2"}},

		{"escapes", "a=%31%2c%3B%3d%25", members{"a": "1,;=%"}},
		{"hexadecimal digits", "a=%4a%4A%fF,b=%0g", members{"a": "JJ\uFFFD"}},
		{"plus", "a=1+2", members{"a": "1+2"}},
		{"once", "a=%2541", members{"a": "%41"}},
		{"an escaped key", "user%20id=1,%61=2,a=3,%61=4", members{"user%20id": "1", "a": "3", "%61": "4"}},
		{"a key that only looks escaped", "50%=1,%zz=2,%4=3", members{"50%": "1", "%zz": "2", "%4": "3"}},
		{"a value that only looks escaped", "a=50%,b=%zz,c=%4,d=%%41,e=1", members{"e": "1"}},

		{"runes", "ä=1,a=%C3%A4", members{"a": "ä"}},
		{"not UTF-8", "\xffa=1,a=\xff1\xfe,b=%ff%fe", members{"b": "\uFFFD\uFFFD"}},

		{"commas", ",,a=1,,", members{"a": "1"}},
		{"no key", "=1,a=2, =3,=,b=4", members{"a": "2", "b": "4"}},
		{"no equals sign", "a,b=1,c", members{"b": "1"}},
		{"nothing but signs", "=,;=;,;;,==,%=%", nil},
		{"control characters", "a\x00=1,b=\x001", nil},

		{"more members than OpenTelemetry reads", strings.Repeat("a=1,", 300) + "b=2", members{"a": "1", "b": "2"}},
		{"longer than OpenTelemetry reads", "a=" + strings.Repeat("v", 1<<20) + ",b=2", members{"a": strings.Repeat("v", 1<<20), "b": "2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := w3cbaggage.Read(tt.header)
			if !maps.Equal(got, tt.want) {
				t.Errorf("Read(%.100q) = %.100q want %.100q", tt.header, got, tt.want)
			}
			if others := parsed(tt.header); !w3cbaggage.Exceeds(tt.header) && !maps.Equal(got, others) {
				t.Errorf("Read(%.100q) = %.100q want what OpenTelemetry reads, %.100q", tt.header, got, others)
			}
		})
	}
}

// Which bytes keys, values and properties may have does not differ from OpenTelemetry.
func TestReadBytes(t *testing.T) {
	for b := range 256 {
		for _, format := range []string{"k%sk=v", "%s=v", "k=v%sv", "k=%s", "k=v;p%sp", "k=v;p=%s", "k=v;%s", "k%s", "%sk=v%s"} {
			header := strings.ReplaceAll(format, "%s", string([]byte{byte(b)}))
			if got, want := w3cbaggage.Read(header), parsed(header); !maps.Equal(got, want) {
				t.Errorf("Read(%q) = %q want %q", header, got, want)
			}
			if got, want := w3cbaggage.IsToken(header), maps.Equal(parsed(header+"=v"), map[string]string{header: "v"}); got != want {
				t.Errorf("IsToken(%q) = %v want %v", header, got, want)
			}
		}
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

// Decode takes what is no escape as it is, because it may get the beginning of a value.
func TestDecode(t *testing.T) {
	for value, want := range map[string]string{
		"": "", "a+b": "a+b", "%41%62%2b": "Ab+", "%": "%", "a%4": "a%4", "a%41%4g": "aA%4g", "%ff%fe%c3%a4%c3": "\uFFFD\uFFFDä\uFFFD",
	} {
		if got := string(w3cbaggage.Decode(value)); got != want {
			t.Errorf("Decode(%q) = %q want %q", value, got, want)
		}
	}
}

// A header exceeds what OpenTelemetry reads if OpenTelemetry does not read its last member.
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
		{"escapes that grow", "a=" + strings.Repeat("%ff", 910) + ",last=1", true},
		{"fewer escapes", "a=" + strings.Repeat("%ff", 900) + ",last=1", false},
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

// FuzzRead compares what is read with what OpenTelemetry reads, as far as it does.
func FuzzRead(f *testing.F) {
	f.Add("a=1,b=2")
	f.Add(" a = %31 ;p=q,=,;=,b")
	f.Add("a=%zz,50%=1,\xff=%ff,a=2")
	f.Add("a=1;p = %41 ;;q, \u00a0b=\u20032\x85,c=\"")
	f.Fuzz(func(t *testing.T, header string) {
		if w3cbaggage.Exceeds(header) {
			return
		}
		if got, want := w3cbaggage.Read(header), parsed(header); !maps.Equal(got, want) {
			t.Errorf("Read(%q) = %q want %q", header, got, want)
		}
	})
}
