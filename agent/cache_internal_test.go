package agent

import (
	"fmt"
	"slices"
	"testing"

	checkv1 "github.com/headgate-go/headgate/api/aperture/flowcontrol/check/v1"
)

// A key that a call has several times is looked up once, and a key that is refused is not looked up.
func TestLookupsHaveDistinctKeys(t *testing.T) {
	long := string(make([]byte, 1000))
	var repeated, one []string
	for i := range 1000 {
		repeated = append(repeated, string(rune('a'+i%26)))
	}
	one = slices.Clone(repeated[:26])
	var beyond []string
	for i := range maxCacheKeys + 1 {
		beyond = append(beyond, fmt.Sprint(i))
	}
	tests := []struct {
		name       string
		keys, want []string
		refused    []string
	}{
		{"none", nil, nil, nil},
		{"distinct", []string{"b", "a"}, []string{"b", "a"}, nil},
		{"few, repeated", []string{"a", "b", "a", "c", "b"}, []string{"a", "b", "c"}, nil},
		{"many, repeated", repeated, one, nil},
		{"refused between", []string{"a", long, "b", "", long, "a"}, []string{"a", "b"}, []string{long, ""}},
		{"refused first", []string{"", "a", "a"}, []string{"a"}, []string{""}},
		{"too many", beyond, beyond[:maxCacheKeys], beyond[maxCacheKeys:]},
		{"repeated beyond the most", append(slices.Clone(beyond[:maxCacheKeys]), "0"), beyond[:maxCacheKeys], nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sent := slices.Clone(tt.keys)
			asked, refused := lookupOf(t.Context(), "point", &checkv1.CacheLookupRequest{GlobalCacheKeys: tt.keys})
			if !slices.Equal(asked.Global, tt.want) {
				t.Errorf("looked up are %q want %q", asked.Global, tt.want)
			}
			if !slices.Equal(tt.keys, sent) {
				t.Error("the request has changed")
			}
			for _, key := range tt.refused {
				if refused.global[key] == nil {
					t.Errorf("%q is not refused", key)
				}
			}
			if len(refused.global) != len(tt.refused) {
				t.Errorf("%d keys are refused want %d", len(refused.global), len(tt.refused))
			}
		})
	}
}
