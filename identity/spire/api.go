package spire

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// api is how the agent is asked: by its Delegated Identity API or by its Broker API. Safe
// for concurrent use.
type api interface {
	// name is which API it is, and the path of its socket.
	name() (api, socket string)
	// attest has the process pid attested. next waits for what the agent says about it next;
	// it is called by one goroutine at a time, and ends with ctx.
	attest(ctx context.Context, pid int) (next func() (*word, error), err error)
	// bundles are all that the agent has, DER by trust domain; next likewise.
	bundles(ctx context.Context) (next func() (map[string][]byte, error), err error)
	// explain says in words what went wrong, and what to do. What it returns is
	// identity.ErrWithdrawn where the agent has said that a workload has no identity.
	explain(err error) error
	// close ends what is under way.
	close()
}

// word is what the agent says about a process.
type word struct {
	offers []offer
	// federates are the trust domains that go with the offers.
	federates []string
	// bundled: the bundles for the workload are here, those of foreign trust domains in
	// federated; not bundled: they are among those of api.bundles.
	bundled   bool
	federated map[string][]byte
}

// offer is one SVID.
type offer struct {
	id, hint string
	// chain is DER, leaf first; key is PKCS #8; bundle the DER of the roots of id's trust
	// domain, where the word is bundled.
	chain, key, bundle []byte
}

// maxReason bounds what is repeated of the agent's words, bytes.
const maxReason = 300

// errSilent: the agent did not answer in time.
var errSilent = errors.New("no answer in time")

// remedies say what to do, by what went wrong with an API.
type remedies struct{ refused, unreachable, unknown string }

// explain says what every API's errors mean.
func explain(socket string, err error, r remedies) error {
	st := status.Convert(err)
	words := fmt.Sprintf("%s: %.*s", st.Code(), maxReason, st.Message())
	switch {
	case errors.Is(err, errSilent):
		return fmt.Errorf("the SPIRE agent at %s has not answered within %v", socket, firstAnswer)
	case st.Code() == codes.PermissionDenied:
		return fmt.Errorf("the SPIRE agent refuses the proxy (%s): %s", words, r.refused)
	case st.Code() == codes.Unavailable:
		return fmt.Errorf("the SPIRE agent cannot be reached at %s (%s): %s", socket, words, r.unreachable)
	case st.Code() == codes.Unimplemented:
		return fmt.Errorf("the SPIRE agent does not know the %s", fmt.Sprintf(r.unknown, words))
	case errors.Is(err, context.Canceled), st.Code() == codes.Canceled:
		return fmt.Errorf("the SPIRE agent: %w", err)
	}
	return fmt.Errorf("the SPIRE agent: %s", words)
}
