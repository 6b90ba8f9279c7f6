package policy_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// Errors of a calendar quota, in Go and in a file.
func TestCalendarQuotaMistakes(t *testing.T) {
	const file = `circuit:
  components:
    - flow_control:
        calendar_quota:
          selectors: [{control_point: prompt}]
          parameters:
            {amount: AMOUNT, period: PERIOD, time_zone: ZONE, week_start: START}
`
	quota := func(change func(*policy.CalendarQuota)) policy.CalendarQuota {
		q := policy.CalendarQuota{Selectors: policy.At("prompt"), Amount: 9, Period: policy.PeriodDay}
		change(&q)
		return q
	}
	for _, tt := range []struct {
		name  string
		quota policy.CalendarQuota
		edits []string // of the file: the keys and their values
		field string   // of the Go value
		key   string
		want  string
	}{
		{"negative amount", quota(func(q *policy.CalendarQuota) { q.Amount = -1 }), []string{"AMOUNT", "-1"}, "Amount", "amount", "must be a number from 0 up, is -1"},
		{"no period", quota(func(q *policy.CalendarQuota) { q.Period = "" }), []string{"PERIOD", "~"}, "Period", "period", "is required"},
		{"unknown period", quota(func(q *policy.CalendarQuota) { q.Period = "mont" }), []string{"PERIOD", "mont"}, "Period", "period", `unknown period "mont"; did you mean "month"?; want hour, day, week or month`},
		{"unknown zone", quota(func(q *policy.CalendarQuota) { q.TimeZone = "Europe/Atlantis" }), []string{"ZONE", "Europe/Atlantis"}, "TimeZone", "time_zone", `unknown time zone "Europe/Atlantis": want an IANA name that the machine knows, such as Europe/Berlin`},
		{"local zone", quota(func(q *policy.CalendarQuota) { q.TimeZone = "Local" }), []string{"ZONE", "Local"}, "TimeZone", "time_zone", `unknown time zone "Local": want an IANA name that the machine knows, such as Europe/Berlin`},
		{"zone of another directory", quota(func(q *policy.CalendarQuota) { q.TimeZone = "../etc/passwd" }), []string{"ZONE", "../etc/passwd"}, "TimeZone", "time_zone", `unknown time zone "../etc/passwd": want an IANA name that the machine knows, such as Europe/Berlin`},
		{"start of no week", quota(func(q *policy.CalendarQuota) { q.WeekStart = "sunday" }), []string{"START", "sunday"}, "WeekStart", "week_start", `is for weeks; the period is "day"`},
		{"unknown start", quota(func(q *policy.CalendarQuota) { q.Period, q.WeekStart = policy.PeriodWeek, "sun" }), []string{"PERIOD", "week", "START", "sun"}, "WeekStart", "week_start", `unknown day "sun"; want one from monday to sunday`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := policy.Policy{Name: "p", Components: []policy.Component{tt.quota}}.Validate()
			if err == nil {
				t.Fatal("Validate = nil")
			}
			if diff := cmp.Diff(`policy "p": components[0].`+tt.field+": "+tt.want, err.Error()); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
			text := strings.NewReplacer(append(tt.edits, "AMOUNT", "9", "PERIOD", "day", "ZONE", "~", "START", "~")...).Replace(file)
			_, err = policy.Parse("limits.yaml", []byte(text))
			if err == nil {
				t.Fatal("Parse = nil")
			}
			place, message, _ := strings.Cut(err.Error(), ": ")
			if diff := cmp.Diff("circuit.components[0].flow_control.calendar_quota.parameters."+tt.key+": "+tt.want, message); diff != "" ||
				!strings.HasPrefix(place, "limits.yaml:7:") {
				t.Errorf("Parse at %s (-want +got):\n%s", place, diff)
			}
		})
	}
}

func TestCalendarQuotaWithoutKeys(t *testing.T) {
	_, err := policy.Parse("limits.yaml", []byte("circuit: {components: [{flow_control: {calendar_quota: {}}}]}"))
	const at = "limits.yaml:1:56: circuit.components[0].flow_control.calendar_quota."
	want := at + "parameters.amount: is required\n" + at + "selectors: is required\n" + at + "parameters.period: is required"
	if err == nil || err.Error() != want {
		t.Errorf("Parse = %v want %s", err, want)
	}
}

func TestCalendarQuotaValues(t *testing.T) {
	for _, zone := range []string{"", "UTC", "Europe/Berlin", "Asia/Kolkata"} {
		for _, period := range []policy.Period{policy.PeriodHour, policy.PeriodDay, policy.PeriodWeek, policy.PeriodMonth} {
			q := policy.CalendarQuota{Selectors: policy.At("prompt"), Period: period, TimeZone: zone}
			if err := (policy.Policy{Name: "p", Components: []policy.Component{&q}}).Validate(); err != nil {
				t.Errorf("%s in %q: %v", period, zone, err)
			}
		}
	}
}
