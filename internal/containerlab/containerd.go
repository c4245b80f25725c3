package containerlab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/symbolon/symbolon/internal/netlab"
)

// Containerd is one that shares nothing with the machine's, without a kubelet.
type Containerd struct {
	t      testing.TB
	dir    string
	daemon service
	conn   *grpc.ClientConn
	pods   []string
}

// NewContainerd starts one whose pods' own process is pause's entrypoint. It needs root
// and the programs, or the test fails.
func NewContainerd(t testing.TB, pause Image) *Containerd {
	t.Helper()
	netlab.Require(t, "containerd", "ctr", "runc", "ldd")
	hold(t)
	dir, err := os.MkdirTemp("/run", "sl-containerd-")
	if err != nil {
		t.Fatal(err)
	}
	c := &Containerd{t: t, dir: dir}
	t.Cleanup(c.close)
	config := fmt.Sprintf(`version = 2
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
address = "%[1]s/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "%[2]s"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "%[1]s/none"
`, dir, pause.Name)
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if c.conn, err = grpc.NewClient("unix://"+c.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	c.Start()
	c.Load(pause)
	return c
}

// Start starts the daemon.
func (c *Containerd) Start() {
	c.t.Helper()
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	daemon := exec.Command("containerd", "--config", filepath.Join(c.dir, "config.toml"))
	daemon.Stdout, daemon.Stderr = log, log
	c.daemon.start(c.t, daemon)
	await(c.t, "containerd", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s, err := c.runtime().Status(ctx, &runtimev1.StatusRequest{})
		if err == nil && len(s.GetStatus().GetConditions()) > 0 && !s.GetStatus().GetConditions()[0].GetStatus() {
			err = fmt.Errorf("not ready: %v", s.GetStatus())
		}
		return err
	})
}

// Stop ends the daemon. Containers go on.
func (c *Containerd) Stop() { c.daemon.stop(c.Socket()) }

// Socket is where it listens.
func (c *Containerd) Socket() string { return c.dir + "/c.sock" }

func (c *Containerd) runtime() runtimev1.RuntimeServiceClient {
	return runtimev1.NewRuntimeServiceClient(c.conn)
}

// Load makes an image, which is known by its digest as if it had been pulled, and returns
// that: sha256:...
func (c *Containerd) Load(i Image) (digest string) {
	c.t.Helper()
	file := filepath.Join(c.dir, "image.tar")
	if err := i.archive(file); err != nil {
		c.t.Fatal(err)
	}
	defer os.Remove(file)
	c.ctr("images", "import", "--snapshotter", "native", file)
	for line := range strings.Lines(c.ctr("images", "list", "name=="+i.Name)) {
		for _, f := range strings.Fields(line) {
			if strings.HasPrefix(f, "sha256:") {
				digest = f
			}
		}
	}
	repo, _, _ := strings.Cut(i.Name, ":")
	c.ctr("images", "tag", "--force", i.Name, repo+"@"+digest)
	await(c.t, "the image", func() error {
		r, err := runtimev1.NewImageServiceClient(c.conn).ImageStatus(c.context(), &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: i.Name}})
		if err == nil && len(r.GetImage().GetRepoDigests()) == 0 {
			err = fmt.Errorf("%s is not known with its digest yet", i.Name)
		}
		return err
	})
	return digest
}

func (c *Containerd) ctr(args ...string) string {
	c.t.Helper()
	cmd := exec.CommandContext(c.context(), "ctr", append([]string{"--address", c.Socket(), "--namespace", "k8s.io"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("ctr %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (c *Containerd) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), waitFor)
	c.t.Cleanup(cancel)
	return ctx
}

// Run starts a container of an image in a pod of its own, in this network namespace, and
// returns its id.
func (c *Containerd) Run(namespace, pod, name string, i Image) (id string) {
	c.t.Helper()
	uid := fmt.Sprintf("%s-%d", pod, len(c.pods))
	config := &runtimev1.PodSandboxConfig{
		Metadata: &runtimev1.PodSandboxMetadata{Namespace: namespace, Name: pod, Uid: uid},
		Linux: &runtimev1.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/burstable/pod" + uid,
			SecurityContext: &runtimev1.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimev1.NamespaceOption{Network: runtimev1.NamespaceMode_NODE},
			},
		},
	}
	made, err := c.runtime().RunPodSandbox(c.context(), &runtimev1.RunPodSandboxRequest{Config: config})
	if err != nil {
		c.t.Fatalf("pod %s: %v\n%s", pod, err, c.log())
	}
	c.pods = append(c.pods, made.GetPodSandboxId())
	container, err := c.runtime().CreateContainer(c.context(), &runtimev1.CreateContainerRequest{
		PodSandboxId: made.GetPodSandboxId(), SandboxConfig: config,
		Config: &runtimev1.ContainerConfig{
			Metadata: &runtimev1.ContainerMetadata{Name: name}, Image: &runtimev1.ImageSpec{Image: i.Name},
			// Whoever makes the pod may write any labels.
			Labels: map[string]string{"app": "admin", "io.kubernetes.pod.namespace": "kube-system"},
			Linux: &runtimev1.LinuxContainerConfig{SecurityContext: &runtimev1.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimev1.NamespaceOption{Network: runtimev1.NamespaceMode_NODE},
			}},
		},
	})
	if err != nil {
		c.t.Fatalf("container %s: %v\n%s", name, err, c.log())
	}
	if _, err := c.runtime().StartContainer(c.context(), &runtimev1.StartContainerRequest{ContainerId: container.GetContainerId()}); err != nil {
		c.t.Fatalf("container %s: %v\n%s", name, err, c.log())
	}
	return container.GetContainerId()
}

// PID is the container's first process.
func (c *Containerd) PID(id string) string {
	c.t.Helper()
	for line := range strings.Lines(c.ctr("tasks", "list")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == id {
			return f[1]
		}
	}
	c.t.Fatalf("container %s does not run", id)
	return ""
}

func (c *Containerd) log() string {
	b, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	return string(b[max(0, len(b)-4096):])
}

func (c *Containerd) close() {
	if len(c.pods) > 0 && c.daemon.running == nil {
		c.Start()
	}
	for _, pod := range c.pods {
		ctx, cancel := context.WithTimeout(context.Background(), waitFor)
		if _, err := c.runtime().StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			c.t.Errorf("a pod stays: %v", err)
		} else if _, err := c.runtime().RemovePodSandbox(ctx, &runtimev1.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			c.t.Errorf("a pod stays: %v", err)
		}
		cancel()
	}
	if c.conn != nil {
		_ = c.conn.Close()
	}
	c.Stop()
	leave(c.t, c.dir)
}
