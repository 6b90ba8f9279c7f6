// Package decimal reads the numbers that labels and headers say.
package decimal

import (
	"math"
	"strconv"
)

// maxLen is the longest text of a number, in bytes: no float64 needs as many digits.
const maxLen = 1 << 10

// Parse returns the finite decimal number that the text is: digits, which may have a sign, a point and an exponent. Every number
// of JSON is one, and so are "+1", ".5" and "007". Unlike strconv.ParseFloat it takes no underscores, no hexadecimal digits and
// no names, so that programs in other languages do not read another number.
func Parse(text string) (n float64, ok bool) {
	if len(text) > maxLen {
		return 0, false
	}
	for i := range len(text) {
		switch c := text[i]; {
		case '0' <= c && c <= '9', c == '+', c == '-', c == '.', c == 'e', c == 'E':
		default:
			return 0, false
		}
	}
	n, err := strconv.ParseFloat(text, 64)
	return n, err == nil && !math.IsInf(n, 0)
}
