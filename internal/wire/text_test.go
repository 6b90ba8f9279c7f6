package wire_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/wire"
)

func TestClip(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       int // bytes
	}{
		{"empty", "", 0},
		{"as long as may be", strings.Repeat("x", wire.MaxText), wire.MaxText},
		{"too long", strings.Repeat("x", wire.MaxText+1), wire.MaxText},
		{"a rune at the cut", strings.Repeat("€", wire.MaxText), wire.MaxText - 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := wire.Clip(tt.text)
			if len(got) != tt.want || !utf8.ValidString(got) {
				t.Errorf("%d bytes, %q want %d that are valid", len(got), got, tt.want)
			}
			if (got != tt.text) != strings.HasSuffix(got, "…") {
				t.Errorf("%q want an ellipsis where it was cut", got)
			}
		})
	}
}
