package proxy

import "path/filepath"

// The values of ControllerConfig.Join.
const (
	JoinToken   = "token"
	JoinX509PoP = "x509pop"
)

func (c ControllerConfig) validate(bad func(key, format string, args ...any)) {
	switch c.Join {
	case JoinToken:
	case JoinX509PoP:
		for _, f := range []struct{ key, file, what string }{
			{"cert_file", c.CertFile, "the certificate to enrol with, PEM"},
			{"key_file", c.KeyFile, "its key, PEM"},
			{"ca_file", c.CAFile, "the controller's ca.pem, by which it is told from an impostor"},
		} {
			if !filepath.IsAbs(f.file) {
				bad("controller."+f.key, "%q is not an absolute path; x509pop needs %s", f.file, f.what)
			}
		}
	default:
		bad("controller.join", "%q is unknown; use token or x509pop", c.Join)
	}
}
