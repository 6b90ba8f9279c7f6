package slip_test

import (
	"strings"
	"testing"

	"github.com/headgate-go/headgate/internal/slip"
)

// What names have besides.
func TestInName(t *testing.T) {
	for want, texts := range map[string][]string{
		"": {
			"", "search", "GET /a b", "a b", "/orders/{id},{line}", "suche-f\u00fcr-alle", "f(x)[0]", "a.b", "k8s:app", "*.example.com", "/static/*path", "*Server.Search",
			"{host}/{path}", "/", "/{$}", "GET example.com:8080/a/{rest...}", "/pkg.Service/Method", "main.(*Server).Search", "[::1]:8080", ":8080",
			"$default", "@scope/name", "_private", ".well-known", "it's", "C++", "a-b_c", "billing@v2", "search & find", `a "b"`, "\u691c\u7d22", "9",
			"/*", "/static/*", "/a/{b}/*", "(*Server).Search", "/a?b=c&d=e", `App\Search`,
		},
		`begins with "\""`:     {`"search"`, `"a" b`},
		`begins with "'"`:      {"'search'"},
		"begins with \"`\"":    {"`search`"},
		`begins with "#"`:      {"#search", "# search"},
		`begins with "-"`:      {"- search", "-search"},
		`begins with "&"`:      {"&search"},
		`begins with "!"`:      {"!search"},
		`begins with ">"`:      {"> search"},
		`begins with "|"`:      {"| search"},
		`begins with "?"`:      {"? search"},
		`begins with "<"`:      {"<control point>"},
		`begins with "="`:      {"=search"},
		"is in brackets":       {"[search]", "(search)", "{search}", "[a, b]", "[a[0]]"},
		`holds ": "`:           {"control_point: search", "a: b: c"},
		`holds "|"`:            {"search|find", "search | find"},
		"a quote or a bracket": {"search]", "a; b]"},
		`ends with ","`:        {"search,", "a, b,"},
		`ends with ";"`:        {"search;"},
		`ends with "."`:        {"search."},
		`holds ","`:            {"a, b", "a, b, c", "search , find", "GET /a, GET /b", "search,find", "/a,/b"},
		`holds "*"`:            {"*", "search.*", "search/*", "/pkg.Service/*", "/search*", "/search/**", "search*", "**", "/a/*/b", "sea*.rch"},
		`holds "="`:            {"control_point=search", "a=b", "name==search"},
		`begins with "$"`:      {"$search", "$1"},
		`ends with "?"`:        {"search?"},
		`ends with "$"`:        {"search$"},
		`holds ";"`:            {"search; find", "search;find", "search ;find", "a;b, c"},
	} {
		for _, text := range texts {
			if got := slip.InName(text); want == "" && got != "" || !strings.Contains(got, want) {
				t.Errorf("InName(%q) = %q want %q", text, got, want)
			}
		}
	}
}

func TestInRegex(t *testing.T) {
	for want, texts := range map[string][]string{
		"":               {"", "bot", `^a b\b[ \t]*(c|d)$`, "a|", "'[", "#"},
		"white space":    {"bot\n", "a|bot\n", " bot", "bot ", "\tbot"},
		"cannot be seen": {"\bbot", "a\nb", "bot\u200b"},
	} {
		for _, text := range texts {
			if got := slip.InRegex(text); want == "" && got != "" || !strings.Contains(got, want) {
				t.Errorf("InRegex(%q) = %q want %q", text, got, want)
			}
		}
	}
}

func TestIn(t *testing.T) {
	for want, texts := range map[string][]string{
		"": {
			"", "search", "GET /orders/{id}", "/pkg.Service/Method", "a b", "it's", "O\u2019Brien", "suche-f\u00fcr-alle", "f(x)[0]", `a "b"`, "a 'b'", "a `b`",
			"fr'ee", "free#", "#free", "http://a/b#c", "a//b", "#1", "a, b", "a;b", "k8s:app", "example.com.", "abc=", "C++", "*", "/api/*", "a/", "-a", "$a", "50%",
		},
		"a quote or a bracket": {
			"search]", "search}", "(search", "[search)", `search"`, "}{", "search'", "'search", "search`", "free}", "dogs'", "it's'",
			"\u201csearch\u201d", "\u2018search\u2019", "\u00absearch\u00bb", "search\u00b4", "search\u2019",
		},
		"white space":        {"search\n", " search", "search\u00a0", "search\t"},
		"cannot be seen":     {"sea\u200brch", "sea\u00a0rch", "sea\nrch", "sea\x00rch"},
		"part of a template": {"${POINT}", "{{ .Values.point }}"},
		`ends with ","`:      {"search,", "search ,", "'search' ,", `"search",`},
		`ends with ";"`:      {"search;"},
		`ends with ":"`:      {"search:"},
		`ends with "|"`:      {"search|"},
		`ends with "\\"`:     {`search\`, `search \`},
		`begins with ","`:    {", search", ",search"},
		`holds "//"`:         {"search // the search", "search //x"},
		`holds "#"`:          {"search # the search"},
		`holds "/*"`:         {"search /* x */"},
	} {
		for _, text := range texts {
			if got := slip.In(text); want == "" && got != "" || !strings.Contains(got, want) {
				t.Errorf("In(%q) = %q want %q", text, got, want)
			}
		}
	}
}
