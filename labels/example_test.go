package labels_test

import (
	"context"
	"fmt"
	"net/http/httptest"

	"github.com/headgate-go/headgate/labels"
	"go.opentelemetry.io/otel/baggage"
	"google.golang.org/grpc/metadata"
)

// Middleware that knows the user labels every flow of the request.
func ExampleWith() {
	ctx := labels.With(context.Background(), "user_id", "42", "tier", "free")
	ctx = labels.With(ctx, "tier", "gold") // a later label wins

	explicit, _, err := labels.FromContext(ctx)
	fmt.Println(explicit, err)

	_, _, err = labels.FromContext(labels.With(ctx, "plan", "gold", "region"))
	fmt.Println(err)
	// Output:
	// map[tier:gold user_id:42] <nil>
	// label: no value
}

func ExampleWithTransport() {
	r := httptest.NewRequest("GET", "/orders", nil)
	r.Header.Set("Tier", "platinum")

	// What a peer sends never replaces what the application says.
	ctx := labels.With(context.Background(), "tier", "free")
	ctx = labels.WithTransport(ctx, map[string]string{"tier": r.Header.Get("Tier")})

	explicit, transport, _ := labels.FromContext(ctx)
	fmt.Println(explicit, "wins over", transport)
	// Output:
	// map[tier:free] wins over map[tier:platinum]
}

func ExampleFromRequest() {
	r := httptest.NewRequest("GET", "/orders/7?verbose=1", nil)
	r.Header.Set("X-Tenant", "acme")
	r.Header.Set("Authorization", "Bearer secret")

	m := labels.FromRequest(r, "X-Tenant", "Authorization")
	fmt.Println(m["http.method"], m["http.target"], m["http.request.header.x_tenant"])

	_, ok := m["http.request.header.authorization"]
	fmt.Println("authorization:", ok)
	// Output:
	// GET /orders/7 acme
	// authorization: false
}

func ExampleFromMetadata() {
	md := metadata.Pairs("tenant", "acme", "plan", "gold", "authorization", "Bearer secret")

	fmt.Println(labels.FromMetadata(md, "tenant", "authorization"))
	// Output:
	// map[tenant:acme]
}

func ExampleFromBaggage() {
	bag, err := baggage.Parse("tenant=acme,discount=50%25")
	if err != nil {
		panic(err)
	}
	ctx := baggage.ContextWithBaggage(context.Background(), bag)

	fmt.Println(labels.FromBaggage(ctx))
	fmt.Println(labels.FromBaggage(ctx, "tenant"))
	// Output:
	// map[discount:50% tenant:acme]
	// map[tenant:acme]
}

func ExampleCheck() {
	fmt.Println(labels.Check(map[string]string{"user_id": "42", "": "nobody"}))
	// Output:
	// label: empty key
}

// What a peer sent is made to fit before it becomes a flow's own label. Else the flow would be Invalid.
func ExampleRepair() {
	sent := "caf\xe9" // not UTF-8
	fmt.Println(labels.Repair(map[string]string{"order": sent, "": "nobody"}))
	// Output:
	// map[order:caf�]
}
