package policy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headgate-go/headgate/policy"
)

// TestUnbalancedBrackets expects an error for a bracket or brace that opens or closes nothing. As text it would be part
// of a control point or a label that no flow has, and the limit would be missing.
func TestUnbalancedBrackets(t *testing.T) {
	const selectors, parameters = "[{control_point: checkout}]", "interval: 1s"
	for _, tt := range []struct {
		name, old, new, want string
	}{
		{"a brace is missing", selectors, "[control_point: checkout}]", `5:46: bad YAML: want "," or "]", have "}"`},
		{"a bracket for a brace", selectors, "\n            - {control_point: checkout]}", `6:39: bad YAML: want "," or "}", have "]"`},
		{"a bracket too many among parameters", parameters, "{interval: 1s, limit_by_label_key: user]}", `10:52: bad YAML: want "," or "}", have "]"`},
		{"a brace too many", selectors, "[{control_point: checkout}}]", `5:48: bad YAML: want "," or "]", have "}"`},
		{"a bracket too many", selectors, selectors + "]", `5:49: bad YAML: want a key, have "]"`},
		{"only a closing bracket", selectors, "]", `5:22: bad YAML: want a value, have "]"`},
		{"brackets that cross", selectors, "[{control_point: checkout]}", `5:47: bad YAML: want "," or "}", have "]"`},
		{"a comma is missing between lines", selectors, "[\n            {control_point: checkout}\n            {control_point: cart}]", `7:13: bad YAML: want "," or "]", have "{"; the bracket to close is in line 5`},
		{"a comma is missing between keys", selectors, "\n          - {control_point: checkout\n             agent_group: any}", `7:25: bad YAML: want "," or "}", have ":"; is a comma missing?`},
		{"a comma is missing between keys in a column", selectors, "\n          - {control_point: checkout\n            agent_group: any}", `7:24: bad YAML: want "," or "}", have ":"; is a comma missing?`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(edit(t, tt.old, tt.new)))
			if err == nil || !strings.HasPrefix(err.Error(), "limits.yaml:"+tt.want) {
				t.Errorf("Parse = %v, want limits.yaml:%s", err, tt.want)
			}
		})
	}
}

// TestUnclosed expects an error where the bracket or the quote is that nothing closes, however far behind it the library gives up.
func TestUnclosed(t *testing.T) {
	const selectors, parameters = "[{control_point: checkout}]", "interval: 1s"
	const bracket, brace = `bad YAML: "[" is not closed; "]" is missing`, `bad YAML: "{" is not closed; "}" is missing`
	const quote = "bad YAML: the quote that closes this text is missing"
	own := func(rest string) string {
		return "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n          at: " + rest
	}
	const numbers = "\n          capacity: 1\n          fill: 1\n          interval: 1s\n"
	for _, tt := range []struct {
		name, data, want string
	}{
		{"bracket around mappings", edit(t, selectors, "[{control_point: checkout}"), "5:22: " + bracket},
		{"brace at the end of the file", edit(t, parameters, "{interval: 1s"), "10:13: " + brace},
		{"bracket of a key in a list", edit(t, selectors, "\n            - control_point: [search\n              agent_group: any"), "6:30: " + bracket},
		{"bracket on a line of its own", edit(t, selectors, "\n            - control_point:\n                [search\n              agent_group: any"), "7:17: " + bracket},
		{"brace in a list", edit(t, selectors, "\n            - {control_point: search\n            - {control_point: cart}"), "6:15: " + brace},
		{"bracket before keys", own("[search" + numbers), "6:15: " + bracket},
		{"brace before keys", own("{search" + numbers), "6:15: " + brace},
		{"bracket before keys with brackets", own("[search" + numbers + "          when: [a]\n          x: b]\n"), "6:15: " + bracket},
		{"bracket after a closed one", own("[[a], [b]" + numbers), "6:15: " + bracket},
		{"bracket of two lines", own("[search,\n            cart" + numbers), "6:15: " + bracket},
		{"bracket that a comment hides", own("[search # ]" + numbers), "6:15: " + bracket},
		{"bracket before a document", own("[a]" + numbers + "---\n" + own("[b"+numbers) + "---\n" + own("[c]"+numbers)), "16:15: " + bracket},
		{"bracket before an empty document", own("[a" + numbers + "---\n"), "6:15: " + bracket},
		{"bracket before a value and a document", own("[a: \n---\n"), "6:15: " + bracket},
		{"quote before a document", own("['a]" + numbers + "---\n"), "6:16: " + quote},
		{"bracket before nothing", own("[a: "), "6:15: " + bracket},
		{"brace before nothing", own("[b, {a: "), "6:19: " + brace},
		{"bracket in JSON", "{\n  \"headgate\": 1,\n  \"policies\": [\n}\n", `4:1: bad YAML: want a value, have "}"`},
		{"bracket in a line of JSON", "{\n  \"headgate\": 1,\n  \"policies\": [1\n}\n", "3:15: " + bracket},
		{"comma in JSON", "{\n\"headgate\": 1\n\"policies\": []\n}\n", `3:11: bad YAML: want "," or "}", have ":"; is a comma missing?`},
		{"quote", edit(t, "checkout}", "'checkout}"), "5:39: " + quote},
		{"quote before keys", own(`["search]` + numbers), "6:16: " + quote},
		{"quote before a text in quotes", own(`["search]` + numbers + "          limit_by: \"user\"\n"), "6:16: " +
			"bad YAML: the text that begins with this quote ends in line 10, and more follows; is the quote that closes it missing?"},
		{"quote of a key before a text in quotes", own("\n            - 'search" + numbers + "          limit_by: 'user'\n"), "7:15: " +
			"bad YAML: the text that begins with this quote ends in line 11, and more follows; is the quote that closes it missing?"},
		{"quote before one that is not closed either", own(`["search]` + numbers + "          limit_by: it's\n"), "6:16: " + quote},
		{"text behind quotes", own(`["sea"rch]` + numbers), `6:21: bad YAML: want "," or "]", have "r"`},
		{"text behind quotes of two lines", own("[\"a\n             b\", c: d: e]" + numbers), `7:22: bad YAML: want "," or "]", have ":"; is a comma missing?`},
	} {
		for _, end := range []string{"\n", "\r\n"} {
			t.Run(fmt.Sprintf("%s/%q", tt.name, end), func(t *testing.T) {
				_, err := policy.Parse("limits.yaml", []byte(strings.ReplaceAll(tt.data, "\n", end)))
				if err == nil || !strings.HasPrefix(err.Error(), "limits.yaml:"+tt.want) {
					t.Errorf("Parse = %v, want limits.yaml:%s", err, tt.want)
				}
			})
		}
	}
}

// plan returns the value of the label that a rate limiter of base matches, as the file writes it.
func plan(t *testing.T, file func(string) string, written string) (string, error) {
	t.Helper()
	policies, err := policy.Parse("limits.yaml", []byte(file(edit(t, "[{control_point: checkout}]",
		"\n            - control_point: checkout\n              label_matcher:\n                match_labels:\n                  plan: "+written))))
	if err != nil {
		return "", err
	}
	return policies[0].Components[0].(policy.RateLimiter).Selectors[0].Labels.Equal["plan"], nil
}

func TestTextOfSeveralLines(t *testing.T) {
	const indent = "\n                    "
	same := func(s string) string { return s }
	for _, tt := range []struct{ name, written, want string }{
		{"double quotes", `"gold` + indent + `plus"`, "gold plus"},
		{"single quotes", "'gold" + indent + "plus'", "gold plus"},
		{"blank line in quotes", "\"gold\n" + indent + `plus"`, "gold\nplus"},
		{"unquoted", "gold" + indent + "plus", "gold plus"},
		{"folded", ">-" + indent + "gold" + indent + "plus", "gold plus"},
		{"folded with a blank line", ">-" + indent + "gold\n" + indent + "plus", "gold\nplus"},
		{"literal", "|-" + indent + "gold" + indent + "plus", "gold\nplus"},
		{"folded, of one character", ">-" + indent + "gold" + indent + "B", "gold B"},
		{"dash in quotes", "\"gold" + indent + "- plus\"", "gold - plus"},
		{"dash in the first line", "gold - plus" + indent + "more", "gold - plus more"},
	} {
		for ends, file := range map[string]func(string) string{
			"Unix":    same,
			"Windows": func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") },
			"old Mac": func(s string) string { return strings.ReplaceAll(s, "\n", "\r") },
		} {
			if got, err := plan(t, file, tt.written); err != nil || got != tt.want {
				t.Errorf("%s, with %s line ends: %q, %v, want %q", tt.name, ends, got, err, tt.want)
			}
		}
	}

	// The same where the text ends with the file, without a line end.
	for _, style := range []string{">-", "|-"} {
		const tail = "\n            interval:"
		file := strings.Replace(base, tail+" 1s\n", tail+" "+style+"\n              1s", 1)
		if _, err := policy.Parse("limits.yaml", []byte(file)); err != nil {
			t.Errorf("%s at the end of the file: %v", style, err)
		}
	}
}

// TestScalars reads each form of unquoted text of YAML 1.1 and 1.2. Digits that readers of the two take for different
// values are an error. The words, times and dates of YAML 1.1 are text, which is what they look like, and an error where
// text is not wanted.
func TestScalars(t *testing.T) {
	const isText, octal = "", "is octal to some readers of YAML and decimal to others"
	const disputed = "is a number to some readers of YAML and text to others"
	for _, tt := range []struct {
		written string
		number  string // what it is for an amount, or part of the error
		text    string // of the error as a label's value; none if it is text
	}{
		{"10", "10", "have a number; quote it"},
		{"+10", "10", "have a number; quote it"},
		{"0x10", "16", "have a number; quote it"},
		{"0xFFFFFFFFFFFFFFFFFF", "4.722366482869645e+21", "have a number; quote it"},
		{"+0x10", disputed, disputed},
		{"-0x10", disputed, disputed},
		{"0x1_0", disputed, disputed},
		{"0X10", "have a string", isText},
		{"0o10", disputed, disputed},
		{"+0o10", disputed, disputed},
		{"0o1_0", disputed, disputed},
		{"0o8", "have a string", isText},
		{"0O10", "have a string", isText},
		{"0b10", disputed, disputed},
		{"-0b1_0", disputed, disputed},
		{"0b2", "have a string", isText},
		{"0B10", "have a string", isText},
		{"010", octal, octal},
		{"-08", octal, octal},
		{"00", "0", "have a number; quote it"},
		{"007.5", "7.5", "have a number; quote it"},
		{"08.5", "8.5", "have a number; quote it"},
		{"0_7", disputed, disputed},
		{"0_0", disputed, disputed},
		{"1_000", disputed, disputed},
		{"+1_000", disputed, disputed},
		{"40_", disputed, disputed},
		{"4__0", disputed, disputed},
		{"1_0.5", disputed, disputed},
		{"1.5_0", disputed, disputed},
		{".5_0", disputed, disputed},
		{"1_0e3", disputed, disputed},
		{"_40", "have a string", isText},
		{"4_0s", "have a string", isText},
		{"1e3", "1000", "have a number; quote it"},
		{"1e+3", "1000", "have a number; quote it"},
		{"1.e3", "1000", "have a number; quote it"},
		{".5e1", "5", "have a number; quote it"},
		{"1.5E+1", "15", "have a number; quote it"},
		{".5", "0.5", "have a number; quote it"},
		{"+.5", "0.5", "have a number; quote it"},
		{".", "have a string", isText},
		{"+", "have a string", isText},
		{"5.", "5", "have a number; quote it"},
		{"-0", "-0", "have a number; quote it"},
		{".inf", "is +Inf", "have a number; quote it"},
		{"-.INF", "is -Inf", "have a number; quote it"},
		{"+.Inf", "is +Inf", "have a number; quote it"},
		{".nan", "is NaN", "have a number; quote it"},
		{"+.nan", "have a string", isText},
		{".iNF", "have a string", isText},
		{"1e999", "is +Inf", "have a number; quote it"},
		{"inf", "have a string", isText},
		{"+inf", "have a string", isText},
		{"NaN", "have a string", isText},
		{"0x1p4", "have a string", isText},
		{"0x", "have a string", isText},
		{"1e", "have a string", isText},
		{"1,000", "have a string", isText},
		{"1:30", "have a string", isText},
		{"190:20:30", "have a string", isText},
		{"1:30.5", "have a string", isText},
		{"1e3s", "have a string", isText},
		{"1.2.3", "have a string", isText},
		{"2020-01-01", "have a string", isText},
		{"2020-01-01T00:00:00Z", "have a string", isText},
		{"2001-12-14 21:59:43.10 -5", "have a string", isText},
		{"true", "have a boolean", "have a boolean; quote it"},
		{"FALSE", "have a boolean", "have a boolean; quote it"},
		{"yes", "have a string", isText},
		{"No", "have a string", isText},
		{"True", "have a boolean", "have a boolean; quote it"},
		{"on", "have a string", isText},
		{"off", "have a string", isText},
		{"y", "have a string", isText},
		{"N", "have a string", isText},
		{"YES", "have a string", isText},
		{"OFF", "have a string", isText},
		{"tRUE", "have a string", isText},
		{"~", "wants one of", "have nothing"},
		{"null", "wants one of", "have nothing"},
		{"Null", "wants one of", "have nothing"},
		{"nil", "have a string", isText},
		{"", "wants one of", "have nothing"},
		{"<<", "have a string", isText},
		{"=", "have a string", isText},
		{"a\tb", "have a string", isText},
		{"org:acme", "have a string", isText},
		{"http://a/b#c", "have a string", isText},
		{"!!int 5", "tags are not supported", "tags are not supported"},
		{"! 5", "tags are not supported", "tags are not supported"},
		{"@a", `text cannot begin with "@"; quote it`, `text cannot begin with "@"; quote it`},
		{"`a`", "text cannot begin with \"`\"; quote it", "text cannot begin with \"`\"; quote it"},
		{"%a", `text cannot begin with "%"; quote it`, `text cannot begin with "%"; quote it`},
	} {
		got, err := plan(t, func(s string) string { return s }, tt.written)
		switch {
		case tt.text == isText && (err != nil || got != tt.written):
			t.Errorf("as text, %q = %q, %v", tt.written, got, err)
		case tt.text != isText && (err == nil || !strings.Contains(err.Error(), tt.text)):
			t.Errorf("as text, %q = %q, %v, want the error %s", tt.written, got, err, tt.text)
		}
		policies, err := policy.Parse("limits.yaml", []byte(edit(t, "{constant_signal: {value: 10}}", "\n              constant_signal:\n                value: "+tt.written)))
		if err == nil {
			err = fmt.Errorf("%v", policies[0].Components[0].(policy.RateLimiter).Capacity)
		}
		if !strings.Contains(err.Error(), tt.number) || err.Error() != tt.number && !strings.HasPrefix(err.Error(), "limits.yaml:") {
			t.Errorf("as a number, %q = %v, want %s", tt.written, err, tt.number)
		}
	}
	for _, boolean := range []string{"yes", "No", "on", "off", "y", "tRUE"} {
		_, err := policy.Parse("limits.yaml", []byte(edit(t, "interval: 1s", "{interval: 1s, continuous_fill: "+boolean+"}")))
		if err == nil || !strings.HasSuffix(err.Error(), "want a boolean, have a string; write true or false") {
			t.Errorf("as a boolean, %s = %v", boolean, err)
		}
	}
	for _, duration := range []string{"1e3s", "1:30", "1_000s", "1d", "P1D", "2020-01-01"} {
		_, err := policy.Parse("limits.yaml", []byte(edit(t, "1s", duration)))
		if err == nil || !strings.Contains(err.Error(), `bad duration "`+duration+`"`) {
			t.Errorf("as a duration, %s = %v", duration, err)
		}
	}
}

func TestParseYAML(t *testing.T) {
	labels := func(yaml string) string {
		return edit(t, "checkout}", "checkout, label_matcher: {match_labels: "+yaml+"}}")
	}
	list := func(yaml string) string {
		return edit(t, "checkout}", "checkout, label_matcher: {match_list: [{key: tenant, operator: In, values: "+yaml+"}]}}")
	}
	for _, tt := range []struct{ name, data, want string }{ // want: part of the error, or nothing
		{"colons in a list in braces", list("[org:acme, org:globex]"), ""},
		{"colon in a key", labels("{k8s:app: shop}"), ""},
		{"number that readers dispute", edit(t, "{value: 10}", "{value: 1_0}"), `7:56: is a number to some readers of YAML and text to others; write it in decimal`},
		{"number that readers dispute for a key", labels("{0o10: a}"), `5:80: is a number to some readers`},
		{"two merges", labels("{<<: {a: b}, <<: {c: d}}"), "5:92: duplicate key, first at line 5, column 80"},
		{"one merge of two", labels("{<<: [{a: b}, {c: d}]}"), ""},
		{"number for a key", labels("{404: a}"), "5:80: want a string for a key, have a number; quote it"},
		{"number for a key in quotes", labels(`{"404": a}`), ""},
		{"boolean for a key", labels("{true: a}"), "5:80: want a string for a key, have a boolean; quote it"},
		{"null for a key", labels("{~: a}"), "5:80: want a string for a key, have nothing; quote it"},
		{"sequence for a key", labels("{[a]: a}"), "5:80: want a string for a key, have a sequence"},
		{"key with a question mark", labels("{? a : b}"), ""},
		{"item that is indented too far", edit(t, "[{control_point: checkout}]", "\n            - control_point: checkout\n"+
			"              label_matcher:\n                match_list:\n                  - key: tenant\n                    operator: In\n"+
			"                    values:\n                      - acme\n                        - globex"), `13:25: "- " continues the text of line 12; is it indented too far?`},
		{"text that is broken by accident", edit(t, "checkout}", "check\nout}"), "6:1: continues the text of line 5 and is indented less"},
		{"text that is broken by accident, a little indented", edit(t, "checkout}", "check\n  out}"), "6:3: continues the text of line 5 and is indented less"},
		{"colon that is indented too far", edit(t, "            fill_amount", "              fill_amount"), "8:15: bad YAML: want a key"},
		{"tab for indentation", "circuit:\n\tcomponents: []\n", "2:1: bad YAML: tab in the indentation; indent with spaces"},
		{"no-break space for indentation", edit(t, "            interval", "          \u00a0 interval"), "10:11: bad YAML: U+00A0 in the indentation, which is no space; indent with spaces"},
		{"em space for indentation", edit(t, "            interval", "\u2003           interval"), "10:1: bad YAML: U+2003 in the indentation"},
		{"zero-width space in the indentation", edit(t, "            interval", "            \u200binterval"), "10:13: bad YAML: U+200B in the indentation"},
		{"byte order mark in the indentation", edit(t, "            interval", "            \ufeffinterval"), "10:13: holds a byte order mark"},
		{"no-break space behind a dash", "headgate: 1\npolicies:\n  -\u00a0name: p\n", "3:4: bad YAML: U+00A0 in the indentation"},
		{"no-break space that ends a list", "headgate: 1\npolicies:\n  - name: p\n\u00a0   components: []\n", "4:1: bad YAML: U+00A0 in the indentation"},
		{"no-break space in a line without a colon", "headgate: 1\n\u00a0 policies\nother: 1\n", "2:1: bad YAML: U+00A0 in the indentation"},
		{"no-break space before a comment", edit(t, "interval: 1s", "interval: 1s\n              \u00a0# often"), "11:15: bad YAML: U+00A0 in the indentation"},
		{"no-break space in a list in brackets", labels("{a: b,\n \u00a0 c: d}"), "6:2: bad YAML: U+00A0 in the indentation"},
		{"no-break space in the lines of a block", "# |\n" + edit(t, "interval: 1s", "interval: 1s\nx-notes: |\n  a\n  \u00a0 b\n\n  \u200bc"), ""},
		{"no-break space in the lines of quotes", labels("{a: \"b\n  \u00a0 c\"}"), ""},
		{"no-break space behind an anchor", labels("{a:\n &a \u00a0b}"), ""},
		{"no-break space within a line", labels("{a: \u00a0c}"), ""},
		{"no-break space in text", labels("{a: \"1\u00a0000\"}"), ""},
		{"duration that is too long", edit(t, "interval: 1s", "interval: 9999999h"), `duration "9999999h" is too long; the longest is "2562047h"`},
		{"duration that is too long, of several parts", edit(t, "interval: 1s", "interval: 2562047h59m"), `duration "2562047h59m" is too long`},
		{"tab after spaces", edit(t, "            interval", "          \tinterval"), "10:11: bad YAML: tab in the indentation; indent with spaces"},
		{"tab below a key of blueprint values", "blueprint: rate-limiting/base\npolicy:\n\tpolicy_name: a\n", "3:1: bad YAML: tab in the indentation; indent with spaces"},
		{"tab in a regular expression that is wrong", edit(t, "checkout}", "a, label_matcher: {expression: {label_matches: {label: l, regex: \"(\\t\"}}}}"), "missing closing ): `(\\t`"},
		{"no colon", edit(t, "circuit:", "x-a\ncircuit:"), "2:8: bad YAML: a colon is not allowed here"},
		{"no space behind a colon", edit(t, "interval: 1s", "interval:1s"), "parameters: want a mapping, have a string"},
		{"quote that is not closed", edit(t, "checkout}", "'checkout}"), "5:39: bad YAML: the quote that closes this text is missing"},
		{"unknown escape", edit(t, "checkout}", `"\d"}`), `5:40: bad YAML: unknown escape in double quotes; write \\ for a backslash`},
		{"text behind quotes", edit(t, "1s", "'1s' 2s"), `10:28: bad YAML: want a key, have "2"`},
		{"list in the line of its key", edit(t, "[{control_point: checkout}]", "- {}"), `5:22: bad YAML: a list that begins with "- " needs a line of its own`},
		{"two keys in a line", edit(t, "interval: 1s", "interval: 1s: x"), "10:25: bad YAML: a colon is not allowed here"},
		{"tag directive", "%TAG ! x\n---\n" + base, "1:1: YAML directives are not supported"},
		{"unknown directive", "%FOO\n---\n" + base, "YAML directives are not supported"},
		{"directives of two documents", "%FOO\n%YAML 1.2\n---\n" + resource("a") + "\n...\n%YAML 1.2\n---\n" + resource("b"), "limits.yaml:1:1: YAML directives are not supported\nlimits.yaml:20:1: YAML directives are not supported"},
		{"directive behind a document's beginning", "---\n# a\n%YAML 1.2\n" + base, "3:1: YAML directives are not supported"},
		{"directive behind a document", base + "%YAML 1.2\n---\n" + resource("b"), `11:1: bad YAML: text cannot begin with "%"; quote it`},
		{"an error besides a directive", "%YAML 1.2\n---\ncircuit: []\n", "limits.yaml:1:1: YAML directives are not supported\nlimits.yaml:3:10: circuit: want a mapping, have a sequence"},
		{"older version", "%YAML 1.1\n---\n" + base, "1:1: YAML directives are not supported"},
		{"zero byte", edit(t, "checkout", "check\x00out"), "5:44: holds a zero byte"},
		{"control character", edit(t, "checkout", "check\x07out"), `5:44: holds the control character U+0007; write it as \u0007 in double quotes`},
		{"not UTF-8", edit(t, "checkout", "\u00fc\xffout"), "5:40: is not UTF-8"},
		{"UTF-16", "\xff\xfea\x00:\x00", "1:1: is UTF-16; save it as UTF-8"},
		{"UTF-16, the other end first", "\xfe\xff\x00a\x00:", "1:1: is UTF-16; save it as UTF-8"},
		{"UTF-16 without a mark", "a\x00:\x00", "1:2: holds a zero byte; is it text, saved as UTF-8?"},
		{"line separator", edit(t, "checkout", "check\u2028out"), "5:44: holds U+2028, which may be a line end or text"},
		{"line separator in a comment", "# a\u2028b: c\n" + base, "1:4: holds U+2028, which may be a line end or text"},
		{"next line", edit(t, "checkout", "check\u0085out"), "5:44: holds U+0085, which may be a line end or text"},
		{"byte order mark in a document", base + "\ufeff" + base, "11:1: holds a byte order mark that is not at its beginning"},
		{"anchor in ASCII", edit(t, "1s", "&a.b/C-9 1s"), ""},
		{"anchor in other characters", edit(t, "1s", "&\u00fc 1s"), "10:24: bad YAML: did not find expected alphabetic or numeric character while scanning an anchor"},
		{"colons in brackets, behind the mapping around them", edit(t, "\n            interval: 1s", " {\n    \"interval\": \"1s\"\n}"), ""},
		{"colon in brackets, before the mapping around them", edit(t, "\n            interval: 1s", " {\n\"interval\": \"1s\"\n}"), "10:11: bad YAML: a colon is not allowed here"},
		{"errors of several documents", resource("a]") + "\n---\n" + resource("b]") + "\n", "\nlimits.yaml:19:19: bad YAML: "},
		{"JSON with surrogates", `{"x-note": "a \ud83d\ude00"}`, `1:15: JSON's escapes of two surrogates are not supported; write the character itself, or \U0001F600`},
		{"JSON with half of a pair", `{"x-note": "a \ud83d"}`, `1:15: bad YAML: this escape is no character of YAML`},
		{"JSON with a slip", `{"circuit": {"components": [}}`, `1:29: bad YAML: want a value, have "}"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(tt.data))
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("Parse = %v, want %q", err, tt.want)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\uFFFD\t") {
				t.Errorf("the error hides a character: %q", err)
			}
		})
	}
}

func TestMisplacedKeys(t *testing.T) {
	for _, tt := range []struct{ name, data, want string }{
		{"port among parameters", edit(t, "interval: 1s", "{interval: 1s, bucket_capacity: 1}"), limiter + ".parameters.bucket_capacity: unknown key; it belongs in rate_limiter.in_ports"},
		{"port among parameters, in another style", edit(t, "interval: 1s", "{interval: 1s, bucketCapacity: 1}"), `bucketCapacity: unknown key; did you mean "bucket_capacity", which belongs in rate_limiter.in_ports?`},
		{"parameter above", edit(t, "          parameters:", "          interval: 1s\n          parameters:"), limiter + ".interval: unknown key; it belongs in rate_limiter.parameters"},
		{"indentation that is lost", edit(t, "            interval", "          interval"), limiter + ".interval: unknown key; it belongs in rate_limiter.parameters, indented further"},
		{"indentation of a limiter that is lost", "circuit:\n  components:\n    - flow_control:\n      rate_limiter: {}\n", "circuit.components[0].rate_limiter: unknown key; it belongs in flow_control, indented further"},
		{"a key of flows that wait", scheduled("at: [a], priority: 3"), "quota_scheduler.priority: unknown key; it belongs in quota_scheduler.default or quota_scheduler.workloads[]\n"},
		{"tokens of flows that wait", scheduled("at: [a], tokens: 3"), "quota_scheduler.tokens: unknown key; it belongs in quota_scheduler.default or quota_scheduler.workloads[]\n"},
		{"their timeout", scheduled("at: [a], queue_timeout: 3s"), "quota_scheduler.queue_timeout: unknown key; it belongs in quota_scheduler.default or quota_scheduler.workloads[]\n"},
		{"labels of flows for an escalation", ofOwn("at: [a], when: {plan: free}"), "limits.yaml:5:75: policies[0].components[0].rate_limiter.when: wants load, below and the like, which make an escalation; labels of flows belong in when of selectors[]\n"},
		{"an escalation where there is none", strings.Replace(ofOwn("at: [a], when: {load: x, below: 1}"), "rate_limiter", "concurrency_limiter", 1), "concurrency_limiter.when: unknown key; an escalation is for rate_limiter and quota_scheduler\n"},
		{"scheduler of Aperture's files", scheduled("at: [a], scheduler: {}"), "quota_scheduler.scheduler: unknown key; what it has in Aperture's files stands beside the other keys here\n"},
		{"parameters of Aperture's files", ofOwn("at: [a], parameters: {}"), "rate_limiter.parameters: unknown key; what it has in Aperture's files stands beside the other keys here\n"},
		{"ports of Aperture's files", ofOwn("at: [a], in_ports: {}"), "rate_limiter.in_ports: unknown key; what it has in Aperture's files stands beside the other keys here\n"},
		{"matcher of Aperture's files", ofOwn("at: [a], label_matcher: {}"), "rate_limiter.label_matcher: unknown key; what it has in Aperture's files is when, require and expression in selectors[]\n"},
		{"matcher of Aperture's files in a workload", scheduled("at: [a], workloads: [{label_matcher: {}}]"), "workloads[0].label_matcher: unknown key; what it has in Aperture's files is when, require and expression here\n"},
		{"parameters of a quota scheduler", "circuit: {components: [{flow_control: {quota_scheduler: {parameters: {}}}}]}", "quota_scheduler.parameters: unknown key; what it has in a rate_limiter belongs in rate_limiter here\n"},
		{"parameters of a concurrency scheduler", "circuit: {components: [{flow_control: {concurrency_scheduler: {parameters: {}}}}]}", "concurrency_scheduler.parameters: unknown key; what it has in a concurrency_limiter belongs in concurrency_limiter here\n"},
		{"request parameters of a scheduler", "circuit: {components: [{flow_control: {concurrency_scheduler: {request_parameters: {}}}}]}", "concurrency_scheduler.request_parameters: unknown key; what it has in a limiter belongs in scheduler here\n"},
		{"ports in a blueprint", strings.Replace(values, "    selectors", "    in_ports: {}\n    selectors", 1), "policy.rate_limiter.in_ports: unknown key; what it has in a circuit stands beside the other keys here\n"},
		{"name beside the policy of a blueprint", "policy_name: a\n" + values, ":1:1: policy_name: unknown key; it belongs in policy\n"},
		{"limiter beside the policy of a blueprint", "rate_limiter: {}\n" + values, ":1:1: rate_limiter: unknown key; it belongs in policy\n"},
		{"two letters of three", scheduled("at: [a], workloads: [{expression: {al: []}}]"), `expression.al: unknown key; did you mean "all"?`},
		{"two letters of three, the first missing", scheduled("at: [a], workloads: [{expression: {ny: []}}]"), `expression.ny: unknown key; did you mean "any"?`},
		{"a wrong letter of two", strings.Replace(ofOwn("az: [a]"), "rate_limiter", "concurrency_limiter", 1), `concurrency_limiter.az: unknown key; did you mean "at"?`},
		{"a key of two letters at another place", "headgate: 1\nat: [a]\npolicies: [{name: p, components: []}]\n", "at: unknown key; it belongs in "},
		{"a key of a component below the policy", "headgate: 1\npolicies: [{name: p, max_inflight: 1s}]\n", "max_inflight: unknown key; it belongs in concurrency_limiter or concurrency_scheduler"},
		{"a key of a component in metadata", strings.Replace(resource("x"), "name: x", "name: x, control_point: a", 1), "metadata.control_point: unknown key; it belongs in "},
		{"two letters of three, the middle one missing", strings.Replace(ofOwn("at: [a], mx: 1"), "rate_limiter", "concurrency_limiter", 1), `concurrency_limiter.mx: unknown key; did you mean "max"?`},
		{"two letters of three in two words", scheduled("at: [a], workloads: [{expression: {xx: []}}]"), "expression.xx: unknown key\n"},
		{"labels of flows where there is no escalation", strings.Replace(ofOwn("at: [a], when: {plan: free}"), "rate_limiter", "concurrency_limiter", 1), "when: unknown key; it belongs in concurrency_limiter.selectors[]\n"},
		{"a misspelt key of an escalation", ofOwn("at: [a], when: {laod: x}"), `when.laod: unknown key; did you mean "load"?`},
		{
			"indentation of a component that is lost", "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n        at: [a]\n        capacity: 1\n",
			"limits.yaml:6:9: policies[0].components[0].at: unknown key; it belongs in rate_limiter, indented further\n" +
				"limits.yaml:7:9: policies[0].components[0].capacity: unknown key; it belongs in rate_limiter, indented further\n",
		},
		{
			"indentation that is lost in part", "headgate: 1\npolicies:\n  - name: p\n    components:\n      - concurrency_scheduler:\n          at: [a]\n        max_inflight: 1s\n",
			"limits.yaml:7:9: policies[0].components[0].max_inflight: unknown key; it belongs in concurrency_scheduler\n",
		},
		{
			"indentation that is lost below an escalation", ofOwn("at: [a], when: , below: 1"),
			"rate_limiter.below: unknown key; it belongs in rate_limiter.when, indented further\n",
		},
		{"misspelt, and indentation that is lost", edit(t, "            interval", "          intervall"), limiter + `.intervall: unknown key; did you mean "interval", which belongs in rate_limiter.parameters, indented further?`},
		{"misspelt, and indentation of a limiter that is lost", "circuit:\n  components:\n    - flow_control:\n      rate_limitr: {}\n", `circuit.components[0].rate_limitr: unknown key; did you mean "rate_limiter", which belongs in flow_control, indented further?`},
		{"misspelt, and indentation of a selector's part that is lost", edit(t, "[{control_point: checkout}]", "\n            - control_point: a\n              label_matcher:\n              match_labls: {}"), `match_labls: unknown key; did you mean "match_labels", which belongs in rate_limiter.selectors[].label_matcher, indented further?`},
		{"misspelt, and indentation of metadata that is lost", "apiVersion: fluxninja.com/v1alpha1\nkind: Policy\nmetadata:\nnme: x\nspec: {}\n", `nme: unknown key; did you mean "name", which belongs in metadata, indented further?`},
		{
			"misspelt, and indentation of a component that is lost", "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n        att: [a]\n        capacty: 1\n",
			`limits.yaml:6:9: policies[0].components[0].att: unknown key; did you mean "at", which belongs in rate_limiter, indented further?` + "\n" +
				`limits.yaml:7:9: policies[0].components[0].capacty: unknown key; did you mean "capacity", which belongs in rate_limiter, indented further?` + "\n",
		},
		{
			"misspelt, and indentation that is lost in part", "headgate: 1\npolicies:\n  - name: p\n    components:\n      - concurrency_scheduler:\n          at: [a]\n        max_inflite: 1s\n",
			`limits.yaml:7:9: policies[0].components[0].max_inflite: unknown key; did you mean "max_inflight", which belongs in concurrency_scheduler?` + "\n",
		},
		{"misspelt, and indentation that is lost below an escalation", ofOwn("at: [a], when: , belw: 1"), `rate_limiter.belw: unknown key; did you mean "below", which belongs in rate_limiter.when, indented further?`},
		{"misspelt, where two kinds have the key", "headgate: 1\npolicies:\n  - name: p\n    components:\n      - rate_limiter:\n        quota_scheduler:\n        capacty: 1\n", `did you mean "capacity", which belongs in quota_scheduler, indented further?`},
		{"parameter below", edit(t, "interval: 1s", "{interval: 1s, selectors: []}"), "parameters.selectors: unknown key; it belongs in rate_limiter"},
		{"parameter of requests", edit(t, "interval: 1s", "{interval: 1s, tokens_label_key: a}"), "it belongs in rate_limiter.request_parameters"},
		{"control point of a limiter", edit(t, "          parameters:", "          control_point: a\n          parameters:"), limiter + ".control_point: unknown key; it belongs in rate_limiter.selectors[]"},
		{"labels of a selector", edit(t, "checkout}", "checkout, match_labels: {}}"), "match_labels: unknown key; it belongs in rate_limiter.selectors[].label_matcher"},
		{"parameter of another kind", edit(t, "interval: 1s", "{interval: 1s, max_inflight_duration: 1s}"), "max_inflight_duration: unknown key; it belongs in concurrency_limiter.parameters"},
		{"block of another kind", edit(t, "          parameters:", "          scheduler: {}\n          parameters:"), "scheduler: unknown key; it belongs in concurrency_scheduler or quota_scheduler"},
		{"value of a port", edit(t, "{constant_signal: {value: 10}}", "{value: 10}"), "value: unknown key; it belongs in rate_limiter.in_ports.bucket_capacity.constant_signal"},
		{"limiter beside flow_control", "circuit: {components: [{rate_limiter: {}}]}", "circuit.components[0].rate_limiter: unknown key; it belongs in flow_control"},
		{"components at the top", "components: []\n" + base, "components: unknown key; it belongs in circuit"},
		{"circuit beside spec", resource("x") + "\ncircuit: {}", "circuit: unknown key; it belongs in spec"},
		{"port of a circuit in a blueprint", strings.Replace(values, "    selectors", "    limit_by_label_key: a\n    selectors", 1), "policy.rate_limiter.limit_by_label_key: unknown key; it belongs in policy.rate_limiter.parameters"},
		{"shape that is misspelt", "blueprnt: rate-limiting\npolicy: {}\n", `blueprnt: unknown key; did you mean "blueprint"?`},
		{"no space behind a colon", edit(t, "checkout}", "checkout, service:a}"), `selectors[0]["service:a"]: unknown key; is a space missing behind "service:"?`},
		{"limit_by", edit(t, "interval: 1s", "{interval: 1s, limit_by: a}"), `limit_by: unknown key; did you mean "limit_by_label_key"?`},
		{"capacity", edit(t, "bucket_capacity", "capacity"), `capacity: unknown key; did you mean "bucket_capacity"?`},
		{"fill", edit(t, "fill_amount", "fill"), `fill: unknown key; did you mean "fill_amount"?`},
		{"params", edit(t, "parameters:", "params:"), `params: unknown key; did you mean "parameters"?`},
		{"labels", edit(t, "checkout}", "checkout, label_matcher: {labels: {}}}"), `labels: unknown key; did you mean "match_labels"?`},
		{"labels beside the control point", edit(t, "checkout}", "checkout, labels: {}}"), `labels: unknown key; did you mean "label_matcher"?`},
		{"constant", edit(t, "{constant_signal: {value: 10}}", "{constant: {value: 10}}"), `constant: unknown key; did you mean "constant_signal"?`},
		{"dynamicConfig in a plain file", edit(t, "          parameters:", "          dynamicConfig: {}\n          parameters:"), limiter + ".dynamicConfig: unknown key; dynamicConfig belongs at the top of a resource, or of blueprint values"},
		{"dynamicConfig at the top of a plain file", "dynamic_config: {}\n" + base, "dynamic_config: unknown key; dynamicConfig belongs at the top of a resource, or of blueprint values"},
		{"dynamicConfig in a resource", strings.Replace(resource("x"), "name: x", "name: x, dynamicConfig: {}", 1), "metadata.dynamicConfig: unknown key; it belongs in the top of the document"},
		{"two bytes swapped", strings.Replace(resource("x"), "kind:", "knid:", 1), `knid: unknown key; did you mean "kind"?`},
		{"two bytes swapped in a name", strings.Replace(resource("x"), "name:", "nmae:", 1), `nmae: unknown key; did you mean "name"?`}, //nolint:misspell // on purpose
		{"two bytes swapped in spec", strings.Replace(resource("x"), "spec:", "sepc:", 1), `sepc: unknown key; did you mean "spec"?`},
		{"two bytes swapped of two", edit(t, "checkout}", "checkout, label_matcher: {expression: {any: {fo: []}}}}"), `fo: unknown key; did you mean "of"?`},
		{"two misspelt keys", edit(t, "interval: 1s", "{intervall: 1s, contiuous_fill: true}"), `did you mean "interval"?` + "\n" + "limits.yaml:10:29: " + limiter + `.parameters.contiuous_fill: unknown key; did you mean "continuous_fill"?`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(tt.data))
			if err == nil || !strings.Contains(err.Error()+"\n", tt.want) {
				t.Errorf("Parse = %v, want %s", err, tt.want)
			}
		})
	}
}

func TestPlaceholders(t *testing.T) {
	const want = ": __REQUIRED_FIELD__ is to be replaced by a "
	resourceX := resource("x")
	for _, tt := range []struct{ name, data, want string }{
		{"control point", edit(t, "checkout", "__REQUIRED_FIELD__"), "limits.yaml:5:39: " + limiter + ".selectors[0].control_point" + want + "value"},
		{"policy name", strings.Replace(resourceX, "name: x", "name: __REQUIRED_FIELD__", 1), "limits.yaml:3:18: metadata.name" + want + "value"},
		{"policy name of a blueprint", strings.Replace(values, "per-tenant", "__REQUIRED_FIELD__", 1), "limits.yaml:3:16: policy.policy_name" + want + "value"},
		{"number", edit(t, "10", "__REQUIRED_FIELD__"), "limits.yaml:7:56: " + limiter + ".in_ports.bucket_capacity.constant_signal.value" + want + "value"},
		{"duration", edit(t, "1s", "__REQUIRED_FIELD__"), "limits.yaml:10:23: " + limiter + ".parameters.interval" + want + "value"},
		{"mapping", edit(t, "{constant_signal: {value: 10}}", "__REQUIRED_FIELD__"), "limits.yaml:7:30: " + limiter + ".in_ports.bucket_capacity" + want + "value"},
		{"list", edit(t, "[{control_point: checkout}]", "[__REQUIRED_FIELD__]"), "limits.yaml:5:23: " + limiter + ".selectors[0]" + want + "value"},
		{"label", edit(t, "checkout}", "a, label_matcher: {match_labels: {__REQUIRED_FIELD__: a}}}"), "limits.yaml:5:73: " + limiter + ".selectors[0].label_matcher.match_labels.__REQUIRED_FIELD__" + want + "key"},
		{"part of a text", edit(t, "checkout", "a-__REQUIRED_FIELD__"), "limits.yaml:5:39: " + limiter + ".selectors[0].control_point" + want + "value"},
		{"what is not used", strings.Replace(resourceX, "name: x", "name: x, namespace: __REQUIRED_FIELD__", 1), "limits.yaml:3:32: metadata.namespace" + want + "value"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := policy.Parse("limits.yaml", []byte(tt.data))
			if diff := cmp.Diff(tt.want, fmt.Sprint(err)); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
		})
	}
}

// The error of a number in quotes says to write it without quotes. The error of text that is no number to YAML either
// way does not.
func TestHintOfQuotedNumbers(t *testing.T) {
	for written, want := range map[string]string{
		`"10"`: "; write it without quotes", `'1.5e3'`: "; write it without quotes", `"0x10"`: "; write it without quotes",
		"Infinity": "", "NaN": "", `"0x1p4"`: "", "1k": "",
	} {
		_, err := policy.Parse("limits.yaml", []byte(edit(t, "{constant_signal: {value: 10}}", "{constant_signal: {value: "+written+"}}")))
		if err == nil || !strings.HasSuffix(err.Error(), "value: want a number, have a string"+want) {
			t.Errorf("Parse of %s = %v, want an error that ends with %q", written, err, want)
		}
	}
}

// Files that are put together have a byte order mark at the beginning of each document, and not only of the first.
func TestByteOrderMarks(t *testing.T) {
	const mark = "\ufeff"
	one, two := resource("one")+"\n", resource("two")+"\n"
	for _, end := range []string{"\n", "\r\n", "\r"} {
		for _, tt := range []struct {
			name, data string
			ok         bool
		}{
			{"none", one + "---\n" + two, true},
			{"the first", mark + one + "---\n" + two, true},
			{"before the line between", one + mark + "---\n" + two, true},
			{"after the line between", one + "---\n" + mark + two, true},
			{"after a comment in the line between", mark + "---\n" + one + "--- # two\n" + mark + two, true},
			{"after the end of a document", one + "...\n" + mark + "---\n" + two, true},
			{"in brackets", one + "---\n" + mark + `{"blueprint": "rate-limiting/base", "policy": {"policy_name": "two", "rate_limiter": {"bucket_capacity": 1, "fill_amount": 1, "selectors": [{"control_point": "a"}], "parameters": {"interval": "1s"}}}}` + "\n", true},
			{"twice", one + "---\n" + mark + mark + two, false},
			{"in a document", one + "---\n" + strings.Replace(two, "kind:", mark+"kind:", 1), false},
			{"in a value", one + "---\n" + strings.Replace(two, "two", mark+"two", 1), false},
		} {
			t.Run(fmt.Sprintf("%s/%q", tt.name, end), func(t *testing.T) {
				policies, err := policy.Parse("limits.yaml", []byte(strings.ReplaceAll(tt.data, "\n", end)))
				if ok := err == nil && len(policies) == 2 && policies[1].Name == "two"; ok != tt.ok || !tt.ok && !strings.Contains(fmt.Sprint(err), "holds a byte order mark") {
					t.Errorf("Parse = %d policies, %v", len(policies), err)
				}
			})
		}
	}
}
