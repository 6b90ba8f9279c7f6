package main

import (
	"fmt"
	"net/http"

	"github.com/gorilla/mux"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/httpguard"
)

func newGorilla(client headgate.Starter) http.Handler {
	guard := httpguard.Middleware(client, "shop", httpguard.WithControlPoint(
		func(r *http.Request) string {
			if route := mux.CurrentRoute(r); route != nil {
				template, _ := route.GetPathTemplate() // "" where the route has no path
				return template
			}
			return ""
		}))

	router := mux.NewRouter()
	router.Use(guard) // runs when the route is known, and not for paths that have none
	router.HandleFunc("/orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "order", mux.Vars(r)["id"])
	}).Methods(http.MethodGet)
	router.HandleFunc("/broken", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "broken", http.StatusInternalServerError)
	}).Methods(http.MethodGet)
	return router
}
