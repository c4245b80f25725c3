// Command symbolon-spire-composer is a CredentialComposer plugin of SPIRE's server: it
// puts Symbolon's claims into the X.509-SVIDs that SPIRE issues to workloads, so that
// proxies read labels from the certificate, and SPIRE vouches for them.
//
// The labels of a SPIFFE ID follow from the Profiles that the Symbolon controller
// holds. The plugin keeps a copy of those, in memory and in a file, and answers from
// memory alone: SPIRE waits for it at every certificate, so it never waits for a
// network, and a controller that is away changes nothing. A composer that crashes
// would stop SPIRE from issuing at all, so nothing in here panics outwards.
package main

import (
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	credentialcomposerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
)

func main() {
	c := new(composer)
	pluginmain.Serve(
		credentialcomposerv1.CredentialComposerPluginServer(c),
		configv1.ConfigServiceServer(c),
	)
}
