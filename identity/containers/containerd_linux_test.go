package containers

import (
	"testing"

	"github.com/symbolon/symbolon/internal/containerlab"
)

func TestContainerd(t *testing.T) {
	c := containerlab.NewContainerd(t, sleeper)
	app := sleeper
	app.Name = "example.org/app:1"
	digest := c.Load(app)
	id := c.Run("prod", "web-7f9c", "web", app)
	a := ask(t, "cri:"+c.Socket())

	w := a.eventually(t, a.workload(t, c.PID(id)), "container.name", "web")
	about := map[string]string{
		"container.id": id, "container.name": "web", "container.runtime": "containerd", "image.name": app.Name, "image.digest": digest,
		"k8s.namespace": "prod", "k8s.pod": "web-7f9c", "app": "",
	}
	expect(t, w, about)
	a.is(t, "cri:"+c.Socket(), Reachable, "containerd")
	if w.Attributes.Get("image.id") == "" || w.Attributes.Get("image.id") == digest {
		t.Errorf("image.id: %q", w.Attributes.Get("image.id"))
	}

	t.Run("another cgroup of that name", func(t *testing.T) {
		v := a.workload(t, sleepIn(t, "docker", id))
		expect(t, v, nothing)
		expect(t, v, map[string]string{"container.id": id, "k8s.pod": ""})
	})
	t.Run("another pod, and the runtime away", func(t *testing.T) {
		other := c.Run("dev", "web-1111", "web", sleeper)
		pid := c.PID(other)
		c.Stop()
		o := a.workload(t, pid)
		expect(t, o, nothing)
		expect(t, a.workload(t, pid), nothing)
		expect(t, a.Refresh(w), about)
		c.Start()
		a.eventually(t, o, "k8s.namespace", "dev")
		expect(t, a.Refresh(w), about)
	})
}
