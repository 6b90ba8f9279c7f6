package engine_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/internal/testing/sides"
	"github.com/headgate-go/headgate/policy"
)

// One flow gets in during each period, up to its end; then the quota is whole again. Bubbles begin in the year 2000.
func TestCalendarQuotaOverAgents(t *testing.T) {
	for _, tt := range []struct {
		name   string
		quota  policy.CalendarQuota
		begin  string // UTC
		retry  time.Duration
		period time.Duration // the next one
	}{
		{"hour", policy.CalendarQuota{Period: policy.PeriodHour}, "2000-01-02T10:59:30Z", 30 * time.Second, time.Hour},
		{"hour of half an offset", policy.CalendarQuota{Period: policy.PeriodHour, TimeZone: "Asia/Kolkata"}, "2000-01-02T10:20:00Z", 10 * time.Minute, time.Hour},
		{"hour that comes twice", policy.CalendarQuota{Period: policy.PeriodHour, TimeZone: "Europe/Berlin"}, "2000-10-29T00:40:00Z", 20 * time.Minute, time.Hour},
		{"hour that half a shift shortens", policy.CalendarQuota{Period: policy.PeriodHour, TimeZone: "Australia/Lord_Howe"}, "2000-08-26T15:10:00Z", 20 * time.Minute, 30 * time.Minute},
		{"day of 23 hours", policy.CalendarQuota{Period: policy.PeriodDay, TimeZone: "Europe/Berlin"}, "2000-03-25T22:00:00Z", time.Hour, 23 * time.Hour},
		{"day of 25 hours", policy.CalendarQuota{Period: policy.PeriodDay, TimeZone: "Europe/Berlin"}, "2000-10-28T21:00:00Z", time.Hour, 25 * time.Hour},
		{"day without a midnight, Sao Paulo", policy.CalendarQuota{Period: policy.PeriodDay, TimeZone: "America/Sao_Paulo"}, "2000-10-08T02:00:00Z", time.Hour, 23 * time.Hour},
		{"day without a midnight, Cairo", policy.CalendarQuota{Period: policy.PeriodDay, TimeZone: "Africa/Cairo"}, "2000-04-27T21:00:00Z", time.Hour, 23 * time.Hour},
		{"day without a midnight, Beirut", policy.CalendarQuota{Period: policy.PeriodDay, TimeZone: "Asia/Beirut"}, "2000-03-25T21:00:00Z", time.Hour, 23 * time.Hour},
		{"week", policy.CalendarQuota{Period: policy.PeriodWeek}, "2000-01-09T23:00:00Z", time.Hour, 168 * time.Hour},
		{"week from Sunday", policy.CalendarQuota{Period: policy.PeriodWeek, WeekStart: "sunday"}, "2000-01-08T23:00:00Z", time.Hour, 168 * time.Hour},
		{"month of a leap year", policy.CalendarQuota{Period: policy.PeriodMonth}, "2000-01-31T23:00:00Z", time.Hour, 29 * 24 * time.Hour},
		{"month over a change", policy.CalendarQuota{Period: policy.PeriodMonth, TimeZone: "Europe/Berlin"}, "2000-02-29T22:00:00Z", time.Hour, 31*24*time.Hour - time.Hour},
	} {
		tt.quota.Selectors, tt.quota.Amount, tt.quota.LimitBy = policy.At("point"), 3, "user"
		for _, kind := range sides.EnginesAndStored {
			t.Run(tt.name+"/"+string(kind), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					begin, err := time.Parse(time.RFC3339, tt.begin)
					if err != nil {
						t.Fatal(err)
					}
					<-time.After(time.Until(begin))
					side := sides.Setup{Policies: sides.Policies(tt.quota)}.New(t, kind)
					exhaust(t, side.Client, "ann", 3, tt.retry)
					exhaust(t, side.Client, "bob", 3, tt.retry)
					<-time.After(tt.retry - time.Nanosecond)
					exhaust(t, side.Client, "ann", 0, time.Nanosecond)
					<-time.After(time.Nanosecond)
					exhaust(t, side.Client, "ann", 3, tt.period)
				})
			})
		}
	}
}

// exhaust starts flows until one is rejected, and checks that it is the one after so many, with the time retry to come
// back.
func exhaust(t *testing.T, c *flowctl.Client, who string, want int, retry time.Duration) {
	t.Helper()
	for n := 0; n <= want; n++ {
		flow := c.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": who}})
		if n < want {
			if r := end(flow); flow.Decision() != flowctl.Accepted || r != (flowctl.EndResponse{}) {
				t.Errorf("flow %d of %s: %v, %+v want it accepted, without a slot", n, who, flow, r)
			}
			continue
		}
		r, ok := errors.AsType[*flowctl.RejectedError](flow.Err())
		if !ok || r.Reason != flowctl.ReasonRateLimited || r.RetryAfter() != retry {
			t.Errorf("after %d flows of %s: %v want it rejected for %v", n, who, flow.Err(), retry)
		}
		end(flow)
	}
}

func calendarQuota(change func(*policy.CalendarQuota)) policy.CalendarQuota {
	q := policy.CalendarQuota{Selectors: policy.At("point"), Amount: 2, Period: policy.PeriodHour}
	if change != nil {
		change(&q)
	}
	return q
}

// What one flow of each cost gets of 2 tokens. A bubble begins with an hour.
func TestCalendarQuotaCosts(t *testing.T) {
	for _, tt := range []struct {
		name  string
		quota policy.CalendarQuota
		cost  string
		want  flowctl.Decision
		retry time.Duration
		left  float64
	}{
		{"1 by default", calendarQuota(nil), "", flowctl.Accepted, 0, 1},
		{"by label", calendarQuota(func(q *policy.CalendarQuota) { q.TokensLabel = "cost" }), "1.5", flowctl.Accepted, 0, 0.5},
		{"no number", calendarQuota(func(q *policy.CalendarQuota) { q.TokensLabel = "cost" }), "x", flowctl.Accepted, 0, 1},
		{"more than there ever is", calendarQuota(func(q *policy.CalendarQuota) { q.TokensLabel = "cost" }), "3", flowctl.Rejected, 0, 2},
		{"an amount of nothing", calendarQuota(func(q *policy.CalendarQuota) { q.Amount = 0 }), "", flowctl.Rejected, 0, 0},
		{"pass through", calendarQuota(func(q *policy.CalendarQuota) { q.Amount, q.PassThrough = 0, true }), "", flowctl.Accepted, 0, 0},
		{"without the label", calendarQuota(func(q *policy.CalendarQuota) { q.Amount, q.LimitBy = 0, "user" }), "", flowctl.Accepted, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sides.Setup{Policies: sides.Policies(tt.quota)}.InBubbles(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"cost": tt.cost}})
				defer end(flow)
				if flow.Decision() != tt.want {
					t.Errorf("%v want %v", flow, tt.want)
				}
				if r, ok := errors.AsType[*flowctl.RejectedError](flow.Err()); ok && r.RetryAfter() != tt.retry {
					t.Errorf("retry after %v want %v", r.RetryAfter(), tt.retry)
				}
				if got, err := peekAt(side.Engine, "test", "calendar_quota.0", ""); err != nil || got != (engine.Usage{Capacity: tt.quota.Amount, Remaining: tt.left}) {
					t.Errorf("Peek = %+v, %v want %v left", got, err, tt.left)
				}
			})
		})
	}
}

// A flow that another component rejects gives its tokens back. One whose wait in a queue goes over the boundary does not: its
// tokens are those of the period before.
func TestCalendarQuotaRefunds(t *testing.T) {
	for _, tt := range []struct {
		name  string
		begin time.Duration // from a full hour
		left  float64
		after int // flows of the new hour that come meanwhile
	}{
		{"same period", 0, 2, 0},
		{"next period", time.Hour - 30*time.Second, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				<-time.After(tt.begin)
				slot := policy.ConcurrencyScheduler{
					Selectors: []policy.Selector{{ControlPoint: "point", Labels: policy.LabelMatcher{Equal: map[string]string{"queue": "yes"}}}},
					Max:       1, MaxInflight: time.Hour,
				}
				e, client := opened(t, calendarQuota(func(q *policy.CalendarQuota) { q.Amount = 2 }), slot)
				queued := flowctl.Params{Labels: map[string]string{"queue": "yes"}, CheckTimeout: time.Minute}
				holder := client.Start(t.Context(), "point", queued)
				defer end(holder)
				if err := resetAt(e, "p", "calendar_quota.0", ""); err != nil {
					t.Fatal(err)
				}
				done := make(chan *flowctl.Flow)
				go func() { done <- client.Start(t.Context(), "point", queued) }()
				synctest.Wait()
				<-time.After(40 * time.Second)
				for range tt.after {
					end(client.Start(t.Context(), "point", flowctl.Params{}))
				}
				flow := <-done
				defer end(flow)
				if flow.Decision() != flowctl.Rejected {
					t.Errorf("%v want it rejected", flow)
				}
				if got, err := peekAt(e, "p", "calendar_quota.0", ""); err != nil || got.Remaining != tt.left {
					t.Errorf("Peek = %+v, %v want %v left", got, err, tt.left)
				}
			})
		})
	}
}

// A key is forgotten once its period has ended and it was idle for long enough, and not before.
func TestCalendarQuotaForgetsKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, client := opened(t, calendarQuota(func(q *policy.CalendarQuota) {
			q.Period, q.LimitBy, q.MaxIdle = policy.PeriodDay, "user", time.Minute
		}))
		end(client.Start(t.Context(), "point", flowctl.Params{Labels: map[string]string{"user": "ann"}}))
		keys := func(want int) {
			t.Helper()
			if got := e.Stats().Components[0].Keys; got != want {
				t.Errorf("%v: %d keys want %d", time.Now().UTC(), got, want)
			}
		}
		<-time.After(23 * time.Hour)
		keys(1)
		<-time.After(time.Hour + 3*time.Minute)
		keys(0)
	})
}

func TestCalendarQuotaDryRun(t *testing.T) {
	sides.Setup{Policies: sides.Policies(calendarQuota(func(q *policy.CalendarQuota) { q.DryRun = true }))}.
		InBubbles(t, sides.EnginesAndStored, func(t *testing.T, side *sides.Side) {
			for range 5 {
				flow := side.Client.Start(t.Context(), "point", flowctl.Params{})
				if end(flow); flow.Decision() != flowctl.Accepted {
					t.Errorf("%v want it accepted", flow)
				}
			}
			s := side.Engine.Stats().Components[0]
			if s.Kind != "calendar_quota" || s.Accepted != 5 || s.DryRunDrops != 3 || s.Dropped != 0 {
				t.Errorf("Stats = %+v want 5 accepted, of which 3 would have been dropped", s)
			}
		})
}
