package engine

import (
	"fmt"
	"strings"
	"time"

	"github.com/headgate-go/headgate/engine/internal/calendar"
	"github.com/headgate-go/headgate/engine/internal/source"
	"github.com/headgate-go/headgate/internal/agentapi"
	"github.com/headgate-go/headgate/policy"
)

func newCalendarQuota(e *Engine, in *installed, p policy.CalendarQuota, c agentapi.Component) (component, error) {
	zone, err := time.LoadLocation(p.TimeZone)
	if err != nil {
		return nil, fmt.Errorf("time zone %q: %w", p.TimeZone, err) // it was there when the policy was checked
	}
	in.selectors = p.Selectors
	c.LabelKey, c.DeniedStatus, c.Capacity, c.DryRun = p.LimitBy, p.DeniedStatus, p.Amount, p.DryRun
	own := func(p policy.CalendarQuota) *numbers[source.Source[calendar.State]] {
		return numbersOf(p.Amount, &calendar.Rule{
			Amount:  p.Amount,
			Periods: calendar.Periods{Unit: calendarUnit(p.Period), Zone: zone, First: weekStart(p.WeekStart)},
			Epoch:   e.epoch.Round(0), // without the monotonic reading: calendars go by the wall clock
			MaxDebt: p.MaxDebt,
		})
	}
	mode := calendarMode{p.LimitBy, p.Period, p.TimeZone, weekStart(p.WeekStart)}
	if e.shares(p.Local) {
		of := sharedNumbers(own, quotaBudget)
		return newSharedLimiter(e, in, sharedLimits[calendar.State]{
			component: c, maxIdle: p.MaxIdle, mode: mode, own: of(p), with: withNumbers(in, of), overrides: p.Overrides,
		}, sharing{outage: p.OnOutage, tokensLabel: p.TokensLabel, passThrough: p.PassThrough})
	}
	l, err := newLimiter(e, limits[calendar.State]{
		component: c, maxIdle: p.MaxIdle, mode: mode,
		own: own(p), with: withNumbers(in, own), overrides: p.Overrides,
	})
	if err != nil {
		return nil, err
	}
	l.costsBy(p.TokensLabel)
	l.passThrough = p.PassThrough
	return l, nil
}

// calendarMode is what must not change if quotas are to be kept: the label, and the periods.
type calendarMode struct {
	label  string
	period policy.Period
	zone   string
	week   time.Weekday
}

func calendarUnit(p policy.Period) calendar.Unit {
	switch p {
	case policy.PeriodHour:
		return calendar.Hour
	case policy.PeriodDay:
		return calendar.Day
	case policy.PeriodWeek:
		return calendar.Week
	default: // no other is valid
		return calendar.Month
	}
}

// weekStart returns the day of the name, and Monday for none.
func weekStart(name string) time.Weekday {
	for day := time.Sunday; day <= time.Saturday; day++ {
		if strings.EqualFold(day.String(), name) {
			return day
		}
	}
	return time.Monday
}

func warnCalendarQuota(w *warnings, of string, p policy.CalendarQuota) {
	if p.PassThrough {
		return
	}
	w.cost(of, p.Amount, 1, p.TokensLabel)
	overridden(of, p.Overrides, func(of string, o policy.Override) {
		w.cost(of, replaced(p.Amount, o.Amount), 1, p.TokensLabel)
	})
}
