package labels_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/headgate-go/headgate/labels"
	"go.opentelemetry.io/otel/baggage"
	"go.uber.org/goleak"
	"google.golang.org/grpc/metadata"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type set = map[string]string

// TestPrecedence is the part of the package documentation's table that a context carries: what wins within the
// explicit and the transport layer, and that neither writes into the other.
func TestPrecedence(t *testing.T) {
	tests := []struct {
		name                string
		build               func(context.Context) context.Context
		explicit, transport set
	}{
		{
			name:  "nothing",
			build: func(ctx context.Context) context.Context { return ctx },
		},
		{
			name: "later With wins per key",
			build: func(ctx context.Context) context.Context {
				return labels.With(labels.With(ctx, "a", "1", "b", "1"), "b", "2", "c", "2")
			},
			explicit: set{"a": "1", "b": "2", "c": "2"},
		},
		{
			name: "later pair of one With wins",
			build: func(ctx context.Context) context.Context {
				return labels.With(ctx, "a", "1", "a", "2", "a", "3")
			},
			explicit: set{"a": "3"},
		},
		{
			name: "later WithTransport wins per key",
			build: func(ctx context.Context) context.Context {
				return labels.WithTransport(labels.WithTransport(ctx, set{"a": "1", "b": "1"}), set{"b": "2", "c": "2"})
			},
			transport: set{"a": "1", "b": "2", "c": "2"},
		},
		{
			name: "transport before With",
			build: func(ctx context.Context) context.Context {
				return labels.With(labels.WithTransport(ctx, set{"tier": "platinum"}), "tier", "free")
			},
			explicit:  set{"tier": "free"},
			transport: set{"tier": "platinum"},
		},
		{
			name: "transport after With",
			build: func(ctx context.Context) context.Context {
				return labels.WithTransport(labels.With(ctx, "tier", "free"), set{"tier": "platinum"})
			},
			explicit:  set{"tier": "free"},
			transport: set{"tier": "platinum"},
		},
		{
			name: "empty transport",
			build: func(ctx context.Context) context.Context {
				return labels.WithTransport(labels.With(ctx, "a", ""), nil)
			},
			explicit: set{"a": ""},
		},
		{
			name: "a sibling's label stays there",
			build: func(ctx context.Context) context.Context {
				parent := labels.With(ctx, "a", "1")
				labels.With(parent, "a", "2", "b", "2")
				return parent
			},
			explicit: set{"a": "1"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			explicit, transport, err := labels.FromContext(tt.build(t.Context()))
			if err != nil {
				t.Errorf("FromContext error = %v want nil", err)
			}
			if diff := cmp.Diff(tt.explicit, explicit); diff != "" {
				t.Errorf("explicit (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.transport, transport); diff != "" {
				t.Errorf("transport (-want +got):\n%s", diff)
			}
		})
	}
}

// TestA18CredentialsStay and TestPrecedence are bug A18: headers replaced explicit labels, and credentials were sent.
func TestA18CredentialsStay(t *testing.T) {
	names := []string{
		"Authorization", "authorization", "AUTHORIZATION", "Proxy-Authorization", "Proxy_Authorization",
		"Cookie", "Set-Cookie", "set_cookie", "X-Api-Key", "x-api-key", "X_API_KEY",
		"http.request.header.authorization", "HTTP.Request.Header.Set_Cookie",
	}
	names = append(names, credentials...)
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	md := metadata.MD{}
	members := make([]baggage.Member, 0, len(names))
	for _, name := range names {
		if !labels.IsCredential(name) {
			t.Errorf("IsCredential(%q) = false", name)
		}
		r.Header.Set(name, "secret")
		md.Set(name, "secret")
		member, err := baggage.NewMemberRaw(name, "secret")
		if err != nil {
			t.Fatal(err)
		}
		members = append(members, member)
	}
	bag, err := baggage.New(members...)
	if err != nil {
		t.Fatal(err)
	}
	ctx := baggage.ContextWithBaggage(t.Context(), bag)

	sources := map[string]set{
		"FromRequest":            labels.FromRequest(r, names...),
		"FromMetadata":           labels.FromMetadata(md, names...),
		"FromBaggage":            labels.FromBaggage(ctx),
		"FromBaggage with names": labels.FromBaggage(ctx, names...),
	}
	for source, m := range sources {
		for key, value := range m {
			if value == "secret" {
				t.Errorf("%s lets %q out", source, key)
			}
		}
	}
}

// What the package says of credentials is what it does.
func TestCredentialsAreDocumented(t *testing.T) {
	source, err := os.ReadFile("labels.go")
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile("../internal/credential/credential.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, _, _ := strings.Cut(string(source), "\npackage labels\n")
	_, doc, _ = strings.Cut(doc, `written with "-" or "_":`)
	doc, _, _ = strings.Cut(doc, ". Neither")
	_, code, _ := strings.Cut(string(list), "func Named")
	code, _, _ = strings.Cut(code, "return true")
	var named, taken []string
	for _, name := range regexp.MustCompile(`[A-Z][\w-]+`).FindAllString(doc, -1) {
		named = append(named, strings.ToLower(name))
	}
	for _, match := range regexp.MustCompile(`"([a-z-]{2,})"`).FindAllStringSubmatch(code, -1) {
		taken = append(taken, match[1])
	}
	slices.Sort(named)
	slices.Sort(taken)
	if diff := cmp.Diff(taken, named); diff != "" || len(taken) < 20 {
		t.Errorf("%d credentials (-code +document):\n%s", len(taken), diff)
	}
}

func TestIsCredentialOrdinary(t *testing.T) {
	for _, name := range []string{"", "user_id", "X-Tenant", "Cookies", "X-Authorization-Mode", "http.request.header.x_tenant"} {
		if labels.IsCredential(name) {
			t.Errorf("IsCredential(%q) = true", name)
		}
	}
}

// No source makes a label of the Baggage header. Its members are labels.
func TestBaggageHeaderIsNoLabel(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	r.Header.Set("Baggage", "tenant=acme")
	r.Header.Set("X-User", "ann")
	_, labeled, err := labels.FromContext(labels.RequestLabeler("X-User", "baggage")(t.Context(), r))
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]map[string]string{
		"FromRequest": labels.FromRequest(r, "Baggage", "X-User"), "RequestLabeler": labeled,
	} {
		if _, ok := got["http.request.header.baggage"]; ok || got["http.request.header.x_user"] != "ann" {
			t.Errorf("%s: %v want no label of the header", name, got)
		}
	}
}

// TestA23BaggageIsDecodedOnce is bug A23: decoded twice, "x+y" became "x y" and the label with "50%" was lost.
func TestA23BaggageIsDecodedOnce(t *testing.T) {
	ctx := withBaggage(t, "a=x%2By,b=50%25")
	if diff := cmp.Diff(set{"a": "x+y", "b": "50%"}, labels.FromBaggage(ctx)); diff != "" {
		t.Errorf("FromBaggage (-want +got):\n%s", diff)
	}
}

func TestFromBaggage(t *testing.T) {
	tests := []struct {
		name, header string
		keys         []string
		want         set
	}{
		{name: "no baggage"},
		{name: "all", header: "a=1,b=2;meta=x", want: set{"a": "1", "b": "2"}},
		{name: "listed", header: "a=1,b=2", keys: []string{"b", "c"}, want: set{"b": "2"}},
		{name: "none of the listed", header: "a=1", keys: []string{"A", ""}},
		{name: "all but what a server sees", header: "a=1,http.method=2,http.request.header.b=3,rpc.method=4,httpx=5", want: set{"a": "1", "httpx": "5"}},
		{name: "what a server sees, listed", header: "a=1,http.method=2", keys: []string{"http.method"}, want: set{"http.method": "2"}},
		{name: "empty value", header: "a=", keys: []string{"a"}, want: set{"a": ""}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := labels.FromBaggage(withBaggage(t, tt.header), tt.keys...)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("FromBaggage(%q, %q) (-want +got):\n%s", tt.header, tt.keys, diff)
			}
		})
	}
}

func TestFromMetadata(t *testing.T) {
	md := metadata.Pairs("tenant", "acme", "plan", "a", "plan", "b", "trace-bin", "\x00\xff", "x-long-name", "\xff")
	tests := []struct {
		name string
		keys []string
		want set
	}{
		{name: "nothing is listed"},
		{name: "listed in any case", keys: []string{"Tenant"}, want: set{"tenant": "acme"}},
		{name: "repeated values", keys: []string{"plan"}, want: set{"plan": "a,b"}},
		{name: "binary", keys: []string{"trace-bin", "Trace-Bin"}},
		{name: "absent", keys: []string{"absent"}},
		{name: "not UTF-8", keys: []string{"X-Long-NAME"}, want: set{"x-long-name": "\uFFFD"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, labels.FromMetadata(md, tt.keys...)); diff != "" {
				t.Errorf("FromMetadata(%q) (-want +got):\n%s", tt.keys, diff)
			}
		})
	}
}

func TestFromRequest(t *testing.T) {
	incoming := func(target string, change func(*http.Request)) *http.Request {
		r := httptest.NewRequest(http.MethodPost, target, strings.NewReader("body"))
		if change != nil {
			change(r)
		}
		return r
	}
	sent := func(target string, body io.Reader) *http.Request {
		r, err := http.NewRequest("", target, body)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	with := func(base set, more ...string) set {
		m := maps.Clone(base)
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	post := set{
		"http.method": "POST", "http.target": "/a", "http.host": "example.com", "http.scheme": "http",
		"http.flavor": "1.1", "http.request_content_length": "4",
	}
	get := set{
		"http.method": "GET", "http.target": "/", "http.host": "example.com", "http.scheme": "https",
		"http.flavor": "1.1", "http.request_content_length": "0",
	}
	getOfUnknownLength := maps.Clone(get)
	delete(getOfUnknownLength, "http.request_content_length")

	tests := []struct {
		name    string
		request *http.Request
		headers []string
		want    set
	}{
		{
			name:    "incoming",
			request: incoming("/a", nil),
			want:    post,
		},
		{
			name:    "target without the query, as it was escaped",
			request: incoming("/a%2fb/%C3%BC?token=secret", nil),
			want:    with(post, "http.target", "/a%2fb/%C3%BC"),
		},
		{
			name:    "target from before a handler changed it",
			request: incoming("/api/a", func(r *http.Request) { r.URL = &url.URL{Path: "/a"} }),
			want:    with(post, "http.target", "/api/a"),
		},
		{
			name:    "asterisk form",
			request: incoming("/", func(r *http.Request) { r.RequestURI, r.URL = "*", &url.URL{Path: "*"} }),
			want:    with(post, "http.target", "*"),
		},
		{
			name:    "TLS",
			request: incoming("/a", func(r *http.Request) { r.TLS, r.Proto = &tls.ConnectionState{}, "HTTP/2.0" }),
			want:    with(post, "http.scheme", "https", "http.flavor", "2.0"),
		},
		{
			name:    "a peer that claims TLS",
			request: incoming("/a", func(r *http.Request) { r.RequestURI, r.URL.Scheme = "https://example.com/a", "https" }),
			want:    post,
		},
		{
			name: "listed headers",
			request: incoming("/a", func(r *http.Request) {
				r.Header = http.Header{"X-User-Id": {"42"}, "X-Plan": {"a", "b"}, "X-Other": {"unlisted"}}
			}),
			headers: []string{"x-user-id", "X-PLAN", "X-Absent"},
			want:    with(post, "http.request.header.x_user_id", "42", "http.request.header.x_plan", "a,b"),
		},
		{
			name: "spellings of one label",
			request: incoming("/a", func(r *http.Request) {
				r.Header = http.Header{"X-User": {"proxy"}, "X_user": {"peer"}, "A_b-C": {"1"}, "A-B_c": {"2"}, "A_b_c": {"3"}, "X_plan": {"alone"}}
			}),
			headers: []string{"A-B-C", "A-B_C", "X-User", "X_User", "A_B_C", "A_B-C", "X_Plan", "X-Plan"},
			want:    with(post, "http.request.header.x_user", "proxy", "http.request.header.a_b_c", "2", "http.request.header.x_plan", "alone"),
		},
		{
			name: "spellings of one label, listed otherwise",
			request: incoming("/a", func(r *http.Request) {
				r.Header = http.Header{"X-User": {""}, "X_user": {"peer"}, "A_b-C": {"1"}, "A-B_c": {"2"}, "A_b_c": {"3"}, "X_plan": {"alone"}}
			}),
			headers: []string{"A_b_c", "A_b-c", "x_user", "x-user", "A-B_c", "A-B-C", "X-Plan", "X_Plan"},
			want:    with(post, "http.request.header.x_user", "", "http.request.header.a_b_c", "2", "http.request.header.x_plan", "alone"),
		},
		{
			name:    "outgoing",
			request: sent("https://example.com", nil),
			want:    get,
		},
		{
			name:    "length as the header has it",
			request: incoming("/a", func(r *http.Request) { r.Header.Set("Content-Length", "4") }),
			want:    post,
		},
		{
			name:    "length that the header has otherwise",
			request: incoming("/a", func(r *http.Request) { r.Header.Set("Content-Length", "04") }),
			want:    post,
		},
		{
			name:    "length that the header does not know any more",
			request: incoming("/a", func(r *http.Request) { r.Header.Set("Content-Length", "3") }),
			want:    post,
		},
		{
			name:    "outgoing with a body of unknown length",
			request: sent("https://example.com/?q=secret", io.MultiReader()),
			want:    getOfUnknownLength,
		},
		{
			name:    "sparse",
			request: &http.Request{ContentLength: -1},
			headers: []string{"X-User-Id"},
			want:    set{"http.method": "GET"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, labels.FromRequest(tt.request, tt.headers...)); diff != "" {
				t.Errorf("FromRequest (-want +got):\n%s", diff)
			}
		})
	}
}

// RequestLabeler does what FromRequest and WithTransport do, but for the labels of another request.
func TestRequestLabeler(t *testing.T) {
	label := labels.RequestLabeler("X-Plan", "x-user-id", "Authorization", "X-Absent", strings.Repeat("k", 300))
	r := httptest.NewRequest(http.MethodPut, "/a?b", nil)
	r.Header = http.Header{"X-Plan": {"a", "\xff"}, "X-User-Id": {strings.Repeat("v", 5000)}, "Authorization": {"secret"}}
	r.Header.Set(strings.Repeat("k", 300), "v")
	get := set{
		"http.method": "PUT", "http.target": "/a", "http.host": "example.com", "http.scheme": "http", "http.flavor": "1.1",
		"http.request_content_length": "0",
		"http.request.header.x_plan":  "a,\uFFFD", "http.request.header.x_user_id": strings.Repeat("v", 4096),
	}
	with := func(more set) set {
		m := maps.Clone(get)
		maps.Copy(m, more)
		return m
	}
	many := numbered(labels.MaxLabels)
	tests := []struct {
		name                string
		ctx                 context.Context
		explicit, transport set
		err                 string
	}{
		{name: "nothing yet", ctx: t.Context(), transport: get},
		{
			name:      "explicit labels",
			ctx:       labels.With(t.Context(), "http.method", "1"),
			explicit:  set{"http.method": "1"},
			transport: get,
		},
		{
			name:      "a problem",
			ctx:       labels.With(t.Context(), "", ""),
			transport: get,
			err:       `label: empty key`,
		},
		{
			name:      "labels of a peer",
			ctx:       labels.WithTransport(t.Context(), set{"peer": "1", "httpx": "1", "rpc.method": "1"}),
			transport: with(set{"peer": "1", "httpx": "1", "rpc.method": "1"}),
		},
		{
			name: "another request",
			ctx: labels.WithTransport(t.Context(), set{
				"http.method": "GET", "http.request.header.x_absent": "1", "http.request.header.x_plan": "1", "http.route": "1",
			}),
			transport: get,
		},
		{name: "many", ctx: labels.WithTransport(t.Context(), many), transport: with(many)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, before, _ := labels.FromContext(tt.ctx)
			before = maps.Clone(before)
			explicit, transport, err := labels.FromContext(label(tt.ctx, r))
			if message(err) != tt.err {
				t.Errorf("FromContext error = %v want %q", err, tt.err)
			}
			if diff := cmp.Diff(tt.explicit, explicit, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("explicit (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.transport, transport); diff != "" {
				t.Errorf("transport (-want +got):\n%s", diff)
			}
			if _, after, _ := labels.FromContext(tt.ctx); !maps.Equal(before, after) {
				t.Error("the context that it is derived from has changed")
			}
		})
	}
}

func TestCheck(t *testing.T) {
	longKey := strings.Repeat("k", labels.MaxKeyLen)
	tests := []struct {
		name   string
		labels set
		want   string // "" is no error
		key    string
	}{
		{name: "nil"},
		{name: "at the limits", labels: set{longKey: strings.Repeat("v", labels.MaxValueLen), "empty": ""}},
		{name: "as many as may be", labels: numbered(labels.MaxLabels)},
		{name: "too many", labels: numbered(labels.MaxLabels + 1), want: "65 labels are more than 64"},
		{name: "empty key", labels: set{"": "secret"}, want: `label: empty key`},
		{
			name:   "long key",
			labels: set{longKey + "k": "secret"},
			want:   `label: key longer than 255 bytes`,
			key:    longKey[:64] + "…",
		},
		{
			name:   "long value",
			labels: set{"user_id": strings.Repeat("secret", 1000)},
			want:   `label: value longer than 4096 bytes`,
			key:    "user_id",
		},
		{name: "key not UTF-8", labels: set{"k\xff": "secret"}, want: `label: key is not valid UTF-8`, key: "k\xff"},
		{name: "value not UTF-8", labels: set{"k": "secret\xff"}, want: `label: value is not valid UTF-8`, key: "k"},
		{
			name:   "the smallest of several bad keys",
			labels: set{"d": "\xff", "b": "\xff", "a": "fine", "c": "\xff"},
			want:   `label: value is not valid UTF-8`,
			key:    "b",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := labels.Check(tt.labels)
			if got := message(err); got != tt.want {
				t.Errorf("Check = %q want %q", got, tt.want)
			}
			var key string
			if keyed, ok := errors.AsType[interface {
				error
				LabelKey() string
			}](err); ok {
				key = keyed.LabelKey()
			}
			if key != tt.key {
				t.Errorf("LabelKey = %q want %q", key, tt.key)
			}
			logged := slog.AnyValue(err).Resolve().String()
			if strings.Contains(logged, "secret") || tt.key != "" && !strings.Contains(logged, "label_key="+tt.key) {
				t.Errorf("logged as %q want the key %q, and no value", logged, tt.key)
			}
		})
	}
}

func TestWithRemembersTheFirstProblem(t *testing.T) {
	pairs := make([]string, 0, 2*labels.MaxLabels)
	for key := range numbered(labels.MaxLabels) {
		pairs = append(pairs, key, "")
	}
	tests := []struct {
		name string
		ctx  context.Context
		want string
	}{
		{
			name: "bad label",
			ctx:  labels.With(t.Context(), "good", "1", "", "secret"),
			want: `label: empty key`,
		},
		{
			name: "key without a value",
			ctx:  labels.With(t.Context(), "good", "1", "tier"),
			want: `label: no value`,
		},
		{
			name: "too many in all",
			ctx:  labels.With(labels.With(t.Context(), "good", "1"), pairs[0], pairs[1], pairs[2:]...),
			want: "65 labels are more than 64",
		},
		{
			name: "a later label does not mend it",
			ctx:  labels.With(labels.With(t.Context(), "tier", "\xff"), "tier", "free", "good", "1"),
			want: `label: value is not valid UTF-8`,
		},
		{
			name: "nor does a later problem replace it",
			ctx:  labels.With(labels.With(t.Context(), "tier", "\xff"), "", "", "good", "1"),
			want: `label: value is not valid UTF-8`,
		},
		{
			name: "transport keeps it",
			ctx:  labels.WithTransport(labels.With(t.Context(), "good", "1", "tier"), set{"a": "1"}),
			want: `label: no value`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			explicit, _, err := labels.FromContext(tt.ctx)
			if got := message(err); got != tt.want {
				t.Errorf("FromContext error = %q want %q", got, tt.want)
			}
			if explicit["good"] != "1" {
				t.Errorf("explicit = %v want the good label in it", explicit)
			}
		})
	}
}

func TestWithTransportRepairs(t *testing.T) {
	tests := []struct {
		name     string
		in, want set
	}{
		{name: "in order", in: set{"a": "1", "b": ""}, want: set{"a": "1", "b": ""}},
		{name: "bad keys", in: set{"": "1", "\xff": "1", strings.Repeat("k", 256): "1", "a": "1"}, want: set{"a": "1"}},
		{name: "only bad keys", in: set{"": "1"}},
		{name: "value not UTF-8", in: set{"a": "x\xff\xfey"}, want: set{"a": "x\uFFFDy"}},
		{name: "long value", in: set{"a": strings.Repeat("v", 5000)}, want: set{"a": strings.Repeat("v", 4096)}},
		{
			name: "long value, cut between runes",
			in:   set{"a": "x" + strings.Repeat("ü", 2048)},
			want: set{"a": "x" + strings.Repeat("ü", 2047)},
		},
		{name: "many", in: numbered(1000), want: numbered(1000)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := maps.Clone(tt.in)
			explicit, got, err := labels.FromContext(labels.WithTransport(t.Context(), tt.in))
			if explicit != nil || err != nil {
				t.Errorf("FromContext = %v, _, %v want nil, _, nil", explicit, err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("transport (-want +got):\n%s", diff)
			}
			if !maps.Equal(before, tt.in) {
				t.Error("WithTransport changed its argument")
			}
		})
	}
}

func TestContextPrintsNoLabel(t *testing.T) {
	ctx := labels.With(labels.WithTransport(t.Context(), set{"key": "secret"}), "key", "secret", "key", "secret\xff")
	type key struct{}
	derived, cancel := context.WithCancel(context.WithValue(ctx, key{}, ""))
	defer cancel()
	for _, ctx := range []context.Context{ctx, derived, labels.RequestLabeler()(ctx, httptest.NewRequest("GET", "/secret", nil))} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d"} {
			if got := fmt.Sprintf(verb, ctx); strings.Contains(got, "secret") {
				t.Errorf("Sprintf(%q, ctx) = %s shows a label", verb, got)
			}
		}
	}
}

func TestAllocations(t *testing.T) {
	ctx, cancel := context.WithCancel(labels.With(t.Context(), "user_id", "42"))
	defer cancel()
	m := set{"user_id": "42", "tier": "free", "region": "eu", "tenant": "acme", "plan": "ü"}

	gates := map[string]struct {
		want float64
		call func()
	}{
		"FromContext": {0, func() {
			if explicit, _, _ := labels.FromContext(ctx); len(explicit) != 1 {
				t.Fatal("no label")
			}
		}},
		"FromContext without labels": {0, func() { _, _, _ = labels.FromContext(context.Background()) }},
		"Check": {0, func() {
			if err := labels.Check(m); err != nil {
				t.Fatal(err)
			}
		}},
		"WithTransport": {1, func() {
			if _, transport, _ := labels.FromContext(labels.WithTransport(ctx, m)); len(transport) != len(m) {
				t.Fatal("no labels")
			}
		}},
	}
	for name, gate := range gates {
		if got := testing.AllocsPerRun(100, gate.call); got != gate.want {
			t.Errorf("%s: %v allocations want %v", name, got, gate.want)
		}
	}
}

// FuzzSources checks that whatever a peer sends becomes labels that explicit labels could be too, and that no
// credential is among them, whoever lists it.
func FuzzSources(f *testing.F) {
	f.Add("X-User-Id", "42", "a=x%2By,b=50%25")
	f.Add("Authorization", "Bearer secret", "authorization=secret")
	f.Add("k", "v", "http.request.header.authorization=secret")
	f.Add("http.request.header.authorization", "v", "http.request.header.authorization=secret")
	f.Add("x_api_key", "\xff\xfe", "=,;=%")
	f.Add("trace-bin", strings.Repeat("\xff", 3000), "k=%ff")
	f.Add(strings.Repeat("k", 300), strings.Repeat("ü", 3000), strings.Repeat("k", 300)+"=v")

	f.Fuzz(func(t *testing.T, key, value, header string) {
		r := &http.Request{
			Method:     value,
			Host:       value,
			RequestURI: value,
			URL:        &url.URL{Path: value},
			Proto:      value,
			Header:     http.Header{key: {value, value}, http.CanonicalHeaderKey(key): {value}},
		}
		md := metadata.MD{key: {value}, strings.ToLower(key): {value, value}}
		// Parse keeps the good members of a bad header.
		bag, _ := baggage.Parse(header)
		ctx := baggage.ContextWithBaggage(t.Context(), bag)

		sources := map[string]set{
			"request":        labels.FromRequest(r, key),
			"metadata":       labels.FromMetadata(md, key),
			"baggage":        labels.FromBaggage(ctx),
			"listed baggage": labels.FromBaggage(ctx, key),
		}
		_, sources["transport"], _ = labels.FromContext(labels.WithTransport(t.Context(), set{key: value}))
		for source, m := range sources {
			if err := labels.Check(m); err != nil {
				t.Errorf("%s: %v", source, err)
			}
		}
		delete(sources, "transport") // takes what it is given
		for source, m := range sources {
			for name := range m {
				name = strings.TrimPrefix(strings.ToLower(name), "http.request.header.")
				if slices.Contains(credentials, strings.ReplaceAll(name, "_", "-")) {
					t.Errorf("%s lets %q out", source, name)
				}
				if source == "metadata" && strings.HasSuffix(name, "-bin") {
					t.Errorf("%s lets binary %q out", source, name)
				}
			}
		}

		explicit, _, err := labels.FromContext(labels.With(t.Context(), key, value))
		if (err == nil) != (labels.Check(set{key: value}) == nil) {
			t.Errorf("With(%q, …) remembers %v, Check says otherwise", key, err)
		}
		if got := labels.Check(explicit); got != nil {
			t.Errorf("explicit: %v", got)
		}
		if got := message(err); !utf8.ValidString(got) || len(got) > 400 {
			t.Errorf("error of %d bytes: %q", len(got), got)
		}
	})
}

var credentials = []string{
	"authorization", "proxy-authorization", "x-forwarded-authorization", "x-original-authorization", "cookie", "set-cookie",
	"api-key", "apikey", "x-api-key", "x-goog-api-key", "ocp-apim-subscription-key", "x-auth-token", "x-session-token",
	"x-access-token", "x-forwarded-access-token", "x-amz-security-token", "x-vault-token", "x-gitlab-token",
	"private-token", "x-csrf-token", "x-csrftoken", "x-xsrf-token", "x-goog-iap-jwt-assertion", "cf-access-jwt-assertion",
}

func withBaggage(t *testing.T, header string) context.Context {
	t.Helper()
	bag, err := baggage.Parse(header)
	if err != nil {
		t.Fatal(err)
	}
	return baggage.ContextWithBaggage(t.Context(), bag)
}

// numbered returns n labels whose keys sort by number.
func numbered(n int) set {
	m := make(set, n)
	for i := range n {
		m[fmt.Sprintf("k%03d", i)] = "v"
	}
	return m
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
