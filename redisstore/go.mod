module github.com/headgate-go/headgate/redisstore

go 1.26.0

replace github.com/headgate-go/headgate => ..

require (
	github.com/google/go-cmp v0.7.0
	github.com/headgate-go/headgate v0.0.0-00010101000000-000000000000
	github.com/redis/rueidis v1.0.79
	go.uber.org/goleak v1.3.0
	pgregory.net/rapid v1.3.0
)

require golang.org/x/sys v0.48.0 // indirect
