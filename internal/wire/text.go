package wire

import "strings"

// MaxText is how many bytes are kept of a text that a peer chose.
const MaxText = 1 << 10

const clipped = "…"

// Clip returns at most MaxText bytes of a peer's text, for errors and logs. A text that is cut ends with an ellipsis, and
// never inside of a rune.
func Clip(s string) string {
	if len(s) <= MaxText {
		return s
	}
	return strings.ToValidUTF8(s[:MaxText-len(clipped)], "") + clipped
}
