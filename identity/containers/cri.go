package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cri asks by Kubernetes' container runtime interface.
type cri struct{ socket Socket }

func (c cri) ask(ctx context.Context, id string) (*container, error) {
	unix, err := c.socket.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer unix.Close() // also if it was never used
	conn, err := overOne(unix)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	runtime := runtimev1.NewRuntimeServiceClient(conn)
	// Verbose, since the process is not among what every runtime must say.
	answer, err := runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if status.Code(err) == codes.NotFound {
		return nil, errUnknown
	}
	if err != nil {
		return nil, err
	}
	is := answer.GetStatus()
	if is.GetId() != id {
		return nil, fmt.Errorf("%w: asked for container %s, told of %.80q", errMalformed, id, is.GetId())
	}
	// containerd and CRI-O alike have these two under this key.
	var more struct {
		Pid       int    `json:"pid"`
		SandboxID string `json:"sandboxID"`
	}
	if err := json.Unmarshal([]byte(answer.GetInfo()["info"]), &more); err != nil {
		return nil, fmt.Errorf("%w: verbose container status: %w", errMalformed, err)
	}
	if more.Pid <= 0 {
		return nil, errNotYet
	}
	out := &container{pid: more.Pid, name: is.GetMetadata().GetName(), image: is.GetImage().GetImage()}
	if err := c.describe(ctx, runtime, out, more.SandboxID); err != nil {
		return nil, err
	}
	return out, image(ctx, conn, out, is.GetImageRef())
}

// describe adds the runtime's name and the pod's.
func (c cri) describe(ctx context.Context, runtime runtimev1.RuntimeServiceClient, out *container, sandbox string) error {
	v, err := runtime.Version(ctx, &runtimev1.VersionRequest{})
	if err != nil {
		return err
	}
	out.runtime = v.GetRuntimeName()
	if sandbox == "" {
		return nil
	}
	// Labels would do for a kubelet's pods; the metadata is there whoever made the pod.
	pod, err := runtime.PodSandboxStatus(ctx, &runtimev1.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	if got := pod.GetStatus().GetId(); got != sandbox {
		return fmt.Errorf("%w: asked for pod %.80q, told of %.80q", errMalformed, sandbox, got)
	}
	m := pod.GetStatus().GetMetadata()
	out.namespace, out.pod = m.GetNamespace(), m.GetName()
	return nil
}

// image adds what the image with this reference, mostly its id, is.
func image(ctx context.Context, conn *grpc.ClientConn, out *container, ref string) error {
	if ref == "" {
		return nil
	}
	answer, err := runtimev1.NewImageServiceClient(conn).ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: ref}})
	if err != nil {
		return err
	}
	is := answer.GetImage() // none: it was removed since
	out.imageID, out.repoDigests = is.GetId(), is.GetRepoDigests()
	if digest(ref) != "" && is != nil && digest(is.GetId()) != digest(ref) {
		return fmt.Errorf("%w: asked for image %s, told of %.80q", errMalformed, ref, is.GetId())
	}
	return nil
}

// errSpent: the one connection was lost.
var errSpent = errors.New("the connection to the runtime is lost")

// overOne is a client over one connection that is there.
func overOne(c net.Conn) (*grpc.ClientConn, error) {
	var once sync.Once
	return grpc.NewClient("passthrough:///runtime",
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			out, err := net.Conn(nil), errSpent
			once.Do(func() { out, err = c, nil })
			return out, err
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // root's socket
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)), grpc.WithMaxHeaderListSize(maxHeader),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithNoProxy(), grpc.WithAuthority("localhost"))
}
