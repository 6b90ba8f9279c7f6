module github.com/headgate-go/headgate/policy/difftest

go 1.26.0

require (
	github.com/goccy/go-yaml v1.19.2
	github.com/headgate-go/headgate v0.0.0
)

require go.yaml.in/yaml/v4 v4.0.0 // indirect

replace github.com/headgate-go/headgate => ../..
