package agent

import (
	"bytes"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/headgate-go/headgate/internal/wire"
)

// picked is the labels of a check that somebody looks at: of all of them those that policies name, and of the others those
// that the answer reports, which are the ones with the smallest keys, and headers last. Keys and values are pieces of the
// message until labels copies them. Of several with one key the last one counts.
type picked struct {
	named map[string]bool
	hits  map[string][]byte
	rest  []pair // in order once there are more than maxOtherLabels
	room  [8]pair
	many  bool
}

type pair struct{ key, value []byte }

func (p *picked) add(key, value []byte) {
	if len(key) == 0 && p.many {
		return // no policy names it, and it is not reported
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
		if len(p.rest) > maxOtherLabels {
			all := p.rest
			p.rest, p.many = make([]pair, 0, maxOtherLabels+1), true
			for _, one := range all {
				p.insert(one)
			}
		}
		return
	}
	p.insert(pair{key, value})
}

// skips reports whether the label is none of those, as far as is known by now.
func (p *picked) skips(key string) bool {
	if len(p.rest) < maxOtherLabels {
		return false
	}
	_, wanted := p.named[key]
	last := p.rest[maxOtherLabels-1].key
	return p.many && !wanted && !strings.HasPrefix(string(last), headerLabel) && key > string(last)
}

// insert keeps the pair if it is among the first, now that not all can be.
func (p *picked) insert(one pair) {
	if len(one.key) == 0 || len(one.key) > maxOtherKey ||
		len(p.rest) == maxOtherLabels && compareKeys(one, p.rest[maxOtherLabels-1]) > 0 {
		return
	}
	i, found := slices.BinarySearchFunc(p.rest, one, compareKeys)
	if found {
		p.rest[i].value = one.value
		return
	}
	p.rest = slices.Insert(p.rest, i, one)
	p.rest = p.rest[:min(len(p.rest), maxOtherLabels)]
}

// compareKeys orders labels as answers report them.
func compareKeys(a, b pair) int {
	prefix := []byte(headerLabel)
	if ha, hb := bytes.HasPrefix(a.key, prefix), bytes.HasPrefix(b.key, prefix); ha != hb {
		if ha {
			return 1
		}
		return -1
	}
	return bytes.Compare(a.key, b.key)
}

// labels are the labels, as text of their own; nil for none.
func (p *picked) labels() map[string]string {
	if len(p.hits)+len(p.rest) == 0 {
		return nil
	}
	m := make(map[string]string, len(p.hits)+len(p.rest))
	for _, one := range p.rest {
		if len(one.key) <= maxOtherKey {
			m[string(one.key)] = cutValue(one.value)
		}
	}
	for key, value := range p.hits {
		m[key] = text(value)
	}
	return m
}

// headersRead is the headers of a CheckHTTP that somebody looks at, chosen as picked chooses labels. The header with
// baggage is always among them. Of headers that become one label it keeps as many as it takes to see that.
type headersRead struct {
	named   map[string]bool
	kept    map[string]*headerGroup // by label
	order   []string                // labels that no policy names, in order
	baggage []byte
	carries bool // there is a header with baggage
	scratch []byte
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
	if !utf8.Valid(name) {
		name = []byte(text(name))
	}
	h.scratch = append(h.scratch[:0], headerLabel...)
	for _, b := range name {
		switch {
		case b == '-':
			b = '_'
		case b >= 'A' && b <= 'Z':
			b += 'a' - 'A'
		}
		h.scratch = append(h.scratch, b)
	}
	group := h.kept[string(h.scratch)]
	if group == nil {
		_, wanted := h.named[string(h.scratch)]
		wanted = wanted || string(h.scratch) == headerLabel+wire.HeaderBaggage // spelled otherwise, which is ambiguous
		if !wanted && !h.place() {
			return
		}
		if h.kept == nil {
			h.kept = make(map[string]*headerGroup)
		}
		group = new(headerGroup)
		h.kept[string(h.scratch)] = group
	}
	for i := range group.headers {
		if bytes.Equal(group.headers[i].key, name) {
			group.headers[i].value = value
			return
		}
	}
	if len(group.headers) < maxGroup {
		group.headers = append(group.headers, pair{name, value})
		return
	}
	// A header without "_" counts, so it takes the place of one that has it. Two without it differ by case: both stay,
	// for the request to be rejected.
	if bytes.ContainsRune(name, '_') {
		return
	}
	if i := slices.IndexFunc(group.headers, func(one pair) bool { return bytes.ContainsRune(one.key, '_') }); i >= 0 {
		group.headers[i] = pair{name, value}
	}
}

// place makes a place for the label in scratch, which no policy names, and reports whether it has one.
func (h *headersRead) place() bool {
	if len(h.scratch) > maxOtherKey || len(h.order) == maxOtherLabels && string(h.scratch) > h.order[maxOtherLabels-1] {
		return false
	}
	label := string(h.scratch)
	i, _ := slices.BinarySearch(h.order, label)
	h.order = slices.Insert(h.order, i, label)
	if len(h.order) > maxOtherLabels {
		delete(h.kept, h.order[maxOtherLabels])
		h.order = h.order[:maxOtherLabels]
	}
	return true
}

// headers are the headers, as text of their own.
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
