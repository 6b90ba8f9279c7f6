package pattern_test

import (
	"regexp/syntax"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/pattern"
)

func TestCheck(t *testing.T) {
	for _, tt := range []struct{ name, expr, want string }{
		{"small", "^/api/v[0-9]+/", ""},
		{"as large as may be", "x{998}", ""},
		{"too large", "x{999}", "compiles to 1001 instructions, more than 1000"},
		{"too large by what it nests", "(?:x{0,30}){30}", "more than 1000"},
		{"too large by many words", "(?:one|two|six){400}", "more than 1000"},
		{"no expression", "(a", "missing closing )"},
		{"repeats too often", "x{2000}", "invalid repeat count"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := pattern.Check(tt.expr)
			if _, compiled := pattern.Compile(tt.expr); (compiled == nil) != (err == nil) {
				t.Errorf("Compile() = %v, Check() = %v", compiled, err)
			}
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("Check() = %v want %q", err, tt.want)
			}
		})
	}
}

// However dear an expression is, a match costs no more than so many instructions for each byte of the longest value. Package
// regexp takes time that is linear in both; how much that is depends on the machine, and is told.
func TestMatchIsBounded(t *testing.T) {
	const most = 1 << 18
	for _, tt := range []struct{ name, expr, value string }{
		{"optional", "(?:x?){490}y", "x"},
		{"few instructions", "(x+x+)+y", "x"},
		{"counted", "x{900}y", "x"},
		{"any text between", "(?:.*x){300}y", "x"},
		{"classes", `\pL{200}\d`, "é"},
		{"classes without", `(?:[^\pL\pN]?){100}\x{ffff}`, "-"},
		{"edges of words", `(?:\b\Bx?|\bx?|x?\B){50}$y`, "x"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := pattern.Compile(tt.expr)
			if err != nil {
				t.Fatal(err)
			}
			if work := instructions(t, tt.expr) * p.Longest(); work > most || work < most/2 {
				t.Errorf("values of up to %d bytes, for which a match costs %d want up to %d", p.Longest(), work, most)
			}
			value := strings.Repeat(tt.value, p.Longest()/len(tt.value))
			if _, ok := p.Match(value + "xx"); ok {
				t.Errorf("a value of %d bytes is matched, want up to %d", len(value)+2, p.Longest())
			}
			start := time.Now()
			if matches, ok := p.Match(value); matches || !ok {
				t.Errorf("Match() = %v, %v want no match", matches, ok)
			}
			t.Logf("%d bytes in %v", len(value), time.Since(start))
		})
	}
}

// instructions counts those of the expression's program.
func instructions(t *testing.T, expr string) int {
	t.Helper()
	parsed, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		t.Fatal(err)
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		t.Fatal(err)
	}
	return len(program.Inst)
}

// Values that clients of this module send, of up to 4 KiB, are matched by expressions of up to 64 instructions.
func TestUsualValuesAreMatched(t *testing.T) {
	for _, expr := range []string{"^/api/v[0-9]+/orders", "(?i)bot|crawl|spider|slurp", `^[0-9a-f]{8}-[0-9a-f]{4}`} {
		p, err := pattern.Compile(expr)
		if err != nil {
			t.Fatal(err)
		}
		if p.Longest() < 4096 {
			t.Errorf("%s matches values of up to %d bytes want 4096", expr, p.Longest())
		}
	}
}
