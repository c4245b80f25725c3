package main

import (
	"context"
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/spire"
	"github.com/symbolon/symbolon/identity/token"
	"github.com/symbolon/symbolon/identity/workloadapi"
	"github.com/symbolon/symbolon/internal/handover"
	"github.com/symbolon/symbolon/proxy"
)

// source is where the workloads of this host get their SVIDs.
type source interface {
	identity.Source
	// SetBundle gives all workloads the roots of a trust domain; none takes them away.
	SetBundle(spiffeid.TrustDomain, []*x509.Certificate)
	// Reissue asks for all SVIDs anew.
	Reissue()
	// Restore hands over what an earlier run has left; Restored lists what of it nobody
	// has asked for yet.
	Restore([]identity.Kept)
	Restored() []identity.Kept
}

// withTokens is a source of another CA's SVIDs, with the controller's word on those that
// carry no claims.
type withTokens struct {
	source
	tokens *token.Source
}

func (s withTokens) Watch(ctx context.Context, w *identity.Workload) <-chan identity.Update {
	return s.tokens.Watch(ctx, w)
}

func (s withTokens) Reissue() {
	s.source.Reissue()
	s.tokens.Renew()
}

// openSource makes the source that the configuration names, and the resolver that finds
// workloads of the kind that it identifies.
func (d *daemonParts) openSource() (r *identity.Resolver, closeSource func(), err error) {
	rule := d.cfg.Identity.SPIRE.Rule()
	own := d.host.cred.Load().TrustDomain
	closeSource = func() {}
	d.tokens = token.NewVerifier()
	defer func() {
		if err == nil && d.cfg.Identity.Source != proxy.SourceController {
			d.source = withTokens{d.source, token.NewSource(d.source, newest{d.host}, d.tokens)}
		}
	}()
	switch d.cfg.Identity.Source {
	case proxy.SourceSPIRE:
		o := spire.Options{Controller: own, AdminSocket: d.cfg.Identity.SPIRE.AdminSocket, Rule: spire.Rule(rule), Report: d.sourceState("SPIRE agent")}
		if d.cfg.Identity.SPIRE.API == proxy.SPIREBroker {
			o.BrokerSocket, o.WorkloadAPI = d.cfg.Identity.SPIRE.BrokerSocket, d.cfg.Identity.WorkloadAPI
			d.log.Warn("the SPIRE agent is asked by its Broker API, which is experimental (identity.spire.api: broker)")
		}
		s, err := spire.New(o)
		if err != nil {
			return nil, nil, err
		}
		d.source, closeSource = s, s.Close
		d.sourceStatus = func() any { return s.Status() }
		r, err = identity.NewProcessResolver(d.cfg.Identity.Attributes...)
		if err != nil {
			s.Close()
			return nil, nil, err
		}
		return r, closeSource, nil
	case proxy.SourceWorkloadAPI:
		s, err := workloadapi.New(workloadapi.Options{
			Controller: own, Address: d.cfg.Identity.WorkloadAPI, Rule: workloadapi.Rule(rule), Report: d.sourceState("SPIFFE Workload API"),
		})
		if err != nil {
			return nil, nil, err
		}
		d.log.Info("all workloads of this host have one identity, the proxy's own (identity.source: workload-api)")
		d.source, closeSource = s, s.Close
		d.sourceStatus = func() any { return s.Status() }
	default:
		d.source = identity.NewControllerSource(newest{d.host})
	}
	if r, err = identity.NewResolver(d.cfg.Identity.Attributes...); err != nil {
		closeSource()
		return nil, nil, err
	}
	return r, closeSource, nil
}

// reissue asks for all SVIDs anew, here and in the process that drains; for the host's own,
// too, if host.
func (d *daemonParts) reissue(host bool) {
	d.source.Reissue()
	if host {
		d.host.renewNow()
	}
	d.tellPredecessor(handover.Reissue, nil)
}

// sourceState logs when an agent is away, and when it is back.
func (d *daemonParts) sourceState(name string) func(error) {
	return func(err error) {
		if err == nil {
			d.log.Info(name + " answers")
			return
		}
		d.log.Warn(name+": no newer SVIDs; those that there are stay until they expire", zap.Error(err))
	}
}

// kept are the SVIDs for the next process. Those of the controller's need no bundles,
// which come with the policy.
func (d *daemonParts) kept() []identity.Kept {
	kept := append(d.source.Restored(), d.manager.Keep()...)
	if d.cfg.Identity.Source == proxy.SourceController {
		for i := range kept {
			kept[i].Bundles = nil
		}
	}
	return kept
}
