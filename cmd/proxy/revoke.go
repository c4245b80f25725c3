package main

import (
	"google.golang.org/protobuf/reflect/protoreflect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/internal/handover"
)

// revokedByController puts a change of what is revoked in force here and in the process
// that drains.
func (d *daemonParts) revokedByController(m *symbolonv1.Revocations) error {
	err := d.revoke(m)
	d.receivedRevocations()
	if g := d.generation.Load(); g != nil {
		d.tellPredecessor(handover.Policy, g)
	}
	return err
}

// revoke puts a change of what is revoked in force, and where the next process finds it.
// What the error names is not in force; all else is.
func (d *daemonParts) revoke(m *symbolonv1.Revocations) error {
	next, err := d.proxy.Revocations().Update(m)
	d.proxy.SetRevocations(next)
	if was := d.generation.Load(); was != nil {
		g := shallow(was)
		g.Revocations = next.Proto()
		d.generation.Store(g)
		d.keeper.save() // before the controller hears of it
	}
	for _, k := range d.manager.Keep() {
		if next.CheckCertificate(k.SVID.Serial(), &k.SVID.Principal) != nil {
			d.source.Reissue() // that one is refused, its workload is not
			return err
		}
	}
	if s, ok := d.source.(interface{ Retry() }); ok {
		s.Retry() // what was refused for a revocation may not be any more
	}
	return err
}

// shallow is a generation that shares everything with g.
func shallow(g *symbolonv1.Generation) *symbolonv1.Generation {
	out := new(symbolonv1.Generation)
	g.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		out.ProtoReflect().Set(f, v)
		return true
	})
	return out
}
