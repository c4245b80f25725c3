package controller_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

func TestClaimProfiles(t *testing.T) {
	w := newWorld(t)
	w.apply(`
kind: Namespace
name: /
mode: enforce
default: deny
protection: encrypted
attributes: {app: {}}
---
kind: Profile
namespace: /
name: by-id
match: {spiffe.trust_domain: site-a.test}
labels: {app: web}
---
kind: Profile
namespace: /
name: by-program
match: {proc.exe: /usr/bin/web}
labels: {app: web}
`)
	data, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "claims.token"))
	if err != nil {
		t.Fatal(err)
	}
	token := strings.TrimSpace(string(data))
	with := func(token string) symbolonv1connect.ClaimsServiceClient {
		c := w.client(w.tls())
		c.Transport = bearer{token, c.Transport}
		return symbolonv1connect.NewClaimsServiceClient(c, "https://"+w.address())
	}
	ask := func(token string, generation uint64, digest []byte) (*symbolonv1.ListClaimProfilesResponse, error) {
		res, err := with(token).ListClaimProfiles(t.Context(), connect.NewRequest(&symbolonv1.ListClaimProfilesRequest{Generation: generation, Digest: digest}))
		if err != nil {
			return nil, err
		}
		return res.Msg, nil
	}
	if _, err := ask("guessed", 0, nil); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("with a guessed token: %v", err)
	}
	for _, token := range []string{token, w.adminToken()} {
		res, err := ask(token, 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(res.GetProfiles()) != 1 || res.GetProfiles()[0].GetName() != "by-id" || res.GetUnchanged() {
			t.Errorf("profiles: %v", res)
		}
		first := res
		if res, err = ask(token, first.GetGeneration(), first.GetDigest()); err != nil || !res.GetUnchanged() || len(res.GetProfiles()) != 0 {
			t.Errorf("asked again: %v, %v", res, err)
		}
		// The same number with another set: the store was restored from a backup.
		other := bytes.Repeat([]byte{7}, len(first.GetDigest()))
		if res, err = ask(token, first.GetGeneration(), other); err != nil || res.GetUnchanged() || len(res.GetProfiles()) != 1 {
			t.Errorf("asked with another set of that number: %v, %v", res, err)
		}
	}
	// It opens nothing else.
	c := w.client(w.tls())
	c.Transport = bearer{token, c.Transport}
	admin := symbolonv1connect.NewAdminServiceClient(c, "https://"+w.address())
	if _, err := admin.ListHosts(t.Context(), connect.NewRequest(&symbolonv1.ListHostsRequest{})); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("the claims token lists hosts: %v", err)
	}
}
