package grpcguard_test

import (
	"context"
	"testing"

	"google.golang.org/grpc"

	"github.com/headgate-go/headgate/engine"
	"github.com/headgate-go/headgate/flowctl"
	"github.com/headgate-go/headgate/grpcguard"
)

// A server with a handler for unknown services, such as a proxy, has interceptors see whatever method a peer makes up. No
// prefix of a method skips one that another server may read as another method.
func TestSkipsOfMadeUpMethods(t *testing.T) {
	limits, err := engine.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer limits.Close()
	client, err := flowctl.New(limits)
	if err != nil {
		t.Fatal(err)
	}
	intercept := grpcguard.UnaryServerInterceptor(client, "calls", grpcguard.WithSkipMethods("/shop.v1.Orders/*", "/open.*", "/odd/../listed"))
	for method, want := range map[string]bool{ // whether it is a flow
		"/shop.v1.Orders/Get":                         false,
		"shop.v1.Orders/Get":                          false,
		"/open.v1.Prices/Get":                         false,
		"/grpc.health.v1.Health/Check":                false,
		"/odd/../listed":                              false, // listed as it is, which no other method is
		"/shop.v1.Payments/Get":                       true,
		"/shop.v1.Orders/../shop.v1.Payments/Get":     true,
		"/shop.v1.Orders/%2e%2e/shop.v1.Payments/Get": true,
		"/shop.v1.Orders/..%2fshop.v1.Payments%2fGet": true,
		"/shop.v1.Orders/..\\shop.v1.Payments\\Get":   true,
		"/shop.v1.Orders//shop.v1.Payments/Get":       true,
		"/shop.v1.Orders/Get;v=1":                     true,
		"/shop.v1.Orders/Get?x":                       true,
		"/shop.v1.Orders/Get#x":                       true,
		"/shop.v1.Orders/Get.":                        true,
		"/shop.v1.Orders/..":                          true,
		"/shop.v1.Orders/":                            true,
		"/shop.v1.Orders/a/b":                         true,
		"//shop.v1.Orders/Get":                        true,
		"/open.v1.Prices/../shop.v1.Payments/Get":     true,
		"/open.": true,
		"/grpc.health.v1.Health/../shop.v1.Payments/Check": true,
		"/shop.v1.Orders/\x00":                             true,
		"/shop.v1.Orders/\xff":                             true,
		"":                                                 true,
	} {
		_, err := intercept(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) {
			if _, got := flowctl.FromContext(ctx); got != want {
				t.Errorf("%q: is a flow: %v want %v", method, got, want)
			}
			return nil, nil
		})
		if err != nil {
			t.Errorf("%q: %v", method, err)
		}
	}
}
