package containerlab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
)

// Image is what containers are made from: the machine's own programs, in a file system
// with nothing else.
type Image struct {
	// Name with its tag, such as "example.org/app:1".
	Name string
	// Programs are copied, by absolute path, with the libraries that they need.
	Programs []string
	// Hosts are programs that are mounted into its containers, whose libraries it has.
	Hosts []string
	// Entrypoint is what runs where a container says nothing.
	Entrypoint []string
}

// archive writes the image in the form that `docker save` has, which podman and
// containerd read. Equal images have equal contents; the name is part of those.
func (i Image) archive(path string) error {
	layer, err := i.layer()
	if err != nil {
		return err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": i.Entrypoint},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%x.json", sha256.Sum256(config))
	manifest, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{i.Name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []struct {
		name string
		data []byte
	}{{name, config}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		if err := add(w, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o600)
}

func (i Image) layer() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := add(w, "image", 0o644, []byte(i.Name+"\n")); err != nil {
		return nil, err
	}
	seen := make(map[string]bool)
	copied := func(path string) error {
		if seen[path] {
			return nil
		}
		seen[path] = true
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return add(w, strings.TrimPrefix(path, "/"), 0o755, data)
	}
	for n, program := range append(append([]string(nil), i.Programs...), i.Hosts...) {
		if n < len(i.Programs) {
			if err := copied(program); err != nil {
				return nil, err
			}
		}
		for _, lib := range libraries(program) {
			if err := copied(lib); err != nil {
				return nil, err
			}
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// ldd(1) prints "name => path (address)", and "path (address)" of the loader.
var libraryLine = regexp.MustCompile(`(/\S+) \(0x`)

// libraries are what a program needs to run; none of a static one.
func libraries(program string) []string {
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil // "not a dynamic executable"
	}
	var paths []string
	for _, m := range libraryLine.FindAllStringSubmatch(string(out), -1) {
		paths = append(paths, m[1])
	}
	return paths
}

func add(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
