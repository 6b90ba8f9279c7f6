package keys_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/headgate-go/headgate/engine/internal/keys"
)

func TestAnyName(t *testing.T) {
	long := strings.Repeat("é", keys.MaxValue)
	ascii := strings.Repeat("a", 1000)
	for _, tt := range []struct {
		name, a, b string
		same       bool
	}{
		{"a name that is shown", ascii, keys.AnyName(ascii), false},
		{"a name that is shown, of runes", long[:1000], keys.AnyName(long[:1000]), false},
		{"short", "a", "b", false},
		{"longer than a name", long[:1000] + "a", long[:1000] + "b", false},
		{"too long, alike at the beginning", long + "a", long + "b", true},
		{"too long, apart at the beginning", "a" + long, "b" + long, false},
	} {
		a, b := keys.AnyName(tt.a), keys.AnyName(tt.b)
		if (a == b) != tt.same || len(a) > keys.MaxName || !utf8.ValidString(a) {
			t.Errorf("%s: %q and %q", tt.name, a, b)
		}
	}
}

func TestName(t *testing.T) {
	secret := new(keys.Secret)
	secret.Set([]byte("secret"))
	for _, tt := range []struct {
		name, label, value string
		own                bool // the value is its own name
	}{
		{"a short value", "user", "alice", true},
		{"the longest that names itself", "user", strings.Repeat("x", keys.MaxName), true},
		{"a long value", "user", strings.Repeat("x", keys.MaxName+1), false},
		{"credentials", "http.request.header.authorization", "Bearer x", false},
		{"credentials that are no header", "X-API-Key", "Bearer x", false},
	} {
		n := keys.NewNamer(tt.label, secret)
		got := n.Name(tt.value)
		if (got == tt.value) != tt.own || len(got) > keys.MaxName {
			t.Errorf("%s: the name is %q", tt.name, got)
		}
		if n.Name(tt.value) != got || n.Name(tt.value+"y") == got {
			t.Errorf("%s: want one name for one value", tt.name)
		}
		if strings.Contains(got, "Bearer") {
			t.Errorf("%s: the name %q shows the value", tt.name, got)
		}
	}
}
