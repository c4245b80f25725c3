// Package containerlab runs real container runtimes for tests, in a directory of their
// own: Podman with its Docker-compatible service, and containerd with Kubernetes' CRI.
// Images are made here, of this machine's programs; no registry is asked. Containers are
// in the network namespace of whoever starts them.
//
// What a runtime leaves in the kernel (cgroups, mounts, processes) goes with the test.
package containerlab
