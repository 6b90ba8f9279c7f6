package engine

import (
	"fmt"
	"hash/fnv"
	"math"
	"testing"
)

func TestSampled(t *testing.T) {
	for _, value := range []string{"", "a", "user-0", "user-1", "日本"} {
		h := fnv.New32a()
		_, _ = h.Write([]byte(value))
		at := 100 * float64(h.Sum32()) / math.MaxUint32
		for _, tt := range []struct {
			name       string
			percentage float64
			want       bool
		}{
			{"none", 0, false},
			{"below", at - 1e-6, false},
			{"above", at + 1e-6, true},
			{"all", 100, true},
		} {
			if got := sampled(value, tt.percentage); got != tt.want {
				t.Errorf("%s: sampled(%q, %v) = %v want %v", tt.name, value, tt.percentage, got, tt.want)
			}
		}
	}
}

// A value that is in stays in when the share grows, and the share is as configured.
func TestSampledShare(t *testing.T) {
	const values = 10_000
	before := make([]bool, values)
	for _, percentage := range []float64{0, 1, 10, 33, 66, 99, 100} {
		in := 0
		for i := range values {
			now := sampled(fmt.Sprintf("user-%d", i), percentage)
			if before[i] && !now {
				t.Fatalf("user-%d was in before %v %%, and is no longer", i, percentage)
			}
			if before[i] = now; now {
				in++
			}
		}
		if share := 100 * float64(in) / values; math.Abs(share-percentage) > 1.5 {
			t.Errorf("%v %% of the values are in, want %v %%", share, percentage)
		}
	}
}

func TestDrawn(t *testing.T) {
	for _, percentage := range []float64{0, 100} {
		for range 1000 {
			if got, want := drawn(percentage), percentage == 100; got != want {
				t.Fatalf("drawn(%v) = %v want %v", percentage, got, want)
			}
		}
	}
}

// The hash is Aperture's, and its figures for similar names are those that the documents tell.
func TestSampledSimilarNames(t *testing.T) {
	user := func(i int) string { return fmt.Sprintf("user%d", i) }
	address := func(i int) string { return fmt.Sprintf("10.0.%d.%d", i/256, i%256) }
	for _, tt := range []struct {
		name       string
		value      func(i int) string
		of         int
		percentage float64
		want       int
	}{
		{"a hundred users", user, 100, 33.3, 0},
		{"more users", user, 5000, 33.3, 1408},
		{"addresses", address, 20_000, 10, 1660},
	} {
		in := 0
		for i := range tt.of {
			if sampled(tt.value(i), tt.percentage) {
				in++
			}
		}
		if in != tt.want {
			t.Errorf("%s: %d of %d are in at %v %%, want %d", tt.name, in, tt.of, tt.percentage, tt.want)
		}
	}
}
