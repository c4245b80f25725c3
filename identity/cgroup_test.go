package identity

import (
	"strings"
	"testing"
)

func TestParseCgroup(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	inner := strings.Repeat("f", 64)
	pod := "pod2b3c4d5e-1111-2222-3333-444455556666"
	for _, tt := range []struct {
		path string
		want cgroupFacts
	}{
		{"", cgroupFacts{}},
		{"/", cgroupFacts{}},
		{"/system.slice", cgroupFacts{slice: "system.slice"}},
		// systemd
		{"/system.slice/nginx.service", cgroupFacts{unit: "nginx.service", slice: "system.slice"}},
		{"/system.slice/system-postgresql.slice/postgresql@15-main.service", cgroupFacts{unit: "postgresql@15-main.service", slice: "system-postgresql.slice"}},
		{"/system.slice/containerd.service/nested.scope", cgroupFacts{unit: "containerd.service", slice: "system.slice"}},
		{"/user.slice/user-1000.slice/session-3.scope", cgroupFacts{unit: "session-3.scope", slice: "user-1000.slice"}},
		{"/init.scope", cgroupFacts{unit: "init.scope"}},
		{"/user.slice/user-1000.slice/user@1000.service/app.slice/web.service", cgroupFacts{unit: "user@1000.service", userUnit: "web.service", slice: "user-1000.slice"}},
		{"/sl-1/server/nginx.service", cgroupFacts{unit: "nginx.service"}},
		{"/system.slice/.service", cgroupFacts{slice: "system.slice"}},
		// containers
		{"/system.slice/docker-" + id + ".scope", cgroupFacts{unit: "docker-" + id + ".scope", slice: "system.slice", container: id}},
		{"/docker/" + id, cgroupFacts{container: id}},
		{"/docker/" + id + "/docker/" + inner, cgroupFacts{container: id}},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-" + pod + ".slice/cri-containerd-" + id + ".scope",
			cgroupFacts{unit: "cri-containerd-" + id + ".scope", slice: "kubepods-burstable-" + pod + ".slice", container: id}},
		{"/kubepods/besteffort/" + pod + "/" + id, cgroupFacts{container: id}},
		{"/kubepods/" + pod + "/" + id, cgroupFacts{container: id}},
		{"/machine.slice/libpod-" + id + ".scope/container", cgroupFacts{unit: "libpod-" + id + ".scope", slice: "machine.slice", container: id}},
		{"/libpod_parent/libpod-" + id, cgroupFacts{container: id}},
		{"/machine.slice/libpod-conmon-" + id + ".scope", cgroupFacts{unit: "libpod-conmon-" + id + ".scope", slice: "machine.slice"}},
		{"/docker/" + id[1:], cgroupFacts{}},
		{"/docker/" + strings.ToUpper(id), cgroupFacts{}},

		// What a user may make below his own manager, or a container below itself,
		// proves nothing.
		{"/user.slice/user-1000.slice/user@1000.service/postgresql.service", cgroupFacts{unit: "user@1000.service", userUnit: "postgresql.service", slice: "user-1000.slice"}},
		{"/user.slice/user-1000.slice/user@1000.service/docker/" + id, cgroupFacts{unit: "user@1000.service", slice: "user-1000.slice"}},
		{"/user.slice/user-1000.slice/user@1000.service/docker-" + id + ".scope",
			cgroupFacts{unit: "user@1000.service", userUnit: "docker-" + id + ".scope", slice: "user-1000.slice"}},
		{"/user.slice/user-1000.slice/user@1000.service/system.slice", cgroupFacts{unit: "user@1000.service", slice: "user-1000.slice"}},
		{"/docker/" + id + "/system.slice/nginx.service", cgroupFacts{container: id}},
		{"/lxc.payload.guest/system.slice/nginx.service", cgroupFacts{}},
		{"/system.slice/evil.service/docker/" + id, cgroupFacts{unit: "evil.service", slice: "system.slice"}},
	} {
		got := parseCgroup(tt.path)
		if got.containerAt = ""; got != tt.want { // TestContainerOfACgroup has that
			t.Errorf("%s:\n got %+v\nwant %+v", tt.path, got, tt.want)
		}
	}
}

func TestCgroup2Mount(t *testing.T) {
	const v1 = "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n"
	for _, tt := range []struct{ name, in, want string }{
		{"v1 only", v1, ""},
		{"hybrid", v1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified"},
		{"v2", "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"},
		{"a part of it", "31 23 0:28 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", ""},
		{"escaped", "31 23 0:28 / /mnt/c\\040g rw - cgroup2 cgroup2 rw\n", "/mnt/c g"},
		{"garbage", "cgroup2 - cgroup2\n - cgroup2\n\n", ""},
	} {
		if got := cgroup2Mount(tt.in); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func FuzzParseCgroup(f *testing.F) {
	f.Add("/user.slice/user-1000.slice/user@1000.service/app.slice/web.service")
	f.Add("/kubepods/besteffort/pod1/" + strings.Repeat("a", 64))
	f.Fuzz(func(t *testing.T, path string) {
		got := parseCgroup(path)
		if got.container != "" && !isContainerID(got.container) {
			t.Errorf("container %q", got.container)
		}
		if strings.ContainsRune(got.unit+got.userUnit+got.container, '/') {
			t.Errorf("%+v", got)
		}
		if got.userUnit != "" && !strings.HasPrefix(got.unit, "user@") {
			t.Errorf("a user unit of no user: %+v", got)
		}
	})
}
