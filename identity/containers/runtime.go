package containers

import (
	"context"
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/symbolon/symbolon/identity"
)

var (
	// errUnknown: the runtime has no such container.
	errUnknown = errors.New("no such container")
	// errNotYet: it has, and no process in it: it is about to start, or has ended.
	errNotYet = errors.New("the container does not run")
	// errMalformed: the answer is none to the question.
	errMalformed = errors.New("malformed answer")
)

// Bounds of an answer.
const (
	// maxAnswer is in bytes, several times what runtimes say of a container with a
	// hundred mounts.
	maxAnswer = 2 << 20
	// maxValue is an attribute's, bytes, below what the controller takes. Longer ones are
	// left out: a part could mean something else.
	maxValue = 512
	// maxDigests: an image may have been pulled under several names.
	maxDigests = 8
)

// container is what a runtime says of one.
type container struct {
	pid            int // of its first process, in the runtime's PID namespace
	name           string
	runtime        string
	image, imageID string
	repoDigests    []string // "registry/name@sha256:..."
	namespace, pod string   // Kubernetes'
}

// asker is one runtime. Safe for concurrent use.
type asker interface {
	// ask tells what the runtime knows of the container with this id. Errors: errUnknown,
	// errNotYet, errMalformed, and those of the connection.
	ask(ctx context.Context, id string) (*container, error)
}

// attributes are the container's, as identity has them.
func (c *container) attributes() identity.Attributes {
	m := make(map[string][]string)
	set := func(key, value string) {
		if printable(value) {
			m[key] = append(m[key], value)
		}
	}
	set("container.name", c.name)
	set("container.runtime", c.runtime)
	set("image.name", c.image)
	set("image.id", digest(c.imageID))
	for _, d := range c.repoDigests {
		_, d, _ = strings.Cut(d, "@")
		if len(m["image.digest"]) < maxDigests {
			set("image.digest", digest(d))
		}
	}
	set("k8s.namespace", c.namespace)
	set("k8s.pod", c.pod)
	return identity.NewAttributes(m)
}

// digest is s as sha256:<64 hexadecimal digits>, which some runtimes leave off; "" if it
// is none.
func digest(s string) string {
	hex := strings.TrimPrefix(s, "sha256:")
	if len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return ""
	}
	return "sha256:" + hex
}

func printable(s string) bool {
	return s != "" && len(s) <= maxValue && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}
