package main

import (
	"sync"

	"go.uber.org/zap"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/serve"
)

// serveWorkloadAPI gives local programs their own SVIDs, where the configuration asks
// for it.
func (d *daemonParts) serveWorkloadAPI() (stop func(), err error) {
	path := d.cfg.Identity.ServeWorkloadAPI
	if path == "" {
		return func() {}, nil
	}
	// Whoever asks is one process, whatever connections are told apart by.
	r, err := identity.NewProcessResolver(d.cfg.Identity.Attributes...)
	if err != nil {
		return nil, err
	}
	s, err := serve.Listen(path, d.source, r, d.log)
	if err != nil {
		return nil, err
	}
	d.log.Info("local programs get their SVIDs", zap.String("workload_api", "unix://"+path))
	return sync.OnceFunc(s.Close), nil
}
