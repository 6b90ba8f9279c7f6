package calendar

import (
	"sync/atomic"
	"time"
)

// A Unit is how long the periods of a calendar are.
type Unit int

// The units.
const (
	Hour Unit = iota
	Day
	Week
	Month
)

// Periods are those of a calendar. They follow each other without a gap, and none begins before the one before it has ended,
// whatever the clock of the time zone does.
type Periods struct {
	Unit  Unit
	Zone  *time.Location
	First time.Weekday // of a week
}

// End returns when the period that t is in ends, which is after t.
func (p *Periods) End(t time.Time) time.Time {
	t = t.In(p.Zone)
	if p.Unit == Hour {
		return hourEnd(t)
	}
	// If a midnight comes twice, t may have the date of a day that is over: the next day began at the first midnight.
	for date := p.next(dateOf(t)); ; date = p.next(date) {
		if end := first(date, p.Zone); end.After(t) {
			return end
		}
	}
}

// next returns the first date of the next period. A date is the midnight at UTC of the same date.
func (p *Periods) next(date time.Time) time.Time {
	switch p.Unit {
	case Week:
		return date.AddDate(0, 0, 7-int(date.Weekday()-p.First+7)%7)
	case Month:
		return time.Date(date.Year(), date.Month()+1, 1, 0, 0, 0, 0, time.UTC)
	default:
		return date.AddDate(0, 0, 1)
	}
}

func dateOf(t time.Time) time.Time {
	year, month, day := t.Date()
	return time.Date(year, month, day, 0, 0, 0, 0, time.UTC)
}

// farthest is more than any clock is from UTC.
const farthest = 48 * time.Hour

// first returns the first moment at which the clock of the zone shows the date or a later one. time.Date does not say which
// moment it returns for a midnight that comes twice or never.
func first(date time.Time, zone *time.Location) time.Time {
	from := date.Add(-farthest).In(zone)
	for {
		_, seconds := from.Zone()
		at := date.Add(-time.Duration(seconds) * time.Second)
		change := nextChange(from)
		switch {
		case at.Before(from):
			return from // the clock was put forward over midnight
		case change.IsZero() || at.Before(change):
			return at
		}
		from = change
	}
}

// hourEnd returns when the clock of t's zone shows the next full hour, or is put forward over it. An hour that comes twice
// is two hours.
func hourEnd(t time.Time) time.Time {
	for {
		_, seconds := t.Zone()
		shown := t.Unix() + int64(seconds)
		next := time.Unix(t.Unix()+int64(time.Hour/time.Second)-intoHour(shown), 0).In(t.Location())
		change := nextChange(t)
		if change.IsZero() || next.Before(change) {
			return next
		}
		_, after := change.Zone()
		shows := change.Unix() + int64(after)
		if intoHour(shows) == 0 || shows >= next.Unix()+int64(seconds) {
			return change
		}
		t = change
	}
}

// nextChange returns a moment after t up to which the clock of t's zone is not changed; the zero time if it never is again.
func nextChange(t time.Time) time.Time {
	_, change := t.ZoneBounds()
	if !change.IsZero() && !change.After(t) {
		// For years that are known only by a rule, package time counts 365 days, and on the last day of a leap year the
		// bound is in the past. Without this, a loop from bound to bound would not end.
		return time.Date(t.UTC().Year()+1, 1, 1, 0, 0, 0, 0, time.UTC).In(t.Location())
	}
	return change
}

// intoHour returns how many seconds of the hour are over when a clock shows so many.
func intoHour(shown int64) int64 { return (shown%3600 + 3600) % 3600 }

// Boundaries returns a function that returns the boundaries around a time: the beginning of the period before, that of its period, and
// those of the next two. The function is safe for concurrent use.
func (p *Periods) Boundaries() func(time.Time) [4]time.Time {
	of := *p
	var latest atomic.Pointer[[4]time.Time]
	return func(at time.Time) [4]time.Time {
		if b := latest.Load(); b != nil && !at.Before(b[1]) && at.Before(b[2]) {
			return *b
		}
		b := of.around(at)
		latest.Store(&b)
		return b
	}
}

// around returns the boundaries around a time, by the ends of the periods since one that was long over.
func (p *Periods) around(at time.Time) (b [4]time.Time) {
	back := [...]time.Duration{Hour: 4 * time.Hour, Day: 4 * 24 * time.Hour, Week: 16 * 24 * time.Hour, Month: 64 * 24 * time.Hour}
	for end := p.End(at.Add(-back[p.Unit])); ; end = p.End(end) {
		if end.After(at) {
			b[2], b[3] = end, p.End(end)
			return b
		}
		b[0], b[1] = b[1], end
	}
}
