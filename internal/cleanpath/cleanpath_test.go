package cleanpath_test

import (
	"path"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/headgate-go/headgate/internal/cleanpath"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestIs(t *testing.T) {
	for _, clean := range []string{"/", "/a", "/a/", "/a/b.c", "/.well-known/x", "/a..b/...c", "/a b/c", "/über", "/a:b@c,d&e=f+g$h!i'(j)*k~l"} {
		if !cleanpath.Is(clean) {
			t.Errorf("Is(%q) = false want true", clean)
		}
	}
	for _, dirty := range []string{
		"", "a", "*", "//", "//a", "/a//", "/a//b", "/.", "/..", "/./a", "/../a", "/a/.", "/a/..", "/a/../b", "/a.", "/a./b", "/a ", "/a /b",
		"/a\u00a0", "/a\u3000/b", `/a\b`, "/a;b", "/a?b", "/a#b", "/a%2e", "/a\x00", "/a\tb", "/a\nb", "/a\x7f", "/a\u0085b", "/a\xff", "/\xc0\xae",
		"/\uff0e\uff0e/a", "/a\uff0fb", "/a\uff3cb", "/a\u2025b", "/a\uff1bb", "/a\u037eb", "/a\u2215b",
		"/\ufe30/a", "/\u2488", "/a\u249b/b", "/\u33c2/a", "/a\u33c7", "/a\u33d8", "/\U0001f100/a", "/a\u2008", "/a\u205f/b", "/a\u1680",
	} {
		if cleanpath.Is(dirty) {
			t.Errorf("Is(%q) = true want false", dirty)
		}
	}
}

// A clean path is what path.Clean makes of it, except for a slash at the end, and has no segment that resolves to another.
func FuzzIs(f *testing.F) {
	for _, seed := range []string{"/", "/a/b/", "/a/../b", "//", "/a;b", "/\xff"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if !cleanpath.Is(p) {
			return
		}
		if cleaned := path.Clean(p); p != cleaned && p != cleaned+"/" {
			t.Errorf("%q is clean, and path.Clean gives %q", p, cleaned)
		}
		if strings.ContainsAny(p, "\\;?#%\x00\n") {
			t.Errorf("%q is clean", p)
		}
	})
}
