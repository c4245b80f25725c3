package cli

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

// maxApply bounds one apply, bytes: what the controller takes in one message,
// less some room for the framing.
const maxApply = 60 << 20

// collect reads the files of -f: files, directories (every *.yaml and *.yml in
// them, at any depth, hidden ones apart) and "-", which is stdin.
func (a *app) collect(paths []string) ([]*symbolonv1.SourceFile, error) {
	c := collector{seen: map[string]bool{}}
	stdin := false
	for _, p := range paths {
		if p != "-" {
			if err := c.path(p); err != nil {
				return nil, err
			}
			continue
		}
		if stdin {
			return nil, usagef("-f - is given twice, but there is one stdin")
		}
		stdin = true
		if err := c.read("stdin", a.Stdin); err != nil {
			return nil, err
		}
	}
	return c.files, nil
}

type collector struct {
	files []*symbolonv1.SourceFile
	seen  map[string]bool
	size  int
}

func (c *collector) path(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return usagef("-f: %w", err)
	}
	if !info.IsDir() {
		return c.file(path)
	}
	before := len(c.seen)
	err = filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return usagef("-f: %w", err)
		}
		hidden := p != path && strings.HasPrefix(d.Name(), ".")
		switch {
		case d.IsDir() && hidden:
			return filepath.SkipDir
		case d.IsDir() || hidden:
			return nil
		}
		if ext := filepath.Ext(p); ext != ".yaml" && ext != ".yml" {
			return nil
		}
		return c.file(p)
	})
	if err != nil {
		return err
	}
	if len(c.seen) == before {
		return usagef("-f %s: no *.yaml or *.yml in it", path)
	}
	return nil
}

// file adds a file once, also where two arguments lead to it.
func (c *collector) file(path string) error {
	clean := filepath.Clean(path)
	if c.seen[clean] {
		return nil
	}
	c.seen[clean] = true
	f, err := os.Open(path)
	if err != nil {
		return usagef("-f: %w", err)
	}
	defer func() { _ = f.Close() }() // read only
	return c.read(clean, f)
}

func (c *collector) read(name string, r io.Reader) error {
	data, err := io.ReadAll(io.LimitReader(r, int64(maxApply-c.size)+1))
	if err != nil {
		return usagef("read %s: %w", name, err)
	}
	if c.size += len(data); c.size > maxApply {
		return &exitError{ExitUsage, fmt.Errorf("%s: more than %d MiB in one apply: split it", name, maxApply>>20)}
	}
	c.files = append(c.files, &symbolonv1.SourceFile{Name: name, Content: data})
	return nil
}

// filesAndClient is what commands begin with that have the controller look at files.
func (a *app) filesAndClient(paths []string) ([]*symbolonv1.SourceFile, symbolonv1connect.AdminServiceClient, error) {
	files, err := a.collect(paths)
	if err != nil {
		return nil, nil, err
	}
	c, err := a.client()
	return files, c, err
}
