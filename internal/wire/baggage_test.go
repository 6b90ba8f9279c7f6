package wire_test

import (
	"maps"
	"testing"
	"unicode/utf8"

	"go.opentelemetry.io/otel/baggage"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/internal/wire"
)

func TestBaggage(t *testing.T) {
	for _, tt := range []struct {
		name   string
		labels map[string]string
		want   string
	}{
		{"none", nil, ""},
		{"sorted", map[string]string{"b": "2", "a": "1"}, "a=1,b=2"},
		{"A23 what is decoded twice elsewhere", map[string]string{"a": "x+y", "b": "50%"}, "a=x+y,b=50%25"},
		{"values", map[string]string{"a": `1, 2;"\ä`, "b": ""}, "a=1%2C%202%3B%22%5C%C3%A4,b="},
		{
			"keys",
			map[string]string{"http.request.header.x_a": "1", "user id": "2", "a=b:c@d": "3", "ключ": "4", "50%25": "5"},
			"50%25=5,a%3Db%3Ac%40d=3,http.request.header.x_a=1,user%20id=2,%D0%BA%D0%BB%D1%8E%D1%87=4",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := wire.Baggage(tt.labels)
			if got != tt.want {
				t.Errorf("Baggage(%v) = %q want %q", tt.labels, got, tt.want)
			}
			want := make(map[string]string)
			for key, value := range tt.labels {
				want[wire.BaggageKey(key)] = value
			}
			if back := w3cbaggage.Read(got); !maps.Equal(back, want) {
				t.Errorf("Read(%q) = %v want %v", got, back, want)
			}
			if _, err := baggage.Parse(got); err != nil {
				t.Errorf("others cannot read it: %v", err)
			}
		})
	}
}

// Whatever a label is, it arrives, by its own key if that can be one of a header.
func FuzzBaggage(f *testing.F) {
	f.Add("user_id", "u:1", "50%", "a+b")
	f.Add("=", ",", ";", "\"")
	f.Add("ключ", " ", "\x00", "%2B")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		want := map[string]string{k1: v1, k2: v2}
		for k, v := range want {
			if k == "" || !utf8.ValidString(k) || !utf8.ValidString(v) {
				return
			}
		}
		header := wire.Baggage(want)
		if len(header) > wire.MaxBaggage {
			return
		}
		if wire.BaggageKey(k1) == wire.BaggageKey(k2) {
			return
		}
		written := map[string]string{wire.BaggageKey(k1): v1, wire.BaggageKey(k2): v2}
		if got := w3cbaggage.Read(header); !maps.Equal(got, written) {
			t.Errorf("%q comes to %v want %v", header, got, written)
		}
		if bag, err := baggage.Parse(header); err != nil || bag.Len() != len(written) {
			t.Errorf("others read %q as %v, %v", header, bag, err)
		}
	})
}
