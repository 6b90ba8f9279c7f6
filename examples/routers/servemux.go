package main

import (
	"fmt"
	"net/http"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/httpguard"
)

func newServeMux(client headgate.Starter) http.Handler {
	// The pattern is known behind the mux, so each handler is wrapped and not the mux.
	guard := httpguard.Middleware(client, "shop", httpguard.WithControlPoint(
		func(r *http.Request) string { return r.Pattern }))

	mux := http.NewServeMux()
	mux.Handle("GET /orders/{id}", guard(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, "order", r.PathValue("id"))
		})))
	mux.Handle("GET /broken", guard(http.HandlerFunc(
		func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "broken", http.StatusInternalServerError)
		})))
	return mux
}
