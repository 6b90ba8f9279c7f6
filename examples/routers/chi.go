package main

import (
	"fmt"
	"net/http"

	"github.com/go-chi/chi/v5"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/httpguard"
)

func newChi(client headgate.Starter) http.Handler {
	guard := httpguard.Middleware(client, "shop", httpguard.WithControlPoint(
		func(r *http.Request) string { return r.Pattern }))

	router := chi.NewRouter()
	// In a group, or by With, middleware runs when the route is known. By Use on the router itself it runs before.
	router.Group(func(r chi.Router) {
		r.Use(guard)
		r.Get("/orders/{id}", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, "order", chi.URLParam(r, "id"))
		})
		r.Get("/broken", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "broken", http.StatusInternalServerError)
		})
	})
	return router
}
