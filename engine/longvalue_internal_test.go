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

func TestNumber(t *testing.T) {
	for _, tt := range []struct {
		text string
		want float64
		ok   bool
	}{
		{"1.5", 1.5, true},
		{strings.Repeat("0", maxNumber-1) + "7", 7, true},
		{strings.Repeat("0", maxNumber) + "7", 0, false},
		{"1e999", 0, false},
		{"NaN", 0, false},
		{"-Inf", 0, false},
		{"-2", -2, true},
		{"", 0, false},
	} {
		if got, ok := number(tt.text); ok != tt.ok || ok && got != tt.want {
			t.Errorf("number(%.20q) = %v, %v want %v, %v", tt.text, got, ok, tt.want, tt.ok)
		}
	}
}
