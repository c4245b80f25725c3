package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity"
	"github.com/symbolon/symbolon/identity/cloud"
	"github.com/symbolon/symbolon/proxy"
	"github.com/symbolon/symbolon/redirect"
)

// enrol makes this machine a host, by what the configuration names as proof.
func (h *host) enrol(ctx context.Context) (*enrol.HostCredential, error) {
	attrs, err := identity.HostAttributes()
	if err != nil {
		return nil, err
	}
	dialer := redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive)
	address := h.cfg.Controller.Address
	var opts []enrol.Option
	var document enrol.DocumentSource
	if h.cfg.Document() != "" {
		document = h.document
		opts = append(opts, enrol.WithDocument(document))
	}
	switch h.cfg.Controller.Join {
	case proxy.JoinToken:
		token, err := joinToken(h.cfg.Controller.JoinTokenFile)
		if err != nil {
			return nil, err
		}
		return enrol.Enrol(ctx, address, token, attrs, dialer, opts...)
	case proxy.JoinX509PoP:
		// Read each time: what keeps the files fresh may have been late.
		cert, roots, err := joinCertificate(h.cfg.Controller)
		if err != nil {
			return nil, err
		}
		return enrol.ByCertificate(ctx, address, roots, cert, attrs, dialer, opts...)
	}
	roots, err := joinRoots(h.cfg.Controller)
	if err != nil {
		return nil, err
	}
	return enrol.ByDocument(ctx, address, roots, document, attrs, dialer)
}

// document asks the metadata service, past our own rules: what applications may reach
// there is policy's to say, as of any address.
func (h *host) document(ctx context.Context, challenge cloud.Challenge) (*symbolonv1.CloudDocument, error) {
	c := cloud.Client{Address: h.cfg.Identity.CloudMetadata, Dialer: redirect.Dialer(redirect.MarkControl, redirect.DefaultKeepAlive)}
	provider := h.cfg.Document()
	b, err := c.Fetch(ctx, provider, challenge)
	if err != nil {
		return nil, err
	}
	return &symbolonv1.CloudDocument{Provider: provider, Document: b}, nil
}

func joinToken(file string) (enrol.Token, error) {
	if file == "" {
		return enrol.Token{}, errors.New("this host is not enrolled: make a token with 'symbolon host token', put it in a file, and name that as controller.join_token_file")
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return enrol.Token{}, fmt.Errorf("this host is not enrolled, and there is no join token in %s: make one with 'symbolon host token'", file)
	}
	if err != nil {
		return enrol.Token{}, err
	}
	token, err := enrol.ParseToken(string(data))
	if err != nil {
		return enrol.Token{}, fmt.Errorf("%s: %w", file, err)
	}
	return token, nil
}

// joinCertificate reads the certificate to enrol with, and the controller's roots.
func joinCertificate(c proxy.ControllerConfig) (tls.Certificate, []*x509.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("controller.cert_file %s, controller.key_file %s: %w", c.CertFile, c.KeyFile, err)
	}
	roots, err := joinRoots(c)
	return cert, roots, err
}

// joinRoots reads the controller's roots.
func joinRoots(c proxy.ControllerConfig) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("controller.ca_file: %w", err)
	}
	var roots []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("controller.ca_file %s: %w", c.CAFile, err)
		}
		roots = append(roots, root)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("controller.ca_file %s holds no certificate; it is the controller's ca.pem", c.CAFile)
	}
	return roots, nil
}
