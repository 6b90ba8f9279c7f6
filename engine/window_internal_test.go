package engine

import (
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	s := int64(time.Second)
	w := newWindow(3, s, 100*s)
	check := func(when string, now int64, total, whole float64) {
		t.Helper()
		if got := w.total(now).sum; got != total {
			t.Errorf("%s: total = %v want %v", when, got, total)
		}
		if got := w.whole(now).sum; got != whole {
			t.Errorf("%s: whole = %v want %v", when, got, whole)
		}
	}
	check("empty", 100*s, 0, 0)
	w.add(100*s, 1)
	check("the slot under way is none of the whole", 100*s+s/2, 1, 0)
	w.add(101*s, 2)
	w.add(102*s, 4)
	w.add(103*s, 8)
	check("full", 103*s, 15, 7)
	check("the oldest goes", 104*s, 14, 14)
	w.add(90*s, 16)
	check("a clock that steps back counts now", 104*s, 30, 14)
	w.add(104*s, 1e300)
	check("a huge one does not swallow the others", 104*s, 1e300, 14)
	check("a long silence", 1000*s, 0, 0)
	w.add(1000*s, 1)
	if got := w.total(1000 * s); got != (tally{1, 1}) {
		t.Errorf("total = %v want one of 1", got)
	}
}
