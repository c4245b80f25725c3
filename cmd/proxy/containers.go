package main

import (
	"go.uber.org/zap"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/containers"
)

// askRuntimes has the container runtimes of this host asked for what workloads in
// containers are. The function that it returns ends that.
func (d *daemonParts) askRuntimes(r *identity.Resolver) (closeRuntimes func()) {
	sockets := d.cfg.Identity.Runtimes()
	if len(sockets) == 0 {
		return func() {}
	}
	c := containers.New(containers.Options{
		Sockets: sockets,
		Changed: func() { d.manager.Refresh(r.Refresh) },
		Report: func(s containers.Socket, err error) {
			if err == nil {
				d.log.Info("the container runtime answers", zap.Stringer("socket", s))
				return
			}
			d.log.Warn("the container runtime does not answer: new containers have no container.name, image.* and k8s.* until it does", zap.Stringer("socket", s), zap.Error(err))
		},
	})
	r.SetContainers(c)
	d.runtimes = c
	return c.Close
}

// runtimeStatus is how it is with the container runtimes; empty where none is asked.
func (d *daemonParts) runtimeStatus() []containers.Status {
	if d.runtimes == nil {
		return []containers.Status{}
	}
	return d.runtimes.Status()
}
