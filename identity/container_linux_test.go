package identity

import (
	"context"
	"strings"
	"sync"
	"testing"
)

// spoken is a runtime that has spoken of some containers.
type spoken struct {
	mu      sync.Mutex
	about   map[Container]Attributes
	asked   map[Container]int
	serials map[Container]uint64
}

func newSpoken() *spoken {
	return &spoken{about: make(map[Container]Attributes), asked: make(map[Container]int), serials: make(map[Container]uint64)}
}

func (s *spoken) Known(c Container) (Attributes, uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.about[c], s.serials[c], s.asked[c] > 0
}

func (s *spoken) Learn(_ context.Context, c Container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[c]++
}

func (s *spoken) say(c Container, m map[string][]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.about[c] = NewAttributes(m)
	s.serials[c]++
}

func TestContainerAttributes(t *testing.T) {
	id := strings.Repeat("ab", 32)
	at := "/system.slice/docker-" + id + ".scope"
	c := Container{id, at}
	s := Socket{UID: 0, Inode: 7, CgroupID: 99, CgroupPath: at + "/init.scope", Trusted: true}

	r, says := newResolver(t), newSpoken()
	r.SetContainers(says)
	says.say(c, map[string][]string{"image.digest": {"sha256:1"}})
	says.say(Container{id, "/docker/" + id}, map[string][]string{"image.digest": {"sha256:2"}})

	if w, ok := r.Known(s); ok {
		t.Errorf("known before the runtime was asked: %v", w.Attributes)
	}
	w := mustResolve(t, r, s)
	expect(t, w, map[string]string{"container.id": id, "image.digest": "sha256:1", "os.user": ""})
	for range 3 {
		if again, ok := r.Known(s); !ok || again != w {
			t.Error("not known afterwards")
		}
		if again := mustResolve(t, r, s); again != w {
			t.Error("another workload")
		}
	}
	if n := says.asked[c]; n != 1 {
		t.Errorf("asked %d times", n)
	}

	if r.Refresh(w) != w {
		t.Error("refreshed without a change")
	}
	says.say(c, map[string][]string{"image.digest": {"sha256:3"}, "k8s.pod": {"web"}})
	now := r.Refresh(w)
	expect(t, now, map[string]string{"container.id": id, "image.digest": "sha256:3", "k8s.pod": "web", "proc.cgroup": s.CgroupPath})
	if now.Key != w.Key || now.Attributes.String() != mustResolve(t, r, s).Attributes.String() {
		t.Errorf("refreshed %v, resolved %v", now.Attributes, mustResolve(t, r, s).Attributes)
	}
	if got, ok := r.Known(s); !ok || got.Attributes.Get("image.digest") != "sha256:3" {
		t.Errorf("the quick path has the old ones: %v", got)
	}
	says.say(c, nil)
	expect(t, r.Refresh(now), map[string]string{"container.id": id, "image.digest": "", "k8s.pod": ""})
}

// A host's process has nothing of any container, and nobody is asked for it.
func TestContainersAreAskedForContainersOnly(t *testing.T) {
	r, says := newResolver(t), newSpoken()
	r.SetContainers(says)
	_, inode := dial(t, listen(t))
	w := mustResolve(t, r, inRoot(0, inode))
	if w.Attributes.Has("container.id") || len(says.asked) > 0 {
		t.Errorf("%v; asked for %v", w.Attributes, says.asked)
	}
	if r.Refresh(w) != w {
		t.Error("refreshed")
	}
}

func TestContainerOfACgroup(t *testing.T) {
	id, inner := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	for path, want := range map[string]string{
		"/docker/" + id:                                    "/docker/" + id,
		"/docker/" + id + "/docker/" + inner:               "/docker/" + id,
		"/libpod_parent/libpod-" + id:                      "/libpod_parent/libpod-" + id,
		"/machine.slice/libpod-" + id + ".scope/container": "/machine.slice/libpod-" + id + ".scope",
		"/system.slice/docker-" + id + ".scope/system.slice/docker-" + inner + ".scope": "/system.slice/docker-" + id + ".scope",
		"/kubepods/pod1/" + id + "/x":                                                                "/kubepods/pod1/" + id,
		"/kubepods/burstable/pod1/" + id:                                                             "/kubepods/burstable/pod1/" + id,
		"/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope":                        "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope",
		"/user.slice/user-1000.slice/user@1000.service/docker/" + id:                                 "",
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope/container": "",
		"/x/docker/" + id:             "",
		"/docker/" + id + "(deleted)": "",
	} {
		c, ok := parseCgroup(path).containerOf()
		if ok != (want != "") || c.Cgroup != want || ok && c.ID != id {
			t.Errorf("%s: %+v, want %q", path, c, want)
		}
	}
}
