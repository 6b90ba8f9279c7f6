package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/headgate-go/headgate/internal/slip"
)

// An Error is one problem of a policy. The error that [Load], [Parse] and [Policy.Validate] return is one of these or
// several joined, at most 20 and then an error that counts the rest; errors.As finds the first.
type Error struct {
	// File is where the policy comes from. Empty for a policy written in Go.
	File string

	// Line and Column, counted in characters from 1, are where in the file the problem is. Zero for a policy written
	// in Go, and for a directory.
	Line, Column int

	// Field is the path of what is wrong: the file's keys, as in
	// circuit.components[0].flow_control.rate_limiter.parameters.interval, or the Go fields, as in
	// policy "per-user": components[0].Interval. Long keys are cut, and those with unusual characters look like
	// ["my key"]. Empty when the problem is not one field's.
	Field string

	// Message says what is wrong. It quotes at most the beginning of the value.
	Message string
}

// Error returns "file:line:column: field: message" without the parts that are empty. It may be called on a nil pointer.
func (e *Error) Error() string {
	if e == nil {
		return "<nil>"
	}
	where := e.File
	if e.Line > 0 {
		where = strings.TrimPrefix(fmt.Sprintf("%s:%d:%d", where, e.Line, e.Column), ":")
	}
	message := e.Message
	for _, part := range []string{e.Field, where} {
		if part != "" {
			message = part + ": " + message
		}
	}
	return message
}

// mostErrors is the number of errors after which reading stops.
const mostErrors = 200

// join returns nil, the only error, or all of them as one: the first 20, because a file of the wrong kind has
// thousands.
func join(errs []error) error {
	const most = 20
	if len(errs) == 1 {
		return errs[0]
	}
	if more := len(errs) - most; more > 0 {
		least := ""
		if len(errs) >= mostErrors {
			least = "at least "
		}
		errs = append(errs[:most:most], fmt.Errorf("and %s%d more", least, more))
	}
	return errors.Join(errs...)
}

// inOrder sorts one file's errors by where they are.
func inOrder(errs []*Error) {
	slices.SortStableFunc(errs, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// clip returns at most the first n bytes of s, and an ellipsis for the rest.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// printable escapes what could forge or hide parts of a line.
func printable(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// quote quotes the beginning of a value for a message.
func quote(s string) string { return fmt.Sprintf("%q", clip(s, 40)) }

// suggest returns `; did you mean "x"?` for the known word that is nearest to the wrong one, or "" when none is near.
func suggest(wrong string, known []string) string {
	word := likely(wrong, known)
	if word == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", word)
}

// likely returns the known word that is nearest to the wrong one; "" when none is near. Case, dashes and underscores do not count, so
// that bucketCapacity finds bucket_capacity.
func likely(wrong string, known []string) string {
	const longest = 64 // no known word comes near it, and the distance takes quadratic time
	if len(wrong) > longest {
		return ""
	}
	wrong = fold(wrong)
	best, nearest := len(wrong)/3+1, ""
	for _, word := range known {
		folded := fold(word)
		if d := len(wrong) - len(folded); max(d, -d) >= best {
			continue // so are as many bytes to insert or delete
		}
		d := slip.Distance(wrong, folded)
		if len(wrong) == 2 && len(folded) == 2 && wrong[0] == folded[1] && wrong[1] == folded[0] {
			d = 0 // of is as near to fo as a short word can be
		}
		if d < best {
			best, nearest = d, word
		}
	}
	if nearest == "" {
		nearest = abridged(wrong, known)
	}
	if nearest == "" && len(wrong) == 2 {
		nearest = cmp.Or(lacking(wrong, known), beside(wrong, known))
	}
	return nearest
}

// fold returns a word without what does not count in it.
func fold(word string) string {
	return strings.ReplaceAll(strings.ReplaceAll(strings.ToLower(word), "_", ""), "-", "")
}

// lacking returns the known word of three letters that a wrong word of two becomes with one letter more; "" if there are none or
// several.
func lacking(wrong string, known []string) (word string) {
	for _, w := range known {
		if folded := fold(w); len(folded) != len(wrong)+1 || slip.Distance(wrong, folded) != 1 {
			continue
		}
		if word != "" && word != w {
			return ""
		}
		word = w
	}
	return word
}

// beside returns the known word of two letters that has one of a wrong word's two in its place, as at is for az. The first letter goes
// before the second. It returns "" if there are none.
func beside(wrong string, known []string) (word string) {
	for _, w := range known {
		folded := fold(w)
		if len(folded) != len(wrong) {
			continue
		}
		if folded[0] == wrong[0] {
			return w
		}
		if word == "" && folded[1] == wrong[1] {
			word = w
		}
	}
	return word
}

// abridged returns the only known word that a wrong one is short for, as capacity is for bucket_capacity, and params for
// parameters. It returns "" if there are none or several.
func abridged(wrong string, known []string) (word string) {
	const shortest = 4
	if len(wrong) < shortest {
		return ""
	}
	for _, w := range known {
		if whole := fold(w); !strings.HasPrefix(whole, strings.TrimSuffix(wrong, "s")) && !strings.HasSuffix(whole, wrong) {
			continue
		}
		if word != "" && word != w {
			return ""
		}
		word = w
	}
	return word
}
