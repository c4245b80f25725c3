package spire

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxReason bounds what is repeated of the agent's words, bytes.
const maxReason = 300

// errSilent: the agent did not answer in time.
var errSilent = errors.New("no answer in time")

// explain says in words what went wrong with the agent, and what to do.
func explain(socket string, err error) error {
	st := status.Convert(err)
	words := fmt.Sprintf("%s: %.*s", st.Code(), maxReason, st.Message())
	switch {
	case errors.Is(err, errSilent):
		return fmt.Errorf("the SPIRE agent at %s has not answered within %v", socket, firstAnswer)
	case st.Code() == codes.PermissionDenied:
		return fmt.Errorf("the SPIRE agent refuses the proxy (%s): give the proxy a registration entry, and list its SPIFFE ID in the agent's authorized_delegates", words)
	case st.Code() == codes.Unavailable:
		return fmt.Errorf("the SPIRE agent cannot be reached at %s (%s): it must run with this admin_socket_path, and let the proxy's user in", socket, words)
	case st.Code() == codes.Unimplemented:
		return fmt.Errorf("the SPIRE agent does not know the Delegated Identity API (%s): it takes SPIRE 1.10.2 or newer", words)
	case errors.Is(err, context.Canceled), st.Code() == codes.Canceled:
		return fmt.Errorf("the SPIRE agent: %w", err)
	}
	return fmt.Errorf("the SPIRE agent: %s", words)
}
