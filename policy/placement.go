package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The error of an unknown key hints at what was meant, or where the key belongs. To know where keys belong, a decoder
// reads an empty document of the same shape, and learns the keys that are asked for.

// learnCircuit learns the keys of everything that a circuit can have.
func (d *decoder) learnCircuit(components value) {
	if d.learned == nil {
		return
	}
	item := d.items(components)[0]
	d.one(item, circuitKeys)
	d.variable(item.missing("variable"), false)
	d.variable(item.missing("bool_variable"), true)
	deciders := item.missing("flow_control")
	d.one(deciders, deciderKeys())
	for i := range kinds {
		for _, form := range kinds[i].forms {
			form.read(d, d.inCircuit(deciders.missing(form.key), form, ""))
		}
	}
}

// unknown reports a key that a mapping may not have. It may have those in own.
func (d *decoder) unknown(key value, own string) {
	d.invalid = true
	if d.sources == nil || len(d.errs) >= mostErrors {
		return
	}
	known := strings.Fields(own)
	if key.up.up == nil && !d.isShort {
		known = append(known, "blueprint", "policy", "apiVersion", "kind", "metadata", "spec", "headgate", "policies") // of the other shapes
	}
	hint := ""
	if before, _, ok := strings.Cut(key.key, ":"); ok && before != "" && slices.Contains(known, before) {
		hint = fmt.Sprintf("; is a space missing behind %q?", before+":")
	}
	if hint == "" {
		hint = d.unshared(key)
	}
	if hint == "" {
		hint = suggest(key.key, known)
	}
	if hint == "" {
		hint = d.home(key)
	}
	if hint == "" && d.isShort {
		hint = longer(key.key, known)
	}
	if hint == "" && !d.isShort && suggest(key.key, []string{"dynamicConfig"}) != "" {
		hint = "; dynamicConfig belongs at the top of a resource, or of blueprint values"
	}
	d.errorf(key, "unknown key%s", hint)
}

// home returns a hint at the nearest mapping that may have the key, or one much like it; "" if there is none.
func (d *decoder) home(key value) string {
	if d.shape == nil {
		return ""
	}
	if d.homes == nil {
		reader := newDecoder(d.file)
		reader.learned = map[string]string{}
		d.shape(reader)
		d.homes = reader.learned
	}
	from := shapePath(key.up)
	for _, like := range []bool{false, true} {
		var places []string
		word, nearest := "", 0
		for _, path := range slices.Sorted(maps.Keys(d.homes)) {
			keys := d.homes[path]
			if like {
				meant := suggest(key.key, strings.Fields(keys))
				if meant == "" {
					continue
				}
				word = cmp.Or(word, meant)
			} else if !has(keys, key.key) {
				continue
			}
			places = append(places, path)
		}
		slices.SortStableFunc(places, func(a, b string) int { return cmp.Compare(steps(from, a), steps(from, b)) })
		var best []string
		for _, path := range places {
			if len(best) == 0 {
				nearest = steps(from, path)
			}
			if len(best) < 3 && steps(from, path) <= nearest+1 {
				best = append(best, place(path))
			}
		}
		switch {
		case best == nil, nearest > 4 && len(best) > 1: // too many, and too far
		case like:
			return strings.TrimSuffix(word, "?") + ", which belongs in " + strings.Join(best, " or ") + "?"
		default:
			return "; it belongs in " + strings.Join(best, " or ")
		}
	}
	return ""
}

// shapePath returns the path of a value in the shape of its document, where sequences have one item.
func shapePath(v *value) string {
	shape := *v
	shape.index = 0
	if v.up == nil {
		return ""
	}
	up := shapePath(v.up)
	if !v.named {
		return up + "[0]"
	}
	return child(up, v.key)
}

// steps counts the levels up and down from one path to another.
func steps(from, to string) int {
	split := func(path string) []string {
		if path == "" {
			return nil
		}
		return strings.Split(strings.ReplaceAll(path, "[", ".["), ".")
	}
	a, b := split(from), split(to)
	same := 0
	for same < min(len(a), len(b)) && a[same] == b[same] {
		same++
	}
	return len(a) + len(b) - 2*same
}

// place returns a path of a shape in words for readers.
func place(path string) string {
	if path == "" {
		return "the top of the document"
	}
	path = strings.TrimPrefix(path, "policies[0].")
	path = strings.TrimPrefix(path, "components[0].")
	if i := strings.Index(path, "flow_control"); i >= 0 {
		path = strings.TrimPrefix(path[i:], "flow_control.")
	}
	return strings.ReplaceAll(path, "[0]", "[]")
}
