// Hello is the smallest program: a function that may run twice a minute, and three calls of it.
//
//	go run ./examples/hello
package main

import (
	"context"
	"fmt"
	"time"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/fallback"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/policy"
)

func main() {
	limits, err := engine.New([]policy.Policy{{Name: "greetings", Components: []policy.Component{
		policy.RateLimiter{Selectors: policy.At("greet"), Capacity: 2, Fill: 2, Interval: time.Minute},
	}}})
	if err != nil {
		panic(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		panic(err)
	}

	greet := func(context.Context) (string, error) { return "hello", nil }
	limited := headgate.Guard(client, "greet", flowctl.Params{}, greet, fallback.Value("come back later"))
	for range 3 {
		fmt.Println(limited(context.Background()))
	}
}
