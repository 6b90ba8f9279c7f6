package policyfiles_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/headgate-go/headgate/internal/policyfiles"
)

// The digest changes with the content and the names of the files that count, and with nothing else.
func TestDigestOf(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var last policyfiles.Digest
	step := func(what string, change bool) {
		t.Helper()
		now, err := policyfiles.DigestOf(dir)
		if err != nil {
			t.Fatal(err)
		}
		if changed := now != last; changed != change {
			t.Errorf("%s: changed %v want %v", what, changed, change)
		}
		last = now
	}
	write("a.yaml", "1")
	step("a file", true)
	write("a.yaml", "2")
	step("its content", true)
	write(".b.yaml", "1")
	write("b.txt", "1")
	if err := os.Mkdir(filepath.Join(dir, "c.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	step("files that do not count", false)
	write("a.yaml", "2")
	step("the same content", false)
	if err := os.Rename(filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yml")); err != nil {
		t.Fatal(err)
	}
	step("the name", true)
	if err := os.Symlink(dir, filepath.Join(dir, "d.yaml")); err != nil {
		t.Skip("no symbolic links:", err)
	}
	if _, err := policyfiles.DigestOf(dir); err == nil {
		t.Error("a link to a directory is no error")
	}
}
