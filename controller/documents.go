package controller

import (
	"context"
	"crypto"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/controller/instance"
	"github.com/symbolon/symbolon/identity"
)

// instancePrefix starts the names of hosts' identities that are clouds' instances.
const instancePrefix = "instance:"

var (
	// errInstanceUsed: an instance enrols again, and may not.
	errInstanceUsed = errors.New("this instance has enrolled before")
	// errInstanceTaken: a document is of an instance that another host is.
	errInstanceTaken = errors.New("this instance is another host")
	// errNoAdmission: documents of its account only add attributes.
	errNoAdmission = errors.New("the document is believed, but lets nobody in: enrol by a join token or a certificate, or let the controller's enrolment.cloud entry have a namespace")
)

// cloudProof is what a document proves, by one entry of the configuration.
type cloudProof struct {
	*instance.Instance
	AdmissionConfig
}

// instance is what the document proves; nil: there is none.
func (p *cloudProof) instance() *instance.Instance {
	if p == nil {
		return nil
	}
	return p.Instance
}

// openClouds checks that what documents are verified by is there. Errors: ErrConfig.
func openClouds(c *CloudConfig) ([]instance.Authority, []AdmissionConfig, error) {
	authorities, become := c.authorities()
	for _, a := range authorities {
		if err := a.Check(); err != nil {
			return nil, nil, fmt.Errorf("%w: enrolment.cloud.%s: %w", ErrConfig, a.Provider(), err)
		}
	}
	return authorities, become, nil
}

// proveInstance judges a request's document; nil: it has none.
func (s enrolmentService) proveInstance(ctx context.Context, req *connect.Request[symbolonv1.EnrolRequest]) (*cloudProof, error) {
	document := req.Msg.GetCloud()
	if document == nil {
		return nil, nil
	}
	state := callOf(ctx).tls
	if state == nil {
		return nil, connect.NewError(connect.CodeInternal, errors.New("the connection has no TLS"))
	}
	challenge, err := enrol.ChallengeOf(*state, req.Msg.GetCsr())
	if err != nil {
		return nil, s.internal("enrol", err)
	}
	proven, n, err := instance.Verify(s.clouds, document.GetProvider(), document.GetDocument(), challenge, s.opts.Now())
	switch {
	case errors.Is(err, instance.ErrAnchors):
		s.log.Error("enrolment refused for now", zap.Error(err), zap.String("address", req.Peer().Addr))
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("the controller cannot read what it verifies instance documents by: its log says more"))
	case err != nil:
		s.log.Warn("enrolment refused", zap.Error(err), zap.String("address", req.Peer().Addr))
		return nil, connect.NewError(connect.CodeUnauthenticated, err)
	}
	return &cloudProof{proven, s.cloudAdmissions[n]}, nil
}

// enrolByDocument makes the host that an instance stands for.
func (s enrolmentService) enrolByDocument(ctx context.Context, req *connect.Request[symbolonv1.EnrolRequest], pub crypto.PublicKey, reported identity.Attributes, proof *cloudProof) (*connect.Response[symbolonv1.EnrolResponse], error) {
	if proof.Namespace == "" {
		s.log.Warn("enrolment refused", zap.Error(errNoAdmission), zap.String("instance", proof.Name), zap.String("address", req.Peer().Addr))
		return nil, connect.NewError(connect.CodePermissionDenied, errNoAdmission)
	}
	return s.admit(ctx, req, pub, reported, admission{
		who: hostIdentity{name: instancePrefix + proof.Name}, namespace: proof.Namespace, labels: proof.Labels, instance: proof.Instance,
		again: proof.again,
	})
}

// again judges a document of an instance that is a host: whoever has it may not be that
// host. Every process of an instance can ask for its documents.
func (p *cloudProof) again(was *hostRecord) error {
	switch {
	case was.Identity != instancePrefix+p.Name:
		return fmt.Errorf("%w: as host %s, by other means than its document alone: use those", errInstanceUsed, was.ID)
	case !p.Reenrol:
		return fmt.Errorf("%w: as host %s; 'symbolon host remove --readmit %s' lets it in anew, and so does reenrol in the controller's enrolment.cloud entry", errInstanceUsed, was.ID, was.ID)
	case !p.Started.IsZero() && !p.Started.After(was.Started):
		// The document says nothing of now; that there is a newer one, it does.
		return fmt.Errorf("%w: as host %s, since it was started last: stop and start it, or let 'symbolon host remove --readmit %s' let it in anew", errInstanceUsed, was.ID, was.ID)
	}
	return nil
}

// setInstance adds what a document proves to a host.
func (h *hostRecord) setInstance(i *instance.Instance) {
	if i != nil {
		h.Instance, h.Cloud, h.Started = i.Name, i.Attributes, i.Started
	}
}
