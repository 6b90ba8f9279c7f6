package redisstore

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/headgate-go/headgate/internal/shared"
)

func namer(secret string) *Store {
	return &Store{namespace: "headgate", secret: func() []byte { return []byte(secret) }}
}

func TestName(t *testing.T) {
	long := strings.Repeat("x", 65)
	for _, tt := range []struct {
		name string
		key  shared.Key
		want string
	}{
		{"usual", shared.Key{Policy: "checkout", Component: "rate", Label: "user", Value: "u1"}, "{headgate:user=u1}:checkout/rate"},
		{"no label", shared.Key{Policy: "checkout", Component: "rate"}, "{headgate:checkout/rate}:checkout/rate"},
		{"no value", shared.Key{Policy: "p", Component: "c", Label: "user"}, "{headgate:user=}:p/c"},
		{"characters of names", shared.Key{Policy: "a/b", Component: "c}", Label: "l=", Value: "{v}%"}, "{headgate:l%3d=%7bv%7d%25}:a%2fb/c%7d"},
		{
			"long",
			shared.Key{Policy: "p", Component: "c", Label: "l", Value: long},
			"{headgate:l=" + long[:40] + "#9537c5fdf120482f7d58d25e9ed583f5}:p/c",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := namer("s").name(tt.key).all; got != tt.want {
				t.Errorf("name = %s want %s", got, tt.want)
			}
		})
	}
}

// Names of credentials do not show them, and differ by the secret.
func TestNameHidesCredentials(t *testing.T) {
	key := shared.Key{Policy: "p", Component: "c", Label: "http.request.header.x-api-key", Value: "s3cret"}
	a, b, again := namer("a").name(key), namer("b").name(key), namer("a").name(key)
	if a == b || a != again || strings.Contains(a.all, "s3cret") || !strings.HasPrefix(a.all, "{headgate:http.request.header.x-api-key=hidden#") {
		t.Errorf("names %s, %s, %s", a.all, b.all, again.all)
	}
}

// Different keys have different names, whatever values callers send, and the tag of a name is what Redis takes for it.
func TestNamesDiffer(t *testing.T) {
	s := namer("s")
	rapid.Check(t, func(rt *rapid.T) {
		text := rapid.OneOf(
			rapid.StringOfN(rapid.SampledFrom([]rune("ab{}%/=#:2f")), 0, 8, -1), rapid.String(),
			rapid.StringN(60, 90, 90), rapid.SampledFrom([]string{"a#9537c5fdf120482f7d58d25e9ed583f5"}),
		)
		draw := func(what string) shared.Key {
			k := shared.Key{Policy: text.Draw(rt, what+" policy"), Component: text.Draw(rt, what+" component"), Label: text.Draw(rt, what+" label")}
			if k.Label != "" {
				k.Value = text.Draw(rt, what+" value")
			}
			return k
		}
		a := draw("a")
		b := rapid.OneOf(rapid.Just(a), rapid.Custom(func(*rapid.T) shared.Key { return draw("b") })).Draw(rt, "b")
		if rapid.Bool().Draw(rt, "only the value") {
			b = a
			if a.Label != "" {
				b.Value = text.Draw(rt, "value")
			}
		}
		x, y := s.name(a), s.name(b)
		if (a == b) != (x.all == y.all) {
			rt.Fatalf("keys %+v and %+v have the names %q and %q", a, b, x.all, y.all)
		}
		open := strings.IndexByte(x.all, '{')
		if end := strings.IndexByte(x.all, '}'); open != 0 || x.all[:end+1] != x.tag || len(x.tag) < 3 {
			rt.Fatalf("the tag of %q is not %q", x.all, x.tag)
		}
	})
}

// The names of cached values do not run together: neither the control point nor the key says where it ends.
func TestCacheNamesDiffer(t *testing.T) {
	s := namer("")
	seen := make(map[string]shared.CacheKey)
	for _, k := range []shared.CacheKey{
		{ControlPoint: "report\x00ann", Key: "june"},
		{ControlPoint: "report", Key: "ann\x00june"},
		{ControlPoint: "report", Key: "\x00annjune"},
		{ControlPoint: "", Key: "1:ab"},
		{ControlPoint: "1", Key: ":ab"},
		{ControlPoint: "1:a", Key: "b"},
		{ControlPoint: "a", Key: "b"},
		{ControlPoint: "", Key: "ab"},
		{ControlPoint: "ab", Key: ""},
	} {
		name := s.cacheName(k)
		if other, ok := seen[name]; ok {
			t.Errorf("%+v and %+v have the name %q", other, k, name)
		}
		seen[name] = k
	}
}

func TestSlotOf(t *testing.T) {
	for tag, want := range map[string]uint16{"{123456789}": 12739, "{user1000}": 3443, "{foo}": 12182} {
		if got := slotOf(tag); got != want {
			t.Errorf("slotOf(%q) = %d want %d", tag, got, want)
		}
	}
}
