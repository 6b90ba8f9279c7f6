package decimal_test

import (
	"strings"
	"testing"

	"github.com/headgate-go/headgate/internal/decimal"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]float64{
		"0": 0, "-0": 0, "12": 12, "-3": -3, "0.5": 0.5, "1e3": 1000, "1E+3": 1000, "5e-1": 0.5,
		"+2": 2, ".5": 0.5, "5.": 5, "007": 7, strings.Repeat("0", 1000) + "2": 2, "1e-400": 0,
	} {
		if got, ok := decimal.Parse(text); !ok || got != want {
			t.Errorf("Parse(%.20q) = %v, %v want %v", text, got, ok, want)
		}
	}
	for _, text := range []string{
		"", " ", "x", "1_0", "1_000.5", "0x2", "0x2p0", "0X1P-1", "0b1", "0o7", "NaN", "nan", "Inf", "+inf", "-Infinity", "1e400", "-1e400",
		" 2", "2 ", "2\n", "1,5", "1.2.3", "--1", "1-2", "e", "1e", ".", "+", "\uff13", strings.Repeat("0", 1024) + "2",
	} {
		if got, ok := decimal.Parse(text); ok {
			t.Errorf("Parse(%.20q) = %v want no number", text, got)
		}
	}
}
