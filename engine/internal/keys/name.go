package keys

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"sync/atomic"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/credential"
)

// MaxName is the longest name of a value, in bytes. Values up to this length are their own names.
const MaxName = 256

// MaxValue is the longest value that a component goes by, in bytes: to hash a longer one would take long. Callers reject
// longer values before they ask for a name.
const MaxValue = 64 << 10

// A Namer gives values of one label the names that their states are kept by. Answers hold the name in place of the value,
// over the wire too, where the name finds the state again when the flow ends.
//
// Most values are their own names; long ones are shortened. Where the label carries credentials, the name
// is a code of the value by a secret, so that neither an answer nor a program's memory shows the credentials.
//
// The zero value is a Namer for labels without credentials.
type Namer struct{ secret *Secret }

// A Secret is what names of credentials are made with. It is safe for concurrent use.
type Secret struct{ bytes atomic.Pointer[[]byte] }

// Set replaces the secret: names that were made with the old one are not made any more.
func (s *Secret) Set(secret []byte) {
	secret = bytes.Clone(secret)
	s.bytes.Store(&secret)
}

// Bytes returns the secret, which must not be changed; nil if none has been set.
func (s *Secret) Bytes() []byte {
	if b := s.bytes.Load(); b != nil {
		return *b
	}
	return nil
}

// NewNamer makes a Namer of the label's values, with the secret that there is whenever it makes a name.
func NewNamer(label string, secret *Secret) Namer {
	if credential.Named(label) {
		return Namer{secret}
	}
	return Namer{}
}

// Name returns the name of the value, which has at most [MaxValue] bytes.
func (n Namer) Name(value string) string {
	if n.secret == nil {
		return short(value)
	}
	code := hmac.New(sha256.New, n.secret.Bytes())
	_, _ = code.Write([]byte(value))
	return "hidden:" + hex.EncodeToString(code.Sum(nil)[:16])
}

// Hides reports whether names are codes by the secret.
func (n Namer) Hides() bool { return n.secret != nil }

// IsValue reports whether a name that Name has returned is the value itself.
func (n Namer) IsValue(name string) bool { return n.secret == nil && !looksShort(name) }

// AnyName returns the name of a value of any length. Values beyond [MaxValue] have one name if they begin alike.
func AnyName(value string) string {
	if len(value) > MaxValue {
		value = strings.ToValidUTF8(value[:MaxName], "")
	}
	return short(value)
}

// short returns the value if it has at most MaxName bytes, and otherwise a name of that length for it: its beginning and
// 128 bits of its SHA-256. A value that looks like such a name gets one too, because it is shown, and must not be that of
// a longer value.
func short(value string) string {
	if len(value) <= MaxName && !looksShort(value) {
		return value
	}
	sum := sha256.Sum256([]byte(value))
	code := "#" + hex.EncodeToString(sum[:16])
	n := MaxName - len(code)
	for n > 0 && !utf8.RuneStart(value[n]) {
		n--
	}
	return value[:n] + code
}

// looksShort reports whether short can have made the value.
func looksShort(value string) bool {
	const code = 2 * 16 // hexadecimal digits
	from := len(value) - code - 1
	if len(value) <= MaxName-utf8.UTFMax || value[from] != '#' {
		return false
	}
	_, err := hex.DecodeString(value[from+1:])
	return err == nil
}
