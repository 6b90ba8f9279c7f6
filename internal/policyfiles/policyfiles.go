// Package policyfiles finds and reads the files that a path of policies stands for.
package policyfiles

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// MaxSize is the most bytes of a file.
const MaxSize = 16 << 20

// List returns the files that a path stands for: itself or, of a directory, the files whose names end in .yaml or .yml
// and do not begin with a dot, in the order of their names. There may be none.
func List(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if (ext == ".yaml" || ext == ".yml") && !strings.HasPrefix(e.Name(), ".") && !e.IsDir() {
			files = append(files, filepath.Join(path, e.Name()))
		}
	}
	return files, nil
}

var errNotRegular = errors.New("it is not a regular file")

// open opens a regular file. Any other may keep its opener or reader waiting.
func open(path string) (*os.File, int64, error) {
	info, err := os.Stat(path) // before it is opened, because that may do something to a device
	if err == nil && !info.Mode().IsRegular() {
		return nil, 0, &fs.PathError{Op: "open", Path: path, Err: errNotRegular}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|nonblocking, 0) // because the file may have become another since then
	if err != nil {
		return nil, 0, err
	}
	if info, err = f.Stat(); err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: path, Err: errNotRegular}
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// Read returns a file's content. Of a file that is too large, it returns one byte more than MaxSize. A file that is not
// regular is an error.
func Read(path string) ([]byte, error) {
	f, size, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var data bytes.Buffer
	data.Grow(int(min(size, MaxSize+1)) + bytes.MinRead) // so that the buffer does not grow by doubling
	_, err = data.ReadFrom(io.LimitReader(f, MaxSize+1))
	return data.Bytes(), err
}

// A Digest stands for the names and contents of files.
type Digest [sha256.Size]byte

// DigestOf returns the digest of the files that a path stands for. A file that is not regular is an error, because it
// may keep its reader waiting.
func DigestOf(path string) (Digest, error) {
	files, err := List(path)
	if err != nil {
		return Digest{}, err
	}
	all := sha256.New()
	for _, file := range files {
		one, err := digestOf(file)
		if err != nil {
			return Digest{}, err
		}
		_, _ = all.Write(binary.AppendUvarint(nil, uint64(len(file))))
		_, _ = io.WriteString(all, file)
		_, _ = all.Write(one)
	}
	return Digest(all.Sum(nil)), nil
}

func digestOf(file string) ([]byte, error) {
	f, _, err := open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(f, MaxSize+1)); err != nil {
		return nil, err
	}
	return sum.Sum(nil), nil
}
