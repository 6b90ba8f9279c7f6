package agent

import (
	"bytes"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/w3cbaggage"
	"github.com/headgate-go/headgate/internal/wire"
)

// picked holds the labels of a check that are needed: all that policies name, and of the others those that the answer
// reports. The answer reports those with the smallest keys among the first maxLooked, headers last. Keys and values are
// pieces of the message until the method labels copies them. If a key is repeated, the last value counts.
type picked struct {
	named   map[string]bool
	escaped bool // values are escaped, as in baggage
	hits    map[string][]byte
	rest    []pair // in order once there are more than wire.MaxReported
	room    [8]pair
	many    bool
	looked  int          // labels, up to maxLooked
	finder  *finder      // of labels that policies name, once no others are looked at
	values  []namedValue // of the finder's keys
}

type pair struct{ key, value []byte }

// A namedValue is the value of a label that a policy names.
type namedValue struct {
	data []byte
	ok   bool // there is one
}

func (p *picked) add(key, value []byte) {
	if p.finder != nil {
		if i := p.finder.find(key); i >= 0 {
			p.values[i] = namedValue{value, true}
		}
		return
	}
	if p.looked++; p.looked == maxLooked {
		p.onlyNamed()
		p.add(key, value)
		return
	}
	if !utf8.Valid(key) {
		key = []byte(text(key))
	}
	if _, ok := p.named[string(key)]; ok {
		if p.hits == nil {
			p.hits = make(map[string][]byte)
		}
		if _, again := p.hits[string(key)]; again {
			p.hits[string(key)] = value
		} else {
			p.hits[strings.Clone(string(key))] = value
		}
		return
	}
	if !p.many {
		if p.rest == nil {
			p.rest = p.room[:0]
		}
		p.rest = append(p.rest, pair{key, value})
		if len(p.rest) > wire.MaxReported {
			all := p.rest
			p.rest, p.many = make([]pair, 0, wire.MaxReported+1), true
			for _, one := range all {
				p.insert(one)
			}
		}
		return
	}
	p.insert(pair{key, value})
}

// onlyNamed makes add look only for labels that policies name.
func (p *picked) onlyNamed() {
	p.finder = new(finder)
	for key := range p.named {
		value, ok := p.hits[key]
		p.finder.add(key)
		p.values = append(p.values, namedValue{value, ok})
	}
}

// insert keeps the pair if it is among the first wire.MaxReported.
func (p *picked) insert(one pair) {
	if len(one.key) == 0 || len(one.key) > wire.MaxReportedKey ||
		len(p.rest) == wire.MaxReported && compareKeys(one, p.rest[wire.MaxReported-1]) > 0 {
		return
	}
	i, found := slices.BinarySearchFunc(p.rest, one, compareKeys)
	if found {
		p.rest[i].value = one.value
		return
	}
	p.rest = slices.Insert(p.rest, i, one)
	p.rest = p.rest[:min(len(p.rest), wire.MaxReported)]
}

// compareKeys orders labels as answers report them.
func compareKeys(a, b pair) int {
	prefix := []byte(wire.HeaderLabel)
	return wire.CompareReported(bytes.HasPrefix(a.key, prefix), bytes.HasPrefix(b.key, prefix), bytes.Compare(a.key, b.key))
}

// labels returns copies of the labels; nil for none.
func (p *picked) labels() map[string]string {
	if p.finder != nil {
		p.hits = make(map[string][]byte)
		for i, value := range p.values {
			if value.ok {
				p.hits[p.finder.keys[i].key] = value.data
			}
		}
	}
	if len(p.hits)+len(p.rest) == 0 {
		return nil
	}
	m := make(map[string]string, len(p.hits)+len(p.rest))
	for _, one := range p.rest {
		if len(one.key) <= wire.MaxReportedKey {
			m[string(one.key)] = cutValue(p.plain(one.value, wire.MaxReportedValue+4))
		}
	}
	for key, value := range p.hits {
		m[key] = text(p.plain(value, len(value)))
	}
	return m
}

// plain returns a value without escapes. The caller needs only its first enough bytes.
func (p *picked) plain(value []byte, enough int) []byte {
	if !p.escaped || !bytes.ContainsRune(value, '%') {
		return value
	}
	if len(value) > 3*enough {
		value = value[:3*enough]
		// An escape that was cut is left out.
		if i := bytes.LastIndexByte(value, '%'); i >= len(value)-2 {
			value = value[:i]
		}
	}
	return w3cbaggage.Decode(value)
}

// headersRead holds the headers of a CheckHTTP that are needed, chosen as picked chooses labels. The baggage header is
// always among them. If several headers become one label, it keeps enough of them to detect that.
type headersRead struct {
	named   map[string]bool
	kept    map[string]*headerGroup // by label
	order   []string                // labels that no policy names, in order
	baggage []byte
	carries bool // there is a header with baggage
	scratch []byte
	looked  int            // headers, up to maxLooked
	finder  *finder        // of headers that policies name, once no others are looked at
	groups  []*headerGroup // of the finder's keys; nil for none
}

// A headerGroup is the headers that become one label: at most one without "_", and two with it, and each in one other
// spelling of its case.
type headerGroup struct{ headers []pair }

const maxGroup = 4

func (h *headersRead) add(name, value []byte) {
	if string(name) == wire.HeaderBaggage {
		h.baggage, h.carries = value, true
		return
	}
	if len(name) == 0 || name[0] == ':' {
		return
	}
	if h.finder != nil {
		if i := h.finder.find(name); i >= 0 {
			if h.groups[i] == nil {
				h.groups[i] = h.group(wire.HeaderLabel + h.finder.keys[i].key)
			}
			if !utf8.Valid(name) {
				name = []byte(text(name))
			}
			h.groups[i].add(name, value)
		}
		return
	}
	if h.looked++; h.looked == maxLooked {
		h.onlyNamed()
		h.add(name, value)
		return
	}
	if !utf8.Valid(name) {
		name = []byte(text(name))
	}
	h.scratch = append(h.scratch[:0], wire.HeaderLabel...)
	for _, b := range name {
		h.scratch = append(h.scratch, foldHeader(b))
	}
	group := h.kept[string(h.scratch)]
	if group == nil {
		_, wanted := h.named[string(h.scratch)]
		wanted = wanted || string(h.scratch) == wire.HeaderLabel+wire.HeaderBaggage // spelled otherwise, which is ambiguous
		if !wanted && !h.place() {
			return
		}
		group = h.group(string(h.scratch))
	}
	group.add(name, value)
}

// group makes the group of a label.
func (h *headersRead) group(label string) *headerGroup {
	if h.kept == nil {
		h.kept = make(map[string]*headerGroup)
	}
	g := new(headerGroup)
	h.kept[label] = g
	return g
}

// onlyNamed makes add look only for headers that policies name, and for baggage.
func (h *headersRead) onlyNamed() {
	h.finder = &finder{headers: true}
	add := func(name string) {
		h.finder.add(name)
		h.groups = append(h.groups, h.kept[wire.HeaderLabel+name])
	}
	for label := range h.named {
		if name, ok := strings.CutPrefix(label, wire.HeaderLabel); ok && name != wire.HeaderBaggage {
			add(name)
		}
	}
	add(wire.HeaderBaggage)
}

func (g *headerGroup) add(name, value []byte) {
	for i := range g.headers {
		if bytes.Equal(g.headers[i].key, name) {
			g.headers[i].value = value
			return
		}
	}
	if len(g.headers) < maxGroup {
		g.headers = append(g.headers, pair{name, value})
		return
	}
	// A header without "_" counts, so it replaces one with "_". Two headers without "_" differ by case: both stay, so
	// that the request is rejected.
	if bytes.IndexByte(name, '_') >= 0 {
		return
	}
	if i := slices.IndexFunc(g.headers, func(one pair) bool { return bytes.IndexByte(one.key, '_') >= 0 }); i >= 0 {
		g.headers[i] = pair{name, value}
	}
}

// place makes room for the label in scratch, which no policy names. It reports whether there is room.
func (h *headersRead) place() bool {
	if len(h.scratch) > wire.MaxReportedKey || len(h.order) == wire.MaxReported && string(h.scratch) > h.order[wire.MaxReported-1] {
		return false
	}
	label := string(h.scratch)
	i, _ := slices.BinarySearch(h.order, label)
	h.order = slices.Insert(h.order, i, label)
	if len(h.order) > wire.MaxReported {
		delete(h.kept, h.order[wire.MaxReported])
		h.order = h.order[:wire.MaxReported]
	}
	return true
}

// headers returns copies of the headers.
func (h *headersRead) headers() map[string]string {
	m := make(map[string]string, len(h.kept)+1)
	for label, group := range h.kept {
		_, wanted := h.named[label]
		for _, one := range group.headers {
			if wanted {
				m[string(one.key)] = text(one.value)
			} else {
				m[string(one.key)] = cutValue(one.value)
			}
		}
	}
	if h.carries {
		m[wire.HeaderBaggage] = text(h.baggage)
	}
	return m
}
