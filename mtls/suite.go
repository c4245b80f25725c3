package mtls

import (
	"crypto/tls"
	_ "unsafe" // for go:linkname
)

// TLS 1.3 suites are not configurable through tls.Config. crypto/tls documents
// these two variables for linkname (go.dev/issue/67401) and promises their type.
// Only AES-256-GCM is left in them, so that no peer can choose another; handshakes
// assert what was negotiated all the same (checkState), and TestNegotiatedSuite
// fails should a toolchain ever change this.

//go:linkname defaultCipherSuitesTLS13 crypto/tls.defaultCipherSuitesTLS13
var defaultCipherSuitesTLS13 []uint16

//go:linkname defaultCipherSuitesTLS13NoAES crypto/tls.defaultCipherSuitesTLS13NoAES
var defaultCipherSuitesTLS13NoAES []uint16

func init() {
	only := []uint16{tls.TLS_AES_256_GCM_SHA384}
	defaultCipherSuitesTLS13 = only
	defaultCipherSuitesTLS13NoAES = only
}
