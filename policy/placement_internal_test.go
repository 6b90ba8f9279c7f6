package policy

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/headgate-go/headgate/internal/testing/race"
)

// shapesOfFiles are documents of all shapes, each with a key at the top that none has.
var shapesOfFiles = map[string]string{
	"own":             "headgate: 1",
	"plain":           "",
	"resource":        "apiVersion: fluxninja.com/v1alpha1, kind: Policy",
	"rate limiting":   "blueprint: rate-limiting/base",
	"load ramping":    "blueprint: load-ramping/base",
	"average latency": "blueprint: load-scheduling/average-latency",
}

// decoded reads a document, and returns its decoder and the messages of its errors by their fields.
func decoded(t *testing.T, text string) (d *decoder, wrong map[string]string) {
	t.Helper()
	r, errs := newReader("x.yaml", []byte(text))
	if r == nil {
		t.Fatal(errs)
	}
	wrong = map[string]string{}
	r.all(func(doc *node) bool {
		d = newDecoder("x.yaml")
		d.noting = true
		d.policies(doc, "x")
		for _, e := range d.errs {
			wrong[e.Field] = e.Message
		}
		return true
	})
	return d, wrong
}

// document returns a document that begins with the text, and has the fields in the mapping with the path.
func document(begins, path, fields string) string {
	text := "{" + fields + "}"
	for path != "" {
		at := strings.LastIndexAny(path, ".[")
		switch key := path[at+1:]; {
		case key != "0]":
			text = "{" + key + ": " + text + "}"
		case strings.HasSuffix(path[:at], overridesKey):
			text = "{value: " + text + "}"
		default:
			text = "[" + text + "]"
		}
		path = path[:max(at, 0)]
	}
	if begins != "" {
		text = "{" + begins + ", " + text[1:]
	}
	return text
}

// A hint at where a key belongs names only places that have it, wherever the key stands, and there is a hint for each key of the format.
// A decoder takes the key at those places.
func TestPlacesOfMisplacedKeys(t *testing.T) {
	homes := map[string]map[string][]string{}
	for shape, begins := range shapesOfFiles {
		d, _ := decoded(t, document(begins, "", "other: 1"))
		homes[shape] = d.homes
	}
	belongs, means := regexp.MustCompile(`belongs in ([^,?]+)`), regexp.MustCompile(`did you mean "(\w+)"`)
	for shape, begins := range shapesOfFiles {
		t.Run(shape, func(t *testing.T) {
			paths := map[string][]string{} // by what hints call them
			for path := range homes[shape] {
				paths[place(path)] = append(paths[place(path)], path)
			}
			own, tries := map[string]bool{}, []string{}
			for i, path := range slices.Sorted(maps.Keys(homes[shape])) {
				for _, key := range homes[shape][path] {
					own[key] = true
				}
				likePlain := shape != "own" && shape != "plain" && strings.Contains(path, "components[0]")
				if i%race.Pick(16, 1) == 0 && !likePlain {
					tries = append(tries, path)
				}
			}
			for _, path := range tries {
				var fields []string
				for _, key := range homes[shape][path] {
					if path != "" || !strings.Contains(begins, key+":") {
						fields = append(fields, key+": ")
					}
				}
				_, wrong := decoded(t, document(begins, path, strings.Join(fields, ", ")))
				for field, message := range wrong {
					if strings.Contains(message, "unknown key") {
						t.Errorf("hints send keys to %s, and it is wrong there: %s: %s", path, field, message)
					}
				}
			}
			tried := maps.Clone(own)
			for key := range strings.FieldsSeq("label_matcher in_ports parameters request_parameters scheduler headgate dynamicConfig limit_by_label_key az ty") {
				tried[key] = true
			}
			for _, path := range tries {
				keys := homes[shape][path]
				for some := range slices.Chunk(slices.Sorted(maps.Keys(tried)), mostErrors/2) {
					var fields []string
					for _, key := range some {
						if path == "" && has("headgate policies blueprint apiVersion kind metadata spec", key) {
							continue // it would make the document one of another shape
						}
						if !slices.Contains(keys, key) {
							fields = append(fields, key+": 1")
						}
					}
					_, wrong := decoded(t, document(begins, path, strings.Join(fields, ", ")))
					for _, key := range some {
						hint, unknown := strings.CutPrefix(wrong[child(path, key)], "unknown key")
						if !unknown || slices.Contains(keys, key) {
							continue
						}
						if hint == "" && own[key] {
							t.Errorf("%s in %s: no hint", key, path)
						}
						meant := key
						if m := means.FindStringSubmatch(hint); m != nil {
							meant = m[1]
							if !strings.Contains(hint, "belongs") && !slices.Contains(keys, meant) {
								t.Errorf("%s in %s: %s", key, path, hint)
							}
						}
						m := belongs.FindStringSubmatch(hint)
						if m == nil || strings.Contains(hint, "what it has") {
							continue
						}
						for name := range strings.SplitSeq(m[1], " or ") {
							if !slices.ContainsFunc(paths[name], func(path string) bool { return slices.Contains(homes[shape][path], meant) }) {
								t.Errorf("%s in %s%s; %q has no %s", key, path, hint, name, meant)
							}
						}
					}
				}
			}
		})
	}
}
