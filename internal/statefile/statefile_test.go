package statefile_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/headgate-go/headgate/internal/statefile"
)

// content is what the tests write, and what testdata/v2.state has.
const content = `drained true, written 2026-03-04T05:06:07.000000008Z, secret "sesame", agent 300
component {Policy:p ID:root.0 Hash:0123 Kind:rate_limiter Label:user Mode:continuous}
  "alice" 01020304
  "" 05
  shared 06
component {Policy:p ID:root.1 Hash:4567 Kind:concurrency_limiter Label: Mode:slots}
component {Policy:q ID:ramp Hash:89ab Kind:load_ramp Label: Mode:starts}
  shared 
`

func written(t testing.TB, limit int) ([]byte, *statefile.Writer) {
	t.Helper()
	var b bytes.Buffer
	w := statefile.NewWriter(&b, statefile.Header{
		Drained: true, Written: time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC), Secret: []byte("sesame"), Agent: 300,
	}, limit)
	w.Component(statefile.Component{Policy: "p", ID: "root.0", Hash: "0123", Kind: "rate_limiter", Label: "user", Mode: "continuous"})
	w.Key("alice", []byte{1, 2, 3, 4})
	w.Key("", []byte{5})
	w.Shared([]byte{6})
	w.Component(statefile.Component{Policy: "p", ID: "root.1", Hash: "4567", Kind: "concurrency_limiter", Mode: "slots"})
	w.Component(statefile.Component{Policy: "q", ID: "ramp", Hash: "89ab", Kind: "load_ramp", Mode: "starts"})
	w.Shared(nil)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), w
}

// shown says what is in a file.
func shown(f *statefile.File) string {
	var b strings.Builder
	fmt.Fprintf(&b, "drained %v, written %s, secret %q, agent %d\n", f.Drained, f.Written.UTC().Format(time.RFC3339Nano), f.Secret, f.Agent)
	f.Each(func(c statefile.Component) func(statefile.Record) {
		fmt.Fprintf(&b, "component %+v\n", c)
		return func(r statefile.Record) {
			key := fmt.Sprintf("%q", r.Key)
			if r.Shared {
				key = "shared"
			}
			fmt.Fprintf(&b, "  %s %s\n", key, hex.EncodeToString(r.State))
		}
	})
	return b.String()
}

func TestWriteAndParse(t *testing.T) {
	data, w := written(t, statefile.MaxSize)
	f, err := statefile.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if got := shown(f); got != content || w.Omitted() != 0 {
		t.Errorf("omitted %d; read\n%s\nwant\n%s", w.Omitted(), got, content)
	}
}

// -update writes the golden file of the present version, for a version that has none yet.
var update = flag.Bool("update", false, "write testdata of the present version")

// Files of this version and of the one before stay readable. A golden file never changes: a change of the format is a new version,
// with a new file.
func TestGoldenFiles(t *testing.T) {
	if name := filepath.Join("testdata", fmt.Sprintf("v%d.state", statefile.Version)); *update {
		data, _ := written(t, statefile.MaxSize)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for version := max(statefile.Version-1, 1); version <= statefile.Version; version++ {
		f, err := statefile.Load(filepath.Join("testdata", fmt.Sprintf("v%d.state", version)))
		if err != nil {
			t.Fatal(err)
		}
		want := content
		if version == 1 { // which did not name the agent
			want = strings.Replace(content, "agent 300", "agent 0", 1)
		}
		if got := shown(f); got != want {
			t.Errorf("version %d: read\n%s\nwant\n%s", version, got, want)
		}
	}
}

// sealed makes the checksum right.
func sealed(data []byte) []byte {
	body := data[:len(data)-4]
	sum := crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
	return append(bytes.Clone(body), byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
}

func TestParseErrors(t *testing.T) {
	data, _ := written(t, statefile.MaxSize)
	changed := func(at int, to byte) []byte {
		c := bytes.Clone(data)
		c[at] = to
		return c
	}
	for _, tt := range []struct {
		name string
		data []byte
		want error
	}{
		{"empty", nil, statefile.ErrTruncated},
		{"magic only", data[:8], statefile.ErrTruncated},
		{"another file", []byte("circuit:\n  components: []\n"), statefile.ErrForeign},
		{"half", data[:len(data)/2], statefile.ErrTruncated},
		{"without its last byte", data[:len(data)-1], statefile.ErrTruncated},
		{"zeros at its end", append(bytes.Clone(data[:len(data)-9]), make([]byte, 100)...), statefile.ErrTruncated},
		{"a byte is different", changed(len(data)/2, 'x'), statefile.ErrDamaged},
		{"the checksum is different", changed(len(data)-1, data[len(data)-1]+1), statefile.ErrDamaged},
		{"version 0", sealed(changed(8, 0)), statefile.ErrVersion},
		{"a newer version", sealed(changed(8, statefile.Version+1)), statefile.ErrVersion},
		{"an unknown section", sealed(changed(bytes.Index(data, []byte("\x02\x05alice")), 9)), statefile.ErrDamaged},
		{"a text beyond the end", sealed(changed(bytes.Index(data, []byte("\x05alice")), 0x7f)), statefile.ErrDamaged},
		{"a state of no component", sealed(changed(bytes.Index(data, []byte("\x01\x01p\x06root.0")), 3)), statefile.ErrDamaged},
		{"an end before the end", sealed(changed(bytes.Index(data, []byte("\x02\x05alice")), 0)), statefile.ErrDamaged},
	} {
		if f, err := statefile.Parse(tt.data); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, %v want %v", tt.name, f, err, tt.want)
		}
	}
	for n := range data {
		if _, err := statefile.Parse(data[:n]); !errors.Is(err, statefile.ErrTruncated) {
			t.Errorf("the first %d bytes: %v want %v", n, err, statefile.ErrTruncated)
		}
		if _, err := statefile.Parse(changed(n, data[n]+1)); err == nil {
			t.Errorf("byte %d is another: want an error", n)
		}
	}
}

// A file is no larger than it may be. What has no room is counted.
func TestWriterIsBounded(t *testing.T) {
	whole, _ := written(t, statefile.MaxSize)
	for limit := range len(whole) + 1 {
		data, w := written(t, limit)
		f, err := statefile.Parse(data)
		if err != nil {
			t.Fatalf("within %d bytes: %v", limit, err)
		}
		states := strings.Count(shown(f), "\n  ")
		if len(data) > limit && strings.Contains(shown(f), "component") || states+w.Omitted() != 4 {
			t.Errorf("within %d bytes: %d bytes with %d states, omitted %d want 4 in all", limit, len(data), states, w.Omitted())
		}
		if limit == len(whole) && w.Omitted() != 0 {
			t.Errorf("within as many bytes as it needs: omitted %d", w.Omitted())
		}
	}
}

// A failing destination fails Close.
func TestWriterFails(t *testing.T) {
	want := errors.New("disk full")
	w := statefile.NewWriter(writer(func([]byte) (int, error) { return 0, want }), statefile.Header{}, statefile.MaxSize)
	if err := w.Close(); !errors.Is(err, want) {
		t.Errorf("Close = %v want %v", err, want)
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

func TestSaveAndLoad(t *testing.T) {
	name := filepath.Join(t.TempDir(), "state")
	if _, err := statefile.Load(name); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), name) {
		t.Errorf("Load = %v want %v, with its name", err, fs.ErrNotExist)
	}
	data, _ := written(t, statefile.MaxSize)
	save := func(data []byte, fail error) error {
		return statefile.Save(name, func(w io.Writer) error {
			_, err := w.Write(data)
			return errors.Join(err, fail)
		})
	}
	if err := os.WriteFile(name+".tmp", []byte("of a process that was killed"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := save(data, nil); err != nil {
		t.Fatal(err)
	}
	fail := errors.New("it fails")
	if err := save([]byte("half"), fail); !errors.Is(err, fail) {
		t.Errorf("Save = %v want %v", err, fail)
	}
	f, err := statefile.Load(name)
	if err != nil || shown(f) != content {
		t.Errorf("Load after a failure = %v, %v want the file of before", f, err)
	}
	if about, err := os.Stat(name); err != nil || runtime.GOOS != "windows" && about.Mode() != 0o600 {
		t.Errorf("%v, %v want a file that only its owner reads", about.Mode(), err)
	}
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files are left, %v want one", len(entries), err)
	}
	if err := save(data[:len(data)-20], nil); err != nil {
		t.Fatal(err)
	}
	if _, err := statefile.Load(name); !errors.Is(err, statefile.ErrTruncated) || !strings.Contains(err.Error(), name) {
		t.Errorf("Load = %v want %v, with its name", err, statefile.ErrTruncated)
	}
	if err := os.Truncate(name, statefile.MaxSize+1); err != nil {
		t.Fatal(err)
	}
	if _, err := statefile.Load(name); !errors.Is(err, statefile.ErrTooLarge) || !strings.Contains(err.Error(), name) {
		t.Errorf("Load = %v want %v, with its name", err, statefile.ErrTooLarge)
	}
	if err := statefile.Save(filepath.Join(name, "nowhere", "state"), func(io.Writer) error { return nil }); err == nil {
		t.Error("Save in a folder that is not there = nil")
	}
}

// Parse does not panic and allocates next to nothing, whatever it reads. What it reads without an error has whole sections.
func FuzzParse(f *testing.F) {
	data, _ := written(f, statefile.MaxSize)
	f.Add(data)
	f.Add(data[:20])
	f.Add([]byte("HGSTATE\n\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, data := range [][]byte{data, reseal(data)} {
			file, err := statefile.Parse(data)
			if err != nil {
				continue
			}
			total := 0
			file.Each(func(c statefile.Component) func(statefile.Record) {
				total += len(c.Policy) + len(c.ID) + len(c.Hash) + len(c.Kind) + len(c.Label) + len(c.Mode)
				return func(r statefile.Record) { total += len(r.Key) + len(r.State) }
			})
			if total > len(data) {
				t.Errorf("%d bytes in a file of %d", total, len(data))
			}
		}
	})
}

// reseal gives data the end of a file.
func reseal(data []byte) []byte {
	return sealed(append(bytes.Clone(data), "\x00end\n1234"...))
}
