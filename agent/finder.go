package agent

import (
	"strings"
	"unicode/utf8"
)

// From the maxLooked-th label or header of a request on, only those that policies name are looked for.
const maxLooked = 1 << 10

// A finder finds the keys that policies name among the keys of a request, which can have a million. A map would cost
// several times as much for each key.
type finder struct {
	heads   [256]int32 // by hash, the place in keys of the first key, counted from 1
	keys    []soughtKey
	headers bool // keys are names of headers, as labels have them
	repairs bool // a key has the replacement for text that is not UTF-8
	scratch []byte
}

type soughtKey struct {
	key  string
	next int32 // in the list
}

// add adds a key that is not there yet.
func (f *finder) add(key string) {
	if key == "" {
		f.keys = append(f.keys, soughtKey{})
		return
	}
	h := f.hash([]byte(key))
	f.keys = append(f.keys, soughtKey{key, f.heads[h]})
	f.heads[h] = int32(len(f.keys))
	f.repairs = f.repairs || strings.Contains(key, replacement)
}

// find returns the place of a key that was added; -1 for other keys and an empty one.
func (f *finder) find(key []byte) int {
	if len(key) == 0 {
		return -1
	}
	if f.repairs && !utf8.Valid(key) {
		f.scratch = appendText(f.scratch[:0], key)
		key = f.scratch
	}
	for i := f.heads[f.hash(key)]; i != 0; {
		one := &f.keys[i-1]
		if string(key) == one.key || f.headers && sameHeader(key, one.key) {
			return int(i - 1)
		}
		i = one.next
	}
	return -1
}

// hash reads few bytes: there are few keys to find, and a long key that is none of them need not be read.
func (f *finder) hash(key []byte) uint8 {
	first, last := key[0], key[len(key)-1]
	if f.headers {
		first, last = foldHeader(first), foldHeader(last)
	}
	return uint8(len(key)) + 31*first + 17*last
}

// sameHeader reports whether a header becomes the label of this name.
func sameHeader(name []byte, label string) bool {
	if len(name) != len(label) {
		return false
	}
	for i, b := range name {
		if foldHeader(b) != label[i] {
			return false
		}
	}
	return true
}

// foldHeader makes a byte of a header's name one of a label's.
func foldHeader(b byte) byte {
	switch {
	case b == '-':
		return '_'
	case b >= 'A' && b <= 'Z':
		return b + 'a' - 'A'
	}
	return b
}
