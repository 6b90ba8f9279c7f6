package main

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/labstack/echo/v5"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/httpguard"
)

// asEcho makes middleware of net/http one of echo's.
func asEcho(middleware func(http.Handler) http.Handler) echo.MiddlewareFunc {
	wrap := echo.WrapMiddleware(middleware)
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return wrap(func(c *echo.Context) error {
			// Echo answers errors when all middleware is done, which is too late for it to see their status.
			if err := next(c); err != nil {
				c.Echo().HTTPErrorHandler(c, err)
			}
			return nil
		})
	}
}

func newEcho(client headgate.Starter) http.Handler {
	guard := httpguard.Middleware(client, "shop", httpguard.WithControlPoint(
		func(r *http.Request) string { return r.Pattern }))

	router := echo.New()
	router.Use(asEcho(guard))
	router.GET("/orders/:id", func(c *echo.Context) error {
		return c.String(http.StatusOK, fmt.Sprintln("order", c.Param("id")))
	})
	router.GET("/broken", func(*echo.Context) error {
		return errors.New("broken")
	})
	return router
}
