// Package statefile is the file in which an engine's limits outlive their process.
//
// A file is:
//
//	magic      8 bytes, "HGSTATE\n"
//	version    a uvarint
//	flags      a byte; bit 0: the agent was drained
//	written    a varint: when it was written, in Unix nanoseconds by the wall clock. All other times are relative to it
//	secret     a text: what names of hidden values are made with
//	agent      a uvarint: the agent's number in its clients' sessions; 0 for none. Version 1 has no such field
//	sections   see below
//	end        a zero byte
//	trailer    "end\n" and the CRC-32C of all that is before it, 4 bytes, least significant first
//
// A text is its length in bytes, a uvarint, and its bytes. A section is a byte and what follows it:
//
//	1 component  six texts: policy, ID, hash, kind, label, mode. What follows, up to the next one, is of this component
//	2 key        a text, the key, and a text, its state
//	3 shared     a text, the state of all flows, or that of the keys that had no room for a state of their own
//
// The states are made by the components' kinds, which say how in their own packages. The numbers are those of encoding/binary.
package statefile

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"
)

// Version is that of the files that a [Writer] writes. [Parse] reads it and the one before.
const Version = 2

// MaxSize is the longest file, in bytes.
const MaxSize = 256 << 20

const (
	magic   = "HGSTATE\n"
	trailer = "end\n"
	tail    = 1 + len(trailer) + crc32.Size // the end of the sections, and the trailer

	flagDrained = 1 << 0
)

// The sections.
const (
	sectionEnd byte = iota
	sectionComponent
	sectionKey
	sectionShared
)

// What is wrong with a file that cannot be read.
var (
	ErrForeign   = errors.New("it is no state of an agent")
	ErrTruncated = errors.New("it is truncated")
	ErrDamaged   = errors.New("it is damaged")
	ErrTooLarge  = fmt.Errorf("it is larger than %d bytes", MaxSize)
	ErrVersion   = errors.New("this program does not know its version")
)

// castagnoli returns the table of the checksum. The package crc32 makes it once.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// A Header says what a whole file has in common.
type Header struct {
	// Drained means that the agent decided about no more flows after the file was written.
	Drained bool

	// Written is when the file was written, by the wall clock.
	Written time.Time

	// Secret is what names of hidden values are made with.
	Secret []byte

	// Agent is the agent's number in its clients' sessions; 0 for none, as in a file of version 1.
	Agent uint64
}

// A Component says whose states follow.
type Component struct {
	// Policy and ID are the component's identity.
	Policy, ID string

	// Hash is that of the configuration, by which clients name slots.
	Hash string

	// Kind, Label and Mode say what the states mean.
	Kind, Label, Mode string
}

// A Record is one state.
type Record struct {
	Shared bool // it has no key of its own
	Key    []byte
	State  []byte
}

// A Writer writes a file. It has no more in memory than a buffer. Its methods return no errors: Close does.
type Writer struct {
	to      *bufio.Writer
	sum     uint32
	table   *crc32.Table
	size    int
	limit   int
	omitted int
	open    bool // the component has been written
	scratch []byte
	err     error
}

// NewWriter begins a file of at most limit bytes, or MaxSize if that is less. A limit too small for a file without states is
// taken for the size of such a file.
func NewWriter(to io.Writer, h Header, limit int) *Writer {
	w := &Writer{to: bufio.NewWriterSize(to, 64<<10), table: castagnoli(), limit: min(limit, MaxSize)}
	b := binary.AppendUvarint([]byte(magic), Version)
	flags := byte(0)
	if h.Drained {
		flags |= flagDrained
	}
	b = binary.AppendVarint(append(b, flags), h.Written.UnixNano())
	w.write(binary.AppendUvarint(AppendText(b, h.Secret), h.Agent))
	return w
}

// Component begins a component. If it does not fit, its states do not either.
func (w *Writer) Component(c Component) {
	b := append(w.scratch[:0], sectionComponent) //nolint:gocritic // the scratch is kept by section
	for _, text := range []string{c.Policy, c.ID, c.Hash, c.Kind, c.Label, c.Mode} {
		b = AppendText(b, text)
	}
	w.open = w.section(b)
}

// Key writes the state of a key. It reports whether it fits, and counts it as omitted otherwise.
func (w *Writer) Key(key string, state []byte) bool {
	return w.state(AppendText(append(w.scratch[:0], sectionKey), key), state)
}

// Shared does so for a state without a key.
func (w *Writer) Shared(state []byte) bool {
	return w.state(append(w.scratch[:0], sectionShared), state)
}

func (w *Writer) state(b, state []byte) bool {
	if !w.open || !w.section(AppendText(b, state)) {
		w.omitted++
		return false
	}
	return true
}

// section writes the bytes if they fit.
func (w *Writer) section(b []byte) bool {
	w.scratch = b
	if w.size+len(b)+tail > w.limit {
		return false
	}
	w.write(b)
	return true
}

func (w *Writer) write(b []byte) {
	w.size += len(b)
	w.sum = crc32.Update(w.sum, w.table, b)
	if w.err == nil {
		_, w.err = w.to.Write(b)
	}
}

// Omitted returns how many states had no room.
func (w *Writer) Omitted() int { return w.omitted }

// Close ends the file. It returns the first error of all that was written.
func (w *Writer) Close() error {
	w.write(append([]byte{sectionEnd}, trailer...))
	w.write(binary.LittleEndian.AppendUint32(nil, w.sum))
	if err := w.to.Flush(); w.err == nil {
		w.err = err
	}
	return w.err
}

// A File is one that has been read. It refers to the bytes that it was read from.
type File struct {
	Header
	sections []byte
}

// Parse reads a file. It allocates nothing that grows with the file. Errors are those of this package, or wrap them.
func Parse(data []byte) (*File, error) {
	if len(data) > MaxSize {
		return nil, ErrTooLarge
	}
	if n := min(len(data), len(magic)); string(data[:n]) != magic[:n] {
		return nil, ErrForeign
	}
	c := NewCursor(data[min(len(data), len(magic)):])
	version := c.Uvarint()
	switch {
	case c.bad:
		return nil, ErrTruncated
	case version > Version:
		return nil, fmt.Errorf("%w: it is %d, and the newest known is %d", ErrVersion, version, Version)
	case version < max(Version-1, 1):
		return nil, fmt.Errorf("%w: it is %d, and the oldest known is %d", ErrVersion, version, max(Version-1, 1))
	}
	// Versions have magic, version and trailer in common.
	if len(c.rest) < tail || string(data[len(data)-crc32.Size-len(trailer):len(data)-crc32.Size]) != trailer {
		return nil, ErrTruncated
	}
	summed := data[:len(data)-crc32.Size]
	if crc32.Checksum(summed, castagnoli()) != binary.LittleEndian.Uint32(data[len(summed):]) {
		return nil, ErrDamaged
	}
	c.rest = c.rest[:len(c.rest)-crc32.Size-len(trailer)]
	flags := c.Byte()
	written, secret := c.Varint(), c.Text()
	f := &File{Header: Header{Drained: flags&flagDrained != 0, Written: time.Unix(0, written), Secret: secret}}
	if version > 1 {
		f.Agent = c.Uvarint()
	}
	f.sections = c.rest
	if c.bad || !f.each(func(Component) func(Record) { return nil }) {
		return nil, ErrDamaged
	}
	return f, nil
}

// Each calls the function for each component, and the function that it returns for the component's states; nil skips them.
func (f *File) Each(component func(Component) func(Record)) { f.each(component) }

// each is Each. It reports whether the sections are whole.
func (f *File) each(component func(Component) func(Record)) bool {
	c, state, some := NewCursor(f.sections), (func(Record))(nil), false
	for !c.bad {
		section := c.Byte()
		switch {
		case c.bad:
		case section == sectionEnd:
			return len(c.rest) == 0
		case section == sectionComponent:
			of := Component{
				Policy: string(c.Text()), ID: string(c.Text()), Hash: string(c.Text()),
				Kind: string(c.Text()), Label: string(c.Text()), Mode: string(c.Text()),
			}
			if !c.bad {
				state, some = component(of), true
			}
		case (section == sectionKey || section == sectionShared) && some:
			r := Record{Shared: section == sectionShared}
			if !r.Shared {
				r.Key = c.Text()
			}
			r.State = c.Text()
			if !c.bad && state != nil {
				state(r)
			}
		default:
			return false
		}
	}
	return false
}

// Load reads the file of that name. The error names the file. It wraps those of Parse, and fs.ErrNotExist.
func Load(name string) (*File, error) {
	data, err := load(name)
	if err != nil {
		return nil, err // which names the file
	}
	f, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}

func load(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	about, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if about.Size() > MaxSize {
		return nil, fmt.Errorf("%s: %w", name, ErrTooLarge)
	}
	data := make([]byte, about.Size()) // nobody changes a file in place: see Save
	if _, err := io.ReadFull(f, data); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return data, nil
}

// Save replaces the file of that name by what the function writes, all at once: whatever happens, the file is the old one or
// the new one. It is written next to it, under the name with ".tmp" at its end. Only the owner can read it, since it has values
// of labels.
func Save(name string, write func(io.Writer) error) (err error) {
	temporary := name + ".tmp"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) { // of a process that was killed
		return err
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temporary)
		}
	}()
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temporary, name); err != nil {
		return err
	}
	// So that the new name outlives a crash of the machine. Not every system can do this, and the file is whole either way.
	if folder, err := os.Open(filepath.Dir(name)); err == nil {
		_ = folder.Sync()
		_ = folder.Close()
	}
	return nil
}
