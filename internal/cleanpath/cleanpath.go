// Package cleanpath tells paths that all programs read alike from paths that another program may take for a different
// one. Code that decides by a path from a peer, and passes the request on, needs the difference.
package cleanpath

import (
	"unicode"
	"unicode/utf8"
)

// Is reports whether the path, of an HTTP request or a gRPC method, is clean after one percent-decoding:
//
//   - it begins with a slash, and no segment but the last is empty,
//   - no segment ends with a dot or a space of any kind, which some file systems drop,
//   - it has no backslash, semicolon, question mark, number sign, percent sign or control character: readers make slashes of
//     them, cut the path there or decode it once more,
//   - it is valid UTF-8, and has nothing that Unicode compatibility turns into a dot, slash, backslash or one of those.
func Is(path string) bool {
	if path == "" || path[0] != '/' || !utf8.ValidString(path) {
		return false
	}
	before := '/'
	for _, r := range path[1:] {
		switch {
		case special(r), r == '/' && (before == '/' || dropped(before)):
			return false
		}
		before = r
	}
	return !dropped(before)
}

// dropped reports whether some readers drop the rune at the end of a segment.
func dropped(r rune) bool { return r == '.' || unicode.IsSpace(r) }

// special reports whether some readers take the rune for more than a part of a name.
func special(r rune) bool {
	switch r {
	case '\\', ';', '?', '#', '%', 0x7f,
		'\u037e',                               // Greek question mark, a semicolon
		'\u2024', '\u2025', '\u2026', '\u2047', // one to three dots, and question marks
		'\u2048', '\u2049',
		'\u2044', '\u2215', // slashes by the tables of some code pages
		'\u2100', '\u2101', '\u2105', '\u2106', // letters with a slash
		'\u33c2', '\u33c7', '\u33d8', '\U0001f100', // letters and a digit with dots
		'\ufe14', '\ufe16', '\ufe19', '\ufe30', '\ufe52', '\ufe54', '\ufe56', '\ufe5f', '\ufe68', '\ufe6a', // small forms, and vertical ones
		'\uff03', '\uff05', '\uff0e', '\uff0f', '\uff1b', '\uff1f', '\uff3c': // full-width forms
		return true
	}
	return r < ' ' || r >= 0x80 && r < 0xa0 || r >= '\u2488' && r <= '\u249b' // control characters, and numbers with a dot
}
