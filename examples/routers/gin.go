package main

import (
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/headgate-go/headgate"
	"github.com/headgate-go/headgate/httpguard"
)

// asGin makes middleware of net/http one of gin's.
func asGin(middleware func(http.Handler) http.Handler) gin.HandlerFunc {
	return func(c *gin.Context) {
		ran := false
		c.Request.Pattern = c.FullPath()
		middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ran = true
			c.Request = r
			c.Next()
			w.WriteHeader(c.Writer.Status()) // what went to gin's writer went past the middleware
		})).ServeHTTP(c.Writer, c.Request)
		if !ran {
			c.Abort()
		}
	}
}

func newGin(client headgate.Starter) http.Handler {
	guard := httpguard.Middleware(client, "shop", httpguard.WithControlPoint(
		func(r *http.Request) string { return r.Pattern }))

	router := gin.New()
	router.Use(gin.Recovery(), asGin(guard)) // in this order: the guard has to see the panic
	router.GET("/orders/:id", func(c *gin.Context) {
		c.String(http.StatusOK, "order %s\n", c.Param("id"))
	})
	router.GET("/broken", func(c *gin.Context) {
		c.String(http.StatusInternalServerError, "broken")
	})
	return router
}
