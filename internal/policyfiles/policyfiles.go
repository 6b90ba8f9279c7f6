// Package policyfiles finds and reads the files that a path of policies stands for.
package policyfiles

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
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

// Read returns a file's content. Of a file that is too large, it returns one byte more than MaxSize.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var data bytes.Buffer
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
		data.Grow(int(min(info.Size(), MaxSize+1)) + bytes.MinRead) // so that the buffer does not grow by doubling
	}
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
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: is not a regular file", file)
	}
	f, err := os.Open(file)
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
