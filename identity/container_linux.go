package identity

import (
	"context"
	"errors"
	"slices"
	"strings"
)

// Container names a container of this host as the kernel does.
type Container struct {
	// ID is the runtime's, from the name of the cgroup.
	ID string
	// Cgroup is the cgroup that the runtime made for the container. Processes in it and
	// below are the container's.
	Cgroup string
}

// Containers is what the container runtimes of this host say of their containers;
// identity/containers is the real one. Safe for concurrent use.
type Containers interface {
	// Known is what is known of c by now, without waiting: attributes container.*, image.*
	// and k8s.*, none if no runtime has spoken of it. serial changes with them. Not ok: c
	// is to be learned first.
	Known(c Container) (a Attributes, serial uint64, ok bool)
	// Learn asks for c, and waits for the answer as long as a connection may wait. After
	// that c is Known, whether or not somebody has answered.
	Learn(ctx context.Context, c Container)
}

// SetContainers adds what c knows to the attributes of containers. Before the first use.
func (r *Resolver) SetContainers(c Containers) { r.runtimes = c }

// containerOf is the container of a cgroup; not ok: it is in none.
func (f cgroupFacts) containerOf() (c Container, ok bool) {
	return Container{f.container, f.containerAt}, f.container != ""
}

// met tells whether the container of a cgroup, if it is in one, has been asked for.
func (r *Resolver) met(cg cgroupFacts) bool {
	c, ok := cg.containerOf()
	if !ok || r.runtimes == nil {
		return true
	}
	_, _, ok = r.runtimes.Known(c)
	return ok
}

// meet is workload for who may wait: of a container seen for the first time the runtime
// is asked before.
func (r *Resolver) meet(ctx context.Context, f facts) (*Workload, error) {
	cg := parseCgroup(f.cgroup)
	if !r.met(cg) {
		c, _ := cg.containerOf()
		r.runtimes.Learn(ctx, c)
	}
	return r.workloadIn(f, cg)
}

// about is what is known of the container of a cgroup.
func (r *Resolver) about(cg cgroupFacts) (a Attributes, serial uint64) {
	if c, ok := cg.containerOf(); ok && r.runtimes != nil {
		a, serial, _ = r.runtimes.Known(c)
	}
	return a, serial
}

// containerID is the one key of container.* that is the kernel's word, not the runtime's.
const containerID = "container.id"

// refreshContainer is Refresh for a workload in a container.
func (r *Resolver) refreshContainer(w *Workload) *Workload {
	c, ok := parseCgroup(w.Attributes.Get("proc.cgroup")).containerOf()
	if !ok || r.runtimes == nil {
		return w
	}
	about, _, ok := r.runtimes.Known(c)
	if !ok {
		return w // nobody asks for it any more
	}
	now := w.Attributes.Filter(func(k string) bool { return k == containerID || !ofRuntime(k) }).Union(about)
	if slices.Equal(now, w.Attributes) {
		return w
	}
	return &Workload{Key: w.Key, Attributes: now}
}

// ofRuntime tells whether a key is a container runtime's to set.
func ofRuntime(key string) bool {
	source, _, _ := strings.Cut(key, ".")
	return source == "container" || source == "image" || source == "k8s"
}

// Has tells whether a process is c's now, by the kernel's word: it is in c's cgroup. A
// process that has ended is in none. Errors are those of reading.
func (c Container) Has(pid int) (bool, error) {
	p, err := openProcess("/proc", pid)
	if errors.Is(err, errGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer p.close()
	v2, v1, err := p.cgroups()
	if errors.Is(err, errGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if v2 == "" || v2 == "/" {
		v2 = v1 // as Resolver.placeOf
	}
	of, ok := parseCgroup(v2).containerOf()
	return ok && of == c, nil
}
