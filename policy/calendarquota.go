package policy

import (
	"slices"
	"time"

	"github.com/headgate-go/headgate/internal/components"
)

// CalendarQuota is a number of tokens in each hour, day, week or month of a time zone, for each value of a label. A
// period begins with all tokens, less a debt; what is left of the one before is not carried over. A flow takes tokens
// and is rejected while too few are left: with DeniedStatus, and with the time until the next period, unless it wants more
// than Amount.
//
// The engine reads the machine's clock when it is made, and counts on from there. Setting the clock afterwards moves no
// period.
type CalendarQuota struct {
	// ID names the component within its policy. Default: "calendar_quota.<index>", its place
	// among the policy's CalendarQuotas.
	ID string

	// Selectors say which flows the component acts on: those that at least one of them selects. Required.
	Selectors []Selector

	// Amount is how many tokens there are in each period. Zero refuses every flow. Not negative.
	Amount float64

	// Period is how long a period is. Required.
	Period Period

	// TimeZone is the IANA name of the time zone that periods begin in, such as "Europe/Berlin". Empty means UTC. The
	// machine must know it; a program that imports time/tzdata brings all names along.
	TimeZone string

	// WeekStart is the day that weeks begin on, from "monday" to "sunday". Empty means "monday". It must be empty unless
	// Period is PeriodWeek.
	WeekStart string

	// LimitBy is the label whose values have a quota each. Empty: one quota for all flows. A flow without the label
	// passes unlimited.
	LimitBy string

	// Overrides are other numbers for single values of the label; see [Override]. They need a LimitBy. A check costs the same with
	// any number of them.
	Overrides map[string]Override

	// MaxIdle is how long an unused quota is remembered once its period has ended, or all tokens have come back. Zero means
	// DefaultMaxIdle, KeepIdle (or any negative value) as long as there is room.
	MaxIdle time.Duration

	// TokensLabel is the label that says how many tokens a flow takes: a decimal number, not negative. A flow
	// without it, or with anything else in it, takes 1.
	TokensLabel string

	// MaxDebt is how far below zero flows may take a quota that cost more than they took, as flowctl's Flow.Settle says. What is
	// beyond is forgiven, and counted in the engine's Stats. The next periods pay the debt, before flows get their tokens.
	// Tokens that come back are of the period in which they were taken. Zero means Amount, and a negative value forgives
	// nothing. math.SmallestNonzeroFloat64 is as good as no debt. It needs a TokensLabel.
	MaxDebt float64

	// DeniedStatus is the HTTP status of a rejection, 400 to 599. Zero means 429.
	DeniedStatus int

	// Local keeps the quotas in the engine. Otherwise engines that share a store share the quotas.
	Local bool

	// OnOutage is what the component does while the store does not answer. Empty means "share". A component that is Local cannot
	// have it.
	OnOutage Outage

	// PassThrough accepts every flow and takes no tokens.
	PassThrough bool

	// DryRun decides and counts, but drops no flow. A flow that it would admit takes tokens; one that it would drop
	// takes none. flowctl.WithDryRun does the same for all components that a client's flows meet.
	DryRun bool
}

// Period is how long the periods of a [CalendarQuota] are. The zero value is none of them.
type Period string

// The periods, which begin and end by the clock of the time zone.
const (
	// PeriodHour is from one full hour that the clock shows to the next. An hour that comes twice is two periods. A clock
	// that is put forward over a full hour begins a period then.
	PeriodHour Period = "hour"
	// PeriodDay begins at midnight: at the first of two, or, if there is none, when the clock is put forward over it.
	PeriodDay Period = "day"
	// PeriodWeek begins with the day WeekStart.
	PeriodWeek Period = "week"
	// PeriodMonth begins with the first day of a month.
	PeriodMonth Period = "month"
)

func (CalendarQuota) kind() index  { return calendarQuota }
func (q CalendarQuota) id() string { return q.ID }

func (q CalendarQuota) reads(read func(components.Role, string)) {
	read(components.LimitsBy, q.LimitBy)
	read(components.CostsBy, q.TokensLabel)
	selectorsRead(q.Selectors, components.SelectsBy, read)
}

func (q CalendarQuota) check(wrong report) {
	checkSelectors(wrong.sub(".Selectors"), q.Selectors)
	q.numbers(wrong)
	checkPeriod(wrong, q.Period)
	checkZone(wrong.sub(".TimeZone"), q.TimeZone)
	checkWeekStart(wrong.sub(".WeekStart"), q.WeekStart, q.Period)
	checkName(wrong.sub(".LimitBy"), q.LimitBy)
	checkName(wrong.sub(".TokensLabel"), q.TokensLabel)
	checkStatus(wrong.sub(".DeniedStatus"), q.DeniedStatus)
	checkOutage(wrong.sub(".OnOutage"), q.OnOutage, q.Local)
	checkOverrides(wrong, q)
}

func (q CalendarQuota) limits() (string, map[string]Override) { return q.LimitBy, q.Overrides }

func (q CalendarQuota) numbers(wrong report) {
	checkAmount(wrong.sub(".Amount"), q.Amount)
	checkDebt(wrong.sub(".MaxDebt"), q.MaxDebt, "TokensLabel", q.TokensLabel)
}

func checkPeriod(wrong report, p Period) {
	known := []string{string(PeriodHour), string(PeriodDay), string(PeriodWeek), string(PeriodMonth)}
	switch {
	case p == "":
		wrong(".Period", "is required")
	case !slices.Contains(known, string(p)):
		wrong(".Period", "unknown period %s%s; want hour, day, week or month", quote(string(p)), suggest(string(p), known))
	}
}

func checkZone(wrong report, name string) {
	if _, err := time.LoadLocation(name); err != nil || name == "Local" { // which is another zone on each machine
		wrong("", "unknown time zone %s: want an IANA name that the machine knows, such as Europe/Berlin", quote(name))
	}
}

func checkWeekStart(wrong report, day string, p Period) {
	known := []string{"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}
	switch {
	case day == "":
	case p != PeriodWeek:
		wrong("", "is for weeks; the period is %s", quote(string(p)))
	case !slices.Contains(known, day):
		wrong("", "unknown day %s%s; want one from monday to sunday", quote(day), suggest(day, known))
	}
}

func (d *decoder) calendarQuota(c component) Component {
	f := d.fields(c.get("parameters"), "amount period time_zone week_start limit_by_label_key max_idle_time max_debt overrides", "")
	request := d.fields(c.get("request_parameters"), "tokens_label_key denied_response_status_code", "")
	local, _, outage := d.sharing(c.value, CalendarQuota{})
	return CalendarQuota{
		ID:           c.id,
		Selectors:    d.selectors(d.fill(c.value, "Selectors", "selectors")),
		Amount:       d.number(d.need(d.fill(f, "Amount", "amount"))),
		Period:       Period(d.text(d.fill(f, "Period", "period"))),
		TimeZone:     d.text(d.fill(f, "TimeZone", "time_zone")),
		WeekStart:    d.text(d.fill(f, "WeekStart", "week_start")),
		LimitBy:      d.text(d.fill(f, "LimitBy", "limit_by_label_key")),
		MaxIdle:      d.optional(f.get("max_idle_time"), KeepIdle),
		MaxDebt:      d.explicit(d.fill(f, "MaxDebt", "max_debt")),
		Overrides:    d.overrides(f, CalendarQuota{}),
		TokensLabel:  d.text(d.fill(request, "TokensLabel", "tokens_label_key")),
		DeniedStatus: d.status(d.fill(request, "DeniedStatus", "denied_response_status_code")),
		Local:        local,
		OnOutage:     outage,
		PassThrough:  d.passThrough(c),
		DryRun:       d.dryRun(c),
	}
}
