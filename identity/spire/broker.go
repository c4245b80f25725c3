package spire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/symbolon/symbolon/identity"
)

// brokered is the agent's Broker API, over TLS by the SVIDs of the proxy and of the agent.
// The specification is incubating, and SPIRE's side of it experimental: expect that this
// changes.
type brokered struct {
	client broker.APIClient
	conn   *grpc.ClientConn
	self   *self
	socket string
}

func openBroker(socket, workloadAPI string) (api, error) {
	own, err := newSelf(workloadAPI)
	if err != nil {
		return nil, err
	}
	c := tlsconfig.MTLSClientConfig(own, own, own.agent)
	c.MinVersion = tls.VersionTLS13
	conn, err := dial(socket, credentials.NewTLS(c))
	if err != nil {
		own.close()
		return nil, err
	}
	return &brokered{broker.NewAPIClient(conn), conn, own, socket}, nil
}

func (b *brokered) name() (api, socket string) { return "broker", b.socket }

func (b *brokered) close() {
	_ = b.conn.Close()
	b.self.close()
}

// header must be in every request (SPIFFE Broker Endpoint, section 3.1).
const header = "broker.spiffe.io"

// errPID: no process can have this number.
var errPID = errors.New("no process id")

// about is the reference to a process of this host.
func about(pid int) (*broker.WorkloadReference, error) {
	if pid <= 0 || pid > math.MaxInt32 {
		return nil, fmt.Errorf("%w: %d", errPID, pid)
	}
	ref, err := anypb.New(&broker.WorkloadPIDReference{Pid: int32(pid)})
	if err != nil {
		return nil, err
	}
	return &broker.WorkloadReference{Reference: ref}, nil
}

func (b *brokered) attest(ctx context.Context, pid int) (func() (*word, error), error) {
	ref, err := about(pid)
	if err != nil {
		return nil, err
	}
	stream, err := b.client.SubscribeToX509SVID(metadata.AppendToOutgoingContext(ctx, header, "true"), &broker.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		return nil, err
	}
	return func() (*word, error) {
		m, err := stream.Recv()
		if err != nil {
			return nil, ofWorkload(err)
		}
		federated := m.GetFederatedBundles()
		w := &word{bundled: true, federated: federated, federates: slices.Collect(maps.Keys(federated))}
		for _, x := range m.GetSvids() {
			w.offers = append(w.offers, offer{id: x.GetSpiffeId(), hint: x.GetHint(), chain: x.GetX509Svid(), key: x.GetX509SvidKey(), bundle: x.GetBundle()})
		}
		return w, nil
	}, nil
}

// ofWorkload marks what the specification has agents say where a process is not there, or
// is none that the proxy may speak for: SPIRE sends an empty answer for most of it. A proxy
// that may not ask at all does not come so far: the TLS handshake fails.
func ofWorkload(err error) error {
	if c := status.Code(err); c == codes.PermissionDenied || c == codes.NotFound {
		return &refusal{err}
	}
	return err
}

// refusal is what the agent says about one workload, and no other.
type refusal struct{ error }

func (r *refusal) Unwrap() error { return r.error }

// bundles are about the proxy itself: the API has none that are about nobody. What goes with
// a workload comes with its SVID; these tell that the agent answers, and what it knows.
func (b *brokered) bundles(ctx context.Context) (func() (map[string][]byte, error), error) {
	ref, err := about(os.Getpid())
	if err != nil {
		return nil, err
	}
	stream, err := b.client.SubscribeToX509Bundles(metadata.AppendToOutgoingContext(ctx, header, "true"), &broker.SubscribeToX509BundlesRequest{Reference: ref})
	if err != nil {
		return nil, err
	}
	return func() (map[string][]byte, error) {
		m, err := stream.Recv()
		return m.GetBundles(), err
	}, nil
}

func (b *brokered) explain(err error) error {
	explained := explain(b.socket, err, remedies{
		refused:     "list the proxy's SPIFFE ID among experimental.broker.brokers of the agent, with the allowed_reference_types WorkloadPIDReference",
		unreachable: "it must run with this experimental.broker.socket_path, let the proxy's user in, and list the proxy's SPIFFE ID among its brokers",
		unknown:     "Broker API (%s): it takes SPIRE 1.15.2 or newer",
	})
	if r := (*refusal)(nil); errors.As(err, &r) {
		return fmt.Errorf("%w: %w", identity.ErrWithdrawn, explained)
	}
	return explained
}
