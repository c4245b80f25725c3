package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/symbolon/symbolon/internal/handover"
	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/redirect"
)

// kernel is what the proxy has open there.
type kernel struct {
	outbound, inbound []*net.TCPListener
	listeners         map[string]*net.TCPListener // the same, by the names they are handed over under
	diag              *redirect.Diag
	conntrack         *redirect.Conntrack
	cgroups           *redirect.Cgroups  // nil without cgroup v2
	connects          *redirect.Connects // nil where noConnects says why
	noConnects        error
}

// openKernel takes the value of redirect.owner beside the rules' configuration.
func openKernel(cfg redirect.Config, owner string, in *handover.Inherited, log *zap.Logger) (_ *kernel, err error) {
	k := &kernel{listeners: make(map[string]*net.TCPListener)}
	defer func() {
		if err != nil {
			k.close()
		}
	}()
	if k.diag, err = redirect.NewDiag(); err != nil {
		return nil, err
	}
	if k.conntrack, err = redirect.NewConntrack(); err != nil {
		return nil, err
	}
	if k.cgroups, err = redirect.OpenCgroups(); err != nil && !errors.Is(err, redirect.ErrNoCgroup) {
		return nil, err
	}
	if err := k.openConnects(cfg, owner); err != nil {
		return nil, err
	}
	if cfg.Transparent {
		k.conntrack.Transparent(cfg.InboundAddr().Port())
	}
	for _, a := range cfg.OutboundAddrs() {
		name := "outbound-6"
		if a.Addr().Is4() {
			name = "outbound-4"
		}
		l, err := k.listen(in, log, name, a.String())
		if err != nil {
			return nil, fmt.Errorf("outbound listener: %w", err)
		}
		k.outbound = append(k.outbound, l)
	}
	l, err := k.listen(in, log, "inbound", cfg.InboundAddr().String())
	if err != nil {
		return nil, fmt.Errorf("inbound listener: %w", err)
	}
	if err := cfg.PrepareInbound(l); err != nil {
		return nil, fmt.Errorf("inbound listener: %w", err)
	}
	k.inbound = append(k.inbound, l)
	return k, nil
}

var errSockDiag = errors.New("redirect.owner is sock_diag")

// openConnects comes before the listeners: what they accept has a record.
func (k *kernel) openConnects(cfg redirect.Config, owner string) (err error) {
	if owner == proxy.OwnerSockDiag {
		k.noConnects = errSockDiag
		return nil
	}
	k.connects, err = redirect.OpenConnects(cfg)
	if owner == proxy.OwnerEBPF && err != nil {
		return fmt.Errorf("redirect.owner: ebpf is not to be had here; auto goes on without: %w", err)
	}
	k.noConnects = err
	return nil
}

// owners tells which way clients are found, and why.
func (k *kernel) owners() string {
	if k.noConnects != nil {
		return fmt.Sprintf("%s: %v", proxy.OwnerSockDiag, k.noConnects)
	}
	return proxy.OwnerEBPF
}

// fastOpen tells whether new tunnels begin in their SYN, and what keeps them from it now.
func fastOpen(on bool) string {
	if !on {
		return "off"
	}
	if missing := redirect.FastOpenMissing(); missing != "" {
		return "on, but " + missing
	}
	return "on"
}

func (k *kernel) listen(in *handover.Inherited, log *zap.Logger, name, address string) (*net.TCPListener, error) {
	l, err := listen(in, log, name, address)
	if err == nil {
		k.listeners[name] = l
	}
	return l, err
}

// listen takes over the listener of that name, or opens one.
func listen(in *handover.Inherited, log *zap.Logger, name, address string) (*net.TCPListener, error) {
	if l, err := in.TakeListener(name, address); err != nil {
		log.Warn("a listener is not taken over, but opened anew", zap.Error(err))
	} else if l != nil {
		return l, nil
	}
	l, err := redirect.ListenConfig(redirect.DefaultKeepAlive).Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (k *kernel) close() {
	for _, l := range append(k.outbound, k.inbound...) {
		_ = l.Close()
	}
	if k.diag != nil {
		_ = k.diag.Close()
	}
	if k.conntrack != nil {
		_ = k.conntrack.Close()
	}
	if k.cgroups != nil {
		_ = k.cgroups.Close()
	}
	if k.connects != nil {
		_ = k.connects.Close()
	}
}

// raiseDescriptorLimit allows as many as root may have: a connection needs two, and
// more while it is spliced.
func raiseDescriptorLimit(log *zap.Logger) {
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		log.Warn("descriptor limit unknown", zap.Error(err))
		return
	}
	const want = 1 << 20
	limit := unix.Rlimit{Cur: want, Max: want}
	if now.Max > want {
		limit = unix.Rlimit{Cur: now.Max, Max: now.Max}
	}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		return
	}
	limit = unix.Rlimit{Cur: now.Max, Max: now.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		log.Warn("descriptor limit not raised", zap.Error(err))
	}
}
