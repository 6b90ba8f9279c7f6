package difftest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/headgate-go/headgate/internal/testing/race"
	"github.com/headgate-go/headgate/policy"
)

// knownFaults are what the other parser is known to misread, and what package policy refuses on purpose. Each is
// recognized by the error of package policy, or by the line that was changed.
var knownFaults = []struct {
	name          string
	refused, line *regexp.Regexp // of our error, or of the line; nil is none
}{
	{"takes brackets and braces that close nothing for text", regexp.MustCompile(`have "[\]}]"`), nil},
	{"takes a colon behind a missing comma, or one in a text, for text", regexp.MustCompile(`have ":"|a colon is not allowed here`), nil},
	{"refuses a colon that no space follows in a list in braces", nil, regexp.MustCompile(`[\[{].*:[^ ]|:,`)},
	{"refuses a line that ends between a key in braces and its colon", nil, regexp.MustCompile(`\{[^}]*[^,{}\s]$`)},
	{"takes quotes in wrong places, and text behind quotes, for text", nil, regexp.MustCompile(`["']`)},
	{"drops tabs, or takes them for indentation", nil, regexp.MustCompile(`\t`)},
	{"takes indicators where no text may begin with them for text", regexp.MustCompile("text cannot begin with|want a value, have|want a key, have"), nil},
	{"is lax about the indentation", regexp.MustCompile(`look at the indentation|needs a line of its own|is not closed|while scanning|is no "key: value"|continues the text|want the end of the document`), nil},
	{"reads tags, directives, anchors and aliases otherwise", nil, regexp.MustCompile(`[!%&*|>?]`)},
	{"takes # without a space before it for a comment", regexp.MustCompile("comment without preceding whitespace"), nil},
	{"takes numbers, booleans and null for keys", regexp.MustCompile(`want a string for a key|octal`), nil},
}

// TestMutations changes a character of a policy file, and has both parsers read it. They disagree if one refuses what
// the other accepts, or if they read different policies.
func TestMutations(t *testing.T) {
	files, err := filepath.Glob("../testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata: %v, %v", files, err)
	}
	const characters = "[]{}:,-#'\"\n\t 0a&*!|>?%@`~."
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same each time
	compared, faults := 0, map[string]int{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if problem := disagreement(file, data); problem != "" {
			t.Errorf("%s: %s", file, problem)
		}
		for range race.Pick(30, 150) {
			at, c := random.IntN(len(data)), characters[random.IntN(len(characters))]
			mutated := bytes.Clone(data)
			switch random.IntN(3) {
			case 0:
				mutated[at] = c
			case 1:
				mutated = append(mutated[:at], mutated[at+1:]...)
			default:
				mutated = append(mutated[:at], append([]byte{c}, data[at:]...)...)
			}
			compared++
			problem := disagreement(file, mutated)
			if problem == "" {
				continue
			}
			line := lineAt(mutated, at)
			if fault := known(problem, line); fault != "" {
				faults[fault]++
				continue
			}
			t.Errorf("%s, the line %q: %s", file, line, problem)
		}
	}
	t.Logf("%d compared; known faults: %v", compared, faults)
}

func known(problem, line string) string {
	for _, f := range knownFaults {
		if f.refused != nil && strings.HasPrefix(problem, "only we refuse") && f.refused.MatchString(problem) ||
			f.line != nil && f.line.MatchString(line) {
			return f.name
		}
	}
	return ""
}

func lineAt(data []byte, at int) string {
	at = min(at, len(data))
	begin := bytes.LastIndexByte(data[:at], '\n') + 1
	if end := bytes.IndexByte(data[at:], '\n'); end >= 0 {
		return string(data[begin : at+end])
	}
	return string(data[begin:])
}

// disagreement returns how the parsers disagree about a file.
func disagreement(file string, data []byte) string {
	ours, err := policy.Parse(file, data)
	theirs, otherErr := parse(file, data)
	switch {
	case err != nil && otherErr == nil:
		return fmt.Sprintf("only we refuse it: %v", err)
	case err == nil && otherErr != nil:
		return fmt.Sprintf("only the other parser refuses it: %v", otherErr)
	case err != nil:
		return ""
	}
	for i := range ours {
		ours[i].Warnings = nil
	}
	for i := range theirs {
		theirs[i].Warnings = nil
	}
	if !reflect.DeepEqual(ours, theirs) {
		return fmt.Sprintf("we read %+v, the other parser %+v", ours, theirs)
	}
	return ""
}

// parse reads a file with the other parser, and the values that it finds, as JSON, as policies.
func parse(file string, data []byte) ([]policy.Policy, error) {
	var policies []policy.Policy
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var document any
		if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if document == nil {
			continue
		}
		text, err := json.Marshal(document)
		if err != nil {
			return nil, err
		}
		more, err := policy.Parse(file, text)
		if err != nil {
			return nil, err
		}
		policies = append(policies, more...)
	}
	if policies == nil {
		return nil, errors.New("no policy")
	}
	return policies, nil
}
