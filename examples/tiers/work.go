package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// newAPI is what callers want. Reports take some time.
func newAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "no orders") })
	mux.HandleFunc("GET /reports", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(200 * time.Millisecond):
			fmt.Fprintln(w, "nothing to report")
		case <-r.Context().Done():
		}
	})
	return mux
}

// listMethod takes a google.protobuf.Empty, and returns a StringValue.
const listMethod = "/headgate.examples.Orders/List"

// orders is written by hand, because its messages are in protobuf's library. Generated code looks the same.
var orders = grpc.ServiceDesc{
	ServiceName: "headgate.examples.Orders",
	Methods: []grpc.MethodDesc{{
		MethodName: "List",
		Handler: func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			empty := new(emptypb.Empty)
			if err := decode(empty); err != nil {
				return nil, err
			}
			return intercept(ctx, empty, &grpc.UnaryServerInfo{Server: srv, FullMethod: listMethod}, list)
		},
	}},
}

func list(context.Context, any) (any, error) { return wrapperspb.String("no orders"), nil }
