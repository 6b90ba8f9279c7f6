package statefile

import (
	"encoding/binary"
	"math"
)

// A Cursor reads values one after the other. Once one is not there, all further ones are zero, and [Cursor.Whole] is false.
type Cursor struct {
	rest []byte
	bad  bool
}

// NewCursor begins at the first of the bytes.
func NewCursor(b []byte) Cursor { return Cursor{rest: b} }

// Whole reports whether all values were there.
func (c *Cursor) Whole() bool { return !c.bad }

// Done reports whether all values were there, and no more follow.
func (c *Cursor) Done() bool { return !c.bad && len(c.rest) == 0 }

// Bytes reads so many bytes.
func (c *Cursor) Bytes(n int) []byte {
	if c.bad || n < 0 || n > len(c.rest) {
		c.bad, c.rest = true, nil
		return nil
	}
	b := c.rest[:n:n]
	c.rest = c.rest[n:]
	return b
}

// Byte reads a byte.
func (c *Cursor) Byte() byte {
	if b := c.Bytes(1); b != nil {
		return b[0]
	}
	return 0
}

// Uvarint reads a number that [binary.AppendUvarint] wrote.
func (c *Cursor) Uvarint() uint64 {
	v, n := binary.Uvarint(c.rest)
	if n <= 0 {
		n = -1
	}
	if c.Bytes(n); c.bad {
		return 0
	}
	return v
}

// Varint reads a number that [binary.AppendVarint] wrote.
func (c *Cursor) Varint() int64 {
	v, n := binary.Varint(c.rest)
	if n <= 0 {
		n = -1
	}
	if c.Bytes(n); c.bad {
		return 0
	}
	return v
}

// Float reads a number that [AppendFloat] wrote. If it is not finite, it is not there.
func (c *Cursor) Float() float64 {
	b := c.Bytes(8)
	if b == nil {
		return 0
	}
	f := math.Float64frombits(binary.LittleEndian.Uint64(b))
	if math.IsNaN(f) || math.IsInf(f, 0) {
		c.bad, c.rest = true, nil
		return 0
	}
	return f
}

// Text reads bytes that [AppendText] wrote.
func (c *Cursor) Text() []byte {
	n := c.Uvarint()
	if n > uint64(len(c.rest)) {
		c.bad, c.rest = true, nil
		return nil
	}
	return c.Bytes(int(n))
}

// AppendFloat appends a number, 8 bytes.
func AppendFloat(b []byte, f float64) []byte {
	return binary.LittleEndian.AppendUint64(b, math.Float64bits(f))
}

// AppendText appends the length of the text, and the text.
func AppendText[T string | []byte](b []byte, text T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}
