package calendar

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func zone(tb testing.TB, name string) *time.Location {
	tb.Helper()
	loc, err := time.LoadLocation(name)
	if err != nil {
		tb.Fatal(err)
	}
	return loc
}

// at reads a time in UTC.
func at(tb testing.TB, text string) time.Time {
	tb.Helper()
	t, err := time.Parse("2006-01-02 15:04:05", text)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

// Times are in UTC.
func TestPeriodsEnd(t *testing.T) {
	for _, tt := range []struct {
		name, zone string
		unit       Unit
		first      time.Weekday
		t, want    string
	}{
		{"hour", "UTC", Hour, 0, "2024-05-01 12:34:56", "2024-05-01 13:00:00"},
		{"hour, at its beginning", "UTC", Hour, 0, "2024-05-01 12:00:00", "2024-05-01 13:00:00"},
		{"hour, before 1970", "UTC", Hour, 0, "1960-05-01 12:34:56", "1960-05-01 13:00:00"},
		{"hour of half an offset", "Asia/Kolkata", Hour, 0, "2024-05-01 12:10:00", "2024-05-01 12:30:00"},
		{"hour of a quarter of an offset", "Asia/Kathmandu", Hour, 0, "2024-05-01 12:10:00", "2024-05-01 12:15:00"},
		{"hour before the clock is put forward", "Europe/Berlin", Hour, 0, "2024-03-31 00:30:00", "2024-03-31 01:00:00"},
		{"hour after it", "Europe/Berlin", Hour, 0, "2024-03-31 01:00:00", "2024-03-31 02:00:00"},
		{"hour that comes twice, first", "Europe/Berlin", Hour, 0, "2024-10-27 00:59:59", "2024-10-27 01:00:00"},
		{"hour that comes twice, second", "Europe/Berlin", Hour, 0, "2024-10-27 01:00:00", "2024-10-27 02:00:00"},
		{"hour of half a shift forward, before", "Australia/Lord_Howe", Hour, 0, "2024-10-05 15:00:00", "2024-10-05 15:30:00"},
		{"hour of half a shift forward", "Australia/Lord_Howe", Hour, 0, "2024-10-05 15:30:00", "2024-10-05 16:00:00"},
		{"hour of half a shift back", "Australia/Lord_Howe", Hour, 0, "2024-04-06 14:00:00", "2024-04-06 15:30:00"},
		{"hour of half a shift back, its end", "Australia/Lord_Howe", Hour, 0, "2024-04-06 15:15:00", "2024-04-06 15:30:00"},

		{"day", "UTC", Day, 0, "2024-05-01 12:34:56", "2024-05-02 00:00:00"},
		{"day, at its beginning", "UTC", Day, 0, "2024-05-01 00:00:00", "2024-05-02 00:00:00"},
		{"day, that UTC has another date in", "Asia/Tokyo", Day, 0, "2024-04-30 15:00:00", "2024-05-01 15:00:00"},
		{"day of 23 hours", "America/New_York", Day, 0, "2024-03-10 05:00:00", "2024-03-11 04:00:00"},
		{"day of 25 hours", "America/New_York", Day, 0, "2024-11-03 04:00:00", "2024-11-04 05:00:00"},
		{"day of 24.5 hours", "Australia/Lord_Howe", Day, 0, "2024-04-06 13:00:00", "2024-04-07 13:30:00"},
		{"leap day", "UTC", Day, 0, "2024-02-28 12:00:00", "2024-02-29 00:00:00"},
		{"day before a midnight that does not exist", "America/Sao_Paulo", Day, 0, "2018-11-03 12:00:00", "2018-11-04 03:00:00"},
		{"day after it", "America/Sao_Paulo", Day, 0, "2018-11-04 03:00:00", "2018-11-05 02:00:00"},
		{"day whose last hour comes twice", "America/Sao_Paulo", Day, 0, "2018-02-17 12:00:00", "2018-02-18 03:00:00"},
		{"day before a midnight that does not exist, Cairo", "Africa/Cairo", Day, 0, "2024-04-25 12:00:00", "2024-04-25 22:00:00"},
		{"day before a midnight that does not exist, Beirut", "Asia/Beirut", Day, 0, "2024-03-30 12:00:00", "2024-03-30 22:00:00"},
		{"day before a midnight that comes twice", "America/Havana", Day, 0, "2024-11-02 12:00:00", "2024-11-03 04:00:00"},
		{"day after the first of two midnights", "America/Havana", Day, 0, "2024-11-03 04:30:00", "2024-11-04 05:00:00"},
		{"day after the second of two midnights", "America/Havana", Day, 0, "2024-11-03 05:00:00", "2024-11-04 05:00:00"},
		{"day before the clock is put back over midnight", "America/St_Johns", Day, 0, "2010-11-07 02:29:00", "2010-11-07 02:30:00"},
		{"day that the clock has left again", "America/St_Johns", Day, 0, "2010-11-07 02:45:00", "2010-11-08 03:30:00"},
		{"day before one that does not exist", "Pacific/Apia", Day, 0, "2011-12-30 09:00:00", "2011-12-30 10:00:00"},
		{"day after one that does not exist", "Pacific/Apia", Day, 0, "2011-12-30 10:00:00", "2011-12-31 10:00:00"},

		{"week", "UTC", Week, time.Monday, "2024-05-01 12:00:00", "2024-05-06 00:00:00"},
		{"week, at its beginning", "UTC", Week, time.Monday, "2024-04-29 00:00:00", "2024-05-06 00:00:00"},
		{"week, at its end", "UTC", Week, time.Monday, "2024-05-05 23:59:59", "2024-05-06 00:00:00"},
		{"week from Sunday", "UTC", Week, time.Sunday, "2024-05-04 23:59:59", "2024-05-05 00:00:00"},
		{"week from Saturday", "UTC", Week, time.Saturday, "2024-05-04 00:00:00", "2024-05-11 00:00:00"},
		{"week over a change", "Europe/Berlin", Week, time.Monday, "2024-03-27 12:00:00", "2024-03-31 22:00:00"},
		{"week from a day that does not exist", "Pacific/Apia", Week, time.Friday, "2011-12-29 10:00:00", "2011-12-30 10:00:00"},

		{"month of 31", "UTC", Month, 0, "2024-01-31 12:00:00", "2024-02-01 00:00:00"},
		{"month of 29", "UTC", Month, 0, "2024-02-01 00:00:00", "2024-03-01 00:00:00"},
		{"month of 28", "UTC", Month, 0, "2023-02-28 23:59:59", "2023-03-01 00:00:00"},
		{"month, 1900", "UTC", Month, 0, "1900-02-28 23:59:59", "1900-03-01 00:00:00"},
		{"last of the year", "UTC", Month, 0, "2023-12-31 23:59:59", "2024-01-01 00:00:00"},
		{"month over a change", "Europe/Berlin", Month, 0, "2024-02-29 23:00:00", "2024-03-31 22:00:00"},
		{"hour on the last day of a leap year that only a rule is known for", "Europe/Berlin", Hour, 0, "2072-12-31 12:10:00", "2072-12-31 13:00:00"},
		{"day on it", "Europe/Berlin", Day, 0, "2072-12-31 12:10:00", "2072-12-31 23:00:00"},
		{"month after it", "America/New_York", Month, 0, "2073-01-01 12:10:00", "2073-02-01 05:00:00"},
		{"month far ahead", "Europe/Berlin", Month, 0, "2262-03-01 12:00:00", "2262-03-31 22:00:00"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := Periods{Unit: tt.unit, Zone: zone(t, tt.zone), First: tt.first}
			if got := p.End(at(t, tt.t)); !got.Equal(at(t, tt.want)) {
				t.Errorf("End(%s) = %s want %s", tt.t, got.UTC(), tt.want)
			}
		})
	}
}

var zones = []string{
	"UTC", "Europe/Berlin", "America/New_York", "America/Sao_Paulo", "America/Havana", "America/St_Johns", "Africa/Cairo", "Asia/Beirut",
	"Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe", "Pacific/Apia", "Pacific/Kwajalein", "Africa/Monrovia", "Africa/Casablanca",
}

// drawPeriods and drawTime are of any time zone and year that the tests know, and near changes of its clock.
func drawPeriods(tb testing.TB, t *rapid.T) Periods {
	return Periods{
		Unit:  rapid.SampledFrom([]Unit{Hour, Day, Week, Month}).Draw(t, "unit"),
		Zone:  zone(tb, rapid.SampledFrom(zones).Draw(t, "zone")),
		First: time.Weekday(rapid.IntRange(0, 6).Draw(t, "first")),
	}
}

func drawTime(t *rapid.T, zone *time.Location) time.Time {
	from := time.Date(1965, 1, 1, 0, 0, 0, 0, time.UTC)
	when := from.Add(time.Duration(rapid.Int64Range(0, int64(100*365*24*time.Hour)).Draw(t, "time"))).In(zone)
	if _, change := when.ZoneBounds(); !change.IsZero() && rapid.Bool().Draw(t, "near a change") {
		return change.Add(time.Duration(rapid.Int64Range(-int64(26*time.Hour), int64(26*time.Hour)).Draw(t, "from it")))
	}
	return when
}

// slow finds the end of the period by looking at the clock of the zone every second minute or, when that has shown
// something, every second.
func slow(p *Periods, t time.Time) time.Time {
	begin := t.Truncate(time.Second)
	old := begin.In(p.Zone)
	for old.Before(begin.Add(-time.Nanosecond)) {
		old = old.Add(time.Second)
	}
	latest := latestDate(p, old)
	step := time.Minute
	for {
		now := old.Add(step)
		if now.After(t) && begins(p, old, now, latest) {
			if step == time.Second {
				return now
			}
			step = time.Second
			continue
		}
		old = now
		if step == time.Second && old.Second() == 0 {
			step = time.Minute
		}
	}
}

// latestDate is the latest date that the clock has shown up to t: it may have been put back since.
func latestDate(p *Periods, t time.Time) time.Time {
	latest := dateOf(t)
	for ago := time.Duration(0); ago < 49*time.Hour; ago += time.Minute {
		if date := dateOf(t.Add(-ago)); date.After(latest) {
			latest = date
		}
	}
	return latest
}

// begins reports whether a period begins after old and no later than now, which are close.
func begins(p *Periods, old, now, latest time.Time) bool {
	if p.Unit == Hour {
		_, before := old.Zone()
		_, after := now.Zone()
		a, b := old.Unix()+int64(before), now.Unix()+int64(after)
		if b <= a { // put back
			return intoHour(b) < now.Unix()-old.Unix()
		}
		return (a-intoHour(a))/3600 != (b-intoHour(b))/3600
	}
	date := dateOf(now)
	for day := latest.AddDate(0, 0, 1); !day.After(date); day = day.AddDate(0, 0, 1) { // those that do not exist begin too
		if p.Unit == Day || p.Unit == Week && day.Weekday() == p.First || p.Unit == Month && day.Day() == 1 {
			return true
		}
	}
	return false
}

// The end of a period is when the clock of the zone shows it.
func TestPeriodsModel(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		p := drawPeriods(t, r)
		when := drawTime(r, p.Zone)
		got := p.End(when)
		if !got.After(when) {
			r.Fatalf("End(%s) = %s", when, got)
		}
		if p.Unit == Week || p.Unit == Month { // begin where it is interesting
			if near := got.Add(-30 * time.Hour); near.After(when) {
				if again := p.End(near); !again.Equal(got) {
					r.Fatalf("End(%s) = %s, and End(%s) = %s", when, got, near, again)
				}
				when = near
			}
		}
		if want := slow(&p, when); !got.Equal(want) {
			r.Fatalf("%v of %s: End(%s) = %s want %s", p.Unit, p.Zone, when, got, want)
		}
	})
}

// The boundaries around a time are those that follow each other by End, at any time, also where days and hours are longer or missing.
func TestBoundaries(t *testing.T) {
	for _, tt := range []struct{ zone, begin string }{
		{"UTC", "2000-02-27 00:00:00"},
		{"Europe/Berlin", "2000-03-24 00:00:00"},
		{"Europe/Berlin", "2000-10-27 00:00:00"},
		{"Australia/Lord_Howe", "2000-08-25 00:00:00"},
		{"America/Sao_Paulo", "2000-10-06 00:00:00"},
		{"Pacific/Apia", "2011-12-27 00:00:00"}, // a day is missing
	} {
		begin := at(t, tt.begin)
		for _, unit := range []Unit{Hour, Day, Week, Month} {
			p := Periods{Unit: unit, Zone: zone(t, tt.zone), First: time.Monday}
			around := p.Boundaries()
			for now := begin; now.Before(begin.Add(6 * 24 * time.Hour)); now = now.Add(17*time.Minute + time.Nanosecond) {
				b := around(now)
				if now.Before(b[1]) || !now.Before(b[2]) {
					t.Fatalf("%v in %s: %v is not within %v", unit, tt.zone, now, b)
				}
				for i := range 3 {
					if end := p.End(b[i]); !end.Equal(b[i+1]) {
						t.Fatalf("%v in %s: around %v: %v ends at %v want %v", unit, tt.zone, now, b[i], end, b[i+1])
					}
				}
			}
		}
	}
}
