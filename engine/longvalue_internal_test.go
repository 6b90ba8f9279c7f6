package engine

import (
	"fmt"
	"strings"
	"testing"
)

func TestOneOf(t *testing.T) {
	for _, n := range []int{1, fewValues, fewValues + 1, 1000} {
		values := make([]string, n)
		for i := range values {
			values[i] = fmt.Sprint("value", i)
		}
		is := oneOf(values)
		values[0] = "another"
		for value, want := range map[string]bool{
			"value0": true, fmt.Sprint("value", n-1): true, fmt.Sprint("value", n): false, "": false, "another": false, strings.Repeat("value0", 99): false,
		} {
			if is(value) != want {
				t.Errorf("of %d values, %.20q: %v want %v", n, value, is(value), want)
			}
		}
	}
}
