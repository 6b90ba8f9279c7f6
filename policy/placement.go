package policy

import (
	"cmp"
	"fmt"
	"maps"
	"math"
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
	if !d.notes(key) {
		return // before a hint is looked for, which takes longer than to read the key
	}
	known := strings.Fields(own)
	d.learnHomes()
	if keys, ok := d.homes[shapePath(key.up)]; ok { // an override of one kind has fewer than those of all kinds
		known = keys
	}
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
		hint = d.translated(key)
	}
	if hint == "" {
		hint = d.below(key)
	}
	if hint == "" {
		hint = suggest(key.key, known)
	}
	if hint == "" {
		hint = d.misspelt(key)
	}
	if hint == "" {
		hint = d.home(key)
	}
	if hint == "" && d.isShort {
		hint = longer(key.key, known)
	}
	if hint == "" {
		hint = d.misspeltElsewhere(key)
	}
	if hint == "" && !d.isShort && likely(key.key, []string{"dynamicConfig"}) != "" {
		hint = "; dynamicConfig belongs at the top of a resource, or of blueprint values"
	}
	d.errorf(key, "unknown key%s", hint)
}

// translated returns a hint at where the content of a key belongs, if other files or other components have the key; "" if they do not.
func (d *decoder) translated(key value) string {
	kind := d.kindAround(key)
	if kind == nil {
		return ""
	}
	of := key.up.key // what the key is in
	inComponent := key.up.named && slices.ContainsFunc(kind.forms, func(f form) bool { return f.key == of }) || of == kind.name
	switch {
	case d.isShort && key.key == "label_matcher":
		if inComponent {
			return "; what it has in Aperture's files is when, require and expression in selectors[]"
		}
		if slices.Contains(d.homes[shapePath(key.up)], "expression") {
			return "; what it has in Aperture's files is when, require and expression here"
		}
		return ""
	case d.isShort && inComponent && has("in_ports parameters request_parameters scheduler", key.key):
		return "; what it has in Aperture's files stands beside the other keys here"
	case d.isShort && inComponent && key.key == "when" && meansEscalation(key):
		return "; an escalation is for rate_limiter and quota_scheduler"
	case d.isShort || !inComponent:
		return ""
	case key.key == "parameters" && of == "quota_scheduler":
		return "; what it has in a rate_limiter belongs in rate_limiter here"
	case key.key == "parameters" && of == "concurrency_scheduler":
		return "; what it has in a concurrency_limiter belongs in concurrency_limiter here"
	case key.key == "request_parameters" && has("quota_scheduler concurrency_scheduler", of):
		return "; what it has in a limiter belongs in scheduler here"
	case key.key == "in_ports" && has("policy", key.up.up.key):
		return "; what it has in a circuit stands beside the other keys here"
	}
	return ""
}

// meansEscalation reports whether an unknown key has what an escalation requires.
func meansEscalation(key value) bool {
	e, _ := key.up.find(key.key)
	return e.value.kind == mapping && slices.ContainsFunc(e.value.entries, func(e entry) bool { return has("load below", e.key) })
}

// learnHomes learns which mappings have which keys, if the document has a shape.
func (d *decoder) learnHomes() {
	if d.shape == nil || d.homes != nil {
		return
	}
	reader := newDecoder(d.file)
	reader.learned = map[string]string{}
	d.shape(reader)
	d.homes = make(map[string][]string, len(reader.learned))
	for path, keys := range reader.learned {
		d.homes[path] = strings.Fields(keys)
	}
}

// below returns a hint at where in the mapping the key belongs; "" if that is nowhere. First comes what stands above the key, whose
// keys may have lost their indentation, and then any part of a component.
func (d *decoder) below(key value) string {
	if best := d.above(key, func(keys []string) bool { return slices.Contains(keys, key.key) }); best != "" {
		return "; it belongs in " + best
	}
	if d.kindAround(key) == nil {
		return ""
	}
	from := shapePath(key.up)
	return belongsIn(d.nearest(from, func(path string, keys []string) bool {
		return len(path) > len(from) && strings.HasPrefix(path, from) && slices.Contains(keys, key.key)
	}))
}

// above returns the place that is nearest above the key in its mapping, of those whose keys fit. It returns "" if there is none.
func (d *decoder) above(key value, fits func(keys []string) bool) (best string) {
	from := shapePath(key.up)
	for _, e := range key.up.entries {
		if e.key == key.key {
			break // those that follow are below it, or merged
		}
		if e.line > key.line || e.line == key.line && e.column >= key.column || e.value.kind != null && e.value.kind != mapping {
			continue
		}
		path := child(from, e.key)
		if !fits(d.homes[path]) {
			continue
		}
		if best = place(path); e.value.kind == null {
			best += ", indented further"
		}
	}
	return best
}

// misspelt returns a hint for a misspelt key that has lost its indentation; "" if nothing above may have a key like it.
func (d *decoder) misspelt(key value) string {
	word := "" // of the last that fits, which is the nearest
	best := d.above(key, func(keys []string) bool {
		meant := likely(key.key, keys)
		word = cmp.Or(meant, word)
		return meant != ""
	})
	return meantIn(word, best)
}

// meantIn returns what suggest does for a word, and where it belongs. It returns "" if that is nowhere.
func meantIn(word, place string) string {
	if place == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q, which belongs in %s?", word, place)
}

// home returns a hint at the nearest mappings that may have the key; "" if there are none.
func (d *decoder) home(key value) string {
	return belongsIn(d.nearest(shapePath(key.up), func(_ string, keys []string) bool { return slices.Contains(keys, key.key) }))
}

// misspeltElsewhere returns a hint at the word that is meant at the nearest mapping; "" if there is no such word.
func (d *decoder) misspeltElsewhere(key value) string {
	from := shapePath(key.up)
	word, least := "", math.MaxInt
	for _, path := range slices.Sorted(maps.Keys(d.homes)) {
		if n := steps(from, path); n < least {
			if meant := likely(key.key, d.homes[path]); meant != "" {
				word, least = meant, n
			}
		}
	}
	paths := d.nearest(from, func(_ string, keys []string) bool { return slices.Contains(keys, word) })
	if least > 4 && len(paths) > 1 { // too far for a guess
		return ""
	}
	return meantIn(word, places(paths))
}

// nearest returns the paths that are nearest to one, of those that fits chooses by path and keys. The nearest is the first.
func (d *decoder) nearest(from string, fits func(path string, keys []string) bool) []string {
	var paths []string
	for path, keys := range d.homes {
		if fits(path, keys) {
			paths = append(paths, path)
		}
	}
	slices.SortFunc(paths, func(a, b string) int {
		return cmp.Or(cmp.Compare(steps(from, a), steps(from, b)), strings.Compare(a, b))
	})
	if far := slices.IndexFunc(paths, func(path string) bool { return steps(from, path) > steps(from, paths[0])+1 }); far >= 0 {
		paths = paths[:far]
	}
	return paths
}

// belongsIn returns a hint at the paths that may have a key; "" if there are none.
func belongsIn(paths []string) string {
	if len(paths) == 0 {
		return ""
	}
	return "; it belongs in " + places(paths)
}

// places returns paths of a shape in words for readers, up to three of them; "" for none.
func places(paths []string) string {
	const most = 3
	words := make([]string, min(len(paths), most))
	for i := range words {
		words[i] = place(paths[i])
	}
	text := strings.Join(words, " or ")
	if len(paths) > most {
		text += ", for example"
	}
	return text
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
	same := 0 // bytes of the levels that both have
	for i := range min(len(from), len(to)) + 1 {
		if ends(from, i) && ends(to, i) {
			same = i
		}
		if i == min(len(from), len(to)) || from[i] != to[i] {
			break
		}
	}
	return levels(from[same:]) + levels(to[same:])
}

// ends reports whether a level of the path ends before the byte.
func ends(path string, at int) bool { return at == len(path) || path[at] == '.' || path[at] == '[' }

// levels counts the levels of a path, or of its rest.
func levels(path string) int {
	n := strings.Count(path, ".") + strings.Count(path, "[")
	if path != "" && path[0] != '.' && path[0] != '[' {
		n++
	}
	return n
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
