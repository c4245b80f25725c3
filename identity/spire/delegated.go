package spire

import (
	"bytes"
	"context"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// delegated is the agent's Delegated Identity API.
type delegated struct {
	client delegatedidentityv1.DelegatedIdentityClient
	conn   *grpc.ClientConn
	socket string
}

func openDelegated(socket string) (api, error) {
	// The socket's mode is what protects it.
	conn, err := dial(socket, insecure.NewCredentials())
	if err != nil {
		return nil, err
	}
	return &delegated{delegatedidentityv1.NewDelegatedIdentityClient(conn), conn, socket}, nil
}

func (d *delegated) name() (api, socket string) { return "delegated", d.socket }

func (d *delegated) close() { _ = d.conn.Close() }

func (d *delegated) attest(ctx context.Context, pid int) (func() (*word, error), error) {
	stream, err := d.client.SubscribeToX509SVIDs(ctx, &delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: int32(pid)})
	if err != nil {
		return nil, err
	}
	return func() (*word, error) {
		m, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		w := &word{federates: m.GetFederatesWith()}
		for _, x := range m.GetX509Svids() {
			svid := x.GetX509Svid()
			w.offers = append(w.offers, offer{
				id: "spiffe://" + svid.GetId().GetTrustDomain() + svid.GetId().GetPath(), hint: svid.GetHint(),
				chain: bytes.Join(svid.GetCertChain(), nil), key: x.GetX509SvidKey(),
			})
		}
		return w, nil
	}, nil
}

func (d *delegated) bundles(ctx context.Context) (func() (map[string][]byte, error), error) {
	stream, err := d.client.SubscribeToX509Bundles(ctx, &delegatedidentityv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		return nil, err
	}
	return func() (map[string][]byte, error) {
		m, err := stream.Recv()
		return m.GetCaCertificates(), err
	}, nil
}

func (d *delegated) explain(err error) error {
	return explain(d.socket, err, remedies{
		refused:     "give the proxy a registration entry, and list its SPIFFE ID in the agent's authorized_delegates",
		unreachable: "it must run with this admin_socket_path, and let the proxy's user in",
		unknown:     "Delegated Identity API (%s): it takes SPIRE 1.10.2 or newer",
	})
}
