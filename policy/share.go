package policy

import (
	"reflect"
	"slices"
	"strings"
)

// Share is how a limiter takes tokens from a store that several engines share. The bounds of each value hold as long as the store
// loses no data. A Share means nothing without a store. The zero value is ShareExact.
type Share string

// The ways to take tokens from a store.
const (
	// ShareExact asks the store about each flow. In any span of time, at most Capacity and the tokens that Fill brings in the
	// span are taken.
	ShareExact Share = "exact"

	// ShareLeased lets each engine draw tokens ahead, and decide by itself while it has some. Since the bucket was new, at most
	// Capacity and the tokens that Fill has brought were taken. In a single span of time, half of Capacity more may be let in. If
	// engines ask for many more tokens than there are, they get more equal parts than they ask for. Quota schedulers do not lease
	// tokens: they are exact, and an engine with a store warns of it.
	ShareLeased Share = "leased"
)

// Outage is what a limiter does while the store that it shares with other engines does not answer. It means nothing without a
// store. The zero value is OutageShare.
type Outage string

// What a limiter can do without the store.
const (
	// OutageShare lets each engine decide by itself, by its part of the limit. The part is the limit divided by the number of
	// engines that it last saw.
	OutageShare Outage = "share"

	// OutageOpen admits every flow.
	OutageOpen Outage = "open"

	// OutageClosed rejects every flow, with the status 503 and a time to retry of a second.
	OutageClosed Outage = "closed"
)

// checkShare checks how a component takes tokens from a store.
func checkShare(wrong report, s Share, local, step, delay bool) {
	known := []string{string(ShareExact), string(ShareLeased)}
	if why := unleasable(step, delay); checkShared(wrong, "share", string(s), local, known, "exact or leased") && s == ShareLeased && why != "" {
		wrong("", "%s", why)
	}
}

// checkOutage checks what a component does without its store.
func checkOutage(wrong report, o Outage, local bool) {
	known := []string{string(OutageShare), string(OutageOpen), string(OutageClosed)}
	checkShared(wrong, "outage mode", string(o), local, known, "share, open or closed")
}

// checkShared checks a value that only components with a store can have. It reports whether there is nothing wrong with it.
func checkShared(wrong report, what, s string, local bool, known []string, want string) bool {
	switch {
	case s == "":
		return true
	case !slices.Contains(known, s):
		wrong("", "unknown %s %s%s; want %s", what, quote(s), suggest(s, known), want)
	case local:
		wrong("", "is for components that are shared, and Local keeps this one to its engine")
	default:
		return true
	}
	return false
}

// unleasable returns why the tokens of a bucket cannot be leased; "" if they can. An engine gets a leased token with the time at which
// it will have come, and gives it back if it has no use for it. A step would have all engines wait for one time, and a bucket that
// is full again for a moment would begin its delay anew.
func unleasable(step, delay bool) string {
	if step || delay {
		return "leased tokens are given ahead of a continuous fill, and need one that has neither steps nor a delay"
	}
	return ""
}

// Keys of files.
const (
	// headgateKey is the key of a component in Aperture's format for what that format does not have.
	headgateKey = "headgate"

	// storeKeys are the keys below it: those of the fields Local, Share and OnOutage.
	storeKeys = "local share on_outage"
)

// sharingKeys returns those of storeKeys that a component may have, separated by spaces.
func sharingKeys(c Component) string {
	var keys []string
	for field := range reflect.TypeOf(c).Fields() {
		if key := snake(field.Name); has(storeKeys, key) {
			keys = append(keys, key)
		}
	}
	return strings.Join(keys, " ")
}

// sharing reads that key of a component like c. What its kind does not have is zero.
func (d *decoder) sharing(of value, c Component) (local bool, s Share, o Outage) {
	v := of.get(headgateKey)
	if v.node == nil && d.learned == nil { // as in most of the many components that a file may have
		return false, "", ""
	}
	f := d.fields(v, sharingKeys(c), "")
	return d.boolean(f.get("local"), false), Share(d.text(d.fill(f, "Share", "share"))), Outage(d.text(d.fill(f, "OnOutage", "on_outage")))
}

// lazySync reads what Aperture has for leased tokens. It gives way to what headgateKey says, and to how the bucket fills.
func (d *decoder) lazySync(v value, l *RateLimiter) {
	if v.node == nil && d.learned == nil {
		return
	}
	f := d.fields(v, "enabled", "num_sync")
	enabled, why := f.get("enabled"), unleasable(l.StepFill, l.DelayInitialFill)
	switch {
	case !d.boolean(enabled, false):
	case l.Share != "":
		d.unused(enabled, ": headgate.share is set")
	case l.Local:
		d.unused(enabled, ": headgate.local is set")
	case why != "":
		d.unused(enabled, ": "+why)
	default:
		l.Share = ShareLeased
	}
}

// unshared returns a hint at why the component that an unknown key is in does not have it, if the key is about a store that engines
// share; "" otherwise.
func (d *decoder) unshared(key value) string {
	if !has(headgateKey+" "+storeKeys, key.key) {
		return ""
	}
	kind := d.kindAround(key)
	switch {
	case kind == nil:
		return ""
	case kind.store == measures:
		return "; " + kind.name + " is always local: it measures its own process"
	case kind.store == keepsNothing:
		return "; " + kind.name + " is always local: it keeps nothing that others could share"
	}
	keys := sharingKeys(kind.zero)
	switch {
	case key.key == headgateKey && d.isShort:
		return "; what it has in other files stands beside the other keys of " + kind.name + ": " + strings.ReplaceAll(keys, " ", ", ")
	case has(keys, key.key) || key.key == headgateKey:
		return "" // it is in the wrong place
	case key.key == "share":
		return "; it is for token buckets, and all else is exact"
	default:
		return "; a load ramp goes on from where it last stood"
	}
}

// kindAround returns the kind of the component that a value is in; nil if it is in none.
func kindAround(v value) *kindOf {
	for at := v.up; at != nil; at = at.up {
		if at.key == "load_scheduling_core" { // of a blueprint
			return &kinds[aimdLoadScheduler]
		}
		for i := range kinds {
			for _, f := range kinds[i].forms {
				if at.named && at.key == f.key {
					return &kinds[i]
				}
			}
		}
	}
	return nil
}
