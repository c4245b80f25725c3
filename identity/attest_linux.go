package identity

import (
	"context"
	"errors"
	"fmt"
)

// Process finds the workload of a process of this host, by what Resolve goes by: for
// callers of a socket of ours, whom the kernel names. The number says nothing once the
// process has ended, so whoever calls has held it before (a pidfd), or sees afterwards
// that it is still there (PinProcess).
//
// Errors: ErrUnknownOwner, ErrAmbiguousOwner (a set-user-ID program), and those of ctx
// and of reading.
func (r *Resolver) Process(ctx context.Context, pid int) (*Workload, error) {
	f, err := r.processFacts(ctx, pid)
	if errors.Is(err, errGone) || errors.Is(err, errChanged) {
		return nil, fmt.Errorf("%w: process %d has ended or runs another program", ErrUnknownOwner, pid)
	}
	if err != nil {
		return nil, err
	}
	return r.meet(ctx, f)
}

func (r *Resolver) processFacts(ctx context.Context, pid int) (facts, error) {
	p, err := openProcess(r.proc, pid)
	if err != nil {
		return facts{}, err
	}
	defer p.close()
	h := &holder{process: p, key: processKey{pid: pid}}
	if h.key.start, err = p.start(); err != nil {
		return facts{}, err
	}
	if h.euid, err = p.euid(); err != nil {
		return facts{}, err
	}
	if h.exe, err = p.exe(); err != nil {
		return facts{}, err
	}
	pf, err := r.describe(h)
	if err != nil {
		return facts{}, err
	}
	f := facts{uid: h.euid, exe: pf.exe, exePath: pf.path, process: Process{pid, h.key.start}}
	if f.asked, err = r.askedOf(p); err != nil {
		return facts{}, err
	}
	if f.cgroupID, f.cgroup, err = r.place(Socket{}, p); err != nil {
		return facts{}, err
	}
	if f.sum, err = r.exes.sum(ctx, p, h.exe, h.euid); err != nil {
		return facts{}, err
	}
	// It may have executed another program meanwhile. The uid of a process that has
	// ended reads as 0, its program not at all.
	euid, err := p.euid()
	if err != nil {
		return facts{}, err
	}
	exe, err := p.exe()
	if err != nil {
		return facts{}, err
	}
	if euid != h.euid || exe != h.exe {
		return facts{}, errGone
	}
	return f, nil
}
