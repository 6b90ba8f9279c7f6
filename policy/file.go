package policy

import (
	"bytes"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headgate-go/headgate/internal/policyfiles"
)

// Load reads the policies of files and directories, in the given order. Of a directory it reads the files whose names
// end in .yaml or .yml and do not begin with a dot, in the order of their names, and no directories below it.
//
// A file holds one or several YAML documents in the shapes that [Parse] describes: Headgate's own, or Aperture's. A path without
// a policy is an error, and so are two policies of one name. If there is an error, Load returns no policies. The error
// joins up to 20 problems of all files: each is an [*Error], or an [*io/fs.PathError] for what cannot be read. After 200 problems
// Load reads no further. A FIFO, a device and a socket are not read.
func Load(paths ...string) ([]Policy, error) {
	var l loader
	for _, path := range paths {
		files, err := list(path)
		if err != nil {
			l.errs = append(l.errs, err)
		}
		for _, file := range files {
			if len(l.errs) >= mostErrors {
				break
			}
			data, err := policyfiles.Read(file)
			if err != nil {
				l.errs = append(l.errs, err)
				continue
			}
			l.parse(file, data)
		}
	}
	return l.result()
}

// Parse reads the policies of a file's content; name stands for the file in errors and warnings.
//
// A document in Headgate's own shape has the keys headgate, which is 1, and policies. Its policies have the fields of
// [Policy] in snake case for keys, and each component stands under the name of its kind, as in rate_limiter: {at:
// [checkout], capacity: 10, fill: 10, interval: 30s}. The key at has control points, and selectors whole selectors.
// Durations are like 1m30s. A key that is left out has the default of its field. A 0 means zero where Go's zero means a
// default, or it is an error. The fields of Scheduler and of WorkloadParameters stand with those of what has them. The
// fields of LabelMatcher do, too: when has Equal. [Format] writes such files.
//
// Any other document is a policy in Aperture's format, in one of three shapes: the resource, with apiVersion
// fluxninja.com/v1alpha1, kind Policy, the policy's name in metadata and its circuit in spec; the plain policy, with
// circuit at the top, which is named like the file without directory and extension; or blueprint values, with blueprint
// and policy at the top and the policy's name in policy_name, for the blueprints rate-limiting, quota-scheduling,
// concurrency-limiting, concurrency-scheduling, load-ramping and load-scheduling/average-latency. Resources and
// blueprint values may have a dynamicConfig. Empty documents are skipped.
//
// Keys that a document's format does not have are errors, except those at its top that begin with "x-", a place for
// anchors that is otherwise ignored. Three of Headgate's keys may stand in Aperture's format: dry_run, which any component
// may have; calendar_quota, which is a [CalendarQuota]; and circuit_breaker, which is a [CircuitBreaker]. Keys of
// Aperture's format that are of no use here end up in [Policy.Warnings]. The placeholder __REQUIRED_FIELD__ of Aperture's
// blueprints is an error.
//
// The components of flow_control that this package has a type for are read; others are errors. An
// adaptive_load_scheduler is an [AIMDLoadScheduler] by an old name. An input port is connected to a constant or to the
// signal of a variable. Those of load schedulers may also name a flux meter, which is a [MeanLatency] over 30 seconds,
// or a signal that the circuit does not define, which is [Named]. A signal that another component computes is an error.
func Parse(name string, data []byte) ([]Policy, error) {
	var l loader
	l.parse(name, data)
	return l.result()
}

// list returns the files that a path of Load stands for.
func list(path string) ([]string, error) {
	files, err := policyfiles.List(path)
	if err == nil && files == nil {
		err = &Error{File: path, Message: "the directory has no .yaml or .yml file"}
	}
	return files, err
}

// filePosition is a position in a file.
type filePosition struct {
	file string
	position
}

// A loader gathers the policies of files.
type loader struct {
	policies []Policy
	places   map[string]filePosition // of policies, by name
	errs     []error
}

func (l *loader) result() ([]Policy, error) {
	if len(l.errs) > 0 {
		return nil, join(l.errs)
	}
	return l.policies, nil
}

// parse reads a file. It first takes the file for good, because that is fast. If the file is not good, it reads it
// again, from beginning to end, and notes what is wrong.
func (l *loader) parse(file string, data []byte) {
	plain := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	if strings.Trim(plain, `./\`) == "" {
		plain = "" // the file's name is an extension at most
	}
	unfinished := bytes.Contains(data, []byte(placeholder))
	r, errs := newReader(file, data)
	if r == nil {
		l.fail(errs)
		return
	}
	// What is one section is in memory at once anyway, and need not be read twice.
	if !unfinished && len(r.sections(sectionSize)) > 1 {
		if sections, good := r.good(plain, sectionSize); good && l.take(file, sections) {
			return
		}
	}
	l.inspect(r, plain, unfinished)
}

// inspect takes the policies of a file's documents, and notes what is wrong with the file.
func (l *loader) inspect(r *yamlReader, plain string, unfinished bool) {
	var errs []*Error
	empty := true
	r.all(func(doc *node) bool {
		empty = false
		policies, wrong := l.document(r.file, plain, doc, unfinished)
		l.policies, errs = append(l.policies, policies...), append(errs, wrong...)
		r.nodes.reset()
		r.entries.reset()
		return len(errs)+len(r.errs) < mostErrors
	})
	if empty && len(r.errs) == 0 {
		errs = append(errs, &Error{File: r.file, Line: 1, Column: 1, Message: "holds no policy"})
	}
	errs = append(r.errs, errs...)
	inOrder(errs)
	l.fail(errs)
}

// document returns the policies of a document, and what is wrong with it.
func (l *loader) document(file, plain string, doc *node, unfinished bool) ([]Policy, []*Error) {
	d := newDecoder(file)
	d.hasty = true
	policies := d.policies(doc, plain)
	if d.invalid || unfinished {
		d = newDecoder(file)
		d.noting = true
		d.whileNeeded(func() { d.placeholders(value{node: doc, line: doc.line, column: doc.column}) })
		if len(d.errs) >= mostErrors {
			return nil, d.errs
		}
		policies = d.policies(doc, plain)
	}
	for i, p := range policies {
		name := d.names[i]
		if first, taken := l.places[p.Name]; taken {
			hint := ""
			if name.up == nil {
				hint = "; a plain policy has the name of its file"
			}
			d.errs = append(d.errs, &Error{
				File: file, Line: name.line, Column: name.column, Field: name.path(),
				Message: fmt.Sprintf("policy %s is at %s:%d:%d already%s", quote(p.Name), first.file, first.line, first.column, hint),
			})
			if len(d.errs) >= mostErrors {
				break
			}
		} else if p.Name != "" {
			l.note(p.Name, filePosition{file, position{name.line, name.column}})
		}
	}
	return policies, d.errs
}

// fail notes what is wrong with a file.
func (l *loader) fail(errs []*Error) {
	for _, err := range errs {
		l.errs = append(l.errs, err)
	}
}

// take adds the policies of a good file, unless a name is taken: then it adds none.
func (l *loader) take(file string, sections []section) bool {
	places := make(map[string]filePosition)
	maps.Copy(places, l.places)
	var policies []Policy
	for _, s := range sections {
		for i, p := range s.policies {
			if _, taken := places[p.Name]; taken {
				return false
			}
			places[p.Name] = filePosition{file, s.names[i]}
		}
		policies = append(policies, s.policies...)
	}
	if policies == nil {
		return false
	}
	l.places, l.policies = places, append(l.policies, policies...)
	return true
}

// note notes where the policy of a name is.
func (l *loader) note(name string, at filePosition) {
	if l.places == nil {
		l.places = map[string]filePosition{}
	}
	l.places[name] = at
}

// placeholder is what Aperture's blueprints have for a value that their user is to fill in.
const placeholder = "__REQUIRED_FIELD__"

// placeholders reports the keys and values of a document that are to be filled in, whether they are read or not.
func (d *decoder) placeholders(v value) { d.findPlaceholders(v, false) }

// findPlaceholders is placeholders for a part of the document. Keys that are not the format's may be values of labels, so errors have
// their indices: those of overrides, and those below keys that begin with "x-", which are hidden.
func (d *decoder) findPlaceholders(v value, hidden bool) {
	switch {
	case v.node == nil:
	case v.kind == text && strings.Contains(v.text, placeholder):
		d.errorf(v, "%s is to be replaced by a value", placeholder)
	case v.kind == sequence:
		for _, item := range d.items(v) {
			d.findPlaceholders(item, hidden)
		}
	case v.kind == mapping:
		entries := v.entries
		unnamed := hidden || v.named && v.key == overridesKey
		if unnamed {
			entries = slices.SortedFunc(slices.Values(entries), func(a, b entry) int { return strings.Compare(a.key, b.key) })
		}
		for i, e := range entries {
			part := v.part(e)
			if unnamed {
				part.named, part.index = false, i
			}
			if strings.Contains(e.key, placeholder) {
				part.line, part.column = e.line, e.column
				d.errorf(part, "%s is to be replaced by a key", placeholder)
				continue
			}
			d.findPlaceholders(part, hidden || v.up == nil && strings.HasPrefix(e.key, "x-"))
		}
	}
}

// policies reads a document, which has several policies only in Headgate's own shape. A plain policy gets the name. There are none
// if the decoder stops.
func (d *decoder) policies(doc *node, plain string) (policies []Policy) {
	d.whileNeeded(func() { policies = d.all(doc, plain) })
	return policies
}

// all is policies for a decoder that does not stop.
func (d *decoder) all(doc *node, plain string) []Policy {
	d.kindAround = kindAround
	known := *doc
	known.index = nil
	known.entries = slices.DeleteFunc(slices.Clone(doc.entries), func(e entry) bool { return strings.HasPrefix(e.key, "x-") })
	top := value{node: &known, line: doc.line, column: doc.column}
	has := func(keys ...string) bool {
		return slices.ContainsFunc(keys, func(key string) bool { _, ok := doc.find(key); return ok })
	}
	if doc.kind == mapping && isShort(doc) {
		return d.short(top)
	}
	p := d.policy(top, has, plain)
	d.names = append(d.names, d.name)
	return []Policy{p}
}

// policy reads a document in one of Aperture's shapes, which has tells apart, and checks it.
func (d *decoder) policy(top value, has func(keys ...string) bool, plain string) Policy {
	p, ok := d.aperture(top, has, plain)
	if ok {
		d.unusedSettings()
		d.finish(&p, 0, func(d *decoder) { d.aperture(top, has, plain) })
	}
	return p
}

// aperture reads such a document. It reports false if it cannot tell the shape.
func (d *decoder) aperture(top value, has func(keys ...string) bool, plain string) (p Policy, ok bool) {
	switch {
	case top.kind != mapping:
		d.errorf(top, "want a policy, have %s", top.kind)
		return p, false
	case has("blueprint"):
		d.values(top, &p)
	case has("apiVersion", "kind", "metadata", "spec"):
		d.shape = func(d *decoder) { d.resource(value{}) }
		p = d.resource(top)
	case plain == "":
		d.errorf(top, "a plain policy has the name of its file, and %s has none", quote(d.file))
		return p, false
	default:
		d.shape = func(d *decoder) { d.spec(value{}) }
		d.name = top
		d.note("name", top)
		p.Name, p.Components = plain, d.spec(top)
	}
	return p, true
}

// finish checks a policy that has been read, and can be read again. Before is how many errors the document had by then.
func (d *decoder) finish(p *Policy, before int, again func(*decoder)) {
	p.Warnings = d.warnings
	if d.noting && len(p.Components) == 0 && len(d.errs) > before {
		return
	}
	type problem struct{ field, message string }
	var problems []problem
	d.whileNeeded(func() {
		p.check(func(field, format string, args ...any) {
			d.invalid = true
			if !d.hasty {
				problems = append(problems, problem{field, fmt.Sprintf(format, args...)})
			}
			if d.hasty || len(problems) >= mostErrors {
				panic(stopped{}) //nolint:forbidigo // whileNeeded ends it
			}
		})
	})
	if problems == nil {
		return
	}
	source := newDecoder(d.file)
	source.sources = map[string]value{}
	for _, problem := range problems {
		for field := problem.field; field != ""; field = parent(field) {
			source.sources[field] = value{}
		}
	}
	source.sources[""] = value{}
	again(source)
	for _, problem := range problems {
		d.recheck(source.sources, problem.field, problem.message)
	}
}

// resource reads a document in the shape of a Kubernetes resource.
func (d *decoder) resource(top value) Policy {
	f := d.fields(top, "apiVersion kind metadata spec dynamicConfig", "status")
	d.want(f.get("apiVersion"), "fluxninja.com/v1alpha1")
	d.want(f.get("kind"), "Policy")
	d.name = d.fill(d.fields(f.get("metadata"), "name", metadataUnused), "name", "name")
	p := Policy{Name: d.text(d.name)}
	d.dynamicConfig(f.get("dynamicConfig"))
	p.Components = d.spec(f.get("spec"))
	return p
}

// parent cuts the last name or index from the path of a Go field.
func parent(field string) string { return field[:max(strings.LastIndexAny(field, ".["), 0)] }

// recheck reports what check finds wrong with a Go field as a problem of what the file says about it.
func (d *decoder) recheck(sources map[string]value, field, message string) {
	for f := field; ; f = parent(f) {
		v := sources[f]
		known := v.up != nil || v.line > 0
		if known && f == field && v.node == nil {
			d.errorf(v, "is required")
			return
		} else if known || f == "" {
			d.errorf(v, "%s", message)
			return
		}
	}
}

// want reports any text other than the only valid one.
func (d *decoder) want(v value, only string) {
	if v.node == nil {
		d.errorf(v, "is required")
	} else if have := d.text(v); have != only {
		d.errorf(v, "want %s, have %s", only, quote(have))
	}
}
