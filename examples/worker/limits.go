package main

import (
	"time"

	"github.com/headgate-go/headgate/policy"
)

const atOnce, perSecond = 6, 10

// limits holds for all workers together. A call that is too much waits. With a store, no call begins while it does not answer: a
// worker's part of the limits would be more than is allowed, with the calls of before.
var limits = []policy.Policy{{Name: "third-party", Components: []policy.Component{
	policy.ConcurrencyScheduler{
		ID: "at-once", Selectors: policy.At("api"), Max: atOnce, MaxInflight: 5 * time.Minute, OnOutage: policy.OutageClosed,
	},
	policy.QuotaScheduler{
		ID: "rate", Selectors: policy.At("api"), Capacity: 1, Fill: perSecond, Interval: time.Second, OnOutage: policy.OutageClosed,
	},
}}}
